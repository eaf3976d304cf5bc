// The script of a page with the client over gRPC-Web. The test that opened the page calls its functions.

import { CallError, Code, connect, seconds, user } from "deltawire/web";

const chat = { messages: [user("hi")] };

// Stream an answer to the end, and report each piece of text as it comes.
globalThis.chat = async (url, model) => {
  const client = connect(url);
  try {
    const stream = client.chat.stream({ ...chat, model });
    for await (const text of stream.text) {
      globalThis.report?.(text);
    }
    const answer = await stream.final();
    return { text: answer.text, tokens: answer.usage.completionTokens };
  } catch (error) {
    if (!(error instanceof CallError)) {
      throw error;
    }
    return { code: Code[error.code], reason: error.reason, text: error.answer?.text ?? "" };
  } finally {
    client.close();
  }
};

// Leave a stream after its first text, go on with it by its id, and end it softly.
globalThis.goOn = async (url) => {
  const client = connect(url);
  const left = client.chat.stream(chat, { options: { retention: seconds(60) } });
  for await (const text of left.text) {
    globalThis.report?.(text);
    break;
  }
  const stream = client.chat.resume(left.completionId, left.lastSequence);
  for await (const _ of stream) {
    await stream.cancelSoftly();
    break;
  }
  const { completed } = await client.chat.get(left.completionId);
  client.close();
  return completed.choices[0].stopReason;
};

globalThis.report?.("ready");
