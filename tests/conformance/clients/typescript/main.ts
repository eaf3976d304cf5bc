// The conformance program of the TypeScript client in Node: makes the calls that the driver asks for.

import { once } from "node:events";

import { connect } from "deltawire/node";

import { run } from "./calls.js";

let input = Buffer.alloc(0);
for await (const chunk of process.stdin) {
  input = Buffer.concat([input, chunk]);
  while (input.length >= 4 && input.length >= 4 + input.readUInt32BE()) {
    const end = 4 + input.readUInt32BE();
    const result = await run(input.subarray(4, end), connect);
    input = input.subarray(end);
    const length = Buffer.alloc(4);
    length.writeUInt32BE(result.length);
    if (!process.stdout.write(Buffer.concat([length, result]))) {
      await once(process.stdout, "drain");
    }
  }
}
