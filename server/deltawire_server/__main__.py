"""`deltawire-server`: reads the settings and serves until a signal stops it."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from deltawire_server import signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltawire_server.processes.worker_process import WorkerProcess
    from deltawire_server.settings import Settings


GC_THRESHOLDS = (2_000, 5, 200)
"""A full collection takes 1 us for each object of the active calls, so 0.1 s with hundreds of calls; these make it thirty
times as rare as the defaults. Little memory waits for it: when a call has ended, its large objects are in no reference cycles."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway.

    Args:
        argv: Without the program's name; by default the process's own.

    Returns:
        The exit status for `sys.exit`: 0 after a signal, 1 if it could not serve, 2 for invalid settings.
    """
    with signals.recorded():
        return _main(sys.argv[1:], owns_process=True) if argv is None else _main(argv)


def _main(arguments: Sequence[str], *, owns_process: bool = False) -> int:
    # gRPC's own output is not in the log format, and callers without a key could make it write a line for each call.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from deltawire_server.processes.worker_process import METRICS_VARIABLE, WorkerProcess

        process = WorkerProcess.taken_from(os.environ)
        if process is None:
            # prometheus-client reads it when it is imported; only the workers of a gateway write their metrics to files.
            os.environ.pop(METRICS_VARIABLE, None)
        from deltawire_server import settings
        from deltawire_server.processes import parent
    except ModuleNotFoundError as error:
        return _incomplete(error)

    def failed(status: int, *problems: str) -> int:
        if process is not None:
            process.report(problems=problems)  # the parent prints them once for all workers
        else:
            for problem in problems:
                print(f"deltawire-server: {problem}", file=sys.stderr)
        return status

    try:
        invocation = settings.parse(arguments, os.environ)
    except settings.SettingsError as error:
        return failed(2, *error.problems)
    if invocation.check_only:
        print(settings.effective(invocation.settings, invocation.origins))
        return 0
    if process is None and invocation.settings.server.workers > 1:
        return parent.run(arguments, invocation.settings)
    return _serve(arguments, invocation.settings, process, failed, owns_process=owns_process)


def _serve(
    arguments: Sequence[str],
    configured: Settings,
    process: WorkerProcess | None,
    failed: Callable[..., int],
    *,
    owns_process: bool,
) -> int:
    try:
        import uvloop

        from deltawire_server import app, settings
        from deltawire_server.errors import RegistryError
        from deltawire_server.lifecycle import ListenError
        from deltawire_server.registry.database import cause_text
        from deltawire_server.telemetry import in_background
    except ModuleNotFoundError as error:
        return _incomplete(error)
    if owns_process:
        # The modules and classes so far live until the end. Without freeze, each full collection would traverse them, which blocks
        # the event loop for 50 ms. Objects of uvloop and gRPC must not be frozen: the process crashes when they are freed.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
    try:
        with in_background():
            # A reload uses the same flags, environment and file.
            uvloop.run(app.serve(configured, lambda: settings.parse(arguments, os.environ).settings, process))
    except settings.SettingsError as error:
        return failed(2, *error.problems)
    except ListenError as error:
        return failed(1, str(error))
    except RegistryError as error:
        # The error's own message is for callers and contains no paths. This one is for the operator.
        url = settings.shown_database_url(configured.registry.database_url)
        cause = cause_text(error.__cause__ or error)
        remedy = (
            "correct the URL, or the user, password or database at the server"
            if url.startswith("postgresql")
            else "set --database-url to a file in a writable folder, to PostgreSQL, or to sqlite:// for memory only"
        )
        return failed(1, f"cannot use the database {url}: {cause}; {remedy}")
    return 0


def _incomplete(error: ModuleNotFoundError) -> int:
    print(
        f"deltawire-server needs the server dependencies ({error.name} is missing): pip install 'deltawire[server]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
