"""The records of completions by id, from admission until some time after their end.

    begin ──▶ running ── end ──▶ retained, while its stream is retained ──▶ remembered ──▶ removed
                          └──────────── without a retained stream ─────────────┘

Each caller has its own ids: an id of another caller is not found. A remembered record has the outcome and the usage of a
completion, without data that a caller can make large. Number, memory and age of remembered records are bounded.
"""

from __future__ import annotations

import re
import secrets
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from sys import getsizeof
from typing import TYPE_CHECKING

from deltawire_server.completions.info import NOTHING_YET, ActiveCompletion, CompletionInfo, Outcome
from deltawire_server.errors import CallerError, Code, DeltawireError, GatewayError, Reason
from deltawire_server.sansio.events import StopReason, Usage
from deltawire_server.upstream.request import Sampling

if TYPE_CHECKING:
    from deltawire_server.completions.retention import RetainedStream
    from deltawire_server.sansio.events import Fault

MAX_REMEMBERED = 10_000
"""Limit for remembered records: some minutes of a busy process. One takes about 1.5 KiB."""

MAX_REMEMBERED_BYTES = 32 * 1024 * 1024
"""Memory limit for all remembered records. Each takes at most 8 KiB (ids, names, a message, short lists of the sampling), so there
is room for at least 4,096."""

RECORD_BYTES = 1536
"""Memory of a record without its texts: the objects and their slots in tables."""

MAX_MESSAGE = 1024
"""Limit for a remembered error message in bytes; responses do not have more of it either."""

MAX_LISTS_BYTES = 2048
"""Memory limit for the texts and lists of the sampling; larger ones are dropped. Callers usually send less."""

REMEMBERED_SECONDS = 600.0
"""How long a record is remembered: enough for a caller that lost its connection to look up the result."""

_LISTS = (tuple, Mapping)
"""The types of the values of a sampling that a caller can make large."""

_GENERATED = re.compile(r"cmpl-[0-9a-f]{32}-([0-9a-f]{8})")


def mark_of(completion_id: str) -> str:
    """The eight digits of a generated id that identify the process that generated it; empty for an id of another form."""
    generated = _GENERATED.fullmatch(completion_id)
    return generated[1] if generated else ""


@dataclass(slots=True)
class Record:
    """The record of one completion.

    Attributes:
        caller: The caller; empty if callers are not distinguished.
        completion_id: The id, unique for the caller.
        fingerprint: The same for equal requests; empty for a generated id, which no other request can have.
        label: The caller's name for operators; several callers may have had it.
        created: When it was admitted, as Unix time in microseconds; unique in this process.
        ended_at: When it ended, as Unix time in seconds; `None` before.
        running: The completion while it is running and its model is resolved.
        begun: Whether the answer began; set at the end.
        head: The fixed data; set when the model is resolved.
        usage: The total usage; set at the end.
        replica: The address of the last replica that was asked; set at the end.
        time_limit: Seconds after which it is ended at the latest; set when the model is resolved.
        stop_reasons: Those of its choices; set at the end.
        outcome: The error, if it failed.
        ended: Whether it has ended.
        stream: Its retained stream, if any.
        size: Memory in bytes; set when it is only remembered.
        assertion: From `access.Trust`, if a trusted proxy asserts who the caller is.
    """

    caller: str
    completion_id: str
    fingerprint: bytes = b""
    label: str = ""
    created: int = 0
    ended_at: float | None = None
    running: ActiveCompletion | None = None
    head: CompletionInfo | None = None
    begun: bool = False
    usage: Usage = NOTHING_YET
    replica: str = ""
    time_limit: float | None = None
    stop_reasons: tuple[StopReason, ...] = ()
    outcome: Outcome | None = None
    ended: bool = False
    stream: RetainedStream | None = None
    size: int = 0
    assertion: str = ""
    _stop_asked: bool = False
    _fault: Fault | None = None
    _ended_at: float = field(default=0.0, repr=False)

    @property
    def is_abandoned(self) -> bool:
        """Whether its stream lost its last reader and generation is being stopped: its id may be used again."""
        return bool(self.fingerprint) and self.stream is None and not self.ended

    def run(self, running: ActiveCompletion) -> None:
        """Set the running completion. An earlier `cancel` or `fail` takes effect now."""
        self.running = running
        self.head = running.head
        self.time_limit = running.time_limit
        if self.stream is not None:
            self.stream.run(running)
        if self._stop_asked:
            running.stop(StopReason.CANCELLED)
        if self._fault is not None:
            running.end(self._fault)

    def fail(self, fault: Fault) -> None:
        """End it with a fault, now or as soon as it is running. No effect after its end."""
        self._fault = fault
        if self.running is not None:
            self.running.end(fault)

    def cancel(self) -> None:
        """End it without a fault, now or as soon as it is running. No effect after its end."""
        self._stop_asked = True
        if self.running is not None:
            self.running.stop(StopReason.CANCELLED)

    def note(self) -> None:
        """Copy the results of the running completion, which is about to be removed."""
        if self.running is not None:
            self.usage = self.running.usage
            self.begun = self.running.begun
            self.replica = self.running.attempts.base_url
            self.stop_reasons = self.running.stop_reasons

    def shrink(self) -> None:
        """Drop what is not remembered of an ended completion, and set `size`."""
        if self.outcome is not None:
            message = self.outcome.message.encode(errors="replace")[:MAX_MESSAGE].decode(errors="ignore")
            self.outcome = replace(self.outcome, message=message)
        lists = 0 if self.head is None else _lists_bytes(self.head.sampling)
        if self.head is not None and lists > MAX_LISTS_BYTES:
            lists = 0
            scalars = {name: each for name, each in self.head.sampling.given().items() if not isinstance(each, _LISTS)}
            self.head = replace(self.head, sampling=Sampling(**scalars))
        texts = [self.caller, self.completion_id, self.label]
        if self.outcome is not None:
            texts.append(self.outcome.message)
        if self.head is not None:
            texts += [self.head.model, self.head.alias, self.head.provider_id]
        self.size = RECORD_BYTES + lists + sum(map(getsizeof, texts))


