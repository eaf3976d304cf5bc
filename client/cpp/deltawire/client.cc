#include "deltawire/client.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <google/protobuf/util/message_differencer.h>
#include <google/protobuf/util/time_util.h>

#include "deltawire/v1/chat_completion.grpc.pb.h"
#include "deltawire/v1/error_reason.pb.h"
#include "deltawire/v1/model_registry.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace deltawire {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::steady_clock;
using std::chrono::system_clock;
using google::protobuf::util::TimeUtil;
using grpc::StatusCode;

constexpr char kRequestId[] = "x-request-id";
// By these a proxy finds the gateway that has a completion, as the shipped Envoy does. Calls with the same route go to the
// same gateway; the other one comes from the proxy, names the gateway, and is sent back.
constexpr char kRoute[] = "x-deltawire-route";
constexpr char kGateway[] = "x-deltawire-gateway";
constexpr char kReasonPrefix[] = "ERROR_REASON_";

// Attempts of a call that has received nothing.
constexpr int kMaxAttempts = 4;
// New connections to find the process that has a completion: behind a balancer each may reach another one.
constexpr int kMaxConnections = 8;
// Completions of which a client remembers the gateway: those that a busy program may still look up or end.
constexpr std::size_t kMaxGateways = 10000;
// The first pause between two calls, and the longest, if the gateway does not ask for a longer one.
constexpr milliseconds kMinPause{200}, kMaxPause{2000}, kMaxWatchPause{10000};
// An answer with log-probabilities exceeds gRPC's default of 4 MiB.
constexpr int kMaxReceiveBytes = 64 << 20;
// For how long a stream that the caller resumes goes on without a new event.
constexpr std::chrono::seconds kResumeFor{60};

std::string random_id() {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::random_device source;  // Not to be guessed: the operating system's.
  std::string id;
  while (id.size() < 32) id += kDigits[source() & 15];
  return id;
}

bool is_local(const std::string& target) {
  if (target.rfind("unix:", 0) == 0 || target.rfind("[::1]:", 0) == 0) return true;
  const std::string host = target.substr(0, target.rfind(':'));
  // Digits, because 127.example.com is another machine.
  return host == "localhost" || (host.rfind("127.", 0) == 0 && host.find_first_not_of("0123456789.") == std::string::npos);
}

template <typename Metadata>
std::string first(const Metadata& metadata, const char* name) {
  const auto found = metadata.find(name);
  return found == metadata.end() ? std::string() : std::string(found->second.data(), found->second.size());
}

// Everything that a failed call says. The request id is the one that was sent.
Error error_of(const grpc::Status& status, const grpc::ClientContext& context, const std::string& request_id) {
  const auto& trailer = context.GetServerTrailingMetadata();
  Error failure;
  failure.code = status.error_code();
  failure.message = status.error_message();
  failure.reason = first(trailer, "deltawire-reason");
  for (const std::string& id :
       {first(context.GetServerInitialMetadata(), kRequestId), first(trailer, kRequestId), request_id}) {
    if (failure.request_id.empty()) failure.request_id = id;
  }
  const std::string given = first(trailer, "grpc-retry-pushback-ms");
  std::int32_t pushback;
  if (std::from_chars(given.data(), given.data() + given.size(), pushback).ec == std::errc() && !given.empty()) {
    failure.pushback = milliseconds(pushback);
  }
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return failure;
  google::rpc::ErrorInfo info;
  google::rpc::RetryInfo retry;
  google::rpc::BadRequest bad;
  for (const auto& detail : details.details()) {
    if (detail.UnpackTo(&info) && info.domain() == "deltawire.dev") {
      failure.reason = info.reason();
      failure.metadata = {info.metadata().begin(), info.metadata().end()};
      const auto id = failure.metadata.find("request_id");
      if (id != failure.metadata.end()) failure.request_id = id->second;
    } else if (detail.UnpackTo(&retry) && retry.has_retry_delay()) {
      failure.retry_delay = nanoseconds(TimeUtil::DurationToNanoseconds(retry.retry_delay()));
    } else if (detail.UnpackTo(&bad)) {
      for (const auto& each : bad.field_violations()) failure.violations.push_back({each.field(), each.description()});
    }
  }
  return failure;
}

// Whether a call that has received nothing may be made again. Canceled, if not by the caller, is what a call gets that
// arrives while a gateway closes its connections.
bool passes(const Error& failure) {
  if (failure.pushback && failure.pushback->count() < 0) return false;
  return failure.code == StatusCode::UNAVAILABLE || failure.code == StatusCode::CANCELLED ||
         (failure.code == StatusCode::RESOURCE_EXHAUSTED && failure.retry_delay);
}

