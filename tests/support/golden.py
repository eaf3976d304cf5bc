"""The golden files: for each recorded stream `tests/transcripts/<case>.events.jsonl`, the events that it must give.

    python -m tests.support.golden            rewrites them; read the diff
    python -m tests.support.golden --check    says which would change, and fails then

One event a line, as compact JSON, with incremental tool calls. The engine's ids differ on every run, so
they are masked: its id of the answer, and its call ids by the order in which they appear.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.sansio.events import (
    Completed,
    Event,
    Started,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from tests.support import recordings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class _Mask:
    """Replaces ids, each always by the same."""

    def __init__(self) -> None:
        self._masked: dict[str, str] = {}

    def call_id(self, call_id: str) -> str:
        if call_id.startswith("<generated-"):
            return call_id
        return self._masked.setdefault(call_id, f"<call-{len(self._masked)}>")

    def event(self, event: Event) -> Event:
        if isinstance(event, Started):
            return msgspec.structs.replace(event, upstream_id="<upstream-id>")
        if isinstance(event, ToolCallStarted | ToolCallArguments | ToolCallSucceeded | ToolCallFailed):
            return msgspec.structs.replace(event, call_id=self.call_id(event.call_id))
        if isinstance(event, Completed):
            choices = tuple(
                msgspec.structs.replace(
                    choice,
                    tool_calls=tuple(self.event(call) for call in choice.tool_calls),
                    failed_tool_calls=tuple(self.event(call) for call in choice.failed_tool_calls),
                )
                for choice in event.choices
            )
            return msgspec.structs.replace(event, choices=choices)
        return event


def mask(events: Iterable[Event]) -> list[Event]:
    """The events with ids that are the same in every recording of the same."""
    masking = _Mask()
    return [masking.event(event) for event in events]


def dump(events: Iterable[Event]) -> bytes:
    """A golden file's content."""
    return b"".join(msgspec.json.encode(event) + b"\n" for event in mask(events))


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check every golden file.

    Returns:
        1 if a check found a difference, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.support.golden", description="Golden files of recordings")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something would change")
    check: bool = parser.parse_args(arguments).check
    stale = 0
    for name in recordings.names():
        recording = recordings.load(name)
        content = dump(recording.read())
        path = recording.golden_path
        if path.exists() and path.read_bytes() == content:
            continue
        stale += 1
        print(f"{'stale' if check else 'written'}: {path.name}")
        if not check:
            path.write_bytes(content)
    for path in sorted(recordings.TRANSCRIPTS.glob("*.events.jsonl")):
        if not path.with_name(path.name.replace(".events.jsonl", ".sse")).exists():
            stale += 1
            print(f"{'stale' if check else 'removed'}: {path.name}")
            if not check:
                path.unlink()
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
