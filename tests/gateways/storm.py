"""Concurrent writes on several gateways, and a checker of their results.

The checker does not depend on the order in time: the database's change log has the registry after each change, and each call
runs between some of the changes. The result of a call must be correct at one of these moments, and each change must be what
some call requested.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import aio

from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.registry.model import ModelState
from deltawire_server.registry.store import ChangeKind, Store
from deltawire_server.rpc.model_registry import model_message
from tests.gateways.support import SERVED
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.store import Change
    from tests.gateways.support import Gateway
    from tests.support.gateway_process import GatewayProcess

AT_ONCE = 32
"""Calls under way at any time."""

IDS = (*(f"model-{number}" for number in range(12)), SERVED[0])
"""The last one is what its provider calls it, so it is registered as "vllm/llama"."""

NAMES = (*(f"name-{number}" for number in range(12)), *IDS[:4])
"""Aliases: some are other models' ids."""

SCOPED = {f"vllm/{name}": name for name in SERVED}
"""What is served, by its full name."""


@dataclass
class Call:
    """A write and its result.

    Attributes:
        kind: ADDED is a registration, MODIFIED an update, REMOVED a removal.
        name: The id or alias that it names.
        changes: The fields that it sets.
        etag: The condition; empty for none.
        started: The start, on the clock of this process.
        ended: The end.
        model: The returned model after a success; only its name after a removal.
        reason: The reason of its failure; empty after a success, and if the result is unknown.
        message: The message of the failure, for the output of a failed test.
    """

    kind: ChangeKind
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    etag: str = ""
    started: float = 0.0
    ended: float = 0.0
    model: pb.Model | None = None
    reason: str = ""
    message: str = ""

    @property
    def unknown(self) -> bool:
        """Whether the result is unknown, because the connection was lost."""
        return self.model is None and not self.reason


