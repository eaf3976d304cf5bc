"""The exception for schemas."""


class SchemaError(ValueError):
    """A schema that is invalid or that the gateway does not support; the message has the problem and, if known, its path."""
