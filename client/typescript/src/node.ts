// The client in Node, over gRPC.

import { randomBytes } from "node:crypto";
import type { SecureContextOptions } from "node:tls";

import { Http2SessionManager, createGrpcTransport } from "@connectrpc/connect-node";

import { Client, type ClientOptions } from "./client.js";

export * from "./index.js";

export interface ConnectOptions extends ClientOptions {
  /** TLS, with the root certificates of Node or with `ca`; and `cert` and `key`, if the gateway requires a certificate. */
  readonly tls?: boolean | Pick<SecureContextOptions, "ca" | "cert" | "key"> | undefined;
  /** The largest message, by default 64 MiB. */
  readonly maxReceiveBytes?: number | undefined;
}

// A stream can be silent for minutes while a long prompt is read. Pings find a peer that has disconnected, and keep proxies from
// closing the connection.
const KEEPALIVE = { pingIntervalMs: 30_000, pingTimeoutMs: 10_000 };

/** Connects when the first call is made. `target` is "host:port". Close the client in the end. */
export function connect(target: string, { tls = false, maxReceiveBytes, ...options }: ConnectOptions = {}): Client {
  const url = new URL(`${tls ? "https" : "http"}://${target}`);
  if (target.includes("/")) {
    throw new TypeError(`the target ${target} is not host:port; ask for TLS separately`);
  }
  const connectChannel = () => {
    const sessionManager = new Http2SessionManager(url, KEEPALIVE, typeof tls === "object" ? tls : {});
    const transport = createGrpcTransport({
      baseUrl: url.origin,
      sessionManager,
      readMaxBytes: maxReceiveBytes ?? 64 * 1024 * 1024,
    });
    return { transport, close: () => sessionManager.abort() };
  };
  return new Client({ url, connect: connectChannel, randomBytes }, options);
}
