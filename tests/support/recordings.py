"""What a real vLLM sent: the recordings in `tests/transcripts`, with what was asked for."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from deltawire_server.sansio.reader import CompletionReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from deltawire_server.sansio.events import Event

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"


class Asked(TypedDict):
    """What a reader must know of the request."""

    choice_count: int
    offered_tools: dict[str, str]
    stop: list[str]
    stop_token_ids: list[int]


@dataclass(frozen=True)
class Recording:
    """One answer: the bytes of its event stream, and the request's body."""

    name: str
    data: bytes
    request: dict[str, Any]

    @property
    def golden_path(self) -> Path:
        """Where the events are kept that its bytes must give."""
        return TRANSCRIPTS / f"{self.name}.events.jsonl"

    @property
    def asked(self) -> Asked:
        """The request in a reader's words."""
        stop = self.request.get("stop") or []
        tools = self.request.get("tools") or []
        if self.request.get("tool_choice") == "none":
            tools = []
        return Asked(
            choice_count=self.request.get("n") or 1,
            offered_tools={
                tool["function"]["name"]: json.dumps(tool["function"].get("parameters") or {}) for tool in tools
            },
            stop=[stop] if isinstance(stop, str) else stop,
            stop_token_ids=self.request.get("stop_token_ids") or [],
        )

    def read(
        self, pieces: Iterable[bytes] | None = None, *, incremental: bool = True, keep_logprobs: bool = False
    ) -> list[Event]:
        """The events that its bytes give, in these pieces or else whole, up to the end of the body."""
        reader = CompletionReader(
            **self.asked, incremental=incremental, whole=keep_logprobs, generate_id=counting_ids()
        )
        events: list[Event] = []
        for piece in [self.data] if pieces is None else pieces:
            events.extend(reader.receive(piece))
        events.extend(reader.finish())
        return events


def counting_ids() -> Callable[[], str]:
    """Makes call ids that are the same in every run."""
    numbers = itertools.count()
    return lambda: f"<generated-{next(numbers)}>"


@cache
def load(name: str) -> Recording:
    """The recording of this name."""
    path = TRANSCRIPTS / f"{name}.sse"
    request = json.loads(path.with_suffix(".request.json").read_text(encoding="utf-8"))
    return Recording(name, path.read_bytes(), request)


def names() -> list[str]:
    """The names of all recorded event streams."""
    return sorted(path.stem for path in TRANSCRIPTS.glob("*.sse"))
