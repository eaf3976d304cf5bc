// The conformance program of the Java client: makes the calls that the driver asks for; see ../../conformance.proto.

import dev.deltawire.client.CallException;
import dev.deltawire.client.ChatStream;
import dev.deltawire.client.Client;
import dev.deltawire.client.ModelWatch;
import dev.deltawire.client.StreamInterruptedException;
import dev.deltawire.conformance.v1.Answer;
import dev.deltawire.conformance.v1.ClientCase;
import dev.deltawire.conformance.v1.ClientResult;
import dev.deltawire.conformance.v1.Failure;
import io.grpc.CallOptions;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.util.List;
import java.util.concurrent.TimeUnit;

public final class Conformance {
  private Conformance() {}

  public static void main(String[] arguments) throws IOException {
    DataInputStream input = new DataInputStream(System.in);
    DataOutputStream output = new DataOutputStream(System.out);
    while (true) {
      int size;
      try {
        size = input.readInt();
      } catch (EOFException end) {
        return;
      }
      ClientCase each = ClientCase.parseFrom(input.readNBytes(size));
      byte[] result = run(each).setName(each.getName()).build().toByteArray();
      output.writeInt(result.length);
      output.write(result);
      output.flush();
    }
  }

  private static ClientResult.Builder run(ClientCase each) {
    CallOptions options = CallOptions.DEFAULT;
    if (each.hasTimeout()) {
      long milliseconds = each.getTimeout().getSeconds() * 1000 + each.getTimeout().getNanos() / 1_000_000;
      options = options.withDeadlineAfter(milliseconds, TimeUnit.MILLISECONDS);
    }
    try (Client client = Client.to(each.getTarget()).key(each.getAccessKey()).build()) {
      return each.hasWatch() ? watch(client, each.getWatch(), options) : stream(client, each.getStream(), options);
    } catch (CallException error) {
      return ClientResult.newBuilder().setFailure(failure(error));
    }
  }

  private static ClientResult.Builder stream(Client client, ClientCase.Stream asked, CallOptions options) {
    try (ChatStream stream = client.stream(asked.getRequest(), options)) {
      for (int events = 1; stream.hasNext(); events++) {
        stream.next();
        if (asked.hasCancelAfterEvents() && asked.getCancelAfterEvents() == events) {
          stream.cancel();
        }
      }
      return ClientResult.newBuilder().setAnswer(answer(stream.answer()));
    }
  }

  private static ClientResult.Builder watch(Client client, ClientCase.Watch asked, CallOptions options) {
    String revision = asked.getRequest().getRevision();
    try (ModelWatch watch =
        revision.isEmpty() ? client.watch(options) : client.watch(revision, null, options)) {
      int left = asked.getBookmarks();
      while (left > 0) {
        left -= watch.next().isBookmark() ? 1 : 0;
      }
      return ClientResult.newBuilder().addAllModels(watch.models().values());
    }
  }

  private static Answer answer(dev.deltawire.client.Answer answer) {
    return Answer.newBuilder()
        .setCompletionId(answer.completionId())
        .setModel(answer.model())
        .addAllChoices(answer.choices())
        .setUsage(answer.usage())
        .addAllNotices(answer.notices())
        .build();
  }

  private static Failure failure(CallException error) {
    List<String> fields = error.violations().stream().map(CallException.FieldViolation::field).toList();
    Failure.Builder failure =
        Failure.newBuilder()
            .setCode(error.code().value())
            .setReason(error.reason())
            .setInterrupted(error instanceof StreamInterruptedException)
            .addAllFields(fields);
    error
        .retryDelay()
        .ifPresent(delay -> failure.getRetryDelayBuilder().setSeconds(delay.getSeconds()).setNanos(delay.getNano()));
    error.partial().ifPresent(partial -> failure.setPartial(answer(partial)));
    return failure.build();
  }
}
