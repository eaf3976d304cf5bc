"""What fills the registry, and what it sends to those that watch it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from deltawire.v1 import model_registry_pb2 as pb
from tests.hostile.attack import Attack, Prepared
from tests.hostile.target import MODEL, MODELS

if TYPE_CHECKING:
    from tests.hostile.target import Target

_UPDATES = 300
_NOTES = {f"{number:02}": "x" * 4000 for number in range(16)}
"""As many as a model may have: 63 KiB."""
_WATCHERS = 16


def _named(name: str, **fields: object) -> bytes:
    request = pb.RegisterModelRequest(model_id=name, provider_model_id=MODEL, annotations=_NOTES, **fields)  # type: ignore[arg-type]
    return request.SerializeToString()


def updates(*, watched: bool) -> Prepared:
    """One model is changed again and again, each time with as many notes as it may have; others may watch."""
    requests = [
        pb.UpdateModelRequest(
            model=pb.Model(id="mine", annotations={**_NOTES, "00": f"{turn:04}{'y' * 4000}"}),
            update_mask=FieldMask(paths=["annotations"]),
        ).SerializeToString()
        for turn in range(_UPDATES)
    ]

    async def watch(target: Target) -> None:
        await target.call(f"{MODELS}WatchModels", b"")

    async def run(target: Target) -> Counter[str]:
        outcomes = Counter([await target.call(f"{MODELS}RegisterModel", _named("mine"))])
        outcomes.pop("ALREADY_EXISTS", None)  # from the round before
        watchers = [asyncio.create_task(watch(target)) for _ in range(_WATCHERS if watched else 0)]
        try:
            for request in requests:
                outcomes[await target.call(f"{MODELS}UpdateModel", request)] += 1
        finally:
            for watcher in watchers:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher
        return outcomes

    return Prepared(run, len(requests[0]))


def registrations() -> Prepared:
    """As many models with as many notes as there is room for, and more; and then a list of them."""
    requests = [_named(f"model-{number}") for number in range(150)]

    async def run(target: Target) -> Counter[str]:
        outcomes = Counter([await target.call(f"{MODELS}RegisterModel", request) for request in requests])
        listing = pb.ListModelsRequest(page_size=1000).SerializeToString()
        return outcomes + await target.calls(4, f"{MODELS}ListModels", listing)

    return Prepared(run, sum(map(len, requests)))


REGISTRY = (
    Attack(
        f"{_UPDATES} updates of a model with 63 KiB of notes",
        "registry",
        lambda: updates(watched=False),
        frozenset({"OK"}),
    ),
    Attack(
        f"{_UPDATES} updates of a model with 63 KiB of notes, and {_WATCHERS} watchers",
        "registry",
        lambda: updates(watched=True),
        frozenset({"OK"}),
    ),
    Attack(
        "150 models with 63 KiB of notes where there is room for 8 MiB",
        "registry",
        registrations,
        frozenset({"OK", "RESOURCE_EXHAUSTED"}),
        settings={"registry.max_bytes": str(8 * 1024 * 1024)},
    ),
)
