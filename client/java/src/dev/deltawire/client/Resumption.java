package dev.deltawire.client;

import dev.deltawire.v1.ResumePoint;
import dev.deltawire.v1.StreamChatCompletionRequest;
import io.grpc.Status;
import java.time.Duration;
import java.util.Optional;
import java.util.Set;

/**
 * Whether an answer goes on after a call has ended without the stream's last event, and how.
 *
 * <pre>
 * how the call ended                 after                       what is next
 * connection lost, or the gateway    any call                    resume after the last event
 * cut this call only
 * refused for now                    a resuming call             resume after the last event
 * another process has it             a resuming call             resume on a new connection, at most MAX_CONNECTIONS times
 *                                                                since the last event
 * no such completion                 a resuming call, not begun  start again, at most MAX_ATTEMPTS times in all
 *                                    a resuming call, begun      as if another process has it: an id of a caller does not
 *                                                                say which process that is
 * the completion exists already      a starting call, if the id  resume: it is our own, whose beginning was lost
 *                                    is ours
 * anything else                      any call                    give up
 * </pre>
 *
 * A stream without retention gives up in any case, and so does one that has received nothing new for that long.
 */
final class Resumption {
  private static final Set<String> LOST = Set.of("DRAINING", "SLOW_CALLER");
  private static final Set<String> REFUSED = Set.of("TOO_MANY_STREAMS", "CALLER_LIMIT_EXCEEDED", "STORE_UNAVAILABLE");
  // Without a known reason, the status is that of a proxy or of the connection; it is not the caller's own doing, which is
  // excluded before.
  private static final Set<Status.Code> LOST_CODES =
      Set.of(
          Status.Code.UNAVAILABLE,
          Status.Code.INTERNAL,
          Status.Code.UNKNOWN,
          Status.Code.CANCELLED,
          Status.Code.DEADLINE_EXCEEDED);

  /** For how long a request that resumes goes on without anything new. */
  private static final Duration RESUME_FOR = Duration.ofMinutes(1);

  private final StreamChatCompletionRequest request;
  private final String completionId;
  private final boolean madeId;
  private final Duration retention;
  private final Pauses pauses = new Pauses(Duration.ofMillis(100), Duration.ofSeconds(2));
  private Long lastSequence;
  private boolean isResuming;
  private int calls;
  private int starts;
  private int connections;
  private int moved;
  private long since = System.nanoTime();

  /**
   * @param request what was asked; a retained one without an id gets one that cannot be guessed, so that it can be resumed before
   *     it has begun
   * @param resumeFor for how long to go on without anything new; null takes the request's retention, or a minute if it resumes
   */
  Resumption(StreamChatCompletionRequest request, Duration resumeFor) {
    com.google.protobuf.Duration asked = request.getOptions().getRetention();
    isResuming = request.hasResume();
    if (resumeFor != null) {
      retention = resumeFor;
    } else if (isResuming) {
      retention = RESUME_FOR;
    } else {
      boolean isRetained = request.getOptions().hasRetention();
      retention = isRetained ? Duration.ofSeconds(asked.getSeconds(), asked.getNanos()) : null;
    }
    madeId = request.hasChat() && retention != null && request.getChat().getCompletionId().isEmpty();
    StreamChatCompletionRequest.Builder own = request.toBuilder();
    if (madeId) {
      own.getChatBuilder().setCompletionId("own-" + Headers.id());
    }
    this.request = own.build();
    completionId = isResuming ? request.getResume().getCompletionId() : this.request.getChat().getCompletionId();
    lastSequence = request.getResume().hasLastSequence() ? request.getResume().getLastSequence() : null;
  }

  String completionId() {
    return completionId;
  }

  /** The last event that was read; null if none was. */
  Long lastSequence() {
    return lastSequence;
  }

  /** How many calls have begun. */
  int calls() {
    return calls;
  }

  /** How many new connections were needed since the last event; 0 if the next call needs none. */
  int moved() {
    return moved;
  }

  /** The next call's request. One with a chat begins the stream anew: its events count from 0 again. */
  StreamChatCompletionRequest begin() {
    calls++;
    if (!isResuming) {
      starts++;
      lastSequence = null;
      return request;
    }
    ResumePoint.Builder resume = ResumePoint.newBuilder().setCompletionId(completionId);
    if (lastSequence != null) {
      resume.setLastSequence(lastSequence);
    }
    return StreamChatCompletionRequest.newBuilder().setResume(resume).build();
  }

  /** Takes note of an event that had not come before. */
  void received(long sequence) {
    lastSequence = sequence;
    since = System.nanoTime();
    connections = 0;
    pauses.reset();
  }

  /**
   * The pause before the next call; empty to give up.
   *
   * @param failure how the call failed; null if its status was OK
   * @param hasBegun whether any part of the answer has come, in any call
   */
  Optional<Duration> ended(CallException failure, boolean hasBegun) {
    moved = 0;
    if (retention == null || !goesOn(failure, hasBegun)) {
      return Optional.empty();
    }
    Optional<Duration> asked = failure == null ? Optional.empty() : failure.retryDelay();
    Duration waited = Duration.ofNanos(System.nanoTime() - since);
    return Optional.of(pauses.next(asked)).filter(pause -> waited.plus(pause).compareTo(retention) <= 0);
  }

  private boolean goesOn(CallException failure, boolean hasBegun) {
    String reason = failure == null ? "DRAINING" : failure.reason();
    boolean isMissing = reason.equals("COMPLETION_NOT_FOUND");
    if (LOST.contains(reason)) {
      isResuming = true;
      return true;
    }
    if (REFUSED.contains(reason)) {
      return isResuming;
    }
    if (reason.equals("WRONG_REPLICA") || (isMissing && hasBegun)) {
      connections++;
      moved = isResuming && connections <= Operation.MAX_CONNECTIONS ? connections : 0;
      return moved > 0;
    }
    if (isMissing) {
      boolean startsAgain = isResuming && starts > 0 && starts < Operation.MAX_ATTEMPTS;
      isResuming = !startsAgain;
      return startsAgain;
    }
    if (reason.equals("COMPLETION_ALREADY_EXISTS")) {
      boolean isOurs = !isResuming && (madeId || starts > 1);
      isResuming |= isOurs;
      return isOurs;
    }
    boolean isLost = !failure.hasKnownReason() && LOST_CODES.contains(failure.code());
    isResuming |= isLost;
    return isLost;
  }
}
