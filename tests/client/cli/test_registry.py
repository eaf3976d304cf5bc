"""Models, providers, health."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf.json_format import Parse

from deltawire.v1 import model_registry_pb2 as registry
from tests.client.scripted import Gateway, model

if TYPE_CHECKING:
    from tests.client.cli.support import Run

LLAMA = model("llama", provider_model_id="meta/llama", max_context_tokens=8192, aliases=["l", "ll"])
FOUND = model("vllm/qwen", source=registry.MODEL_SOURCE_DISCOVERED)


def test_models_list(gateway: Gateway, run: Run) -> None:
    """A table over all pages; who could not be listed is on standard error."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA], next_page_token="2"))
    gateway.will(registry.ListModelsResponse(models=[FOUND], unreachable_provider_ids=["other"]))
    status, out, err = run("models", "list")
    assert status == 0
    assert out == (
        "ID         TYPE  SOURCE      PROVIDER  CONTEXT  ALIASES\n"
        "llama      llm   registered  vllm      8192     l, ll\n"
        "vllm/qwen  llm   discovered  vllm      -\n"
    )
    assert err == "note: could not be listed, so models may be missing: other\n"


def test_models_list_in_json(gateway: Gateway, run: Run) -> None:
    """A model on each line."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA, FOUND]))
    _, out, _ = run("models", "list", "--json")
    assert [Parse(line, registry.Model()) for line in out.splitlines()] == [LLAMA, FOUND]


def test_models_get(gateway: Gateway, run: Run) -> None:
    """What is known, a line for each; in JSON, one line."""
    known = model("llama", metadata={"b": "2", "a": "1"}, root="/models/llama", parent="base", max_context_tokens=5)
    known.create_time.FromJsonString("2025-01-02T03:04:05Z")
    known.update_time.FromJsonString("2025-01-03T03:04:05Z")
    gateway.will(registry.GetModelResponse(model=known))
    assert run("models", "get", "l")[1] == (
        "id:        llama\nprovider:  vllm\nserved as: llama\ntype:      llm\nsource:    registered\n"
        "metadata:  a=1, b=2\ncontext:   5 tokens\nroot:      /models/llama\nparent:    base\n"
        "created:   2025-01-02T03:04:05Z\nupdated:   2025-01-03T03:04:05Z\n"
    )
    gateway.will(registry.GetModelResponse(model=known))
    assert Parse(run("models", "get", "--json", "l")[1], registry.Model()) == known
    assert gateway.last.request.model_id == "l"


def test_models_of_a_later_version(gateway: Gateway, run: Run) -> None:
    """A type that is not known here is shown by its number."""
    gateway.will(registry.GetModelResponse(model=model("m", type=99)))
    assert "type:      99\n" in run("models", "get", "m")[1]


def test_models_register_and_unregister(gateway: Gateway, run: Run) -> None:
    """Every option arrives in its field."""
    gateway.will(registry.RegisterModelResponse(model=LLAMA))
    status, out, _ = run(
        "models", "register", "llama", "--provider", "vllm", "--provider-model", "meta/llama", "--type", "rerank",
        "--alias", "l", "--alias", "ll", "--metadata", "owner=me", "--metadata", "note=a=b",
    )  # fmt: skip
    assert status == 0
    assert out.startswith("id:        llama\n")
    assert gateway.last.request == registry.RegisterModelRequest(
        model_id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=registry.MODEL_TYPE_RERANK,
        aliases=["l", "ll"],
        metadata={"owner": "me", "note": "a=b"},
    )
    for name, said in ("llama", "llama"), ("l", "llama (alias l)"):
        gateway.will(registry.GetModelResponse(model=LLAMA))
        gateway.will(registry.UnregisterModelResponse())
        assert run("models", "unregister", name) == (0, f"{said} is no longer registered\n", "")
        assert gateway.last.request == registry.UnregisterModelRequest(model_id=name)
    gateway.will(registry.GetModelResponse(model=LLAMA))
    gateway.will(registry.UnregisterModelResponse())
    assert run("models", "unregister", "--json", "l") == (0, "{}\n", "")


def test_providers(gateway: Gateway, run: Run) -> None:
    """A table with every replica's address, or a provider on each line."""
    vllm = registry.Provider(id="vllm", kind="vllm", base_urls=["http://gpu1:8000/v1", "http://gpu2:8000/v1"])
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert run("providers")[1] == "ID    KIND  URLS\nvllm  vllm  http://gpu1:8000/v1, http://gpu2:8000/v1\n"
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert Parse(run("providers", "--json")[1], registry.Provider()) == vllm


def test_health(gateway: Gateway, run: Run) -> None:
    """Of all providers; one that is down makes the status 1."""
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK)
    down = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_ERROR, message="HTTP 503")
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="a"), registry.Provider(id="b")]))
    gateway.will(well)
    gateway.will(down)
    status, out, _ = run("health")
    assert status == 1
    assert out == "PROVIDER  STATUS  MESSAGE\na         OK\nb         ERROR   HTTP 503\n"


def test_health_of_one(gateway: Gateway, run: Run) -> None:
    """As asked for, in JSON too."""
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK)
    gateway.will(well)
    status, out, _ = run("health", "--json", "vllm")
    assert (status, json.loads(out)) == (0, {"providerId": "vllm", "status": "HEALTH_STATUS_OK"})
    assert [call.method for call in gateway.calls] == ["CheckProviderHealth"]
