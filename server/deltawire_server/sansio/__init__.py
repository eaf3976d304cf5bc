"""Decodes vLLM's event stream into the events of a completion.

This package has no I/O, no clock, no event loop, no threads, no gRPC and no protobuf; an import contract enforces it. The events
depend only on the content of the stream, not on how its bytes are split.

    bytes ──sse──▶ payloads ──decode──▶ chunks ──reader──▶ events ──coalesce──▶ fewer, larger events

`reader` uses `phases` (when an answer ends), `tool_calls` (assembles fragments and gives verdicts), `json_object` (whether
arguments are an object), `usage` (combines usage reports), `characters` (joins surrogate pairs across chunks), `pieces` (splits
events that are too large for a message) and `empty_arguments` (whether a call may have no arguments).

All classes have the same two methods: `receive(x)` takes the next piece and returns its results; `finish(...)` marks the end.
"""
