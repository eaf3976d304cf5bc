// One call: its metadata, its deadline, its cancellation, and its attempts as long as it has received nothing.

import type { CallOptions as ConnectOptions } from "@connectrpc/connect";

import { CallError, Code, callError } from "./errors.js";
import { MAX_ATTEMPTS, Pauses } from "./resumption.js";

/** The options of every call. */
export interface CallOptions {
  /** Milliseconds for the call with all its attempts and resumptions. */
  readonly timeoutMs?: number | undefined;
  /** Cancels the call, on both sides. */
  readonly signal?: AbortSignal | undefined;
  /** More metadata. */
  readonly headers?: HeadersInit | undefined;
  /** The call's id in logs, by default generated. */
  readonly requestId?: string | undefined;
}

/** What the calls of a client have in common. */
export interface Defaults {
  readonly headers: Headers;
  readonly timeoutMs: number | undefined;
  readonly calls: Calls;
  readonly makeId: () => string;
}

/** The calls of a client in progress, and what a proxy has said in the headers of earlier ones. */
export class Calls {
  readonly active = new Set<Call>();
  isClosed = false;
  readonly #gateways = new Map<string, string>();

  /** End them all, and those that begin later. */
  close(): void {
    this.isClosed = true;
    this.active.forEach((call) => call.end());
  }

  /** Remember which gateway has a completion. */
  found(completionId: string, gateway: string): void {
    if (completionId && gateway && this.gatewayOf(completionId) !== gateway) {
      this.#gateways.delete(completionId);
      this.#gateways.set(completionId, gateway);
      if (this.#gateways.size > MAX_GATEWAYS) {
        this.#gateways.delete(this.#gateways.keys().next().value!);
      }
    }
  }

  /** "" if it is not known. */
  gatewayOf(completionId: string): string {
    return this.#gateways.get(completionId) ?? "";
  }
}

const REQUEST_ID = "x-request-id";
// Headers by which a proxy finds the gateway that has a completion, as the shipped Envoy does. Calls with the same route go to the
// same gateway; the other one comes from the proxy, names the gateway, and is sent back.
const ROUTE = "x-deltawire-route";
const GATEWAY = "x-deltawire-gateway";
// Completions of which a client remembers the gateway: those that a busy program may still look up or end.
const MAX_GATEWAYS = 10_000;
// What fits into `grpc-timeout`, and into a timer. A longer deadline is the gateway's to keep, or passes unnoticed.
const MAX_HEADER_MS = 99_999_999;
const MAX_TIMER_MS = 0x7fffffff;

export class Call {
  /** The call's id; after its first event, as the gateway sent it. */
  requestId: string;
  /** The metadata of its latest attempt. */
  readonly #headers: Headers;
  readonly #given: Headers;
  readonly #abort = new AbortController();
  readonly #deadline: number;
  readonly #pauses = new Pauses(100, 2_000);
  readonly #signal: AbortSignal | undefined;
  readonly #ended = () => this.end();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isLate = false;
  #completionId = "";
  #gateway = "";

