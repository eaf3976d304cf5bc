// The client over any transport, and its connections.

import { type CallOptions as ConnectOptions, type Client as Stub, type Transport, createClient } from "@connectrpc/connect";

import { type Call, type CallOptions, Calls, type Defaults } from "./calls.js";
import { Chat } from "./chat.js";
import { CallError } from "./errors.js";
import { ChatCompletion } from "./gen/deltawire/v1/chat_completion_pb.js";
import { ModelRegistry } from "./gen/deltawire/v1/model_registry_pb.js";
import { Models } from "./models.js";
import { MAX_CONNECTIONS, Pauses } from "./resumption.js";

/** The options of every client. */
export interface ClientOptions extends Pick<CallOptions, "timeoutMs" | "headers"> {
  /** The caller's access key for the gateway. */
  readonly key?: string | undefined;
  /** Sends the key in `x-deltawire-key`, so that a proxy can have `authorization`; pass what the proxy needs in `headers`. */
  readonly keyHeader?: "authorization" | "x-deltawire-key" | undefined;
  /** Allows a key over plaintext to other machines. */
  readonly insecure?: boolean | undefined;
}

/** A transport, and what closes its connection. */
export interface Channel {
  readonly transport: Transport;
  close(): void;
}

/** How a client reaches the gateway; see ./node and ./web. */
export interface Environment {
  /** The gateway's URL. */
  readonly url: URL;
  /** Makes another connection. */
  connect(): Channel;
  randomBytes(length: number): Uint8Array;
}

const SECRETS = ["authorization", "x-deltawire-key", "x-vllm-api-token"];

export class Client {
  readonly chat: Chat;
  readonly models: Models;
  readonly #calls = new Calls();
  readonly #connections: Connections;

  constructor(environment: Environment, options: ClientOptions = {}) {
    const { key, keyHeader = "authorization", insecure = false, timeoutMs } = options;
    const headers = new Headers(options.headers);
    if (key) {
      headers.set(keyHeader, keyHeader === "authorization" ? `Bearer ${key}` : key);
    }
    if (!insecure && !keepsSecrets(environment.url) && SECRETS.some((name) => headers.has(name))) {
      throw new TypeError("a key would be sent over plaintext to another machine: use TLS, or allow it with `insecure`");
    }
    const makeId = () => Array.from(environment.randomBytes(16), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const defaults: Defaults = { headers, timeoutMs, calls: this.#calls, makeId };
    this.#connections = new Connections(environment);
    this.chat = new Chat(this.#connections, defaults);
    this.models = new Models(this.#connections.main, defaults);
  }

  /** End all calls and close the connections. */
  close(): void {
    this.#calls.close();
    this.#connections.main.close();
  }
}

/** Whether no other machine on the network can read what is sent. */
function keepsSecrets({ protocol, hostname }: URL): boolean {
  return protocol === "https:" || hostname === "localhost" || hostname === "[::1]" || /^127(\.\d{1,3}){3}$/.test(hostname);
}

export class Connection {
  readonly chat: Stub<typeof ChatCompletion>;
  readonly registry: Stub<typeof ModelRegistry>;

  constructor(private readonly channel: Channel) {
    this.chat = createClient(ChatCompletion, channel.transport);
    this.registry = createClient(ModelRegistry, channel.transport);
  }

  close(): void {
    this.channel.close();
  }
}

/** A call about a completion. */
export type Method<T> = (stub: Connection["chat"], options: ConnectOptions) => Promise<T>;

export class Connections {
  readonly main: Connection;

  constructor(private readonly environment: Environment) {
    this.main = this.another();
  }

  /** Another connection, to the process that a load balancer selects; close it after the call. */
  another(): Connection {
    return new Connection(this.environment.connect());
  }

  /** Make a call about a completion, on new connections until one reaches the process that has it. */
  async find<T>(
    call: Call,
    completionId: string,
    make: Method<T>,
    first = this.main,
  ): Promise<T> {
    const pauses = new Pauses(50, 2_000);
    try {
      for (let connection = first, moved = 0; ; connection = this.another()) {
        try {
          call.about(completionId, { moved });
          return await call.unary((options) => make(connection.chat, options));
        } catch (error) {
          const isElsewhere = error instanceof CallError && error.reason === "WRONG_REPLICA";
          const pause = isElsewhere ? pauses.next(error) : 0;
          moved += 1;
          if (!isElsewhere || moved > MAX_CONNECTIONS || pause >= call.remainingMs) {
            throw error;
          }
          await call.pause(pause);
        } finally {
          if (connection !== first) {
            connection.close();
          }
        }
      }
    } finally {
      call.end();
    }
  }
}
