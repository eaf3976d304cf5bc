"""Images on a real vLLM: every form of an image reaches a vision model, and a text model rejects it.

The vision model is tiny and untrained; the length of the prompt shows that an image was received.
"""

from __future__ import annotations

import base64
import functools
import os
import subprocess
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient, CallError, InvalidRequestError, StopReason, UpstreamRejectedError, chat_request
from deltawire.v1 import message_pb2
from deltawire_server import app, settings
from deltawire_server.app import Gateway
from deltawire_server.images.load import Images
from tests.e2e.support import CALL_SECONDS, MODEL
from tests.images.server import Names, ok, web
from tests.support.images import PNG, png
from tests.support.vllm_cpu import VllmServer, set_up, vision_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e

PICTURE = png(300, 200, (200, 30, 30))
HOST = "images.example"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real vLLM with a vision model."""
    environment = set_up()
    folder = tmp_path_factory.mktemp("vision") / "model"
    maker = [str(environment.python), vision_model.__file__, str(environment.model), str(folder)]
    subprocess.run(maker, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    shape = ("--model", str(folder), "--load-format", "dummy", "--max-model-len", "1024")
    server = VllmServer(environment, arguments=(*shape, "--allowed-media-domains", "127.0.0.1"))
    server.model_name = "seeing"
    try:
        server.start()
        server.wait_healthy()
        yield server
    finally:
        server.stop()


def showing(*images: message_pb2.Image) -> message_pb2.ChatMessage:
    """A question about some images."""
    parts = [message_pb2.ContentPart(image=image) for image in images]
    content = [message_pb2.ContentPart(text="What is this?"), *parts]
    return message_pb2.ChatMessage(user=message_pb2.UserMessage(content=content))


async def prompt_tokens(client: AsyncClient, *images: message_pb2.Image) -> int:
    """The number of prompt tokens with these images; the call must succeed."""
    answer = await client.chat.create(chat_request(showing(*images), model="seeing", max_tokens=4))
    assert answer.stop_reason in (StopReason.STOP_REASON_OUT_OF_TOKENS, StopReason.STOP_REASON_END_OF_TURN)
    return answer.usage.prompt_tokens


def gateway(vllm: VllmServer, folder: Path, *flags: str) -> Gateway:
    """A gateway in this process."""
    where = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{folder / 'registry.db'}"]
    sets = [part for flag in flags for part in ("--set", f"images.{flag}")]
    variables = {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key}
    return Gateway(settings.parse([*where, *sets], variables).settings)


async def test_every_form_of_an_image(seeing: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, a data URL, and URLs that the gateway or vLLM fetches give the same prompt tokens."""
    # This machine is taken for the internet, which no setting can do.
    here = ip_address("127.0.0.1")
    names = Names({HOST: [["127.0.0.1"]]})
    monkeypatch.setattr(app, "Images", functools.partial(Images, permits=here.__eq__, look_up=names, tls=False))
    data_url = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    async with web({"/a.png": ok(PICTURE, "Content-Type: image/png")}) as server:
        fetched = ("urls=fetch", f"allowed_hosts={HOST}:{server.port}", "schemes=http")
        async with (
            gateway(seeing, tmp_path, *fetched) as running,
            AsyncClient(running.addresses[0], timeout=CALL_SECONDS) as client,
        ):
            expected = await prompt_tokens(client) + vision_model.IMAGE_TOKENS
            assert await prompt_tokens(client, message_pb2.Image(data=PICTURE)) == expected
            assert await prompt_tokens(client, message_pb2.Image(url=data_url)) == expected
            url = f"http://{HOST}:{server.port}/a.png"
            assert await prompt_tokens(client, message_pb2.Image(url=url)) == expected
            assert "deltawire/" in server.heads[-1]
        async with (
            gateway(seeing, tmp_path, "urls=pass") as running,
            AsyncClient(running.addresses[0], timeout=CALL_SECONDS) as client,
        ):
            url = f"http://127.0.0.1:{server.port}/a.png"
            assert await prompt_tokens(client, message_pb2.Image(url=url)) == expected
            assert "deltawire/" not in server.heads[-1]
    assert len(server.heads) == 2


async def test_invalid_and_too_many_images(seeing: VllmServer, tmp_path: Path) -> None:
    """A truncated image and too many images are rejected with the message of vLLM."""
    async with (
        gateway(seeing, tmp_path) as running,
        AsyncClient(running.addresses[0], timeout=CALL_SECONDS) as client,
    ):
        with pytest.raises(UpstreamRejectedError, match="Failed to load image"):
            await prompt_tokens(client, message_pb2.Image(data=PNG[:16]))
        with pytest.raises(UpstreamRejectedError, match="At most 1 image"):
            await prompt_tokens(client, *[message_pb2.Image(data=PICTURE)] * 2)
        with pytest.raises(InvalidRequestError, match=r"images\.urls"):
            await prompt_tokens(client, message_pb2.Image(url="https://images.example/"))


async def test_an_image_for_a_text_model(client: AsyncClient) -> None:
    """The request is rejected as invalid, with the message of vLLM."""
    message = showing(message_pb2.Image(data=PNG))
    with pytest.raises(CallError) as caught:
        await client.chat.create(chat_request(message, model=MODEL, max_tokens=4))
    assert isinstance(caught.value, UpstreamRejectedError)
    assert "multimodal" in caught.value.message
