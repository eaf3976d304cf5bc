"""Headers that only raw HTTP/2 can bring: none fails a call as a defect of the gateway, and none is forwarded as it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.support.gateway import Lines, Running, ask
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import StartGateway

CREATE = "/deltawire.v1.ChatCompletion/CreateChatCompletion"
REQUEST = message(chat_pb.CreateChatCompletionRequest(chat=ask()).SerializeToString())
PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WRONG = [b"%s\nx", b"%s\r\nx-evil: 1", b"%s\xc3\xa9", b"\xff\xfe%s", b"%s\0", b"%s\x7f", b"\x1b[2J%s"]


def holding(lines: Lines, secret: str) -> list[dict[str, Any]]:
    """The entries that hold a text; the client's own, which are in this process too, do not count."""
    return [entry for entry in lines.entries if secret in str(entry) and not entry["logger"].startswith("hpack")]


async def call(gateway: Running, *headers: tuple[str, bytes]) -> None:
    """Call, and wait for the end."""
    async with raw_client(gateway.address) as client:
        await client.status(client.call(CREATE, *headers, body=REQUEST, end=True))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["traceparent", "tracestate", "x-request-id"])
async def test_what_is_not_valid_is_not_forwarded(
    start_gateway: StartGateway, vllm: FakeVllm, lines: Lines, name: str, wrong: bytes
) -> None:
    """And the call is as good as without it."""
    valid = {"traceparent": PARENT, "tracestate": b"k=v", "x-request-id": b"mine"}
    headers = valid | {name: wrong % valid[name]}
    async with start_gateway() as gateway:
        await call(gateway, *headers.items())
        entry = await lines.find("call")
    assert entry["code"] == "OK"
    (sent,) = vllm.chats
    assert ("traceparent" in sent.headers) == (name != "traceparent")
    assert ("tracestate" in sent.headers) == (name == "x-request-id")
    assert sent.headers["x-request-id"].startswith("mine-") == (name != "x-request-id")
    assert "x-evil" not in sent.headers


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_token_that_is_no_header_is_refused(
    start_gateway: StartGateway, vllm: FakeVllm, lines: Lines, wrong: bytes
) -> None:
    """Instead of sending the operator's in its place."""
    async with start_gateway(provider={"api_token": "the-operators"}) as gateway:
        await call(gateway, ("x-vllm-api-token", wrong % b"geheim"))
        entry = await lines.find("call")
    assert (entry["code"], entry["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "x-vllm-api-token: must be printable ASCII without spaces" in entry["error"]
    assert not holding(lines, "geheim")
    assert not vllm.chats


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_key_that_is_no_header_is_refused(start_gateway: StartGateway, lines: Lines, wrong: bytes) -> None:
    """As any other key that is not known."""
    async with start_gateway(access={"keys": "ops all geheim-geheim-geheim"}) as gateway:
        await call(gateway, ("authorization", b"Bearer " + wrong % b"geheim-geheim-gehei"))
        entry = await lines.find("call")
    assert entry["code"] == "UNAUTHENTICATED"
    assert not holding(lines, "geheim")
