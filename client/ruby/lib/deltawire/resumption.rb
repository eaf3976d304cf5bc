# frozen_string_literal: true

require 'deltawire/v1/chat_completion_pb'

module Deltawire
  # Decides whether there is another call after one has ended without the stream's last event, and what it asks.
  #
  # A call that starts a completion and has received nothing is repeated for a passing failure, at most MAX_ATTEMPTS times in
  # all. What is asked with retention goes on in other cases too, after a pause, until it has brought nothing new for as long:
  #
  #   how the call ended               after                        next
  #   connection lost, or the gateway  any call                     resume after the last event
  #   cut this call only
  #   refused for now                  a resuming call              resume after the last event
  #   another process has it           a resuming call              resume on a new connection, at most MAX_CONNECTIONS
  #                                                                 times since the last event
  #   no such completion               a resuming call, not begun   start again, at most MAX_ATTEMPTS times in all
  #                                    a resuming call, begun       as if another process has it: an id of a caller does
  #                                                                 not say which process that is
  #   the completion exists already    a starting call, if the id   resume: it is our own, whose beginning was lost
  #                                    is ours
  #   anything else                    any call                     give up: a retry would fail again
  class Resumption
    # For how many seconds a stream that the caller resumes goes on without a new event.
    RESUME_FOR = 60

    # Without a known reason the status is that of a proxy or of the connection. RESOURCE_EXHAUSTED is a message above the
    # size limit, which would be as large again.
    LOST = [
      GRPC::Core::StatusCodes::UNAVAILABLE, GRPC::Core::StatusCodes::INTERNAL, GRPC::Core::StatusCodes::UNKNOWN,
      GRPC::Core::StatusCodes::CANCELLED, GRPC::Core::StatusCodes::DEADLINE_EXCEEDED
    ].freeze
    private_constant :LOST

    # The last event that was read, nil if none was; and how many calls were made.
    attr_reader :last, :calls
    attr_accessor :completion_id

    def initialize(request)
      @request = request
      @starts = @calls = @moved = 0
      @since = Clock.now
      @pauses = Pauses.new(MAX_PAUSE)
      if request.start == :resume
        point = request.resume
        @resuming = true
        @retention = RESUME_FOR
        @completion_id = point.completion_id
        @last = point.last_sequence if point.has_last_sequence?
      else
        @retention = request.options&.retention&.to_f || 0
        choose_id if @retention.positive? && request.chat && request.chat.completion_id.empty?
        @completion_id = @request.chat ? @request.chat.completion_id : ''
      end
    end

    # The next call's request. One that starts the stream anew counts its events from 0 again.
    def begin
      @calls += 1
      if @resuming
        point = V1::ResumePoint.new(completion_id: @completion_id)
        point.last_sequence = @last if @last
        return V1::StreamChatCompletionRequest.new(resume: point)
      end
      @starts += 1
      @last = nil
      @request
    end

    # Takes note of an event that had not come before.
    def received(sequence)
      @last = sequence
      @since = Clock.now
      @moved = 0
      @pauses.reset
    end

    # Decides after the end of a call; no failure is a status of OK.
    #
    # @param untouched whether no call has received anything
    # @return how many seconds to wait before the next call; nil if there is none
    def next(failure, untouched, begun)
      @moves = false
      return @pauses.next(failure) if untouched && !@resuming && @starts < MAX_ATTEMPTS && failure&.passes?
      return if @retention.zero? || !goes_on?(failure, begun)

      pause = @pauses.next(failure)
      pause if Clock.now - @since + pause <= @retention
    end

    # How many new connections were needed since the last event if the next call needs one, otherwise 0.
    def moved = @moves ? @moved : 0

    private

    # So that it can be resumed before its first event.
    def choose_id
      @request = Google::Protobuf.deep_copy(@request)
      @request.chat.completion_id = "own-#{SecureRandom.hex(16)}"
      @made_id = true
    end

    def goes_on?(failure, begun)
      # The end of a call that says nothing is a lost connection.
      reason = failure ? failure.reason : 'DRAINING'
      case reason
      when 'DRAINING', 'SLOW_CALLER' then @resuming = true
      when 'TOO_MANY_STREAMS', 'CALLER_LIMIT_EXCEEDED', 'STORE_UNAVAILABLE' then @resuming
      when 'WRONG_REPLICA' then goes_elsewhere?
      when 'COMPLETION_NOT_FOUND' then begun ? goes_elsewhere? : starts_again?
      when 'COMPLETION_ALREADY_EXISTS' then ours?
      else
        known = V1::ErrorReason.resolve(:"#{REASON_PREFIX}#{reason}")
        @resuming = true if !known && LOST.include?(failure.code)
      end
    end

    def goes_elsewhere?
      @moved += 1
      @moves = @resuming && @moved <= MAX_CONNECTIONS
    end

    def starts_again?
      again = @resuming && @starts.positive? && @starts < MAX_ATTEMPTS
      @resuming = false if again
      again
    end

    def ours?
      ours = !@resuming && (@made_id || @starts > 1)
      @resuming = true if ours
      ours
    end
  end
end
