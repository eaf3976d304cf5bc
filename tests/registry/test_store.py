"""What holds of a store, whichever database it is in."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import CursorResult, update

import deltawire_server.registry.store as store_module
from deltawire_server.errors import Code, Reason, RegistryError
from deltawire_server.registry.model import Model
from deltawire_server.registry.store import Change, ChangeKind, Store, StoreLimits
from deltawire_server.registry.tables import REVISION
from tests.registry.databases import LLAMA, VECTORS, execute, plain, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def url(database_url: str) -> str:
    """Of each kind of database."""
    return database_url


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """Open."""
    # They wait for each other, on a slow machine for long: that is not what is looked at.
    store = Store(url, busy_seconds=60)
    await store.open()
    yield store
    await store.close()


async def inserted(store: Store, model: Model) -> Model:
    """A model that is new, as it is kept."""
    kept = await store.insert(model)
    assert kept is not None
    return kept


async def models_of(store: Store) -> list[Model]:
    """All that can be read."""
    _, models = await store.load()
    return models


async def test_keeps_every_field_over_a_restart(url: str, store: Store) -> None:
    """What is read after a restart equals what was written, the order of aliases and microseconds included."""
    written = [await inserted(store, model) for model in (VECTORS, LLAMA, plain("bare"))]
    assert [replace(model, revision=0) for model in written] == [VECTORS, LLAMA, plain("bare")]
    await store.close()
    again = Store(url)
    await again.open()
    revision, models = await again.load()
    assert models == [written[2], written[1], written[0]]
    assert revision == written[2].revision
    await again.close()


async def test_models_come_in_the_order_of_their_ids(store: Store) -> None:
    """By code points, whatever the database's own order is: paging depends on it."""
    for model_id in ("b", "É", "B", "a", "a/b", "a-b", "ä"):
        await inserted(store, plain(model_id))
    assert [model.id for model in await models_of(store)] == sorted(["b", "É", "B", "a", "a/b", "a-b", "ä"])


@pytest.mark.parametrize("name", ["llama", "small", "fast"])
async def test_delete_takes_any_name_and_frees_all_of_them(store: Store, name: str) -> None:
    """A model goes as a whole: its names can be used again at once."""
    kept = await inserted(store, LLAMA)
    assert await store.delete(name) == Change(kept.revision + 1, ChangeKind.REMOVED, "llama", kept)
    assert await store.delete(name) is None
    assert await models_of(store) == []
    assert await store.insert(plain("fast", "llama", "small"))


@pytest.mark.parametrize("name", ["unknown", "", "a\x00b", "names'; DROP TABLE names; --"])
async def test_a_name_that_nobody_has_deletes_nothing(store: Store, name: str) -> None:
    """Also one that the database cannot even hold: it is nobody's, and no failure."""
    kept = await inserted(store, LLAMA)
    assert await store.delete(name) is None
    assert await store.load() == (kept.revision, [kept])


async def test_delete_with_a_revision(store: Store) -> None:
    """Who has seen a state deletes that one, or nothing."""
    old = await inserted(store, LLAMA)
    new = await store.update(old, replace(old, base_model=""))
    assert new is not None
    assert await store.delete("small", old.revision) is None
    assert await store.load() == (new.revision, [new])
    change = await store.delete("small", new.revision)
    assert change == Change(new.revision + 1, ChangeKind.REMOVED, "llama", new)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(plain("llama"), id="an id that is an id"),
        pytest.param(plain("small"), id="an id that is an alias"),
        pytest.param(plain("other", "llama"), id="an alias that is an id"),
        pytest.param(plain("other", "free", "fast"), id="an alias that is an alias"),
    ],
)
async def test_a_name_has_one_owner(url: str, store: Store, model: Model) -> None:
    """Ids and aliases share one space, and a refused insert leaves nothing behind, not even a revision."""
    kept = await inserted(store, LLAMA)
    assert await store.insert(model) is None
    assert await store.load() == (kept.revision, [kept])
    assert await store.changes_after(kept.revision) == []
    assert list(whole(url)) == []
    assert (await inserted(store, plain("free"))).revision == kept.revision + 1


