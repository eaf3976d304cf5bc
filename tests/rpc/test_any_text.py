"""Whatever a caller writes into a text of a request, the gateway has an answer, and never that it failed itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltawire.v1 import chat_completion_pb2, model_registry_pb2
from deltawire_server.app import Gateway
from deltawire_server.settings import ImageSettings
from tests.support.gateway import settings_of, taken_apart

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from deltawire_server.fake_vllm import FakeVllm

Path_ = tuple[FieldDescriptor, ...]
METHODS: list[MethodDescriptor] = [
    method
    for file in (chat_completion_pb2.DESCRIPTOR, model_registry_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
VALID = {
    "model": "fake",
    "name": "f",
    "call_id": "c",
    "arguments": "{}",
    "input_schema": '{"type": "object"}',
    "json_schema": '{"type": "object"}',
    "schema": '{"type": "object"}',
    "text": "hi",
    "provider_id": "vllm",
    "provider_model_id": "fake",
    "model_id": "mine",
    "id": "mine",
}
"""What the other texts of a message are, so that the one that is tried is reached."""

URLS = [
    *(
        "http://[::1",
        "http://[::1]",
        "http://[::1]:/",
        "http://[]/",
        "http://]/",
        "http://[v1.x]/",
        "http://[::1%25eth0]/x",
    ),
    *(
        "http://[::ffff:1.2.3.4]:99999/",
        "http://[fe80::1%eth0]/",
        "http://1.2.3.4.5/",
        "http://0x7f.1/",
        "http://xn--/",
    ),
    *(
        "http://[2606:4700:4700::1111]/x.png",
        "http://[2606:4700:4700::1111]:1/",
        "http://a..b/",
        "https://" + "a" * 64 + ".example/",
        "HTTPS://EXAMPLE.com:443/%zz",
        "http://٣.example/",
        "//x",
        "data:",
    ),
    *("data:,", "data:;base64,====", "data:image/png;base64,", "data:image/png;base64,é", "file:///etc/passwd"),
]
JSON = [
    *(
        "[",
        "]",
        "{}",
        "[]",
        "null",
        "NaN",
        "-0",
        '"\\ud800"',
        '{"\\ud800": 1}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
    ),
    *(
        '{"$ref": "#/allOf/' + "9" * 5000 + '"}',
        '{"$ref": "#/a"}',
        '{"$ref": "http://[::1"}',
        '{"type": ' * 100,
        "{" * 5000,
    ),
    *(
        '{"$id": "http://[::1", "$ref": "#"}',
        '{"type": "object", "$ref": "#/%"}',
        '{"pattern": "(?<=a+)b"}',
        '{"minimum": 1e400}',
    ),
]
NAMES = [
    *(
        "\0",
        "\n",
        "\r\nx: y",
        "\x7f",
        "\u2028",
        "\u202eevil",
        "\ufeff",
        "\uffff",
        "\U0010ffff",
        "é",
        "e\u0301",
        "٣",
        "²",
        "*",
    ),
    *(
        "[a-",
        "[!]",
        "../..",
        "%s%n{0}",
        "a" * 129,
        "a" * 5000,
        "vllm/fake",
        "vllm/",
        "/",
        "cmpl-" + "0" * 32 + "-00000000",
    ),
]
TEXTS = st.one_of(
    st.sampled_from([*URLS, *JSON, *NAMES]),
    st.text(max_size=30),
    st.text(alphabet=st.characters(categories=["Cc", "Cf", "Co", "Zl", "Zp", "Mn"]), min_size=1, max_size=10),
)


def texts_of(message: Descriptor, before: Path_ = ()) -> Iterator[Path_]:
    """The ways to every text in a message; not those that lead through one message twice."""
    for field in message.fields:
        path = (*before, field)
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path
        elif field.message_type is not None and all(step.message_type is not field.message_type for step in before):
            yield from texts_of(field.message_type, path)


PLACES = [(method, path) for method in METHODS for path in texts_of(method.input_type)]


def request_with(method: MethodDescriptor, path: Path_, text: str) -> Message:
    """A request that is valid but for one text."""
    request: Any = GetMessageClass(method.input_type)()
    if "chat" in method.input_type.fields_by_name and path[0].name != "resume":
        request.chat.model = "fake"
        request.chat.messages.add().user.text = "hi"
    _valid(request)
    message = request
    for field in path[:-1]:
        inner = getattr(message, field.name)
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            numbers = kind.fields_by_name["value"].type != FieldDescriptor.TYPE_STRING
            inner[text if path[-1].name == "key" else "k"] = 1 if numbers else text
            return cast("Message", request)
        message = inner.add() if field.is_repeated else inner
        message.SetInParent()
        _valid(message)
    if path[-1].is_repeated:
        getattr(message, path[-1].name).append(text)
    else:
        setattr(message, path[-1].name, text)
    return cast("Message", request)


def _valid(message: Any) -> None:  # noqa: ANN401 (any message)
    for field in message.DESCRIPTOR.fields:
        plain = field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated and field.containing_oneof is None
        if plain and field.name in VALID:
            setattr(message, field.name, VALID[field.name])


@pytest.fixture
async def channel(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[aio.Channel]:
    """To a gateway that allows as much as it can."""
    allowed = settings_of(vllm.base_url, tmp_path, provider={"allowed_extra_fields": "*"})
    images = ImageSettings(urls="fetch", allowed_hosts=("*",), schemes=("http", "https"), timeout=1)
    async with (
        Gateway(allowed.model_copy(update={"images": images})) as gateway,
        aio.insecure_channel(gateway.addresses[0]) as channel,
    ):
        yield channel


async def outcome(channel: aio.Channel, method: MethodDescriptor, request: Message) -> str:
    """The reason that a call fails with; empty if it does not, or a watch has begun."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    data = request.SerializeToString()
    try:
        if method.server_streaming:
            stream: Any = channel.unary_stream(name)
            call = stream(data)
            while await call.read() is not aio.EOF and method.name != "WatchModels":
                pass
            call.cancel()
        else:
            unary: Any = channel.unary_unary(name)
            await unary(data)
    except aio.AioRpcError as error:
        return taken_apart(error).reason
    return ""


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), text=TEXTS)
async def test_no_text_is_an_internal_error(
    channel: aio.Channel, place: tuple[MethodDescriptor, Path_], text: str
) -> None:
    """At every place of every RPC where a text can be."""
    method, path = place
    request = request_with(method, path, text)
    reason = await outcome(channel, method, request)
    assert reason not in {"INTERNAL", "UPSTREAM_ERROR"}, request
