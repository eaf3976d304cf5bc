package dev.deltawire.client;

import dev.deltawire.v1.AssistantMessage;
import dev.deltawire.v1.ChoiceFinished;
import dev.deltawire.v1.Completed;
import dev.deltawire.v1.Notice;
import dev.deltawire.v1.Started;
import dev.deltawire.v1.StreamChatCompletionResponse;
import dev.deltawire.v1.StreamChatCompletionResponse.EventCase;
import dev.deltawire.v1.TextDelta;
import dev.deltawire.v1.ReasoningDelta;
import dev.deltawire.v1.ToolCallDelta;
import dev.deltawire.v1.Usage;
import io.grpc.Status;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.TreeMap;

/** Folds the events of a stream into the answer, and checks them against the rules of StreamChatCompletionResponse. */
final class Accumulator {
  // These are the caller's own doing: they mean the same whether or not the answer had begun.
  private static final Set<Status.Code> CALLERS_OWN = Set.of(Status.Code.CANCELLED, Status.Code.DEADLINE_EXCEEDED);

  private final String completionId;
  private final long first;
  private final boolean isFromMiddle;
  private long expected;
  private Started started;
  private Completed completed;
  private Usage usage = Usage.getDefaultInstance();
  private final List<Notice> notices = new ArrayList<>();
  private final TreeMap<Integer, Parts> choices = new TreeMap<>();

  /** Text is concatenated once, at the end. */
  private static final class Parts {
    final StringBuilder text = new StringBuilder();
    final StringBuilder reasoning = new StringBuilder();
    final AssistantMessage.Builder message = AssistantMessage.newBuilder();
    final Completed.Choice.Builder choice = Completed.Choice.newBuilder();
  }

  /**
   * @param completionId the id if it is known before {@code started}; otherwise empty
   * @param lastSequence the last event that was read before; null if this reads the stream from its first event. Otherwise the
   *     answer has the messages of {@code completed}, and lacks what came before if that omits them
   */
  Accumulator(String completionId, Long lastSequence) {
    this.completionId = completionId;
    isFromMiddle = lastSequence != null;
    first = expected = isFromMiddle ? lastSequence + 1 : 0;
  }

  String completionId() {
    return started == null ? completionId : started.getCompletionId();
  }

  /** The sequence of the next event. */
  long expected() {
    return expected;
  }

  /** Whether any part of the answer has come. Heartbeats can come before {@code started}. */
  boolean hasBegun() {
    return started != null || (isFromMiddle && expected > first);
  }

  boolean isComplete() {
    return completed != null;
  }

  /** Whether a stream that is read from the middle had no event: if it ends now, all of it was read before. */
  boolean isOnlyTheEnd() {
    return isFromMiddle && expected == first;
  }

  /** Takes the next event; returns what is wrong with it, or null. An event of a later version is counted, and else skipped. */
  String receive(StreamChatCompletionResponse event) {
    EventCase kind = event.getEventCase();
    if (event.getSequence() != expected) {
      return "event %d was expected and %d came".formatted(expected, event.getSequence());
    }
    if (completed != null) {
      return "an event came after `completed`";
    }
    boolean isAnytime = kind == EventCase.HEARTBEAT || kind == EventCase.EVENT_NOT_SET;
    if (!isAnytime && kind != EventCase.STARTED && started == null && !isFromMiddle) {
      return "%s came before `started`".formatted(kind);
    }
    if (kind == EventCase.STARTED && started != null) {
      return "`started` came twice";
    }
    expected++;
    switch (kind) {
      case STARTED -> started = event.getStarted();
      case TEXT_DELTA -> {
        TextDelta delta = event.getTextDelta();
        partsOf(event).text.append(delta.getText());
        partsOf(event).choice.addAllLogprobs(delta.getLogprobsList());
      }
      case REASONING_DELTA -> {
        ReasoningDelta delta = event.getReasoningDelta();
        partsOf(event).reasoning.append(delta.getText());
        partsOf(event).choice.addAllLogprobs(delta.getLogprobsList());
      }
      case TOOL_CALL_DELTA -> receive(partsOf(event), event.getToolCallDelta());
      case CHOICE_FINISHED -> receive(partsOf(event), event.getChoiceFinished());
      case USAGE_UPDATE -> usage = event.getUsageUpdate().getUsage();
      case NOTICE -> notices.add(event.getNotice());
      case COMPLETED -> {
        completed = event.getCompleted();
        usage = completed.getUsage();
      }
      default -> {}
    }
    return null;
  }

