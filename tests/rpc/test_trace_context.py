"""Which trace contexts are forwarded."""

from __future__ import annotations

import pytest

from deltawire_server.rpc.trace_context import MAX_MEMBERS, trace_context

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("traceparent", [PARENT, f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what-the-future-adds"])
def test_valid_parents(traceparent: str) -> None:
    """Of this version and of later ones, which may append fields."""
    assert trace_context(traceparent, "") == (traceparent, None)


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00-1",
        "00-a-b-01",
        PARENT.upper(),
        f"{PARENT}\n",
        f"{PARENT}\r\nx-evil: 1",
        f"{PARENT} ",
        f"{PARENT}-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}é-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-\x7f",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 257}",
    ],
)
def test_invalid_parents(traceparent: str) -> None:
    """Neither they nor the state beside them are forwarded."""
    assert trace_context(traceparent, "k=v") == (None, None)


@pytest.mark.parametrize(
    "tracestate",
    ["k=v", "a=1,b=2", "a=1, b=2 , ,tenant@system=t61rcWkgMzE", "1a=" + "x" * 256, ",".join(["k=v"] * MAX_MEMBERS)],
)
def test_valid_states(tracestate: str) -> None:
    """With spaces around entries, and empty entries."""
    assert trace_context(PARENT, tracestate) == (PARENT, tracestate)


@pytest.mark.parametrize(
    "tracestate",
    [
        "k",
        "k=",
        "K=v",
        "k=v\n",
        "k=v\r\nx-evil: 1",
        "k=é",
        "k=\x00",
        "k=v\t,a=b",
        "k=a=b",
        "k=" + "x" * 257,
        "k" * 257 + "=v",
        ",".join(["k=v"] * (MAX_MEMBERS + 1)),
    ],
)
def test_invalid_states(tracestate: str) -> None:
    """They are left out; the parent is forwarded without them."""
    assert trace_context(PARENT, tracestate) == (PARENT, None)
