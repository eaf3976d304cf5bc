"""The one place that says which version this is; the build reads it, and so do both programs."""

__version__ = "0.1.0"
