# frozen_string_literal: true

require 'deltawire/v1/model_registry_services_pb'

module Deltawire
  # A change of a model, or a bookmark.
  #
  # `change` is :CHANGE_ADDED, :CHANGE_MODIFIED or :CHANGE_REMOVED; nil in a bookmark. `model` is the model after the change,
  # or its last version if it was removed. `revision` is from where another watch can continue after this event; empty within
  # a snapshot. The events up to a bookmark add up to the state at its revision; the first one follows the snapshot.
  ModelEvent = Struct.new(:change, :model, :revision, keyword_init: true) do
    def bookmark? = change.nil?
  end

  # All models and then each change once, across lost connections: `each` or `read`. It never ends by itself.
  class Watch
    include Enumerable

    LONGEST_PAUSE = 10
    SURVIVABLE = [
      GRPC::Core::StatusCodes::UNAVAILABLE, GRPC::Core::StatusCodes::ABORTED,
      GRPC::Core::StatusCodes::RESOURCE_EXHAUSTED, GRPC::Core::StatusCodes::DEADLINE_EXCEEDED
    ].freeze
    # The connection was lost, if the gateway gives no reason.
    LOST = [
      GRPC::Core::StatusCodes::INTERNAL, GRPC::Core::StatusCodes::UNKNOWN, GRPC::Core::StatusCodes::CANCELLED
    ].freeze
    private_constant :LONGEST_PAUSE, :SURVIVABLE, :LOST

    def initialize(client, revision, known, timeout, metadata)
      @client = client
      @scope = Scope.new(client, timeout, metadata)
      @revision = revision
      @known = (known || []).to_h { |model| [model.id, model] }
      # Whether known are all models at the revision: if not, removed ones cannot be reported after a new snapshot.
      @knows_all = revision.empty? || !known.nil?
      @events = []
      @pauses = Pauses.new(LONGEST_PAUSE)
      client.add(@scope)
    end

    # Waits for the next ModelEvent.
    #
    # @raise [CallError] a new attempt would fail again
    def read
      intact = false
      advance while @events.empty? && @failure.nil?
      intact = true
      raise CallError.of(@failure) if @events.empty?

      @events.shift
    ensure
      # A read that was broken off leaves the call in an unknown state.
      cancel unless intact
    end

    # Yields each event. Leaving the block does not end the watch.
    def each
      return enum_for(:each) unless block_given?

      loop { yield read }
    end

    # The models as of the last message, by ascending id. After a bookmark they are the state at its revision.
    def models = @known.values.sort_by(&:id)

    # Ends the watch, from any thread.
    def cancel
      @scope.cancel
    end
    alias close cancel

    private

    def advance
      begin_call unless @call
      message = @call.read
      return ended(nil) if message.nil?

      @pauses.reset
      fold(message)
    rescue GRPC::BadStatus => e
      ended(Failure.of(e, @call&.header, @scope.request_id))
    end

    def begin_call
      raise GRPC::Cancelled if @scope.end # The failure is that of the scope.

      # The ids in the snapshot that is being received.
      @listed = @revision.empty? ? {} : nil
      request = V1::WatchModelsRequest.new(revision: @revision, batch_snapshot: @revision.empty?)
      @call = @scope.call(@client.channel, V1::ModelRegistry::Service, :WatchModels, request)
    end

    def fold(message)
      return take_bookmark(message) if message.bookmark

      @revision = message.revision unless @listed
      given = message.models.empty? ? [message.model] : message.models
      given.each { |model| change(message.change, model) }
    end

    def take_bookmark(message)
      if @listed
        models.each do |model|
          next if @listed[model.id]

          @known.delete(model.id)
          add(:CHANGE_REMOVED, model)
        end
      end
      @listed = nil
      @revision = message.revision
      @events << ModelEvent.new(revision: @revision)
    end

    # Takes a change. One of a kind that this version does not know is skipped.
    def change(kind, model)
      known = @known[model.id]
      case kind
      when :CHANGE_REMOVED
        return if known.nil? && @knows_all

        @known.delete(model.id)
      when :CHANGE_ADDED, :CHANGE_MODIFIED
        @listed[model.id] = true if @listed
        @known[model.id] = model
        return if known == model

        kind = :CHANGE_MODIFIED if known
        kind = :CHANGE_ADDED if known.nil? && @knows_all
      else return
      end
      add(kind, model)
    end

    def add(kind, model)
      @events << ModelEvent.new(change: kind, model: model, revision: @listed ? '' : @revision)
    end

    # Takes the end of a call: ends the watch, or waits until it is time for the next call.
    def ended(failure)
      @call = nil
      if (over = @scope.end)
        @failure = over
      elsif failure&.code == GRPC::Core::StatusCodes::OUT_OF_RANGE && @knows_all && !@revision.empty?
        @revision = '' # A new snapshot, of which only the differences are returned.
      elsif failure && !survives?(failure)
        @failure = failure
      elsif !@scope.wait(@pauses.next(failure))
        @failure = @scope.end(failure)
      end
    end

    def survives?(failure)
      SURVIVABLE.include?(failure.code) || (LOST.include?(failure.code) && failure.reason.empty?)
    end
  end
end
