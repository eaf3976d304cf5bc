# frozen_string_literal: true

# Streams one answer from the gateway at the given address and prints its text and tool calls.

require 'grpc'
require 'deltawire/v1/chat_completion_services_pb'
require 'deltawire/v1/model_registry_services_pb'

V1 = Deltawire::V1

request = V1::StreamChatCompletionRequest.new(
  chat: V1::ChatRequest.new(
    messages: [V1::ChatMessage.new(user: V1::UserMessage.new(text: 'How warm is it in Oslo?'))],
    tools: [V1::Tool.new(name: 'get_weather',
                         input_schema: '{"type":"object","properties":{"city":{"type":"string"}}}')]
  )
)
stub = V1::ChatCompletion::Stub.new(ARGV.fetch(0), :this_channel_is_insecure, timeout: 60)
completed = nil
stub.stream_chat_completion(request).each do |response|
  case response.event
  when :text_delta
    print response.text_delta.text
  when :tool_call_delta
    call = response.tool_call_delta.tool_call
    print "\ntool call #{call.tool_name}(#{call.arguments})" if call
  when :completed
    completed = response.completed
  end
end
abort 'not the whole answer' if completed.nil? || completed.error
puts "\ncompleted"
