"""One answer, from its stream to the end: printed as it comes, and ended by Ctrl-C."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deltawire._cli.answer import print_answer
from deltawire._cli.interrupt import Interrupt, end_softly
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
    ends = (functools.partial(end_softly, stream), stream.cancel)
    with stream, log_on_stderr(), Interrupt(*ends) as interrupt:
        try:
            if options.json:
                for event in stream:
                    print_json(event)
            else:
                print_answer(stream)
            answer = stream.final()
        except (CallCancelledError, StreamInterrupted, DeadlineExceededError, KeyboardInterrupt) as error:
            cancelled = isinstance(error, CallCancelledError)
            if cancelled and not interrupt.pressed:
                raise
            if options.retention is not None:
                last = "" if stream.last_sequence is None else f" --after {stream.last_sequence}"
                say(f"note: for the rest: deltawire resume {stream.completion_id}{last}")
            if cancelled:
                # It could not be ended softly, or not soon enough.
                raise KeyboardInterrupt from None
            raise
        if interrupt.pressed:
            say(f"note: it had {answer.usage.completion_tokens} tokens")
            raise KeyboardInterrupt
        return answer
