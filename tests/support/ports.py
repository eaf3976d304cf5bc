"""Ports for servers that stop and start again at the same address."""

from __future__ import annotations

import contextlib
import secrets
import socket

# Below those that Linux gives to outgoing connections: none of these takes one while its server is stopped.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A free port of 127.0.0.1 outside of the range of ephemeral ports.

    Raises:
        OSError: None was found.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers bind it: what is left of old connections does not matter.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port was found from {_PORTS.start} to {_PORTS.stop - 1}")