  constructor(
    private readonly defaults: Defaults,
    { timeoutMs = defaults.timeoutMs, signal, headers, requestId }: CallOptions,
    private readonly maxAttempts = MAX_ATTEMPTS,
  ) {
    this.#given = new Headers(defaults.headers);
    new Headers(headers).forEach((value, name) => this.#given.set(name, value));
    this.requestId = requestId ?? this.#given.get(REQUEST_ID) ?? defaults.makeId();
    this.#given.set(REQUEST_ID, this.requestId);
    this.#headers = new Headers(this.#given);
    this.#deadline = timeoutMs === undefined ? Number.POSITIVE_INFINITY : performance.now() + timeoutMs;
    this.#signal = signal;
    signal?.addEventListener("abort", this.#ended);
    if (signal?.aborted) {
      this.end();
    }
  }

  get isCanceled(): boolean {
    return this.#abort.signal.aborted || this.defaults.calls.isClosed;
  }

  /** Milliseconds until the deadline. */
  get remainingMs(): number {
    return this.#deadline - performance.now();
  }

  /** End the call, on both sides. To be called also if it has ended, since it forgets it. */
  end(): void {
    this.#signal?.removeEventListener("abort", this.#ended);
    this.defaults.calls.active.delete(this);
    clearTimeout(this.#timer);
    this.#abort.abort();
  }

  /** The failure of a call that this program ends. */
  canceled(): CallError {
    const rawMessage = this.defaults.calls.isClosed ? "the client was closed" : "canceled by the caller";
    return this.#failure(Code.Canceled, rawMessage);
  }

  /**
   * Let a proxy send the call to the gateway that has a completion. `moved` says how many gateways did not have it; `begins`, that
   * the call begins it, so that an earlier one of the same id does not matter.
   */
  about(completionId: string, { moved = 0, begins = false } = {}): this {
    this.#completionId = completionId;
    const gateway = this.#gateway || (begins ? "" : this.defaults.calls.gatewayOf(completionId));
    const routing = {
      // An id that does not fit into a header is left to the gateway to refuse.
      [ROUTE]: /^[!-~]+$/.test(completionId) ? completionId + (moved ? `#${moved}` : "") : "",
      [GATEWAY]: moved ? "" : gateway,
    };
    for (const [name, value] of Object.entries(routing)) {
      this.#headers.delete(name);
      const sent = this.#given.get(name) ?? value;
      if (sent) {
        this.#headers.set(name, sent);
      }
    }
    return this;
  }

  /** Remember the gateway that sent the headers: it has this completion. */
  found(completionId: string): void {
    this.defaults.calls.found(completionId, this.#gateway);
  }

  /** Another call about this one's completion, with the same metadata. */
  aside(): Call {
    const timeoutMs = Number.isFinite(this.#deadline) ? this.remainingMs : undefined;
    const call = new Call(this.defaults, { timeoutMs, headers: this.#given });
    call.#gateway = this.#gateway;
    return call;
  }

  /** Make a call with one response. */
  async unary<T>(make: (options: ConnectOptions) => Promise<T>): Promise<T> {
    async function* once(options: ConnectOptions) {
      yield await make(options);
    }
    for await (const response of this.stream(once)) {
      return response;
    }
    throw new Error("a call without a response fails");
  }

  /**
   * Make a call with many responses. One that fails for a passing reason before the first of them is repeated after a pause.
   * Throws a CallError.
   */
  async *stream<T>(make: (options: ConnectOptions) => AsyncIterable<T>): AsyncGenerator<T, void> {
    for (let attempt = 1; ; attempt += 1) {
      let hasReceived = false;
      try {
        for await (const response of make(this.#options())) {
          this.#check();
          hasReceived = true;
          yield response;
        }
        return;
      } catch (thrown) {
        this.#check();
        const error = thrown instanceof CallError ? thrown : callError(thrown, this.requestId);
        if (hasReceived || attempt === this.maxAttempts || !isPassing(error)) {
          throw error;
        }
        await this.pause(error.retryDelayMs ?? this.#pauses.next());
      }
    }
  }

  /** Wait; throws if the call is canceled or its deadline passes. */
  async pause(ms: number): Promise<void> {
    const { signal } = this.#abort;
    await new Promise<void>((resolve) => {
      const end = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", end);
        resolve();
      };
      const timer = setTimeout(end, ms);
      signal.addEventListener("abort", end);
      if (signal.aborted) {
        end();
      }
    });
    this.#check();
  }

  #options(): ConnectOptions {
    this.#check();
    const { remainingMs } = this;
    this.defaults.calls.active.add(this);
    // Connect's own timer would go on after a reader has left.
    if (remainingMs <= MAX_TIMER_MS) {
      this.#timer ??= setTimeout(() => {
        this.#isLate = true;
        this.end();
      }, remainingMs);
    }
    if (remainingMs <= MAX_HEADER_MS) {
      this.#headers.set("grpc-timeout", `${Math.ceil(remainingMs)}m`);
    }
    return {
      headers: this.#headers,
      signal: this.#abort.signal,
      onHeader: (headers) => {
        this.requestId = headers.get(REQUEST_ID) || this.requestId;
        this.#gateway = headers.get(GATEWAY) ?? "";
        this.found(this.#completionId);
      },
    };
  }

  #check(): void {
    if (this.#isLate || this.remainingMs <= 0) {
      throw this.#failure(Code.DeadlineExceeded, "the timeout passed");
    }
    if (this.isCanceled) {
      throw this.canceled();
    }
  }

  #failure(code: Code, rawMessage: string): CallError {
    return new CallError({ code, rawMessage, requestId: this.requestId });
  }
}

/** Whether a call that has received nothing may be repeated. `grpc-retry-pushback-ms` may forbid it. */
function isPassing({ code, retryDelayMs, trailers }: CallError): boolean {
  if (trailers.get("grpc-retry-pushback-ms")?.startsWith("-")) {
    return false;
  }
  // Canceled is what a call gets that arrives as a gateway closes its connections.
  return code === Code.Unavailable || code === Code.Canceled || (code === Code.ResourceExhausted && retryDelayMs !== undefined);
}
