// The models that can be called, and a watch of them that goes on over lost connections.

import { clone, equals } from "@bufbuild/protobuf";

import { Call, type CallOptions, type Defaults } from "./calls.js";
import type { Connection } from "./client.js";
import { CallError, Code } from "./errors.js";
import {
  type Model,
  ModelSchema,
  type WatchModelsResponse,
  WatchModelsResponse_Change as Change,
} from "./gen/deltawire/v1/model_registry_pb.js";
import { Pauses } from "./resumption.js";

/** A model was added, modified or removed; or a bookmark: what was returned so far adds up to the state at its revision. */
export type WatchEvent =
  | { readonly kind: "ADDED" | "MODIFIED" | "REMOVED"; readonly model: Model }
  | { readonly kind: "BOOKMARK"; readonly revision: string };

export interface WatchOptions extends CallOptions {
  /** The `revision` of an earlier watch, to continue after it. */
  readonly revision?: string | undefined;
  /** The models at that revision. Without them, a revision that the gateway no longer has fails with REVISION_GONE. */
  readonly known?: Iterable<Model> | undefined;
}

export class Models {
  constructor(
    private readonly connection: Connection,
    private readonly defaults: Defaults,
  ) {}

  /** All models, by ascending id. */
  async *list(options: CallOptions = {}): AsyncGenerator<Model, void> {
    const call = new Call(this.defaults, options);
    try {
      let pageToken = "";
      do {
        const page = await call.unary((given) => this.connection.registry.listModels({ pageToken }, given));
        yield* page.models;
        pageToken = page.nextPageToken;
      } while (pageToken);
    } finally {
      call.end();
    }
  }

  /** All models, and then each change as it happens, once, until the reader leaves the loop. */
  watch(options: WatchOptions = {}): ModelWatch {
    return new ModelWatch(this.connection, this.defaults, options);
  }
}

/** Iterate over it for its events. Leaving the loop ends the watch. */
export class ModelWatch implements AsyncIterable<WatchEvent> {
  readonly #models = new Map<string, Model>();
  readonly #events: AsyncGenerator<WatchEvent, void>;
  readonly #pauses = new Pauses(100, 10_000);
  readonly #call: Call;
  /** Whether the caller knows no other models than those above. */
  readonly #knowsAll: boolean;
  #revision: string;
  /** The ids in the snapshot that is coming. */
  #listed: Set<string> | undefined;

  constructor(
    private readonly connection: Connection,
    defaults: Defaults,
    { revision = "", known, ...options }: WatchOptions,
  ) {
    // Only its own timeout ends a watch.
    this.#call = new Call({ ...defaults, timeoutMs: undefined }, options, 1);
    this.#revision = revision;
    this.#knowsAll = known !== undefined || !revision;
    for (const model of known ?? []) {
      this.#models.set(model.id, clone(ModelSchema, model));
    }
    this.#events = this.#read();
  }

  [Symbol.asyncIterator](): AsyncGenerator<WatchEvent, void> {
    return this.#events;
  }

  /** From where another watch can continue, with `models`; "" until a snapshot is complete. */
  get revision(): string {
    return this.#revision;
  }

  /** The models now, by id. */
  get models(): ReadonlyMap<string, Model> {
    return this.#models;
  }

  async *#read(): AsyncGenerator<WatchEvent, void> {
    try {
      for (;;) {
        let failure: CallError | undefined;
        this.#listed = this.#revision ? undefined : new Set();
        const request = { revision: this.#revision, batchSnapshot: !this.#revision };
        try {
          const { registry } = this.connection;
          for await (const message of this.#call.stream((given) => registry.watchModels(request, given))) {
            this.#pauses.reset();
            yield* this.#receive(message);
          }
        } catch (error) {
          failure = error as CallError;
        }
        await this.#call.pause(this.#pauseAfter(failure));
      }
    } finally {
      this.#call.end();
    }
  }

  *#receive({ bookmark, revision, change, model, models }: WatchModelsResponse): Generator<WatchEvent> {
    if (bookmark) {
      const missing = this.#listed && [...this.#models.keys()].filter((id) => !this.#listed?.has(id)).sort();
      this.#listed = undefined;
      for (const id of missing ?? []) {
        yield* this.#change(Change.REMOVED, this.#models.get(id)!);
      }
      this.#revision = revision; // only now, or a reader that leaves before would never get the removals
      yield { kind: "BOOKMARK", revision };
      return;
    }
    if (this.#listed === undefined) {
      this.#revision = revision;
    }
    for (const each of models.length || model === undefined ? models : [model]) {
      yield* this.#change(change, each);
    }
  }

  /** The event that a change is to the caller; none if the caller knows it already, or if it is of a later version. */
  *#change(change: Change, model: Model): Generator<WatchEvent> {
    const known = this.#models.get(model.id);
    if (change === Change.REMOVED) {
      this.#models.delete(model.id);
      if (known !== undefined || !this.#knowsAll) {
        yield { kind: "REMOVED", model };
      }
    } else if (change === Change.ADDED || change === Change.MODIFIED) {
      this.#listed?.add(model.id);
      if (known === undefined || !equals(ModelSchema, known, model)) {
        this.#models.set(model.id, clone(ModelSchema, model));
        const isNew = known === undefined && (this.#knowsAll || change === Change.ADDED);
        yield { kind: isNew ? "ADDED" : "MODIFIED", model };
      }
    }
  }

  /** Milliseconds until the next call. Throws if a retry would fail again. */
  #pauseAfter(failure: CallError | undefined): number {
    if (failure === undefined) {
      return this.#pauses.next();
    }
    if (!(failure instanceof CallError) || this.#call.isCanceled) {
      throw failure;
    }
    if (failure.code === Code.OutOfRange && this.#knowsAll && this.#revision) {
      this.#revision = "";
      return 0;
    }
    // A deadline that is not the caller's own is a limit of a proxy; without a reason the connection was lost.
    const passes = [Code.Unavailable, Code.Aborted, Code.ResourceExhausted, Code.DeadlineExceeded].includes(failure.code);
    const isLost = failure.code === Code.Internal || failure.code === Code.Unknown;
    if (passes || (isLost && !failure.reason)) {
      return this.#pauses.next(failure);
    }
    throw failure;
  }
}
