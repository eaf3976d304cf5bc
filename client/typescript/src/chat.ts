// Chat requests, and answers that are being generated.

import { type MessageInitShape, create } from "@bufbuild/protobuf";

import { Accumulator, Answer } from "./answer.js";
import { Call, type CallOptions, type Defaults } from "./calls.js";
import type { Connections, Method } from "./client.js";
import { CallError, type DeltawireError, ProtocolError } from "./errors.js";
import {
  type CancelChatCompletionResponse,
  type ChatRequestSchema,
  type CountTokensResponse,
  type GetChatCompletionResponse,
  type Notice,
  type StreamChatCompletionRequest,
  StreamChatCompletionRequestSchema,
  type StreamChatCompletionResponse,
  type StreamOptionsSchema,
  type Usage,
} from "./gen/deltawire/v1/chat_completion_pb.js";
import { Resumption } from "./resumption.js";

export type ChatInit = MessageInitShape<typeof ChatRequestSchema>;

export interface StreamCallOptions extends CallOptions {
  /** With `retention`, the stream resumes by itself after a lost connection, and canceling the call does not end generation. */
  readonly options?: MessageInitShape<typeof StreamOptionsSchema> | undefined;
}

export interface ResumeOptions extends CallOptions {
  /** For how many milliseconds without a new event the stream resumes by itself; by default 60 s. */
  readonly resumeForMs?: number | undefined;
}

/** The methods about a completion that `Connections.find` calls. */
function softCancel(completionId: string): Method<CancelChatCompletionResponse> {
  return (stub, given) => stub.cancelChatCompletion({ completionId }, given);
}

export class Chat {
  constructor(
    private readonly connections: Connections,
    private readonly defaults: Defaults,
  ) {}

  /** Send a request, and wait for the whole answer. */
  async create(chat: ChatInit, options: CallOptions = {}): Promise<Answer> {
    const call = new Call(this.defaults, options).about(chat.completionId ?? "", { begins: true });
    try {
      const made = await call.unary((given) => this.connections.main.chat.createChatCompletion({ chat }, given));
      const { started, completed } = made;
      if (completed === undefined) {
        throw new ProtocolError("the answer has no `completed`");
      }
      const { choices, usage } = completed;
      const { completionId = "" } = started ?? {};
      call.found(completionId);
      return new Answer(completionId, started, choices, [], usage, completed, call.requestId);
    } finally {
      call.end();
    }
  }

  /** Send a request, and read the answer while it is generated. The call is made when the stream is first read. */
  stream(chat: ChatInit, { options, ...callOptions }: StreamCallOptions = {}): ChatStream {
    const request = create(StreamChatCompletionRequestSchema, {
      start: { case: "chat", value: chat },
      ...(options && { options }),
    });
    return new ChatStream(this.connections, this.defaults, request, undefined, callOptions);
  }

  /** Read a stream with `retention` that has begun elsewhere: all of it, or what follows `lastSequence`. */
  resume(
    completionId: string,
    lastSequence?: bigint,
    { resumeForMs = 60_000, ...callOptions }: ResumeOptions = {},
  ): ChatStream {
    const value = { completionId, ...(lastSequence !== undefined && { lastSequence }) };
    const request = create(StreamChatCompletionRequestSchema, { start: { case: "resume", value } });
    return new ChatStream(this.connections, this.defaults, request, resumeForMs, callOptions);
  }

  /** End a completion softly: its readers get a normal end with the text so far and the usage. */
  async cancel(completionId: string, options: CallOptions = {}): Promise<CancelChatCompletionResponse> {
    const call = new Call(this.defaults, options);
    return this.connections.find(call, completionId, softCancel(completionId));
  }

  /** The state of a completion, and its result if that is retained. */
  async get(completionId: string, options: CallOptions = {}): Promise<GetChatCompletionResponse> {
    const call = new Call(this.defaults, options);
    return this.connections.find(call, completionId, (stub, given) => stub.getChatCompletion({ completionId }, given));
  }

  /** Count the tokens of a prompt; nothing is generated. */
  async countTokens(chat: ChatInit, options: CallOptions = {}): Promise<CountTokensResponse> {
    const call = new Call(this.defaults, options);
    try {
      return await call.unary((given) => this.connections.main.chat.countTokens({ chat }, given));
    } finally {
      call.end();
    }
  }
}

/**
 * An answer that is being generated: iterate over its events or over `text`, or await `final()`. All read the same stream, once.
 * Leaving a loop over it ends the call, on both sides.
 */
export class ChatStream implements AsyncIterable<StreamChatCompletionResponse> {
  readonly #call: Call;
  readonly #resumption: Resumption;
  readonly #events: AsyncGenerator<StreamChatCompletionResponse, void>;
  #accumulator: Accumulator;
  #connection;
  #outcome: Answer | DeltawireError | undefined;

  constructor(
    private readonly connections: Connections,
    defaults: Defaults,
    request: StreamChatCompletionRequest,
    resumeForMs: number | undefined,
    options: CallOptions,
  ) {
    this.#call = new Call(defaults, options);
    this.#resumption = new Resumption(request, resumeForMs, defaults.makeId);
    this.#accumulator = new Accumulator(this.#resumption.completionId, this.#resumption.lastSequence);
    this.#connection = connections.main;
    this.#events = this.#read();
  }

