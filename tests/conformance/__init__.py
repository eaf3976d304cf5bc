"""Clients of every language against one protocol: what they report of calls whose answers are scripted."""
