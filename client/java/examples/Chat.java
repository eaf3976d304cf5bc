// A chat with a deltawire gateway.
//
//     java Chat [--target HOST:PORT] [--model NAME] [--tool FILE]... PROMPT
//
// It streams an answer and prints its text and its tool calls. $DELTAWIRE_TOKEN is the access key.
//
// Exit status: 0 if the answer is complete, 1 if the call failed, 2 if the command line is wrong.

import dev.deltawire.client.Answer;
import dev.deltawire.client.CallException;
import dev.deltawire.client.ChatStream;
import dev.deltawire.client.Client;
import dev.deltawire.client.Messages;
import dev.deltawire.client.Tools;
import dev.deltawire.v1.ChatRequest;
import dev.deltawire.v1.StreamChatCompletionResponse;
import dev.deltawire.v1.ToolCall;
import dev.deltawire.v1.ToolCallDelta;
import dev.deltawire.v1.ToolCallFailure;
import io.grpc.CallOptions;
import java.io.IOException;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayDeque;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Queue;
import java.util.concurrent.TimeUnit;

public final class Chat {
  // Models write any script; the platform's default charset may not have it.
  private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);

  private Chat() {}

  public static void main(String[] arguments) {
    String target = "127.0.0.1:50051";
    // A request without a model gets the only chat model that the gateway serves.
    ChatRequest.Builder chat = ChatRequest.newBuilder();
    try {
      Queue<String> left = new ArrayDeque<>(List.of(arguments));
      while (left.element().startsWith("--")) {
        switch (left.remove()) {
          case "--target" -> target = left.remove();
          case "--model" -> chat.setModel(left.remove());
          case "--tool" -> chat.addAllTools(Tools.parse(Files.readString(Path.of(left.remove()))));
          default -> throw new NoSuchElementException();
        }
      }
      chat.addMessages(Messages.user(String.join(" ", left)));
    } catch (NoSuchElementException wrong) {
      System.err.println("usage: java Chat [--target HOST:PORT] [--model NAME] [--tool FILE]... PROMPT");
      System.exit(2);
    } catch (IOException | IllegalArgumentException wrong) {
      System.err.println("--tool: " + wrong.getMessage());
      System.exit(2);
    }
    String key = System.getenv().getOrDefault("DELTAWIRE_TOKEN", "");
    try (Client client = Client.to(target).key(key).build()) {
      chat(client, chat.build());
    } catch (CallException error) {
      // What came before is printed; it is not the whole answer.
      System.err.println(error.getMessage());
      System.exit(1);
    } catch (IllegalArgumentException wrong) {
      // Such as a key for another machine without TLS.
      System.err.println(wrong.getMessage());
      System.exit(2);
    }
  }

  private static void chat(Client client, ChatRequest chat) {
    // The deadline is for the whole answer. Leaving the block ends the call, if it has not ended.
    CallOptions options = CallOptions.DEFAULT.withDeadlineAfter(10, TimeUnit.MINUTES);
    boolean begun = false;
    try (ChatStream stream = client.stream(chat, options)) {
      for (StreamChatCompletionResponse event : stream) {
        switch (event.getEventCase()) {
          case TEXT_DELTA -> {
            OUT.print(event.getTextDelta().getText());
            OUT.flush();
            begun = true;
          }
          case TOOL_CALL_DELTA -> print(event.getToolCallDelta());
          // EVENT_NOT_SET is an event of a later version. This program needs none of the others.
          default -> {}
        }
      }
      Answer answer = stream.answer();
      // It is about all calls together: if one failed, none may be executed.
      String executable = answer.toolCallsExecutable() ? ", tool calls may be executed" : "";
      OUT.printf("%n[%s%s, %d tokens]%n", answer.stopReason(), executable, answer.usage().getCompletionTokens());
    } catch (CallException error) {
      if (begun) {
        OUT.println(); // ends the line of the text so far
      }
      throw error;
    }
  }

  private static void print(ToolCallDelta delta) {
    switch (delta.getParseStatus()) {
      case TOOL_CALL_PARSE_STATUS_SUCCEEDED -> {
        ToolCall call = delta.getToolCall();
        OUT.printf("%ntool call %s(%s) %s", call.getToolName(), call.getArguments(), call.getCallId());
      }
      case TOOL_CALL_PARSE_STATUS_FAILED -> {
        // Never execute such a call. What the model wrote is in raw_arguments.
        ToolCallFailure failure = delta.getFailure();
        OUT.printf("%ntool call %s failed: %s: %s", delta.getToolName(), failure.getReason(), failure.getMessage());
      }
      // STARTED and IN_PROGRESS come only if the request's tool_call_policy asks for them.
      default -> {}
    }
  }
}
