"""A balancer of connections: each new one goes to the next gateway, whatever is sent over it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT = 10


class RoundRobin:
    """Hands connections out in turn.

    Attributes:
        target: Where it listens.
        made: How many connections were accepted so far.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.made = 0
        self._targets = targets
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for_open(self, count: int) -> None:
        """Wait until so many connections are open.

        Raises:
            AssertionError: They are not within 10 s.
        """
        end = time.monotonic() + LIMIT
        while len(self._pairs) != count:
            assert time.monotonic() < end, f"{len(self._pairs)} connections are open, not {count}"
            time.sleep(0.01)

    def cut(self) -> None:
        """Close every connection, as if the way to the gateways was lost."""
        with self._lock:
            pairs = tuple(self._pairs)
        for pair in pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and close every connection."""
        # Closing alone does not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.wait_for_open(0)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._targets[self.made % len(self._targets)].rpartition(":")
            self.made += 1
            pair = (caller, socket.create_connection((host, int(port))))
            with self._lock:
                self._pairs.append(pair)
            threading.Thread(target=self._serve, args=(pair,), daemon=True).start()

    def _serve(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Copy both ways until either side ends."""
        back = threading.Thread(target=_copy, args=(pair[1], pair[0]), daemon=True)
        back.start()
        _copy(*pair)
        back.join()
        for each in pair:
            each.close()
        with self._lock:
            self._pairs.remove(pair)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def round_robin(*targets: str) -> Iterator[RoundRobin]:
    """A balancer in front of these gateways."""
    proxy = RoundRobin(targets)
    try:
        yield proxy
    finally:
        proxy.close()
