package dev.deltawire.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import dev.deltawire.v1.Completed;
import dev.deltawire.v1.ErrorReason;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/**
 * A call failed. Branch on {@link #reason}, which is the name of an ErrorReason without its prefix, and without one on {@link
 * #code}; never on the message.
 *
 * <p>It is unchecked, like gRPC's own StatusRuntimeException: an Iterator cannot throw a checked one, and most callers can do
 * nothing about it where it occurs.
 */
public class CallException extends RuntimeException {
  private static final long serialVersionUID = 1;
  private static final String DOMAIN = "deltawire.dev";
  private static final String REASON_PREFIX = "ERROR_REASON_";
  private static final Metadata.Key<String> REASON = Headers.key("deltawire-reason");
  private static final Metadata.Key<String> PUSHBACK = Headers.key("grpc-retry-pushback-ms");

  /** What is known of a failed call. */
  private record Facts(
      Status status,
      String reason,
      Map<String, String> metadata,
      List<FieldViolation> violations,
      Duration retryDelay,
      Long pushback,
      String requestId,
      Answer partial) {}

  private final transient Facts facts;

  /**
   * A field of the request that breaks a rule.
   *
   * @param field its path, such as "chat.messages[0]"
   * @param description what is wrong with it
   */
  public record FieldViolation(String field, String description) {}

  private CallException(Facts facts, Throwable cause) {
    super(describe(facts), cause);
    this.facts = facts;
  }

  CallException(CallException same) {
    this(same.facts, same.getCause());
  }

  /** The status code; if {@code completed} had an error, that error's. */
  public Status.Code code() {
    return facts.status.getCode();
  }

  /** The reason, such as "MODEL_NOT_FOUND"; empty if the gateway sent none. */
  public String reason() {
    return facts.reason;
  }

  /** The status message, for people. */
  public String description() {
    return Optional.ofNullable(facts.status.getDescription()).orElse("");
  }

  /** The entries of the reason, such as "model"; see ErrorReason. */
  public Map<String, String> metadata() {
    return facts.metadata;
  }

  /** The fields that the gateway refused. */
  public List<FieldViolation> violations() {
    return facts.violations;
  }

  /** The delay after which a retry may succeed; empty if the gateway gave none. */
  public Optional<Duration> retryDelay() {
    return Optional.ofNullable(facts.retryDelay);
  }

  /** The call's id in the gateway's log. */
  public String requestId() {
    return facts.requestId;
  }

  /** What had arrived of the answer; empty if it had not begun. */
  public Optional<Answer> partial() {
    return Optional.ofNullable(facts.partial);
  }

  /** Whether the gateway named a reason that this version knows. */
  boolean hasKnownReason() {
    return ErrorReason.getDescriptor().findValueByName(REASON_PREFIX + facts.reason) != null;
  }

  /** Milliseconds after which gRPC would retry; negative if it must not, null if the call has no such trailer. */
  Long pushback() {
    return facts.pushback;
  }

  CallException with(Answer partial) {
    Facts own = facts;
    return new CallException(
        new Facts(
            own.status, own.reason, own.metadata, own.violations, own.retryDelay, own.pushback, own.requestId, partial),
        getCause());
  }

  static CallException of(Status status, String requestId) {
    return new CallException(new Facts(status, "", Map.of(), List.of(), null, null, requestId, null), status.getCause());
  }

  /** The fault in {@code completed}, which a proxy cannot replace. */
  static CallException of(Completed.Error error, String requestId, Throwable cause) {
    Status status = Status.fromCodeValue(error.getCode()).withDescription(error.getMessage());
    String reason = error.getReason() == ErrorReason.UNRECOGNIZED ? "" : error.getReason().name();
    reason = error.getReasonValue() == 0 ? "" : reason.replace(REASON_PREFIX, "");
    return new CallException(new Facts(status, reason, Map.of(), List.of(), null, null, requestId, null), cause);
  }

  /** A failed call with the details in its trailers. */
  static CallException of(StatusRuntimeException failure, String sentRequestId) {
    Metadata trailers = Optional.ofNullable(failure.getTrailers()).orElseGet(Metadata::new);
    com.google.rpc.Status details = StatusProto.fromThrowable(failure);
    ErrorInfo info = detail(details, ErrorInfo.class).orElse(ErrorInfo.getDefaultInstance());
    boolean isOurs = info.getDomain().equals(DOMAIN);
    Map<String, String> metadata = isOurs ? info.getMetadataMap() : Map.of();
    String requestId = Optional.ofNullable(trailers.get(Headers.REQUEST_ID)).orElse(sentRequestId);
    return new CallException(
        new Facts(
            failure.getStatus(),
            isOurs ? info.getReason() : Optional.ofNullable(trailers.get(REASON)).orElse(""),
            metadata,
            detail(details, BadRequest.class).stream()
                .flatMap(refused -> refused.getFieldViolationsList().stream())
                .map(violation -> new FieldViolation(violation.getField(), violation.getDescription()))
                .toList(),
            detail(details, RetryInfo.class).filter(RetryInfo::hasRetryDelay).map(CallException::delay).orElse(null),
            milliseconds(trailers.get(PUSHBACK)),
            metadata.getOrDefault("request_id", requestId),
            null),
        failure);
  }

  private static Duration delay(RetryInfo retry) {
    return Duration.ofSeconds(retry.getRetryDelay().getSeconds(), retry.getRetryDelay().getNanos());
  }

  private static Long milliseconds(String pushback) {
    try {
      return pushback == null ? null : Long.valueOf(pushback);
    } catch (NumberFormatException malformed) {
      // As gRPC itself has it.
      return -1L;
    }
  }

  /** A detail of this type. A proxy between client and gateway sends errors without any. */
  private static <T extends com.google.protobuf.Message> Optional<T> detail(com.google.rpc.Status details, Class<T> type) {
    for (Any detail : details == null ? List.<Any>of() : details.getDetailsList()) {
      if (detail.is(type)) {
        try {
          return Optional.of(detail.unpack(type));
        } catch (InvalidProtocolBufferException malformed) {
          return Optional.empty();
        }
      }
    }
    return Optional.empty();
  }

  private static String describe(Facts facts) {
    String reason = facts.reason.isEmpty() ? "" : " (" + facts.reason + ")";
    String description = facts.status.getDescription() == null ? "" : ": " + facts.status.getDescription();
    // gRPC's own description of a lost connection says only "io exception".
    Throwable cause = facts.status.getCause();
    String detail = cause == null || cause.getMessage() == null ? "" : ": " + cause.getMessage();
    return facts.status.getCode() + reason + description + detail + " [request " + facts.requestId + "]";
  }
}
