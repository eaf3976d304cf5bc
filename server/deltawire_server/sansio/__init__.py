"""What a completion means: the bytes of vLLM's event stream in, events out.

The rule of this package: no I/O, no clock, no event loop, no threads, no gRPC, no protobuf. Everything is a function of the
content of the bytes, so the same stream gives the same events however its bytes are cut. An import contract enforces it.

    bytes ──sse──▶ payloads ──decode──▶ chunks ──completion──▶ events ──coalesce──▶ fewer, larger events

`completion` uses `tool_calls` (fragments in, verdicts out), `usage` (accounts in, the best figure out), `characters` (halves of
characters joined over chunks), `pieces` (no event too large for a message) and `empty_arguments` (may a call have none?).

Two verbs everywhere: `receive(x)` takes the next piece and returns what it gives, `finish(...)` says that there is no more.
"""
