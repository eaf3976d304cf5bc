// Tools from JSON. Apart from the client, because only this needs a library for JSON: protobuf's own would lose the order of
// a schema's keys, which is the order in which a model writes the arguments.

#include <stdexcept>

#include <google/protobuf/util/json_util.h>
#include <nlohmann/json.hpp>

#include "deltawire/client.h"

namespace deltawire {
namespace {

using Json = nlohmann::ordered_json;

v1::Tool parse_tool(const Json& given) {
  v1::Tool tool;
  if (given.is_object() && given.contains("function")) {
    const Json& function = given.at("function");
    tool.set_name(function.value("name", ""));
    tool.set_description(function.value("description", ""));
    if (function.contains("parameters")) tool.set_input_schema(function.at("parameters").dump());
    if (function.contains("strict") && !function.at("strict").is_null()) tool.set_strict(function.at("strict").get<bool>());
  } else {
    const auto status = google::protobuf::util::JsonStringToMessage(given.dump(), &tool);
    if (!status.ok()) throw std::invalid_argument("not a tool: " + std::string(status.message()));
  }
  if (tool.name().empty()) throw std::invalid_argument("a tool without a name");
  return tool;
}

}  // namespace

std::vector<v1::Tool> parse_tools(const std::string& json) {
  std::vector<v1::Tool> tools;
  try {
    Json given = Json::parse(json);
    if (!given.is_array()) given = Json::array({given});
    for (const Json& each : given) tools.push_back(parse_tool(each));
  } catch (const Json::exception& error) {
    throw std::invalid_argument(error.what());
  }
  return tools;
}

}  // namespace deltawire