// The pauses between the calls of one completion or watch: each longer than the one before it, and random, so that clients
// that were disconnected together do not come back together.
class Pauses {
 public:
  explicit Pauses(milliseconds longest) : longest_(longest) {}

  // The next pause; longer if the gateway asks for it.
  nanoseconds next(const std::optional<Error>& failure) {
    const double longest = std::min<double>(longest_.count(), kMinPause.count() * std::pow(2, count_++));
    const auto pause = std::chrono::duration<double, std::milli>(longest * std::uniform_real_distribution<>(0.5, 1)(random_));
    nanoseconds asked{0};
    if (failure && failure->pushback) asked = *failure->pushback;
    if (failure && failure->retry_delay) asked = *failure->retry_delay;
    return std::max(std::chrono::duration_cast<nanoseconds>(pause), asked);
  }

  void reset() { count_ = 0; }

 private:
  milliseconds longest_;
  int count_ = 0;
  std::minstd_rand random_{std::random_device()()};
};

// Calls one after another that end together: by the caller's cancel or by their deadline.
class Scope {
 public:
  explicit Scope(const CallOptions& options) : metadata_(options.metadata) {
    if (options.timeout) {
      deadline_ = system_clock::now() + std::chrono::duration_cast<system_clock::duration>(*options.timeout);
    }
    const auto given = metadata_.find(kRequestId);
    // By this id a call without a response is found in the gateway's log.
    request_id = given == metadata_.end() ? metadata_.emplace(kRequestId, random_id())->second : given->second;
  }

  // The context of the next call.
  std::shared_ptr<grpc::ClientContext> begin(const std::string& key, const std::map<std::string, std::string>& route = {}) {
    auto context = std::make_shared<grpc::ClientContext>();
    if (deadline_) context->set_deadline(*deadline_);
    if (!key.empty()) context->AddMetadata("authorization", "Bearer " + key);
    for (const auto& [name, value] : metadata_) context->AddMetadata(name, value);
    for (const auto& [name, value] : route) {
      if (!value.empty() && metadata_.count(name) == 0) context->AddMetadata(name, value);  // The caller's has precedence.
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (canceled_) context->TryCancel();
    return context_ = context;
  }

  void cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    canceled_ = true;
    if (context_) context_->TryCancel();
    changed_.notify_all();
  }

  // Lets time pass; false if the calls ended meanwhile.
  bool wait(nanoseconds pause) {
    auto until = system_clock::now() + std::chrono::duration_cast<system_clock::duration>(pause);
    if (deadline_) until = std::min(until, *deadline_);
    std::unique_lock<std::mutex> lock(mutex_);
    return !changed_.wait_until(lock, until, [this] { return canceled_; }) && !has_passed();
  }

  // The failure of calls that have ended. `last` is how the last attempt failed.
  std::optional<Error> end(const std::optional<Error>& last = std::nullopt) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!canceled_ && !has_passed()) return std::nullopt;
    Error failure;
    failure.code = canceled_ ? StatusCode::CANCELLED : StatusCode::DEADLINE_EXCEEDED;
    failure.message = canceled_ ? "canceled by the caller" : "the deadline passed";
    if (last && last->code != failure.code) failure.message += "; the last attempt failed with " + last->message;
    failure.request_id = request_id;
    return failure;
  }

  std::string request_id;

 private:
  bool has_passed() const { return deadline_ && system_clock::now() >= *deadline_; }

  std::multimap<std::string, std::string> metadata_;
  std::optional<system_clock::time_point> deadline_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<grpc::ClientContext> context_;
  bool canceled_ = false;
};

