# frozen_string_literal: true

# The Ruby client of the conformance tests: makes the calls that it reads from its standard input and writes what the client
# reports of them to its standard output; see ../../conformance.proto.

require 'conformance_pb'
require 'deltawire'

Protocol = Deltawire::Conformance::V1

def answer(given)
  return if given.nil?

  Protocol::Answer.new(
    completion_id: given.started&.completion_id.to_s, model: given.started&.model.to_s, choices: given.choices,
    usage: given.usage, notices: given.notices
  )
end

def failure(error)
  delay = error.retry_delay
  Protocol::Failure.new(
    code: error.code, reason: error.reason, interrupted: error.is_a?(Deltawire::StreamInterrupted),
    retry_delay: delay && Google::Protobuf::Duration.new(seconds: delay.floor, nanos: ((delay % 1) * 1_000_000_000).round),
    fields: error.violations.map(&:field), partial: answer(error.answer)
  )
end

def stream(client, given, timeout)
  client.stream(given.request, timeout: timeout) do |stream|
    stream.each.with_index(1) do |_, events|
      stream.cancel if given.has_cancel_after_events? && events == given.cancel_after_events
    end
    { answer: answer(stream.answer) }
  end
end

def watch(client, given, timeout)
  client.watch_models(given.request&.revision.to_s, timeout: timeout) do |watch|
    watch.lazy.select(&:bookmark?).first(given.bookmarks)
    { models: watch.models }
  end
end

def run(given)
  Deltawire::Client.open(given.target, key: given.access_key) do |client|
    timeout = given.timeout&.to_f
    given.watch ? watch(client, given.watch, timeout) : stream(client, given.stream, timeout)
  end
rescue Deltawire::CallError => e
  { failure: failure(e) }
end

$stdin.binmode
$stdout.binmode
while (size = $stdin.read(4))
  given = Protocol::ClientCase.decode($stdin.read(size.unpack1('N')))
  result = Protocol::ClientResult.encode(Protocol::ClientResult.new(name: given.name, **run(given)))
  $stdout.write([result.bytesize].pack('N'), result)
  $stdout.flush
end
