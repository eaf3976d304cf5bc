"""The phases of an answer, and how it ends.

An answer is complete only at its *true end*. A finish reason does not end a choice, because some engines and proxies send more
output of the choice after it. The true end of the answer is a usage report without choices after the finish reasons of all
choices, `[DONE]`, or the end of the body. Verdicts on tool calls and `ChoiceFinished` are returned at the true end; output before
it is part of its choice.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Phase(enum.Enum):
    """The phase of an answer."""

    WAITING = "no choice was received"
    OPEN = "a choice was received, and at least one requested choice has no finish reason"
    TAIL = "every requested choice has a finish reason; the true end was not received"
    ENDED = "`Refused` or `Completed` was returned"


class Input(enum.Enum):
    """An input of the state machine."""

    CHOICES = "a chunk with choices"
    FINISHED = "this chunk had the last finish reason"
    ACCOUNT = "a chunk with usage, without choices"
    NOTHING = "a chunk without choices and usage"
    DONE = "`[DONE]`"
    BROKEN = "an error event, or an invalid event"
    END = "the body has ended"
    FAULT = "reading stopped: a timeout, a reset, a time limit, a shutdown"
    STOP = "the answer is to end without a fault"


class Ending(enum.Enum):
    """How an answer ends; each leads to `Phase.ENDED`.

    The finish reasons "abort" and "error" of a choice are a fault in WHOLE and STOPPED too.
    """

    REFUSED = "with one `Refused`"
    FAULTED = "with `Completed`, with the fault"
    WHOLE = "with `Completed` at the true end"
    STOPPED = "with `Completed`, before the true end"


TRANSITIONS: Mapping[Input, tuple[Phase | Ending | None, ...]] = {
    # in WAITING, OPEN, TAIL
    Input.CHOICES: (Phase.OPEN, Phase.OPEN, Phase.TAIL),
    Input.FINISHED: (None, Phase.TAIL, None),
    Input.ACCOUNT: (Phase.WAITING, Phase.OPEN, Ending.WHOLE),
    Input.NOTHING: (Phase.WAITING, Phase.OPEN, Phase.TAIL),
    Input.DONE: (Ending.REFUSED, Ending.FAULTED, Ending.WHOLE),
    Input.BROKEN: (Ending.REFUSED, Ending.FAULTED, Ending.FAULTED),
    Input.END: (Ending.REFUSED, Ending.FAULTED, Ending.WHOLE),
    Input.FAULT: (Ending.REFUSED, Ending.FAULTED, Ending.WHOLE),
    Input.STOP: (Ending.STOPPED, Ending.STOPPED, Ending.WHOLE),
}
"""The next phase or the ending in WAITING, OPEN and TAIL; `None` if the input is impossible there."""

_COLUMNS = {Phase.WAITING: 0, Phase.OPEN: 1, Phase.TAIL: 2}


class TransitionError(RuntimeError):
    """An input that is impossible in the current phase: a bug of the gateway, not of the engine."""


def next_phase(phase: Phase, what: Input) -> Phase | Ending:
    """The next phase, or the ending of the answer.

    Raises:
        TransitionError: The input is impossible in this phase.
    """
    column = _COLUMNS.get(phase)
    target = None if column is None else TRANSITIONS[what][column]
    if target is None:
        raise TransitionError(f"{what.name} is impossible in phase {phase.name}")
    return target
