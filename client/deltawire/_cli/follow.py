"""One answer, from its stream to the end: printed as it comes, and ended by Ctrl-C."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deltawire._cli.answer import print_answer
from deltawire._cli.interrupt import Interrupt, end_softly
from deltawire._cli.output import print_error, print_json, say
from deltawire._errors import CallCancelledError, DeadlineExceededError, DeltawireError, StreamInterrupted

if TYPE_CHECKING:
    import argparse

    from deltawire._answer import Answer
    from deltawire._client import ChatStream

# Ends after which the gateway may still have more of a retained answer.
_WITH_REST = (CallCancelledError, StreamInterrupted, DeadlineExceededError, KeyboardInterrupt)


def follow(stream: ChatStream, options: argparse.Namespace) -> Answer:
    """Print an answer while it comes.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; what came is printed.
        DeltawireError: See `ChatStream`.
    """
    ends = (functools.partial(end_softly, stream), stream.cancel)
    with stream, Interrupt(*ends) as interrupt:
        try:
            if options.json:
                for event in stream:
                    print_json(event)
            else:
                print_answer(stream)
            answer = stream.final()
        except (DeltawireError, KeyboardInterrupt) as error:
            cancelled = isinstance(error, CallCancelledError)
            if cancelled and not interrupt.pressed:
                raise
            if options.retention is not None and isinstance(error, _WITH_REST) and not stream._is_only_sought:
                last = "" if stream.last_sequence is None else f" --after {stream.last_sequence}"
                say(f"note: for the rest: deltawire resume {stream.completion_id}{last}")
            if not interrupt.pressed or isinstance(error, KeyboardInterrupt):
                raise
            # It could not be ended softly, or not soon enough.
            if not cancelled:
                print_error(error)
            raise KeyboardInterrupt from None
        if interrupt.pressed:
            say(f"note: it had {answer.usage.completion_tokens} tokens")
            raise KeyboardInterrupt
        return answer
