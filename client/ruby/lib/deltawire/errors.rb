# frozen_string_literal: true

require 'forwardable'
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'google/rpc/status_pb'
require 'grpc'

module Deltawire
  REASON_PREFIX = 'ERROR_REASON_'

  # A field of the request that breaks a rule: its path, such as "chat.messages", and what is wrong with it, for people.
  Violation = Struct.new(:field, :description)

  # What is known of a failed call; see CallError. `pushback` is gRPC's own form of the delay, which proxies keep when they
  # drop the details; a negative one forbids a retry.
  Failure = Struct.new(
    :code, :reason, :message, :metadata, :violations, :retry_delay, :pushback, :request_id, :interrupted, :answer,
    keyword_init: true
  ) do
    def initialize(code:, message:, reason: '', metadata: {}, violations: [], **rest)
      super
    end

    # Everything that a failed call says. The request id is the one that was sent.
    def self.of(status, header, request_id)
      trailer = status.metadata || {}
      pushback = Headers.first(trailer, 'grpc-retry-pushback-ms')
      failure = new(
        code: status.code,
        # gRPC returns bytes.
        message: status.details.to_s.dup.force_encoding(Encoding::UTF_8).scrub,
        reason: Headers.first(trailer, 'deltawire-reason').to_s,
        request_id: Headers.first(header, Headers::REQUEST_ID) || Headers.first(trailer, Headers::REQUEST_ID) || request_id,
        pushback: pushback && Integer(pushback, 10, exception: false)&.fdiv(1000)
      )
      failure.read(Headers.first(trailer, 'grpc-status-details-bin'))
      failure
    end

    # Takes the details of the status, as far as they can be read.
    def read(details)
      Google::Rpc::Status.decode(details.to_s).details.each do |detail|
        case detail.type_name
        when 'google.rpc.ErrorInfo' then read_info(detail.unpack(Google::Rpc::ErrorInfo))
        when 'google.rpc.RetryInfo'
          delay = detail.unpack(Google::Rpc::RetryInfo).retry_delay
          self.retry_delay = delay.to_f if delay
        when 'google.rpc.BadRequest'
          given = detail.unpack(Google::Rpc::BadRequest).field_violations
          self.violations = given.map { |each| Violation.new(each.field, each.description) }
        end
      end
    rescue Google::Protobuf::ParseError
      # They are of something else between here and the gateway.
    end

    # The fault in Completed counts, unless the status has the reason itself. A proxy may have made that OK.
    def with_fault(fault)
      return self unless reason.empty?

      self.code = fault.code
      self.message = fault.message
      # A reason of a later version is a number.
      known = fault.reason.is_a?(Symbol) && fault.reason != :ERROR_REASON_UNSPECIFIED
      self.reason = known ? fault.reason.to_s.delete_prefix(REASON_PREFIX) : ''
      self
    end

    # Whether a call that has received nothing may be made again. Canceled, if not by the caller, is what a call gets that
    # arrives while a gateway closes its connections.
    def passes?
      return false if pushback&.negative?

      [GRPC::Core::StatusCodes::UNAVAILABLE, GRPC::Core::StatusCodes::CANCELLED].include?(code) ||
        (code == GRPC::Core::StatusCodes::RESOURCE_EXHAUSTED && !retry_delay.nil?)
    end

    # How many seconds the gateway asks to wait; 0 if it does not.
    def delay = retry_delay || pushback || 0

    private

    def read_info(info)
      return unless info.domain == 'deltawire.dev'

      self.reason = info.reason
      self.metadata = info.metadata.to_h
      self.request_id = metadata['request_id'] || request_id
    end
  end

  # A call failed. Branch on the class, `code` and `reason`, never on the message.
  class CallError < StandardError
    extend Forwardable

    NAMES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name] }.freeze
    private_constant :NAMES

    # @!attribute [r] code
    #   The gRPC status code, as in GRPC::Core::StatusCodes. If a proxy has replaced the status of a stream, it is that of
    #   Completed.error.
    # @!attribute [r] reason
    #   The gateway's reason, such as "MODEL_NOT_FOUND"; empty if the failure is not the gateway's.
    # @!attribute [r] metadata
    #   The entries of the reason, which error_reason.proto lists.
    # @!attribute [r] violations
    #   The fields that the gateway refused, each a Violation.
    # @!attribute [r] retry_delay
    #   The delay of RetryInfo in seconds; nil without one.
    # @!attribute [r] request_id
    #   The call's id in the gateway's log.
    # @!attribute [r] answer
    #   What a stream had received, an Answer; nil before its beginning.
    def_delegators :@failure, :code, :reason, :metadata, :violations, :retry_delay, :request_id, :answer

    def initialize(failure)
      @failure = failure
      super("#{name}#{" (#{reason})" unless reason.empty?}: #{failure.message}")
    end

    # The name of the code, such as :NOT_FOUND.
    def name = NAMES.fetch(code, code)

    def self.of(failure)
      (failure.interrupted ? StreamInterrupted : CallError).new(failure)
    end
  end

  # A stream ended after its beginning and without its last event, other than by the caller's own cancel or deadline: what
  # else there was is unknown.
  class StreamInterrupted < CallError
  end
end
