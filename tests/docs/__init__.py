"""Tests of the documentation: commands, code, links and paths."""
