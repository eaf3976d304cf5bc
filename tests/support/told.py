"""What must be true of calls that are told while they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.sansio.events import ToolCallArguments, ToolCallFailed, ToolCallStarted, ToolCallSucceeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.sansio.events import StreamEvent

_ABOUT_A_CALL = (ToolCallStarted, ToolCallArguments, ToolCallSucceeded, ToolCallFailed)


def pieces_told(events: Sequence[StreamEvent], *, incremental: bool) -> int:
    """Hold the events of an answer that has ended to it, and say how many calls there were.

    Each call is told in this order: once STARTED, if it has a name; its pieces, none of them empty; one verdict. All of them
    agree on id and name, and the pieces add up to the raw text that the verdict is about.
    """
    by_call: dict[tuple[int, int], list[StreamEvent]] = {}
    for event in events:
        if isinstance(event, _ABOUT_A_CALL):
            by_call.setdefault((event.choice, event.index), []).append(event)
    for told in by_call.values():
        verdict = told.pop()
        assert isinstance(verdict, ToolCallSucceeded | ToolCallFailed)
        if not incremental or not verdict.tool_name:
            assert told == []
            continue
        first, *pieces = told
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