def _lists_bytes(sampling: Sampling) -> int:
    """Memory of a sampling's texts and lists; each entry of a table takes two numbers and a slot."""
    lists = [value for value in sampling.given().values() if isinstance(value, _LISTS)]
    return sum(
        128 * len(value) if isinstance(value, Mapping) else sum(8 + getsizeof(entry) for entry in value)
        for value in lists
    )


def lost(completion_id: str, code: Code | None = None, retry_after: float | None = None) -> GatewayError:
    """The error for a completion whose worker process has ended: COMPLETION_GONE.

    Args:
        completion_id: Its id.
        code: The status code; by default that of the reason.
        retry_after: Seconds after which it may be started again.
    """
    return GatewayError(
        Reason.COMPLETION_GONE,
        f"completion {completion_id!r} is lost: the worker process that had it has ended; start the completion again",
        code=code,
        metadata={"completion_id": completion_id},
        retry_after=retry_after,
    )


class Records:
    """The records of this process.

    Args:
        max_remembered: Limit for remembered records; retained ones do not count.
        remembered_seconds: How long they are remembered.
        max_bytes: Memory limit for them.
        mark: Eight hexadecimal digits that identify this process; random if empty.
        seat: The first of them, if processes with the same first digits preceded this one and have ended.
    """

    def __init__(
        self,
        max_remembered: int = MAX_REMEMBERED,
        remembered_seconds: float = REMEMBERED_SECONDS,
        max_bytes: int = MAX_REMEMBERED_BYTES,
        *,
        mark: str = "",
        seat: str = "",
    ) -> None:
        self.mark = mark or secrets.token_hex(4)
        """Eight hexadecimal digits that identify this process."""
        self._seat = seat
        self._max_remembered = max_remembered
        self._max_bytes = max_bytes
        self._size = 0
        self._remembered_seconds = remembered_seconds
        self._kept: dict[tuple[str, str], Record] = {}  # running or retained
        self._created: dict[int, Record] = {}  # all, oldest first
        self._last_created = 0
        self._remembered: OrderedDict[tuple[str, str], Record] = OrderedDict()  # oldest end first

    def kept(self) -> tuple[Record, ...]:
        """The running and retained completions."""
        return tuple(self._kept.values())

    @property
    def size(self) -> int:
        """Memory of remembered records, in bytes."""
        return self._size

    def current(self, caller: str, completion_id: str) -> Record | None:
        """The caller's running or retained completion of this id."""
        return self._kept.get((caller, completion_id))

    def newest(self, before: int | None = None) -> list[Record]:
        """All records, newest first; with `before`, only those whose `created` is lower."""
        self._forget()
        created = list(self._created)
        if before is not None:
            del created[bisect_left(created, before) :]
        return [self._created[each] for each in reversed(created)]

    def begin(self, caller: str, completion_id: str = "", fingerprint: bytes = b"", label: str = "") -> Record:
        """Add a record for a new completion.

        Args:
            caller: The caller.
            completion_id: The caller's own id; empty to generate one: "cmpl-", 32 random hexadecimal digits, "-", and eight
                hexadecimal digits that identify this process.
            fingerprint: The same for equal requests.
            label: The caller's name for operators.

        Raises:
            CallerError: COMPLETION_ALREADY_EXISTS: the caller has a running or retained completion of this id.
        """
        key = (caller, completion_id or f"cmpl-{secrets.token_hex(16)}-{self.mark}")
        taken = self._kept.get(key)
        if taken is not None and not taken.is_abandoned:
            state = "is retained" if taken.ended else "is running"
            raise CallerError(
                Reason.COMPLETION_ALREADY_EXISTS,
                f"completion {completion_id!r} {state} with another request: use another completion_id, or resume that completion",
                metadata={"completion_id": completion_id},
            )
        self._drop(key)
        # Unique and increasing, also if the clock is set back.
        self._last_created = max(time.time_ns() // 1000, self._last_created + 1)
        record = self._kept[key] = Record(*key, fingerprint, label, self._last_created)
        self._created[record.created] = record
        return record

    def end(self, record: Record, outcome: Outcome | None) -> None:
        """Record the end of a completion. Without a retained stream it is only remembered from now on.

        Args:
            record: The record.
            outcome: The error; `None` without one.
        """
        record.note()
        record.running = None
        record.outcome = outcome
        record.ended = True
        record.ended_at = time.time()
        if record.stream is None:
            self._remember(record)

    def released(self, record: Record) -> None:
        """Record that its stream was dropped."""
        record.stream = None
        if record.ended:
            self._remember(record)

    def find(self, caller: str, completion_id: str) -> Record:
        """The caller's completion of this id. Operators may use `find_any` if there is none.

        Raises:
            CallerError: COMPLETION_NOT_FOUND: the caller has no completion of this id; another caller may have one.
            GatewayError: WRONG_REPLICA: the caller has none here, and another process generated the id. COMPLETION_GONE: that
                process has ended, and this one replaces it.
        """
        self._forget()
        key = (caller, completion_id)
        record = self._kept.get(key) or self._remembered.get(key)
        if record is None:
            raise self._unknown(completion_id, f"you have no completion {completion_id!r} here")
        return record

    def find_any(self, completion_id: str, label: str = "") -> Record:
        """The newest completion of this id, of any caller.

        Args:
            completion_id: The id.
            label: The caller's name; if empty, only a generated id is found, because several callers may have chosen an id.

        Raises:
            DeltawireError: As for `find`.
        """
        if label or mark_of(completion_id):
            for record in self.newest():
                if record.completion_id == completion_id and label in ("", record.label):
                    return record
        message = f"{label} has no completion {completion_id!r} here"
        if not label:
            message = f"you have no completion {completion_id!r} here: to find that of another caller, set caller"
        raise self._unknown(completion_id, message)

    def _unknown(self, completion_id: str, message: str) -> DeltawireError:
        """The error for an id that is not here."""
        metadata = {"completion_id": completion_id}
        mark = mark_of(completion_id)
        if mark and mark != self.mark:
            if self._seat and mark.startswith(self._seat):
                return lost(completion_id)
            return GatewayError(
                Reason.WRONG_REPLICA,
                f"completion {completion_id!r} belongs to another gateway process, or to this one before a restart",
                metadata=metadata,
            )
        return CallerError(Reason.COMPLETION_NOT_FOUND, message, metadata=metadata)

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
            del self._created[record.created]

    def _forget(self) -> None:
        """Drop expired records, and the oldest ones beyond the limits."""
        limit = time.monotonic() - self._remembered_seconds
        while self._remembered:
            key, oldest = next(iter(self._remembered.items()))
            fits = len(self._remembered) <= self._max_remembered and self._size <= self._max_bytes
            if fits and oldest._ended_at > limit:
                break
            self._drop(key)
