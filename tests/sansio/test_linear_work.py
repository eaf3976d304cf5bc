"""Twice the input is twice the work: calls made and bytes copied are counted, nothing is timed."""

from __future__ import annotations

import ast
import sys
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.sansio import characters, coalesce, pieces, reader, sse, tool_calls
from deltawire_server.sansio.events import TextDelta, ToolCallArguments
from tests.sansio.build import DONE, calls, end, entry, text
from tests.support import chop
from tests.support.recordings import counting_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MANY = 10_000
FEWER = 2_000


class Copies(ast.NodeTransformer):
    """Rewrites a module so that each expression that makes a text or bytes says how long the result is.

    Calls, additions, slices, comprehensions and formatted texts are counted: all there is that can copy. What only hands
    out a text that there is already is counted as well, so the figure is an upper bound of the bytes copied.
    """

    def __init__(self) -> None:
        self.total = 0

    def count(self, result: object) -> object:
        """Add the size of what an expression gave."""
        if isinstance(result, str | bytes):
            self.total += len(result)
        elif isinstance(result, list | tuple):
            self.total += sum(len(item) for item in result if isinstance(item, str | bytes))
        return result

    def _counted(self, node: ast.expr) -> ast.expr:
        return ast.Call(ast.Name("_count_copy", ast.Load()), [node], [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return self._counted(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return self._counted(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return self._counted(node)

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        self.generic_visit(node)
        return self._counted(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        return self._counted(node) if isinstance(node.slice, ast.Slice) and isinstance(node.ctx, ast.Load) else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        target: Any = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.Assign([node.target], self._counted(ast.BinOp(target, node.op, node.value)))

    def load(self, module: ModuleType, **others: ModuleType) -> Any:  # noqa: ANN401 (a module like the given one)
        """A module's rewritten twin, with others in the place of those that it imports."""
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as source:  # noqa: PTH123 (the path is the interpreter's own)
            twin = self.rewrite(source.read(), module.__name__)
        twin.__dict__.update(others)
        return twin

    def rewrite(self, source: str, name: str = "twin") -> Any:  # noqa: ANN401 (a module like its source)
        """A module from rewritten source."""
        tree = ast.fix_missing_locations(self.visit(ast.parse(source)))
        twin = ModuleType(name)
        twin.__dict__["_count_copy"] = self.count
        exec(compile(tree, f"<{name}, counted>", "exec"), twin.__dict__)  # noqa: S102 (the program's own source)
        return twin


def _calls_of(work: Callable[[], object]) -> int:
    """How many functions of Python and C it calls."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


class Twins:
    """The modules under test, rewritten to count copies."""

    def __init__(self) -> None:
        self.copies = Copies()
        self.sse = self.copies.load(sse)
        halves = self.copies.load(characters)
        self.tool_calls = self.copies.load(tool_calls, mend=halves.mend, split=self.copies.load(pieces).split)
        self.reader = self.copies.load(reader, sse=self.sse, tool_calls=self.tool_calls, Halves=halves.Halves)
        self.coalesce = self.copies.load(coalesce)


@pytest.fixture(scope="module")
def twins() -> Twins:
    """Rewritten once."""
    return Twins()


def _ratios(twins: Twins, work: Callable[[Any, int], object], size: int = FEWER) -> tuple[float, float]:
    """How much more twice as much costs: in calls, and in bytes copied. `work` takes the modules and a size."""
    plain = Twins.__new__(Twins)
    plain.sse, plain.tool_calls, plain.reader, plain.coalesce = sse, tool_calls, reader, coalesce
    made, copied = [], []
    for many in (size, 2 * size):
        made.append(_calls_of(partial(work, plain, many)))
        twins.copies.total = 0
        work(twins, many)
        copied.append(twins.copies.total)
    assert made[0] >= size
    assert copied[0] >= size
    return made[1] / made[0], copied[1] / copied[0]


def _read(modules: Twins, stream: list[bytes]) -> None:
    reading = modules.reader.CompletionReader(offered_tools={"f": ""}, incremental=True, generate_id=counting_ids())
    for piece in stream:
        reading.receive(piece)
    reading.finish()
    assert reading.ended
    assert set(reading.anomalies) <= {"another id for the same tool call", "broken character"}


def _call_with(fragments: int) -> list[bytes]:
    first = calls(entry('{"x":"', call_id="c", name="f"))
    return [first, *[calls(entry("0123456789"))] * fragments, calls(entry('"}')), end("tool_calls"), DONE]


_STREAMS: dict[str, Callable[[int], list[bytes]]] = {
    "argument fragments in one read": lambda size: [b"".join(_call_with(size))],
    "argument fragments before the name": lambda size: [
        *[calls(entry("1"))] * size, calls(entry("1", name="f")), end("length"), DONE
    ],
    "argument fragments under changing ids": lambda size: [
        calls(entry('{"x":"', call_id="c", name="f")),
        *[calls(entry("\\\\{0123", call_id=f"c{number}")) for number in range(size)],
        calls(entry('"}', call_id="d")), end("tool_calls"), DONE
    ],
    "halves of characters": lambda size: [
        *[text("x").replace(b"x", b"\\ude00x\\ud83d")] * size, end("stop"), DONE
    ],
    "entries in one chunk": lambda size: [calls(*[entry("1", name="f")] * size), end("length"), DONE],
    "texts": lambda size: [*[text("0123456789")] * size, end("stop"), DONE],
    "one large event byte by byte": lambda size: [*chop.byte_by_byte(text("x" * size)), end("stop"), DONE],
    "one large event in CRLF byte by byte": lambda size: [
        *chop.byte_by_byte(text("x" * size).replace(b"\n", b"\r\n")), end("stop"), DONE
    ],
    "one event of many lines": lambda size: [
        *[b"data:\r\n"] * size, b"data:" + text("x" * size).removeprefix(b"data:"), end("stop"), DONE
    ],
    "comments": lambda size: [*[b": keep-alive\n\n"] * size, text("x"), end("stop"), DONE],
}  # fmt: skip


def test_reading_a_call_is_linear(twins: Twins) -> None:
    """Twenty thousand argument fragments take at most 2.1 times the calls and the copied bytes of ten thousand."""
    more_calls, more_bytes = _ratios(twins, lambda modules, size: _read(modules, _call_with(size)), MANY)
    assert more_calls <= 2.1
    assert more_bytes <= 2.1


@pytest.mark.parametrize("stream", _STREAMS.values(), ids=_STREAMS.keys())
def test_reading_is_linear(twins: Twins, stream: Callable[[int], list[bytes]]) -> None:
    """So it is for whatever else a stream can have many of."""
    more_calls, more_bytes = _ratios(twins, lambda modules, size: _read(modules, stream(size)))
    assert more_calls <= 2.1
    assert more_bytes <= 2.1


def test_joining_is_linear(twins: Twins) -> None:
    """Twice as many waiting pieces are twice the work, when all are joined and when none can be."""

    def work(modules: Twins, size: int) -> None:
        coalescer = modules.coalesce.Coalescer()
        for _ in range(size):
            coalescer.receive([TextDelta(0, "0123456789")])
        for _ in range(size):
            coalescer.receive([ToolCallArguments(0, 0, "c", "0123456789")])
        for number in range(size):
            coalescer.receive([TextDelta(number % 2, "0123456789")])
        assert len(coalescer.take()) == 2 + size

    more_calls, more_bytes = _ratios(twins, work)
    assert more_calls <= 2.1
    assert more_bytes <= 2.1


@pytest.mark.parametrize(
    "body",
    ["t = ''\n for _ in range(n):\n  t = t + 'x'", "t = ''\n for _ in range(n):\n  t += 'x'",
     "t = b''\n for _ in range(n):\n  t = b''.join([t, b'x'])", "t = 'x' * n\n while t:\n  t = t[1:]",
     "t = ''\n for _ in range(n):\n  t = f'{t}x'"],
)  # fmt: skip
def test_what_is_not_linear_is_noticed(body: str) -> None:
    """The count is honest: text that grows by copying is four times the work when twice as long."""
    copies = Copies()
    work = copies.rewrite(f"def work(n):\n {body}").work
    totals = []
    for size in (200, 400):
        copies.total = 0
        work(size)
        totals.append(copies.total)
    assert 3.8 < totals[1] / totals[0] < 4.2
