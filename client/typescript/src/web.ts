// The client in browsers, over gRPC-Web through a proxy.

import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { Client, type ClientOptions } from "./client.js";

export * from "./index.js";

/** `url` is that of the proxy, such as "https://gateway.example.com". The browser keeps the connections. */
export function connect(url: string, options: ClientOptions = {}): Client {
  const connectChannel = () => ({ transport: createGrpcWebTransport({ baseUrl: url }), close: () => {} });
  const randomBytes = (length: number) => crypto.getRandomValues(new Uint8Array(length));
  return new Client({ url: new URL(url), connect: connectChannel, randomBytes }, options);
}
