// A client of deltawire. `deltawire/node` and `deltawire/web` connect it; here is what they have in common.

export { Answer } from "./answer.js";
export type { CallOptions } from "./calls.js";
export type { Chat, ChatInit, ChatStream, ResumeOptions, StreamCallOptions } from "./chat.js";
export { type Channel, Client, type ClientOptions, type Environment } from "./client.js";
export { CallError, Code, DeltawireError, type Failure, ProtocolError, type Reason, StreamInterrupted } from "./errors.js";
export { type MessageInit, type ToolInit, milliseconds, seconds, system, tool, toolResult, user } from "./messages.js";
export type { Models, ModelWatch, WatchEvent, WatchOptions } from "./models.js";

// The API's messages.
export * from "./gen/deltawire/v1/chat_completion_pb.js";
export * from "./gen/deltawire/v1/error_reason_pb.js";
export * from "./gen/deltawire/v1/message_pb.js";
export * from "./gen/deltawire/v1/model_registry_pb.js";
export * from "./gen/deltawire/v1/tool_pb.js";
