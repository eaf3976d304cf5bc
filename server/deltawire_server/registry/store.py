"""Registered models in a database: SQLite, or PostgreSQL for gateways on several machines.

Each write is one transaction. It increments the revision and records its change, which other processes read. A constraint of the
database ensures that a name has one owner, also across processes. Errors of the database become a `RegistryError` with
STORE_UNAVAILABLE. The cause is in the log and not in the message, because callers must not see paths and SQL.
"""

from __future__ import annotations

import enum
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import BigInteger, Text, and_, bindparam, delete, func, insert, literal, make_url, select, update
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.database import BUSY_SECONDS, cause_text
from deltawire_server.registry.rows import (
    DamagedRecordError,
    model_of,
    model_of_record,
    record_of,
    values_of,
)
from deltawire_server.registry.sqlite import SqliteDatabase
from deltawire_server.registry.tables import CHANGES, LATEST, MODELS, NAMES, REVISION, migrate, version_of
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from deltawire_server.registry.database import Database
    from deltawire_server.registry.model import Model

_log = get_logger(__name__)

CHANGES_KEPT = 10_000
"""How many changes stay recorded at least. A process that missed more reads all models again, which takes about as long."""

CHANGES_BYTES = 16 * 1024 * 1024
"""Limit for the characters of these records."""

TRIM_EVERY = 64
"""Changes after which both limits are applied."""

RECOUNT_EVERY = 1024
"""Changes after which the size of all models is counted anew: an earlier release that still runs does not keep it."""

REPEAT_SECONDS = 60.0
"""How often the same error of the database is logged."""

PAGE = 200
"""Rows of one read: with models of the maximum size a few megabytes of memory, and a few milliseconds of work."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits for the models of a database, which gateways may share. See `settings.model.RegistrySettings`.

    Attributes:
        max_models: Number of registered models.
        max_aliases: Number of aliases of all models.
        max_bytes: Characters of text of all models, as stored in the database.
    """

    max_models: int = 10_000
    max_aliases: int = 20_000
    max_bytes: int = 32 * 1024 * 1024


class ChangeKind(enum.Enum):
    """How a model changed; the values are those of `deltawire.v1.WatchModelsResponse.Change`."""

    ADDED = 1
    MODIFIED = 2
    REMOVED = 3


@dataclass(frozen=True, slots=True)
class Change:
    """A committed change.

    Attributes:
        revision: The position in the order of all changes.
        kind: How the model changed.
        model_id: The id of the model.
        model: The model after the change, or before its removal; `None` if the record cannot be read.
    """

    revision: int
    kind: ChangeKind
    model_id: str
    model: Model | None


