"""Watching models: what the caller receives, however often the connection breaks. No I/O; both clients share it whole.

state   messages, broken calls and restarts in, events out; pure
calls   what both kinds of watch share: everything but the waiting
"""

from deltawire._watch.calls import WatchCalls
from deltawire._watch.state import ModelChange, WatchBookmark, WatchEvent, WatchState

__all__ = ["ModelChange", "WatchBookmark", "WatchCalls", "WatchEvent", "WatchState"]