class Storm:
    """Sends random calls, each to one of the gateways.

    Args:
        gateways: On one database.
        seed: The same calls each time, though not at the same times.

    Attributes:
        gateways: Those of the calls that begin from now on.
        calls: All that have ended.
        under_way: How many have not, by where they were sent.
    """

    def __init__(self, gateways: Sequence[Gateway], seed: int) -> None:
        self.gateways = gateways
        self.calls: list[Call] = []
        self.under_way: Counter[GatewayProcess] = Counter()
        self._random = random.Random(seed)  # noqa: S311 (no secrets)
        self._etags: dict[str, list[str]] = {}
        self._there: set[str] = set()
        self._more = asyncio.Event()

    async def run(self, count: int) -> None:
        """Send this many calls, `AT_ONCE` at a time."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            async with slots:
                await self._make(self._random.choice(self.gateways), self._draw())

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one())

    async def until(self, count: int) -> None:
        """Wait until so many calls have ended."""
        async with asyncio.timeout(WAIT):
            while len(self.calls) < count:
                self._more.clear()
                await self._more.wait()

    def _draw(self) -> Call:
        draw = self._random
        kind = draw.choices(list(ChangeKind), (3, 4, 2))[0]
        if kind is ChangeKind.ADDED:
            name = draw.choice(IDS)
            # Each id has two registrations that are asked for again and again, so that some are there already.
            aliases = NAMES[len(name) :: 5] if draw.randrange(2) else ()
            changes: dict[str, Any] = {
                "provider_model_id": name if name in SERVED else draw.choice(SERVED[:2]),
                "aliases": tuple(each for each in aliases if each != name),
                "annotations": {},
            }
            return Call(kind, name, changes)
        name = draw.choice((*sorted(self._there), *NAMES[::4]))
        # A current etag, an old one, an unknown one, or none.
        etag = draw.choice(["", "", "r0", *self._etags.get(name, ())[-3:]])
        if kind is ChangeKind.REMOVED:
            return Call(kind, name, etag=etag)
        changes = {
            "aliases": tuple(draw.sample(NAMES, draw.randrange(3))),
            "provider_model_id": draw.choice(SERVED),
            "annotations": {"note": str(draw.randrange(2))},
        }
        return Call(
            kind, name, {each: changes[each] for each in draw.sample(sorted(changes), 1 + draw.randrange(2))}, etag
        )

    async def _make(self, gateway: Gateway, call: Call) -> None:
        self.under_way[gateway.process] += 1
        call.started = time.monotonic()
        try:
            call.model = await _send(gateway, call)
        except aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            call.reason = str(trailers.get("deltawire-reason", ""))
            call.message = error.details() or ""
        else:
            # As far as this caller knows: others' calls are under way.
            self._etags.setdefault(call.model.id, []).append(call.model.etag)
            (self._there.add if call.model.etag else self._there.discard)(call.model.id)
        self.under_way[gateway.process] -= 1
        call.ended = time.monotonic()
        self.calls.append(call)
        self._more.set()


async def _send(gateway: Gateway, call: Call) -> pb.Model:
    # One that is down at the moment is waited for.
    if call.kind is ChangeKind.ADDED:
        register = pb.RegisterModelRequest(model_id=call.name, **call.changes)
        return (await gateway.stub.RegisterModel(register, timeout=WAIT, wait_for_ready=True)).model
    if call.kind is ChangeKind.MODIFIED:
        changed = pb.Model(id=call.name, etag=call.etag, **call.changes)
        update = pb.UpdateModelRequest(model=changed, update_mask=FieldMask(paths=sorted(call.changes)))
        return (await gateway.stub.UpdateModel(update, timeout=WAIT, wait_for_ready=True)).model
    unregister = pb.UnregisterModelRequest(model_id=call.name, etag=call.etag)
    await gateway.stub.UnregisterModel(unregister, timeout=WAIT, wait_for_ready=True)
    return pb.Model(id=call.name)


class Checker:
    """Checks the result of each call and the cause of each change.

    Args:
        first: The revision before all calls, when nothing was registered.
        changes: All since then.
        calls: All that were made, and no others were.
    """

    def __init__(self, first: int, changes: Sequence[Change], calls: Sequence[Call]) -> None:
        self._first = first
        self._changes = {change.revision: change for change in changes}
        self._last = first + len(changes)
        self._calls = calls
        self._owners: list[dict[str, Model]] = [{}]
        for change in changes:
            self._owners.append(_after(self._owners[-1], change))
        # A revision is created during its own call, and before the end of any call that returned it.
        self._begun: dict[int, float] = {}
        self._known: dict[int, float] = {}
        for call in calls:
            if call.model is not None and call.model.etag:
                revision = int(call.model.etag[1:])
                self._begun[revision] = min(call.started, self._begun.get(revision, call.started))
                self._known[revision] = min(call.ended, self._known.get(revision, call.ended))
        for call in calls:
            if call.unknown:
                # It may have made any change of its kind, before another call returned the change.
                for change in changes:
                    if change.kind is call.kind and change.revision in self._begun:
                        self._begun[change.revision] = min(call.started, self._begun[change.revision])

    def check(self) -> None:
        """Check every call and every change.

        Raises:
            AssertionError: One of them was wrong.
        """
        for call in self._calls:
            if not call.unknown:
                assert any(self._right(call, revision) for revision in self._while(call)), f"not right: {call}"
        for change in self._changes.values():
            assert any(self._made(call, change) for call in self._calls), f"no call requested {change}"

    def _while(self, call: Call) -> range:
        """The revisions that may have been the last one at some moment of a call."""
        lowest = max((revision for revision, time in self._known.items() if time < call.started), default=self._first)
        highest = min((revision - 1 for revision, time in self._begun.items() if time > call.ended), default=self._last)
        return range(lowest, highest + 1)

    def _names(self, revision: int) -> dict[str, Model]:
        return self._owners[revision - self._first]

    def _right(self, call: Call, revision: int) -> bool:
        """Whether the result of a call is correct after this revision."""
        names = self._names(revision)
        owner = names.get(call.name)
        if call.reason in {"MODEL_NOT_FOUND", "MODEL_DISCOVERED"}:
            return call.kind is not ChangeKind.ADDED and owner is None
        if call.reason == "ETAG_MISMATCH":
            return bool(call.etag) and owner is not None and owner.etag != call.etag
        if call.reason == "INVALID_REQUEST":
            if owner is None:
                return False
            led_elsewhere = call.changes.get("provider_model_id", SCOPED.get(owner.id)) != SCOPED.get(owner.id)
            return owner.id in _names_of(call) or (
                owner.id in SCOPED and led_elsewhere
            )  # a provider's name is reserved
        if call.reason == "MODEL_ALREADY_EXISTS":
            model_id = _registered_as(call) if call.kind is ChangeKind.ADDED else owner.id if owner else ""
            owners = [names[each] for each in _names_of(call) if each in names]
            return any(each.id != model_id or not _as_asked(each, call) for each in owners)
        if call.reason:
            return False
        assert call.model is not None
        if call.kind is ChangeKind.REMOVED:
            return owner is None
        model = names.get(call.model.id)
        return (
            model is not None
            and model.etag == call.model.etag
            and model.aliases == tuple(call.model.aliases)
            and model.annotations == call.model.annotations
            and model.provider_model_id == call.model.provider_model_id
            and _as_asked(model, call)
        )

    def _made(self, call: Call, change: Change) -> bool:
        """Whether a change may be this call's."""
        assert change.model is not None
        if (
            call.kind is not change.kind
            or call.reason
            or (not call.unknown and change.revision not in self._while(call))
        ):
            return False
        before = self._names(change.revision - 1)
        if call.kind is ChangeKind.ADDED:
            named = _registered_as(call) == change.model_id
        else:
            owner = before.get(call.name)
            named = owner is not None and owner.id == change.model_id and call.etag in ("", owner.etag)
        etag_matches = (
            call.unknown or call.kind is ChangeKind.REMOVED or (call.model or pb.Model()).etag == change.model.etag
        )
        return named and etag_matches and (call.kind is ChangeKind.REMOVED or _as_asked(change.model, call))


