# frozen_string_literal: true

require 'grpc'
require 'securerandom'

module Deltawire
  # Seconds that no change of the system's time moves.
  module Clock
    def self.now = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  end

  # The names of headers, and what is sent in them.
  module Headers
    REQUEST_ID = 'x-request-id'
    # By these a proxy finds the gateway that has a completion, as the shipped Envoy does. Calls with the same route go to
    # the same gateway; the other one comes from the proxy, names the gateway, and is sent back.
    ROUTE = 'x-deltawire-route'
    GATEWAY = 'x-deltawire-gateway'

    # The first value that a header has; nil without one. gRPC gives an array if there are several.
    def self.first(metadata, name)
      value = Array(metadata && metadata[name]).first
      value unless value.nil? || value.empty?
    end

    # The headers by which a proxy sends a call to the gateway that has the completion; after some that did not have it, to
    # another one. An id that does not fit into a header is refused by the gateway.
    def self.about(completion_id, gateway, moved)
      route = moved.zero? ? completion_id : "#{completion_id}##{moved}"
      { ROUTE => (route if route.match?(/\A[!-~]+\z/)), GATEWAY => (gateway if moved.zero?) }.compact
    end
  end

  # The pauses between the calls of one completion or watch: each longer than the one before it, and random, so that clients
  # that were disconnected together do not come back together.
  class Pauses
    FIRST = 0.2

    def initialize(longest)
      @longest = longest
      reset
    end

    # The next pause in seconds; longer if the gateway asks for it.
    def next(failure)
      longest = [@longest, FIRST * (2**@count)].min
      @count += 1
      [longest * rand(0.5..1.0), failure ? failure.delay : 0].max
    end

    def reset
      @count = 0
    end
  end

  # A call whose responses are read one by one.
  #
  # It is made without gRPC's stubs: they read a stream within one block, or in a Fiber, which belongs to one thread. In
  # gRPC 1.51 they also lose the status of a call that fails before its headers.
  class Call
    include GRPC::Core::CallOps

    # The headers of the response; nil before they were received.
    attr_reader :header

    def initialize(core, description, request, metadata)
      @core = core
      @decode = description.unmarshal_proc(:output)
      batch(
        SEND_INITIAL_METADATA => metadata, SEND_MESSAGE => description.marshal_proc.call(request),
        SEND_CLOSE_FROM_CLIENT => nil
      )
    end

    # The next response; nil at the end of the call if its status is OK.
    #
    # @raise [GRPC::BadStatus] the call failed
    def read
      @header ||= batch(RECV_INITIAL_METADATA => nil)&.metadata || {}
      message = batch(RECV_MESSAGE => nil)&.message
      message.nil? ? finish : @decode.call(message)
    rescue Google::Protobuf::ParseError => e
      @core.cancel
      raise GRPC::Internal, "a message cannot be read: #{e.message}"
    end

    # The one response of a call that has no stream.
    def response
      message = read
      raise GRPC::Internal, 'the call has no response' if message.nil?

      read # Its status.
      message
    end

    private

    # The result of operations; nil if they failed: the status says why.
    def batch(operations)
      @core.run_batch(operations)
    rescue GRPC::Core::CallError
      nil
    end

    def finish
      @core.run_batch(RECV_STATUS_ON_CLIENT => nil).check_status
      nil
    ensure
      @core.close
    end
  end

  # Calls one after another that end together: by the caller's cancel, by the end of the client, or by their deadline.
  #
  # One thread makes the calls; any may cancel them.
  class Scope
    # The id by which a call without a response is found in the gateway's log.
    attr_accessor :request_id

    def initialize(client, timeout, metadata)
      @client = client
      @deadline = Clock.now + timeout if timeout
      @metadata = client.metadata.merge(metadata.transform_keys(&:to_s))
      @request_id = @metadata[Headers::REQUEST_ID] ||= SecureRandom.hex(16)
      @pid = Process.pid
      @mutex = Mutex.new
      @changed = ConditionVariable.new
    end

    # Makes a call on a channel and sends its request.
    def call(channel, service, method, request, about = {})
      deadline = @deadline ? Time.now + @deadline - Clock.now : GRPC::Core::TimeConsts::INFINITE_FUTURE
      description = service.rpc_descs.fetch(method)
      core = create_call(channel, "/#{service.service_name}/#{method}", deadline)
      @mutex.synchronize do
        @core = core
        core.cancel if @canceled
      end
      # The caller's own headers have precedence.
      Call.new(core, description, request, about.merge(@metadata))
    end

    def cancel(why = 'canceled by the caller')
      @mutex.synchronize do
        @canceled ||= why
        # In a child of the process, the connection is still that of the parent.
        @core&.cancel if @pid == Process.pid
        @changed.broadcast
      end
    end

    # Waits for the pause; false if the calls ended meanwhile.
    def wait(pause)
      till = [Clock.now + pause, @deadline].compact.min
      @mutex.synchronize do
        until @canceled || (left = till - Clock.now) <= 0
          @changed.wait(@mutex, left)
        end
      end
      !over?
    end

    # The failure of calls that have ended; nil if they have not. `last` is how the last attempt failed.
    def end(last = nil)
      return unless over?

      codes = GRPC::Core::StatusCodes
      code = @canceled ? codes::CANCELLED : codes::DEADLINE_EXCEEDED
      message = @canceled || 'the deadline passed'
      message += "; the last attempt failed with: #{last.message}" if last && last.code != code
      Failure.new(code: code, message: message, request_id: @request_id)
    end

    # Without the key.
    def inspect = "#<#{self.class} #{@request_id}>"

    private

    def create_call(channel, path, deadline)
      channel.create_call(nil, nil, path, nil, deadline)
    rescue RuntimeError => e
      raise unless e.message.include?('closed')

      raise GRPC::Unavailable, 'the connection was closed' # By another thread.
    end

    def over?
      @canceled || (@deadline && Clock.now >= @deadline)
    end
  end
end
