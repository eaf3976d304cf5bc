"""The command `deltawire`: chat with a model, and see and name the models there are.

Standard output is the answer and nothing else: text, or with --json one message per line. Everything about the answer
goes to standard error: a model's reasoning (only if that is a terminal), notes and errors. Exit status: 0 the answer came
whole, whatever its stop reason; 1 the call failed; 2 wrong usage; 130 Ctrl-C.

A command's way through the folder, in the order of the files one needs to read:

    arguments     every command and option, and the function that runs it; request_arguments: those of what is asked
    connection    options in, a client out
    chat          `chat`, `count-tokens`                    completions   `cancel`, `get` and `resume`
                                                            registry      `models`, `providers` and `health`
    request       options and files in, a ChatRequest out   files         the text of a file or of standard input
    follow        one answer, from its stream to the end    interrupt     Ctrl-C while a stream is read
    answer        prints an answer while it comes           terminal      text in pieces, harmless to a terminal
    output        JSON lines, tables, notes, errors         status        exit statuses, and their errors
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from deltawire._cli.arguments import check_text, make_parser
from deltawire._cli.connection import client_of
from deltawire._cli.output import print_error, say
from deltawire._cli.status import FAILED, INTERRUPTED, USAGE, FailedError, UsageError
from deltawire._errors import DeltawireError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from deltawire._client import Client


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name. None takes the process's own.

    Raises:
        SystemExit: As argparse does: 0 after --help and --version, 2 for wrong usage.

    The exit status comes back; hand it to `sys.exit`.
    """
    options = make_parser().parse_args(arguments)
    run: Callable[[Client, argparse.Namespace], int] = options.run
    try:
        check_text(options)
        with client_of(options) as client:
            status = run(client, options)
            # Here, and not at exit, so that a closed pipe can be handled.
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        say(f"error: {error}")
        return USAGE
    except FailedError as error:
        say(f"error: {error}")
        return FAILED
    except DeltawireError as error:
        print_error(error)
        return FAILED
    except OSError as error:
        # If the reader closed the pipe, there is nothing to report.
        if not isinstance(error, BrokenPipeError):
            say(f"error: input or output failed: {error.strerror or error}")
        # What is still in the buffer must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
