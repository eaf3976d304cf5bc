# frozen_string_literal: true

require 'deltawire/v1/message_pb'
require 'deltawire/v1/tool_pb'
require 'json'

module Deltawire
  # A message from the user.
  def self.user(text) = V1::ChatMessage.new(user: V1::UserMessage.new(text: text))

  # A message with instructions for the model.
  def self.system(text) = V1::ChatMessage.new(system: V1::SystemMessage.new(text: text))

  # An earlier turn of the model, such as `answer.choice.message`.
  def self.assistant(message) = V1::ChatMessage.new(assistant: message)

  # The result of one of the model's tool calls.
  def self.tool_result(call, text) = V1::ChatMessage.new(tool: V1::ToolMessage.new(call_id: call.call_id, text: text))

  # Reads tools from JSON: one, or a list. Each is a V1::Tool as protobuf writes it, whose schema may be an object too, or
  # OpenAI's object. The keys of a schema keep their order; its numbers are written anew.
  #
  # @raise [ArgumentError] it is something else
  def self.parse_tools(json)
    given = JSON.parse(json)
    (given.is_a?(Array) ? given : [given]).map { |each| tool_of(each) }
  rescue JSON::JSONError, Google::Protobuf::ParseError => e
    raise ArgumentError, e.message
  end

  def self.tool_of(given)
    raise ArgumentError, 'a tool is an object' unless given.is_a?(Hash)

    fields = given.transform_keys('inputSchema' => 'input_schema')
    if given['function'].is_a?(Hash)
      fields = given['function'].except('parameters')
      fields['input_schema'] = given['function']['parameters']
    end
    fields['input_schema'] = JSON.generate(fields['input_schema']) if fields['input_schema'].is_a?(Hash)
    tool = V1::Tool.decode_json(JSON.generate(fields.compact))
    raise ArgumentError, 'a tool has a name' if tool.name.empty?

    tool
  end
  private_class_method :tool_of
end
