package dev.deltawire.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientInterceptors;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.Iterator;
import java.util.Optional;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Supplier;

/**
 * What the caller asked for once, with all calls that the client makes for it: they share headers, a deadline and a cancel.
 *
 * <p>One thread makes the calls; {@link #cancel} may be called from any.
 */
final class Operation {
  /** Attempts of a call that has received nothing. */
  static final int MAX_ATTEMPTS = 4;
  /** New connections to find the process that has a completion: behind a balancer each may reach another one. */
  static final int MAX_CONNECTIONS = 8;

  private final Client client;
  private final CallOptions options;
  private final Deadline deadline;
  private final Context.CancellableContext context;
  private final CountDownLatch stopped = new CountDownLatch(1);
  private final String sentRequestId;
  private final AtomicReference<Metadata> received;
  private volatile ManagedChannel connection;
  private String completionId = "";
  private boolean begins;
  private int moved;
  private int attempts;
  private Pauses retries;

  Operation(Client client, CallOptions options) {
    this(client, options, Headers.id(), new AtomicReference<>(), client.main());
  }

  private Operation(
      Client client, CallOptions options, String requestId, AtomicReference<Metadata> received, ManagedChannel connection) {
    this.client = client;
    this.connection = connection;
    this.received = received;
    sentRequestId = requestId;
    deadline = earliest(options.getDeadline(), Context.current().getDeadline());
    this.options = options.withDeadline(deadline);
    // It ends with the caller's own context, which is gRPC's way to cancel.
    context = Context.current().withCancellation();
    context.addListener(ended -> stopped.countDown(), Runnable::run);
    restart();
    client.add(this);
  }

  private static Deadline earliest(Deadline one, Deadline other) {
    return one == null ? other : other == null ? one : one.minimum(other);
  }

  /** Another operation about the same completion, for the same request in the logs. */
  Operation aside() {
    ManagedChannel first = connection.isShutdown() ? client.main() : connection;
    return new Operation(client, options, sentRequestId, received, first).about(completionId, 0);
  }

  /**
   * Lets a proxy send the calls to the gateway that has a completion.
   *
   * @param moved how many gateways did not have it; the proxy chooses again for each
   */
  Operation about(String completionId, int moved) {
    return about(completionId, moved, false);
  }

  /** The same; {@code begins} if the calls begin the completion: the gateway of an earlier one with this id does not matter. */
  Operation about(String completionId, int moved, boolean begins) {
    this.completionId = completionId;
    this.begins = begins;
    this.moved = moved;
    return this;
  }

  /** Lets the next call have all attempts. */
  void restart() {
    attempts = 0;
    retries = new Pauses(Duration.ofMillis(200), Duration.ofSeconds(2));
  }

  /** Lets the next call have a connection of its own, which may reach another gateway process. */
  void moveOn() {
    leave();
    connection = client.another();
  }

  /** Remembers that the gateway of the latest headers has this completion. */
  void found(String completionId) {
    client.gateways().found(completionId, received.get());
  }

  String requestId() {
    return Optional.ofNullable(received.get()).map(headers -> headers.get(Headers.REQUEST_ID)).orElse(sentRequestId);
  }

  <Q, R> Iterator<R> stream(MethodDescriptor<Q, R> method, Q request) {
    return call(() -> ClientCalls.blockingServerStreamingCall(channel(), method, options, request));
  }

  /** Makes a call with one answer, on new connections until one reaches the process that has the completion. */
  <Q, R> R unary(MethodDescriptor<Q, R> method, Q request) {
    Pauses search = new Pauses(Duration.ofMillis(100), Duration.ofSeconds(2));
    try {
      while (true) {
        try {
          R response = call(() -> ClientCalls.blockingUnaryCall(channel(), method, options, request));
          found(completionId);
          return response;
        } catch (StatusRuntimeException failed) {
          CallException failure = failure(failed);
          Optional<Duration> retry = retry(failure);
          boolean moves = failure.reason().equals("WRONG_REPLICA") && moved < MAX_CONNECTIONS;
          if (retry.isEmpty() && !moves) {
            throw failure;
          }
          if (!pause(retry.orElseGet(() -> search.next(failure.retryDelay())))) {
            throw end(failure);
          }
          if (moves) {
            restart();
            about(completionId, moved + 1).moveOn();
          }
        }
      }
    } finally {
      close();
    }
  }

