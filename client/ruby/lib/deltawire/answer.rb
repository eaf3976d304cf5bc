# frozen_string_literal: true

require 'deltawire/v1/chat_completion_pb'

module Deltawire
  # The answer that the events of a stream contain.
  #
  # `started` says which model and provider answer; nil if it was not received. `choices` are by ascending index, each a
  # V1::Completed::Choice with its whole text and reasoning, its tool calls, those that failed, and the log-probabilities.
  # Execute the calls only if `tool_calls_executable` is true. `usage` is the latest usage, `notices` those of the gateway in
  # order, and `completed` the last event; nil if it was not received.
  Answer = Struct.new(:started, :choices, :usage, :notices, :completed, keyword_init: true) do
    # The first choice; an empty one if there is none.
    def choice = choices.first || V1::Completed::Choice.new(message: V1::AssistantMessage.new)

    # The text of the first choice.
    def text = choice.message.text
  end

  # Folds events into an answer and checks them against the rules of the stream.
  class Accumulator
    Parts = Struct.new(:text, :reasoning, :logprobs, :tool_calls, :failed_tool_calls, :finished)
    private_constant :Parts

    # The sequence of the next event.
    attr_reader :next_sequence

    # @param last the sequence after which the stream is read; nil if it is read from its first event
    def initialize(last = nil)
      @from_middle = !last.nil?
      @first = @next_sequence = last ? last + 1 : 0
      @parts = {}
      @notices = []
    end

    attr_reader :completed

    # Whether any part of the answer was received. A heartbeat is none.
    def begun? = !@started.nil? || (@from_middle && @next_sequence > @first)

    # Whether a stream that is read from the middle had no event: then all of it was read before.
    def only_the_end? = @from_middle && @next_sequence == @first

    # Takes the next event. One of an unknown kind is counted and otherwise skipped.
    #
    # @return the rule that it breaks, or nil
    def receive(event)
      return "event #{@next_sequence} was expected and #{event.sequence} came" if event.sequence != @next_sequence
      return 'an event came after the last one' if @completed

      @next_sequence += 1
      kind = event.event
      if kind && kind != :heartbeat && !@from_middle && (kind == :started) == !@started.nil?
        return 'started must come first, and once'
      end

      fold(kind, event)
      nil
    end

    # The answer as far as it was received.
    def result
      # Only Completed has what was not read here.
      from_completed = @from_middle && @completed && !@completed.messages_omitted
      choices = from_completed ? @completed.choices.to_a : @parts.sort.map { |index, parts| choice(index, parts) }
      Answer.new(started: @started, choices: choices, usage: @usage, notices: @notices.dup, completed: @completed)
    end

    private

    def fold(kind, event)
      case kind
      when :started then @started = event.started
      when :text_delta
        parts = parts_of(event)
        parts.text << event.text_delta.text
        parts.logprobs.concat(event.text_delta.logprobs.to_a)
      when :reasoning_delta then parts_of(event).reasoning << event.reasoning_delta.text
      when :tool_call_delta then fold_tool_call(event)
      when :choice_finished then parts_of(event).finished = event.choice_finished
      when :usage_update then @usage = event.usage_update.usage
      when :notice then @notices << event.notice
      when :completed
        @completed = event.completed
        @usage = @completed.usage
      end
    end

    # A verdict has all that the fragments before it had.
    def fold_tool_call(event)
      call = event.tool_call_delta
      parts = parts_of(event)
      case call.outcome
      when :tool_call then parts.tool_calls << call.tool_call
      when :failure then parts.failed_tool_calls << call
      end
    end

    def parts_of(event)
      @parts[event.choice_index] ||= Parts.new(+'', +'', [], [], [], V1::ChoiceFinished.new)
    end

    def choice(index, parts)
      finished = parts.finished
      message = V1::AssistantMessage.new(reasoning: parts.reasoning, tool_calls: parts.tool_calls)
      message.text = parts.text unless parts.text.empty?
      choice = V1::Completed::Choice.new(
        index: index, message: message, failed_tool_calls: parts.failed_tool_calls, logprobs: parts.logprobs,
        stop_reason: finished.stop_reason, engine_finish_reason: finished.engine_finish_reason,
        # Calls may be executed only if the whole answer ended well.
        tool_calls_executable: finished.tool_calls_executable && !@completed.nil? && @completed.error.nil?
      )
      choice[finished.matched.to_s] = finished[finished.matched.to_s] if finished.matched
      choice
    end
  end
end
