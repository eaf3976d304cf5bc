// From events to the finished answer, and from the way in which a stream ended to its outcome.

import { create } from "@bufbuild/protobuf";

import { CallError, Code, ProtocolError, StreamInterrupted, faultOf } from "./errors.js";
import {
  type ChoiceFinished,
  type Completed,
  Completed_ChoiceSchema,
  type Completed_Choice,
  type Notice,
  type Started,
  StopReason,
  type StreamChatCompletionResponse,
  type TokenLogprob,
  type Usage,
} from "./gen/deltawire/v1/chat_completion_pb.js";
import { type AssistantMessage, type ChatMessage, ChatMessageSchema } from "./gen/deltawire/v1/message_pb.js";
import type { ToolCall, ToolCallDelta } from "./gen/deltawire/v1/tool_pb.js";

/** An answer. The getters are about choice 0. In an error it is what had arrived. */
export class Answer {
  constructor(
    readonly completionId: string,
    readonly started: Started | undefined,
    /** By ascending index. A stream has the log-probabilities of reasoning in its events only. */
    readonly choices: readonly Completed_Choice[],
    readonly notices: readonly Notice[],
    readonly usage: Usage | undefined,
    readonly completed: Completed | undefined,
    /** The call's id in the gateway's log. */
    readonly requestId: string,
  ) {}

  /** The id of the model that answered. */
  get model(): string {
    return this.started?.model ?? "";
  }

  /** The model's turn in the form of a request: append it to the messages of the next one. */
  get message(): ChatMessage {
    const value = this.#assistant ?? {};
    return create(ChatMessageSchema, { role: { case: "assistant", value } });
  }

  get text(): string {
    return this.#assistant?.text ?? "";
  }

  get reasoning(): string {
    return this.#assistant?.reasoning ?? "";
  }

  /** Run them only if `toolCallsExecutable`. */
  get toolCalls(): readonly ToolCall[] {
    return this.#assistant?.toolCalls ?? [];
  }

  get failedToolCalls(): readonly ToolCallDelta[] {
    return this.#first?.failedToolCalls ?? [];
  }

  get toolCallsExecutable(): boolean {
    return this.#first?.toolCallsExecutable ?? false;
  }

  get stopReason(): StopReason {
    return this.#first?.stopReason ?? StopReason.UNSPECIFIED;
  }

  get #first(): Completed_Choice | undefined {
    return this.choices.find((choice) => choice.index === 0);
  }

  get #assistant(): AssistantMessage | undefined {
    return this.#first?.message;
  }
}

/** The content of the events for one choice. Text is kept in pieces, which are joined once. */
class Parts {
  readonly text: string[] = [];
  readonly reasoning: string[] = [];
  readonly toolCalls: ToolCall[] = [];
  readonly failedToolCalls: ToolCallDelta[] = [];
  readonly logprobs: TokenLogprob[] = [];
  finished: ChoiceFinished | undefined;
}

/** Builds the answer from a stream's events, and checks the stream against its rules. */
export class Accumulator {
  usage: Usage | undefined;
  readonly notices: Notice[] = [];
  #started: Started | undefined;
  #completed: Completed | undefined;
  readonly #parts = new Map<number, Parts>();
  readonly #first: bigint;
  #next: bigint;

  constructor(
    private readonly givenId: string,
    /** The last event that was read before; undefined if this reads the stream from its first event. */
    private readonly after: bigint | undefined,
  ) {
    this.#first = this.#next = after === undefined ? 0n : after + 1n;
  }

  get completionId(): string {
    return this.#started?.completionId ?? this.givenId;
  }

  /** The sequence of the next event. */
  get expected(): bigint {
    return this.#next;
  }

  /** Whether any part of the answer was received. Heartbeats before `started` are no beginning. */
  get hasBegun(): boolean {
    return this.#started !== undefined || (this.after !== undefined && this.#next > this.#first);
  }

  /** Whether a stream was resumed after its last event, if its call has ended with status OK. */
  get isOnlyTheEnd(): boolean {
    return this.after !== undefined && this.#next === this.#first;
  }

  /** Whether the last event was received. */
  get isComplete(): boolean {
    return this.#completed !== undefined;
  }