  private <R> R call(Supplier<R> made) {
    attempts++;
    Context previous = context.attach();
    try {
      return made.get();
    } finally {
      context.detach(previous);
    }
  }

  private Channel channel() {
    Metadata headers = new Metadata();
    headers.put(Headers.REQUEST_ID, sentRequestId);
    if (!completionId.isEmpty() && Headers.isSendable(completionId)) {
      headers.put(Headers.ROUTE, moved == 0 ? completionId : completionId + "#" + moved);
    }
    String gateway = Optional.ofNullable(received.get()).map(earlier -> earlier.get(Headers.GATEWAY)).orElse(null);
    if (gateway == null && !begins) {
      gateway = client.gateways().of(completionId);
    }
    if (moved == 0 && gateway != null) {
      headers.put(Headers.GATEWAY, gateway);
    }
    return ClientInterceptors.intercept(
        client.channel(connection),
        MetadataUtils.newAttachHeadersInterceptor(headers),
        MetadataUtils.newCaptureMetadataInterceptor(received, new AtomicReference<>()));
  }

  /** What a failed call says, or that this program ended it. */
  CallException failure(StatusRuntimeException failed) {
    if (Thread.currentThread().isInterrupted()) {
      cancel("the thread was interrupted");
    }
    return isCanceled() ? canceled() : CallException.of(failed, requestId());
  }

  /** The pause before another attempt of a call that has received nothing; empty if there is none. */
  Optional<Duration> retry(CallException failure) {
    boolean passes =
        switch (failure.code()) {
          // A gateway that shuts down may cancel a call that has just arrived.
          case UNAVAILABLE, CANCELLED -> true;
          // Without a delay it is a message that is too large.
          case RESOURCE_EXHAUSTED -> failure.retryDelay().isPresent();
          default -> false;
        };
    Long pushback = failure.pushback();
    if (!passes || attempts >= MAX_ATTEMPTS || isCanceled() || (pushback != null && pushback < 0)) {
      return Optional.empty();
    }
    return failure
        .retryDelay()
        .or(() -> Optional.ofNullable(pushback).map(Duration::ofMillis))
        .or(() -> Optional.of(retries.next(Optional.empty())))
        .filter(pause -> deadline == null || TimeUnit.NANOSECONDS.convert(pause) < deadline.timeRemaining(TimeUnit.NANOSECONDS));
  }

  /** Waits before the next call; false if there is no next one, because of a cancel or the deadline: see {@link #end}. */
  boolean pause(Duration pause) {
    long nanoseconds = TimeUnit.NANOSECONDS.convert(pause);
    if (deadline != null) {
      nanoseconds = Math.min(nanoseconds, deadline.timeRemaining(TimeUnit.NANOSECONDS));
    }
    try {
      stopped.await(nanoseconds, TimeUnit.NANOSECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
      cancel("the thread was interrupted");
    }
    // gRPC would let up to two minutes pass until it connects again to a gateway that was away.
    connection.resetConnectBackoff();
    return !isCanceled() && !isPast();
  }

  /** How the operation ends if there is no next call after the last one failed like this; null is a status of OK. */
  CallException end(CallException last) {
    if (isCanceled()) {
      return canceled();
    }
    if (last != null && last.code() == Status.Code.DEADLINE_EXCEEDED) {
      return last;
    }
    String why = last == null ? "" : "; the last call ended with " + last.getMessage();
    return CallException.of(Status.DEADLINE_EXCEEDED.withDescription("the deadline passed" + why), requestId());
  }

  CallException canceled() {
    Throwable cause = context.cancellationCause();
    String why = cause == null ? "the call was canceled" : cause.getMessage();
    return CallException.of(Status.CANCELLED.withDescription(why), requestId());
  }

  /** Whether this program ended the operation. The deadline of a context cancels it too, but is one. */
  boolean isCanceled() {
    return context.isCancelled() && !isPast();
  }

  private boolean isPast() {
    return deadline != null && deadline.isExpired();
  }

  void cancel(String why) {
    context.cancel(new InterruptedException(why));
  }

  /** Ends the operation: it makes no more calls. */
  void close() {
    context.cancel(null);
    client.remove(this);
    leave();
  }

  private synchronized void leave() {
    if (connection != client.main()) {
      client.close(connection);
      connection = client.main();
    }
  }
}