async def test_update_replaces_everything_but_the_id(url: str, store: Store) -> None:
    """All fields and names are those of the new model; the old aliases are free, and kept ones may change places."""
    old = await inserted(store, LLAMA)
    wanted = replace(VECTORS, id="llama", aliases=("fast", "new"), annotations={"a": "b"}, revision=old.revision)
    new = await store.update(old, wanted)
    assert new == replace(wanted, revision=old.revision + 1)
    assert await store.load() == (old.revision + 1, [new])
    assert list(whole(url)) == []
    assert await store.insert(plain("small"))


@pytest.mark.parametrize(
    ("stale", "change"),
    [
        pytest.param({"revision": 1000}, {}, id="a revision that never was"),
        pytest.param({"revision": 2}, {}, id="a revision that was"),
        pytest.param({"id": "unknown"}, {"id": "unknown"}, id="an unknown id"),
        pytest.param({"id": "fast"}, {"id": "fast"}, id="an alias in the place of the id"),
        pytest.param({}, {"aliases": ("taken",)}, id="another's id"),
        pytest.param({}, {"aliases": ("small", "theirs")}, id="another's alias"),
    ],
)
async def test_a_refused_update_changes_nothing(
    url: str, store: Store, stale: dict[str, Any], change: dict[str, Any]
) -> None:
    """Neither the model, nor its names, nor the revision: who was overtaken reads and decides again."""
    taken = await inserted(store, plain("taken", "theirs"))
    assert taken.revision == 2
    first = await inserted(store, LLAMA)
    kept = await store.update(first, first)
    assert kept is not None
    assert await store.update(replace(kept, **stale), replace(kept, base_model="new", **change)) is None
    assert await store.load() == (kept.revision, [kept, taken])
    assert await store.changes_after(kept.revision) == []
    assert list(whole(url)) == []


async def test_changes_tell_all_that_was_done_in_its_order(store: Store) -> None:
    """A state with the later changes applied is the current state."""
    start, _ = await store.load()
    added = await inserted(store, LLAMA)
    other = await inserted(store, VECTORS)
    modified = await store.update(added, replace(added, aliases=("new",)))
    assert modified is not None
    removed = await store.delete("new")
    changes = [
        Change(start + 1, ChangeKind.ADDED, "llama", added),
        Change(start + 2, ChangeKind.ADDED, "vectors", other),
        Change(start + 3, ChangeKind.MODIFIED, "llama", modified),
        Change(start + 4, ChangeKind.REMOVED, "llama", modified),
    ]
    assert removed == changes[-1]
    for done in range(5):
        assert await store.changes_after(start + done) == changes[done:]


async def test_only_the_last_changes_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has missed more is told to read everything; the models themselves stay."""
    monkeypatch.setattr(store_module, "TRIM_EVERY", 1)
    store = Store(url, changes_kept=3)
    await store.open()
    kept = [await inserted(store, plain(f"model-{number}")) for number in range(6)]
    last = kept[-1].revision
    assert await store.changes_after(last - 4) is None
    assert [change.model for change in await store.changes_after(last - 3) or ()] == kept[-3:]
    assert await models_of(store) == kept
    assert execute(url, "SELECT count(*) FROM changes") == [(3,)]
    await store.close()


async def test_the_size_is_that_of_all_models(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept by every write, and counted anew every so often: an earlier release does not keep it."""

    async def counted() -> None:
        sizes = execute(url, "SELECT models, aliases, bytes FROM registry_revision")
        async with store._database.writing() as connection:
            await connection.execute(update(REVISION).values(store_module._COUNTED))
        assert execute(url, "SELECT models, aliases, bytes FROM registry_revision") == sizes

    first = await inserted(store, LLAMA)
    await inserted(store, VECTORS)
    await counted()
    second = await store.update(first, replace(first, aliases=("ä",), annotations={"ö": "x" * 50}, owner="them"))
    assert second is not None
    await counted()
    assert await store.delete("ä")
    await counted()
    execute(url, "UPDATE models SET annotations = '{damaged'", "UPDATE registry_revision SET models = 7, bytes = 7")
    assert await store.delete("vectors")
    assert execute(url, "SELECT models, aliases, bytes FROM registry_revision") == [(0, 0, 0)]
    execute(url, "UPDATE registry_revision SET models = 7, aliases = 7, bytes = 7")
    monkeypatch.setattr(store_module, "RECOUNT_EVERY", 1)
    await inserted(store, LLAMA)
    await counted()


