# frozen_string_literal: true

# What the Ruby client does with a real gateway, by the name of the scenario: prints a line for each result.

require 'deltawire'
require 'timeout'

CHAT = Deltawire::V1::ChatRequest.new(messages: [Deltawire.user('hi')])
LIMIT = 50

def begun(stream)
  stream.find { |event| event.event == :text_delta }
  stream
end

def report
  puts yield
rescue Deltawire::CallError => e
  puts "#{e.class} #{e.message}"
rescue ArgumentError, RuntimeError => e
  puts e.message
end

# Every way in which a program ends a call.
def ends(target)
  client = Deltawire::Client.new(target)
  canceled = begun(client.stream(CHAT, timeout: LIMIT))
  trap('USR1') { Thread.new { canceled.cancel } }
  Process.kill('USR1', Process.pid)
  report { canceled.answer }
  client.stream(CHAT, timeout: LIMIT) { |stream| begun(stream) }
  begin
    stream = begun(client.stream(CHAT, timeout: LIMIT))
    Timeout.timeout(0.1) { stream.answer }
  rescue Timeout::Error
    report { stream.answer }
  end
  reading = Queue.new
  reader = Thread.new do
    stream = begun(client.stream(CHAT, timeout: LIMIT))
    reading.push(true)
    stream.answer
  end
  reader.report_on_exception = false
  reading.pop
  reader.raise(IOError, 'not needed any more')
  report { reader.value }
rescue IOError => e
  puts e.message
  left = begun(client.stream(CHAT, timeout: LIMIT))
  client.close
  report { left.answer }
  report { client.stream(CHAT).answer }
end

# Soft cancels reach the gateway that has the stream, whichever that is. A client that knows only the id searches for it.
def softly(target)
  client = Deltawire::Client.new(target)
  other = Deltawire::Client.new(target)
  ends = Array.new(12) do
    client.stream(CHAT, timeout: LIMIT) do |stream|
      begun(stream)
      stream.cancel_softly
      [stream.answer.choice.stop_reason, other.get(stream.completion_id, timeout: LIMIT).state]
    end
  end
  p ends.uniq
end

# By a chosen id, from a client that has never seen the stream.
def another(target)
  options = Deltawire::V1::StreamOptions.new(retention: Google::Protobuf::Duration.new(seconds: 60))
  chat = Deltawire::V1::ChatRequest.new(messages: CHAT.messages.to_a, completion_id: 'mine')
  request = Deltawire::V1::StreamChatCompletionRequest.new(chat: chat, options: options)
  last = Deltawire::Client.open(target) do |client|
    client.stream(request, timeout: LIMIT) { |stream| begun(stream).last_sequence }
  end
  Deltawire::Client.open(target) do |client|
    puts client.get('mine').state
    client.resume('mine', last, timeout: LIMIT) do |stream|
      begun(stream)
      puts client.cancel('mine').state, stream.answer.choice.stop_reason
    end
  end
end

def tls(target, authority, key)
  trusted = GRPC::Core::ChannelCredentials.new(File.read(authority))
  [{ key: key }, { key: key, key_header: 'x-deltawire-key' }, {}].each do |options|
    Deltawire::Client.open(target, tls: trusted, **options) do |client|
      report { client.stream(CHAT, timeout: LIMIT).answer.text }
      puts 'a key is shown' if [client, client.stream(CHAT), client.stub(Deltawire::V1::ChatCompletion)].inspect.include?(key)
      report { client.stub(Deltawire::V1::ModelRegistry).list_models(Deltawire::V1::ListModelsRequest.new).models.size }
    rescue GRPC::Unauthenticated
      puts 'the stub has no key either'
    end
  end
  Deltawire::Client.open(target, tls: true, key: key) do |client|
    client.stream(CHAT, timeout: LIMIT).answer
  rescue Deltawire::CallError => e
    puts e.name
  end
  report { Deltawire::Client.new('127.example:50051', key: key) }
end

# A client from before a fork works in the child if it was not used before. Closing it there closes nothing of the parent.
def fork_and_ask(client)
  Process.wait(fork { report { client.stream(CHAT, timeout: LIMIT).answer.text } })
end

def forks(target)
  client = Deltawire::Client.new(target)
  2.times { fork_and_ask(client) }
  report { client.stream(CHAT, timeout: LIMIT).answer.text }
  fork_and_ask(client)
  client.stream(CHAT, timeout: LIMIT) do |stream|
    begun(stream)
    child = fork do
      stream.close
      client.close
      exit!
    end
    Process.wait(child)
    stream.cancel_softly
    report { stream.answer.choice.stop_reason }
  end
end

$stdout.sync = true
send(*ARGV)