// The gateways of completions, the oldest forgotten first.
class Gateways {
 public:
  void found(const std::string& completion_id, const std::string& gateway) {
    if (completion_id.empty() || gateway.empty()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (names_.count(completion_id) == 0) {
      ids_.push_back(completion_id);
      if (ids_.size() > kMaxGateways) {
        names_.erase(ids_.front());
        ids_.pop_front();
      }
    }
    names_[completion_id] = gateway;
  }

  std::string of(const std::string& completion_id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = names_.find(completion_id);
    return found == names_.end() ? std::string() : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::string> names_;
  std::deque<std::string> ids_;
};

// The headers by which a proxy sends a call to the gateway that has the completion; after some that did not have it, to
// another one.
std::map<std::string, std::string> route_to(const std::string& completion_id, const std::string& gateway, int moved) {
  const std::string route = moved ? completion_id + "#" + std::to_string(moved) : completion_id;
  const bool fits = std::all_of(route.begin(), route.end(), [](char c) { return c >= '!' && c <= '~'; });
  // An id that does not fit into a header is refused by the gateway.
  return {{kRoute, fits ? route : ""}, {kGateway, moved ? "" : gateway}};
}

Error broken(const std::string& how) {
  Error failure;
  failure.code = StatusCode::INTERNAL;
  failure.message = "the gateway broke the rules of its stream: " + how;
  failure.interrupted = true;
  return failure;
}

// Folds events into an answer and checks them against the rules of the stream.
class Accumulator {
 public:
  explicit Accumulator(std::optional<std::int64_t> last = std::nullopt)
      : from_middle_(last), first_(last ? *last + 1 : 0), next_(first_) {}

  std::int64_t next() const { return next_; }
  const std::optional<v1::Completed>& completed() const { return answer_.completed; }
  // Whether any part of the answer was received. A heartbeat is none.
  bool has_begun() const { return answer_.started || (from_middle_ && next_ > first_); }
  // Whether a stream that is read from the middle had no event: then all of it was read before.
  bool is_only_the_end() const { return from_middle_ && next_ == first_; }

  // Takes the next event. One of an unknown kind is counted and otherwise skipped.
  std::optional<Error> receive(const Event& event) {
    if (event.sequence() != next_) {
      return broken("event " + std::to_string(next_) + " was expected and " + std::to_string(event.sequence()) + " came");
    }
    if (answer_.completed) return broken("an event came after the last one");
    ++next_;
    const Event::EventCase kind = event.event_case();
    if (kind != Event::EVENT_NOT_SET && kind != Event::kHeartbeat && !from_middle_ &&
        (kind == Event::kStarted) == answer_.started.has_value()) {
      return broken("started must come first, and once");
    }
    switch (kind) {
      case Event::kStarted:
        answer_.started = event.started();
        break;
      case Event::kTextDelta: {
        v1::Completed::Choice& choice = of(event);
        if (!event.text_delta().text().empty()) choice.mutable_message()->mutable_text()->append(event.text_delta().text());
        choice.mutable_logprobs()->MergeFrom(event.text_delta().logprobs());
        break;
      }
      case Event::kReasoningDelta:
        of(event).mutable_message()->mutable_reasoning()->append(event.reasoning_delta().text());
        break;
      case Event::kToolCallDelta:
        // A verdict has all that the fragments before it had.
        if (event.tool_call_delta().has_tool_call()) {
          *of(event).mutable_message()->add_tool_calls() = event.tool_call_delta().tool_call();
        } else if (event.tool_call_delta().has_failure()) {
          *of(event).add_failed_tool_calls() = event.tool_call_delta();
        }
        break;
      case Event::kChoiceFinished:
        finish(of(event), event.choice_finished());
        break;
      case Event::kUsageUpdate:
        answer_.usage = event.usage_update().usage();
        break;
      case Event::kNotice:
        answer_.notices.push_back(event.notice());
        break;
      case Event::kCompleted:
        answer_.completed = event.completed();
        answer_.usage = event.completed().usage();
        break;
      default:
        break;
    }
    return std::nullopt;
  }

  // The answer as far as it was received.
  Answer result() const {
    Answer answer = answer_;
    if (from_middle_ && answer.completed && !answer.completed->messages_omitted()) {
      // Only Completed has what was not read here.
      answer.choices.assign(answer.completed->choices().begin(), answer.completed->choices().end());
      return answer;
    }
    for (const auto& [index, choice] : choices_) {
      answer.choices.push_back(choice);
      // Calls may be run only if the whole answer ended well.
      if (!answer.completed || answer.completed->has_error()) answer.choices.back().set_tool_calls_executable(false);
    }
    return answer;
  }

 private:
  v1::Completed::Choice& of(const Event& event) {
    v1::Completed::Choice& choice = choices_[event.choice_index()];
    choice.set_index(event.choice_index());
    choice.mutable_message();
    return choice;
  }

  static void finish(v1::Completed::Choice& choice, const v1::ChoiceFinished& end) {
    choice.set_stop_reason(end.stop_reason());
    choice.set_engine_finish_reason(end.engine_finish_reason());
    choice.set_tool_calls_executable(end.tool_calls_executable());
    if (end.matched_case() == v1::ChoiceFinished::kMatchedStop) choice.set_matched_stop(end.matched_stop());
    if (end.matched_case() == v1::ChoiceFinished::kMatchedTokenId) choice.set_matched_token_id(end.matched_token_id());
  }

  Answer answer_;
  std::map<std::int32_t, v1::Completed::Choice> choices_;
  // Whether the stream is read from a later event than its first.
  bool from_middle_;
  // The sequences of the first event that is read and of the next one.
  std::int64_t first_, next_;
};

// Decides whether there is another call after one has ended without the stream's last event, and what it asks.
//
// A call that starts a completion and has received nothing is repeated for a passing failure, at most kMaxAttempts times in
// all. What is asked with retention goes on in other cases too, after a pause, until it has brought nothing new for as long:
//
//   how the call ended               after                        next
//   connection lost, or the gateway  any call                     resume after the last event
//   cut this call only
//   refused for now                  a resuming call              resume after the last event
//   another process has it           a resuming call              resume on a new connection, at most kMaxConnections
//                                                                 times since the last event
//   no such completion               a resuming call, not begun   start again, at most kMaxAttempts times in all
//                                    a resuming call, begun       as if another process has it: an id of a caller does
//                                                                 not say which process that is
//   the completion exists already    a starting call, if the id   resume: it is our own, whose beginning was lost
//                                    is ours
//   anything else                    any call                     give up: a retry would fail again
class Resumption {
 public:
  explicit Resumption(const v1::StreamChatCompletionRequest& request) : request_(request) {
    if (request.has_resume()) {
      resuming_ = true;
      retention_ = kResumeFor;
      completion_id = request.resume().completion_id();
      if (request.resume().has_last_sequence()) last = request.resume().last_sequence();
      return;
    }
    retention_ = nanoseconds(TimeUtil::DurationToNanoseconds(request.options().retention()));
    if (retention_.count() > 0 && request.has_chat() && request.chat().completion_id().empty()) {
      // So that it can be resumed before its first event.
      request_.mutable_chat()->set_completion_id("own-" + random_id());
      made_id_ = true;
    }
    completion_id = request_.chat().completion_id();
  }

  // The next call's request. One that starts the stream anew counts its events from 0 again.
  v1::StreamChatCompletionRequest begin() {
    ++calls;
    if (resuming_) return resume(completion_id, last);
    ++starts_;
    last.reset();
    return request_;
  }

  // Takes note of an event that had not come before.
  void received(std::int64_t sequence) {
    last = sequence;
    since_ = steady_clock::now();
    moved_ = 0;
    pauses_.reset();
  }

  // Decides after the end of a call; no failure is a status of OK. untouched says that no call has received anything.
  // Returns how long to wait before the next call, if there is one.
  std::optional<nanoseconds> next(const std::optional<Error>& failure, bool untouched, bool begun) {
    moves_ = false;
    if (untouched && !resuming_ && starts_ < kMaxAttempts && failure && passes(*failure)) return pauses_.next(failure);
    if (retention_.count() <= 0 || !goes_on(failure, begun)) return std::nullopt;
    const nanoseconds pause = pauses_.next(failure);
    if (steady_clock::now() - since_ + pause > retention_) return std::nullopt;
    return pause;
  }

  // How many new connections were needed since the last event if the next call needs one, otherwise 0.
  int moved() const { return moves_ ? moved_ : 0; }

  std::string completion_id;
  // The last event that was read.
  std::optional<std::int64_t> last;
  int calls = 0;

 private:
  bool goes_on(const std::optional<Error>& failure, bool begun) {
    const std::string reason = failure ? failure->reason : "DRAINING";  // An end that says nothing is a lost connection.
    if (reason == "DRAINING" || reason == "SLOW_CALLER") return resuming_ = true;
    if (reason == "TOO_MANY_STREAMS" || reason == "CALLER_LIMIT_EXCEEDED" || reason == "STORE_UNAVAILABLE") return resuming_;
    if (reason == "WRONG_REPLICA") return goes_elsewhere();
    if (reason == "COMPLETION_NOT_FOUND") {
      if (begun) return goes_elsewhere();
      const bool again = resuming_ && 0 < starts_ && starts_ < kMaxAttempts;
      if (again) resuming_ = false;
      return again;
    }
    if (reason == "COMPLETION_ALREADY_EXISTS") {
      const bool ours = !resuming_ && (made_id_ || starts_ > 1);
      resuming_ = resuming_ || ours;
      return ours;
    }
    v1::ErrorReason known;
    if (v1::ErrorReason_Parse(kReasonPrefix + reason, &known)) return false;
    // Without a known reason the status is that of a proxy or of the connection. RESOURCE_EXHAUSTED is a message above the
    // size limit, which would be as large again.
    switch (failure->code) {
      case StatusCode::UNAVAILABLE:
      case StatusCode::INTERNAL:
      case StatusCode::UNKNOWN:
      case StatusCode::CANCELLED:
      case StatusCode::DEADLINE_EXCEEDED:
        return resuming_ = true;
      default:
        return false;
    }
  }

  bool goes_elsewhere() {
    ++moved_;
    return moves_ = resuming_ && moved_ <= kMaxConnections;
  }

  v1::StreamChatCompletionRequest request_;
  nanoseconds retention_{0};
  // Whether the id was generated here.
  bool made_id_ = false, resuming_ = false, moves_ = false;
  int starts_ = 0, moved_ = 0;
  steady_clock::time_point since_ = steady_clock::now();
  Pauses pauses_{kMaxPause};
};

// A call with a stream of messages.
template <typename Response>
class Call {
 public:
  Call(std::shared_ptr<grpc::ClientContext> context, std::unique_ptr<grpc::ClientReader<Response>> reader)
      : context_(std::move(context)), reader_(std::move(reader)) {}

  // Ends the call on both sides. gRPC wants every call finished.
  ~Call() {
    if (!finished_) {
      context_->TryCancel();
      reader_->Finish();
    }
  }

  bool read(Response& response) { return reader_->Read(&response); }

  // How the call failed, after its last message.
  std::optional<Error> finish(const std::string& request_id) {
    finished_ = true;
    const grpc::Status status = reader_->Finish();
    if (status.ok()) return std::nullopt;
    return error_of(status, *context_, request_id);
  }

  std::string header(const char* name) const { return first(context_->GetServerInitialMetadata(), name); }

 private:
  std::shared_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReader<Response>> reader_;
  bool finished_ = false;
};

}  // namespace

const v1::Completed::Choice& Answer::choice() const {
  return choices.empty() ? v1::Completed::Choice::default_instance() : choices.front();
}

void Error::raise() {
  static const char* const kNames[] = {
      "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
      "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
      "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
  const int number = static_cast<int>(code);
  description_ = "deltawire: ";
  if (interrupted) description_ += "the stream broke off: ";
  description_ += 0 <= number && number < 17 ? kNames[number] : std::to_string(number);
  if (!reason.empty()) description_ += " (" + reason + ")";
  description_ += ": " + message;
  throw *this;
}

struct Client::Connection {
  std::string target, key;
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  grpc::ChannelArguments arguments;
  std::shared_ptr<grpc::Channel> channel;
  Gateways gateways;

  std::shared_ptr<grpc::Channel> dial() const { return grpc::CreateCustomChannel(target, credentials, arguments); }

  // Makes a call about a completion, with retries, and on new connections until one reaches the process that has it.
  template <typename Request, typename Response>
  Response find(std::shared_ptr<grpc::Channel> on, const Request& request, const CallOptions& options,
                grpc::Status (v1::ChatCompletion::Stub::*method)(grpc::ClientContext*, const Request&, Response*)) {
    Scope scope(options);
    Pauses pauses(kMaxPause);
    const std::string& id = request.completion_id();
    for (int attempt = 1, moved = 0;;) {
      const auto context = scope.begin(key, route_to(id, gateways.of(id), moved));
      Response response;
      v1::ChatCompletion::Stub stub(on);
      const grpc::Status status = (stub.*method)(context.get(), request, &response);
      if (status.ok()) {
        gateways.found(id, first(context->GetServerInitialMetadata(), kGateway));
        return response;
      }
      if (auto end = scope.end()) end->raise();
      const std::optional<Error> failure = error_of(status, *context, scope.request_id);
      if (failure->reason == "WRONG_REPLICA" && moved < kMaxConnections) {
        ++moved;
      } else if (passes(*failure) && attempt < kMaxAttempts) {
        ++attempt;
      } else {
        Error(*failure).raise();
      }
      if (!scope.wait(pauses.next(failure))) scope.end(failure)->raise();
      if (moved > 0) on = dial();
    }
  }

  v1::CancelChatCompletionResponse cancel(std::shared_ptr<grpc::Channel> on, const std::string& completion_id,
                                          const CallOptions& options) {
    v1::CancelChatCompletionRequest request;
    request.set_completion_id(completion_id);
    return find(std::move(on), request, options, &v1::ChatCompletion::Stub::CancelChatCompletion);
  }
};

struct Stream::State {
  State(std::shared_ptr<Client::Connection> connection, const v1::StreamChatCompletionRequest& request,
        const CallOptions& options)
      : connection(std::move(connection)), scope(options), resumption(request), folded(resumption.last),
        completion_id(resumption.completion_id), channel(this->connection->channel) {}

  void begin() {
    const v1::StreamChatCompletionRequest request = resumption.begin();
    std::string gateway = connection->gateways.of(completion_id);
    if (request.has_chat()) {
      folded = Accumulator();  // Only heartbeats can have come before.
      gateway.clear();         // That of an earlier completion with this id may be about to shut down.
    }
    const auto context = scope.begin(connection->key, route_to(completion_id, gateway, resumption.moved()));
    has_received = false;
    call.emplace(context, v1::ChatCompletion::Stub(channel).StreamChatCompletion(context.get(), request));
  }

  void enter(std::shared_ptr<grpc::Channel> other) {
    const std::lock_guard<std::mutex> lock(mutex);
    channel = std::move(other);
  }

  std::shared_ptr<Client::Connection> connection;
  Scope scope;
  Resumption resumption;
  Accumulator folded;
  std::optional<Call<Event>> call;
  Event event;
  // The gateway that the headers of the current call name, until it is remembered.
  std::string gateway;
  // Whether the current call, and whether any, has received something.
  bool has_received = false, ever_received = false;
  bool whole = false;
  std::optional<Error> failed;

  std::mutex mutex;  // for what follows
  std::string completion_id;
  // That of the client, or one for this stream alone.
  std::shared_ptr<grpc::Channel> channel;
};

Stream::Stream(std::unique_ptr<State> state) : state_(std::move(state)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream::~Stream() = default;

const Event* Stream::next() {
  State& s = *state_;
  for (;;) {
    if (s.failed) s.failed->raise();
    if (s.whole) return nullptr;
    if (!s.call) s.begin();
    if (!s.call->read(s.event)) {
      ended();
      continue;
    }
    if (!s.has_received) {
      s.has_received = s.ever_received = true;
      s.gateway = s.call->header(kGateway);
      const std::string id = s.call->header(kRequestId);
      if (!id.empty()) s.scope.request_id = id;
    }
    if (s.resumption.calls > 1 && s.event.sequence() < s.folded.next()) continue;  // It was replayed.
    if (auto failure = s.folded.receive(s.event)) fail(*failure);
    s.resumption.received(s.event.sequence());
    if (s.event.has_started()) {
      const std::lock_guard<std::mutex> lock(s.mutex);
      s.completion_id = s.resumption.completion_id = s.event.started().completion_id();
    }
    s.connection->gateways.found(s.completion_id, s.gateway);
    if (!s.completion_id.empty()) s.gateway.clear();
    return &s.event;
  }
}

// Takes the end of a call: decides the outcome of the stream, or waits until it is time for the next call.
void Stream::ended() {
  State& s = *state_;
  std::optional<Error> failure = s.call->finish(s.scope.request_id);
  s.call.reset();
  const auto& completed = s.folded.completed();
  if (completed && completed->has_error()) {
    // A proxy may have replaced the status, even by OK.
    if (!failure) failure.emplace();
    if (failure->reason.empty()) {
      failure->code = static_cast<StatusCode>(completed->error().code());
      failure->message = completed->error().message();
      failure->reason = v1::ErrorReason_Name(completed->error().reason());
      if (failure->reason.rfind(kReasonPrefix, 0) == 0) failure->reason.erase(0, sizeof(kReasonPrefix) - 1);
    }
    fail(*failure);
  }
  if (completed || (!failure && s.folded.is_only_the_end())) {
    s.whole = true;  // Whatever happened to the status.
    s.enter(s.connection->channel);
    return;
  }
  if (auto end = s.scope.end()) fail(*end);
  const bool begun = s.folded.has_begun();
  const std::optional<nanoseconds> pause = s.resumption.next(failure, !s.ever_received, begun);
  if (!pause) {
    if (!failure) {
      // A status of OK without an answer is a failure.
      failure.emplace();
      failure->code = StatusCode::UNKNOWN;
      failure->message = "the stream ended without its last event";
      failure->interrupted = true;
    }
    failure->interrupted = failure->interrupted || (begun && failure->code != StatusCode::DEADLINE_EXCEEDED);
    fail(*failure);
  }
  if (!s.scope.wait(*pause)) fail(*s.scope.end(failure));
  if (s.resumption.moved()) s.enter(s.connection->dial());
}

void Stream::fail(Error failure) {
  State& s = *state_;
  if (failure.request_id.empty()) failure.request_id = s.scope.request_id;
  if (s.folded.has_begun()) failure.answer = s.folded.result();
  s.failed = std::move(failure);
  s.call.reset();
  s.enter(s.connection->channel);
  s.failed->raise();
}

Answer Stream::final() {
  while (next()) continue;
  return state_->folded.result();
}

void Stream::cancel() { state_->scope.cancel(); }

v1::CancelChatCompletionResponse Stream::cancel_softly(const CallOptions& options) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  const std::string id = state_->completion_id;
  const std::shared_ptr<grpc::Channel> channel = state_->channel;
  lock.unlock();
  if (id.empty()) throw std::logic_error("the completion's id is not known before started: send a completion_id");
  return state_->connection->cancel(channel, id, options);
}

std::string Stream::completion_id() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->completion_id;
}

std::optional<std::int64_t> Stream::last_sequence() const { return state_->resumption.last; }

struct Watch::State {
  State(std::shared_ptr<Client::Connection> connection, const CallOptions& options)
      : connection(std::move(connection)), scope(options) {}

