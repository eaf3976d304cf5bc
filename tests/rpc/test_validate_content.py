"""What messages hold: texts and images, what is refused of them, and what they become."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2
from deltawire_server.errors import CallerError, Reason, Violation
from deltawire_server.rpc.validate_content import ContentLimits
from deltawire_server.upstream.request import Content, ImageData, ImageUrl
from deltawire_server.upstream.web_address import web_address
from tests.support.gateway import ask
from tests.support.images import IMAGES, NO_IMAGES, PNG
from tests.support.turns import chat_request

FIELD = "chat.messages[0].user.content[0].image"
ADDRESS = "https://images.example/a.png"


def image(**source: Any) -> message_pb2.ContentPart:  # noqa: ANN401 (url or data)
    """A part that is an image."""
    return message_pb2.ContentPart(image=message_pb2.Image(**source))


def message(**role: Any) -> message_pb2.ChatMessage:  # noqa: ANN401 (whatever the message takes)
    """A message."""
    return message_pb2.ChatMessage(**role)


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """What holds this."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def saying(*parts: message_pb2.ContentPart) -> chat_pb.ChatRequest:
    """A request with one user's message of these parts."""
    return ask(messages=[message(user={"content": parts})])


def content_of(*parts: message_pb2.ContentPart, limits: ContentLimits | None = None) -> tuple[Content, ...]:
    """What a message of these parts becomes."""
    return chat_request(saying(*parts), limits).messages[0].content


def violations_of(*parts: message_pb2.ContentPart, limits: ContentLimits | None = None) -> tuple[Violation, ...]:
    """What is refused in a message of these parts."""
    with pytest.raises(CallerError) as caught:
        chat_request(saying(*parts), limits)
    assert caught.value.reason is Reason.INVALID_REQUEST
    return caught.value.violations


def violation_of(*parts: message_pb2.ContentPart, limits: ContentLimits | None = None) -> Violation:
    """The only violation about a message of these parts."""
    (violation,) = violations_of(*parts, limits=limits)
    return violation


@pytest.mark.parametrize("media_type", IMAGES)
@pytest.mark.parametrize("declared", ["image/png", "text/html", "image/svg+xml"])
def test_bytes_say_what_an_image_is(media_type: str, declared: str) -> None:
    """Sent as they are or in an address; what the address declares is not believed."""
    expected = ImageData(IMAGES[media_type], media_type)
    given = image(data=IMAGES[media_type]), image(url=data_url(IMAGES[media_type], declared))
    assert content_of(*given) == (expected, expected)


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image(name: str) -> None:
    """Is refused however it comes, and the violation shows how it begins."""
    data = NO_IMAGES[name]
    for field, part in (("data", image(data=data)), ("url", image(url=data_url(data)))):
        violation = violation_of(part)
        assert violation.field == f"{FIELD}.{field}"
        assert violation.description.startswith("must be a PNG, JPEG, GIF, WebP or BMP file, but begins with b")
        assert repr(data[:4])[2:-1] in violation.description


@pytest.mark.parametrize(
    ("part", "field", "said"),
    [
        (message_pb2.ContentPart(), FIELD.removesuffix(".image"), "is empty: set text or image"),
        (image(), FIELD, "is empty: set url or data"),
        (image(data=b""), f"{FIELD}.data", "is empty"),
        (image(url="data:,"), f"{FIELD}.url", "is empty"),
        (image(url=""), f"{FIELD}.url", "must begin with https://, http:// or data:"),
        (image(url="file:///etc/passwd"), f"{FIELD}.url", "must begin with https://, http:// or data:"),
        (image(url="ftp://images.example/a.png"), f"{FIELD}.url", "must begin with"),
        (image(url="gopher://127.0.0.1:6379/_"), f"{FIELD}.url", "must begin with"),
        (image(url="images/a.png"), f"{FIELD}.url", "must begin with"),
        (image(url="https://a@images.example/"), f"{FIELD}.url", "must not carry credentials"),
        (image(url="https://images.example/a b"), f"{FIELD}.url", "white space"),
        (image(url="https://images.example/\r\nx:y"), f"{FIELD}.url", "white space, control characters"),
        (image(url="https:\\\\images.example"), f"{FIELD}.url", "backslashes"),
        (image(url="DATA:image/png;base64,!"), f"{FIELD}.url", "is not base64"),
        (image(url="data:image/png"), f"{FIELD}.url", "must be like data:image/png;base64,…"),
    ],
)
def test_refused(part: message_pb2.ContentPart, field: str, said: str) -> None:
    """Each by its field, in words that say what to do."""
    violation = violation_of(part)
    assert violation.field == field
    assert said in violation.description


def test_addresses_are_kept_in_their_one_form() -> None:
    """Each URL is kept with its field, for the errors of the fetch."""
    assert content_of(message_pb2.ContentPart(text="x"), image(url="HTTPS://Images.EXAMPLE:443/a.png#top")) == (
        "x",
        ImageUrl(web_address(ADDRESS), "chat.messages[0].user.content[1].image.url"),
    )


def test_any_role_may_show_images() -> None:
    """Which roles may is for the model's chat template to say."""
    parts = [image(data=PNG)]
    messages = [
        message(system={"content": parts}),
        message(developer={"content": parts}),
        message(user={"content": parts}),
        message(assistant={"content": parts}),
        message(tool={"content": parts, "call_id": "c"}),
    ]
    request = chat_request(ask(messages=messages))
    assert [message.content for message in request.messages] == [(ImageData(PNG, "image/png"),)] * 5


def test_size() -> None:
    """Of one image, to the byte, however it comes."""
    limits = ContentLimits(max_image_bytes=len(PNG))
    for field, part in (("data", image(data=PNG + b"x")), ("url", image(url=data_url(PNG + b"x")))):
        said = f"holds more than {len(PNG)} bytes, the most of an image"
        assert violation_of(part, limits=limits) == Violation(f"{FIELD}.{field}", said)
    assert len(content_of(image(data=PNG), image(url=data_url(PNG)), limits=limits)) == 2


def test_number() -> None:
    """Of all messages together; told once, by the first that is too many."""
    turn = message(user={"content": [image(data=PNG), image(url=ADDRESS)]})
    limits = ContentLimits(max_images=4)
    assert len(chat_request(ask(messages=[turn, turn]), limits).messages) == 2
    with pytest.raises(CallerError) as caught:
        chat_request(ask(messages=[turn, turn, turn, turn]), limits)
    assert caught.value.violations == (
        Violation("chat.messages[2].user.content[0].image", "exceeds the limit of 4 images in a request"),
    )


def test_every_violation_is_told_at_once() -> None:
    """In the order of the fields."""
    fields = [violation.field for violation in violations_of(image(), image(data=b"x"), image(url="x"))]
    path = "chat.messages[0].user.content"
    assert fields == [f"{path}[0].image", f"{path}[1].image.data", f"{path}[2].image.url"]
