"""Whether a tool call's arguments follow the tool's JSON Schema.

Both sides are hostile: the schema comes from a caller, the arguments from a model, and the check runs where every other
call waits for it. So nothing outside of the schema is ever read, patterns run on an engine without backtracking, and what
would take too long or nest too deeply is refused instead of tried: the schema with `SchemaError`, the arguments with a
sentence like any other that they do not follow it.

The draft is the one that `$schema` names, 2020-12 if it names none. Formats are checked, unknown ones pass.

In the order of the files one needs to read:

    check       a schema's text in, its check out
    effort      how much work a check may be, before it is done
    sentences   what is told, of a schema and of arguments
"""

from deltawire_server.schemas.check import argument_check
from deltawire_server.schemas.errors import SchemaError

__all__ = ["SchemaError", "argument_check"]
