"""A fake vLLM server: plays recordings and generated answers over HTTP, with faults, for tests and demos.

This folder uses only the standard library and msgspec, and nothing of the gateway.

    wire         the formats: chunks of a stream, whole answers, errors
    described    the OpenAPI document, with the supported fields
    script       the answer to one chat request, with its pace and its fault
    connection   reads HTTP requests; detects when a client disconnects
    player       writes HTTP responses: chunk boundaries, pauses, broken ends
    server       `FakeVllm`: the endpoints, the received requests, the next answers

From a shell: `python -m deltawire_server.fake_vllm --help`.
"""

from deltawire_server.fake_vllm.connection import Request
from deltawire_server.fake_vllm.script import End, Knobs, Script
from deltawire_server.fake_vllm.server import FakeVllm
from deltawire_server.fake_vllm.wire import Chunks, error_body

__all__ = ["Chunks", "End", "FakeVllm", "Knobs", "Request", "Script", "error_body"]
