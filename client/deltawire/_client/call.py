"""One call with one answer, and how it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc

from deltawire._failure import failed_call

if TYPE_CHECKING:
    from deltawire._channel import Outgoing

Q = TypeVar("Q")
R = TypeVar("R")


def invoke(method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call with one answer.

    Raises:
        CallError: It failed.
    """
    try:
        response, call = method.with_call(request, **outgoing.arguments)
    except (grpc.RpcError, ValueError) as error:
        raise outgoing.error(failed_call(error)) from error
    outgoing.began(call.initial_metadata())
    outgoing.ended(call.trailing_metadata())
    return response
