# frozen_string_literal: true

# Streams one answer of a model and prints its text and its tool calls.
#
# The exit status is 0 if the answer is whole, 1 if the call failed, 2 if the command line is wrong, and 130 after Ctrl-C.

require 'deltawire'
require 'optparse'

def chat(target, request)
  Deltawire::Client.open(target, key: ENV['DELTAWIRE_TOKEN']) do |client|
    # An exception such as Interrupt ends the stream, and the engine stops generating.
    client.stream(request) do |stream|
      begun = false
      stream.each_text do |piece|
        begun = true
        print piece
      end
      finish(stream.answer)
    rescue Deltawire::CallError
      puts if begun # Ends the line of the text so far.
      raise
    end
  end
end

def finish(answer)
  choice = answer.choice
  choice.message.tool_calls.each { |call| print "\ntool call: #{call.tool_name}(#{call.arguments})" }
  # Never execute a failed call. What the model wrote is in raw_arguments.
  choice.failed_tool_calls.each { |call| print "\nfailed tool call: #{call.tool_name}: #{call.failure.message}" }
  print "\n[#{choice.stop_reason}, #{answer.usage.completion_tokens} tokens"
  print ', tool calls may be executed' if choice.tool_calls_executable
  puts ']'
end

def abort_with(status, message)
  warn message
  exit status
end

$stdout.sync = true
target = '127.0.0.1:50051'
request = Deltawire::V1::ChatRequest.new
parser = OptionParser.new('usage: chat.rb [--target HOST:PORT] [--model NAME] [--tool FILE] PROMPT') do |options|
  options.on('--target HOST:PORT', 'the gateway') { |given| target = given }
  options.on('--model NAME', 'may be omitted if the gateway has only one') { |given| request.model = given }
  options.on('--tool FILE', "a JSON file with one tool or a list, in deltawire's or OpenAI's form") do |file|
    request.tools += Deltawire.parse_tools(File.read(file, encoding: Encoding::UTF_8))
  rescue SystemCallError, ArgumentError => e
    abort_with(2, "#{file}: #{e.message}")
  end
end

begin
  parser.parse!
rescue OptionParser::ParseError => e
  abort_with(2, "#{e.message}\n#{parser.help}")
end
abort_with(2, parser.help) if ARGV.empty?
# Where the locale is C, Ruby takes arguments as ASCII.
request.messages << Deltawire.user(ARGV.join(' ').force_encoding(Encoding::UTF_8))

begin
  chat(target, request)
rescue Deltawire::CallError => e
  abort_with(1, e.message)
rescue ArgumentError => e
  abort_with(2, e.message)
rescue Interrupt
  abort_with(130, 'canceled')
end
