"""Where a completion may be when its gateway process was not reached: on a new connection, after a pause.

Behind a balancer of connections each new one may reach another process. Only the process that began a completion has it,
and the others answer WRONG_REPLICA if its id says so.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltawire._channel import Outgoing
    from deltawire._errors import WrongReplicaError

# New connections of one call. With three processes behind a balancer that draws, 1 in 38 calls still finds none.
MAX_CONNECTIONS = 8
# Seconds between two calls; the pauses before eight connections add up to at most 9.5 s.
MIN_PAUSE, MAX_PAUSE = 0.1, 2.0


logger = logging.getLogger("deltawire")


def log_search(why: object) -> None:
    """Log that new connections are tried, and the error that says so: it can take 10 s."""
    logger.warning("trying up to %d new connections: %s", MAX_CONNECTIONS, why)


class Pauses:
    """Seconds to wait between calls.

    The longest that may be drawn doubles each time; the shortest is half of it, so that clients that were disconnected
    together do not reconnect together.

    Args:
        draw: Draws a number between two.
    """

    def __init__(self, draw: Callable[[float, float], float]) -> None:
        self._draw = draw
        self.reset()

    def reset(self) -> None:
        """Begin with the shortest again."""
        self._longest = MIN_PAUSE / 2

    def next(self) -> float:
        """The next pause."""
        self._longest = min(MAX_PAUSE, 2 * self._longest)
        return self._draw(self._longest / 2, self._longest)


class Search:
    """The calls of one unary request until one reaches the process that has the completion.

    Args:
        outgoing: The call; its `timeout` covers all attempts.
        connections: How many new connections can be made.
    """

    def __init__(self, outgoing: Outgoing, connections: int) -> None:
        timeout: float | None = outgoing.arguments["timeout"]
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._outgoing = outgoing
        self._connections = self._left = connections
        self._logged = False
        self._pauses = Pauses(random.uniform)

    def next(self, error: WrongReplicaError) -> float | None:
        """Seconds to wait before the next connection, after a call that failed like this.

        None means that the error is to be raised: no connection is left, or the pause would outlast the timeout.
        """
        pause = max(self._pauses.next(), error.retry_after or 0.0)
        if self._deadline is not None:
            self._outgoing.arguments["timeout"] = self._deadline - time.monotonic() - pause
            if self._outgoing.arguments["timeout"] <= 0:
                return None
        self._left -= 1
        if self._left < 0:
            return None
        self._outgoing.elsewhere(self._connections - self._left)
        if not self._logged:
            self._logged = True
            log_search(error)
        return pause
