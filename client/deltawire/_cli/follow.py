"""One answer, from its stream to the end: printed as it comes, and ended by Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire._cli.answer import print_answer
from deltawire._cli.interrupt import SoftInterrupt
from deltawire._cli.output import log_on_stderr, print_json, say
from deltawire._errors import CallCancelledError, DeadlineExceededError, StreamInterrupted

if TYPE_CHECKING:
    import argparse

    from deltawire._client import ChatStream
    from deltawire._completion import Answer


def follow(stream: ChatStream, options: argparse.Namespace) -> Answer:
    """Print an answer while it comes.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; what came is printed.
        DeltawireError: See `ChatStream`.
    """
    with stream, log_on_stderr(), SoftInterrupt(stream) as interrupt:
        try:
            if options.json:
                for event in stream:
                    print_json(event)
            else:
                print_answer(stream)
            answer = stream.final()
        except CallCancelledError:
            if interrupt.pressed:
                # It could not be ended softly.
                raise KeyboardInterrupt from None
            raise
        except (StreamInterrupted, DeadlineExceededError, KeyboardInterrupt):
            if options.retention is not None:
                last = "" if stream.last_sequence is None else f" --after {stream.last_sequence}"
                say(f"note: for the rest: deltawire resume {stream.completion_id}{last}")
            raise
        if interrupt.pressed:
            say(f"note: it had {answer.usage.completion_tokens} tokens")
            raise KeyboardInterrupt
        return answer
