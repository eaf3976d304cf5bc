// Does with the client what the first argument names, against the gateway at the second; prints what came of it.

import dev.deltawire.client.CallException;
import dev.deltawire.client.ChatStream;
import dev.deltawire.client.Client;
import dev.deltawire.client.Messages;
import dev.deltawire.v1.ChatRequest;
import dev.deltawire.v1.ListModelsRequest;
import dev.deltawire.v1.ModelRegistryGrpc;
import dev.deltawire.v1.StreamChatCompletionRequest;
import dev.deltawire.v1.StreamOptions;
import io.grpc.CallOptions;
import io.grpc.Context;
import io.grpc.TlsChannelCredentials;
import java.io.File;
import java.io.IOException;
import java.time.Duration;
import java.util.TreeSet;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;
import java.util.stream.Stream;

public final class Scenario {
  private static final ChatRequest CHAT = ChatRequest.newBuilder().addMessages(Messages.user("hi")).build();
  private static final CallOptions OPTIONS = CallOptions.DEFAULT.withDeadlineAfter(50, TimeUnit.SECONDS);

  private Scenario() {}

  public static void main(String[] arguments) throws IOException {
    switch (arguments[0]) {
      case "softly" -> softly(arguments[1]);
      case "another" -> another(arguments[1]);
      case "remembers" -> remembers(arguments[1]);
      case "ends" -> ends(arguments[1]);
      case "tls" -> tls(arguments[1], new File(arguments[2]), arguments[3]);
      default -> throw new IllegalArgumentException(arguments[0]);
    }
  }

  /** Reads until the first text. */
  private static ChatStream begun(ChatStream stream) {
    while (!stream.next().hasTextDelta()) {}
    return stream;
  }

  /** What a call prints: the code and the reason if it failed. */
  private static void print(Supplier<Object> call) {
    try {
      System.out.println(call.get());
    } catch (CallException error) {
      System.out.println((error.code() + " " + error.reason()).strip());
    }
  }

  /** Many streams at once, each ended softly by a call of its own. */
  private static void softly(String target) {
    try (Client client = Client.to(target).build()) {
      var streams = Stream.generate(() -> begun(client.stream(CHAT, OPTIONS))).limit(12).toList();
      streams.forEach(ChatStream::cancelSoftly);
      var reasons = new TreeSet<>(streams.stream().map(stream -> stream.answer().stopReason()).toList());
      System.out.println(reasons);
    }
  }

  /** By a chosen id, from a client that has never seen the stream. */
  private static void another(String target) {
    StreamOptions retained =
        StreamOptions.newBuilder().setRetention(com.google.protobuf.Duration.newBuilder().setSeconds(60)).build();
    StreamChatCompletionRequest request =
        StreamChatCompletionRequest.newBuilder()
            .setChat(CHAT.toBuilder().setCompletionId("mine"))
            .setOptions(retained)
            .build();
    try (Client client = Client.to(target).build();
        Client other = Client.to(target).build()) {
      ChatStream stream = begun(client.stream(request, OPTIONS));
      stream.close();
      System.out.println(other.get("mine", OPTIONS).getState());
      try (ChatStream resumed = other.resume("mine", stream.lastSequence(), Duration.ofSeconds(60), OPTIONS)) {
        begun(resumed);
        System.out.println(other.cancel("mine", OPTIONS).getState());
        System.out.println(resumed.answer().stopReason());
      }
    }
  }

  /** A call about a completion that this client has begun. */
  private static void remembers(String target) {
    try (Client client = Client.to(target).build()) {
      ChatStream stream = client.stream(CHAT, OPTIONS);
      stream.answer();
      System.out.println(client.get(stream.completionId(), OPTIONS).getState());
    }
  }

  /** Every way in which a program ends a call. */
  @SuppressWarnings("try") // A resource is closed explicitly.
  private static void ends(String target) {
    try (Client client = Client.to(target).build()) {
      ChatStream closed = begun(client.stream(CHAT, OPTIONS));
      closed.close();
      print(closed::answer);

      Context.CancellableContext context = Context.current().withCancellation();
      Context previous = context.attach();
      ChatStream inContext = begun(client.stream(CHAT, OPTIONS));
      context.detach(previous);
      context.cancel(null);
      print(inContext::answer);

      ChatStream interrupted = begun(client.stream(CHAT, OPTIONS));
      Thread.currentThread().interrupt();
      print(interrupted::answer);
      System.out.println(Thread.interrupted());

      ChatStream left = begun(client.stream(CHAT, OPTIONS));
      client.close();
      print(left::answer);
    }
  }

  private static void tls(String target, File authority, String key) throws IOException {
    TlsChannelCredentials.Builder trusting = TlsChannelCredentials.newBuilder().trustManager(authority);
    try (Client client = Client.to(target).credentials(trusting.build()).key(key).build();
        Client own = Client.to(target).credentials(trusting.build()).key(key).keyInOwnHeader().build();
        Client keyless = Client.to(target).credentials(trusting.build()).build();
        Client untrusting = Client.to(target).tls().key(key).build()) {
      print(() -> client.stream(CHAT, OPTIONS).answer().text());
      print(() -> own.stream(CHAT, OPTIONS).answer().text());
      print(() -> keyless.stream(CHAT, OPTIONS).answer().text());
      print(() -> untrusting.stream(CHAT, OPTIONS).answer().text());
      var stub = ModelRegistryGrpc.newBlockingStub(client.channel()).withDeadlineAfter(50, TimeUnit.SECONDS);
      print(() -> stub.listModels(ListModelsRequest.getDefaultInstance()).getModelsCount());
    }
    try {
      Client.to("gateway.example:50051").key(key).build();
    } catch (IllegalArgumentException refused) {
      System.out.println(refused.getMessage());
    }
  }
}
