"""The command `deltawire`: chat with a model, and list, register and change models.

Standard output has only the answer: text, or with --json one message per line. Everything else goes to standard error:
reasoning (only if that is a terminal), notes and errors. Exit status: 0 the answer is complete, whatever its stop reason, or
the reader of standard output closed it; 1 the call failed, or its output cannot be written; 2 wrong usage; 130 Ctrl-C.

The modules, in the order of a command's execution:

    run           runs a command; errors in, exit status out
    arguments     every command and option, and the function that runs it; request_arguments: the options of a request
    connection    options in, a client out; the first connection
    chat          `chat`, `count-tokens`                    completions   `completions`, `cancel`, `get`, `resume`
                                                            registry      `models`, `providers` and `health`
    request       options and files in, a ChatRequest out   files         the text of a file or of standard input
    follow        one answer, from its stream to the end    interrupt     Ctrl-C while a stream is read
    answer        prints an answer while it arrives         terminal      text in pieces, harmless to a terminal
    output        JSON lines, tables, notes, errors         status        exit statuses, and their errors
"""

from __future__ import annotations

import os
import signal
import sys

from deltawire._cli.status import INTERRUPTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name. None takes the process's own.

    Raises:
        SystemExit: As argparse does: 0 after --help and --version, 2 for wrong usage.

    Pass the returned exit status to `sys.exit`.
    """
    # The log of gRPC's C core repeats errors that the command reports. It must be off before gRPC is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        before = signal.getsignal(signal.SIGINT)
        # Python would print a traceback if Ctrl-C came during an import. No call has begun yet that must be ended.
        if before is signal.default_int_handler and _in_main_thread():
            signal.signal(signal.SIGINT, _leave)
        try:
            from deltawire._cli.run import run
        finally:
            if signal.getsignal(signal.SIGINT) is _leave:
                signal.signal(signal.SIGINT, before)
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _in_main_thread() -> bool:
    """Whether this thread may install signal handlers."""
    import threading

    return threading.current_thread() is threading.main_thread()


def _leave(_: int, __: object) -> None:
    """End the process at once."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
