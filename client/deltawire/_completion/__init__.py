"""Completions: what a call's events or its response come to. No I/O; both clients share it whole.

In the order of the files one needs to read:

    answer        what the caller gets: `Answer` and `Choice`; also from a call that gave them whole
    accumulator   a stream's events in, its answer or its error out
    stream        what both kinds of stream share: everything but the waiting
"""

from deltawire._completion.accumulator import Accumulator
from deltawire._completion.answer import Answer, Choice, answer_of
from deltawire._completion.stream import StreamOutcome, text_of_event

__all__ = ["Accumulator", "Answer", "Choice", "StreamOutcome", "answer_of", "text_of_event"]
