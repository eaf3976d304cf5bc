"""Validates the arguments of tool calls against the JSON Schema of the tool.

Both inputs are untrusted: the schema is the caller's, the arguments are the model's, and validation blocks the event loop. So
references outside of the schema are never read, patterns run on a regex engine without backtracking, and the work is estimated
before it is done. A schema that is too large or too much work is refused with `SchemaError`; such arguments fail validation with a
message.

The draft is that of `$schema`, by default 2020-12. Known formats are checked; unknown formats are ignored.

The modules, in reading order:

    check        compiles a schema to a check
    shape        measures the size and depth of a text before it is parsed
    effort       estimates the work of a check before it runs
    references   resolves the references of a schema
    sentences    the error messages for schemas and arguments
    strict       the checks for one answer
"""

from deltawire_server.schemas.check import MAX_SCHEMA_BYTES, argument_check, compiled_checks
from deltawire_server.schemas.errors import SchemaError

__all__ = ["MAX_SCHEMA_BYTES", "SchemaError", "argument_check", "compiled_checks"]
