"""Models, providers, health."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import grpc
from google.protobuf.json_format import Parse

from deltawire.v1 import model_registry_pb2 as registry
from deltawire.v1.error_reason_pb2 import ErrorReason
from tests.client.scripted import WAIT, Fail, Gateway, bookmark, changed, model

if TYPE_CHECKING:
    from tests.client.cli.support import Run

LLAMA = model("llama", provider_model_id="meta/llama", max_context_tokens=8192, aliases=["l", "ll"])
FOUND = model("vllm/qwen", source=registry.MODEL_SOURCE_DISCOVERED, state=registry.MODEL_STATE_UNAVAILABLE)


def test_models_list(gateway: Gateway, run: Run) -> None:
    """A table over all pages; who could not be listed is on standard error."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA], next_page_token="2"))
    gateway.will(registry.ListModelsResponse(models=[FOUND], unreachable_provider_ids=["other"]))
    status, out, err = run("models", "list")
    assert status == 0
    assert out == (
        "ID         TYPE  STATE        SOURCE      PROVIDER  CONTEXT  ALIASES\n"
        "llama      llm   serving      registered  vllm      8192     l, ll\n"
        "vllm/qwen  llm   unavailable  discovered  vllm      -\n"
    )
    assert err == "note: no answer from other: models are shown as they were, and new ones not at all\n"


def test_models_list_in_json(gateway: Gateway, run: Run) -> None:
    """A model on each line."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA, FOUND]))
    _, out, _ = run("models", "list", "--json")
    assert [Parse(line, registry.Model()) for line in out.splitlines()] == [LLAMA, FOUND]


def test_models_list_filtered(gateway: Gateway, run: Run) -> None:
    """Every filter arrives in its field, and none is sent that was not given."""
    gateway.will(registry.ListModelsResponse(models=[FOUND]))
    gateway.will(registry.ListModelsResponse())
    run("models", "list", "--provider", "vllm", "--type", "rerank", "--state", "unknown", "--source", "discovered")
    assert gateway.last.request == registry.ListModelsRequest(
        provider_id="vllm",
        type=registry.MODEL_TYPE_RERANK,
        state=registry.MODEL_STATE_UNKNOWN,
        source=registry.MODEL_SOURCE_DISCOVERED,
    )
    run("models", "list")
    assert gateway.last.request == registry.ListModelsRequest()


def test_models_list_of_a_provider_that_does_not_exist(gateway: Gateway, run: Run) -> None:
    """An error that names those there are; a provider without models is not one."""
    for given, expected in (
        ("nope", (1, "", "error: there is no provider nope; there are: a, b\n")),
        ("b", (0, "ID  TYPE  STATE  SOURCE  PROVIDER  CONTEXT  ALIASES\n", "")),
    ):
        gateway.will(registry.ListModelsResponse())
        gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="a"), registry.Provider(id="b")]))
        assert run("models", "list", "--provider", given) == expected


def test_models_get(gateway: Gateway, run: Run) -> None:
    """What is known, a line for each; in JSON, one line."""
    known = model(
        "llama",
        annotations={"b": "2", "a": "1"},
        engine_root="/models/llama",
        base_model="base",
        owner="ci",
        max_context_tokens=5,
    )
    known.type, known.embedding_dimension, known.etag = registry.MODEL_TYPE_EMBEDDING, 1024, "r7"
    known.create_time.FromJsonString("2025-01-02T03:04:05Z")
    known.update_time.FromJsonString("2025-01-03T03:04:05Z")
    gateway.will(registry.GetModelResponse(model=known))
    assert run("models", "get", "l")[1] == (
        "id:          llama\nprovider:    vllm\nserved as:   llama\ntype:        embedding\ndimension:   1024\n"
        "state:       serving\nsource:      registered\n"
        "annotations: a=1, b=2\ncontext:     5 tokens\nengine root: /models/llama\nbase model:  base\n"
        "created:     2025-01-02T03:04:05Z\nupdated:     2025-01-03T03:04:05Z\nowner:       ci\netag:        r7\n"
    )
    gateway.will(registry.GetModelResponse(model=known))
    assert Parse(run("models", "get", "--json", "l")[1], registry.Model()) == known
    assert gateway.last.request.model_id == "l"


def test_models_of_a_later_version(gateway: Gateway, run: Run) -> None:
    """A type that is not known here is shown by its number."""
    gateway.will(registry.GetModelResponse(model=model("m", type=99)))
    assert "type:        99\n" in run("models", "get", "m")[1]


def test_models_register_and_unregister(gateway: Gateway, run: Run) -> None:
    """Every option arrives in its field."""
    gateway.will(registry.RegisterModelResponse(model=LLAMA))
    status, out, _ = run(
        "models", "register", "llama", "--provider", "vllm", "--provider-model", "meta/llama", "--type", "embedding",
        "--alias", "l", "--alias", "ll", "--annotation", "owner=me", "--annotation", "note=a=b",
        "--embedding-dimension", "1024",
    )  # fmt: skip
    assert status == 0
    assert out.startswith("id:          llama\n")
    assert gateway.last.request == registry.RegisterModelRequest(
        model_id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=registry.MODEL_TYPE_EMBEDDING,
        aliases=["l", "ll"],
        annotations={"owner": "me", "note": "a=b"},
        embedding_dimension=1024,
    )
    gateway.will(registry.UnregisterModelResponse())
    assert run("models", "unregister", "llama") == (0, "llama is no longer registered\n", "")
    assert gateway.last.request == registry.UnregisterModelRequest(model_id="llama")
    gateway.will(registry.UnregisterModelResponse())
    assert run("models", "unregister", "--json", "--etag", "r7", "l") == (0, "{}\n", "")
    assert gateway.last.request == registry.UnregisterModelRequest(model_id="l", etag="r7")


def updated(gateway: Gateway, run: Run, *arguments: str) -> registry.UpdateModelRequest:
    """What an update with these options asks for."""
    gateway.will(registry.UpdateModelResponse(model=LLAMA))
    status, out, _ = run("models", "update", "llama", *arguments)
    assert (status, out.splitlines()[0]) == (0, "id:          llama")
    request: registry.UpdateModelRequest = gateway.last.request
    return request


def test_models_update(gateway: Gateway, run: Run) -> None:
    """Every option arrives in its field and in the mask; what no option says is in neither."""
    request = updated(
        gateway, run, "--provider", "vllm", "--provider-model", "meta/llama", "--type", "embedding",
        "--embedding-dimension", "1024", "--alias", "l", "--alias", "ll", "--annotation", "a=b", "--etag", "r7",
    )  # fmt: skip
    assert request.model == registry.Model(
        id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=registry.MODEL_TYPE_EMBEDDING,
        embedding_dimension=1024,
        aliases=["l", "ll"],
        annotations={"a": "b"},
        etag="r7",
    )
    assert len(request.update_mask.paths) == 6
    request = updated(gateway, run, "--alias", "l")
    assert request.model == registry.Model(id="llama", aliases=["l"])
    assert list(request.update_mask.paths) == ["aliases"]


def test_models_update_takes_away(gateway: Gateway, run: Run) -> None:
    """Names and notes if asked to; a vector's dimension with the type that has one."""
    request = updated(gateway, run, "--no-aliases", "--no-annotations")
    assert request.model == registry.Model(id="llama")
    assert list(request.update_mask.paths) == ["aliases", "annotations"]
    request = updated(gateway, run, "--type", "llm")
    assert request.model == registry.Model(id="llama", type=registry.MODEL_TYPE_LLM)
    assert list(request.update_mask.paths) == ["embedding_dimension", "type"]


