package dev.deltawire.client;

import dev.deltawire.v1.CancelChatCompletionRequest;
import dev.deltawire.v1.CancelChatCompletionResponse;
import dev.deltawire.v1.ChatCompletionGrpc;
import dev.deltawire.v1.ChatRequest;
import dev.deltawire.v1.GetChatCompletionRequest;
import dev.deltawire.v1.GetChatCompletionResponse;
import dev.deltawire.v1.Model;
import dev.deltawire.v1.ResumePoint;
import dev.deltawire.v1.StreamChatCompletionRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collection;
import java.util.List;
import java.util.OptionalLong;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.regex.Pattern;

/**
 * A client for a gateway. Any number of threads may share it.
 *
 * <p>The deadline of a call, and everything else that gRPC has for one call, is in {@link CallOptions}: {@code
 * CallOptions.DEFAULT.withDeadlineAfter(10, TimeUnit.MINUTES)}. A deadline covers all calls that the client makes for it.
 *
 * <p>A call that fails before its first event is made again, four times in all: after UNAVAILABLE, and after RESOURCE_EXHAUSTED
 * with a delay. The gateway's delay is respected.
 */
public final class Client implements AutoCloseable {
  private static final Pattern LOCAL = Pattern.compile("(dns:///)?(localhost|127(\\.\\d+){3}|\\[::1])(:\\d+)?");
  // An answer with log-probabilities exceeds gRPC's default of 4 MiB.
  private static final int MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

  private final String target;
  private final ChannelCredentials credentials;
  private final List<ClientInterceptor> interceptors;
  private final ManagedChannel main;
  private final Set<Operation> operations = ConcurrentHashMap.newKeySet();
  private final Set<ManagedChannel> others = ConcurrentHashMap.newKeySet();
  private final Gateways gateways = new Gateways();
  private volatile boolean isClosed;

  /** How to connect. */
  public static final class Builder {
    private final String target;
    private final List<ClientInterceptor> interceptors = new ArrayList<>();
    private ChannelCredentials credentials = InsecureChannelCredentials.create();
    private String key = "";
    private boolean isKeyInOwnHeader;
    private boolean isPlaintextKeyAllowed;

    private Builder(String target) {
      this.target = target;
    }

    /** The access key for the gateway, in printable ASCII without spaces. */
    public Builder key(String key) {
      if (!Headers.isSendable(key)) {
        throw new IllegalArgumentException("the key must be printable ASCII without spaces");
      }
      this.key = key;
      return this;
    }

    /** Sends the key as {@code x-deltawire-key}, because {@code authorization} is for a proxy. */
    public Builder keyInOwnHeader() {
      isKeyInOwnHeader = true;
      return this;
    }

    /** Allows the key over plaintext to other machines, where others can read it. */
    public Builder allowPlaintextKey() {
      isPlaintextKeyAllowed = true;
      return this;
    }

    /** Uses TLS, with Java's own root certificates. */
    public Builder tls() {
      return credentials(TlsChannelCredentials.create());
    }

    /** Uses TLS with other certificates: see {@link TlsChannelCredentials#newBuilder}. */
    public Builder credentials(ChannelCredentials credentials) {
      this.credentials = credentials;
      return this;
    }

    /** Adds an interceptor for every call, for example one that attaches headers. */
    public Builder interceptor(ClientInterceptor interceptor) {
      interceptors.add(interceptor);
      return this;
    }

    /**
     * Returns the client, which connects with its first call.
     *
     * @throws IllegalArgumentException the key would be sent over plaintext to another machine
     */
    public Client build() {
      boolean isPlaintext = credentials instanceof InsecureChannelCredentials;
      if (!key.isEmpty() && isPlaintext && !isPlaintextKeyAllowed && !LOCAL.matcher(target).matches()) {
        throw new IllegalArgumentException(
            "the key would go over plaintext to another machine: use tls(), or allow it with allowPlaintextKey()");
      }
      if (!key.isEmpty()) {
        Metadata headers = new Metadata();
        String name = isKeyInOwnHeader ? "x-deltawire-key" : "authorization";
        headers.put(Headers.key(name), isKeyInOwnHeader ? key : "Bearer " + key);
        interceptors.add(MetadataUtils.newAttachHeadersInterceptor(headers));
      }
      return new Client(this);
    }
  }

  /** How to connect to a gateway, "host:port"; without TLS, unless it is asked for. */
  public static Builder to(String target) {
    return new Builder(target);
  }

