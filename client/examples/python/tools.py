#!/usr/bin/env python3
"""Let a model call a function, asynchronously: the loop of asking, executing and asking again, written out.

    python tools.py MODEL "Is it raining in Oslo?"

The gateway is taken from $DELTAWIRE_TARGET, by default 127.0.0.1:50051.
"""

import asyncio
import json
import os
import sys

from deltawire import AsyncClient, ToolCall, tool, tool_definition, user

WEATHER = tool_definition(
    "get_weather",
    "The weather in a city, now.",
    input_schema={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
# A model may call tools without an end.
MAX_ROUNDS = 5


async def execute(call: ToolCall) -> str:
    """Do what the model asked for. The arguments are JSON of an object, but the model chose what is in it."""
    arguments = json.loads(call.arguments)
    return json.dumps({"city": arguments.get("city"), "weather": "rain"})


async def main() -> int:
    """Send requests until the model answers without a call."""
    if len(sys.argv) != 3:
        print("usage: python tools.py MODEL PROMPT", file=sys.stderr)
        return 2
    model, prompt = sys.argv[1:]
    history = [user(prompt)]
    async with AsyncClient(os.environ.get("DELTAWIRE_TARGET", "127.0.0.1:50051")) as client:
        for _ in range(MAX_ROUNDS):
            async with client.chat.stream(history, model=model, tools=[WEATHER], timeout=120) as stream:
                async for piece in stream.text:
                    print(piece, end="", flush=True)
                answer = await stream.final()
            for failed in answer.failed_tool_calls:
                print(f"not executed: {failed.tool_name}: {failed.failure.message}", file=sys.stderr)
            if not answer.tool_calls_executable:
                print()
                return 0
            history.append(answer.message)
            results = await asyncio.gather(*(execute(call) for call in answer.tool_calls))
            for call, result in zip(answer.tool_calls, results, strict=True):
                print(f"{call.tool_name}({call.arguments}) -> {result}", file=sys.stderr)
                history.append(tool(call, result))
    print("the model still called tools in the last round", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
