"""Python functions as tools, and the conversation in which a model calls them.

No I/O here: the clients ask and wait. Only `signature` imports pydantic, and only when the first function is made a tool, so
that whoever has no such tools needs neither it nor the extra `tools`. In the order of the files one needs to read:

    docstring     what a function's docstring says of it and of its parameters
    signature     a function's parameters as JSON Schema, and arguments for it out of JSON
    function      `function_tool` and what it makes
    loop          what to ask and what to run next, until the model is done
    shells        the loop with and without `await`
"""

from deltawire._tools.function import FunctionTool, ToolArgumentsError, function_tool
from deltawire._tools.loop import ToolLike, ToolRoundsExceededError, ToolRun

__all__ = [
    "FunctionTool",
    "ToolArgumentsError",
    "ToolLike",
    "ToolRoundsExceededError",
    "ToolRun",
    "function_tool",
]
