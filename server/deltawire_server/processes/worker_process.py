"""One worker of a gateway: its number, the worker that has a completion, and the connection to the parent."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deltawire_server.completions.records import mark_of
from deltawire_server.limits import Table

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

VARIABLE = "_DELTAWIRE_WORKER"
"""The environment variable that carries a `WorkerProcess` from the parent to the worker."""

METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that makes prometheus-client write the metrics of a process to files in a directory."""

METRICS_FOLDER = "metrics"
"""That directory, in the private one of the workers."""

LIMITS_FILE = "limits"
"""The file with the counts of callers, in the same directory."""

INCARNATIONS = 256
"""Incarnations of a worker that ids can distinguish. After that many restarts, old ids are reported as unknown instead of lost."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One worker of a gateway.

    Attributes:
        number: From 0 to `count` - 1. A worker that replaces another one has its number.
        count: The number of workers, at least 2.
        incarnation: How many workers had the number before.
        gateway: Four hexadecimal digits that identify the gateway.
        folder: The private directory (mode 0700) with the sockets of the workers.
        addresses: The addresses to listen on, each with its port.
        control: The file descriptor of the connection to the parent.
        metrics: The address at which the parent serves the metrics; empty for none.
        health: The address of the health listener, with its port; empty for none.
    """

    number: int
    count: int
    incarnation: int
    gateway: str
    folder: str
    addresses: Sequence[str]
    control: int
    metrics: str = ""
    health: str = ""

    @classmethod
    def taken_from(cls, environ: MutableMapping[str, str]) -> Self | None:
        """Remove the worker from an environment; `None` if the process is not one of several workers."""
        value = environ.pop(VARIABLE, None)
        return None if value is None else cls(**json.loads(value))

    def variables(self) -> dict[str, str]:
        """The environment variables from which `taken_from` makes this worker."""
        return {VARIABLE: json.dumps(asdict(self)), METRICS_VARIABLE: f"{self.folder}/{METRICS_FOLDER}"}

    def limits_table(self) -> Table:
        """The counts of callers that all workers share. `close` it at the end."""
        return Table(f"{self.folder}/{LIMITS_FILE}", self.count)

    @property
    def seat(self) -> str:
        """Six hexadecimal digits: the gateway and the number, which a replacement keeps."""
        return f"{self.gateway}{self.number:02x}"

    @property
    def mark(self) -> str:
        """Eight hexadecimal digits at the end of every id that this process generates: the seat and the incarnation."""
        return f"{self.seat}{self.incarnation % INCARNATIONS:02x}"

    @property
    def announces(self) -> bool:
        """Whether it logs what it serves: once for all workers at startup, and after each restart."""
        return self.number == 0 or self.incarnation > 0

    def socket(self, number: int) -> str:
        """The address of a worker's private listener."""
        return f"unix:{self.folder}/{number}.sock"

    def named_by(self, completion_id: str) -> int | None:
        """The number of the worker of this gateway that an id names; `None` if it names none, as an id that a caller chose."""
        mark = mark_of(completion_id)
        if mark.startswith(self.gateway) and (number := int(mark[4:6], 16)) < self.count:
            return number
        return None

    def number_for(self, owner: str, completion_id: str) -> int:
        """The number of the worker that has a completion, or that runs it if it is new.

        A generated id names its worker. Ids that callers choose are distributed by a hash, so that every worker finds them.

        Args:
            owner: The owner of the completion; see `CallRecord.owner`.
            completion_id: Its id; empty for a new completion without one, which runs here.
        """
        if not completion_id:
            return self.number
        number = self.named_by(completion_id)
        if number is not None:
            return number
        return zlib.crc32(f"{owner} {completion_id}".encode()) % self.count

    def report(self, **state: Any) -> None:  # noqa: ANN401 (JSON)
        """Send a line to the parent, such as `problems=[…]` before an exit."""
        with contextlib.suppress(OSError):  # it has ended
            os.write(self.control, json.dumps(state).encode() + b"\n")

    async def ready(self) -> bool:
        """Report that this process can serve, and wait until it may; return false if the parent has ended."""
        self.report(ready=True)
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.control, readable.set)
        try:
            await readable.wait()
            return bool(os.read(self.control, 1))
        except OSError:
            return False
        finally:
            loop.remove_reader(self.control)

    def serving(self, parent_ended: Callable[[], object]) -> None:
        """Report that this process serves.

        Args:
            parent_ended: Called when the parent has ended. Then drain.
        """
        self.report(serving=True)
        os.set_blocking(self.control, False)  # a parent that does not read must not stop this process
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self.control)
            atexit.register(_remove, self.folder)  # which the parent would have done
            parent_ended()

        loop.add_reader(self.control, ended)


def _remove(folder: str) -> None:
    """Remove the private directory, unless a sibling still runs, which then removes it."""
    if not any(Path(folder).glob("*.sock")):
        shutil.rmtree(folder, ignore_errors=True)