async def test_the_records_of_changes_are_bounded_in_bytes(url: str) -> None:
    """Every so often the oldest are dropped, and who missed them reads everything; the models themselves stay."""
    store = Store(url, changes_bytes=20_000)
    await store.open()
    model = await inserted(store, plain("model"))
    for turn in range(130):
        changed = await store.update(model, replace(model, annotations={"k": str(turn) + "x" * 1000}))
        assert changed is not None
        model = changed
    ((rows, size),) = execute(url, "SELECT count(*), sum(length(record)) FROM changes")
    assert rows < 20_000 / 1000 + 64
    assert size < 20_000 + 64 * 1400
    assert await store.changes_after(1) is None
    assert [change.model for change in await store.changes_after(model.revision - 1) or ()] == [model]
    assert await models_of(store) == [model]
    await store.close()


async def test_much_is_read_in_pages(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with their aliases, and changes: no result has more rows than a page, and nothing is missed or doubled."""
    monkeypatch.setattr(store_module, "PAGE", 7)
    start, _ = await store.load()
    kept = [await inserted(store, plain(f"model-{number:02}", f"a-{number}", f"b-{number}")) for number in range(40)]
    fetched: list[int] = []
    fetchall = CursorResult.fetchall

    def counted(result: CursorResult[Any]) -> Any:  # noqa: ANN401 (whatever rows there are)
        rows = fetchall(result)
        fetched.append(len(rows))
        return rows

    monkeypatch.setattr(CursorResult, "fetchall", counted)
    revision, models = await store.load()
    assert (revision, models) == (kept[-1].revision, kept)
    changes: list[Change] = []
    while page := await store.changes_after(start + len(changes)):
        assert len(page) <= 7
        changes += page
    assert [change.model for change in changes] == kept
    assert max(fetched, default=0) <= 3 * 7
    again = {model.id: model for model in kept}
    other = Store(url)
    await other.open()
    changed = await other.update(kept[3], replace(kept[3], annotations={"k": "v"}))
    await other.close()
    _, models = await store.load(again)
    assert models[3] == changed
    assert all(model is again[model.id] for model in models if model != changed)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (StoreLimits(max_models=2), "models"),
        (StoreLimits(max_aliases=4), "aliases"),
        (StoreLimits(max_bytes=1000), "bytes"),
    ],
)
async def test_how_much_can_be_registered(url: str, limits: StoreLimits, what: str) -> None:
    """One more than the limit is refused, by which limit and what to do is said, and nothing of it stays; less is allowed again."""
    store = Store(url, limits=limits)
    await store.open()
    notes = {"k": "x" * 400}
    first = await inserted(store, replace(plain("a", "a1", "a2"), annotations=notes))
    second = await inserted(store, replace(plain("b", "b1", "b2"), annotations=notes))
    with pytest.raises(RegistryError) as failure:
        await store.insert(replace(plain("c", "c1"), annotations=notes))
    assert (failure.value.reason, failure.value.code) == (Reason.REGISTRY_FULL, Code.RESOURCE_EXHAUSTED)
    assert failure.value.metadata["setting"] == f"registry.max_{what}"
    assert f"ask the operator to raise registry.max_{what}" in failure.value.message
    assert await models_of(store) == [first, second]
    assert list(whole(url)) == []
    if what != "models":
        with pytest.raises(RegistryError):
            await store.update(first, replace(first, aliases=("a1", "a2", "a3"), annotations={"k": "x" * 900}))
        assert await models_of(store) == [first, second]
    smaller = await store.update(first, replace(first, aliases=(), annotations={}))
    assert smaller is not None
    await store.delete("b")
    await inserted(store, replace(plain("c", "c1"), annotations=notes))
    await store.close()


async def test_what_is_beyond_a_lowered_limit_stays_and_can_shrink(url: str, store: Store) -> None:
    """Lowering a limit loses nothing: only a write that adds to what is beyond it is refused."""
    model = await inserted(store, replace(plain("a", "a1", "a2"), annotations={"k": "x" * 1000}))
    tight = Store(url, limits=StoreLimits(max_models=1, max_aliases=1, max_bytes=100))
    await tight.open()
    changed = await tight.update(model, replace(model, aliases=("a1", "b2")))
    assert changed is not None
    with pytest.raises(RegistryError):
        await tight.update(changed, replace(changed, aliases=("a1", "b2", "c3")))
    assert await tight.update(changed, replace(changed, annotations={}))
    await tight.close()


async def test_the_limit_is_that_of_all_processes(url: str, store: Store) -> None:
    """Many that register at once, each with a memory of its own: exactly as many as there is room for succeed."""
    stores = [Store(url, busy_seconds=60, limits=StoreLimits(max_models=5)) for _ in range(4)]
    for each in stores:
        await each.open()
    results = await asyncio.gather(
        *(stores[number % 4].insert(plain(f"model-{number}")) for number in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Model) for result in results) == 5
    refused = [result for result in results if isinstance(result, RegistryError)]
    assert [failure.reason for failure in refused] == [Reason.REGISTRY_FULL] * 15
    assert len(await models_of(store)) == 5
    for each in stores:
        await each.close()


async def test_a_database_that_is_older_than_its_reader(store: Store) -> None:
    """Somebody has brought back a copy: what has changed since is unknown, and everything is to be read."""
    last = (await inserted(store, LLAMA)).revision
    assert await store.changes_after(last) == []
    assert await store.changes_after(last + 1) is None


async def test_of_many_processes_that_want_an_alias_one_gets_it(url: str, store: Store) -> None:
    """The database itself decides: each of these has its own connections, as separate processes have."""
    stores = [Store(url, busy_seconds=60) for _ in range(8)]
    for other in stores:
        await other.open()
    models = [plain(f"model-{number:02}", "wanted") for number in range(40)]
    kept = await asyncio.gather(*(stores[number % 8].insert(model) for number, model in enumerate(models)))
    for other in stores:
        await other.close()
    (winner,) = [model for model in kept if model is not None]
    assert await models_of(store) == [winner]


async def test_of_many_processes_that_change_a_model_one_does(url: str, store: Store) -> None:
    """All have seen the same state, so all but the first are overtaken."""
    seen = await inserted(store, LLAMA)
    stores = [Store(url, busy_seconds=60) for _ in range(4)]
    for other in stores:
        await other.open()
    writes = [other.update(seen, replace(seen, base_model=f"of {number}")) for number, other in enumerate(stores)]
    kept = await asyncio.gather(*writes, *(other.delete("llama", seen.revision) for other in stores))
    for other in stores:
        await other.close()
    (winner,) = [change for change in kept if change is not None]
    assert await models_of(store) == ([winner] if isinstance(winner, Model) else [])
    assert winner.revision == seen.revision + 1


async def test_writes_of_many_processes_are_in_one_order_without_gaps(url: str, store: Store) -> None:
    """A reader that polls gets each change once, in an order that leads to the current state."""
    start, _ = await store.load()
    stores = [Store(url, busy_seconds=60) for _ in range(4)]
    for other in stores:
        await other.open()

    async def write(number: int, other: Store) -> list[int]:
        revisions = []
        for step in range(6):
            model = await inserted(other, plain(f"{number}-{step}", f"alias-{number}"))
            assert await other.insert(plain("refused", f"alias-{number}")) is None
            changed = await other.update(model, replace(model, base_model="new"))
            gone = await other.delete(model.id)
            assert changed is not None
            assert gone is not None
            revisions += [model.revision, changed.revision, gone.revision]
        return revisions

    async def follow() -> list[Change]:
        seen: list[Change] = []
        while len(seen) < 4 * 6 * 3:
            changes = await store.changes_after(start + len(seen))
            assert changes is not None
            seen += changes
        return seen

    writes = asyncio.gather(*(write(number, other) for number, other in enumerate(stores)))
    seen, revisions = await asyncio.gather(follow(), writes)
    for other in stores:
        await other.close()
    assert [change.revision for change in seen] == list(range(start + 1, start + 1 + 4 * 6 * 3))
    assert sorted(chain(*revisions)) == [change.revision for change in seen]
    assert all(mine == sorted(mine) for mine in revisions)
    models: dict[str, Model] = {}
    for change in seen:
        assert change.model is not None
        if change.kind is ChangeKind.REMOVED:
            assert models.pop(change.model_id) == change.model
        else:
            assert (change.model_id in models) == (change.kind is ChangeKind.MODIFIED)
            models[change.model_id] = change.model
    assert await models_of(store) == list(models.values()) == []
    assert list(whole(url)) == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE models SET annotations = '{' WHERE id = 'llama'",
        "UPDATE models SET annotations = '[]' WHERE id = 'llama'",
        "UPDATE models SET annotations = '{\"a\": 1}' WHERE id = 'llama'",
        "UPDATE models SET type = 'ORACLE' WHERE id = 'llama'",
        "UPDATE models SET update_time = 9000000000000000000 WHERE id = 'llama'",
        "UPDATE models SET max_context_tokens = 4294967296 WHERE id = 'llama'",
        "UPDATE models SET embedding_dimension = -1 WHERE id = 'llama'",
        "DELETE FROM names WHERE name = 'llama'",
    ],
)
async def test_a_damaged_record_is_logged_and_left_out(url: str, store: Store, damage: str) -> None:
    """One bad record never costs the others, and can still be deleted."""
    await inserted(store, LLAMA)
    good = await inserted(store, plain("good"))
    execute(url, damage)
    with structlog.testing.capture_logs() as logs:
        assert await models_of(store) == [good]
    assert [(line["event"], line["model"]) for line in logs] == [("damaged record left out", "llama")]
    gone = await store.delete("llama")
    assert gone == Change(good.revision + 1, ChangeKind.REMOVED, "llama", None)
    assert await store.changes_after(good.revision) == [gone]
    assert await store.insert(LLAMA)
    assert list(whole(url)) == []


@pytest.mark.parametrize(
    "damage",
    [
        "record = '{'",
        "record = '[]'",
        "record = '{}'",
        "record = ''",
        "record = replace(record, 'LLM', 'ORACLE')",
        "model_id = 'other'",
        "change = 'MOVED'",
    ],
)
async def test_a_damaged_change_is_logged_and_everything_is_to_be_read(url: str, store: Store, damage: str) -> None:
    """What it did is unknown, while the model itself may be whole; who has it behind is not concerned."""
    start, _ = await store.load()
    kept = await inserted(store, LLAMA)
    execute(url, f"UPDATE changes SET {damage}")  # noqa: S608 (the test's own)
    with structlog.testing.capture_logs() as logs:
        assert await store.changes_after(start) is None
    assert [line["event"] for line in logs] == ["damaged change"]
    assert await models_of(store) == [kept]
    other = await inserted(store, plain("other"))
    assert await store.changes_after(kept.revision) == [Change(other.revision, ChangeKind.ADDED, "other", other)]


async def test_a_lost_change_is_noticed(url: str, store: Store) -> None:
    """Each revision has to be there: a gap is no end."""
    start, _ = await store.load()
    await inserted(store, LLAMA)
    await inserted(store, plain("other"))
    execute(url, "DELETE FROM changes WHERE model_id = 'llama'")
    assert await store.changes_after(start) is None


async def test_only_registered_models_are_stored(store: Store) -> None:
    """A model without times is a discovered one, and storing it a defect of ours; it leaves nothing behind."""
    before = await store.load()
    with pytest.raises(ValueError, match="has no times"):
        await store.insert(Model("vllm/llama", "vllm", "llama"))
    assert await store.load() == before


NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1)
_numbers = count()


# Few, since each writes; the store is the same for all of them.
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(annotations=st.dictionaries(st.text(), st.text()), names=st.lists(NAMES, unique=True, max_size=5))
async def test_any_text_survives(store: Store, annotations: dict[str, str], names: list[str]) -> None:
    """Notes and names come back as they went in, whatever letters they hold, from models and changes alike."""
    model_id = f"id {next(_numbers)}"
    before, _ = await store.load()
    kept = await inserted(store, replace(LLAMA, id=model_id, aliases=tuple(names), annotations=annotations))
    assert kept.names == (model_id, *names)
    assert kept.annotations == annotations
    assert await models_of(store) == [kept]
    assert await store.changes_after(before) == [Change(kept.revision, ChangeKind.ADDED, model_id, kept)]
    assert await store.delete(names[0] if names else model_id)
