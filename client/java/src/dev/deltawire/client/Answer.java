package dev.deltawire.client;

import dev.deltawire.v1.ChatMessage;
import dev.deltawire.v1.Completed;
import dev.deltawire.v1.Notice;
import dev.deltawire.v1.StopReason;
import dev.deltawire.v1.ToolCall;
import dev.deltawire.v1.Usage;
import java.util.List;

/**
 * An answer; in an error, what had arrived of it.
 *
 * @param completionId the completion's id; empty if it is not known yet
 * @param model the id of the model that answers
 * @param choices every choice with any output, by ascending index, with the log-probabilities of its text
 * @param usage the tokens used by all choices together
 * @param notices the gateway's notices, in order
 * @param requestId the call's id in the gateway's log
 */
public record Answer(
    String completionId, String model, List<Completed.Choice> choices, Usage usage, List<Notice> notices, String requestId) {

  /** The first choice; an empty one if there is none. */
  public Completed.Choice choice() {
    return choices.isEmpty() ? Completed.Choice.getDefaultInstance() : choices.get(0);
  }

  /** The text of the first choice. */
  public String text() {
    return choice().getMessage().getText();
  }

  /** The model's turn in the form of a request: append it to the conversation. */
  public ChatMessage message() {
    return ChatMessage.newBuilder().setAssistant(choice().getMessage()).build();
  }

  /** The calls that parsed. Execute them only if {@link #toolCallsExecutable}. */
  public List<ToolCall> toolCalls() {
    return choice().getMessage().getToolCallsList();
  }

  /** Whether the answer is complete, has calls, and all of them parsed. */
  public boolean toolCallsExecutable() {
    return choice().getToolCallsExecutable();
  }

  /** Why the first choice ended. */
  public StopReason stopReason() {
    return choice().getStopReason();
  }
}
