"""The work of a check is counted before it is done: subschemas that are tried, values, nodes and bytes, never seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltawire_server.schemas import SchemaError, argument_check, check, compiled_checks
from deltawire_server.schemas.check import (
    MAX_CACHE_BYTES,
    MAX_EFFORT,
    MAX_REQUEST_NODES,
    MAX_SCHEMA_NODES,
)
from deltawire_server.schemas.effort import Effort, TooMuchError
from deltawire_server.schemas.shape import Shape, shape
from deltawire_server.schemas.strict import argument_checks
from deltawire_server.upstream.engine import Engine, EngineKind
from deltawire_server.upstream.request import ChatMessage, ChatRequest, CheckBudget, Role, ToolSpec
from tests.support.filters import filter_schema, filters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NEVER = {"required": ["nope"]}
FAILS = {"counted": "fails"}
TOO_MUCH = "the arguments are too much work to check against the tool's schema"
NO_PLACE = (
    "the arguments do not follow the tool's schema; with so many alternatives or values the place was not looked for"
)


class Tries:
    """Counts how often the validator tries a subschema, by a keyword that it tries after all others if those do not fail."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, schema: object, arguments: object) -> int:
        """The tries of one check, of which the keyword is a part."""
        counter = self

        class Counting:
            def __init__(self, _parent: dict[str, Any], value: object, _path: list[str | int]) -> None:
                self.fails = value == "fails"

            def validate(self, _: object) -> None:
                counter.count += 1
                if self.fails:
                    raise ValueError

        self.count = 0
        jsonschema_rs.validator_for(schema, keywords={"counted": Counting}).is_valid(arguments)  # type: ignore[arg-type]
        return self.count


def counted(schema: object) -> object:
    """A schema each of whose objects has the keyword that counts."""
    if isinstance(schema, dict):
        return {"counted": True} | {key: counted(value) for key, value in schema.items()}
    return [counted(value) for value in schema] if isinstance(schema, list) else schema


def chain(
    length: int, reference: str = "#/$defs/d{}", *, within: str = "$defs", last: object = FAILS, **names: str
) -> dict[str, Any]:
    """A chain of definitions, each `anyOf` of two references to the next one, the last of which fails."""
    definitions: dict[str, Any] = {}
    for number in range(length):
        named = {key: value.format(number) for key, value in names.items()}
        definitions[f"d{number}"] = {"anyOf": [{"$ref": reference.format(number + 1)}] * 2} | named
    definitions[f"d{length}"] = {"allOf": [last]} | {key: value.format(length) for key, value in names.items()}
    return {"allOf": [{"$ref": reference.format(0)}], within: definitions}


OLD = "definitions"
DRAFT_4 = {"$schema": "http://json-schema.org/draft-04/schema#"}
DRAFT_6 = {"$schema": "http://json-schema.org/draft-06/schema#"}
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
DRAFT_2019 = {"$schema": "https://json-schema.org/draft/2019-09/schema"}
BASE = {"$id": "http://a.example/b/c"}

