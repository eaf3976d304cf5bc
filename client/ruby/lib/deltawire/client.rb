# frozen_string_literal: true

require 'deltawire/calls'
require 'deltawire/errors'
require 'ipaddr'

module Deltawire
  # Attempts of a call that has received nothing.
  MAX_ATTEMPTS = 4
  # New connections to find the process that has a completion: behind a balancer each may reach another one.
  MAX_CONNECTIONS = 8
  # The longest pause between two calls in seconds, if the gateway does not ask for a longer one.
  MAX_PAUSE = 2
  # Completions of which a client remembers the gateway: those that a busy program may still look up or end.
  MAX_GATEWAYS = 10_000
  private_constant :MAX_ATTEMPTS, :MAX_CONNECTIONS, :MAX_PAUSE, :MAX_GATEWAYS
end

require 'deltawire/messages'
require 'deltawire/stream'
require 'deltawire/watch'

module Deltawire
  # Makes calls to a gateway. Any number of threads may use it.
  #
  # It connects with its first call: a client that was made before a fork may be used after it, in each process, if gRPC was
  # not used before.
  class Client
    ARGUMENTS = {
      'grpc.primary_user_agent' => "deltawire-ruby grpc-ruby/#{GRPC::VERSION}",
      # An answer with log-probabilities exceeds gRPC's default of 4 MiB.
      'grpc.max_receive_message_length' => 64 << 20,
      # The client retries by itself: only it knows what may be repeated.
      'grpc.enable_retries' => 0,
      # A stream can be silent for minutes while a long prompt is read; pings detect that the peer has disconnected.
      'grpc.keepalive_time_ms' => 30_000,
      'grpc.keepalive_timeout_ms' => 10_000,
      'grpc.http2.max_pings_without_data' => 0,
      # A gateway is found soon after it is back; gRPC would let two minutes pass.
      'grpc.initial_reconnect_backoff_ms' => 100,
      'grpc.max_reconnect_backoff_ms' => 10_000,
      # Otherwise a new channel to the same target has the connection of the old one.
      'grpc.use_local_subchannel_pool' => 1
    }.freeze
    CLOSED = 'the client was closed'
    private_constant :ARGUMENTS, :CLOSED

    # The headers of every call: the caller's key, and those that it was made with.
    attr_reader :metadata

    # @param target where the gateway is, such as "127.0.0.1:50051"
    # @param key the caller's access key; refused over plaintext to other machines
    # @param key_header "x-deltawire-key" if `authorization` is for a proxy, whose value `metadata` then has
    # @param tls true, or GRPC::Core::ChannelCredentials, for example with your own roots
    # @param plaintext_key lets the key be sent over plaintext to other machines, for example to a sidecar
    # @param metadata headers of every call
    # @param arguments gRPC's channel arguments, which override the client's own
    def initialize(target, key: nil, key_header: 'authorization', tls: false, plaintext_key: false, metadata: {}, arguments: {})
      key = nil if key.to_s.empty?
      if key && !tls && !plaintext_key && !local?(target)
        raise ArgumentError, 'the key would go over plaintext to another machine: use tls, or plaintext_key'
      end

      @target = target
      @credentials = tls == true ? GRPC::Core::ChannelCredentials.new : tls || :this_channel_is_insecure
      @arguments = ARGUMENTS.merge(arguments)
      @metadata = metadata.transform_keys(&:to_s)
      @metadata[key_header] = key_header == 'authorization' ? "Bearer #{key}" : key if key
      @mutex = Mutex.new
      @gateways = {}
      @scopes = ObjectSpace::WeakMap.new
    end

    # Yields a client and closes it.
    def self.open(target, **options)
      client = new(target, **options)
      yield client
    ensure
      client&.close
    end

    # Asks for a chat completion, or resumes one. The call is made when the stream is first read.
    #
    # A call that fails as UNAVAILABLE, or as RESOURCE_EXHAUSTED with RetryInfo, before anything was received is repeated, at
    # most four times in all. A stream with retention is resumed after a lost connection: every event is received once.
    #
    # @param request a V1::ChatRequest, a Hash of its fields, or a V1::StreamChatCompletionRequest
    # @param timeout seconds, over all calls
    # @param metadata more headers, such as "x-vllm-api-token"
    # @return the Stream; with a block, which gets it, the block's value, and the stream is closed
    def stream(request, timeout: nil, metadata: {})
      request = V1::StreamChatCompletionRequest.new(chat: request) unless request.is_a?(V1::StreamChatCompletionRequest)
      stream = Stream.new(self, request, timeout, metadata)
      return stream unless block_given?

      begin
        yield stream
      ensure
        stream.close
      end
    end

    # Resumes a stream with retention after an event, or from its beginning. Options are those of `stream`.
    def resume(completion_id, last_sequence = nil, **options, &block)
      point = V1::ResumePoint.new(completion_id: completion_id)
      point.last_sequence = last_sequence if last_sequence
      stream(V1::StreamChatCompletionRequest.new(resume: point), **options, &block)
    end

    # Watches the models. Without a revision it begins with a snapshot of all of them; otherwise it continues from the revision
    # of an earlier one, whose models are known. Without those, a revision that the gateway no longer has fails with
    # REVISION_GONE. A block gets the Watch, as with `stream`.
    def watch_models(revision = '', known: nil, timeout: nil, metadata: {})
      watch = Watch.new(self, revision, known, timeout, metadata)
      return watch unless block_given?

      begin
        yield watch
      ensure
        watch.close
      end
    end

    # Ends a completion softly: its stream ends normally, with the text so far and the usage. The response has the state before
    # the cancel. It tries up to eight new connections to find the gateway process that has the completion.
    def cancel(completion_id, **options)
      find(:CancelChatCompletion, V1::CancelChatCompletionRequest.new(completion_id: completion_id), **options)
    end

    # The state of a completion, its usage, and its result if that is retained. It searches like `cancel`.
    def get(completion_id, **options)
      find(:GetChatCompletion, V1::GetChatCompletionRequest.new(completion_id: completion_id), **options)
    end

    # A generated stub, for example of V1::ModelRegistry, on this client's connection and with its headers. Its calls are not
    # retried.
    def stub(service)
      service::Stub.new(
        @target, :this_channel_is_insecure, channel_override: channel, interceptors: [HeadersInterceptor.new(metadata)]
      )
    end

    # Closes the connection. Calls that are active, and later ones, fail as canceled.
    def close
      @mutex.synchronize do
        @closed = true
        @channel&.close if @pid == Process.pid # Otherwise it is that of the parent.
      end
      @scopes.keys.each { |scope| scope.cancel(CLOSED) }
    end

    # Without the key.
    def inspect = "#<#{self.class} #{@target}>"

    # The connection that all calls share. What follows is for this library's own classes.
    def channel
      @mutex.synchronize do
        raise GRPC::Cancelled, CLOSED if @closed

        @pid ||= Process.pid
        raise 'this client was used before a fork, which gRPC does not support: fork first' if @pid != Process.pid

        @channel ||= dial
      end
    end

    # A connection for one caller, which closes it.
    def dial = GRPC::Core::Channel.new(@target, @arguments.dup, @credentials)

    # Ends calls with the client, unless nothing else refers to them.
    def add(scope)
      @scopes[scope] = true
      scope.cancel(CLOSED) if @closed
    end

    # Remembers the gateway of a completion, as far as a proxy has named it; it does so only in calls that have not.
    def found(completion_id, gateway)
      @mutex.synchronize do
        @gateways[completion_id] = gateway
        @gateways.shift if @gateways.size > MAX_GATEWAYS
      end
    end

    def gateway_of(completion_id)
      @mutex.synchronize { @gateways[completion_id] }
    end

    private

    # Adds headers to the calls of generated stubs.
    class HeadersInterceptor < GRPC::ClientInterceptor
      def initialize(headers)
        super()
        @headers = headers
      end

      def inspect = "#<#{self.class}>" # Without the key.

      %i[request_response client_streamer server_streamer bidi_streamer].each do |kind|
        define_method(kind) do |metadata:, **_, &call|
          metadata.replace(@headers.merge(metadata))
          call.call
        end
      end
    end
    private_constant :HeadersInterceptor

    # Makes a call about a completion, with retries, and on new connections until one reaches the process that has it.
    def find(method, request, timeout: nil, metadata: {}, channel: nil)
      scope = Scope.new(self, timeout, metadata)
      add(scope)
      pauses = Pauses.new(MAX_PAUSE)
      attempt = 1
      moved = 0
      own = nil
      loop do
        about = Headers.about(request.completion_id, gateway_of(request.completion_id), moved)
        begin
          call = scope.call(own || channel || self.channel, V1::ChatCompletion::Service, method, request, about)
          response = call.response
          gateway = Headers.first(call.header, Headers::GATEWAY)
          found(request.completion_id, gateway) if gateway
          return response
        rescue GRPC::BadStatus => e
          failure = scope.end || Failure.of(e, call&.header, scope.request_id)
        end
        if failure.reason == 'WRONG_REPLICA' && moved < MAX_CONNECTIONS
          moved += 1
        elsif failure.passes? && attempt < MAX_ATTEMPTS && !scope.end
          attempt += 1
        else
          raise CallError.of(failure)
        end
        raise CallError.of(scope.end(failure)) unless scope.wait(pauses.next(failure))

        own&.close
        own = moved.positive? ? dial : nil
        channel = nil # That of a stream may have been closed with it.
      end
    ensure
      scope&.cancel # An exception of another kind ends the call on both sides.
      own&.close
    end

    def local?(target)
      return true if target.start_with?('unix:')

      host = target.sub(/:\d*\z/, '').delete_prefix('[').delete_suffix(']')
      host == 'localhost' || IPAddr.new(host).loopback?
    rescue IPAddr::Error
      false
    end
  end

  private_constant :Accumulator, :Call, :Clock, :Failure, :Headers, :Pauses, :REASON_PREFIX, :Resumption, :Scope
end
