"""The ModelRegistry service's unary calls, over a real server: what goes over the wire, and how calls fail."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.errors import ProviderError, Reason
from deltawire_server.registry import pages
from deltawire_server.registry.feed import Step
from deltawire_server.registry.model import Model, ModelSource, ModelState, ModelType
from deltawire_server.registry.pages import PageRequest
from deltawire_server.registry.registry import _bytes_of
from deltawire_server.registry.store import ChangeKind
from deltawire_server.rpc.model_registry import (
    model_message,
    step_message,
)
from deltawire_server.upstream.base import HealthStatus, ServedModel
from deltawire_server.upstream.engine import Engine, EngineKind
from deltawire_server.upstream.vllm_api import MAX_DOCUMENT_BYTES
from tests.rpc.support import STATES, Served, serving
from tests.support.contract import MAX_MESSAGE_BYTES
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import Failure, failure_of

if TYPE_CHECKING:
    import enum
    from collections.abc import AsyncIterator, Awaitable

    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

    from deltawire.v1 import model_registry_pb2_grpc as pb_grpc

Code = grpc.StatusCode
INVALID = (Code.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.fixture
def alpha() -> FakeProvider:
    """Serves a model of which all is known, and one of which nothing is."""
    lora = ServedModel("lora", engine_root="/adapters/lora", base_model="llama", max_context_tokens=4096)
    return FakeProvider("alpha", ["llama", lora])


@pytest.fixture
def beta() -> FakeProvider:
    """Serves nothing."""
    return FakeProvider("beta")


@pytest.fixture
async def served(alpha: FakeProvider, beta: FakeProvider) -> AsyncIterator[Served]:
    """A real server over both providers."""
    async with serving(alpha, beta) as served:
        yield served


@pytest.fixture
def stub(served: Served) -> pb_grpc.ModelRegistryAsyncStub:
    """A client of it."""
    return served.stub


@pytest.fixture
async def mine(stub: pb_grpc.ModelRegistryAsyncStub) -> pb.Model:
    """A registered model with everything that an LLM can have."""
    request = pb.RegisterModelRequest(
        model_id="mine", provider_id="alpha", provider_model_id="llama", aliases=["a", "b"], annotations={"k": "v"}
    )
    return (await stub.RegisterModel(request)).model


def told(failure: Failure) -> tuple[Code, str]:
    """The code and the reason of a failure."""
    return failure.code, failure.reason


def without_request_id(failure: Failure) -> dict[str, str]:
    """What else a failure's metadata say."""
    return {key: value for key, value in failure.metadata.items() if key != "request_id"}


def ids(response: pb.ListModelsResponse) -> list[str]:
    """Of a page."""
    return [model.id for model in response.models]


