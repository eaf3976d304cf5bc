"""What is known of a completion by its id, from the moment it is admitted until some time after its end.

    begin ──▶ running ── end ──▶ retained, as long as its stream is kept ──▶ remembered ──▶ forgotten
                          └────────────────── without one ──────────────────────┘

Ids are each caller's own: an id of another caller is reported as unknown. What is remembered of an ended completion is how it
ended and what it cost, without what a caller can make large; number, bytes and time are bounded.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from sys import getsizeof
from typing import TYPE_CHECKING

from deltawire_server.completions.info import NOTHING_YET, ActiveCompletion, CompletionInfo, Outcome
from deltawire_server.errors import CallerError, GatewayError, Reason
from deltawire_server.sansio.events import StopReason, Usage

if TYPE_CHECKING:
    from deltawire_server.completions.retention import RetainedStream
    from deltawire_server.sansio.events import Fault
    from deltawire_server.upstream.request import Sampling

MAX_REMEMBERED = 10_000
"""Ended completions that are remembered: minutes of a busy process. One takes about 1.5 KiB."""

MAX_REMEMBERED_BYTES = 32 * 1024 * 1024
"""Of all of them. Each takes at most 8 KiB (ids, names, a message, short lists of the sampling), so that callers with the longest
of all these leave room for 4,096."""

RECORD_BYTES = 1536
"""What a record takes besides its texts: the objects, and its places in tables."""

MAX_MESSAGE = 1024
"""Bytes that are remembered of an error's message; no answer to a caller has more of it."""

MAX_LISTS_BYTES = 2048
"""Memory of the sampling's texts and lists up to which they are remembered: more than a caller usually sends."""

REMEMBERED_SECONDS = 600.0
"""For how long: enough for whoever lost a connection to ask what became of its call."""

_GENERATED = re.compile(r"cmpl-[0-9a-f]{32}-(?P<owner>[0-9a-f]{8})")


@dataclass(slots=True)
class Record:
    """One completion: all that is known of it by its id.

    Attributes:
        caller: Whose it is; empty where callers are not told apart.
        completion_id: Unique among the caller's.
        fingerprint: The same for equal requests; empty if the id was made here, so that no request can have it again.
        running: While it is under way and its model has been found.
        begun: Whether the engine ever began, once it has ended.
        head: Once its model was found.
        usage: What it has cost in all, once it has ended.
        outcome: Why it failed, if it did.
        ended: Whether it has ended.
        stream: Its messages, if they are kept.
        size: Bytes of memory that it takes, once it is only remembered.
    """

    caller: str
    completion_id: str
    fingerprint: bytes = b""
    running: ActiveCompletion | None = None
    head: CompletionInfo | None = None
    begun: bool = False
    usage: Usage = NOTHING_YET
    outcome: Outcome | None = None
    ended: bool = False
    stream: RetainedStream | None = None
    size: int = 0
    _stop_asked: bool = False
    _fault: Fault | None = None
    _ended_at: float = field(default=0.0, repr=False)

    @property
    def is_abandoned(self) -> bool:
        """Whether its stream had its last reader and its generation is being stopped: its id is free for another attempt."""
        return bool(self.fingerprint) and self.stream is None and not self.ended

    def run(self, running: ActiveCompletion) -> None:
        """It is under way from now on; a cancel that came earlier takes effect."""
        self.running = running
        self.head = running.head
        if self.stream is not None:
            self.stream.run(running)
        if self._stop_asked:
            running.stop(StopReason.CANCELLED)
        if self._fault is not None:
            running.end(self._fault)

    def fail(self, fault: Fault) -> None:
        """End it with a fault, now or as soon as it is under way; of one that has ended, nothing changes."""
        self._fault = fault
        if self.running is not None:
            self.running.end(fault)

    def cancel(self) -> None:
        """End it softly, now or as soon as it is under way; of one that has ended, nothing changes."""
        self._stop_asked = True
        if self.running is not None:
            self.running.stop(StopReason.CANCELLED)

    def note(self) -> None:
        """Take over what the running completion knows, which will soon be gone."""
        if self.running is not None:
            self.usage = self.running.usage
            self.begun = self.running.begun

    def shrink(self) -> None:
        """Keep only what is remembered of an ended completion; `size` is right from then on."""
        if self.outcome is not None:
            message = self.outcome.message.encode(errors="replace")[:MAX_MESSAGE].decode(errors="ignore")
            self.outcome = replace(self.outcome, message=message)
        if self.head is not None and _lists_bytes(self.head.sampling) > MAX_LISTS_BYTES:
            sampling = replace(self.head.sampling, stop=(), stop_token_ids=(), logit_bias={}, bad_words=())
            self.head = replace(self.head, sampling=sampling)
        texts = [self.caller, self.completion_id]
        if self.outcome is not None:
            texts.append(self.outcome.message)
        if self.head is not None:
            texts += [self.head.model, self.head.alias, self.head.provider_id]
        lists = 0 if self.head is None else _lists_bytes(self.head.sampling)
        self.size = RECORD_BYTES + lists + sum(map(getsizeof, texts))


