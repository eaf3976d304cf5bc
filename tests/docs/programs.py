"""Python programs of the documents, run against a gateway of the test."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

from deltawire_server.fake_vllm import Chunks, Script

if TYPE_CHECKING:
    import asyncio

    from tests.docs.markdown import Block

ADDRESS = "127.0.0.1:50051"
"""Where the gateway of every document is."""
MODEL = "smollm2"
"""What `make run` serves."""
CHUNK = Chunks()


def script(*events: dict[str, object] | asyncio.Event, reason: str = "stop") -> Script:
    """An answer of these chunks."""
    return Script.chunks([CHUNK.role(), *events, CHUNK.finish(reason), CHUNK.usage(7, 3)])


SAYS = script(CHUNK.text("It rains"), CHUNK.text(" in Oslo."))
CALLS = script(CHUNK.call("get_weather"), CHUNK.arguments('{"city": "Oslo"}'), reason="tool_calls")


def runnable(block: Block, address: str) -> str:
    """The block's code, for this gateway."""
    return block.text.replace(ADDRESS, address)


def run(block: Block, address: str) -> str:
    """Run a block in this thread, and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # A name of its own, because the main program is called `__main__`.
        exec(compile(runnable(block, address), "document", "exec"), {"__name__": "document"})  # noqa: S102 (our own text)
    return printed.getvalue()