async def test_a_model_from_registration_to_its_end(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """Every field goes over the wire, in each answer alike; afterwards only what is served is left."""
    response = await stub.RegisterModel(
        pb.RegisterModelRequest(
            model_id="mine",
            provider_id="alpha",
            provider_model_id="lora",
            type=pb.MODEL_TYPE_EMBEDDING,
            aliases=["a", "b"],
            annotations={"k": "v"},
            embedding_dimension=1024,
        )
    )
    model = response.model
    assert model.create_time.seconds > 1_700_000_000
    assert model == pb.Model(
        id="mine",
        provider_id="alpha",
        provider_model_id="lora",
        type=pb.MODEL_TYPE_EMBEDDING,
        aliases=["a", "b"],
        annotations={"k": "v"},
        source=pb.MODEL_SOURCE_REGISTERED,
        max_context_tokens=4096,
        engine_root="/adapters/lora",
        base_model="llama",
        create_time=model.create_time,
        update_time=model.create_time,
        state=pb.MODEL_STATE_SERVING,
        etag=model.etag,
        embedding_dimension=1024,
    )
    assert re.fullmatch(r"r[0-9]+", model.etag)
    assert (await stub.GetModel(pb.GetModelRequest(model_id="b"))).model == model
    listed = await stub.ListModels(pb.ListModelsRequest())
    assert listed == pb.ListModelsResponse(
        models=[
            pb.Model(
                id="alpha/llama",
                provider_id="alpha",
                provider_model_id="llama",
                type=pb.MODEL_TYPE_LLM,
                source=pb.MODEL_SOURCE_DISCOVERED,
                state=pb.MODEL_STATE_SERVING,
            ),
            model,
        ]
    )
    assert not listed.models[0].HasField("max_context_tokens")
    assert not listed.models[0].HasField("create_time")
    assert listed.models[0].etag == ""
    assert not listed.models[0].HasField("embedding_dimension")
    assert await stub.UnregisterModel(pb.UnregisterModelRequest(model_id="a")) == pb.UnregisterModelResponse()
    left = await stub.ListModels(pb.ListModelsRequest())
    assert ids(left) == ["alpha/llama", "alpha/lora"]


async def test_an_unspecified_type_is_llm(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """And the provider's own name is scoped."""
    response = await stub.RegisterModel(pb.RegisterModelRequest(model_id="llama", provider_id="alpha"))
    assert (response.model.id, response.model.type) == ("alpha/llama", pb.MODEL_TYPE_LLM)


async def test_every_violated_field_is_named(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """An enum's number that this gateway does not know is among them."""
    number: Any = 9
    failure = await failure_of(stub.RegisterModel(pb.RegisterModelRequest(aliases=[""], type=number)))
    assert told(failure) == INVALID
    assert failure.fields == ["model_id", "provider_id", "type", "aliases[0]"]
    assert without_request_id(failure) == {"field": "model_id"}


@pytest.mark.parametrize(
    ("kind", "dimension", "wrong"),
    [
        (pb.MODEL_TYPE_EMBEDDING, None, True),
        (pb.MODEL_TYPE_EMBEDDING, 0, True),
        (pb.MODEL_TYPE_EMBEDDING, 1, False),
        (pb.MODEL_TYPE_EMBEDDING, 2**31 - 1, False),
        (pb.MODEL_TYPE_LLM, 1024, True),
        (pb.MODEL_TYPE_UNSPECIFIED, 1024, True),
        (pb.MODEL_TYPE_RERANK, 1024, True),
        (pb.MODEL_TYPE_RERANK, None, False),
    ],
)
async def test_a_dimension_is_for_embedding_models(
    stub: pb_grpc.ModelRegistryAsyncStub, kind: pb.ModelType.ValueType, dimension: int | None, wrong: bool
) -> None:
    """For them it is required, and has to be a number of numbers; for others it has no meaning."""
    request = pb.RegisterModelRequest(model_id="llama", provider_id="alpha", type=kind, embedding_dimension=dimension)
    if wrong:
        failure = await failure_of(stub.RegisterModel(request))
        assert (told(failure), failure.fields) == (INVALID, ["embedding_dimension"])
    else:
        model = (await stub.RegisterModel(request)).model
        assert (model.type, model.HasField("embedding_dimension")) == (kind, dimension is not None)
        assert model.embedding_dimension == (dimension or 0)


async def test_required_fields(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """What names nothing is a broken rule and not an unknown name."""
    calls: list[tuple[Awaitable[object], str]] = [
        (stub.GetModel(pb.GetModelRequest()), "model_id"),
        (stub.UpdateModel(pb.UpdateModelRequest()), "model.id"),
        (stub.UnregisterModel(pb.UnregisterModelRequest()), "model_id"),
        (stub.CheckProviderHealth(pb.CheckProviderHealthRequest()), "provider_id"),
    ]
    for call, field in calls:
        failure = await failure_of(call)
        assert (told(failure), failure.fields) == (INVALID, [field])


async def test_failures_keep_their_codes_reasons_and_values(
    stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """What the registry raises is what the caller gets, with the values that `error_reason.proto` names."""
    register = pb.RegisterModelRequest(model_id="mine", provider_id="alpha", provider_model_id="llama")
    await stub.RegisterModel(register)
    register.annotations["k"] = "v"
    beta.served = ["lora"]
    unserved = pb.RegisterModelRequest(model_id="x", provider_id="alpha")
    calls: list[tuple[Awaitable[object], Code, str, dict[str, str]]] = [
        (
            stub.RegisterModel(register),
            Code.ALREADY_EXISTS,
            "MODEL_ALREADY_EXISTS",
            {"model": "mine", "name": "mine"},
        ),
        (
            stub.RegisterModel(unserved),
            Code.FAILED_PRECONDITION,
            "MODEL_NOT_SERVED",
            {"model": "x", "provider": "alpha"},
        ),
        (stub.GetModel(pb.GetModelRequest(model_id="x")), Code.NOT_FOUND, "MODEL_NOT_FOUND", {"model": "x"}),
        (
            stub.GetModel(pb.GetModelRequest(model_id="lora")),
            Code.FAILED_PRECONDITION,
            "MODEL_AMBIGUOUS",
            {"model": "lora", "providers": "alpha, beta"},
        ),
        (
            stub.UnregisterModel(pb.UnregisterModelRequest(model_id="alpha/lora")),
            Code.FAILED_PRECONDITION,
            "MODEL_DISCOVERED",
            {"model": "alpha/lora"},
        ),
        (
            stub.CheckProviderHealth(pb.CheckProviderHealthRequest(provider_id="x")),
            Code.NOT_FOUND,
            "PROVIDER_NOT_FOUND",
            {"provider": "x"},
        ),
    ]
    for call, code, reason, metadata in calls:
        failure = await failure_of(call)
        assert (failure.code, failure.reason, without_request_id(failure)) == (code, reason, metadata)
    alpha.go_down()
    beta.go_down()
    failure = await failure_of(stub.GetModel(pb.GetModelRequest(model_id="x")))
    assert told(failure) == (Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")
    assert failure.retry_seconds is not None


async def test_pages(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """A page's token leads to the next one; providers that are away are named on each."""
    beta.go_down()
    first = await stub.ListModels(pb.ListModelsRequest(page_size=1))
    assert (ids(first), list(first.unreachable_provider_ids)) == (["alpha/llama"], ["beta"])
    second = await stub.ListModels(pb.ListModelsRequest(page_size=1, page_token=first.next_page_token))
    assert (ids(second), second.next_page_token) == (["alpha/lora"], "")
    assert list(second.unreachable_provider_ids) == ["beta"]
    failure = await failure_of(stub.ListModels(pb.ListModelsRequest(page_size=-1, page_token="!")))
    assert (told(failure), failure.fields) == (INVALID, ["page_size", "page_token"])


async def _a_mixed_registry(served: Served, alpha: FakeProvider, beta: FakeProvider) -> None:
    """Of every type, state and source something: see what `test_each_filter` expects of it."""
    for model_id, provider, name, kind, dimension in [
        ("chat", "alpha", "llama", pb.MODEL_TYPE_LLM, None),
        ("embed", "alpha", "lora", pb.MODEL_TYPE_EMBEDDING, 3),
        ("rank", "beta", "m", pb.MODEL_TYPE_RERANK, None),
    ]:
        beta.served = ["m", "n"]
        await served.stub.RegisterModel(
            pb.RegisterModelRequest(
                model_id=model_id,
                provider_id=provider,
                provider_model_id=name,
                type=kind,
                embedding_dimension=dimension,
            )
        )
    alpha.served = ["llama", "x", "y"]
    await served.stub.RefreshModels(pb.RefreshModelsRequest())
    beta.go_down()
    await served.stub.RefreshModels(pb.RefreshModelsRequest(provider_id="beta"))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["alpha/x", "alpha/y", "beta/n", "chat", "embed", "rank"]),
        ({"provider_id": "alpha"}, ["alpha/x", "alpha/y", "chat", "embed"]),
        ({"provider_id": "beta"}, ["beta/n", "rank"]),
        ({"provider_id": "gamma"}, []),
        ({"type": pb.MODEL_TYPE_LLM}, ["alpha/x", "alpha/y", "beta/n", "chat"]),
        ({"type": pb.MODEL_TYPE_EMBEDDING}, ["embed"]),
        ({"type": pb.MODEL_TYPE_RERANK}, ["rank"]),
        ({"state": pb.MODEL_STATE_SERVING}, ["alpha/x", "alpha/y", "chat"]),
        ({"state": pb.MODEL_STATE_UNAVAILABLE}, ["beta/n", "embed", "rank"]),
        ({"state": pb.MODEL_STATE_UNKNOWN}, []),
        ({"source": pb.MODEL_SOURCE_REGISTERED}, ["chat", "embed", "rank"]),
        ({"source": pb.MODEL_SOURCE_DISCOVERED}, ["alpha/x", "alpha/y", "beta/n"]),
        (
            {"provider_id": "alpha", "type": pb.MODEL_TYPE_LLM, "source": pb.MODEL_SOURCE_DISCOVERED},
            ["alpha/x", "alpha/y"],
        ),
        ({"state": pb.MODEL_STATE_UNAVAILABLE, "source": pb.MODEL_SOURCE_REGISTERED}, ["embed", "rank"]),
    ],
)
async def test_each_filter(
    served: Served, alpha: FakeProvider, beta: FakeProvider, filters: dict[str, Any], expected: list[str]
) -> None:
    """Alone and together, on one page and on pages of one: what is shown is what passes all of them."""
    await _a_mixed_registry(served, alpha, beta)
    whole = await served.stub.ListModels(pb.ListModelsRequest(**filters))
    assert ids(whole) == expected
    paged: list[str] = []
    token = ""
    while True:
        page = await served.stub.ListModels(pb.ListModelsRequest(page_size=1, page_token=token, **filters))
        paged += ids(page)
        token = page.next_page_token
        if not token:
            break
        assert len(page.models) == 1
    assert paged == expected


@pytest.mark.parametrize("field", ["type", "state", "source"])
async def test_a_filter_s_unknown_number(stub: pb_grpc.ModelRegistryAsyncStub, field: str) -> None:
    """Is a mistake, which a list of everything or nothing would hide; the message says what there is."""
    wanted: dict[str, Any] = {field: 9}
    failure = await failure_of(stub.ListModels(pb.ListModelsRequest(**wanted)))
    assert (told(failure), failure.fields) == (INVALID, [field])
    assert f"{field}: 9" in failure.message
    assert "1 (" in failure.message


async def test_a_provider_that_is_filtered_out_is_not_asked(
    stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """Nor named as one that did not answer."""
    beta.go_down()
    response = await stub.ListModels(pb.ListModelsRequest(provider_id="alpha"))
    assert (len(alpha.tokens), len(beta.tokens)) == (1, 0)
    assert list(response.unreachable_provider_ids) == []


async def test_states(stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, alpha: FakeProvider) -> None:
    """A model's state follows what its provider last said, in each answer alike."""

    async def states() -> dict[str, str]:
        listed = (await stub.ListModels(pb.ListModelsRequest())).models
        for model in listed:
            assert (await stub.GetModel(pb.GetModelRequest(model_id=model.id))).model == model
        return {model.id: STATES[model.state] for model in listed}

    assert STATES[mine.state] == "SERVING"
    assert await states() == {"mine": "SERVING", "alpha/lora": "SERVING"}
    alpha.served = ["lora"]
    assert await states() == {"mine": "UNAVAILABLE", "alpha/lora": "SERVING"}
    alpha.go_down()
    assert await states() == {"mine": "UNAVAILABLE", "alpha/lora": "UNAVAILABLE"}
    alpha.failure, alpha.served = None, ["llama"]
    assert await states() == {"mine": "SERVING"}


async def test_updating_each_field(stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, beta: FakeProvider) -> None:
    """Only what the mask names is taken over, and lists and maps as a whole; the answer is what is stored."""
    beta.served = ["mistral"]
    steps: list[tuple[list[str], dict[str, Any], dict[str, Any]]] = [
        (["aliases"], {"aliases": ["c"], "annotations": {"ignored": "x"}}, {"aliases": ["c"]}),
        (["annotations"], {"annotations": {"n": "1"}}, {"annotations": {"n": "1"}}),
        (["annotations"], {}, {"annotations": {}}),
        (["aliases"], {}, {"aliases": []}),
        (["type"], {"type": pb.MODEL_TYPE_RERANK}, {"type": pb.MODEL_TYPE_RERANK}),
        (["type"], {}, {"type": pb.MODEL_TYPE_LLM}),
        (
            ["type", "embedding_dimension"],
            {"type": pb.MODEL_TYPE_EMBEDDING, "embedding_dimension": 8},
            {"type": pb.MODEL_TYPE_EMBEDDING, "embedding_dimension": 8},
        ),
        (["embedding_dimension"], {"embedding_dimension": 16}, {"embedding_dimension": 16}),
        (
            ["provider_id", "provider_model_id"],
            {"provider_id": "beta", "provider_model_id": "mistral"},
            {"provider_id": "beta", "provider_model_id": "mistral"},
        ),
    ]
    expected, etags = pb.Model(), {mine.etag}
    expected.CopyFrom(mine)
    for paths, fields, new in steps:
        request = pb.UpdateModelRequest(model=pb.Model(id="mine", **fields), update_mask=FieldMask(paths=paths))
        updated = (await stub.UpdateModel(request)).model
        for name in new:
            expected.ClearField(name)  # type: ignore[arg-type]
        expected.MergeFrom(pb.Model(**new))
        assert updated.update_time.ToDatetime() >= expected.update_time.ToDatetime()
        expected.update_time.CopyFrom(updated.update_time)
        assert updated.etag not in etags
        etags.add(updated.etag)
        expected.etag = updated.etag
        assert updated == expected
        assert (await stub.GetModel(pb.GetModelRequest(model_id="mine"))).model == expected
    assert expected.create_time == mine.create_time


@pytest.mark.usefixtures("mine")
async def test_an_empty_mask_takes_over_what_is_set(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """What is not set stays; of what cannot be changed nothing is taken, so that a model that was read can be sent back."""
    request = pb.UpdateModelRequest(
        model=pb.Model(id="a", annotations={"k": "new"}, engine_root="/etc", base_model="x")
    )
    updated = (await stub.UpdateModel(request)).model
    assert (dict(updated.annotations), list(updated.aliases)) == ({"k": "new"}, ["a", "b"])
    assert (updated.id, updated.engine_root, updated.base_model) == ("mine", "", "")
    updated.annotations["k"] = "newer"
    again = (await stub.UpdateModel(pb.UpdateModelRequest(model=updated))).model
    assert dict(again.annotations) == {"k": "newer"}


@pytest.mark.usefixtures("mine")
async def test_a_star_takes_over_everything(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """What is not set is cleared; and so where it leads has to be said."""
    star = FieldMask(paths=["*"])
    model = pb.Model(id="mine", provider_id="alpha", provider_model_id="llama")
    updated = (await stub.UpdateModel(pb.UpdateModelRequest(model=model, update_mask=star))).model
    assert (list(updated.aliases), dict(updated.annotations), updated.type) == ([], {}, pb.MODEL_TYPE_LLM)
    failure = await failure_of(stub.UpdateModel(pb.UpdateModelRequest(model=pb.Model(id="mine"), update_mask=star)))
    assert (told(failure), failure.fields) == (INVALID, ["model.provider_id", "model.provider_model_id"])


@pytest.mark.parametrize(
    ("paths", "violations"),
    [
        (["id"], 1),
        (["etag", "aliases", "create_time"], 2),
        (["state"], 1),
        (["*", "aliases"], 1),
        (["annotations.k"], 1),
        (["Aliases"], 1),
        ([""], 1),
        ([], 1),
    ],
)
async def test_a_mask_that_cannot_be(
    stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, paths: list[str], violations: int
) -> None:
    """Each path that is none, or of what cannot change, is named, and what can; and a change of nothing is a mistake."""
    request = pb.UpdateModelRequest(model=pb.Model(id="mine"), update_mask=FieldMask(paths=paths))
    failure = await failure_of(stub.UpdateModel(request))
    assert (told(failure), failure.fields) == (INVALID, ["update_mask"] * violations)
    assert "provider_id, provider_model_id, type, aliases, annotations, embedding_dimension" in failure.message
    assert (await stub.GetModel(pb.GetModelRequest(model_id="mine"))).model == mine


async def test_etags_of_an_update(stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model) -> None:
    """With one, only what was seen is changed; without, whatever is there. The failure tells the one that holds now."""

    def change(value: str, etag: str) -> pb.UpdateModelRequest:
        return pb.UpdateModelRequest(model=pb.Model(id="mine", annotations={"k": value}, etag=etag))

    first = (await stub.UpdateModel(change("1", mine.etag))).model
    failure = await failure_of(stub.UpdateModel(change("2", mine.etag)))
    assert told(failure) == (Code.ABORTED, "ETAG_MISMATCH")
    assert without_request_id(failure) == {"model": "mine", "etag": first.etag}
    assert "read it again" in failure.message
    assert told(await failure_of(stub.UpdateModel(change("2", "nonsense")))) == (Code.ABORTED, "ETAG_MISMATCH")
    assert (await stub.GetModel(pb.GetModelRequest(model_id="mine"))).model == first
    assert (await stub.UpdateModel(change("3", ""))).model.annotations["k"] == "3"


async def test_an_etag_of_what_was_meanwhile_registered_anew(
    stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model
) -> None:
    """Does not fit it, even where all else is the same."""
    await stub.UnregisterModel(pb.UnregisterModelRequest(model_id="mine"))
    await stub.RegisterModel(
        pb.RegisterModelRequest(
            model_id="mine", provider_id="alpha", provider_model_id="llama", aliases=["a", "b"], annotations={"k": "v"}
        )
    )
    failure = await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="mine", etag=mine.etag)))
    assert told(failure) == (Code.ABORTED, "ETAG_MISMATCH")


async def test_nothing_different_is_nothing_written(
    stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """The same values, or the clearing of what is not there: the model keeps its etag and its times, also with providers away."""
    alpha.go_down()
    beta.go_down()
    requests = [
        pb.UpdateModelRequest(model=mine),
        pb.UpdateModelRequest(model=mine, update_mask=FieldMask(paths=["*"])),
        pb.UpdateModelRequest(model=pb.Model(id="b"), update_mask=FieldMask(paths=["embedding_dimension"])),
        pb.UpdateModelRequest(model=pb.Model(id="mine"), update_mask=FieldMask(paths=["type"])),
        pb.UpdateModelRequest(model=pb.Model(id="mine", annotations={"k": "v"}, etag=mine.etag)),
    ]
    for request in requests:
        assert (await stub.UpdateModel(request)).model == mine


async def test_leading_elsewhere_asks_the_provider(
    stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, beta: FakeProvider
) -> None:
    """It must serve the model now; else nothing changes, and the failure says what it is."""

    def lead(provider_id: str, name: str) -> Awaitable[pb.UpdateModelResponse]:
        model = pb.Model(id="mine", provider_id=provider_id, provider_model_id=name)
        return stub.UpdateModel(pb.UpdateModelRequest(model=model))

    failure = await failure_of(lead("beta", "mistral"))
    assert told(failure) == (Code.FAILED_PRECONDITION, "MODEL_NOT_SERVED")
    assert without_request_id(failure) == {"model": "mistral", "provider": "beta"}
    failure = await failure_of(lead("gamma", "mistral"))
    assert (told(failure), failure.metadata["provider"]) == ((Code.NOT_FOUND, "PROVIDER_NOT_FOUND"), "gamma")
    beta.go_down()
    assert told(await failure_of(lead("beta", "mistral"))) == (Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")
    assert (await stub.GetModel(pb.GetModelRequest(model_id="mine"))).model == mine
    beta.failure, beta.served = None, ["mistral"]
    updated = (await lead("beta", "mistral")).model
    assert (updated.id, updated.provider_id, updated.provider_model_id) == ("mine", "beta", "mistral")
    only_the_name = pb.UpdateModelRequest(model=pb.Model(id="mine", provider_model_id="llama"))
    assert told(await failure_of(stub.UpdateModel(only_the_name))) == (Code.FAILED_PRECONDITION, "MODEL_NOT_SERVED")


@pytest.mark.usefixtures("mine")
async def test_what_a_provider_says_of_a_model_follows_where_it_leads(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """Root, base and context are those of what it leads to."""
    updated = (await stub.UpdateModel(pb.UpdateModelRequest(model=pb.Model(id="mine", provider_model_id="lora")))).model
    assert (updated.engine_root, updated.base_model, updated.max_context_tokens) == ("/adapters/lora", "llama", 4096)


@pytest.mark.usefixtures("mine")
async def test_an_alias_that_is_taken(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """By another's id or alias; its own it may keep."""
    beta.served = ["m"]
    await stub.RegisterModel(pb.RegisterModelRequest(model_id="yours", provider_id="beta", provider_model_id="m"))
    for name, owner in [("mine", "mine"), ("a", "mine")]:
        request = pb.UpdateModelRequest(model=pb.Model(id="yours", aliases=["free", name]))
        failure = await failure_of(stub.UpdateModel(request))
        assert told(failure) == (Code.ALREADY_EXISTS, "MODEL_ALREADY_EXISTS")
        assert without_request_id(failure) == {"model": owner, "name": name}
    assert told(await failure_of(stub.GetModel(pb.GetModelRequest(model_id="free")))) == (
        Code.NOT_FOUND,
        "MODEL_NOT_FOUND",
    )
    swapped = (await stub.UpdateModel(pb.UpdateModelRequest(model=pb.Model(id="mine", aliases=["b", "a"])))).model
    assert list(swapped.aliases) == ["b", "a"]


async def test_names_that_stay_are_nobody_s_affair(
    stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model, beta: FakeProvider
) -> None:
    """Another's or reserved ones are refused when they are new; what the model has already prevents no other change."""

    def change(**fields: Any) -> Awaitable[pb.UpdateModelResponse]:  # noqa: ANN401 (whatever a model has)
        return stub.UpdateModel(pb.UpdateModelRequest(model=pb.Model(id=mine.id, **fields)))

    beta.go_down()
    assert (await change(annotations={"k": "1"})).model.annotations["k"] == "1"
    assert told(await failure_of(change(aliases=["beta/x", "beta/y"]))) == INVALID
    assert beta.tokens == []


@pytest.mark.usefixtures("mine")
async def test_broken_rules_of_an_update_are_named_all_at_once(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """By their place in the request; among them a type without its dimension, and one that leaves its dimension."""
    number: Any = 9
    requests: list[tuple[pb.Model, list[str], list[str]]] = [
        (pb.Model(aliases=["", "mine"], annotations={"": "x"}), [], ["aliases[0]", "aliases[1]", "annotations"]),
        (pb.Model(type=number), [], ["type"]),
        (pb.Model(type=pb.MODEL_TYPE_EMBEDDING), [], ["embedding_dimension"]),
        (pb.Model(embedding_dimension=3), [], ["embedding_dimension"]),
        (pb.Model(), ["provider_id"], ["provider_id"]),
    ]
    for model, paths, fields in requests:
        model.id = "mine"
        request = pb.UpdateModelRequest(model=model, update_mask=FieldMask(paths=paths))
        failure = await failure_of(stub.UpdateModel(request))
        assert (told(failure), failure.fields) == (INVALID, [f"model.{field}" for field in fields])
    embedding = pb.Model(id="mine", type=pb.MODEL_TYPE_EMBEDDING, embedding_dimension=3)
    await stub.UpdateModel(pb.UpdateModelRequest(model=embedding))
    back = pb.UpdateModelRequest(model=pb.Model(id="mine", type=pb.MODEL_TYPE_LLM))
    assert (await failure_of(stub.UpdateModel(back))).fields == ["model.embedding_dimension"]
    cleared = pb.UpdateModelRequest(
        model=pb.Model(id="mine"), update_mask=FieldMask(paths=["type", "embedding_dimension"])
    )
    assert (await stub.UpdateModel(cleared)).model.type == pb.MODEL_TYPE_LLM


async def test_what_is_not_registered_cannot_be_changed(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """Neither what is discovered, which says so, nor what is not there; unregistering is refused alike."""
    for name, told_as in [
        ("alpha/lora", (Code.FAILED_PRECONDITION, "MODEL_DISCOVERED")),
        ("lora", (Code.FAILED_PRECONDITION, "MODEL_DISCOVERED")),
        ("x", (Code.NOT_FOUND, "MODEL_NOT_FOUND")),
    ]:
        update = pb.UpdateModelRequest(model=pb.Model(id=name, annotations={"k": "v"}))
        assert told(await failure_of(stub.UpdateModel(update))) == told_as
        unregister = pb.UnregisterModelRequest(model_id=name, etag="r1")
        assert told(await failure_of(stub.UnregisterModel(unregister))) == told_as


async def test_etags_of_an_end(stub: pb_grpc.ModelRegistryAsyncStub, mine: pb.Model) -> None:
    """Only what was seen is unregistered, if one is given; a second time there is nothing to unregister."""
    failure = await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="mine", etag="r999")))
    assert told(failure) == (Code.ABORTED, "ETAG_MISMATCH")
    assert without_request_id(failure) == {"model": "mine", "etag": mine.etag}
    await stub.UnregisterModel(pb.UnregisterModelRequest(model_id="a", etag=mine.etag))
    assert told(await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="a")))) == (
        Code.NOT_FOUND,
        "MODEL_NOT_FOUND",
    )


async def test_refreshing(stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider, beta: FakeProvider) -> None:
    """All or one, each asked once; one that is away is an answer that says why, by ascending id."""
    listed = pb.RefreshModelsResponse.Provider(provider_id="alpha", model_count=2)
    one = await stub.RefreshModels(pb.RefreshModelsRequest(provider_id="alpha"))
    assert one == pb.RefreshModelsResponse(providers=[listed])
    assert (len(alpha.tokens), len(beta.tokens)) == (1, 0)
    beta.go_down()
    both = await stub.RefreshModels(pb.RefreshModelsRequest())
    assert both == pb.RefreshModelsResponse(
        providers=[
            listed,
            pb.RefreshModelsResponse.Provider(provider_id="beta", error="provider 'beta' cannot be reached"),
        ]
    )
    assert (len(alpha.tokens), len(beta.tokens)) == (2, 1)
    failure = await failure_of(stub.RefreshModels(pb.RefreshModelsRequest(provider_id="gamma")))
    assert (told(failure), failure.metadata["provider"]) == ((Code.NOT_FOUND, "PROVIDER_NOT_FOUND"), "gamma")
    assert "alpha, beta" in failure.message


async def test_a_refresh_s_error_has_a_limit(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """Whatever a provider says, the answer stays one."""
    beta.failure = ProviderError(Reason.UPSTREAM_ERROR, "x" * 100_000)
    response = await stub.RefreshModels(pb.RefreshModelsRequest(provider_id="beta"))
    assert len(response.providers[0].error.encode()) <= 1024


async def test_the_callers_token_goes_to_the_provider(
    stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """Every call that may ask a provider passes it on, if it names the provider; else it does not."""
    metadata = (("x-vllm-api-token", "mine"),)
    await stub.RegisterModel(pb.RegisterModelRequest(model_id="llama", provider_id="alpha"), metadata=metadata)
    await stub.GetModel(pb.GetModelRequest(model_id="alpha/lora"), metadata=metadata)
    await stub.ListModels(pb.ListModelsRequest(provider_id="alpha"), metadata=metadata)
    await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="alpha/lora"), metadata=metadata))
    alpha.served = ["lora", "other"]
    mine = pb.RegisterModelRequest(model_id="mine", provider_id="alpha", provider_model_id="other")
    await stub.RegisterModel(mine, metadata=metadata)
    update = pb.UpdateModelRequest(model=pb.Model(id="mine", provider_id="alpha", provider_model_id="lora"))
    await stub.UpdateModel(update, metadata=metadata)
    await stub.RefreshModels(pb.RefreshModelsRequest(provider_id="alpha"), metadata=metadata)
    assert alpha.tokens == ["mine"] * 7
    await stub.GetModel(pb.GetModelRequest(model_id="lora"), metadata=metadata)
    await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
    await stub.RefreshModels(pb.RefreshModelsRequest(), metadata=metadata)
    update = pb.UpdateModelRequest(model=pb.Model(id="mine", provider_model_id="other"))
    await stub.UpdateModel(update, metadata=metadata)
    await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="lora"), metadata=metadata))
    assert {*alpha.tokens[7:], *beta.tokens} == {None}


