"""The process's file descriptors: as many as it may have, and some kept for what is not a client's connection."""

from __future__ import annotations

import contextlib
import resource

MOST = 1 << 20
"""What an unlimited process gets: Linux's own default maximum (fs.nr_open)."""


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one.

    Returns:
        The limit now in force. Give it to `connections`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # forbidden in some sandboxes: the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connections(limit: int, wanted: int) -> int:
    """How many connections clients may have, so that they cannot take the descriptors that their calls need.

    Each streamed answer needs a connection to a provider too, so at least half of the descriptors are kept from clients.

    Args:
        limit: Descriptors of the process.
        wanted: From the settings.

    Returns:
        At least 1.
    """
    return max(1, min(wanted, limit // 2))
