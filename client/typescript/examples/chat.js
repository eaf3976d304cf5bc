// Streams one answer from a deltawire gateway.
//
//     node examples/chat.js --tool ../examples/weather.json "Is it raining in Oslo?"
//
// $DELTAWIRE_TOKEN is the access key, if the gateway requires one.
//
// Exit status: 0 the answer is whole, 1 the call failed, 2 the command line is wrong, 130 Ctrl-C.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import { CallError, Code, StopReason, ToolCallFailureReason, connect, tool, user } from "deltawire/node";

const USAGE = `usage: node chat.js [options] PROMPT

  --target HOST:PORT   the gateway (default 127.0.0.1:50051)
  --model NAME         default: the only chat model that it serves
  --tool FILE          tools in the form of deltawire or OpenAI, as JSON: one, or a list; repeatable`;

async function readTools(file) {
  return [JSON.parse(await readFile(file, "utf8"))].flat().map(tool);
}

async function readCommandLine() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      target: { type: "string", default: "127.0.0.1:50051" },
      model: { type: "string", default: "" },
      tool: { type: "string", multiple: true, default: [] },
    },
  });
  const prompt = positionals.join(" ");
  if (!prompt) {
    throw new Error("PROMPT is missing");
  }
  const tools = (await Promise.all(values.tool.map(readTools))).flat();
  return { target: values.target, chat: { model: values.model, messages: [user(prompt)], tools } };
}

async function main() {
  let commandLine;
  try {
    commandLine = await readCommandLine();
  } catch (error) {
    console.error(`${error.message}\n${USAGE}`);
    return 2;
  }
  let client;
  try {
    client = connect(commandLine.target, { key: process.env.DELTAWIRE_TOKEN });
  } catch (error) {
    console.error(error.message);
    return 2;
  }
  const stream = client.chat.stream(commandLine.chat);
  // The cancel reaches the engine: it stops generating.
  process.once("SIGINT", () => stream.cancel());
  let begun = false;
  try {
    for await (const text of stream.text) {
      begun = true;
      process.stdout.write(text);
    }
    const answer = await stream.final();
    for (const call of answer.toolCalls) {
      console.log(`\ntool call ${call.toolName}(${call.arguments})`);
    }
    for (const { toolName, outcome } of answer.failedToolCalls) {
      console.log(`\ntool call ${toolName} failed: ${ToolCallFailureReason[outcome.value.reason]}`);
    }
    const executable = answer.toolCallsExecutable ? ", tool calls may be executed" : "";
    console.log(`\n[${StopReason[answer.stopReason]}${executable}, ${answer.usage.completionTokens} tokens]`);
    return 0;
  } catch (error) {
    if (!(error instanceof CallError)) {
      throw error;
    }
    process.stdout.write(begun ? "\n" : ""); // ends the line of the text so far
    console.error(error.message);
    return error.code === Code.Canceled ? 130 : 1;
  } finally {
    client.close();
  }
}

process.exitCode = await main();