  /** Take the next event. One of a later version is counted and skipped. */
  receive({ sequence, choiceIndex, event }: StreamChatCompletionResponse): void {
    this.#check(sequence, event.case);
    this.#next += 1n;
    const parts = () => this.#of(choiceIndex ?? 0);
    switch (event.case) {
      case "started":
        this.#started = event.value;
        break;
      case "textDelta":
        parts().text.push(event.value.text);
        parts().logprobs.push(...event.value.logprobs);
        break;
      case "reasoningDelta":
        parts().reasoning.push(event.value.text);
        break;
      case "toolCallDelta":
        // A verdict has all that the fragments had.
        if (event.value.outcome.case === "toolCall") {
          parts().toolCalls.push(event.value.outcome.value);
        } else if (event.value.outcome.case === "failure") {
          parts().failedToolCalls.push(event.value);
        }
        break;
      case "choiceFinished":
        parts().finished = event.value;
        break;
      case "usageUpdate":
        this.usage = event.value.usage;
        break;
      case "notice":
        this.notices.push(event.value);
        break;
      case "completed":
        this.#completed = event.value;
        this.usage = event.value.usage;
        break;
    }
  }

  /**
   * The answer of a stream whose last call has ended: with `failure`, or with status OK.
   *
   * Whether it is whole depends on `completed` alone, because a proxy may replace the status. If that has an error, the status
   * has the same if it has a reason. Without `completed`, a cancel and a passed deadline are the caller's own doing.
   */
  finish(failure: CallError | undefined, requestId: string): Answer {
    const fault = this.#completed?.error;
    const isWhole = this.#completed !== undefined && fault === undefined;
    const answer = this.#answer(isWhole, requestId);
    if (isWhole || (failure === undefined && this.isOnlyTheEnd)) {
      return answer;
    }
    const error =
      failure ??
      new CallError({ code: Code.Unknown, rawMessage: "the stream ended without its last event", requestId });
    const own = { ...error, answer: this.hasBegun ? answer : undefined };
    if (fault !== undefined) {
      throw new CallError(error.reason ? own : { ...faultOf(error, fault), answer }, failure?.cause);
    }
    const isCallers = error.code === Code.Canceled || error.code === Code.DeadlineExceeded;
    const isInterrupted = failure === undefined || (this.hasBegun && !isCallers);
    throw new (isInterrupted ? StreamInterrupted : CallError)(own, failure?.cause);
  }

  /** No gap, `started` first and once, nothing after `completed`. */
  #check(sequence: bigint, kind: string | undefined): void {
    if (sequence !== this.#next) {
      throw broken(`event ${this.#next} was expected and ${sequence} came`);
    }
    if (this.isComplete) {
      throw broken("an event came after the last one");
    }
    if (kind === undefined || kind === "heartbeat") {
      return;
    }
    if (kind === "started" && this.#started !== undefined) {
      throw broken("started came after started");
    }
    if (kind !== "started" && this.#started === undefined && this.after === undefined) {
      throw broken(`${kind} came before started`);
    }
  }

  #of(index: number): Parts {
    const parts = this.#parts.get(index) ?? new Parts();
    this.#parts.set(index, parts);
    return parts;
  }

  #answer(isWhole: boolean, requestId: string): Answer {
    const stated = new Map(this.#completed?.choices.map((choice) => [choice.index, choice]));
    const indexes = [...new Set([...this.#parts.keys(), ...stated.keys()])].sort((one, other) => one - other);
    const choices = indexes.map((index) => this.#choice(index, stated.get(index), isWhole));
    const { completionId, notices, usage } = this;
    return new Answer(completionId, this.#started, choices, notices, usage, this.#completed, requestId);
  }

  /** The deltas have the whole content, unless they were not read from the first one on. */
  #choice(index: number, stated: Completed_Choice | undefined, isWhole: boolean): Completed_Choice {
    if (stated?.message !== undefined && this.after !== undefined && !this.#completed?.messagesOmitted) {
      return stated;
    }
    const parts = this.#of(index);
    const { stopReason = StopReason.UNSPECIFIED, engineFinishReason = "", matched } = parts.finished ?? stated ?? {};
    const text = parts.text.join("");
    return create(Completed_ChoiceSchema, {
      index,
      message: {
        ...(text && { text }),
        reasoning: parts.reasoning.join(""),
        toolCalls: parts.toolCalls,
      },
      failedToolCalls: parts.failedToolCalls,
      stopReason,
      engineFinishReason,
      ...(matched && { matched }),
      logprobs: parts.logprobs,
      // Calls may be run only if all went well.
      toolCallsExecutable: isWhole && (stated ?? parts.finished)?.toolCallsExecutable === true,
    });
  }
}

function broken(what: string): ProtocolError {
  return new ProtocolError(`the gateway broke the rules of its stream: ${what}`);
}
