"""What a completion means: bytes of vLLM's event stream in, events out.

The law of this folder: no I/O, no clock, no event loop, no threads, no gRPC, no protobuf. Everything is a function of the
content of the bytes, so the same stream gives the same events however its bytes are cut. An import contract keeps it.

    bytes ──sse──▶ payloads ──chunks──▶ Chunk ──completion──▶ events ──coalesce──▶ fewer, larger events
                                                  └── tool_calls: fragments in, judged calls out

Everywhere two verbs: `receive(x) -> list` takes the next piece, `finish(...) -> list` says that there is no more.
"""
