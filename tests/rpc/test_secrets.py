"""What logs hold of a call that meets a defect: where it was, and nothing that callers and operators keep secret."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from typing import TYPE_CHECKING, NoReturn

import pytest
import structlog
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.access import Access, sent_key
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.rpc import validate
from deltawire_server.secret import Secret
from deltawire_server.telemetry import configure_logging
from deltawire_server.upstream.base import CallContext
from deltawire_server.upstream.transport.client import Transport
from deltawire_server.upstream.vllm_api import VllmApi
from deltawire_server.worker import Worker
from tests.support.gateway import Running, ask, failure_of, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartGateway

SECRETS = {
    "the operator's token": "geheim-operators-token",
    "the value of a header": "geheim-value-of-a-header",
    "the caller's token": "geheim-callers-token",
    "the access key": "geheim-access-key-of-ops",
    "the prompt": "geheim-prompt",
}
METADATA = (
    ("authorization", f"Bearer {SECRETS['the access key']}"),
    ("x-vllm-api-token", SECRETS["the caller's token"]),
)
DEFECTS = [
    (Access, "authorize"),
    (validate, "chat_request"),
    (ModelRegistry, "resolve"),
    (Transport, "send"),
    (VllmApi, "_call_headers"),
    (Worker, "_run"),
]
"""Where a call breaks: from its first look at the metadata to the request that is sent."""


@pytest.fixture(params=["json", "text"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """All that is logged, from debug up, in one of the formats."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("debug", request.param, stream=stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


async def calls(gateway: Running) -> list[str]:
    """How every kind of call fails that a prompt is in, or a token."""
    chat = ask(SECRETS["the prompt"])
    kept = ask(SECRETS["the prompt"], completion_id="mine")
    reasons = [(await failure_of(gateway.create(each, metadata=METADATA))).reason for each in (chat, kept)]
    for each in (chat, kept):
        _, failure = await read(gateway.stream(each, metadata=METADATA))
        reasons.append(failure.reason if failure else "")
    with contextlib.suppress(aio.AioRpcError):  # not every defect is on its way
        await gateway.chat.CountTokens(chat_pb.CountTokensRequest(chat=chat), metadata=METADATA)
    return reasons


@pytest.mark.parametrize(("owner", "name"), DEFECTS, ids=[name for _, name in DEFECTS])
async def test_a_defect_shows_no_secret(
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    log: io.StringIO,
    owner: object,
    name: str,
) -> None:
    """Also with rich installed, by which structlog prints the local variables of every frame."""
    assert importlib.util.find_spec("rich")

    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("a defect of this test")

    provider = {
        "api_token": SECRETS["the operator's token"],
        "headers": {"x-team": SECRETS["the value of a header"]},
    }
    access = {"keys": f"ops all {SECRETS['the access key']}"}
    async with start_gateway(provider=provider, access=access) as gateway:
        await gateway.models.ListModels(model_registry_pb2.ListModelsRequest(), metadata=METADATA)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            reasons = await calls(gateway)
    assert "INTERNAL" in reasons
    written = log.getvalue() + "".join(capfd.readouterr())
    assert "a defect of this test" in written
    assert "Traceback (most recent call last)" in written
    assert [what for what, secret in SECRETS.items() if secret in written] == []


def test_what_holds_a_secret_shows_none() -> None:
    """In a repr, which is what everything prints that it holds; formatted for a header it is the value."""
    secret = Secret("geheim")
    assert f"Bearer {secret}" == "Bearer geheim"
    assert secret == "geheim"
    key = sent_key([], ["Bearer geheim"])
    holders = [secret, [secret], {"a": (secret,)}, CallContext("r", "geheim"), key]
    assert not [holder for holder in holders if "geheim" in repr(holder)]
