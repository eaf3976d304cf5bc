// Streams one answer of a model and prints its text and its tool calls.
//
// Its exit status is 0 if the answer is whole, 1 if the call failed, 2 if the command line is wrong, and 130 after Ctrl-C.

#include <getopt.h>
#include <pthread.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>

#include "deltawire/client.h"

namespace v1 = deltawire::v1;

namespace {

int usage() {
  std::cerr << "usage: chat [--target HOST:PORT] [--model NAME] [--tool FILE] PROMPT\n";
  return 2;
}

void print(const deltawire::Answer& answer) {
  const v1::Completed::Choice& choice = answer.choice();
  for (const v1::ToolCall& call : choice.message().tool_calls()) {
    std::cout << "\ntool call: " << call.tool_name() << "(" << call.arguments() << ")";
  }
  for (const v1::ToolCallDelta& call : choice.failed_tool_calls()) {
    // Never run such a call. What the model wrote is in raw_arguments.
    std::cout << "\nfailed tool call: " << call.tool_name() << ": " << call.failure().message();
  }
  std::cout << "\n[" << v1::StopReason_Name(choice.stop_reason()) << ", " << answer.usage.completion_tokens() << " tokens";
  if (choice.tool_calls_executable()) std::cout << ", tool calls may be executed";
  std::cout << "]" << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  std::string target = "127.0.0.1:50051";
  v1::ChatRequest request;
  const option flags[] = {{"target", required_argument, nullptr, 't'},
                          {"model", required_argument, nullptr, 'm'},
                          {"tool", required_argument, nullptr, 'f'},
                          {nullptr, 0, nullptr, 0}};
  for (int flag; (flag = getopt_long(argc, argv, "", flags, nullptr)) != -1;) {
    if (flag == 't') {
      target = optarg;
    } else if (flag == 'm') {
      request.set_model(optarg);
    } else if (flag == 'f') {
      try {
        std::ifstream file(optarg);
        if (!file) throw std::invalid_argument("it cannot be read");
        const std::string text{std::istreambuf_iterator<char>(file), {}};
        for (v1::Tool& tool : deltawire::parse_tools(text)) *request.add_tools() = std::move(tool);
      } catch (const std::invalid_argument& error) {
        std::cerr << optarg << ": " << error.what() << "\n";
        return 2;
      }
    } else {
      return usage();
    }
  }
  if (optind + 1 != argc) return usage();
  *request.add_messages() = deltawire::user(argv[optind]);

  // Before gRPC starts threads, so that none of them gets the signal: a handler could not cancel safely.
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);

  deltawire::ClientOptions options;
  if (const char* key = std::getenv("DELTAWIRE_TOKEN")) options.key = key;
  int status = 0;
  std::atomic<bool> interrupted{false}, ended{false};
  try {
    deltawire::Client client(target, options);
    deltawire::Stream stream = client.stream(deltawire::chat(request));
    // Canceling reaches the engine: it stops generating.
    std::thread canceler([&] {
      int signal;
      sigwait(&interrupt, &signal);
      if (ended) return;
      interrupted = true;
      stream.cancel();
    });
    bool begun = false;
    try {
      for (const deltawire::Event& event : stream) {
        std::cout << event.text_delta().text() << std::flush;
        begun = begun || event.has_text_delta();
      }
      print(stream.final());
    } catch (const deltawire::Error& error) {
      std::cout << (begun ? "\n" : "") << std::flush;
      std::cerr << error.what() << "\n";
      status = 1;
    }
    ended = true;
    pthread_kill(canceler.native_handle(), SIGINT);
    canceler.join();
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
  return interrupted ? 130 : status;
}
