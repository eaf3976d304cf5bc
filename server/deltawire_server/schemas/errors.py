"""What can be wrong with a schema."""


class SchemaError(ValueError):
    """An invalid schema, or one that the gateway does not check; the message says why, and where if that is known."""
