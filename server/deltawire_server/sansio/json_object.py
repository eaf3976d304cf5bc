"""Checks that the arguments of a tool call are one JSON object."""

from __future__ import annotations

import json
import re
from typing import NamedTuple, NoReturn

import msgspec

from deltawire_server.sansio.events import FailureReason

WHITE = " \t\r\n"
"""The white space of JSON."""


class Problem(NamedTuple):
    """Why a text is not a JSON object, and where parsing stopped."""

    reason: FailureReason
    message: str
    byte_offset: int | None


_TOO_DEEP = Problem(FailureReason.MALFORMED_JSON, "the arguments are nested too deeply to be parsed", None)


def find_problem(text: str) -> Problem | None:
    """Check that a text is one JSON object, by the strict grammar: no NaN, no text after it.

    Duplicate keys and numbers of any size are allowed.

    Returns:
        The problem; `None` if the text is an object, which can be sent unchanged.
    """
    try:
        _SYNTAX.decode(text)
    except RecursionError:
        return _TOO_DEEP
    except ValueError as error:
        # msgspec is stricter than the grammar for lone surrogates, and its messages are less clear than Python's.
        problem = _read(text) if len(text) <= MAX_EXPLAINED else _read_large(text, error)
        if problem is not None:
            return problem
    if not text.lstrip(WHITE).startswith("{"):
        return Problem(FailureReason.NOT_AN_OBJECT, "the arguments are JSON, but not an object", None)
    return None


_SYNTAX = msgspec.json.Decoder(msgspec.Raw)
"""Checks the syntax without building objects: at most 20 ms for 4 MiB, where `json.loads` can take 700 ms and 90 MiB."""

MAX_EXPLAINED = 64 * 1024
"""Limit, in characters, for invalid arguments that Python's parser reads again for its clearer error message."""

_HALVES = re.compile("[\ud800-\udfff]")
_ESCAPED_HALVES = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_POSITION = re.compile(r" \(byte (\d+)\)$")


def _read_large(text: str, error: ValueError) -> Problem | None:
    """The problem of a large text, given the error of `_SYNTAX`; `None` if the only problem is lone surrogates."""
    mended = text
    if isinstance(error, UnicodeEncodeError):
        mended = _HALVES.sub("\uffff", mended)
    if "\\u" in mended:
        mended = _ESCAPED_HALVES.sub(r"\\u0000", mended)
    if mended is not text:  # positions are unchanged, because each replacement has the same length
        try:
            _SYNTAX.decode(mended)
        except RecursionError:
            return _TOO_DEEP
        except ValueError as second:
            error = second
        else:
            return None
    message = str(error).removeprefix("JSON is malformed: ")
    position = _POSITION.search(message)
    offset = int(position[1]) if position else len(mended.encode())
    return Problem(FailureReason.MALFORMED_JSON, f"the arguments are not JSON: {_POSITION.sub('', message)}", offset)


def _read(text: str) -> Problem | None:
    try:
        json.loads(text, parse_int=_unread, parse_float=_unread, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        return _malformed(text, error.msg, error.pos)
    except _ConstantError as error:
        return _malformed(text, f"{error} is not JSON", _constant_position(text))
    except RecursionError:
        return _TOO_DEEP
    return None


class _ConstantError(Exception):
    """NaN or an infinity, which Python's parser accepts and JSON does not have."""


def _unread(_: str) -> int:
    return 0


def _refuse(constant: str) -> NoReturn:
    raise _ConstantError(constant)


_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<constant>NaN|-?Infinity)')


def _constant_position(text: str) -> int:
    """The position of the first such constant outside of strings, which the parser does not report."""
    return next(match.start() for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])


def _malformed(text: str, message: str, position: int) -> Problem:
    offset = len(text[:position].encode("utf-8", "surrogatepass"))
    return Problem(FailureReason.MALFORMED_JSON, f"the arguments are not JSON: {message}", offset)
