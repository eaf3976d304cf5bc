"""Python functions as tools, and the conversation in which a model calls them.

No I/O here: the clients make the calls. Only `signature` imports pydantic, when the first function is made a tool, so a program
without such tools does not need the extra `tools`. In reading order:

    docstring     the descriptions in a function's docstring
    signature     a function's parameters as JSON Schema, and its arguments from JSON
    function      `function_tool` and its result
    loop          the next request and the next calls, until the model answers
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
