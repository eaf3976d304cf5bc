// The calls of the conformance tests, made with the TypeScript client; see ../../conformance.proto.

import { type MessageInitShape, create, fromBinary, toBinary } from "@bufbuild/protobuf";
import * as deltawire from "deltawire";

import {
  type AnswerSchema,
  type ClientCase_Stream,
  type ClientCase_Watch,
  ClientCaseSchema,
  ClientResultSchema,
} from "./gen/conformance_pb.js";

type ResultInit = MessageInitShape<typeof ClientResultSchema>;

function answerOf(answer: deltawire.Answer): MessageInitShape<typeof AnswerSchema> {
  const { completionId, model, choices, usage, notices } = answer;
  return { completionId, model, choices: [...choices], ...(usage && { usage }), notices: [...notices] };
}

function failureOf(error: unknown): ResultInit {
  if (!(error instanceof deltawire.CallError)) {
    // A stream that breaks its rules has no status of its own.
    return { failure: { code: deltawire.Code.Internal } };
  }
  const { code, reason, violations, retryDelayMs, answer } = error;
  return {
    failure: {
      code,
      reason,
      interrupted: error instanceof deltawire.StreamInterrupted,
      ...(retryDelayMs !== undefined && { retryDelay: deltawire.seconds(retryDelayMs / 1000) }),
      fields: violations.map((violation) => violation.field),
      ...(answer && { partial: answerOf(answer) }),
    },
  };
}

interface Limits {
  readonly timeoutMs: number | undefined;
}

async function stream(
  client: deltawire.Client,
  { request, cancelAfterEvents }: ClientCase_Stream,
  limits: Limits,
): Promise<ResultInit> {
  const start = request!.start;
  const stream =
    start.case === "resume"
      ? client.chat.resume(start.value.completionId, start.value.lastSequence, limits)
      : client.chat.stream(start.value ?? {}, { options: request!.options, ...limits });
  let events = 0;
  for await (const _ of stream) {
    events += 1;
    if (events === cancelAfterEvents) {
      stream.cancel();
    }
  }
  return { answer: answerOf(await stream.final()) };
}

async function watch(
  client: deltawire.Client,
  { request, bookmarks }: ClientCase_Watch,
  limits: Limits,
): Promise<ResultInit> {
  const watch = client.models.watch({ revision: request?.revision, ...limits });
  for await (const event of watch) {
    bookmarks -= event.kind === "BOOKMARK" ? 1 : 0;
    if (bookmarks === 0) {
      break;
    }
  }
  return { models: [...watch.models.keys()].sort().map((id) => watch.models.get(id)!) };
}

/** Make the call of an encoded ClientCase. Returns its encoded ClientResult. */
export async function run(
  encoded: Uint8Array,
  connect: (target: string, options: { key: string }) => deltawire.Client,
): Promise<Uint8Array> {
  const { name, target, accessKey, timeout, action } = fromBinary(ClientCaseSchema, encoded);
  const client = connect(target, { key: accessKey });
  const limits = { timeoutMs: timeout && deltawire.milliseconds(timeout) };
  let result: ResultInit;
  try {
    result =
      action.case === "watch"
        ? await watch(client, action.value, limits)
        : await stream(client, action.value!, limits);
  } catch (error) {
    result = failureOf(error);
  } finally {
    client.close();
  }
  return toBinary(ClientResultSchema, create(ClientResultSchema, { ...result, name }));
}
