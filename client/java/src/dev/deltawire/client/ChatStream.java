package dev.deltawire.client;

import dev.deltawire.v1.CancelChatCompletionRequest;
import dev.deltawire.v1.CancelChatCompletionResponse;
import dev.deltawire.v1.ChatCompletionGrpc;
import dev.deltawire.v1.StreamChatCompletionRequest;
import dev.deltawire.v1.StreamChatCompletionResponse;
import io.grpc.CallOptions;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.Optional;
import java.util.OptionalLong;

/**
 * An answer that is being generated: iterate over its events, or call {@link #answer}. Both read the same stream.
 *
 * <p>Skip an event whose case is EVENT_NOT_SET, which is of a later version. One thread reads; {@link #cancel} and {@link
 * #cancelSoftly} may be called from any. Closing ends the call on both sides, and so do interrupting the thread that reads, and
 * canceling gRPC's Context in which the stream was opened.
 *
 * <p>With {@code retention} the gateway retains the stream. If the connection is lost, the stream resumes by itself, and each
 * event comes once.
 */
public final class ChatStream
    implements Iterable<StreamChatCompletionResponse>, Iterator<StreamChatCompletionResponse>, AutoCloseable {
  private static final System.Logger LOG = System.getLogger("dev.deltawire");

  private final Operation operation;
  private final Resumption resumption;
  private Accumulator accumulator;
  private StreamChatCompletionRequest request;
  private Iterator<StreamChatCompletionResponse> responses;
  /** Whether the current call has received anything: if so, it is not made again. */
  private boolean isHeard;

  private StreamChatCompletionResponse next;
  private volatile String completionId;
  private Answer answer;
  private CallException error;

  ChatStream(Client client, StreamChatCompletionRequest request, Duration resumeFor, CallOptions options) {
    resumption = new Resumption(request, resumeFor);
    accumulator = new Accumulator(resumption.completionId(), resumption.lastSequence());
    operation = new Operation(client, options);
    begin();
  }

  @Override
  public Iterator<StreamChatCompletionResponse> iterator() {
    return this;
  }

  /**
   * Waits for the next event.
   *
   * @return false at the end of a whole answer
   * @throws CallException the call failed; after a fault, only after the event {@code completed}, which has the same error
   * @throws StreamInterruptedException the stream ended without its last event
   */
  @Override
  public boolean hasNext() {
    while (next == null && answer == null && error == null) {
      try {
        if (operation.isCanceled()) {
          end(operation.canceled());
        } else if (responses.hasNext()) {
          take(responses.next());
        } else {
          end(null);
        }
      } catch (StatusRuntimeException failed) {
        end(operation.failure(failed));
      }
    }
    if (next == null && error != null) {
      throw error;
    }
    return next != null;
  }

  @Override
  public StreamChatCompletionResponse next() {
    if (!hasNext()) {
      throw new NoSuchElementException();
    }
    StreamChatCompletionResponse event = next;
    next = null;
    return event;
  }

  /**
   * Reads to the end, and returns the whole answer; again if it is called again.
   *
   * @throws CallException see {@link #hasNext}; {@link CallException#partial} has what had arrived
   */
  public Answer answer() {
    while (hasNext()) {
      next();
    }
    return answer;
  }

  /** The completion's id; empty until {@code started}, unless the request has one or is retained. */
  public String completionId() {
    return completionId;
  }

  /** The last event that was read: {@link Client#resume} continues after it. */
  public OptionalLong lastSequence() {
    Long last = resumption.lastSequence();
    return last == null ? OptionalLong.empty() : OptionalLong.of(last);
  }

  /** How often the stream was resumed after its connection was lost. */
  public int resumed() {
    return resumption.calls() - 1;
  }

  /** The call's id in the gateway's log. */
  public String requestId() {
    return operation.requestId();
  }

  /** Ends the call now, on both sides; with {@code retention} the gateway continues to generate. */
  public void cancel() {
    operation.cancel("the stream was canceled");
  }

  /**
   * Ends generation now. Reading then returns the normal end: the text so far, STOP_REASON_CANCELLED and the usage.
   *
   * @return the state before the cancel
   * @throws IllegalStateException the completion's id is not known yet
   * @throws CallException the cancel failed
   */
  public CancelChatCompletionResponse cancelSoftly() {
    String id = completionId;
    if (id.isEmpty()) {
      throw new IllegalStateException("the completion's id is not known before `started`: choose one, or call cancel()");
    }
    return operation
        .aside()
        .about(id, 0)
        .unary(
            ChatCompletionGrpc.getCancelChatCompletionMethod(),
            CancelChatCompletionRequest.newBuilder().setCompletionId(id).build());
  }

  /** Ends the call, unless the stream has ended. */
  @Override
  public void close() {
    cancel();
    operation.close();
  }

  private void begin() {
    request = resumption.begin();
    if (request.hasChat()) {
      // Only heartbeats can have come before.
      accumulator = new Accumulator(resumption.completionId(), null);
    }
    completionId = accumulator.completionId();
    operation.restart();
    call();
  }

  private void call() {
    isHeard = false;
    operation.about(completionId, resumption.moved(), request.hasChat());
    responses = operation.stream(ChatCompletionGrpc.getStreamChatCompletionMethod(), request);
  }

  private void take(StreamChatCompletionResponse event) {
    isHeard = true;
    if (resumed() > 0 && event.getSequence() < accumulator.expected()) {
      // It was replayed, and has been read before.
      return;
    }
    String broken = accumulator.receive(event);
    if (broken != null) {
      Status status = Status.INTERNAL.withDescription("the gateway broke the rules of its stream: " + broken);
      error = CallException.of(status, requestId());
      operation.close();
      return;
    }
    resumption.received(event.getSequence());
    completionId = accumulator.completionId();
    operation.found(completionId);
    next = event;
  }

  /** Takes the end of a call, and makes the next one if there is one. Null is a status of OK. */
  private void end(CallException failure) {
    CallException last = failure;
    boolean isWhole = accumulator.isComplete() || (failure == null && accumulator.isOnlyTheEnd());
    if (!isWhole && !operation.isCanceled()) {
      Optional<Duration> retry = failure == null || isHeard ? Optional.empty() : operation.retry(failure);
      Optional<Duration> pause = retry.or(() -> resumption.ended(failure, accumulator.hasBegun()));
      if (pause.isPresent()) {
        LOG.log(
            retry.isPresent() ? System.Logger.Level.DEBUG : System.Logger.Level.WARNING,
            "{0} is {1} in {2} ms: {3}",
            completionId.isEmpty() ? "a stream" : "stream " + completionId,
            retry.isPresent() ? "requested again" : "resumed",
            pause.get().toMillis(),
            failure == null ? "it ended without its last event" : failure.getMessage());
        if (operation.pause(pause.get())) {
          goOn(retry.isPresent());
          return;
        }
        last = operation.end(failure);
      }
    }
    try {
      answer = accumulator.finish(last, requestId());
    } catch (CallException failed) {
      error = failed;
    }
    operation.close();
  }

  private void goOn(boolean isRetry) {
    if (isRetry) {
      call();
      return;
    }
    if (resumption.moved() > 0) {
      operation.moveOn();
    }
    begin();
  }
}