  [Symbol.asyncIterator](): AsyncGenerator<StreamChatCompletionResponse, void> {
    return this.#events;
  }

  /** The text of choice 0, piece by piece. */
  get text(): AsyncGenerator<string, void> {
    return textOf(this);
  }

  /** Read to the end. Throws if the answer is incomplete, also when it is called again. */
  async final(): Promise<Answer> {
    for await (const _ of this) {
      // `#read` has folded it.
    }
    // Undecided only if the events were abandoned before the first of them was read.
    this.#settle(this.#call.canceled());
    return this.#answer();
  }

  /** End the call now, on both sides. */
  cancel(): void {
    this.#call.end();
    // Releases the resources of the stream if no caller continues to read it.
    void this.#events.return();
  }

  /** End only generation: the stream then ends normally, with the text so far and the usage. */
  async cancelSoftly(): Promise<CancelChatCompletionResponse> {
    const { completionId } = this;
    if (!completionId) {
      throw new TypeError("the completion's id is not known before `started`: set a completionId, or cancel()");
    }
    const call = this.#call.aside();
    return this.connections.find(call, completionId, softCancel(completionId), this.#connection);
  }

  /** "" until `started`, unless the request has one or requests retention. */
  get completionId(): string {
    return this.#accumulator.completionId;
  }

  /** The last event that was read: `Chat.resume` continues after it. */
  get lastSequence(): bigint | undefined {
    return this.#resumption.lastSequence;
  }

  /** The latest usage. */
  get usage(): Usage | undefined {
    return this.#accumulator.usage;
  }

  /** The notices so far. */
  get notices(): readonly Notice[] {
    return this.#accumulator.notices;
  }

  get requestId(): string {
    return this.#call.requestId;
  }

  /** How often the stream was resumed after its connection was lost. */
  get resumed(): number {
    return Math.max(0, this.#resumption.calls - 1);
  }

  async *#read(): AsyncGenerator<StreamChatCompletionResponse, void> {
    let failure: DeltawireError | undefined;
    let isLeft = true;
    try {
      for (let pause: number | undefined = 0; pause !== undefined; pause = this.#pauseAfter(failure)) {
        if (pause > 0) {
          await this.#call.pause(pause);
        }
        failure = yield* this.#readCall();
      }
      isLeft = false;
    } catch (error) {
      // The pause was canceled, or outlasted the deadline.
      failure = error as CallError;
      isLeft = false;
    } finally {
      // Leaving the loop that reads it is a cancel.
      this.#settle(isLeft ? this.#call.canceled() : failure);
    }
    this.#answer();
  }

  /** The events of the next call; returns how it failed. */
  async *#readCall(): AsyncGenerator<StreamChatCompletionResponse, DeltawireError | undefined> {
    const request = this.#resumption.begin();
    const { moved, completionId } = this.#resumption;
    const begins = request.start.case === "chat";
    if (begins) {
      // Only heartbeats can have come before.
      this.#accumulator = new Accumulator(completionId, undefined);
    }
    if (moved) {
      this.#leave();
      this.#connection = this.connections.another();
    }
    this.#call.about(this.completionId, { moved, begins });
    try {
      const { chat } = this.#connection;
      for await (const event of this.#call.stream((given) => chat.streamChatCompletion(request, given))) {
        // A replay can begin with what had come before the connection was lost.
        if (!this.resumed || event.sequence >= this.#accumulator.expected) {
          this.#accumulator.receive(event);
          this.#resumption.received(event.sequence);
          if (event.event.case === "started") {
            this.#call.found(this.completionId);
          }
          yield event;
        }
      }
      return undefined;
    } catch (error) {
      return error as DeltawireError;
    }
  }

  /** Milliseconds until the next call, after one has ended like this; undefined if the stream is over. */
  #pauseAfter(failure: DeltawireError | undefined): number | undefined {
    const { isComplete, isOnlyTheEnd, hasBegun } = this.#accumulator;
    const isOver = isComplete || (failure === undefined && isOnlyTheEnd) || this.#call.isCanceled;
    if (isOver || (failure !== undefined && !(failure instanceof CallError))) {
      return undefined;
    }
    return this.#resumption.ended(failure, hasBegun);
  }

  /** Decide the outcome, once. */
  #settle(failure: DeltawireError | undefined): void {
    if (this.#outcome !== undefined) {
      return;
    }
    try {
      if (failure !== undefined && !(failure instanceof CallError)) {
        throw failure;
      }
      this.#outcome = this.#accumulator.finish(failure, this.requestId);
    } catch (error) {
      this.#outcome = error as DeltawireError;
    }
    this.#call.end();
    this.#leave();
  }

  #answer(): Answer {
    if (!(this.#outcome instanceof Answer)) {
      throw this.#outcome;
    }
    return this.#outcome;
  }

  /** Close the connection that this stream has for itself, if it has one. */
  #leave(): void {
    if (this.#connection !== this.connections.main) {
      this.#connection.close();
      this.#connection = this.connections.main;
    }
  }
}

async function* textOf(stream: ChatStream): AsyncGenerator<string, void> {
  for await (const { event, choiceIndex } of stream) {
    if (event.case === "textDelta" && choiceIndex === 0 && event.value.text) {
      yield event.value.text;
    }
  }
}
