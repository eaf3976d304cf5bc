"""The fields of the log lines of calls: those that the documentation lists, and what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.errors import FOR_OPERATORS, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script, error_body
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.rpc.model_registry import MAX_LOGGED_NAME
from tests.support.gateway import Lines, Running, ask, failure_of, read_badly, read_well

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway

CHUNKS = Chunks()
README = Path(__file__).parents[2] / "server" / "README.md"
LOGS = README.read_text().partition("## Logs")[2].partition("\n## ")[0]
KEYS = {"keys": "ann call,read,change secret-of-ann-alone\nbob read secret-of-bob-alone"}
ANN, BOB = (("authorization", "Bearer secret-of-ann-alone"),), (("authorization", "Bearer secret-of-bob-alone"),)
EVERY_LINE = {"event", "level", "logger", "timestamp"}


@pytest.fixture
async def keyed(start_gateway: StartGateway) -> AsyncIterator[Running]:
    """A gateway with two callers."""
    async with start_gateway(access=KEYS) as gateway:
        yield gateway


async def test_the_documentation_has_every_field(keyed: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that succeed, fail, are refused or break; other tests have passed ones, those of proxies and of operators."""
    await read_well(keyed.stream(ask(model="vllm/fake"), metadata=ANN))
    await keyed.chat.CountTokens(chat_pb.CountTokensRequest(chat=ask()), metadata=ANN)
    await failure_of(keyed.create(metadata=BOB))
    await keyed.models.RegisterModel(pb.RegisterModelRequest(model_id="mine", provider_model_id="fake"), metadata=ANN)
    with monkeypatch.context() as broken:
        broken.setattr(ModelRegistry, "refresh", None)
        await failure_of(keyed.models.RefreshModels(pb.RefreshModelsRequest(), metadata=ANN))
    entries = [entry for entry in lines.entries if entry["event"] == "call"]
    logged = {field for entry in entries for field in entry} - EVERY_LINE
    documented = set(re.findall(r"^\| `(\w+)` \|", LOGS, re.MULTILINE))
    assert documented == logged | {"passed_to", "via", "completion_of"}


async def test_a_completion(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """Which replica answered, how the choices ended, how much was cached, and how evenly the events came."""
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
    vllm.play(
        Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish("length"), CHUNKS.usage(9, 2) | {"usage": usage}])
    )
    await read_well(served.stream(ask(model="vllm/fake")))
    entry = await lines.find("call")
    expected = {
        "model_asked": "vllm/fake",
        "model": "vllm/fake",
        "alias": "",
        "replica": f"{vllm.base_url}/v1",
        "attempts": 1,
        "prompt_tokens": 9,
        "cached_prompt_tokens": 8,
        "stop_reasons": ["OUT_OF_TOKENS"],
    }
    assert {field: entry[field] for field in expected} == expected
    assert 0 <= entry["queue_seconds"] <= entry["seconds_to_first_event"]
    assert 0 <= entry["mean_gap_seconds"] <= entry["worst_gap_seconds"] <= entry["seconds"]


async def test_the_line_of_a_completion_with_its_own_task(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """The line of its end has the same values as that of its call."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), error_body(500, "oops", "E")]))
    await read_badly(served.stream(ask(completion_id="mine")))
    call, ended = await lines.find("call"), await lines.find("completion ended")
    assert (ended["level"], ended["reason"], ended["attempts"]) == ("warning", "UPSTREAM_ERROR", 1)
    only = {"event", "level", "logger", "timestamp", "seconds"}
    assert {field: call[field] for field in ended.keys() - only} == {
        field: ended[field] for field in ended.keys() - only
    }


async def test_the_model_that_was_asked_for(served: Running, lines: Lines) -> None:
    """Also if there is no such model."""
    await failure_of(served.create(ask(model="unknown")))
    entry = await lines.find("call", reason="MODEL_NOT_FOUND")
    assert (entry["model_asked"], entry["level"]) == ("unknown", "info")
    assert "model" not in entry


async def test_attempts_before_a_failure(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """An attempt that failed counts, and its replica is named."""
    vllm.play(Script.error(400, "no"))
    await failure_of(served.create())
    entry = await lines.find("call", reason="UPSTREAM_REJECTED")
    assert (entry["attempts"], entry["replica"], entry["level"]) == (1, f"{vllm.base_url}/v1", "info")


async def test_writes_of_models(keyed: Running, lines: Lines) -> None:
    """Who wrote what, whose it is, and its state, for an audit; a write that fails has what was asked for."""
    request = pb.RegisterModelRequest(model_id="mine", provider_model_id="fake")
    registered = (await keyed.models.RegisterModel(request, metadata=ANN)).model
    update = pb.UpdateModelRequest(model=pb.Model(id="mine", aliases=["my"]))
    updated = (await keyed.models.UpdateModel(update, metadata=ANN)).model
    stale = pb.UnregisterModelRequest(model_id="my", etag=registered.etag)
    await failure_of(keyed.models.UnregisterModel(stale, metadata=ANN))
    await keyed.models.UnregisterModel(pb.UnregisterModelRequest(model_id="my"), metadata=ANN)
    await failure_of(keyed.models.UnregisterModel(pb.UnregisterModelRequest(model_id="x" * 9999), metadata=ANN))
    await keyed.models.RefreshModels(pb.RefreshModelsRequest(provider_id="vllm"), metadata=ANN)

    def audited(entry: dict[str, Any]) -> list[object]:
        return [entry.get(field) for field in ("caller", "model_asked", "model", "owner", "etag")]

    *writes, unknown, refreshed = (entry for entry in lines.entries if entry["event"] == "call")
    assert [audited(entry) for entry in writes] == [
        ["ann", "mine", "mine", "ann", registered.etag],
        ["ann", "mine", "mine", "ann", updated.etag],
        ["ann", "my", None, None, None],
        ["ann", "my", "mine", "ann", updated.etag],
    ]
    assert len(unknown["model_asked"].encode()) == MAX_LOGGED_NAME
    assert refreshed["provider"] == "vllm"


async def test_the_levels_that_the_documentation_names() -> None:
    """Each reason of a warning is named, by itself or by UPSTREAM_* with its exceptions."""
    warned = {reason.name for reason in FOR_OPERATORS}
    upstream = {reason.name for reason in Reason if reason.name.startswith("UPSTREAM_")}
    assert upstream - warned == {"UPSTREAM_REJECTED", "UPSTREAM_UNAUTHENTICATED"}
    assert all(name in LOGS for name in (warned - upstream) | (upstream - warned))
