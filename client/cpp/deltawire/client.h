// A client of the deltawire gateway: chat completions as streams of typed events, which are retried and resumed after lost
// connections, and watches of models. README.md shows its use.

#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "deltawire/v1/chat_completion.pb.h"
#include "deltawire/v1/model_registry.pb.h"

namespace deltawire {

using Event = v1::StreamChatCompletionResponse;

// What the events of a stream add up to.
struct Answer {
  // Which model and provider answer; absent if it was not received.
  std::optional<v1::Started> started;
  // By ascending index, each with its whole text and reasoning, its tool calls, those that failed, and the
  // log-probabilities of the text. Run the calls only if tool_calls_executable is true.
  std::vector<v1::Completed::Choice> choices;
  // The latest usage.
  v1::Usage usage;
  // The gateway's notices, in order.
  std::vector<v1::Notice> notices;
  // The last event; absent if it was not received.
  std::optional<v1::Completed> completed;

  // The first choice; an empty one if there is none.
  const v1::Completed::Choice& choice() const;
  // The text of the first choice.
  const std::string& text() const { return choice().message().text(); }
};

// A failed call. Branch on code, reason and interrupted, never on message.
class Error : public std::exception {
 public:
  struct Violation {
    // The path of the field, such as "chat.messages".
    std::string field;
    // What is wrong with it, for people.
    std::string description;
  };

  // If a proxy has replaced the status of a stream, the code is that of Completed.error.
  grpc::StatusCode code = grpc::StatusCode::OK;
  // The gateway's reason, such as "MODEL_NOT_FOUND"; empty if the failure is not the gateway's.
  std::string reason;
  // Describes the failure, for people.
  std::string message;
  // The entries of ErrorInfo, which error_reason.proto lists.
  std::map<std::string, std::string> metadata;
  // The fields that the gateway refused.
  std::vector<Violation> violations;
  // The delay of RetryInfo.
  std::optional<std::chrono::nanoseconds> retry_delay;
  // gRPC's own form of the delay, which proxies keep when they drop the details. A negative one forbids a retry.
  std::optional<std::chrono::milliseconds> pushback;
  // The call's id in the gateway's log.
  std::string request_id;
  // Whether a stream ended after its beginning and without its last event, other than by the caller's own cancel or
  // deadline: what else there was is unknown.
  bool interrupted = false;
  // What a stream had received; absent before its beginning.
  std::optional<Answer> answer;

  // All of it in one line, for people.
  const char* what() const noexcept override { return description_.c_str(); }

 private:
  [[noreturn]] void raise();
  std::string description_;
  friend class Client;
  friend class Stream;
  friend class Watch;
};

// How a client connects.
struct ClientOptions {
  // The caller's access key. Over plaintext to other machines it is refused.
  std::string key;
  // Allows the key over plaintext to other machines, for example to a sidecar.
  bool plaintext_key = false;
  // For example grpc::SslCredentials({}), which trusts the default root certificates. Without them the client uses
  // plaintext.
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  // gRPC's own options, which override the client's.
  grpc::ChannelArguments arguments;
};

// How a call is made.
struct CallOptions {
  // For all attempts together; absent for no deadline.
  std::optional<std::chrono::nanoseconds> timeout;
  // Headers, such as x-vllm-api-token and x-request-id.
  std::multimap<std::string, std::string> metadata;
};

// An answer that is being generated. One thread may read it; cancel() and cancel_softly() may be called by any. The
// destructor ends the call, on both sides. With retention the gateway then continues to generate until the stream is
// resumed or its retention has passed; cancel_softly() ends that.
class Stream {
 public:
  Stream(Stream&&) noexcept;
  ~Stream();

  // The next event, which is valid until the next call; null after the last one. Skip events whose event_case() is
  // EVENT_NOT_SET, which are of later versions.
  //
  // Throws Error if the answer is not whole.
  const Event* next();

  // Reads to the end and returns the whole answer. Throws as next().
  Answer final();

  // Ends the call: reading it then throws an Error with CANCELLED.
  void cancel();

  // Ends generation. Reading then goes on to the normal end: the text so far, STOP_REASON_CANCELLED and the usage. It needs
  // the completion's id: one of the caller's, or that of started; without it, it throws std::logic_error.
  v1::CancelChatCompletionResponse cancel_softly(const CallOptions& options = {});

  // The completion's id; empty before started, unless the request has one.
  std::string completion_id() const;

  // The sequence of the last event that was received, to resume after it.
  std::optional<std::int64_t> last_sequence() const;