def _after(names: dict[str, Model], change: Change) -> dict[str, Model]:
    """The model of each name after a change.

    Raises:
        AssertionError: The change is impossible after the previous ones.
    """
    assert change.model is not None
    rest = {name: model for name, model in names.items() if model.id != change.model_id}
    assert (len(rest) == len(names)) is (change.kind is ChangeKind.ADDED)
    if change.kind is ChangeKind.REMOVED:
        return rest
    own = dict.fromkeys(change.model.names, change.model)
    assert not own.keys() & rest.keys(), "a name has two owners"
    return rest | own


def _registered_as(call: Call) -> str:
    return f"vllm/{call.name}" if call.name in SERVED else call.name


def _names_of(call: Call) -> Iterable[str]:
    """The names that a call wants for its model."""
    own = [_registered_as(call)] if call.kind is ChangeKind.ADDED else []
    return (*own, *call.changes.get("aliases", ()))


def _as_asked(model: Model, call: Call) -> bool:
    """Whether a model has the fields that a call set."""
    return all(_plain(getattr(model, each)) == _plain(value) for each, value in call.changes.items())


def _plain(value: object) -> object:
    # The order of aliases means nothing.
    return set(value) if isinstance(value, tuple) else value


async def last_revision(database_url: str) -> int:
    """The revision of the last change in the database."""
    async with _open(database_url) as store:
        revision, _ = await store.load()
    return revision


async def in_database(database_url: str) -> dict[str, pb.Model]:
    """The models of the database by id, as listed while the provider serves all of them."""
    async with _open(database_url) as store:
        _, models = await store.load()
    return {model.id: model_message(replace(model, state=ModelState.SERVING)) for model in models}


async def changes_after(database_url: str, revision: int) -> list[Change]:
    """The change log of the database."""
    async with _open(database_url) as store:
        changes: list[Change] = []
        while page := await store.changes_after(revision + len(changes)):
            changes += page
    assert page is not None
    return changes


@asynccontextmanager
async def _open(database_url: str) -> AsyncIterator[Store]:
    store = Store(database_url)
    try:
        await store.open()
        yield store
    finally:
        await store.close()
