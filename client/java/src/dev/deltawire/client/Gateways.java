package dev.deltawire.client;

import io.grpc.Metadata;
import java.util.LinkedHashMap;
import java.util.Map;

/** Which gateway has which completion, as far as a proxy has named it in the headers of a client's calls. */
final class Gateways {
  /** Completions that are remembered: those that a busy program may still look up or end. */
  private static final int MAX = 10_000;

  private final Map<String, String> names =
      new LinkedHashMap<>() {
        @Override
        protected boolean removeEldestEntry(Map.Entry<String, String> eldest) {
          return size() > MAX;
        }
      };

  /** Remembers the gateway that sent headers; no effect if no proxy has named it, or the completion's id is not known. */
  synchronized void found(String completionId, Metadata headers) {
    String gateway = headers == null ? null : headers.get(Headers.GATEWAY);
    if (gateway != null && !completionId.isEmpty() && !gateway.equals(names.get(completionId))) {
      names.remove(completionId); // so that it is the newest
      names.put(completionId, gateway);
    }
  }

  /** Its name; null if it is not known. */
  synchronized String of(String completionId) {
    return names.get(completionId);
  }
}
