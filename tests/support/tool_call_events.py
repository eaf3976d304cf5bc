"""Checks the events of tool calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.sansio.events import ToolCallArguments, ToolCallFailed, ToolCallStarted, ToolCallSucceeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.sansio.events import StreamEvent

_ABOUT_A_CALL = (ToolCallStarted, ToolCallArguments, ToolCallSucceeded, ToolCallFailed)


def check_calls(events: Sequence[StreamEvent], *, incremental: bool) -> int:
    """Check the tool call events of a complete answer, and return the number of calls.

    The events of a call are STARTED, if it has a name; non-empty fragments; one verdict. All have the same id and name, and the
    concatenated fragments are the raw text of the verdict.
    """
    by_call: dict[tuple[int, int], list[StreamEvent]] = {}
    for event in events:
        if isinstance(event, _ABOUT_A_CALL):
            by_call.setdefault((event.choice, event.index), []).append(event)
    for of_call in by_call.values():
        verdict = of_call.pop()
        assert isinstance(verdict, ToolCallSucceeded | ToolCallFailed)
        if not incremental or not verdict.tool_name:
            assert of_call == []
            continue
        first, *pieces = of_call
        assert first == ToolCallStarted(verdict.choice, verdict.index, verdict.call_id, verdict.tool_name)
        written = ""
        for piece in pieces:
            assert isinstance(piece, ToolCallArguments)
            assert piece.call_id == verdict.call_id
            assert piece.fragment
            written += piece.fragment
        if isinstance(verdict, ToolCallFailed):
            assert written == verdict.raw_arguments
            assert 0 <= (verdict.byte_offset or 0) <= len(written.encode("utf-8", "surrogatepass"))
        else:
            assert (written if written.strip() else "{}") == verdict.arguments
    return len(by_call)
