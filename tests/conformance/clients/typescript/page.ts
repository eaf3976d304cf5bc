// The same in a page: the test that has opened it calls its function. In each case `target` is the URL of a proxy.

import { connect } from "deltawire/web";

import { run } from "./calls.js";

declare global {
  var report: (text: string) => void;
  var call: (encoded: string) => Promise<string>;
}

// In base64, because what a test and a page exchange is JSON.
globalThis.call = async (encoded) => {
  const result = await run(Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0)), connect);
  return btoa(Array.from(result, (byte) => String.fromCharCode(byte)).join(""));
};

globalThis.report("ready");
