"""Limits a request's number of fields, and its bytes without images. The check runs on the serialized bytes, before parsing.

If a message consists of empty fields, the parser takes up to 20 times its size in memory and one second per 40 MiB, and it cannot
be interrupted. This scan reads only the tags and skips the content of strings and bytes, so large images cost nothing.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pool

from deltawire_server.errors import CallerError, Reason, Violation, invalid_request
from deltawire_server.pacing import give_way

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.descriptor import Descriptor

MAX_FIELDS = 100_000
"""Fields of one request, including those of nested messages; parsing them takes about 10 ms and 5 MiB. A conversation of 10,000
messages, which is the limit, has about 50,000."""

MAX_BYTES = 8 * 1024 * 1024
"""Bytes of a request without its images. Texts and JSON are validated, copied and encoded in uninterruptible pieces, which take up
to 10 ms per MiB. The limit is about two million tokens, more than the context of any model."""

IMAGES = frozenset({"deltawire.v1.Image.data", "deltawire.v1.Image.url"})
"""Fields that do not count toward `MAX_BYTES`: images have their own limits, and a URL may be a `data:` URL."""

SCANNED_BYTES = 256 * 1024
"""Shorter requests are not scanned: with two bytes per field, they have about `MAX_FIELDS` fields at most."""

STEP = 2_500
"""Fields that are scanned before other calls run: 1 to 3 ms."""

NOT_A_MESSAGE = "the request is not a message of this method: its bytes are not protobuf, or a text in it is not UTF-8"
"""For a request whose invalid text cannot be found."""

_VARINT, _LENGTH, _GROUP, _GROUP_END = 0, 2, 3, 4
_VARINT_BYTES = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]")
_FIXED = {1: 8, 5: 4}
"""Bytes of the wire types of fixed size."""
_UNKNOWN: dict[int, Descriptor | _Kind] = {}
"""The table of a type whose fields are unknown."""


class _Kind(enum.Enum):
    """The content of a length-delimited field that is neither a message nor a skipped string or bytes."""

    IMAGE = enum.auto()
    NUMBERS = enum.auto()


async def check(data: bytes, method: str) -> None:
    """Refuse a request with too many fields, or with too many bytes without images. Other calls run in between.

    Args:
        data: The request's bytes.
        method: The method's path, such as ``/deltawire.v1.ChatCompletion/CountTokens``; it must exist.

    Raises:
        CallerError: INVALID_REQUEST: more than `MAX_FIELDS` fields or `MAX_BYTES` bytes, or bytes that are not protobuf.
            Otherwise parse the request.
    """
    if len(data) <= SCANNED_BYTES:
        return
    images = 0
    for count, images in scan(data, _request_of(method)):  # noqa: B007 (its last value is used)
        if count > MAX_FIELDS:
            raise CallerError(
                Reason.INVALID_REQUEST,
                f"the request has more than {MAX_FIELDS} fields, including nested fields and bytes of packed numbers: send fewer"
                " messages, parts or list entries",
            )
        await give_way()
    if len(data) - images > MAX_BYTES:
        raise CallerError(
            Reason.INVALID_REQUEST,
            f"the request has {len(data) - images} bytes besides its images, at most {MAX_BYTES} are allowed: send fewer or"
            " shorter messages, tools and schemas",
        )


def scan(  # noqa: C901 (one flat loop: a call for each field would double the time)
    data: bytes, message: Descriptor
) -> Iterator[tuple[int, int]]:
    """Count the fields of a message and of its nested messages; each byte of a packed list counts as a field.

    Args:
        data: The message's bytes.
        message: Its type.

    Yields:
        The count and the bytes of images so far, every `STEP` fields, and at the end. Stop iterating when the count is too
        high.

    Raises:
        CallerError: INVALID_REQUEST: the bytes are not protobuf. Only the parser finds other errors, such as text that is not
            UTF-8.
    """
    count, images, due = 0, 0, STEP
    at, end = 0, len(data)
    nested = _nested(message)
    outer: list[tuple[int, Mapping[int, Descriptor | _Kind]]] = []
    groups = 0  # the number of open groups; proto3 has no groups, so all fields in a group are unknown
    around = nested
    try:
        while True:
            while at == end:
                if groups:
                    raise _MalformedError
                if not outer:
                    yield count, images
                    return
                end, nested = outer.pop()
            # Varints of one byte, which are nearly all, are read in place: a function call for each would double the time.
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(data, at - 1)
            count += 1
            kind = tag & 7
            if kind == _LENGTH:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(data, at - 1)
                if at + size > end:
                    raise _MalformedError
                if tag not in nested:
                    at += size
                elif (inner := nested[tag]) is _Kind.IMAGE:
                    images += size
                    at += size
                elif inner is _Kind.NUMBERS:
                    count += size
                    at += size
                else:
                    outer.append((end, nested))
                    end, nested = at + size, _nested(inner)
            elif kind == _VARINT:
                if data[at] < 0x80:
                    at += 1
                elif (number := _VARINT_BYTES.match(data, at)) is not None:
                    at = number.end()
                else:
                    raise _MalformedError
            elif kind in _FIXED:
                at += _FIXED[kind]
            elif kind == _GROUP:
                if not groups:
                    nested, around = _UNKNOWN, nested
                groups += 1
            elif kind == _GROUP_END and groups:
                groups -= 1
                if not groups:
                    nested = around
            else:
                raise _MalformedError
            if at > end:
                raise _MalformedError
            if count >= due:
                yield count, images
                due = count + STEP
    except (_MalformedError, IndexError):
        raise CallerError(Reason.INVALID_REQUEST, NOT_A_MESSAGE) from None


async def unparsed(data: bytes, method: str) -> CallerError:
    """The error for a request that passed `check` and that the parser refuses: usually for a text that is not UTF-8.

    Args:
        data: The request's bytes.
        method: As for `check`.

    Returns:
        INVALID_REQUEST, which names the first such text if there is one; raise it.
    """
    try:
        for count, field in enumerate(_texts(data, 0, len(data), _request_of(method), ""), start=1):
            if field:
                return invalid_request([Violation(field, "is not UTF-8 text: encode it as UTF-8")])
            if count % STEP == 0:
                await give_way()
    except (_MalformedError, IndexError, RecursionError):
        pass
    return CallerError(Reason.INVALID_REQUEST, NOT_A_MESSAGE)


def _texts(data: bytes, at: int, end: int, message: Descriptor, path: str) -> Iterator[str]:
    """For each field of a message, its path if it is a text that is not UTF-8, else nothing."""
    counts: Counter[int] = Counter()
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind != _LENGTH:
            at = _varint(data, at)[1] if kind == _VARINT else at + _FIXED.get(kind, end)
        else:
            size, at = _varint(data, at)
            field = message.fields_by_number.get(tag >> 3)
            if field is not None:
                here = f"{path}{field.name}[{counts[tag]}]" if field.is_repeated else f"{path}{field.name}"
                counts[tag] += 1
                if field.message_type is not None:
                    yield from _texts(data, at, at + size, field.message_type, f"{here}.")
                elif (
                    field.type == field.TYPE_STRING
                    and (text := data[at : at + size]).decode(errors="ignore").encode() != text
                ):
                    yield here
            at += size
        yield ""


def _request_of(method: str) -> Descriptor:
    return descriptor_pool.Default().FindMethodByName(method[1:].replace("/", ".")).input_type


class _MalformedError(Exception):
    """The bytes are not protobuf."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at an offset, and the offset after it; 64 bits take at most 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _MalformedError


@cache
def _nested(message: Descriptor) -> Mapping[int, Descriptor | _Kind]:
    """The fields that are not skipped, by tag: images, messages with their type, and packed numbers."""
    table: dict[int, Descriptor | _Kind] = {}
    for field in message.fields:
        tag = field.number << 3 | _LENGTH
        if field.full_name in IMAGES:
            table[tag] = _Kind.IMAGE
        elif field.message_type is not None:
            table[tag] = field.message_type
        elif field.type not in (field.TYPE_STRING, field.TYPE_BYTES):
            table[tag] = _Kind.NUMBERS
    return table
