# frozen_string_literal: true

require 'deltawire/answer'
require 'deltawire/resumption'
require 'deltawire/v1/chat_completion_services_pb'

module Deltawire
  # An answer that is being generated: `each`, `each_text`, `read` and `answer` all read the same stream.
  #
  # One thread at a time reads; `cancel` and `cancel_softly` may be called from any. An exception that ends reading, such as
  # Interrupt or Timeout::Error, ends the call on both sides.
  class Stream
    include Enumerable

    def initialize(client, request, timeout, metadata)
      @client = client
      @scope = Scope.new(client, timeout, metadata)
      @options = { metadata: metadata }
      @resumption = Resumption.new(request)
      @folded = Accumulator.new(@resumption.last)
      @mutex = Mutex.new
      client.add(@scope)
    end

    # Waits for the next event, a V1::StreamChatCompletionResponse; skip one whose `event` is nil, which is of a later version.
    #
    # @return the event; nil at the end of a whole answer
    # @raise [CallError] the call failed; after a fault, only after the event `completed`, which has the same error
    # @raise [StreamInterrupted] the stream ended without its last event
    def read
      intact = false
      event = advance
      intact = true
      raise CallError.of(@failure) if @failure

      event
    ensure
      # A read that was broken off leaves the call in an unknown state.
      cancel unless intact
    end

    # Yields each event. Leaving the block early does not end the call.
    def each
      return enum_for(:each) unless block_given?

      while (event = read)
        yield event
      end
      self
    end

    # Yields the text of the first choice, piece by piece.
    def each_text
      return enum_for(:each_text) unless block_given?

      each { |event| yield event.text_delta.text if event.event == :text_delta && event.choice_index.zero? }
    end

    # Reads to the end, and returns the whole Answer; again if it is called again.
    def answer
      each {}
      @folded.result
    end

    # Ends the call on both sides. With `retention` the gateway continues to generate; `cancel_softly` ends that.
    def cancel
      @scope.cancel
    end

    # Ends the call, if it has not ended.
    def close
      cancel
      leave(nil)
    end

    # Ends generation. Reading then returns the normal end: the text so far, STOP_REASON_CANCELLED and the usage.
    #
    # @return the V1::CancelChatCompletionResponse, which has the state before the cancel
    # @raise [ArgumentError] the completion's id is not known before `started`, unless the request has one
    def cancel_softly(timeout: nil)
      id, channel = @mutex.synchronize { [completion_id, @channel] }
      raise ArgumentError, 'the id is not known before started: send a completion_id' if id.empty?

      @client.cancel(id, timeout: timeout, channel: channel, **@options)
    end

    # The completion's id; empty before `started`, unless the request has one or is retained.
    def completion_id = @resumption.completion_id

    # The sequence of the last event that was read, to resume after it; nil if there was none.
    def last_sequence = @resumption.last

    # How often the stream was resumed or requested again.
    def resumed = [@resumption.calls - 1, 0].max

    # The call's id in the gateway's log.
    def request_id = @scope.request_id

    private

    # The next event; nil if the stream is whole or has failed.
    def advance
      until @whole || @failure
        begin
          event = receive
        rescue GRPC::BadStatus => e
          ended(Failure.of(e, @call&.header, request_id))
          next
        end
        if event.nil?
          ended(nil)
        elsif @resumption.calls == 1 || event.sequence >= @folded.next_sequence # Others were replayed.
          take(event)
          return event unless @failure
        end
      end
    end

    # The next event of the call, which begins if there is none; nil at its end if its status is OK.
    def receive
      begin_call unless @call
      event = @call.read
      if event && !@received
        @received = @ever_received = true
        @gateway = Headers.first(@call.header, Headers::GATEWAY)
        @scope.request_id = Headers.first(@call.header, Headers::REQUEST_ID) || request_id
      end
      event
    end

    def begin_call
      over = @scope.end
      raise GRPC::Cancelled if over # The failure is that of the scope.

      request = @resumption.begin
      gateway = @client.gateway_of(completion_id)
      if request.chat
        @folded = Accumulator.new # Only heartbeats can have come before.
        gateway = nil # That of an earlier completion with this id may be about to shut down.
      end
      about = Headers.about(completion_id, gateway, @resumption.moved)
      @received = false
      channel = @channel || @client.channel
      @call = @scope.call(channel, V1::ChatCompletion::Service, :StreamChatCompletion, request, about)
    end

    def take(event)
      broken = @folded.receive(event)
      return fail_as(broken_rule(broken)) if broken

      @resumption.received(event.sequence)
      @mutex.synchronize { @resumption.completion_id = event.started.completion_id } if event.event == :started
      return if completion_id.empty? || @gateway.nil?

      @client.found(completion_id, @gateway)
      @gateway = nil
    end

    def broken_rule(rule)
      message = "the gateway broke the rules of its stream: #{rule}"
      Failure.new(code: GRPC::Core::StatusCodes::INTERNAL, message: message, interrupted: true)
    end

    # Takes the end of a call: decides the outcome of the stream, or waits until it is time for the next call. No failure is
    # a status of OK.
    def ended(failure)
      @call = nil
      completed = @folded.completed
      if completed&.error
        fail_as((failure || Failure.new(code: 0, message: '')).with_fault(completed.error))
      elsif completed || (failure.nil? && @folded.only_the_end?)
        # It is whole, whatever happened to the status.
        @whole = true
        leave(nil)
      elsif (over = @scope.end)
        fail_as(over)
      else
        go_on(failure)
      end
    end

    def go_on(failure)
      begun = @folded.begun?
      pause = @resumption.next(failure, !@ever_received, begun)
      if pause.nil?
        interrupted = failure.nil? || (begun && failure.code != GRPC::Core::StatusCodes::DEADLINE_EXCEEDED)
        # A status of OK without an answer is a failure.
        failure ||= Failure.new(
          code: GRPC::Core::StatusCodes::UNKNOWN, message: 'the stream ended without its last event'
        )
        failure.interrupted = interrupted
        fail_as(failure)
      elsif !@scope.wait(pause)
        fail_as(@scope.end(failure))
      elsif @resumption.moved.positive?
        leave(@client.dial)
      end
    end

    def fail_as(failure)
      failure.request_id ||= request_id
      failure.answer = @folded.result if @folded.begun?
      @failure = failure
      close
    end

    # Closes the own connection of this stream, if it has one, and continues on another one.
    def leave(channel)
      old = @mutex.synchronize do
        before = @channel
        @channel = channel
        before
      end
      old&.close
    end
  end
end
