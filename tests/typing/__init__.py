"""Typed uses of the public packages, for mypy to check."""
