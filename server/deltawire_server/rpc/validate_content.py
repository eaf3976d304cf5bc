"""Validates the content of messages: texts and images. The type of an image is determined by its bytes, not by its declared type.

URLs are only parsed here; the `images` package decides whether and by whom they are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from deltawire_server.images.data_urls import DataUrlError, data_of, is_data_url, too_large
from deltawire_server.images.sniff import KINDS, media_type_of
from deltawire_server.pacing import give_way
from deltawire_server.upstream.request import Content, ImageData, ImageUrl
from deltawire_server.upstream.web_address import UrlError, web_address

if TYPE_CHECKING:
    from deltawire.v1 import message_pb2
    from deltawire_server.rpc.violations import Violations

    Turn: TypeAlias = (
        message_pb2.SystemMessage
        | message_pb2.DeveloperMessage
        | message_pb2.UserMessage
        | message_pb2.AssistantMessage
        | message_pb2.ToolMessage
    )
    """A message of some role: each has `text` and `content`."""

_MIB = 1024 * 1024
_SHOWN_BYTES = 12


@dataclass(frozen=True, slots=True)
class ContentLimits:
    """Limits of a request's content; see `settings.model.ImageSettings` for the defaults.

    Attributes:
        max_images: Images of all messages together.
        max_image_bytes: Bytes of one image.
    """

    max_images: int = 16
    max_image_bytes: int = 16 * _MIB


class ContentReader:
    """Converts the content of one request's messages.

    Args:
        violations: Collects violations. If there are any, the returned values must not be used.
        limits: Limits of the request's content.
    """

    def __init__(self, violations: Violations, limits: ContentLimits) -> None:
        self._violations = violations
        self._limits = limits
        self._image_count = 0

    async def read(self, path: str, turn: Turn, *, required: bool = True) -> tuple[Content, ...]:
        """Convert one message's content, in either form. Other calls run while images are decoded.

        Args:
            path: The path of the message, such as ``chat.messages[0].user``.
            turn: The message.
            required: Whether the content must not be empty.
        """
        if turn.HasField("text"):
            if turn.content:
                self._violations.add(path, "has both text and content: set one of them")
            return (turn.text,)
        contents: list[Content] = []
        for index, part in enumerate(turn.content):
            here = f"{path}.content[{index}]"
            match part.WhichOneof("part"):
                case "text":
                    contents.append(part.text)
                case "image":
                    contents.append(await self._image(f"{here}.image", part.image))
                case None:
                    self._violations.add(here, "is empty: set text or image")
                    contents.append("")
        if required and not contents:
            self._violations.add(path, "needs text, or at least one part of content")
        return tuple(contents)

    async def _image(self, path: str, image: message_pb2.Image) -> Content:
        self._image_count += 1
        if self._image_count > self._limits.max_images:
            if self._image_count == self._limits.max_images + 1:
                self._violations.add(path, f"exceeds the limit of {self._limits.max_images} images in a request")
            return ""
        # Copying an image takes up to 10 ms, as long as parsing the request has taken.
        await give_way()
        match image.WhichOneof("source"):
            case "data":
                return self._data(f"{path}.data", image.data)
            case "url":
                return await self._url(f"{path}.url", image.url)
            case None:
                self._violations.add(path, "is empty: set url or data")
                return ""

    async def _url(self, path: str, url: str) -> Content:
        try:
            if is_data_url(url):
                return self._data(path, await data_of(url, self._limits.max_image_bytes))
            return ImageUrl(web_address(url), path)
        except (DataUrlError, UrlError) as error:
            self._violations.add(path, str(error))
            return ""

    def _data(self, path: str, data: bytes) -> Content:
        if len(data) > self._limits.max_image_bytes:
            self._violations.add(path, str(too_large(self._limits.max_image_bytes)))
            return ""
        media_type = media_type_of(data)
        if media_type is None:
            seen = f"begins with {data[:_SHOWN_BYTES]!r}" if data else "is empty"
            self._violations.add(path, f"must be a {KINDS} file, but {seen}")
            return ""
        return ImageData(data, media_type)
