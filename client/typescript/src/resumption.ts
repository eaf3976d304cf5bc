// Whether an answer goes on after a call has ended without the stream's last event, and how.
//
// What is asked with `retention` goes on after a pause, which grows until something new comes. What has brought nothing new for
// that long is given up.
//
//     how the call ended                 after                       what is next
//     connection lost, or the gateway    any call                    resume after the last event
//     cut this call only
//     refused for now                    a resuming call             resume after the last event
//     another process has it             a resuming call             resume on a new connection, at most MAX_CONNECTIONS times
//                                                                    since the last event
//     no such completion                 a resuming call, not begun  start again, at most MAX_ATTEMPTS times
//                                        a resuming call, begun      as if another process has it: an id of a caller does not
//                                                                    say which process that is
//     the completion exists already      a starting call, if the id  resume: it is our own, whose beginning was lost
//                                        is ours
//     anything else                      any call                    give up

import { create } from "@bufbuild/protobuf";

import { type CallError, Code, type Reason } from "./errors.js";
import {
  type StreamChatCompletionRequest,
  StreamChatCompletionRequestSchema,
} from "./gen/deltawire/v1/chat_completion_pb.js";
import { ErrorReason } from "./gen/deltawire/v1/error_reason_pb.js";
import { milliseconds } from "./messages.js";

/** Attempts of a call that has received nothing, and starts of a completion. */
export const MAX_ATTEMPTS = 4;
/** New connections to find the process that has a completion: behind a balancer each may reach another one. */
export const MAX_CONNECTIONS = 8;

const LOST_REASONS: readonly Reason[] = ["DRAINING", "SLOW_CALLER"];
const REFUSED_REASONS: readonly Reason[] = ["TOO_MANY_STREAMS", "CALLER_LIMIT_EXCEEDED", "STORE_UNAVAILABLE"];
/** Without a known reason, the status is that of a proxy or of the connection. */
const LOST_CODES: readonly Code[] = [
  Code.Unavailable,
  Code.Internal,
  Code.Unknown,
  Code.Canceled,
  Code.DeadlineExceeded,
];

/** Whether the gateway said why, in a way that this version knows. */
function hasKnownReason({ reason }: CallError): boolean {
  return reason in ErrorReason;
}

/** Milliseconds between calls: twice as many each time, and random, so that clients do not come back together. */
export class Pauses {
  #longest: number;

  constructor(
    private readonly shortest: number,
    private readonly limit: number,
  ) {
    this.#longest = shortest;
  }

  reset(): void {
    this.#longest = this.shortest;
  }

  /** The next pause; longer if the gateway asks for it. */
  next(error?: CallError): number {
    this.#longest = Math.min(this.limit, 2 * this.#longest);
    return Math.max((this.#longest * (1 + Math.random())) / 2, error?.retryDelayMs ?? 0);
  }
}

/** The calls of one completion: what each asks for, and whether there is another. */
export class Resumption {
  readonly completionId: string;
  /** The last event that has been read. */
  lastSequence: bigint | undefined;
  /** How many calls have begun. */
  calls = 0;
  /** How many new connections were needed since the last event; 0 if the next call needs none. */
  moved = 0;
  readonly #request: StreamChatCompletionRequest;
  readonly #retentionMs: number | undefined;
  readonly #madeId: boolean;
  readonly #pauses = new Pauses(50, 2_000);
  #resuming: boolean;
  #starts = 0;
  #connections = 0;
  #since = performance.now();

  constructor(
    request: StreamChatCompletionRequest,
    /** For how long to go on without anything new; by default the request's `retention`. */
    resumeForMs: number | undefined,
    makeId: () => string,
  ) {
    const { start, options } = request;
    this.#retentionMs = resumeForMs ?? (options?.retention && milliseconds(options.retention));
    this.#resuming = start.case === "resume";
    this.#madeId = start.case === "chat" && !start.value.completionId && this.#retentionMs !== undefined;
    // So that it can be resumed before its first event.
    this.completionId = this.#madeId ? `own-${makeId()}` : (start.value?.completionId ?? "");
    const { completionId } = this;
    this.#request =
      start.case === "chat" ? { ...request, start: { case: "chat", value: { ...start.value, completionId } } } : request;
    this.lastSequence = start.case === "resume" ? start.value.lastSequence : undefined;
  }

  /** The next call's request. One that starts the stream anew counts its events from 0 again. */
  begin(): StreamChatCompletionRequest {
    this.calls += 1;
    if (this.#resuming) {
      const { completionId, lastSequence } = this;
      const value = { completionId, ...(lastSequence !== undefined && { lastSequence }) };
      return create(StreamChatCompletionRequestSchema, { start: { case: "resume", value } });
    }
    this.#starts += 1;
    this.lastSequence = undefined;
    return this.#request;
  }

  /** Take note of an event that had not come before. */
  received(sequence: bigint): void {
    this.lastSequence = sequence;
    this.#since = performance.now();
    this.#pauses.reset();
    this.#connections = 0;
  }

  /** Milliseconds until the next call; undefined to give up. */
  ended(error: CallError | undefined, hasBegun: boolean): number | undefined {
    this.moved = 0;
    if (this.#retentionMs === undefined || !this.#goesOn(error, hasBegun)) {
      return undefined;
    }
    const pause = this.#pauses.next(error);
    return performance.now() - this.#since + pause > this.#retentionMs ? undefined : pause;
  }

  #goesOn(error: CallError | undefined, hasBegun: boolean): boolean {
    const reason = error?.reason ?? "";
    if (error === undefined || LOST_REASONS.includes(reason)) {
      this.#resuming = true;
      return true;
    }
    if (REFUSED_REASONS.includes(reason)) {
      return this.#resuming;
    }
    if (reason === "WRONG_REPLICA" || (reason === "COMPLETION_NOT_FOUND" && hasBegun)) {
      this.#connections += 1;
      this.moved = this.#resuming && this.#connections <= MAX_CONNECTIONS ? this.#connections : 0;
      return this.moved > 0;
    }
    if (reason === "COMPLETION_NOT_FOUND") {
      const again = this.#resuming && this.#starts > 0 && this.#starts < MAX_ATTEMPTS;
      this.#resuming = !again;
      return again;
    }
    if (reason === "COMPLETION_ALREADY_EXISTS") {
      const isOurs = !this.#resuming && (this.#madeId || this.#starts > 1);
      this.#resuming ||= isOurs;
      return isOurs;
    }
    if (hasKnownReason(error) || !LOST_CODES.includes(error.code)) {
      return false;
    }
    this.#resuming = true;
    return true;
  }
}