  // An iterator over what next() returns: `for (const Event& event : stream)`.
  class iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Event;
    using difference_type = std::ptrdiff_t;
    using pointer = const Event*;
    using reference = const Event&;

    explicit iterator(Stream* stream) : stream_(stream) { ++*this; }
    iterator() = default;
    reference operator*() const { return *event_; }
    pointer operator->() const { return event_; }
    iterator& operator++() {
      event_ = stream_->next();
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(const iterator& other) const { return event_ == other.event_; }
    bool operator!=(const iterator& other) const { return event_ != other.event_; }

   private:
    Stream* stream_ = nullptr;
    const Event* event_ = nullptr;
  };
  iterator begin() { return iterator(this); }
  iterator end() { return iterator(); }

 private:
  struct State;
  explicit Stream(std::unique_ptr<State> state);
  void ended();
  [[noreturn]] void fail(Error failure);
  std::unique_ptr<State> state_;
  friend class Client;
};

// A change of a model, or a bookmark.
struct ModelEvent {
  // The kind of change; unspecified in a bookmark.
  v1::WatchModelsResponse::Change change = v1::WatchModelsResponse::CHANGE_UNSPECIFIED;
  // The model after the change, or its last version if it was removed.
  v1::Model model;
  // From where another watch can continue after this event; empty within a snapshot.
  std::string revision;
  // The events up to here add up to the state at the revision. The first bookmark follows the snapshot.
  bool bookmark = false;
};

// All models and then each change once, across lost connections. It never ends by itself. The destructor ends the call.
class Watch {
 public:
  Watch(Watch&&) noexcept;
  ~Watch();

  // The next event. Throws an Error that a new attempt would meet again.
  ModelEvent next();

  // The models as of the last message, by id. After a bookmark they are the state at its revision.
  const std::map<std::string, v1::Model>& models() const;

  // Ends the watch; may be called by any thread.
  void cancel();

 private:
  struct State;
  explicit Watch(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
  friend class Client;
};

// Makes calls to a gateway. It may be used by any number of threads. Streams and watches may outlive it.
class Client {
 public:
  // The target is as "127.0.0.1:50051". Does not wait for the connection.
  explicit Client(const std::string& target, const ClientOptions& options = {});

  // Asks for a chat completion, or resumes one. The call is made when it is first read.
  //
  // A call that fails as UNAVAILABLE, or as RESOURCE_EXHAUSTED with RetryInfo, before anything was received is repeated, at
  // most four times in all. A stream with retention is resumed after a lost connection: every event is received once.
  Stream stream(const v1::StreamChatCompletionRequest& request, const CallOptions& options = {});

  // Ends a completion softly: its stream ends normally, with the text so far and the usage. The response has the state
  // before the cancel. It tries up to eight new connections to find the gateway process that has the completion.
  v1::CancelChatCompletionResponse cancel(const std::string& completion_id, const CallOptions& options = {});

  // The state of a completion, its usage, and its result if that is retained. It searches like cancel().
  v1::GetChatCompletionResponse get(const std::string& completion_id, const CallOptions& options = {});

  // Watches the models. An empty revision begins with a snapshot of all of them; otherwise the watch continues from a
  // revision of an earlier one, whose models are known. Without those, a revision that the gateway no longer has fails with
  // REVISION_GONE.
  Watch watch_models(const std::string& revision = "",
                     const std::optional<std::map<std::string, v1::Model>>& known = std::nullopt,
                     const CallOptions& options = {});

  // For calls with the generated stubs. Those are not retried, and do not send the key.
  std::shared_ptr<grpc::Channel> channel() const;

  struct Connection;

 private:
  std::shared_ptr<Connection> connection_;
  friend class Stream;
};

// A message from the user.
v1::ChatMessage user(const std::string& text);
// A message with instructions for the model.
v1::ChatMessage system(const std::string& text);
// An earlier turn of the model, such as answer.choice().message().
v1::ChatMessage assistant(const v1::AssistantMessage& message);
// The result of one of the model's tool calls.
v1::ChatMessage tool_result(const v1::ToolCall& call, const std::string& text);
// A request for one streamed completion.
v1::StreamChatCompletionRequest chat(const v1::ChatRequest& request);
// A request for the rest of a stream with retention, after an event; or for all of it.
v1::StreamChatCompletionRequest resume(const std::string& completion_id,
                                       std::optional<std::int64_t> last_sequence = std::nullopt);
// Reads tools as JSON: one, or a list. Each is a Tool of the API as protobuf writes it, or OpenAI's object. The keys of a
// schema keep their order. Throws std::invalid_argument.
std::vector<v1::Tool> parse_tools(const std::string& json);

}  // namespace deltawire
