"""Watching models: what the caller receives, however often the connection breaks. No I/O; both clients use it.

state   messages and broken calls in, events out; pure
calls   what the blocking and the asyncio watch share
"""

from deltawire._watch.calls import WatchCalls
from deltawire._watch.state import ModelChange, WatchBookmark, WatchEvent, WatchState

__all__ = ["ModelChange", "WatchBookmark", "WatchCalls", "WatchEvent", "WatchState"]
