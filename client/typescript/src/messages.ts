// Messages and tools in short.

import type { JsonObject, MessageInitShape } from "@bufbuild/protobuf";
import { fromJson } from "@bufbuild/protobuf";
import type { Duration, DurationSchema } from "@bufbuild/protobuf/wkt";

import type { ChatMessageSchema } from "./gen/deltawire/v1/message_pb.js";
import type { ToolCall } from "./gen/deltawire/v1/tool_pb.js";
import { ToolSchema } from "./gen/deltawire/v1/tool_pb.js";

export type MessageInit = MessageInitShape<typeof ChatMessageSchema>;
export type ToolInit = MessageInitShape<typeof ToolSchema>;

export function system(text: string): MessageInit {
  return { role: { case: "system", value: { text } } };
}

export function user(text: string): MessageInit {
  return { role: { case: "user", value: { text } } };
}

/** The result of a tool call. */
export function toolResult({ callId }: ToolCall, text: string): MessageInit {
  return { role: { case: "tool", value: { callId, text } } };
}

/** A time span for the API's messages, such as `retention`. */
export function seconds(count: number): MessageInitShape<typeof DurationSchema> {
  const whole = Math.floor(count);
  return { seconds: BigInt(whole), nanos: Math.round((count - whole) * 1e9) };
}

/** The milliseconds of a time span of the API. */
export function milliseconds(span: Duration): number {
  return Number(span.seconds) * 1_000 + span.nanos / 1e6;
}

interface OpenAiTool {
  readonly function: {
    readonly name: string;
    readonly description?: string;
    readonly parameters?: unknown;
    readonly strict?: boolean;
  };
}

interface ToolDefinition {
  readonly name: string;
  readonly description?: string;
  readonly inputSchema?: unknown;
  readonly outputSchema?: string;
  readonly strict?: boolean;
}

/**
 * A tool in the form of OpenAI or of this API, with its schema as an object or as JSON text.
 *
 * @throws Error a field is unknown, or its value is of another type; the message names it
 */
export function tool(given: OpenAiTool | ToolDefinition): ToolInit {
  if ("function" in given) {
    const { parameters, ...others } = given.function;
    return tool({ ...others, inputSchema: parameters });
  }
  const { inputSchema, ...others } = given;
  if (!others.name) {
    throw new TypeError("a tool needs a name");
  }
  const schema = typeof inputSchema === "string" ? inputSchema : JSON.stringify(inputSchema ?? undefined);
  const fields = Object.entries({ ...others, inputSchema: schema }).filter(([, value]) => value !== undefined);
  return fromJson(ToolSchema, Object.fromEntries(fields) as JsonObject);
}
