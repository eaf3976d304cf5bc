"""What the registry says of a model and what a chat with it does: one story, over a whole gateway."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.rpc.support import STATES, WatchCall, shown, take
from tests.support.gateway import ask, failure_of, read_badly, read_well, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway
    from tests.support.gateway import Running

CHUNKS = Chunks()


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A base model and a LoRA adapter of it."""
    async with FakeVllm(models=("base",), adapters=("sql",)) as vllm:
        yield vllm


async def until_shown(call: WatchCall, line: str) -> pb.Model:
    """Watch until a message says this; gives its model."""
    while True:
        messages = await take(call, 1)
        if shown(messages) == [line]:
            return messages[0].model


@asynccontextmanager
async def watching(gateway: Running) -> AsyncIterator[WatchCall]:
    """Watch until the end of the block."""
    call = gateway.models.WatchModels(pb.WatchModelsRequest())
    try:
        yield call
    finally:
        call.cancel()


async def test_an_adapter(served: Running, vllm: FakeVllm) -> None:
    """It is listed with its base, called like any other model, and its coming and going is told to watchers."""
    listed = (await served.models.ListModels(pb.ListModelsRequest())).models
    assert [(model.id, model.base_model, model.engine_root, STATES[model.state]) for model in listed] == [
        ("vllm/base", "", "/models/base", "SERVING"),
        ("vllm/sql", "base", "/adapters/sql", "SERVING"),
    ]
    assert (listed[0].max_context_tokens, listed[1].HasField("max_context_tokens")) == (4096, False)
    for name in ("sql", "vllm/sql"):
        assert text_of(await read_well(served.stream(ask(model=name))))
        assert vllm.chats[-1].body["model"] == "sql"
    async with watching(served) as call:
        await until_shown(call, "bookmark")
        vllm.load_adapter("poems")
        await served.models.RefreshModels(pb.RefreshModelsRequest())
        assert (await until_shown(call, "ADDED vllm/poems SERVING")).base_model == "base"
        request = pb.RegisterModelRequest(model_id="verse", provider_model_id="poems")
        assert (await served.models.RegisterModel(request)).model.base_model == "base"
        assert shown(await take(call, 2)) == ["ADDED verse SERVING", "REMOVED vllm/poems SERVING"]
        vllm.unload_adapter("poems")
        await served.models.RefreshModels(pb.RefreshModelsRequest())
        assert shown(await take(call, 1)) == ["MODIFIED verse UNAVAILABLE"]


async def test_a_chat_that_finds_a_model_gone(served: Running, vllm: FakeVllm) -> None:
    """The registry learns of it by that call, long before the next listing is due; and watchers by the registry."""
    await served.models.RegisterModel(pb.RegisterModelRequest(model_id="mine", provider_model_id="sql"))
    async with watching(served) as call:
        await until_shown(call, "bookmark")
        vllm.unload_adapter("sql")
        events, failure = await read_badly(served.stream(ask(model="mine")))
        assert (events, failure.code, failure.reason) == ([], grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert shown(await take(call, 1)) == ["MODIFIED mine UNAVAILABLE"]
    model = (await served.models.GetModel(pb.GetModelRequest(model_id="mine"))).model
    assert STATES[model.state] == "UNAVAILABLE"


async def test_a_discovered_model_that_a_chat_finds_gone(served: Running, vllm: FakeVllm) -> None:
    """It is not there any more, and the next call hears that from us, with what there is."""
    async with watching(served) as call:
        await until_shown(call, "bookmark")
        await served.models.RefreshModels(pb.RefreshModelsRequest())
        vllm.unload_adapter("sql")
        _, failure = await read_badly(served.stream(ask(model="sql")))
        assert failure.reason == "MODEL_NOT_FOUND"
        await until_shown(call, "REMOVED vllm/sql SERVING")
    chats = len(vllm.chats)
    _, failure = await read_badly(served.stream(ask(model="sql")))
    assert (failure.reason, len(vllm.chats)) == ("MODEL_NOT_FOUND", chats)
    assert "vllm/base" in failure.message


@pytest.mark.parametrize("begun", [True, False])
async def test_a_chat_that_finds_the_provider_gone(served: Running, vllm: FakeVllm, begun: bool) -> None:
    """Before the answer or in the midst of it: its models are UNAVAILABLE at once, and stay listed and callable."""
    async with watching(served) as call:
        await until_shown(call, "bookmark")
        await served.models.RefreshModels(pb.RefreshModelsRequest())
        if begun:
            vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("so far"), asyncio.Event()]))
            call_to_crash = served.stream(ask(model="sql"))
            await vllm.received()
            await asyncio.sleep(0.1)
        else:
            call_to_crash = served.stream(ask(model="sql"))
        await vllm.crash()
        _, failure = await read_badly(call_to_crash)
        assert failure.reason == ("UPSTREAM_INCOMPLETE" if begun else "UPSTREAM_UNAVAILABLE")
        await until_shown(call, "MODIFIED vllm/sql UNAVAILABLE")
        _, failure = await read_badly(served.stream(ask(model="sql")))
        assert failure.reason == "UPSTREAM_UNAVAILABLE"


async def test_a_model_that_the_operator_does_not_allow(start_gateway: StartGateway) -> None:
    """Is not listed, cannot be registered, and calling one that was registered before says why it is refused."""
    async with start_gateway() as gateway:
        await gateway.models.RegisterModel(pb.RegisterModelRequest(model_id="mine", provider_model_id="sql"))
    async with start_gateway(provider={"allowed_models": ["base"]}) as gateway:
        listed = (await gateway.models.ListModels(pb.ListModelsRequest())).models
        assert [(model.id, STATES[model.state]) for model in listed] == [
            ("mine", "UNAVAILABLE"),
            ("vllm/base", "SERVING"),
        ]
        _, failure = await read_badly(gateway.stream(ask(model="mine")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_SERVED")
        assert (failure.metadata["model"], failure.metadata["provider"]) == ("sql", "vllm")
        request = pb.RegisterModelRequest(model_id="other", provider_model_id="sql")
        assert (await failure_of(gateway.models.RegisterModel(request))).reason == "MODEL_NOT_SERVED"


@pytest.mark.parametrize(
    ("kind", "dimension", "name"),
    [(pb.MODEL_TYPE_EMBEDDING, 1024, "EMBEDDING"), (pb.MODEL_TYPE_RERANK, None, "RERANK")],
)
async def test_what_is_no_llm_does_not_chat(
    served: Running, vllm: FakeVllm, kind: pb.ModelType.ValueType, dimension: int | None, name: str
) -> None:
    """By whatever name and call, and its provider is not asked; once it is said to be an LLM, it does."""
    await served.models.RegisterModel(
        pb.RegisterModelRequest(
            model_id="mine", provider_model_id="base", aliases=["a"], type=kind, embedding_dimension=dimension
        )
    )
    request = chat_pb.CreateChatCompletionRequest(chat=ask(model="a"))
    for failure in (
        (await read_badly(served.stream(ask(model="mine"))))[1],
        await failure_of(served.chat.CreateChatCompletion(request)),
        (await read_badly(served.stream(ask(model="vllm/base"))))[1],
    ):
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_WRONG_TYPE")
        assert (failure.metadata["model"], failure.metadata["type"]) == ("mine", name)
    assert vllm.chats == []
    change = pb.UpdateModelRequest(model=pb.Model(id="mine"))
    change.update_mask.paths[:] = ["type", "embedding_dimension"]
    await served.models.UpdateModel(change)
    await read_well(served.stream(ask(model="mine")))
