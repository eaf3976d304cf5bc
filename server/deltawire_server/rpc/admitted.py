"""The active calls that access control admitted, so that the calls of a revoked caller can be ended."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.access import REVOKED
from deltawire_server.errors import GatewayError, Reason
from deltawire_server.pacing import give_way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(slots=True, eq=False)
class _Call:
    owner: str
    method: str
    begun: Callable[[], bool]
    assertion: str
    task: asyncio.Task[object] | None
    ended: bool = False


class Admitted:
    """A set of calls. Each call is `entered` by its task; `end` ends some of them."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()

    @contextmanager
    def entered(
        self, owner: str, method: str, begun: Callable[[], bool] = lambda: False, assertion: str = ""
    ) -> Iterator[None]:
        """Handle a call within this context.

        Args:
            owner: The caller's owner, for `Access.admits`.
            method: The gRPC method path.
            begun: Whether a message of the answer was sent. `end` skips such a call: a stream that has begun ends with its
                completion, whose last message has the reason.
            assertion: From `access.Trust`, if a trusted proxy asserts who the caller is.

        Raises:
            GatewayError: ACCESS_CHANGED: `end` ended the call. Send it to the caller.
        """
        call = _Call(owner, method, begun, assertion, asyncio.current_task())
        self._calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            # As in asyncio.timeout: another cancel, the client's own, takes precedence.
            if call.ended and call.task is not None and not call.task.uncancel():
                raise GatewayError(Reason.ACCESS_CHANGED, REVOKED) from None
            raise
        finally:
            self._calls.discard(call)

    async def end(self, admits: Callable[[str, str, str], bool]) -> None:
        """End every call that is no longer admitted and whose answer has not begun. Other calls run in between.

        Args:
            admits: `Access.admits`.
        """
        for call in tuple(self._calls):
            over = call.ended or call.begun() or admits(call.owner, call.method, call.assertion)
            if call.task is not None and not over:
                call.ended = True
                call.task.cancel()
                await give_way()
