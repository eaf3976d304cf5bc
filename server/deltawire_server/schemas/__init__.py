"""Whether a tool call's arguments follow the tool's JSON Schema.

Both sides are hostile: the schema comes from a caller, the arguments from a model, and the check blocks the event loop. So
nothing outside of the schema is ever read, patterns run on an engine without backtracking, and all work is counted before it
is done. What is too large or too much work is refused: the schema with `SchemaError`, the arguments with a sentence like any
other that says that they do not follow it.

The draft is the one that `$schema` names, 2020-12 if it names none. Formats are checked, unknown ones pass.

In the order in which to read the files:

    check        a schema's text in, its check out
    shape        how large and how deep a text is, before it is parsed
    effort       how much work a check may be, before it is done
    references   what the references of a schema may mean
    sentences    the error messages, of a schema and of arguments
    strict       the checks of one answer
"""

from deltawire_server.schemas.check import MAX_SCHEMA_BYTES, argument_check, compiled_checks
from deltawire_server.schemas.errors import SchemaError

__all__ = ["MAX_SCHEMA_BYTES", "SchemaError", "argument_check", "compiled_checks"]
