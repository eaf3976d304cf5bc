// Streams one answer from the gateway at the given address and prints its text and tool calls.

#include <chrono>
#include <iostream>
#include <memory>
#include <optional>

#include <grpcpp/grpcpp.h>

#include "deltawire/v1/chat_completion.grpc.pb.h"

namespace v1 = deltawire::v1;

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: chat TARGET\n";
    return 2;
  }
  auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  auto stub = v1::ChatCompletion::NewStub(channel);

  v1::StreamChatCompletionRequest request;
  request.mutable_chat()->add_messages()->mutable_user()->set_text("How warm is it in Oslo?");
  v1::Tool* tool = request.mutable_chat()->add_tools();
  tool->set_name("get_weather");
  tool->set_input_schema(R"({"type":"object","properties":{"city":{"type":"string"}}})");

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  auto reader = stub->StreamChatCompletion(&context, request);
  std::optional<v1::Completed> completed;
  v1::StreamChatCompletionResponse response;
  while (reader->Read(&response)) {
    switch (response.event_case()) {
      case v1::StreamChatCompletionResponse::kTextDelta:
        std::cout << response.text_delta().text() << std::flush;
        break;
      case v1::StreamChatCompletionResponse::kToolCallDelta:
        if (response.tool_call_delta().has_tool_call()) {
          const v1::ToolCall& call = response.tool_call_delta().tool_call();
          std::cout << "\ntool call " << call.tool_name() << "(" << call.arguments() << ")";
        }
        break;
      case v1::StreamChatCompletionResponse::kCompleted:
        completed = response.completed();
        break;
      default:
        break;
    }
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) {
    std::cerr << status.error_code() << ": " << status.error_message() << "\n";
    return 1;
  }
  if (!completed || completed->has_error()) {
    std::cerr << "not the whole answer\n";
    return 1;
  }
  std::cout << "\ncompleted" << std::endl;
  return 0;
}
