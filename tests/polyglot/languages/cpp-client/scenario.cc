// What the C++ client does with a gateway that has TLS and keys: it ends an endless answer softly, looks the completion up,
// ends another one by leaving the stream, and refuses to send the key over plaintext.

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include "deltawire/client.h"

namespace v1 = deltawire::v1;

int main(int, char** argv) {
  std::ifstream file(argv[2]);
  grpc::SslCredentialsOptions trusted;
  trusted.pem_root_certs.assign(std::istreambuf_iterator<char>(file), {});
  deltawire::ClientOptions options;
  options.key = argv[3];
  options.credentials = grpc::SslCredentials(trusted);
  deltawire::Client client(argv[1], options);

  v1::ChatRequest request;
  *request.add_messages() = deltawire::user("hi");
  std::string id;
  {
    deltawire::Stream stream = client.stream(deltawire::chat(request));
    while (!stream.next()->has_text_delta()) continue;
    std::cout << v1::CompletionState_Name(stream.cancel_softly().state()) << std::endl;
    const deltawire::Answer answer = stream.final();
    std::cout << v1::StopReason_Name(answer.choice().stop_reason()) << " " << !answer.text().empty() << std::endl;
    id = stream.completion_id();
  }
  std::cout << v1::CompletionState_Name(client.get(id).state()) << std::endl;
  {
    deltawire::Stream stream = client.stream(deltawire::chat(request));
    while (!stream.next()->has_text_delta()) continue;
  }
  std::cout << "left" << std::endl;
  options.credentials = nullptr;
  try {
    deltawire::Client("gateway.example:50051", options);
  } catch (const std::invalid_argument& error) {
    std::cout << error.what() << std::endl;
  }
}