  void begin() {
    listed.reset();
    if (revision.empty()) listed.emplace();
    v1::WatchModelsRequest request;
    request.set_revision(revision);
    request.set_batch_snapshot(revision.empty());
    const auto context = scope.begin(connection->key);
    call.emplace(context, v1::ModelRegistry::Stub(connection->channel).WatchModels(context.get(), request));
  }

  // Takes a message. A change of a kind that this version does not know is skipped.
  void fold(const v1::WatchModelsResponse& message) {
    if (message.bookmark()) {
      for (auto model = known.begin(); listed && model != known.end();) {
        if (listed->count(model->first)) {
          ++model;
        } else {
          add(v1::WatchModelsResponse::CHANGE_REMOVED, model->second);
          model = known.erase(model);
        }
      }
      listed.reset();
      revision = message.revision();
      events.push_back({v1::WatchModelsResponse::CHANGE_UNSPECIFIED, {}, revision, true});
      return;
    }
    if (!listed) revision = message.revision();
    for (const v1::Model& model : message.models()) change(message.change(), model);
    if (message.models().empty()) change(message.change(), message.model());
  }

  void change(v1::WatchModelsResponse::Change kind, const v1::Model& model) {
    const auto old = known.find(model.id());
    const bool was_known = old != known.end();
    if (kind == v1::WatchModelsResponse::CHANGE_REMOVED) {
      if (!was_known && knows_all) return;
      known.erase(model.id());
    } else if (kind == v1::WatchModelsResponse::CHANGE_ADDED || kind == v1::WatchModelsResponse::CHANGE_MODIFIED) {
      if (listed) listed->insert(model.id());
      if (was_known && google::protobuf::util::MessageDifferencer::Equals(old->second, model)) return;
      known[model.id()] = model;
      if (was_known) {
        kind = v1::WatchModelsResponse::CHANGE_MODIFIED;
      } else if (knows_all) {
        kind = v1::WatchModelsResponse::CHANGE_ADDED;
      }
    } else {
      return;
    }
    add(kind, model);
  }

