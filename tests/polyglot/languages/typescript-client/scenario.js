// Does with the client what the first argument names, against the gateway at the second; prints what came of it as JSON.

import { readFileSync } from "node:fs";

import { CallError, Code, CompletionState, StopReason, connect, seconds, user } from "deltawire/node";
import { connect as connectWeb } from "deltawire/web";

const [name, target, file] = process.argv.slice(2);
const chat = { messages: [user("hi")] };

// Read until the first text, without leaving the stream.
async function begin(stream) {
  for (;;) {
    const { value } = await stream[Symbol.asyncIterator]().next();
    if (value.event.case === "textDelta") {
      return value.event.value.text;
    }
  }
}

async function failure(promise) {
  try {
    return await promise;
  } catch (error) {
    if (!(error instanceof CallError)) {
      throw error;
    }
    return { code: Code[error.code], reason: error.reason, text: error.answer?.text };
  }
}

const SCENARIOS = {
  // Many streams at once, each ended softly by its own call.
  async softly(client) {
    const streams = Array.from({ length: 12 }, () => client.chat.stream(chat));
    await Promise.all(streams.map(begin));
    await Promise.all(streams.map((stream) => stream.cancelSoftly()));
    const answers = await Promise.all(streams.map((stream) => stream.final()));
    return [...new Set(answers.map((answer) => StopReason[answer.stopReason]))];
  },

  // By a chosen id, from a client that has never seen the stream.
  async another(client) {
    const other = connectAgain();
    const stream = client.chat.stream({ ...chat, completionId: "mine" }, { options: { retention: seconds(60) } });
    const text = await begin(stream);
    stream.cancel();
    const { state } = await other.chat.get("mine");
    const resumed = other.chat.resume("mine", stream.lastSequence);
    await begin(resumed);
    await other.chat.cancel("mine");
    const answer = await resumed.final();
    other.close();
    const isWhole = answer.text.startsWith(text) && answer.text.length > text.length;
    return [CompletionState[state], StopReason[answer.stopReason], isWhole];
  },

  // The client remembers which gateway has each, so that a call with a single attempt finds it.
  async remember(client) {
    const states = new Set();
    for (let number = 0; number < 12; number += 1) {
      const { completionId } = await client.chat.create(chat);
      const { state } = await client.chat.get(completionId, { headers: { "x-deltawire-route": "elsewhere" } });
      states.add(CompletionState[state]);
    }
    return [...states];
  },

  async leave(client) {
    for await (const text of client.chat.stream(chat).text) {
      return text.length > 0;
    }
  },

  async abort(client) {
    const abort = new AbortController();
    const stream = client.chat.stream(chat, { signal: abort.signal });
    await begin(stream);
    abort.abort();
    return failure(stream.final());
  },

  async close(client) {
    const stream = client.chat.stream(chat, { options: { retention: seconds(60) } });
    await begin(stream);
    client.close();
    return (await failure(stream.final())).code;
  },

  async create(client) {
    const answer = await client.chat.create(chat);
    const { state } = await client.chat.get(answer.completionId);
    const { promptTokens } = await client.chat.countTokens(chat);
    return [answer.text, CompletionState[state], promptTokens > 0];
  },

  async fail(client) {
    return failure(client.chat.stream(chat, { requestId: "r-1" }).final());
  },
};

const options = { timeoutMs: 60_000, ...(file && JSON.parse(readFileSync(file, "utf8"))) };
const connectAgain = () => (target.startsWith("http") ? connectWeb(target, options) : connect(target, options));
const client = connectAgain();
console.log(JSON.stringify(await SCENARIOS[name](client)));
client.close();
