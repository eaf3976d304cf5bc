package dev.deltawire.client;

import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.ThreadLocalRandom;

/** Pauses between calls: twice as long each time, and random, so that clients that were cut off together do not return together. */
final class Pauses {
  private final long shortest;
  private final long limit;
  private long longest;

  /** With the greatest length of the first pause, and of all. */
  Pauses(Duration first, Duration limit) {
    longest = shortest = first.toNanos();
    this.limit = limit.toNanos();
  }

  void reset() {
    longest = shortest;
  }

  /** The next pause; longer if the gateway asks for it. */
  Duration next(Optional<Duration> asked) {
    Duration drawn = Duration.ofNanos(ThreadLocalRandom.current().nextLong(longest / 2, longest));
    longest = Math.min(limit, 2 * longest);
    return asked.filter(delay -> delay.compareTo(drawn) > 0).orElse(drawn);
  }
}
