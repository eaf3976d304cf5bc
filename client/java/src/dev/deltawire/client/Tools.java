package dev.deltawire.client;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import dev.deltawire.v1.Tool;
import java.util.ArrayList;
import java.util.List;

/** Tools from JSON, in the form of OpenAI or of the API's own message. */
public final class Tools {
  private Tools() {}

  /**
   * The tools of a JSON text: one tool, or a list of them.
   *
   * <p>A tool is OpenAI's {@code {"type": "function", "function": {"name": ..., "parameters": {...}}}}, or the API's {@code
   * {"name": ..., "inputSchema": ...}} with the schema as an object or as its text.
   *
   * @throws IllegalArgumentException the text is no such JSON
   */
  public static List<Tool> parse(String json) {
    try {
      JsonElement value = JsonParser.parseString(json);
      List<Tool> tools = new ArrayList<>();
      if (value.isJsonArray()) {
        value.getAsJsonArray().forEach(each -> tools.add(tool(each.getAsJsonObject())));
      } else {
        tools.add(tool(value.getAsJsonObject()));
      }
      return tools;
    } catch (JsonParseException | IllegalStateException | UnsupportedOperationException | ClassCastException malformed) {
      throw new IllegalArgumentException("these are no tools as JSON: " + malformed.getMessage(), malformed);
    }
  }

  private static Tool tool(JsonObject given) {
    JsonObject function = given.has("function") ? given.getAsJsonObject("function") : given;
    if (!function.has("name")) {
      throw new IllegalArgumentException("a tool has no \"name\"");
    }
    Tool.Builder tool = Tool.newBuilder().setName(function.get("name").getAsString());
    if (function.has("description")) {
      tool.setDescription(function.get("description").getAsString());
    }
    for (String name : List.of("parameters", "inputSchema", "input_schema")) {
      if (function.has(name)) {
        JsonElement schema = function.get(name);
        tool.setInputSchema(schema.isJsonPrimitive() ? schema.getAsString() : schema.toString());
      }
    }
    if (function.has("strict")) {
      tool.setStrict(function.get("strict").getAsBoolean());
    }
    return tool.build();
  }
}
