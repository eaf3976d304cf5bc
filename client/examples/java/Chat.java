// A chat with a tool through a deltawire gateway, from Java 17.
//
//     java Chat [TARGET [MODEL]]
//
// It streams an answer and prints its text and tool calls, then calls a model that does not exist and prints the error with its
// details. protos/README.md says how to generate dev.deltawire.v1 and com.google.rpc; with Maven or Gradle the latter comes from
// com.google.api.grpc:proto-google-common-protos.
//
// Exit status: 0 if the answer is complete, 1 if a call failed that should not, 2 if the command line is wrong.

import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import dev.deltawire.v1.ChatCompletionGrpc;
import dev.deltawire.v1.ChatCompletionGrpc.ChatCompletionBlockingStub;
import dev.deltawire.v1.ChatMessage;
import dev.deltawire.v1.ChatRequest;
import dev.deltawire.v1.ChoiceFinished;
import dev.deltawire.v1.Completed;
import dev.deltawire.v1.StreamChatCompletionRequest;
import dev.deltawire.v1.StreamChatCompletionResponse;
import dev.deltawire.v1.Tool;
import dev.deltawire.v1.ToolCall;
import dev.deltawire.v1.ToolCallDelta;
import dev.deltawire.v1.ToolCallFailure;
import dev.deltawire.v1.UserMessage;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.Optional;
import java.util.TreeMap;
import java.util.concurrent.TimeUnit;

public final class Chat {
  private static final Tool WEATHER =
      Tool.newBuilder()
          .setName("get_weather")
          .setDescription("The weather in a city, now.")
          .setInputSchema(
              """
              {"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}""")
          .build();

  // Models write any script; the platform's default charset may not have it.
  private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);

  private Chat() {}

  public static void main(String[] arguments) throws InterruptedException {
    if (arguments.length > 2) {
      System.err.println("usage: java Chat [TARGET [MODEL]]");
      System.exit(2);
    }
    String target = arguments.length > 0 ? arguments[0] : "127.0.0.1:50051";
    // Empty selects the only chat model that the gateway serves.
    String model = arguments.length > 1 ? arguments[1] : "";
    // For a gateway with TLS: TlsChannelCredentials.create().
    ManagedChannel channel =
        Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
            // A stream may be silent for minutes while a long prompt is read: pings detect a closed connection.
            .keepAliveTime(30, TimeUnit.SECONDS)
            .build();
    boolean succeeded;
    try {
      ChatCompletionBlockingStub stub = ChatCompletionGrpc.newBlockingStub(channel);
      succeeded = chat(stub, model, "How warm is it in Oslo?");
      fail(stub);
    } catch (StatusRuntimeException error) {
      System.err.println(describe(error));
      succeeded = false;
    } finally {
      channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
    }
    System.exit(succeeded ? 0 : 1);
  }

  /** Streams an answer. Returns whether it is complete: its last event came, and without an error. */
  private static boolean chat(ChatCompletionBlockingStub stub, String model, String prompt) {
    Completed completed = null;
    // An iterator that is not read to its end leaves the call open; to end it early, run it in a CancellableContext.
    Iterator<StreamChatCompletionResponse> events = stream(stub, model, prompt);
    while (events.hasNext()) {
      StreamChatCompletionResponse event = events.next();
      switch (event.getEventCase()) {
        case TEXT_DELTA -> {
          OUT.print(event.getTextDelta().getText());
          OUT.flush();
        }
        case TOOL_CALL_DELTA -> print(event.getToolCallDelta());
        case CHOICE_FINISHED -> print(event.getChoiceFinished());
        case COMPLETED -> completed = event.getCompleted();
        // EVENT_NOT_SET is an event of a later version. This program needs none of the others.
        default -> {}
      }
    }
    // A proxy can turn a broken stream into one that ends with OK: without this event it is not the whole answer.
    if (completed == null) {
      System.err.println("the stream ended without `completed`");
      return false;
    }
    if (completed.hasError()) {
      System.err.printf("%s: %s%n", completed.getError().getReason(), completed.getError().getMessage());
      return false;
    }
    OUT.printf("completed: %d tokens%n", completed.getUsage().getCompletionTokens());
    return true;
  }

  /** Calls a model that does not exist, and prints what the gateway says about it. */
  private static void fail(ChatCompletionBlockingStub stub) {
    try {
      stream(stub, "no-such-model", "hi").next();
    } catch (StatusRuntimeException error) {
      OUT.println(describe(error));
    }
  }

  private static Iterator<StreamChatCompletionResponse> stream(
      ChatCompletionBlockingStub stub, String model, String prompt) {
    ChatMessage message = ChatMessage.newBuilder().setUser(UserMessage.newBuilder().setText(prompt)).build();
    ChatRequest chat = ChatRequest.newBuilder().setModel(model).addMessages(message).addTools(WEATHER).build();
    // The deadline is for the whole answer.
    return stub.withDeadlineAfter(10, TimeUnit.MINUTES)
        .streamChatCompletion(StreamChatCompletionRequest.newBuilder().setChat(chat).build());
  }

  private static void print(ToolCallDelta delta) {
    switch (delta.getParseStatus()) {
      case TOOL_CALL_PARSE_STATUS_SUCCEEDED -> {
        ToolCall call = delta.getToolCall();
        OUT.printf("%ntool call %s(%s) %s%n", call.getToolName(), call.getArguments(), call.getCallId());
      }
      case TOOL_CALL_PARSE_STATUS_FAILED -> {
        // Never execute such a call. What the model wrote is in raw_arguments.
        ToolCallFailure failure = delta.getFailure();
        OUT.printf("%ntool call %s failed: %s: %s%n", delta.getToolName(), failure.getReason(), failure.getMessage());
      }
      // STARTED and IN_PROGRESS come only if the request's tool_call_policy asks for them.
      default -> {}
    }
  }

  private static void print(ChoiceFinished finished) {
    // It is about all calls of the choice together: if one failed, none may be executed.
    String executable = finished.getToolCallsExecutable() ? ", tool calls may be executed" : "";
    OUT.printf("%n[%s%s]%n", finished.getStopReason(), executable);
  }

  /** A failed call in one line: the status, and the reason with its metadata if the gateway sent the error. */
  private static String describe(StatusRuntimeException error) {
    Status status = error.getStatus();
    String reason =
        errorInfo(error)
            .map(info -> info.getReason() + " of " + info.getDomain() + ", " + new TreeMap<>(info.getMetadataMap()))
            .orElse("without details");
    return "%s (%s): %s".formatted(status.getCode(), reason, status.getDescription());
  }

  /** The ErrorInfo in the trailer grpc-status-details-bin. A proxy between client and gateway sends errors without one. */
  private static Optional<ErrorInfo> errorInfo(StatusRuntimeException error) {
    com.google.rpc.Status details = StatusProto.fromThrowable(error);
    if (details == null) {
      return Optional.empty();
    }
    return details.getDetailsList().stream()
        .filter(detail -> detail.is(ErrorInfo.class))
        .findFirst()
        .map(
            detail -> {
              try {
                return detail.unpack(ErrorInfo.class);
              } catch (InvalidProtocolBufferException malformed) {
                throw new IllegalStateException(malformed);
              }
            });
  }
}