def _lists_bytes(sampling: Sampling) -> int:
    """Memory of a sampling's texts and lists; each entry of `logit_bias` takes two numbers and its place in a table."""
    texts = sum(map(getsizeof, (*sampling.stop, *sampling.bad_words)))
    entries = len(sampling.stop) + len(sampling.bad_words)
    return texts + 8 * entries + 40 * len(sampling.stop_token_ids) + 128 * len(sampling.logit_bias)


class Records:
    """All completions of this process.

    Args:
        max_remembered: Ended ones that are remembered, without what is retained.
        remembered_seconds: For how long.
        max_bytes: Memory that they may take.
    """

    def __init__(
        self,
        max_remembered: int = MAX_REMEMBERED,
        remembered_seconds: float = REMEMBERED_SECONDS,
        max_bytes: int = MAX_REMEMBERED_BYTES,
    ) -> None:
        self._owner = secrets.token_hex(4)
        self._max_remembered = max_remembered
        self._max_bytes = max_bytes
        self._size = 0
        self._remembered_seconds = remembered_seconds
        self._kept: dict[tuple[str, str], Record] = {}  # running or retained
        self._remembered: OrderedDict[tuple[str, str], Record] = OrderedDict()  # oldest end first

    def kept(self) -> tuple[Record, ...]:
        """Those that are under way or retained, now."""
        return tuple(self._kept.values())

    @property
    def size(self) -> int:
        """Bytes of memory of what is only remembered."""
        return self._size

    def current(self, caller: str, completion_id: str) -> Record | None:
        """The caller's completion of this id that is under way or retained."""
        return self._kept.get((caller, completion_id))

    def begin(self, caller: str, completion_id: str = "", fingerprint: bytes = b"") -> Record:
        """A new completion.

        Args:
            caller: Whose it is.
            completion_id: The caller's own; empty to mint one: "cmpl-", 32 hexadecimal digits that nobody can guess, "-", and
                eight that say which process made it.
            fingerprint: The same for equal requests.

        Raises:
            CallerError: COMPLETION_ALREADY_EXISTS: the caller has one of this id under way or retained.
        """
        key = (caller, completion_id or f"cmpl-{secrets.token_hex(16)}-{self._owner}")
        taken = self._kept.get(key)
        if taken is not None and not taken.is_abandoned:
            state = "is retained" if taken.ended else "is under way"
            raise CallerError(
                Reason.COMPLETION_ALREADY_EXISTS,
                f"completion {completion_id!r} {state}, with another request: choose another completion_id, or resume that one",
                metadata={"completion_id": completion_id},
            )
        self._drop(key)
        record = self._kept[key] = Record(*key, fingerprint)
        return record

    def end(self, record: Record, outcome: Outcome | None) -> None:
        """It has ended; without a retained stream it is only remembered from now on.

        Args:
            record: Which.
            outcome: Why it failed; `None` if it did not.
        """
        record.note()
        record.running = None
        record.outcome = outcome
        record.ended = True
        if record.stream is None:
            self._remember(record)

    def released(self, record: Record) -> None:
        """Its stream is no longer retained."""
        record.stream = None
        if record.ended:
            self._remember(record)

    def find(self, caller: str, completion_id: str) -> Record:
        """The caller's completion of this id.

        Raises:
            CallerError: COMPLETION_NOT_FOUND: it has none, whoever else may have one.
            GatewayError: WRONG_REPLICA: it has none here, and another process made the id.
        """
        self._forget()
        key = (caller, completion_id)
        record = self._kept.get(key) or self._remembered.get(key)
        if record is not None:
            return record
        metadata = {"completion_id": completion_id}
        generated = _GENERATED.fullmatch(completion_id)
        if generated and generated["owner"] != self._owner:
            raise GatewayError(
                Reason.WRONG_REPLICA,
                f"completion {completion_id!r} is of another gateway process, or of one before a restart: only that one has it",
                metadata=metadata,
            )
        raise CallerError(
            Reason.COMPLETION_NOT_FOUND, f"you have no completion {completion_id!r} here", metadata=metadata
        )

    def _remember(self, record: Record) -> None:
        key = (record.caller, record.completion_id)
        if self._kept.get(key) is record:
            del self._kept[key]
        record._ended_at = time.monotonic()
        record.shrink()
        self._drop(key)
        self._remembered[key] = record
        self._size += record.size
        self._forget()

    def _drop(self, key: tuple[str, str]) -> None:
        record = self._remembered.pop(key, None)
        if record is not None:
            self._size -= record.size

    def _forget(self) -> None:
        """Drop what has been remembered for long enough, and the oldest of too many or too large ones."""
        limit = time.monotonic() - self._remembered_seconds
        while self._remembered:
            key, oldest = next(iter(self._remembered.items()))
            fits = len(self._remembered) <= self._max_remembered and self._size <= self._max_bytes
            if fits and oldest._ended_at > limit:
                break
            self._drop(key)
