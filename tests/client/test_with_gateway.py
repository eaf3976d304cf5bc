"""The client and the gateway itself, rather than one that says what it is told to: what either promises, the other keeps."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import (
    AsyncClient,
    Client,
    EtagMismatchError,
    InvalidRequestError,
    ModelAlreadyExistsError,
    ModelDiscoveredError,
    ModelNotFoundError,
    ModelNotServedError,
    PermissionDeniedError,
    ProviderNotFoundError,
    RevisionGoneError,
    UnauthenticatedError,
    WatchBookmark,
)
from deltawire.v1.model_registry_pb2 import Model, ModelState, ModelType
from tests.gateways.support import client_watch, following
from tests.support.gateway import WAIT, running, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import StartGateway
    from tests.support.gateway import Running

READER, WRITER = "secret-of-the-reader", "secret-of-the-writer"
ACCESS = {"keys": f"reader read {READER}; writer change,read {WRITER}"}


@pytest.fixture
async def client(served: Running) -> AsyncIterator[AsyncClient]:
    """A client of a gateway, which has heard from its provider."""
    async with AsyncClient(served.address, timeout=WAIT) as connected:
        await connected.models.refresh()
        yield connected


async def test_an_update_keeps_what_it_does_not_name(client: AsyncClient) -> None:
    """Each field alone, all of them, back to nothing; times and etag say that something has changed."""
    notes = {"owner": "me"}
    model = await client.models.register("mine", provider_model_id="fake", aliases=["a"], annotations=notes)
    changed = await client.models.update(model, aliases=["b", "c"])
    assert (list(changed.aliases), dict(changed.annotations)) == (["b", "c"], notes)
    assert changed.etag != model.etag
    assert changed.create_time == model.create_time
    assert changed.update_time.ToNanoseconds() > model.update_time.ToNanoseconds()
    changed = await client.models.update("b", model_type="embedding", embedding_dimension=8, annotations={})
    assert (changed.type, changed.embedding_dimension) == (ModelType.MODEL_TYPE_EMBEDDING, 8)
    assert (list(changed.aliases), dict(changed.annotations)) == (["b", "c"], {})
    changed = await client.models.update("c", model_type="llm", embedding_dimension=None, aliases=[])
    assert (changed.type, changed.HasField("embedding_dimension"), list(changed.aliases)) == (
        ModelType.MODEL_TYPE_LLM,
        False,
        [],
    )
    assert await client.models.update("mine", aliases=[]) == changed
    assert await client.models.get("mine") == changed


async def test_an_etag_holds(client: AsyncClient) -> None:
    """A model as it was read is changed and removed only if nobody else has; the error says which etag it has now."""
    read = await client.models.register("mine", provider_model_id="fake")
    now = await client.models.update("mine", aliases=["a"])
    for stale in (client.models.update(read, aliases=["b"]), client.models.unregister("mine", etag=read.etag)):
        with pytest.raises(EtagMismatchError) as caught:
            await stale
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.metadata["etag"] == now.etag
    assert await client.models.get("a") == now
    assert list((await client.models.update(read, etag="", aliases=["b"])).aliases) == ["b"]
    await client.models.unregister("b", etag=(await client.models.get("b")).etag)
    with pytest.raises(ModelNotFoundError):
        await client.models.update("mine", aliases=["b"])


async def test_an_update_that_is_refused(client: AsyncClient) -> None:
    """Each for its own reason."""
    await client.models.register("mine", provider_model_id="fake")
    await client.models.register("other", provider_model_id="fake")
    with pytest.raises(ModelAlreadyExistsError) as taken:
        await client.models.update("mine", aliases=["other"])
    assert taken.value.metadata["model"] == "other"
    with pytest.raises(ModelNotServedError):
        await client.models.update("mine", provider_model_id="nobody-serves-this")
    with pytest.raises(ProviderNotFoundError):
        await client.models.update("mine", provider_id="nobody")
    with pytest.raises(InvalidRequestError) as invalid:
        await client.models.update("mine", model_type="embedding", aliases=["with space"])
    assert {each.field for each in invalid.value.violations} == {"model.embedding_dimension", "model.aliases[0]"}
    await client.models.unregister("mine")
    await client.models.unregister("other")
    with pytest.raises(ModelDiscoveredError):
        await client.models.update("vllm/fake", aliases=["b"])


async def test_filters(client: AsyncClient, vllm: FakeVllm) -> None:
    """Each lets through what it says, on every page; a provider that is down is named, and its models are unavailable."""
    for number in range(3):
        await client.models.register(f"chat-{number}", provider_model_id="fake")
    await client.models.register("vectors", provider_model_id="fake", model_type="embedding", embedding_dimension=8)

    async def listed(**filters: str) -> list[str]:
        # mypy cannot see that these are the names of the options.
        return [model.id async for model in client.models.list(page_size=1, **filters)]  # type: ignore[arg-type]

    chats = ["chat-0", "chat-1", "chat-2"]
    assert await listed() == [*chats, "vectors"]
    assert await listed(model_type="llm") == chats
    assert await listed(model_type="embedding", state="serving", source="registered", provider_id="vllm") == ["vectors"]
    assert await listed(source="discovered") == []
    assert await listed(state="unavailable") == []
    assert await listed(provider_id="nobody") == []
    await vllm.crash()
    [provider] = await client.models.refresh()
    assert (provider.provider_id, provider.model_count, bool(provider.error)) == ("vllm", 0, True)
    assert await listed(state="serving") == []
    assert await listed(state="unavailable", model_type="llm") == chats
    listing = client.models.list(source="registered")
    assert len([model async for model in listing]) == 4
    assert listing.unreachable_provider_ids == ["vllm"]


async def test_refresh(client: AsyncClient) -> None:
    """One provider, all of them, one that there is not."""
    for provider_id in ("vllm", ""):
        [provider] = await client.models.refresh(provider_id)
        assert (provider.provider_id, provider.model_count, provider.error) == ("vllm", 1, "")
    with pytest.raises(ProviderNotFoundError):
        await client.models.refresh("nobody")


async def test_the_blocking_client(served: Running) -> None:
    """The same calls, in the same way."""

    def call() -> None:
        with Client(served.address, timeout=WAIT) as client:
            client.models.refresh()
            with client.models.watch() as watch:
                assert [next(watch).model.id, type(next(watch))] == ["vllm/fake", WatchBookmark]  # type: ignore[union-attr]
                model = client.models.register("mine", provider_model_id="fake")
                changed = client.models.update(model, aliases=["a"])
                with pytest.raises(EtagMismatchError):
                    client.models.update(model, aliases=["b"])
                assert list(client.models.list(source="registered")) == [changed]
                client.models.unregister("a", etag=changed.etag)
                told = [next(watch) for _ in range(5)]
            assert [(each.change, each.model.etag) for each in told if each.model.id == "mine"] == [  # type: ignore[union-attr]
                ("ADDED", model.etag),
                ("MODIFIED", changed.etag),
                ("REMOVED", changed.etag),
            ]

    await asyncio.to_thread(call)


async def test_a_watch_goes_on_over_a_restart(vllm: FakeVllm, tmp_path: Path) -> None:
    """The gateway is replaced, and while it is away others write: what has become of each model is told once."""
    address, other = (f"unix:{tmp_path}/{name}" for name in ("gateway", "other"))

    def at(listen: str) -> AbstractAsyncContextManager[Running]:
        return running(settings_of(vllm.base_url, tmp_path, server={"listen": listen}))

    async with AsyncClient(address) as client, AsyncExitStack() as stack:
        async with at(address):
            await client.models.refresh()
            gone = await client.models.register("gone", provider_model_id="fake")
            changed = await client.models.register("changed", provider_model_id="fake")
            watch = await stack.enter_async_context(following(client_watch(client)))
            assert watch.models == {"gone": gone, "changed": changed}
        async with at(other), AsyncClient(other) as elsewhere:
            await elsewhere.models.refresh()
            await elsewhere.models.unregister("gone")
            changed = await elsewhere.models.update("changed", aliases=["a"])
            new = await elsewhere.models.register("new", provider_model_id="fake")
        async with at(address):
            await watch.until(lambda: watch.models == {"changed": changed, "new": new})
    told = [(change, model_id) for change, model_id, _ in watch.changes]
    # States come and go with the gateway, which has to ask its provider first; nothing else may be told twice.
    assert [each for each in told if each[0] != "MODIFIED"] == [("ADDED", "new"), ("REMOVED", "gone")]


async def test_a_program_goes_on_from_what_it_has_stored(start_gateway: StartGateway) -> None:
    """At the same gateway without a snapshot; at the next one, whose revisions are others, by what it knows."""
    async with start_gateway() as gateway, AsyncClient(gateway.address, timeout=WAIT) as client:
        await client.models.refresh()
        model = await client.models.register("mine", provider_model_id="fake")
        async with client.models.watch() as watch:
            assert isinstance([await anext(watch), await anext(watch)][1], WatchBookmark)
            stored = watch.revision
        await client.models.unregister("mine")
        async with client.models.watch(stored) as watch:
            told = [await anext(watch) for _ in range(3)]
        assert [getattr(each, "change", None) for each in told] == ["REMOVED", "ADDED", None]
    async with start_gateway() as gateway, AsyncClient(gateway.address, timeout=WAIT) as client:
        await client.models.refresh()
        with pytest.raises(RevisionGoneError):
            await anext(client.models.watch(stored))
        async with client.models.watch(stored, known=[model]) as watch:
            told = [await anext(watch) for _ in range(3)]
        assert [(getattr(each, "change", None), getattr(each, "model", Model()).id) for each in told] == [
            ("ADDED", "vllm/fake"),
            ("REMOVED", "mine"),
            (None, ""),
        ]
        assert told[0].model.state == ModelState.MODEL_STATE_SERVING  # type: ignore[union-attr]


async def test_who_may_not(start_gateway: StartGateway) -> None:
    """No key and a key that may not are told apart, also by a watch, which does not try again."""
    async with start_gateway(access=ACCESS) as gateway:
        async with AsyncClient(gateway.address, timeout=WAIT) as client:
            for unknown in (client.models.get("fake"), client.models.refresh(), anext(client.models.watch())):
                with pytest.raises(UnauthenticatedError):
                    await unknown
        async with AsyncClient(gateway.address, timeout=WAIT, token=READER) as client:
            await client.models.get("fake")
            async with client.models.watch() as watch:
                await anext(watch)
            for refused in (
                client.models.refresh(),
                client.models.register("mine", provider_model_id="fake"),
                client.models.update("mine", aliases=["a"]),
                client.models.unregister("mine"),
            ):
                with pytest.raises(PermissionDeniedError):
                    await refused
        async with AsyncClient(gateway.address, timeout=WAIT, token=WRITER) as client:
            await client.models.register("mine", provider_model_id="fake")
            await client.models.update("mine", aliases=["a"])
            await client.models.unregister("a")