VLLM = pb.Engine(kind=pb.Engine.KIND_VLLM, version="0.32.0")
PROXY = pb.Engine(kind=pb.Engine.KIND_PROXY, detail="it is a router")


async def test_providers_and_their_health(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """All that are configured, by id, with what answers there; one that is down is an answer and no failure."""
    beta.engine_known = Engine(EngineKind.PROXY, detail="it is a router")
    assert await stub.ListProviders(pb.ListProvidersRequest()) == pb.ListProvidersResponse(
        providers=[
            pb.Provider(
                id="alpha",
                kind="fake",
                base_urls=["http://alpha.localhost/v1"],
                engine=VLLM,
                replicas=[pb.Replica(base_url="http://alpha.localhost/v1", state=pb.Replica.STATE_AVAILABLE)],
            ),
            pb.Provider(
                id="beta",
                kind="fake",
                base_urls=["http://beta.localhost/v1"],
                engine=PROXY,
                replicas=[pb.Replica(base_url="http://beta.localhost/v1", state=pb.Replica.STATE_AVAILABLE)],
            ),
        ]
    )
    first = await stub.ListProviders(pb.ListProvidersRequest(page_size=1))
    second = await stub.ListProviders(pb.ListProvidersRequest(page_size=1, page_token=first.next_page_token))
    assert [[each.id for each in page.providers] for page in (first, second)] == [["alpha"], ["beta"]]
    assert not second.next_page_token
    models = await stub.ListModels(pb.ListModelsRequest(page_size=1))
    failure = await failure_of(stub.ListProviders(pb.ListProvidersRequest(page_token=models.next_page_token)))
    assert (failure.reason, failure.fields) == ("INVALID_REQUEST", ["page_token"])
    beta.go_down()
    assert await stub.CheckProviderHealth(
        pb.CheckProviderHealthRequest(provider_id="alpha")
    ) == pb.CheckProviderHealthResponse(status=pb.HEALTH_STATUS_OK, engine=VLLM)
    assert await stub.CheckProviderHealth(
        pb.CheckProviderHealthRequest(provider_id="beta")
    ) == pb.CheckProviderHealthResponse(
        status=pb.HEALTH_STATUS_ERROR,
        message="Health check failed: provider 'beta' cannot be reached",
        engine=PROXY,
    )


@pytest.mark.parametrize(
    ("members", "wire", "prefix"),
    [
        (ModelType, pb.ModelType, "MODEL_TYPE_"),
        (ModelSource, pb.ModelSource, "MODEL_SOURCE_"),
        (ModelState, pb.ModelState, "MODEL_STATE_"),
        (ChangeKind, pb.WatchModelsResponse.Change, "CHANGE_"),
        (HealthStatus, pb.HealthStatus, "HEALTH_STATUS_"),
        (EngineKind, pb.Engine.Kind, "KIND_"),
    ],
)
def test_our_values_are_the_numbers_of_the_protos(members: type[enum.Enum], wire: EnumTypeWrapper, prefix: str) -> None:
    """Each value but UNSPECIFIED, by name."""
    ours = {f"{prefix}{member.name}": member.value for member in members}
    assert ours | {f"{prefix}UNSPECIFIED": 0} == dict(wire.items())


def test_the_largest_messages_are_received_by_every_client() -> None:
    """A page is full of large models, and the last one has as much text as a provider's whole listing may have."""
    values = [f"{number:02}" + "é" * 1000 for number in range(64)]
    large = {
        f"m{number:03}": Model(
            f"m{number:03}",
            "alpha",
            "n" * 256,
            aliases=tuple(f"{alias:02}" + "a" * 254 for alias in range(32)),
            annotations=dict.fromkeys(values[: 64 * 1024 // 4096], "é" * 1000),
        )
        for number in range(200)
    }
    small = {f"a{number:03}": Model(f"a{number:03}", "alpha", "n" * 900) for number in range(1000)}
    listed = Model("m", "alpha", "n", engine_root="r" * MAX_DOCUMENT_BYTES)
    for models in (large, small, {**dict(list(small.items())[:999]), "m": listed}, {**large, "m": listed}):
        page, _ = pages.page_of(models, PageRequest(pages.MAX_PAGE_SIZE, "", b""), _bytes_of)
        response = pb.ListModelsResponse(models=map(model_message, page), next_page_token="t" * 1000)
        assert MAX_MESSAGE_BYTES // 5 < response.ByteSize() < MAX_MESSAGE_BYTES
    change = step_message(Step(ChangeKind.ADDED, listed, "r" * 100))
    assert change.ByteSize() < MAX_MESSAGE_BYTES
