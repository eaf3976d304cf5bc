"""What can be wrong with a schema."""


class SchemaError(ValueError):
    """A text is no schema that arguments can be held to; the message says why, and where if that is known."""