  /** A verdict has all that the fragments had, so those are not kept. */
  private static void receive(Parts parts, ToolCallDelta delta) {
    if (delta.hasToolCall()) {
      parts.message.addToolCalls(delta.getToolCall());
    } else if (delta.hasFailure()) {
      parts.choice.addFailedToolCalls(delta);
    }
  }

  private static void receive(Parts parts, ChoiceFinished finished) {
    parts
        .choice
        .setStopReasonValue(finished.getStopReasonValue())
        .setEngineFinishReason(finished.getEngineFinishReason());
    switch (finished.getMatchedCase()) {
      case MATCHED_STOP -> parts.choice.setMatchedStop(finished.getMatchedStop());
      case MATCHED_TOKEN_ID -> parts.choice.setMatchedTokenId(finished.getMatchedTokenId());
      default -> {}
    }
  }

  private Parts partsOf(StreamChatCompletionResponse event) {
    return choices.computeIfAbsent(event.getChoiceIndex(), index -> new Parts());
  }

  /**
   * The answer, when the last call has ended.
   *
   * @param failure how the call failed; null if its status was OK
   * @throws CallException it is not a whole answer
   */
  Answer finish(CallException failure, String requestId) {
    Answer answer = answer(requestId);
    boolean isWhole = completed != null && !completed.hasError();
    if (isWhole || (failure == null && isOnlyTheEnd())) {
      return answer;
    }
    Answer partial = hasBegun() ? answer : null;
    if (completed != null) {
      // A proxy may have replaced or dropped the status.
      boolean hasReason = failure != null && !failure.reason().isEmpty();
      throw (hasReason ? failure : CallException.of(completed.getError(), requestId, failure)).with(partial);
    }
    if (failure == null) {
      throw new StreamInterruptedException(
          CallException.of(Status.UNKNOWN.withDescription("the stream ended without `completed`"), requestId).with(partial));
    }
    boolean isInterrupted = hasBegun() && !CALLERS_OWN.contains(failure.code());
    throw isInterrupted ? new StreamInterruptedException(failure.with(partial)) : failure.with(partial);
  }

  private Answer answer(String requestId) {
    if (completed != null) {
      completed.getChoicesList().forEach(choice -> choices.computeIfAbsent(choice.getIndex(), index -> new Parts()));
    }
    List<Completed.Choice> all = new ArrayList<>();
    choices.forEach((index, parts) -> all.add(choice(index, parts)));
    return new Answer(
        completionId(), started == null ? "" : started.getModel(), List.copyOf(all), usage, List.copyOf(notices), requestId);
  }

  private Completed.Choice choice(int index, Parts parts) {
    AssistantMessage.Builder message = parts.message.clone().setReasoning(parts.reasoning.toString());
    if (!parts.text.isEmpty()) {
      message.setText(parts.text.toString());
    }
    Completed.Choice.Builder choice = parts.choice.clone().setIndex(index).setMessage(message);
    if (completed == null) {
      return choice.build();
    }
    for (Completed.Choice stated : completed.getChoicesList()) {
      if (stated.getIndex() == index) {
        // Calls may be executed only if `completed` came, so it is not taken from `choice_finished`.
        choice.setToolCallsExecutable(stated.getToolCallsExecutable());
        if (isFromMiddle && !completed.getMessagesOmitted()) {
          return stated.toBuilder().addAllLogprobs(parts.choice.getLogprobsList()).build();
        }
      }
    }
    return choice.build();
  }
}