class Store:
    """The database of registered models. Call `open` first and `close` last.

    Args:
        url: See `database_of`.
        busy_seconds: How long a write waits for the writes of other processes.
        changes_kept: Limit for the recorded changes.
        changes_bytes: Limit for the characters of these records.
        limits: Limits for the models. Models above a lowered limit stay, and can be changed to smaller ones.

    Raises:
        ValueError: The URL is invalid, the database is not supported, or its driver is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        busy_seconds: float = BUSY_SECONDS,
        changes_kept: int = CHANGES_KEPT,
        changes_bytes: int = CHANGES_BYTES,
        limits: StoreLimits | None = None,
    ) -> None:
        self._database = database_of(url, busy_seconds)
        self._changes_kept = changes_kept
        self._changes_bytes = changes_bytes
        self._limits = limits or StoreLimits()
        self._logged = ("", 0.0)

    async def open(self) -> None:
        """Open the database and migrate its tables, if necessary. A current database is not written to.

        Raises:
            RegistryError: STORE_UNAVAILABLE: it cannot be opened, or a newer release has migrated it.
        """
        with self._translated("open"):
            await self._database.open()
            async with self._database.reading() as connection:
                version = await connection.run_sync(version_of)
            if version < LATEST:
                async with self._database.writing() as connection:
                    await self._database.lock_migrations(connection)
                    await connection.run_sync(migrate)

    def is_away(self, error: RegistryError) -> bool:
        """Whether the cause of an error is that the database cannot be reached now."""
        return error.__cause__ is not None and self._database.is_away(error.__cause__)

    async def close(self) -> None:
        """Close all connections. No other method may be called afterwards."""
        await self._database.close()

    async def load(self, known: Mapping[str, Model] = MappingProxyType({})) -> tuple[int, list[Model]]:
        """The revision of the last change, and all readable models by ascending id. Damaged records are logged and omitted.

        Args:
            known: Models in memory by id; for an unchanged model, this object is returned, so that it does not take memory twice.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        models: list[Model] = []
        with self._translated("load"):
            async with self._database.reading() as connection:
                revision = await _revision(connection)
                page = select(MODELS).order_by(MODELS.c.id).limit(PAGE)
                read = 0
                # By position and not after the last id, because this id may be damaged.
                while rows := (await connection.execute(page.offset(read))).mappings().all():
                    read += len(rows)
                    theirs = NAMES.c.model_id.in_([row["id"] for row in rows])
                    names = await connection.execute(select(NAMES).where(theirs).order_by(NAMES.c.position))
                    names_of: dict[object, list[object]] = {}
                    for name in names:
                        names_of.setdefault(name.model_id, []).append(name.name)
                    for row in rows:
                        model = _readable(row, names_of.get(row["id"], ()))
                        if model is not None:
                            before = known.get(model.id)
                            models.append(before if before == model and before is not None else model)
        # Not sorted by the database, because the databases have different orders.
        return revision, sorted(models, key=lambda model: model.id)

    async def changes_after(self, revision: int) -> list[Change] | None:
        """The first `PAGE` changes after a revision, in order; `None` if some are missing, and then the caller must `load`.

        They are missing if they are no longer recorded, if one of them is damaged, which is logged, or if the database is older
        than the revision, because a backup was restored.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        with self._translated("catch up"):
            rows = await self._database.fetch(_CHANGES_AFTER, {"after": revision, "limit": PAGE})
        # Without changes, one row with the last revision alone.
        last = rows[0].last
        rows = [row for row in rows if row.revision is not None]
        end = min(last, revision + PAGE)
        if last < revision or [row.revision for row in rows] != list(range(revision + 1, end + 1)):
            return None
        try:
            return [_change(row.revision, row.change, row.model_id, row.record) for row in rows]
        except DamagedRecordError as error:
            _log.warning("damaged change", after=revision, error=str(error))
            return None

    async def insert(self, model: Model) -> Model | None:
        """Insert a model with its id and aliases.

        Args:
            model: The model, with both times.

        Returns:
            The stored model, with its revision; `None` if a name has an owner, and then nothing has changed: `load` returns the
            owner.

        Raises:
            RegistryError: REGISTRY_FULL, STORE_UNAVAILABLE.
        """
        with self._translated("insert"):
            return await self._put(ChangeKind.ADDED, None, model)

    async def update(self, before: Model, model: Model) -> Model | None:
        """Replace a model by one with the same id.

        Args:
            before: The stored model, with its revision.
            model: The new model.

        Returns:
            The stored model, with its new revision; `None` if the database has no model of the id and revision of `before` or a
            name has an owner, and then nothing has changed.

        Raises:
            RegistryError: REGISTRY_FULL, STORE_UNAVAILABLE.
        """
        with self._translated("update"):
            return await self._put(ChangeKind.MODIFIED, before, model)

    async def _put(self, kind: ChangeKind, before: Model | None, model: Model) -> Model | None:
        try:
            async with self._database.writing() as connection:
                size = _size_of(model) - (_Size() if before is None else _size_of(before))
                stored = replace(model, revision=await self._next_revision(connection, size))
                if before is None:
                    await connection.execute(_INSERT_MODEL, values_of(stored))
                else:
                    mine = {"model_id": before.id, "model_revision": before.revision}
                    result = await connection.execute(_UPDATE_MODEL, values_of(stored) | mine)
                    if not result.rowcount:
                        raise _OvertakenError
                if before is None or before.names != stored.names:
                    if before is not None:
                        await connection.execute(_DELETE_NAMES, {"model_id": stored.id})
                    rows = [
                        {"name": name, "model_id": stored.id, "position": place}
                        for place, name in enumerate(stored.names)
                    ]
                    await connection.execute(_INSERT_NAME, rows)
                await _record(connection, Change(stored.revision, kind, stored.id, stored))
        except (IntegrityError, _OvertakenError):
            return None
        return stored

    async def delete(self, name: str, revision: int | None = None) -> Change | None:
        """Delete a model and its names, even if the record is damaged.

        Args:
            name: The id or an alias.
            revision: The expected revision; `None` for any.

        Returns:
            The change; `None` if no model has this name and revision.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        with self._translated("delete"):
            try:
                async with self._database.writing() as connection:
                    next_revision = await self._next_revision(connection)
                    # If the record is damaged, the row of the name or of the model may be missing.
                    owner = await connection.scalar(select(NAMES.c.model_id).where(NAMES.c.name == name))
                    model_id = name if owner is None else owner
                    row = (await connection.execute(select(MODELS).where(MODELS.c.id == model_id))).mappings().first()
                    if row is None and (owner is None or revision is not None):
                        raise _OvertakenError
                    if row is not None and revision not in (None, row["revision"]):
                        raise _OvertakenError
                    mine = NAMES.c.model_id == model_id
                    names = (
                        await connection.scalars(select(NAMES.c.name).where(mine).order_by(NAMES.c.position))
                    ).all()
                    model = None if row is None else _readable(row, names)
                    await connection.execute(_DELETE_NAMES, {"model_id": model_id})
                    await connection.execute(delete(MODELS).where(MODELS.c.id == model_id))
                    # A damaged record is not counted by its parts.
                    size = update(REVISION).values(_COUNTED) if model is None else _ADD_SIZE
                    await connection.execute(size, None if model is None else (_Size() - _size_of(model))._asdict())
                    change = Change(next_revision, ChangeKind.REMOVED, model_id, model)
                    await _record(connection, change)
            # DataError: the database cannot store such a name, so no model has it.
            except (_OvertakenError, DataError):
                return None
        return change

    def changes_elsewhere(self) -> AsyncGenerator[bool]:
        """Yield true whenever other processes may have changed something: call `changes_after`. False if the database is away.

        It ends only when closed.
        """
        return self._database.changes_elsewhere()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Make an error of the database a `RegistryError`, and log it; the same one not more often than `REPEAT_SECONDS`."""
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            text, now = cause_text(error), time.monotonic()
            logged, at = self._logged
            if text != logged or now - at > REPEAT_SECONDS:
                self._logged = (text, now)
                _log.error("database unusable", call=what, error=text)
            raise RegistryError(
                Reason.STORE_UNAVAILABLE,
                "the registry's database is unavailable; models that are already registered can still be called",
                retry_after=1.0,
            ) from error

    async def _next_revision(self, connection: AsyncConnection, size: _Size | None = None) -> int:
        """Increment the revision, and add to the size. It is the first statement of every write, and locks out other writers.

        Raises:
            RegistryError: REGISTRY_FULL: a size is above its limit and has grown.
        """
        size = size or _Size()
        row = (await connection.execute(_NEXT_REVISION, size._asdict())).one()
        if row.revision % RECOUNT_EVERY == 0:
            await connection.execute(update(REVISION).values(_COUNTED))
            await connection.execute(_ADD_SIZE, size._asdict())
        self._check_size(size, _Size(row.models, row.aliases, row.bytes))
        if row.revision % min(TRIM_EVERY, self._changes_kept) == 0:
            await connection.execute(delete(CHANGES).where(CHANGES.c.revision <= row.revision - self._changes_kept))
            newer = func.sum(func.length(CHANGES.c.record)).over(order_by=CHANGES.c.revision.desc())
            sums = select(CHANGES.c.revision, newer.label("size")).subquery()
            too_old = select(func.max(sums.c.revision)).where(sums.c.size > self._changes_bytes).scalar_subquery()
            await connection.execute(delete(CHANGES).where(CHANGES.c.revision <= too_old))
        return int(row.revision)

    def _check_size(self, added: _Size, after: _Size) -> None:
        """Check the limits within the transaction of a write.

        Raises:
            RegistryError: REGISTRY_FULL.
        """
        limits = (self._limits.max_models, self._limits.max_aliases, self._limits.max_bytes)
        for what, limit, more, new in zip(_Size._fields, limits, added, after, strict=True):
            if new > limit and more > 0:
                raise RegistryError(
                    Reason.REGISTRY_FULL,
                    f"the registry's limit is {limit} {what}, and this change would make {new}: unregister models, use"
                    f" fewer aliases or annotations, or ask the operator to raise registry.max_{what}",
                    metadata={"limit": str(limit), "setting": f"registry.max_{what}"},
                )


class _Size(NamedTuple):
    """The size of models; the names are those of the limits, and of the columns with the size of all models."""

    models: int = 0
    aliases: int = 0
    bytes: int = 0

    def __sub__(self, other: _Size) -> _Size:
        return _Size(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def _size_of(model: Model) -> _Size:
    values = values_of(model)
    texts = (values[column.name] for column in _TEXTS)
    return _Size(1, len(model.aliases), sum(map(len, texts)) + sum(map(len, model.names)))


# Statements are made once: making one takes longer than to execute it.

_TEXTS = [column for column in MODELS.c if isinstance(column.type, Text) and column is not MODELS.c.type]
_COUNTED = {
    "models": select(func.count()).select_from(MODELS).scalar_subquery(),
    "aliases": select(func.count()).select_from(NAMES).where(NAMES.c.position > 0).scalar_subquery(),
    "bytes": select(
        func.coalesce(func.sum(sum((func.length(each) for each in _TEXTS), start=literal(0))), 0)
    ).scalar_subquery()
    + select(func.coalesce(func.sum(func.length(NAMES.c.name)), 0)).scalar_subquery(),
}
"""The size of all models, counted."""

_ADD_SIZE = update(REVISION).values({name: REVISION.c[name] + bindparam(name) for name in _Size._fields})
_NEXT_REVISION = _ADD_SIZE.values(revision=REVISION.c.revision + 1).returning(
    REVISION.c.revision, *(REVISION.c[name] for name in _Size._fields)
)
_INSERT_MODEL = insert(MODELS)
_UPDATE_MODEL = (
    update(MODELS)
    .where(MODELS.c.id == bindparam("model_id"), MODELS.c.revision == bindparam("model_revision"))
    .values({column.name: bindparam(column.name) for column in MODELS.c})
)
_INSERT_NAME = insert(NAMES)
_DELETE_NAMES = delete(NAMES).where(NAMES.c.model_id == bindparam("model_id"))
_INSERT_CHANGE = insert(CHANGES)
_CHANGES_AFTER = (
    select(REVISION.c.revision.label("last"), CHANGES)
    .select_from(
        REVISION.outerjoin(
            CHANGES,
            and_(
                CHANGES.c.revision > bindparam("after", type_=BigInteger),
                CHANGES.c.revision <= bindparam("after", type_=BigInteger) + bindparam("limit", type_=BigInteger),
            ),
        )
    )
    .order_by(CHANGES.c.revision)
)
"""The last revision and changes, by one statement, which sees one state of the database."""


class _OvertakenError(Exception):
    """The model to change no longer exists in this revision: the transaction is rolled back."""


async def _revision(connection: AsyncConnection) -> int:
    return int((await connection.execute(select(REVISION.c.revision))).scalar_one())


async def _record(connection: AsyncConnection, change: Change) -> None:
    values = {
        "revision": change.revision,
        "change": change.kind.name,
        "model_id": change.model_id,
        "record": "" if change.model is None else record_of(change.model),
    }
    await connection.execute(_INSERT_CHANGE, values)


def _change(revision: int, kind: str, model_id: object, record: object) -> Change:
    """The change of a row.

    Raises:
        DamagedRecordError: It is not a record that this release writes.
    """
    if kind not in ChangeKind.__members__ or not isinstance(model_id, str):
        raise DamagedRecordError(f"revision {revision}: {kind!r} of {model_id!r}")
    # A removed model may have been damaged.
    if ChangeKind[kind] is ChangeKind.REMOVED and record == "":
        return Change(revision, ChangeKind.REMOVED, model_id, None)
    model = model_of_record(record)
    if model.id != model_id:
        raise DamagedRecordError(f"revision {revision}: {model.id!r} in the place of {model_id!r}")
    return Change(revision, ChangeKind[kind], model_id, model)


def _readable(row: RowMapping, names: Sequence[object]) -> Model | None:
    """The model of a row and its names; `None` if it is damaged, which is logged."""
    try:
        if row["id"] not in names:
            raise DamagedRecordError("its id is not among its names")
        return model_of(dict(row), [name for name in names if name != row["id"]])
    except DamagedRecordError as error:
        _log.warning("damaged record left out", model=row["id"], error=str(error))
        return None


def database_of(url: str, busy_seconds: float = BUSY_SECONDS) -> Database:
    """The database of an SQLAlchemy URL. Call `open` first and `close` last.

    Args:
        url: "sqlite:////var/lib/deltawire/registry.db", "postgresql://user:password@host/name", or "sqlite://" for a database in
            memory, which ends with the process.
        busy_seconds: How long a write waits for the writes of other processes.

    Raises:
        ValueError: The URL is invalid, the database is not supported, or its driver is not installed. The message does not
            contain the URL, which may have a password.
    """
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        # Without its cause, which may repeat a part of the URL.
        raise ValueError('the database URL is not valid; an example is "sqlite:////var/lib/registry.db"') from None
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return SqliteDatabase(parsed.set(drivername="sqlite+aiosqlite"), busy_seconds)
    if kind == "postgresql":
        try:
            # The driver is an optional dependency.
            from deltawire_server.registry.postgres import PostgresDatabase
        except ImportError as error:
            raise ValueError("PostgreSQL needs psycopg: pip install 'deltawire[postgres]'") from error
        return PostgresDatabase(parsed.set(drivername="postgresql+psycopg"), busy_seconds)
    raise ValueError(f"the registry supports SQLite and PostgreSQL, not {kind}")