CHAINS: dict[str, Any] = {
    "pointers": lambda n: chain(n),
    "percent-encoded pointers": lambda n: chain(n, "#/%24defs/%64{}"),
    "pointers with more slashes encoded": lambda n: chain(n, "#%2F$defs%2Fd{}"),
    "anchors": lambda n: chain(n, "#a{}", **{"$anchor": "a{}"}),
    "dynamic anchors": lambda n: chain(n, "#a{}", **{"$dynamicAnchor": "a{}"}),
    "anchors of 2019-09": lambda n: DRAFT_2019 | chain(n, "#a{}", **{"$anchor": "a{}"}),
    "anchors of draft-07": lambda n: DRAFT_7 | chain(n, within=OLD, reference="#a{}", **{"$id": "#a{}"}),
    "anchors of draft-06": lambda n: DRAFT_6 | chain(n, within=OLD, reference="#a{}", **{"$id": "#a{}"}),
    "anchors of draft-04": lambda n: DRAFT_4 | chain(n, within=OLD, reference="#a{}", id="#a{}"),
    "anchors with a base": lambda n: BASE | chain(n, "http://a.example/b/c#a{}", **{"$anchor": "a{}"}),
    "anchors of draft-07 with a base": lambda n: DRAFT_7 | BASE | chain(n, within=OLD, reference="c#a{}", **{"$id": "#a{}"}),
    "anchors that are addresses": lambda n: DRAFT_7 | BASE | chain(n, within=OLD, reference="#a{}", **{"$id": "c#a{}"}),
    "addresses": lambda n: BASE | chain(n, "d{}", **{"$id": "d{}"}),
    "absolute addresses": lambda n: BASE | chain(n, "http://a.example/b/d{}", **{"$id": "d{}"}),
    "absolute addresses of absolute addresses": lambda n: chain(n, "http://x/d{}", **{"$id": "http://x/d{}"}),
    "names": lambda n: chain(n, "urn:a:d{}", **{"$id": "urn:a:d{}"}),
    "a host in capitals": lambda n: chain(n, "http://X/d{}", **{"$id": "http://x/d{}"}),
    "a host in capitals in the id": lambda n: chain(n, "http://x/d{}", **{"$id": "http://X/d{}"}),
    "a scheme in capitals": lambda n: chain(n, "HTTP://x/d{}", **{"$id": "http://x/d{}"}),
    "a path with a dot": lambda n: chain(n, "http://x/./d{}", **{"$id": "http://x/d{}"}),
    "a path with dots": lambda n: chain(n, "http://x/y/../d{}", **{"$id": "http://x/d{}"}),
    "a path that ends in a dot": lambda n: chain(n, "http://x/d{}/.", **{"$id": "http://x/d{}/"}),
    "a dot before an address": lambda n: BASE | chain(n, "./d{}", **{"$id": "d{}"}),
    "percent-encoding": lambda n: chain(n, "http://x/%64{}", **{"$id": "http://x/d{}"}),
    "percent-encoding in the id": lambda n: chain(n, "http://x/d{}", **{"$id": "http://x/%64{}"}),
    "a default port": lambda n: chain(n, "http://x:80/d{}", **{"$id": "http://x/d{}"}),
    "an empty port": lambda n: chain(n, "http://x:/d{}", **{"$id": "http://x/d{}"}),
    "an empty fragment": lambda n: chain(n, "http://x/d{}#", **{"$id": "http://x/d{}"}),
    "only the host": lambda n: BASE | chain(n, "//x/d{}", **{"$id": "http://x/d{}"}),
    "only the path": lambda n: BASE | chain(n, "/b/d{}", **{"$id": "d{}"}),
    "hosts": lambda n: chain(n, "http://d{}/", **{"$id": "http://d{}"}),
    "a query": lambda n: BASE | chain(n, "?d{}", **{"$id": "?d{}"}),
    "a nested base": lambda n: BASE | {"allOf": [{"$id": "http://y/z"} | chain(n)]},
    "a nested base with anchors": lambda n: BASE | {"allOf": [{"$id": "z/z"} | chain(n, "#a{}", **{"$anchor": "a{}"})]},
    "a nested base with addresses": lambda n: BASE | {"allOf": [{"$id": "http://y/z/"} | chain(n, "d{}", **{"$id": "d{}"})]},
    "dynamic references": lambda n: json.loads(
        json.dumps(chain(n, "#a{}", **{"$dynamicAnchor": "a{}"})).replace('"$ref"', '"$dynamicRef"')
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_each_way_to_refer_is_counted_or_refused(name: str) -> None:
    """However a chain of doublings is written, its work is seen before it is done."""
    short = json.loads(json.dumps(CHAINS[name](8)))
    try:
        effort = Effort(short)
        tries = Tries().of(short, {})
    except (SchemaError, jsonschema_rs.ValidationError):
        pass  # refused here or by the validator, in which case the check is refused too
    else:
        assert tries >= 2**8
        assert effort.bound is not None
        assert effort.bound >= tries
        assert effort.count({}, MAX_EFFORT, MAX_EFFORT).effort >= tries
    with pytest.raises(SchemaError):
        argument_check(json.dumps(CHAINS[name](20)))


def test_the_plain_ways_are_not_refused() -> None:
    """Pointers, anchors and addresses that are written plainly are what real schemas have."""
    for name in ("pointers", "percent-encoded pointers", "anchors", "anchors of draft-07", "anchors of draft-04",
                 "addresses", "absolute addresses", "names", "a nested base with addresses"):  # fmt: skip
        assert argument_check(json.dumps(CHAINS[name](2)))("{}") is None, name


LEAVES = st.sampled_from(
    [{}, {"type": "string"}, {"type": "integer"}, NEVER, FAILS, {"minimum": 3}, {"enum": [1, "a"]}, {"$ref": "#/$defs/x"},
     {"$ref": "#/$defs/y"}]
)  # fmt: skip
NAMES = st.sampled_from(["a", "b"])


def _keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "anyOf": several, "oneOf": several, "allOf": several, "not": inner, "if": inner, "then": inner, "else": inner,
            "properties": st.dictionaries(NAMES, inner, max_size=2), "additionalProperties": inner, "propertyNames": inner,
            "patternProperties": st.dictionaries(st.sampled_from(["a", "."]), inner, max_size=2), "items": inner,
            "prefixItems": several, "contains": inner, "dependentSchemas": st.dictionaries(NAMES, inner, max_size=2),
            "unevaluatedProperties": inner, "unevaluatedItems": inner,
        },
    )  # fmt: skip


