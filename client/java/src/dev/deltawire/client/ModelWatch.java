package dev.deltawire.client;

import dev.deltawire.v1.Model;
import dev.deltawire.v1.ModelRegistryGrpc;
import dev.deltawire.v1.WatchModelsRequest;
import dev.deltawire.v1.WatchModelsResponse;
import dev.deltawire.v1.WatchModelsResponse.Change;
import io.grpc.CallOptions;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.Collection;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Queue;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;

/**
 * Changes to the models, each once, without an end. After a lost connection the watch continues from its last revision; if the
 * gateway no longer has that, it takes a new snapshot and returns the differences.
 *
 * <p>One thread reads; {@link #cancel} may be called from any. Closing ends the call on both sides.
 */
public final class ModelWatch implements Iterable<ModelWatch.Event>, Iterator<ModelWatch.Event>, AutoCloseable {
  private static final System.Logger LOG = System.getLogger("dev.deltawire");
  private static final Set<Status.Code> PASSES =
      Set.of(
          Status.Code.UNAVAILABLE,
          Status.Code.ABORTED,
          Status.Code.RESOURCE_EXHAUSTED,
          // Not the caller's: a limit of the gateway or of a proxy on the duration of a call.
          Status.Code.DEADLINE_EXCEEDED);
  private static final Set<Status.Code> PASSES_WITHOUT_REASON = Set.of(Status.Code.INTERNAL, Status.Code.UNKNOWN);

  /**
   * A change, or a bookmark.
   *
   * @param change CHANGE_UNSPECIFIED is a bookmark: the changes so far add up to the state at this revision
   * @param model the model after the change, the last one if it was removed; absent in a bookmark
   * @param revision from where another watch can continue; empty within a snapshot
   */
  public record Event(Change change, Optional<Model> model, String revision) {
    /** Whether the changes so far add up to the state at this revision. */
    public boolean isBookmark() {
      return model.isEmpty();
    }
  }

  private final Operation operation;
  private final Pauses pauses = new Pauses(Duration.ofMillis(200), Duration.ofSeconds(10));
  private final TreeMap<String, Model> models = new TreeMap<>();
  /** Whether {@code models} has all that the caller knows. */
  private final boolean knowsAll;

  private final Queue<Event> events = new ArrayDeque<>();
  private Iterator<WatchModelsResponse> responses;
  private String revision;
  private String readRevision;
  /** The ids in the snapshot that is coming; null if none is. */
  private Set<String> listed;

  private CallException error;

  ModelWatch(Client client, String revision, Collection<Model> known, CallOptions options) {
    this.revision = readRevision = revision;
    knowsAll = known != null || revision.isEmpty();
    if (known != null) {
      known.forEach(model -> models.put(model.getId(), model));
    }
    operation = new Operation(client, options);
    call();
  }

  /** The models as of the changes received so far, by id. After a bookmark it is the state at its revision. */
  public Map<String, Model> models() {
    return new TreeMap<>(models);
  }

  /** From where another watch can continue after the last event that was read; empty until a snapshot is complete. */
  public String revision() {
    return readRevision;
  }

  @Override
  public Iterator<Event> iterator() {
    return this;
  }

  /**
   * Waits for the next event.
   *
   * @return true
   * @throws CallException the watch failed in a way that a retry cannot mend, its deadline passed, or it was canceled
   */
  @Override
  public boolean hasNext() {
    while (events.isEmpty() && error == null) {
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
    if (events.isEmpty()) {
      throw error;
    }
    return true;
  }

  @Override
  public Event next() {
    hasNext();
    Event event = events.remove();
    readRevision = event.revision;
    return event;
  }

  /** Ends the watch now, on both sides. */
  public void cancel() {
    operation.cancel("the watch was canceled");
  }

  @Override
  public void close() {
    cancel();
    operation.close();
  }

  private void call() {
    // A snapshot that was not read to its end begins again; what was returned of it is not returned again.
    listed = revision.isEmpty() ? new TreeSet<>() : null;
    responses =
        operation.stream(
            ModelRegistryGrpc.getWatchModelsMethod(),
            WatchModelsRequest.newBuilder().setRevision(revision).setBatchSnapshot(revision.isEmpty()).build());
  }

  private void take(WatchModelsResponse message) {
    pauses.reset();
    if (message.getBookmark()) {
      bookmark(message.getRevision());
      return;
    }
    if (listed == null) {
      revision = message.getRevision();
    }
    List<Model> changed = message.getModelsCount() > 0 ? message.getModelsList() : List.of(message.getModel());
    switch (message.getChange()) {
      case CHANGE_ADDED, CHANGE_MODIFIED -> changed.forEach(model -> put(model, message.getChange()));
      case CHANGE_REMOVED -> changed.forEach(this::remove);
      // A kind of a later version.
      default -> {}
    }
  }

  private void bookmark(String at) {
    Set<String> kept = listed;
    if (kept != null) {
      // What a snapshot does not list was removed while the connection was lost.
      models.values().stream().filter(model -> !kept.contains(model.getId())).toList().forEach(this::remove);
      listed = null;
    }
    revision = at;
    events.add(new Event(Change.CHANGE_UNSPECIFIED, Optional.empty(), at));
  }

  private void put(Model model, Change kind) {
    if (listed != null) {
      listed.add(model.getId());
    }
    Model known = models.put(model.getId(), model);
    if (!model.equals(known)) {
      Change change = known != null ? Change.CHANGE_MODIFIED : knowsAll ? Change.CHANGE_ADDED : kind;
      events.add(event(change, model));
    }
  }

  private void remove(Model model) {
    if (models.remove(model.getId()) != null || !knowsAll) {
      events.add(event(Change.CHANGE_REMOVED, model));
    }
  }

  private Event event(Change change, Model model) {
    return new Event(change, Optional.of(model), listed == null ? revision : "");
  }

  /** Takes the end of a call, and makes the next one unless the watch is over. Null is a status of OK. */
  private void end(CallException failure) {
    Optional<Duration> pause = operation.isCanceled() ? Optional.empty() : pauseAfter(failure);
    if (pause.isPresent()) {
      LOG.log(
          System.Logger.Level.WARNING,
          "the watch continues in {0} ms: {1}",
          pause.get().toMillis(),
          failure == null ? "the call ended" : failure.getMessage());
      if (operation.pause(pause.get())) {
        call();
        return;
      }
    }
    error = pause.isPresent() ? operation.end(failure) : failure;
    operation.close();
  }

  private Optional<Duration> pauseAfter(CallException failure) {
    if (failure == null) {
      return Optional.of(pauses.next(Optional.empty()));
    }
    if (failure.code() == Status.Code.OUT_OF_RANGE) {
      // Without the models of that revision, those that were removed since could not be reported.
      boolean canBeginAnew = knowsAll && !revision.isEmpty();
      revision = canBeginAnew ? "" : revision;
      return canBeginAnew ? Optional.of(Duration.ZERO) : Optional.empty();
    }
    boolean passes =
        PASSES.contains(failure.code())
            || (PASSES_WITHOUT_REASON.contains(failure.code()) && failure.reason().isEmpty());
    return passes ? Optional.of(pauses.next(failure.retryDelay())) : Optional.empty();
  }
}
