"""Logs calls that are canceled right after their start, or refused by a limit, in one line per second and connection.

Such calls are cheap for a client, but a log line is not: without this, a client could cause tens of thousands of lines per second.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from deltawire_server.telemetry import get_logger

QUICK_SECONDS = 1.0
"""A call that is canceled earlier than this after its start counts as reset."""

MAX_PEERS = 1000
"""Connections counted separately in one second. The others share one line, so that many connections cannot fill the log."""

OTHERS = "others"
"""The peer in the line of connections beyond `MAX_PEERS`."""

_log = get_logger(__name__)


class Resets:
    """Counts reset or refused calls. One of each for the process.

    Args:
        event: What the line says of them.
    """

    def __init__(self, event: str = "calls canceled within a second of their start") -> None:
        self._event = event
        self._counts: Counter[str] = Counter()

    def first(self, peer: str) -> bool:
        """Count a call.

        Args:
            peer: The connection, as returned by gRPC's `peer()`.

        Returns:
            Whether to log the call in its own line: it is the first of its connection in this second. The others are logged in one
            line at the end of the second.
        """
        if not self._counts:
            asyncio.get_running_loop().call_later(QUICK_SECONDS, self._flush)
        if peer not in self._counts and len(self._counts) >= MAX_PEERS:
            peer = OTHERS
        self._counts[peer] += 1
        return self._counts[peer] == 1

    def _flush(self) -> None:
        counts, self._counts = self._counts, Counter()
        for peer, count in counts.items():
            if count > 1:
                _log.warning(self._event, peer=peer, calls=count - 1)
