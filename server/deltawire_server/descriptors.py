"""File descriptors: raises the process's limit, and reserves some for uses other than client connections."""

from __future__ import annotations

import contextlib
import resource

MOST = 1 << 20
"""The limit of an unlimited process: the default of Linux (fs.nr_open)."""


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one.

    Returns:
        The new limit. Pass it to `connections`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid it: the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connections(limit: int, wanted: int) -> int:
    """The number of client connections that leaves enough descriptors for the calls.

    Each streamed answer also needs a connection to a provider, so at least half of the descriptors are reserved.

    Args:
        limit: The process's limit of descriptors.
        wanted: The limit of connections in the settings.

    Returns:
        At least 1.
    """
    return max(1, min(wanted, limit // 2))
