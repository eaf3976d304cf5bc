"""Calls that are canceled as soon as they have begun, in one log line per second and connection.

Opening and resetting streams is cheap for a client, and a log line is not: without this, a client could make the gateway write
tens of thousands of lines a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from deltawire_server.telemetry import get_logger

QUICK_SECONDS = 1.0
"""A call that is canceled earlier than this after its start counts as reset."""

MAX_PEERS = 1000
"""Connections that are counted apart in one second; the rest share one line, so that connections cannot fill the log either."""

OTHERS = "others"
"""The peer in the line of connections beyond `MAX_PEERS`."""

_log = get_logger(__name__)


class Resets:
    """Counts reset calls. One for the process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def first(self, peer: str) -> bool:
        """Count a reset call.

        Args:
            peer: Its connection, as gRPC names it.

        Returns:
            Whether to log it in a line of its own: it is the first of its connection in this second. The others are logged
            together when the second is over.
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
                _log.warning("calls canceled within a second of their start", peer=peer, calls=count - 1)
