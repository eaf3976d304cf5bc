// The script of a page that streams answers over gRPC-Web with Connect. The test that opened the page calls its functions.

import { fromJson, type JsonValue, toJson } from '@bufbuild/protobuf';
import { Code, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcWebTransport } from '@connectrpc/connect-web';

import {
  ChatCompletion,
  StreamChatCompletionRequestSchema,
  StreamChatCompletionResponseSchema,
} from './gen/es/deltawire/v1/chat_completion_pb';
import { ErrorInfoSchema } from './gen/es/google/rpc/error_details_pb';

declare global {
  // Sends a text to the test: that the page is ready, then each piece of text as it comes.
  var report: ((text: string) => void) | undefined;
  var chat: typeof stream;
  var cancel: () => void;
}

interface Failure {
  code: string;
  message: string;
  reason: string | null;
  // The reason again, as a client without the messages of google.rpc reads it.
  trailer: string | null;
}

interface Reply {
  events: JsonValue[];
  gateway: string | null;
  error: Failure | null;
}

function failure(raised: unknown): Failure {
  const error = ConnectError.from(raised);
  const [info] = error.findDetails(ErrorInfoSchema);
  const trailer = error.metadata.get('deltawire-reason');
  return { code: Code[error.code], message: error.rawMessage, reason: info?.reason ?? null, trailer };
}

async function stream(baseUrl: string, request: JsonValue, headers: Record<string, string> = {}): Promise<Reply> {
  const client = createClient(ChatCompletion, createGrpcWebTransport({ baseUrl }));
  const abort = new AbortController();
  globalThis.cancel = () => abort.abort();
  const reply: Reply = { events: [], gateway: null, error: null };
  try {
    const events = client.streamChatCompletion(fromJson(StreamChatCompletionRequestSchema, request), {
      headers,
      signal: abort.signal,
      onHeader: (received) => {
        reply.gateway = received.get('x-deltawire-gateway');
      },
    });
    for await (const event of events) {
      reply.events.push(toJson(StreamChatCompletionResponseSchema, event));
      if (event.event.case === 'textDelta') {
        globalThis.report?.(event.event.value.text);
      }
    }
  } catch (raised) {
    reply.error = failure(raised);
  }
  return reply;
}

globalThis.chat = stream;
globalThis.report?.('ready');