  private Client(Builder builder) {
    target = builder.target;
    credentials = builder.credentials;
    interceptors = List.copyOf(builder.interceptors);
    main = connect();
  }

  /** Sends a request; reading the stream returns the answer while it is generated. */
  public ChatStream stream(ChatRequest chat, CallOptions options) {
    return stream(StreamChatCompletionRequest.newBuilder().setChat(chat).build(), options);
  }

  /** The same with options for the stream, such as {@code retention}; or a request to {@link #resume}. */
  public ChatStream stream(StreamChatCompletionRequest request, CallOptions options) {
    return new ChatStream(this, request, null, options);
  }

  /**
   * Reads a retained stream again: first replayed, then live.
   *
   * @param completionId its id
   * @param lastSequence the last event that was read; empty begins with the first one. Otherwise the answer has the messages of
   *     {@code completed}, and lacks what came before if the gateway omitted them
   * @param resumeFor for how long without a new event it resumes by itself; pass the request's retention
   */
  public ChatStream resume(String completionId, OptionalLong lastSequence, Duration resumeFor, CallOptions options) {
    ResumePoint.Builder resume = ResumePoint.newBuilder().setCompletionId(completionId);
    lastSequence.ifPresent(resume::setLastSequence);
    return new ChatStream(
        this, StreamChatCompletionRequest.newBuilder().setResume(resume).build(), resumeFor, options);
  }

  /** Ends a completion softly, if it runs: its stream ends normally, with the text so far. */
  public CancelChatCompletionResponse cancel(String completionId, CallOptions options) {
    return new Operation(this, options)
        .about(completionId, 0)
        .unary(
            ChatCompletionGrpc.getCancelChatCompletionMethod(),
            CancelChatCompletionRequest.newBuilder().setCompletionId(completionId).build());
  }

  /** The state of a completion, its usage so far, and its result if that is retained. */
  public GetChatCompletionResponse get(String completionId, CallOptions options) {
    return new Operation(this, options)
        .about(completionId, 0)
        .unary(
            ChatCompletionGrpc.getGetChatCompletionMethod(),
            GetChatCompletionRequest.newBuilder().setCompletionId(completionId).build());
  }

  /** All models, and then every change to them as it happens. */
  public ModelWatch watch(CallOptions options) {
    return new ModelWatch(this, "", List.of(), options);
  }

  /**
   * The changes since a revision of an earlier watch.
   *
   * @param revision {@link ModelWatch#revision} of that watch
   * @param known its models at that revision; null if they are not known: then the watch fails with REVISION_GONE if the gateway
   *     no longer has the revision
   */
  public ModelWatch watch(String revision, Collection<Model> known, CallOptions options) {
    return new ModelWatch(this, revision, known, options);
  }

  /** A channel for the generated stubs of all other methods; it sends the key. The client closes it, and retries nothing on it. */
  public Channel channel() {
    return channel(main);
  }

  /** Ends every call, stream and watch with CANCELLED. */
  @Override
  public void close() {
    isClosed = true;
    operations.forEach(operation -> operation.cancel("the client was closed"));
    others.forEach(ManagedChannel::shutdownNow);
    main.shutdownNow();
  }

  Gateways gateways() {
    return gateways;
  }

  ManagedChannel main() {
    return main;
  }

  /** A connection of its own, to whichever process a balancer picks. */
  ManagedChannel another() {
    ManagedChannel connection = connect();
    others.add(connection);
    if (isClosed) {
      close(connection);
    }
    return connection;
  }

  void close(ManagedChannel connection) {
    connection.shutdownNow();
    others.remove(connection);
  }

  Channel channel(ManagedChannel connection) {
    return ClientInterceptors.intercept(connection, interceptors);
  }

  void add(Operation operation) {
    operations.add(operation);
    if (isClosed) {
      operations.remove(operation);
      throw new IllegalStateException("the client is closed");
    }
  }

  void remove(Operation operation) {
    operations.remove(operation);
  }

  private ManagedChannel connect() {
    return Grpc.newChannelBuilder(target, credentials)
        .userAgent("deltawire-java")
        .maxInboundMessageSize(MAX_MESSAGE_BYTES)
        // A stream may be silent for minutes while a long prompt is read: pings detect a lost connection.
        .keepAliveTime(30, TimeUnit.SECONDS)
        .keepAliveTimeout(10, TimeUnit.SECONDS)
        // The client retries by itself, because gRPC does not know RetryInfo.
        .disableRetry()
        .build();
  }
}