SUBSCHEMAS = st.recursive(LEAVES, _keywords, max_leaves=8)
VALUES = st.recursive(
    st.sampled_from([1, "a", "abc", None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=10,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(root=SUBSCHEMAS, x=SUBSCHEMAS, y=SUBSCHEMAS, value=st.dictionaries(NAMES, VALUES, max_size=2))
def test_the_count_is_at_least_what_the_validator_does(root: Any, x: Any, y: Any, value: Any) -> None:  # noqa: ANN401
    """Both counts are upper bounds of the tries, for any keywords, references and recursion."""
    schema = {"allOf": [root], "$defs": {"x": x, "y": y}}
    parsed = json.loads(json.dumps(schema))  # each subschema an object of its own
    try:
        effort = Effort(parsed)
    except SchemaError:
        return
    arguments = json.loads(json.dumps(value))
    tries = Tries().of(counted(parsed), arguments)
    measured = shape(json.dumps(arguments), 1000)
    assert measured is not None
    if effort.bound is not None:
        assert effort.bound * measured.values >= tries
    with contextlib.suppress(TooMuchError):
        assert effort.count(arguments, 100_000, 10**9).effort >= tries


class Spy:
    """A validator that counts how often it lists errors."""

    def __init__(self, validator: jsonschema_rs.Validator) -> None:
        self._validator = validator
        self.lists = 0

    def is_valid(self, value: object) -> bool:
        return self._validator.is_valid(value)

    def validate(self, value: object) -> None:
        self.lists += 1
        self._validator.validate(value)


def explained(schema: object, arguments: object) -> tuple[int, tuple[str, str] | None]:
    """How often errors were listed, and what was said."""
    made = argument_check(json.dumps(schema))
    spy = Spy(made.validator)
    verdict = replace(made, validator=spy)(json.dumps(arguments))  # type: ignore[arg-type]
    return spy.lists, verdict


@pytest.mark.parametrize("length", [9, 10, 12, 14, 16])
def test_errors_of_many_alternatives_are_not_listed(length: int) -> None:
    """The validator keeps the errors of all branches of a failed `anyOf`: 14 us and 3 KB for each try."""
    assert explained(chain(length, last=NEVER), {}) == (0, ("", NO_PLACE))


def test_errors_of_large_values_are_not_listed() -> None:
    """Each error has a copy of its value."""
    schema = {"properties": {"a": {"anyOf": [{"type": "string"}] * 20}}}
    assert explained(schema, {"a": [1]})[0] == 1
    assert explained(schema, {"a": [1] * 1000}) == (0, ("", NO_PLACE))
    assert explained(schema, {"a": ["x" * 1_000_000]}) == (0, ("", NO_PLACE))


def test_a_filter_with_a_wrong_leaf() -> None:
    """The verdict is right at each depth; the place is named where it is cheap to find."""
    for depth in range(9):
        assert explained(filter_schema(), filters(depth)) == (0, None)
        lists, verdict = explained(filter_schema(), filters(depth, value=5))
        assert verdict is not None
        assert lists == (verdict[1] != NO_PLACE)
    assert explained(filter_schema(), filters(1, value=5))[0] == 1


def test_an_optional_value_is_explained() -> None:
    """The usual alternative, a type or null, names its place, however many others are beside it."""
    field = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema = {"properties": {f"p{number}": field for number in range(300)}}
    arguments = {f"p{number}": None for number in range(299)} | {"p299": 5}
    lists, verdict = explained(schema, arguments)
    assert (lists, verdict and verdict[0]) == (1, "/p299")


def test_without_alternatives_everything_is_explained() -> None:
    """Then there is one error, whatever the size."""
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    assert explained(schema, {"a": [*range(9000), "x"]}) == (1, ("/a/9000", '"x" is not of type "integer"'))


def test_an_answer_has_one_budget() -> None:
    """What the first calls used up is missing for the next; then their verdict says so."""
    made = argument_check(json.dumps(filter_schema()))
    arguments = json.dumps(filters(6))
    budget = CheckBudget(MAX_EFFORT)
    verdicts = [made(arguments, budget) for _ in range(100)]
    passed = verdicts.count(None)
    assert 1 <= passed < 100
    assert verdicts[passed:] == [("", TOO_MUCH)] * (100 - passed)
    assert budget.left >= 0
    assert made(arguments, CheckBudget(MAX_EFFORT)) is None


@pytest.mark.parametrize("length", [10, 15])
def test_failed_checks_are_counted_too(length: int) -> None:
    """So are the steps of counting, and lists of errors."""
    made = argument_check(json.dumps(chain(length, last=NEVER)))
    budget = CheckBudget(MAX_EFFORT)
    for _ in range(MAX_EFFORT):
        left = budget.left
        if made("{}", budget) == ("", TOO_MUCH):
            break
        assert left - budget.left > 2**length
    assert made("{}", budget) == ("", TOO_MUCH)


async def test_each_answer_has_its_own_budget() -> None:
    """It is shared by the calls of all its tools."""
    text = json.dumps(filter_schema())
    tools = tuple(ToolSpec(name, input_schema=text, strict=True) for name in ("a", "b"))
    request = ChatRequest("m", (ChatMessage(Role.USER, ("hi",)),), tools=tools)
    arguments = json.dumps(filters(6))
    checks = await argument_checks(request, Engine(EngineKind.PROXY))
    while checks["a"](arguments) is None:
        pass
    assert checks["b"](arguments) == ("", TOO_MUCH)
    again = await argument_checks(request, Engine(EngineKind.PROXY))
    assert again["b"](arguments) is None


LARGE: dict[str, str] = {
    "empty arrays": '{"a":[' + "[]," * (4 * 1024 * 1024 // 3) + "[]]}",
    "numbers": '{"a":[' + "1," * (2 * 1024 * 1024) + "1]}",
    "texts": '{"a":[' + '"",' * (1024 * 1024) + '""]}',
    "texts with escapes": '{"a":[' + r'"\\",' * (800 * 1024) + '""]}',
    "names": "{" + ",".join(f'"{number}":1' for number in range(400_000)) + "}",
}


@pytest.mark.parametrize("name", LARGE)
def test_too_many_values_are_not_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does the check make objects of them, nor does it pass."""
    made = argument_check('{"properties": {"b": {"type": "string"}}}')
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert made(LARGE[name]) == ("", TOO_MUCH)


def test_a_long_text_is_checked() -> None:
    """4 MiB of a document are one value."""
    made = argument_check('{"properties": {"text": {"type": "string", "minLength": 1}}}')
    assert made(json.dumps({"text": 'a "quoted" line, [x]\n' * 150_000})) is None
    assert made(json.dumps({"text": "x" * 4_000_000})) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Shape(1, 1, 2)),
        ('{"a": [1, 2]}', Shape(2, 2, 4)),
        (r'{"a]": "[\"[", "b\\": ["\\\\\"[", "]"]}', Shape(2, 2, 5)),
        ("1", Shape(0, 0, 1)),
        ("", Shape(0, 0, 1)),
        ('"open [', Shape(0, 0, 1)),
        ("]]", Shape(-1, 0, 1)),
        ('["a", "b"', Shape(1, 1, 3)),
    ],
)
def test_the_shape_of_a_text(text: str, expected: Shape) -> None:
    """Brackets and commas in texts do not count, and a text that is not JSON has some shape, too."""
    assert shape(text, 5) == expected


@given(VALUES)
def test_the_shape_is_at_least_that_of_the_value(value: object) -> None:
    """The depth is exact; empty containers count as one value more."""
    measured = shape(json.dumps(value), 1000)
    assert measured is not None
    assert measured.depth == _depth(value)
    assert measured.values >= _size(value)


def _depth(value: object) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)


def _size(value: object) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, parts))


NODES: dict[str, str] = {
    "subschemas": json.dumps({"anyOf": [{}] * 8000}),
    "subschemas with types": json.dumps({"properties": {f"p{n}": {"type": "string"} for n in range(5000)}}),
    "arrays": json.dumps({"const": [[]] * 8000}),
    "other values": json.dumps({"enum": [""] * 64_001}),
}


@pytest.mark.parametrize("name", NODES)
def test_the_nodes_of_a_schema_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is parsed."""
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(SchemaError, match=f"at most {MAX_SCHEMA_NODES} objects and arrays"):
        argument_check(NODES[name])


def test_other_values_are_cheap() -> None:
    """The 30,000 numbers of an enumeration count as 1,875 nodes."""
    assert argument_check(json.dumps({"properties": {"a": {"enum": [*range(30_000)]}}})).nodes < MAX_SCHEMA_NODES // 2


@pytest.mark.parametrize("count", [1000, 2000])
@pytest.mark.parametrize("leaf", [{}, {"$ref": "#/$defs/x"}, {"not": {}}], ids=json.dumps)
def test_counting_is_linear(count: int, leaf: dict[str, Any]) -> None:
    """In the subschemas, whatever the depth of the arguments; no table is kept."""
    effort = Effort(json.loads(json.dumps({"anyOf": [leaf] * count, "$defs": {"x": {"type": "object"}}})))
    assert effort._edges <= 2 * count
    value: Any = 1
    for _ in range(91):
        value = {"a": value}
    assert effort.count(value, 10**6, 10**9).steps <= 2 * count
    assert not hasattr(effort, "_nodes")


def test_counting_has_bounded_steps() -> None:
    """A schema that contains itself is tried on each value by each of its parts."""
    schema = {"additionalProperties": {"$ref": "#"}, "allOf": [{"additionalProperties": {"$ref": "#"}}] * 100}
    effort = Effort(json.loads(json.dumps(schema)))
    with pytest.raises(TooMuchError):
        effort.count({str(number): {"a": {}} for number in range(100)}, 1000, 10**12)
    with pytest.raises(TooMuchError):
        effort.count({"a": {"a": {"a": {"a": {"a": {}}}}}}, 10**6, 10**6)


class Items(list[Any]):
    """An array that counts how many of its items are looked at."""

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__(items)
        self.looks = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.looks += 1
            yield item

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 (as a list's)
        self.looks += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)


class Fields(dict[str, Any]):
    """An object that counts how many of its fields are looked at."""

    looks = 0

    def items(self) -> Any:  # noqa: ANN401 (as a dictionary's)
        self.looks += len(self)
        return super().items()


@pytest.mark.parametrize(
    "keywords",
    [
        {"properties": {"a": {"type": "integer"}}},
        {"prefixItems": [{"type": "integer"}], "required": ["a"]},
        {"items": {"type": "integer"}},
        {"prefixItems": [{"not": {}}], "items": {"allOf": [{}]}},
        {"contains": {"type": "integer"}},
        {"additionalProperties": {"type": "integer"}},
        {"patternProperties": {"^a": {}}},
        {"propertyNames": {"maxLength": 1}},
    ],
    ids=str,
)
def test_what_is_looked_at_counts(keywords: dict[str, Any]) -> None:
    """However many alternatives there are, each of which would go over the whole value."""
    effort = Effort({"anyOf": [dict(keywords) for _ in range(900)]})
    for value in (Items([1] * 20_000), Fields({str(number): 1 for number in range(20_000)})):
        with contextlib.suppress(TooMuchError):
            effort.count(value, 10_000, 10**12)
        assert value.looks <= 8 * 10_000 + 20_000


def test_identifiers_times_references_are_bounded() -> None:
    """Each reference may begin at each `$id`."""
    schema = {
        "$defs": {f"d{n}": {"$id": f"http://x/{n}"} for n in range(300)},
        "anyOf": [{"$ref": f"#/anyOf/{n + 1}/not"} for n in range(300)] + [{}],
    }
    with pytest.raises(SchemaError, match=r"too many references and \$id|does not exist"):
        argument_check(json.dumps(schema))
    many = {f"d{n}": {"$id": f"http://x/{n}"} for n in range(300)}
    with pytest.raises(SchemaError, match=r"too many references and \$id"):
        argument_check(json.dumps({"$defs": many, "allOf": [{"$ref": f"http://x/{n}"} for n in range(300)]}))


def test_equal_anchors_times_references_are_bounded() -> None:
    """Each reference to an anchor may mean each of that name."""
    anchors = {f"d{n}": {"$anchor": "a"} for n in range(300)}
    with pytest.raises(SchemaError, match="too many references to anchors"):
        argument_check(json.dumps({"$defs": anchors, "allOf": [{"$ref": "#a"}] * 300}))


@pytest.mark.parametrize("step", ["9" * 5000, "-1", "01", "1e0", "\u0661", "1000000"])
def test_an_index_that_does_not_exist(step: str) -> None:
    """It is an error of the schema like any other, however many digits it has."""
    with pytest.raises(SchemaError, match="does not exist"):
        argument_check(json.dumps({"allOf": [{}, {}], "not": {"$ref": f"#/allOf/{step}"}}))


def test_encoded_slashes_are_refused() -> None:
    """How often they are decoded decides what they mean."""
    with pytest.raises(SchemaError, match="write '/' as ~1"):
        argument_check('{"$defs": {"a/b": {}}, "not": {"$ref": "#/$defs/a%2Fb"}}')


@pytest.fixture
def _empty_cache() -> Iterator[None]:
    before = check._cache
    check._cache = check._Cache()
    yield
    check._cache = before


@pytest.mark.usefixtures("_empty_cache")
def test_the_cache_is_bounded_in_bytes() -> None:
    """The oldest checks are dropped, and one that is larger than the cache is not kept."""
    texts = [json.dumps({"title": str(n), "anyOf": [{"type": "string"}] * 1000}) for n in range(10)]
    made = [argument_check(text) for text in texts]
    assert 0 < check._cache.size <= MAX_CACHE_BYTES
    assert argument_check(texts[-1]) is made[-1]
    assert argument_check(texts[0]) is not made[0]
    size = check._cache.size
    check._cache.keep(texts[-1], made[-1])
    assert check._cache.size == size
    check._cache.keep("large", replace(made[0], size=MAX_CACHE_BYTES + 1))
    assert check._cache.get("large") is None


@pytest.mark.usefixtures("_empty_cache")
async def test_other_tasks_run_while_many_schemas_are_compiled() -> None:
    """At most one schema and a thousand nodes are compiled in one piece; kept checks take none."""
    schemas = {str(n): json.dumps({"title": str(n), "anyOf": [{"type": "string"}] * 500}) for n in range(8)}
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    checks, errors = await compiled_checks(schemas)
    assert (len(checks), errors) == (8, {})
    assert turns >= 3
    turns = 0
    await compiled_checks(schemas)
    assert turns == 0
    task.cancel()


async def test_the_nodes_of_a_request_are_bounded() -> None:
    """Of all its schemas together, also of those that are wrong or were kept."""
    large = {str(n): json.dumps({"title": str(n), "anyOf": [{"type": "strin"}] * 3000}) for n in range(8)}
    checks, errors = await compiled_checks(large)
    assert not checks
    assert [f"at most {MAX_REQUEST_NODES}" in str(error) for error in errors.values()] == [False] * 6 + [True] * 2
