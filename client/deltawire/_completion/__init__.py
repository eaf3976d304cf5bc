"""Completions: what the events of calls, or a response, come to. No I/O; both clients share it whole.

In the order of the files one needs to read:

    accumulator   a stream's events, or a whole response, in; its answer or its error out
    elsewhere     how long to wait, and on how many connections to look for the process that has a completion
    resumption    the ends of a stream's calls in, its next call out
    stream        what both kinds of stream share: everything but the waiting
"""

from deltawire._completion.accumulator import Accumulator, answer_of
from deltawire._completion.elsewhere import MAX_CONNECTIONS, Search
from deltawire._completion.resumption import Resumption
from deltawire._completion.stream import StreamCalls, text_of_event

__all__ = [
    "MAX_CONNECTIONS",
    "Accumulator",
    "Resumption",
    "Search",
    "StreamCalls",
    "answer_of",
    "text_of_event",
]
