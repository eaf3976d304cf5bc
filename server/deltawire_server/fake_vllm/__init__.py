"""A vLLM look-alike: plays recordings and made-up answers over HTTP, with faults, for tests, demos and users' own tests.

The law of this folder: it needs nothing but the standard library and msgspec, and knows nothing of the gateway.

    wire         the shapes: chunks of a stream, whole answers, errors
    described    what it says of itself: the fields that it knows
    script       what one chat request gets, at which pace and with which fault
    connection   HTTP requests, read by hand; notices when a client goes
    player       HTTP answers, written by hand: chunk boundaries, pauses, broken ends
    server       `FakeVllm`: the endpoints, what was received, what comes next

From a shell: `python -m deltawire_server.fake_vllm --help`.
"""

from deltawire_server.fake_vllm.connection import Request
from deltawire_server.fake_vllm.script import End, Knobs, Script
from deltawire_server.fake_vllm.server import FakeVllm
from deltawire_server.fake_vllm.wire import Chunks, error_body

__all__ = ["Chunks", "End", "FakeVllm", "Knobs", "Request", "Script", "error_body"]
