package dev.deltawire.client;

/**
 * The stream ended without {@code completed}, so it is unknown what else there was. {@link #partial} has what had arrived; it is
 * not an answer, and none of its tool calls may be executed.
 */
public final class StreamInterruptedException extends CallException {
  private static final long serialVersionUID = 1;

  StreamInterruptedException(CallException failure) {
    super(failure);
  }
}
