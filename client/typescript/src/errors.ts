// Failed calls as typed errors. Branch on the class, the code or the reason, never on the message.

import { Code, ConnectError } from "@connectrpc/connect";

import type { Answer } from "./answer.js";
import { ErrorReason } from "./gen/deltawire/v1/error_reason_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { milliseconds } from "./messages.js";

export { Code };

const DOMAIN = "deltawire.dev";

/** The name of a reason of the gateway, "" for none. A later version may send others. */
export type Reason = keyof typeof ErrorReason | "" | (string & {});

/** All that is known of a failed call. */
export interface Failure {
  /** The gRPC status code. */
  readonly code: Code;
  /** The status message. */
  readonly rawMessage: string;
  readonly reason: Reason;
  /** What the reason's documentation names, such as `field`. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The fields of the request that break a rule. */
  readonly violations: readonly { readonly field: string; readonly description: string }[];
  /** After how many milliseconds the gateway asks to retry. */
  readonly retryDelayMs: number | undefined;
  /** The call's id in the gateway's log. */
  readonly requestId: string;
  /** The trailers, with the headers if the call failed before its first event. */
  readonly trailers: Headers;
  /** What had arrived of an answer. */
  readonly answer: Answer | undefined;
}

/** The superclass of the errors below. */
export class DeltawireError extends Error {
  override get name(): string {
    return this.constructor.name;
  }
}

/** The gateway violated the API, for example by a gap in the events: the answer cannot be trusted. */
export class ProtocolError extends DeltawireError {}

/** The call ended with a status that is not OK. */
export class CallError extends DeltawireError implements Failure {
  readonly code: Code;
  readonly rawMessage: string;
  readonly reason: Reason;
  readonly metadata: Readonly<Record<string, string>>;
  readonly violations: readonly { readonly field: string; readonly description: string }[];
  readonly retryDelayMs: number | undefined;
  readonly requestId: string;
  readonly trailers: Headers;
  readonly answer: Answer | undefined;

  constructor(failure: Partial<Failure> & Pick<Failure, "code" | "rawMessage">, cause?: unknown) {
    super(`${[Code[failure.code], failure.reason].filter(Boolean).join(" ")}: ${failure.rawMessage}`, { cause });
    this.code = failure.code;
    this.rawMessage = failure.rawMessage;
    this.reason = failure.reason ?? "";
    this.metadata = failure.metadata ?? {};
    this.violations = failure.violations ?? [];
    this.retryDelayMs = failure.retryDelayMs;
    this.requestId = failure.requestId ?? "";
    this.trailers = failure.trailers ?? new Headers();
    this.answer = failure.answer;
  }
}

/** The stream ended without its last event after it had begun: `answer` has what was received, and there may have been more. */
export class StreamInterrupted extends CallError {}

/** What Connect throws, as the failure that it is. */
export function callError(thrown: unknown, sentId: string): CallError {
  const error = ConnectError.from(thrown);
  const trailers = error.metadata;
  const info = error.findDetails(ErrorInfoSchema).find((each) => each.domain === DOMAIN);
  const delay = error.findDetails(RetryInfoSchema).find((each) => each.retryDelay)?.retryDelay;
  return new CallError(
    {
      code: codeOf(error),
      rawMessage: error.rawMessage,
      reason: info?.reason ?? trailers.get("deltawire-reason") ?? "",
      metadata: info?.metadata ?? {},
      violations: error.findDetails(BadRequestSchema).flatMap((each) => each.fieldViolations),
      retryDelayMs: delay && milliseconds(delay),
      requestId: info?.metadata["request_id"] || trailers.get("x-request-id") || sentId,
      trailers,
    },
    thrown,
  );
}

/** The code that gRPC has for a failure. Connect and Node have others for connections that break. */
function codeOf({ code, cause, metadata }: ConnectError): Code {
  if (metadata.has("grpc-status")) {
    return code;
  }
  const failed = cause instanceof Error && "code" in cause ? String(cause.code) : "";
  if (failed === "ERR_HTTP2_STREAM_ERROR") {
    // Only this call was reset.
    return /REFUSED_STREAM|CANCEL/.test((cause as Error).message) ? Code.Unavailable : Code.Internal;
  }
  // Without a connection: what Node throws, what `fetch` throws, and how Node closes the streams of one that was lost.
  if (failed || cause instanceof TypeError || code === Code.Canceled || code === Code.Aborted) {
    return Code.Unavailable;
  }
  // The last message is not whole.
  return code === Code.InvalidArgument ? Code.Internal : code;
}

/** The fault of `Completed.error`, for when a proxy lost the status that should have said so. */
export function faultOf(error: CallError, fault: { code: number; reason: ErrorReason; message: string }): Failure {
  return { ...error, code: fault.code, reason: ErrorReason[fault.reason] ?? "", rawMessage: fault.message };
}
