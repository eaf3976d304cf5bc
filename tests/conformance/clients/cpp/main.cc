// The C++ client of the conformance tests: makes the calls that it reads from its standard input and writes what the client
// reports of them to its standard output.

#include <cstdint>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>

#include <google/protobuf/util/time_util.h>

#include "conformance.pb.h"
#include "deltawire/client.h"

namespace {

namespace conformance = deltawire::conformance::v1;
using google::protobuf::util::TimeUtil;

conformance::Answer to_message(const deltawire::Answer& given) {
  conformance::Answer answer;
  if (given.started) {
    answer.set_completion_id(given.started->completion_id());
    answer.set_model(given.started->model());
  }
  for (const auto& choice : given.choices) *answer.add_choices() = choice;
  *answer.mutable_usage() = given.usage;
  for (const auto& notice : given.notices) *answer.add_notices() = notice;
  return answer;
}

conformance::Failure to_message(const deltawire::Error& error) {
  conformance::Failure failure;
  failure.set_code(error.code);
  failure.set_reason(error.reason);
  failure.set_interrupted(error.interrupted);
  if (error.retry_delay) {
    *failure.mutable_retry_delay() = TimeUtil::NanosecondsToDuration(error.retry_delay->count());
  }
  for (const auto& violation : error.violations) failure.add_fields(violation.field);
  if (error.answer) *failure.mutable_partial() = to_message(*error.answer);
  return failure;
}

void stream(deltawire::Stream stream, const conformance::ClientCase::Stream& given, conformance::ClientResult& result) {
  for (int events = 0;; ++events) {
    if (given.has_cancel_after_events() && events == given.cancel_after_events()) stream.cancel();
    if (!stream.next()) break;
  }
  *result.mutable_answer() = to_message(stream.final());
}

void watch(deltawire::Watch watch, int bookmarks, conformance::ClientResult& result) {
  while (bookmarks > 0) bookmarks -= watch.next().bookmark;
  for (const auto& [id, model] : watch.models()) *result.add_models() = model;
}

conformance::ClientResult run(const conformance::ClientCase& given) {
  conformance::ClientResult result;
  result.set_name(given.name());
  deltawire::ClientOptions options;
  options.key = given.access_key();
  deltawire::CallOptions call;
  if (given.has_timeout()) call.timeout = std::chrono::nanoseconds(TimeUtil::DurationToNanoseconds(given.timeout()));
  try {
    deltawire::Client client(given.target(), options);
    if (given.has_watch()) {
      watch(client.watch_models(given.watch().request().revision(), std::nullopt, call), given.watch().bookmarks(), result);
    } else {
      stream(client.stream(given.stream().request(), call), given.stream(), result);
    }
  } catch (const deltawire::Error& error) {
    *result.mutable_failure() = to_message(error);
  }
  return result;
}

bool read(std::string& data) {
  unsigned char size[4];
  if (!std::cin.read(reinterpret_cast<char*>(size), 4)) return false;
  data.resize(std::uint32_t(size[0]) << 24 | size[1] << 16 | size[2] << 8 | size[3]);
  return bool(std::cin.read(data.data(), data.size()));
}

void write(const std::string& data) {
  const std::uint32_t size = data.size();
  for (int shift = 24; shift >= 0; shift -= 8) std::cout.put(char(size >> shift & 0xff));
  std::cout << data << std::flush;
}

}  // namespace

int main() {
  conformance::ClientCase given;
  for (std::string data; read(data);) {
    if (!given.ParseFromString(data)) throw std::runtime_error("not a ClientCase");
    write(run(given).SerializeAsString());
  }
}