  void add(v1::WatchModelsResponse::Change kind, const v1::Model& model) {
    events.push_back({kind, model, listed ? std::string() : revision, false});
  }

  // Takes the end of a call: returns how the watch failed, or waits until it is time for the next call.
  std::optional<Error> ended() {
    const std::optional<Error> failure = call->finish(scope.request_id);
    call.reset();
    if (auto end = scope.end()) return end;
    if (failure && failure->code == StatusCode::OUT_OF_RANGE && knows_all && !revision.empty()) {
      revision.clear();  // A new snapshot, of which only the differences are returned.
      return std::nullopt;
    }
    if (failure && !survives(*failure)) return failure;
    if (!scope.wait(pauses.next(failure))) return scope.end(failure);
    return std::nullopt;
  }

  static bool survives(const Error& failure) {
    switch (failure.code) {
      case StatusCode::UNAVAILABLE:
      case StatusCode::ABORTED:
      case StatusCode::RESOURCE_EXHAUSTED:
      case StatusCode::DEADLINE_EXCEEDED:
        return true;
      case StatusCode::INTERNAL:
      case StatusCode::UNKNOWN:
      case StatusCode::CANCELLED:
        return failure.reason.empty();  // The connection was lost.
      default:
        return false;
    }
  }

  std::shared_ptr<Client::Connection> connection;
  Scope scope;
  std::optional<Call<v1::WatchModelsResponse>> call;
  std::string revision;
  std::map<std::string, v1::Model> known;
  // Whether known are all models at the revision: if not, removed ones cannot be reported after a new snapshot.
  bool knows_all = true;
  // The ids in the snapshot that is being received.
  std::optional<std::set<std::string>> listed;
  std::deque<ModelEvent> events;
  Pauses pauses{kMaxWatchPause};
  std::optional<Error> failed;
};

Watch::Watch(std::unique_ptr<State> state) : state_(std::move(state)) {}
Watch::Watch(Watch&&) noexcept = default;
Watch::~Watch() = default;

ModelEvent Watch::next() {
  State& s = *state_;
  while (s.events.empty()) {
    if (s.failed) s.failed->raise();
    if (!s.call) s.begin();
    v1::WatchModelsResponse message;
    if (s.call->read(message)) {
      s.pauses.reset();
      s.fold(message);
    } else {
      s.failed = s.ended();
    }
  }
  ModelEvent event = std::move(s.events.front());
  s.events.pop_front();
  return event;
}

const std::map<std::string, v1::Model>& Watch::models() const { return state_->known; }
void Watch::cancel() { state_->scope.cancel(); }

Client::Client(const std::string& target, const ClientOptions& options) : connection_(std::make_shared<Connection>()) {
  if (!options.key.empty() && !options.credentials && !options.plaintext_key && !is_local(target)) {
    throw std::invalid_argument("a key over plaintext to another machine: use TLS, or plaintext_key");
  }
  grpc::ChannelArguments arguments;
  arguments.SetUserAgentPrefix("deltawire-cpp");
  arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  // The client retries by itself: only it knows what may be repeated.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A stream can be silent for minutes while a long prompt is read; pings detect that the peer has disconnected.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A gateway is found soon after it is back; gRPC would let two minutes pass.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 10000);
  // Otherwise a new channel to the same target has the connection of the old one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const grpc_channel_args given = options.arguments.c_channel_args();
  for (std::size_t i = 0; i < given.num_args; ++i) {
    const grpc_arg& argument = given.args[i];
    if (argument.type == GRPC_ARG_INTEGER) arguments.SetInt(argument.key, argument.value.integer);
    if (argument.type == GRPC_ARG_STRING) arguments.SetString(argument.key, argument.value.string);
  }
  connection_->target = target;
  connection_->key = options.key;
  connection_->credentials = options.credentials ? options.credentials : grpc::InsecureChannelCredentials();
  connection_->arguments = arguments;
  connection_->channel = connection_->dial();
}

Stream Client::stream(const v1::StreamChatCompletionRequest& request, const CallOptions& options) {
  return Stream(std::make_unique<Stream::State>(connection_, request, options));
}

v1::CancelChatCompletionResponse Client::cancel(const std::string& completion_id, const CallOptions& options) {
  return connection_->cancel(connection_->channel, completion_id, options);
}

v1::GetChatCompletionResponse Client::get(const std::string& completion_id, const CallOptions& options) {
  v1::GetChatCompletionRequest request;
  request.set_completion_id(completion_id);
  return connection_->find(connection_->channel, request, options, &v1::ChatCompletion::Stub::GetChatCompletion);
}

Watch Client::watch_models(const std::string& revision, const std::optional<std::map<std::string, v1::Model>>& known,
                           const CallOptions& options) {
  auto state = std::make_unique<Watch::State>(connection_, options);
  state->revision = revision;
  state->knows_all = revision.empty() || known;
  if (known) state->known = *known;
  return Watch(std::move(state));
}

std::shared_ptr<grpc::Channel> Client::channel() const { return connection_->channel; }

v1::ChatMessage user(const std::string& text) {
  v1::ChatMessage message;
  message.mutable_user()->set_text(text);
  return message;
}

v1::ChatMessage system(const std::string& text) {
  v1::ChatMessage message;
  message.mutable_system()->set_text(text);
  return message;
}

v1::ChatMessage assistant(const v1::AssistantMessage& given) {
  v1::ChatMessage message;
  *message.mutable_assistant() = given;
  return message;
}

v1::ChatMessage tool_result(const v1::ToolCall& call, const std::string& text) {
  v1::ChatMessage message;
  message.mutable_tool()->set_call_id(call.call_id());
  message.mutable_tool()->set_text(text);
  return message;
}

v1::StreamChatCompletionRequest chat(const v1::ChatRequest& request) {
  v1::StreamChatCompletionRequest start;
  *start.mutable_chat() = request;
  return start;
}

v1::StreamChatCompletionRequest resume(const std::string& completion_id, std::optional<std::int64_t> last_sequence) {
  v1::StreamChatCompletionRequest request;
  request.mutable_resume()->set_completion_id(completion_id);
  if (last_sequence) request.mutable_resume()->set_last_sequence(*last_sequence);
  return request;
}

}  // namespace deltawire
