"""`deltawire-server`: read the settings, serve until told to stop."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from deltawire_server import signals

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


GC_THRESHOLDS = (2_000, 5, 200)
"""A whole collection takes 1 us for each object of active calls, so a tenth of a second with hundreds of them: it is thirty times
as rare as by default. Little waits for it: what can be large is in no reference cycle when a call has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway.

    Args:
        argv: Without the program's name; by default the process's own.

    Returns:
        0 after a stop that was asked for, 1 if it could not serve, 2 for wrong settings. Give it to `sys.exit`.
    """
    with signals.noted():
        return _main(sys.argv[1:], owns_process=True) if argv is None else _main(argv)


def _main(arguments: Sequence[str], *, owns_process: bool = False) -> int:
    # What gRPC itself writes is no entry of the log, and callers without a key can make it write a line for each call.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import uvloop

        from deltawire_server import app, settings
        from deltawire_server.errors import RegistryError
        from deltawire_server.lifecycle import ListenError
        from deltawire_server.registry.database import said
    except ModuleNotFoundError as error:
        print(
            f"deltawire-server needs the server's libraries ({error.name} is missing): pip install 'deltawire[server]'",
            file=sys.stderr,
        )
        return 2
    try:
        invocation = settings.parse(arguments, os.environ)
    except settings.SettingsError as error:
        return _refused(error.problems)
    if invocation.check_only:
        print(settings.effective(invocation.settings, invocation.origins))
        return 0
    if owns_process:
        # Modules and classes live until the end. The garbage collector would go over all of them again and again, 50 ms each time.
        # Only here: what the event loop and gRPC make later must not be frozen, since they crash when it is freed.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
    try:
        # Reloaded from where they came from: the same flags, environment and file.
        uvloop.run(app.serve(invocation.settings, lambda: settings.parse(arguments, os.environ).settings))
    except settings.SettingsError as error:
        return _refused(error.problems)
    except ListenError as error:
        print(f"deltawire-server: {error}", file=sys.stderr)
        return 1
    except RegistryError as error:
        # Its own words are for callers, who have no business with paths; here the operator reads.
        url = settings.shown_database_url(invocation.settings.registry.database_url)
        cause = said(error.__cause__ or error)
        print(f"deltawire-server: cannot use the database {url}: {cause}", file=sys.stderr)
        return 1
    return 0


def _refused(problems: Iterable[str]) -> int:
    for problem in problems:
        print(f"deltawire-server: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
