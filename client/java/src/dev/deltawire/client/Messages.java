package dev.deltawire.client;

import dev.deltawire.v1.ChatMessage;
import dev.deltawire.v1.SystemMessage;
import dev.deltawire.v1.ToolCall;
import dev.deltawire.v1.ToolMessage;
import dev.deltawire.v1.UserMessage;

/** The turns of a conversation. {@link Answer#message} is the model's. */
public final class Messages {
  private Messages() {}

  /** An instruction for the model. */
  public static ChatMessage system(String text) {
    return ChatMessage.newBuilder().setSystem(SystemMessage.newBuilder().setText(text)).build();
  }

  /** What the user says. */
  public static ChatMessage user(String text) {
    return ChatMessage.newBuilder().setUser(UserMessage.newBuilder().setText(text)).build();
  }

  /** The result of a tool call. */
  public static ChatMessage tool(ToolCall call, String result) {
    return ChatMessage.newBuilder().setTool(ToolMessage.newBuilder().setCallId(call.getCallId()).setText(result)).build();
  }
}