def test_models_refresh(gateway: Gateway, run: Run) -> None:
    """One that cannot be listed makes the status 1, and why stands on standard error."""
    well = registry.RefreshModelsResponse.Provider(provider_id="a", model_count=2)
    down = registry.RefreshModelsResponse.Provider(provider_id="b", error="connection refused")
    why = "error: b could not be listed: connection refused\n"
    gateway.will(registry.RefreshModelsResponse(providers=[well, down]))
    assert run("models", "refresh") == (1, "PROVIDER  MODELS\na         2\nb         -\n", why)
    assert gateway.last.request == registry.RefreshModelsRequest()
    gateway.will(registry.RefreshModelsResponse(providers=[well, down]))
    status, out, err = run("models", "refresh", "--json")
    assert (status, err) == (1, why)
    assert [Parse(line, registry.RefreshModelsResponse.Provider()) for line in out.splitlines()] == [well, down]
    gateway.will(registry.RefreshModelsResponse(providers=[well]))
    assert run("models", "refresh", "a") == (0, "PROVIDER  MODELS\na         2\n", "")
    assert gateway.last.request.provider_id == "a"


DENIED = Fail(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


def test_models_watch(gateway: Gateway, run: Run) -> None:
    """A line for each change; a lost connection is noted, and what would not mend ends it."""
    gateway.will(changed("ADDED", LLAMA), bookmark("1"), Fail(grpc.StatusCode.ABORTED, "DRAINING", "shutting down"))
    gateway.will(changed("ADDED", FOUND, "2"), changed("REMOVED", LLAMA, "3"), DENIED)
    status, out, err = run("models", "watch")
    assert status == 1
    assert [line.split() for line in out.splitlines()] == [
        ["CHANGE", "ID", "STATE", "TYPE", "PROVIDER"],
        ["ADDED", "llama", "serving", "llm", "vllm"],
        ["ADDED", "vllm/qwen", "unavailable", "llm", "vllm"],
        ["REMOVED", "llama", "serving", "llm", "vllm"],
    ]
    assert len({line.rindex(line.split()[-1]) for line in out.splitlines()}) == 1
    note, error, _ = err.splitlines()
    assert re.fullmatch(
        r"note: the watch broke off and goes on in 0\.[12] s: ABORTED \(DRAINING\): shutting down", note
    )
    assert error == "error: PERMISSION_DENIED (PERMISSION_DENIED): it failed"
    assert [call.request.revision for call in gateway.calls] == ["", "1"]


def test_models_watch_in_json(gateway: Gateway, run: Run) -> None:
    """Each step on a line, also those that are no change, as they bear revisions."""
    steps = [changed("MODIFIED", LLAMA, "8"), bookmark("9")]
    gateway.will(*steps, DENIED)
    status, out, _ = run("models", "watch", "--json", "--revision", "7")
    assert status == 1
    assert [Parse(line, registry.WatchModelsResponse()) for line in out.splitlines()] == steps
    assert gateway.last.request.revision == "7"


def test_models_watch_with_a_timeout(gateway: Gateway, run: Run) -> None:
    """The option that every command has limits the watch as a whole."""
    gateway.will(bookmark("1"), WAIT)
    status, out, err = run("models", "watch", "--json", "--timeout", "0.5")
    assert (status, out) == (1, '{"revision": "1", "bookmark": true}\n')
    assert err.startswith("error: DEADLINE_EXCEEDED: the timeout passed\n")


def test_providers(gateway: Gateway, run: Run) -> None:
    """A table with every replica's address, or a provider on each line."""
    vllm = registry.Provider(id="vllm", kind="vllm", base_urls=["http://gpu1:8000/v1", "http://gpu2:8000/v1"])
    vllm.engine.kind, vllm.engine.version = registry.Engine.KIND_VLLM, "0.32.0"
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert run("providers")[1] == (
        "ID    KIND  ENGINE       URLS\nvllm  vllm  VLLM 0.32.0  http://gpu1:8000/v1, http://gpu2:8000/v1\n"
    )
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert Parse(run("providers", "--json")[1], registry.Provider()) == vllm
    for url, state in zip(
        vllm.base_urls, (registry.Replica.STATE_AVAILABLE, registry.Replica.STATE_EJECTED), strict=True
    ):
        reason = ErrorReason.ERROR_REASON_UPSTREAM_UNAVAILABLE
        vllm.replicas.add(base_url=url, state=state, last_failure_reason=reason)
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    urls = "http://gpu1:8000/v1, http://gpu2:8000/v1 (ejected: UPSTREAM_UNAVAILABLE)\n"
    assert run("providers")[1].endswith(urls)
    for replica, streams in zip(vllm.replicas, (3, 1), strict=True):
        replica.active_streams = streams
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    urls = "http://gpu1:8000/v1 (3 active), http://gpu2:8000/v1 (1 active, ejected: UPSTREAM_UNAVAILABLE)\n"
    assert run("providers")[1].endswith(urls)


def test_providers_in_pages(gateway: Gateway, run: Run) -> None:
    """The table has all of them."""
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="a")], next_page_token="2"))
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="b")]))
    assert [line.split() for line in run("providers")[1].splitlines()] == [
        ["ID", "KIND", "ENGINE", "URLS"],
        ["a", "-"],
        ["b", "-"],
    ]


def test_health(gateway: Gateway, run: Run) -> None:
    """Of all providers, with what answers there; one that is down makes the status 1."""
    engine = registry.Engine(kind=registry.Engine.KIND_PROXY, detail="it is a router")
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK, engine=engine)
    down = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_ERROR, message="HTTP 503")
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="a")], next_page_token="2"))
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="b")]))
    gateway.will(well)
    gateway.will(down)
    status, out, _ = run("health")
    assert status == 1
    assert out == (
        "PROVIDER  STATUS  ENGINE  MESSAGE\n"
        "a         OK      PROXY   it is a router\n"
        "b         ERROR   -       HTTP 503\n"
    )


def test_health_of_one(gateway: Gateway, run: Run) -> None:
    """As asked for, in JSON too."""
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK)
    gateway.will(well)
    status, out, _ = run("health", "--json", "vllm")
    assert (status, json.loads(out)) == (0, {"providerId": "vllm", "status": "HEALTH_STATUS_OK"})
    assert [call.method for call in gateway.calls] == ["CheckProviderHealth"]
