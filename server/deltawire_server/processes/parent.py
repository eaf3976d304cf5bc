"""The parent of the workers: holds the port, starts the workers, restarts those that end, and forwards signals.

    start all ──▶ all ready ──▶ each listens on the port ──▶ serving ── a worker ends ──▶ started again after a delay
                    └── one cannot serve: its message and exit status, once          SIGTERM ──▶ all drain, then the end

If the parent ends, its connection to each worker is closed, and the workers drain and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltawire_server import signals
from deltawire_server.metrics.listener import serve_metrics
from deltawire_server.metrics.probes import Probes
from deltawire_server.processes.worker_metrics import WorkerMetrics
from deltawire_server.processes.worker_process import METRICS_FOLDER, WorkerProcess
from deltawire_server.settings.model import MAX_WORKERS
from deltawire_server.telemetry import configure_logging, get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.limits import Table
    from deltawire_server.settings import Settings

FIRST_DELAY = 0.1
MAX_DELAY = 30.0
"""Seconds before a worker is started again; doubled each time."""

BEAT_SECONDS = 1.0

SILENCE_SECONDS = 15.0
MAX_SILENCES = 2
"""A worker that has not reported for so long, so many times in a row, hangs. Twice, because all processes may have been paused."""

MAX_REPORT = 1024 * 1024
"""Bytes of one report of a worker: all its problems."""

MAX_SOCKET_PATH = 107
"""Bytes of the path of a unix socket."""

STABLE_SECONDS = 60.0
"""A worker that served for so long is started again after `FIRST_DELAY`."""

REMEDY = "use another address (--listen)"
HEALTH_REMEDY = "use another address (--health-listen)"

_log = get_logger(__name__)


def run(arguments: Sequence[str], settings: Settings) -> int:
    """Run the workers until a signal stops them.

    Args:
        arguments: The command line, for the workers.
        settings: The settings, with at least 2 workers.

    Returns:
        The exit status: 0 after a signal; that of a worker if it cannot serve at startup.
    """
    configure_logging(settings.log.level, settings.log.format)
    with contextlib.ExitStack() as stack:
        try:
            addresses = [_reserved(address, REMEDY, stack) for address in settings.server.listen]
            health = settings.server.health_address and _reserved(settings.server.health_address, HEALTH_REMEDY, stack)
        except OSError as error:
            print(f"deltawire-server: {error}", file=sys.stderr)
            return 1
        try:
            private = tempfile.TemporaryDirectory(prefix="deltawire-", ignore_cleanup_errors=True)
        except OSError as error:
            problem = f"cannot create the private directory of the workers: {error.strerror or error}"
            print(f"deltawire-server: {problem}; set TMPDIR to a writable directory", file=sys.stderr)
            return 1
        folder = stack.enter_context(private)
        if len(os.fsencode(f"{folder}/{MAX_WORKERS}.sock")) > MAX_SOCKET_PATH:
            problem = f"the private directory of the workers, {folder}, has too long a path for unix sockets"
            print(f"deltawire-server: {problem}; set TMPDIR to a directory with a shorter path", file=sys.stderr)
            return 1
        metrics = WorkerMetrics(f"{folder}/{METRICS_FOLDER}")
        probes = Probes()
        try:
            serving = serve_metrics(
                settings.metrics.address, metrics.registry, probes, is_default=settings.metrics.is_default
            )
        except OSError as error:
            print(f"deltawire-server: {error}", file=sys.stderr)
            return 1
        if serving is not None:
            stack.callback(serving.close)
        first = WorkerProcess(
            0,
            settings.server.workers,
            0,
            secrets.token_hex(2),
            folder,
            addresses,
            control=-1,
            metrics="" if serving is None else serving.address,
            health=health,
        )
        table = first.limits_table()
        stack.callback(table.close)
        return asyncio.run(_Parent(arguments, first, metrics, table, probes).run())


def _reserved(address: str, remedy: str, stack: contextlib.ExitStack) -> str:
    """`_reserve` an address, with an error that names it and ends with a remedy."""
    try:
        return _reserve(address, stack)
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror or error}; {remedy}") from error


def _reserve(address: str, stack: contextlib.ExitStack) -> str:
    """Bind an address without listening, until the stack is closed: no other process can use it, except the workers.

    Returns:
        The address with its port.

    Raises:
        OSError: It is in use, or does not belong to this machine.
    """
    host, _, given = address.rpartition(":")
    port = int(given)
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    absent: list[OSError] = []
    for family, kind, protocol, _, place in found:
        try:
            held = stack.enter_context(socket.socket(family, kind, protocol))
            if family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            port = _bind(held, (place[0], port, *place[2:]))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            absent.append(error)  # such as IPv6 of localhost, without which gRPC serves too
    if len(absent) == len(found):
        raise absent[0]
    return f"{host}:{port}"


def _bind(held: socket.socket, place: Any) -> int:  # noqa: ANN401 (as the family has it)
    """Bind a socket to a place that no other socket uses; return the port."""
    try:
        held.bind(place)
    except OSError:
        # Connections of an earlier process may still be closing. With this option, only a listening socket is an obstacle.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(place)
    # Set after the binding, which therefore required a free port. Now sockets of the same user with this option may share it.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port: int = held.getsockname()[1]
    return port


class _Worker:
    """A worker that was started.

    Attributes:
        place: Which worker it is.
        process: Its process.
        problems: Why it cannot serve, as it reported it.
        may_serve: Whether it was permitted to listen on the public addresses.
        must_reload: Whether a reload was requested before it served.
        since: The time of its start, or of a failed attempt to replace it.
    """

    def __init__(
        self,
        place: WorkerProcess,
        process: asyncio.subprocess.Process,
        reports: asyncio.StreamReader,
        control: asyncio.StreamWriter,
    ) -> None:
        self.place = place
        self.process = process
        self.problems: list[str] = []
        self.may_serve = False
        self.must_reload = False
        self.since = time.monotonic()
        self._reports = reports
        self._control = control
        self._has_served = False
        self._watching: asyncio.Task[None] | None = None

    async def reported(self, state: str) -> bool:
        """Wait until it reports a state; return false if it ends instead."""
        with contextlib.suppress(OSError):
            while line := await self._reports.readline():
                report = json.loads(line)
                self.problems = report.get("problems", [])
                if state in report:
                    return True
        return False

    async def serve(self) -> bool:
        """Permit it to listen on the public addresses, and wait until it serves; return false if it ends instead."""
        self.may_serve = True
        self._control.write(b"\n")
        self._has_served = await self.reported("serving")
        if self._has_served:
            self._watching = asyncio.create_task(self._watch(), name="watch a worker")
            if self.must_reload:
                self.signal(signals.RELOAD)
        return self._has_served

    async def _watch(self) -> None:
        """Kill it if its event loop hangs: the kernel would go on to assign connections to it, and no call be answered."""
        silent = 0
        with contextlib.suppress(OSError):
            while silent < MAX_SILENCES:
                try:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        if not await self._reports.readline():
                            return
                    silent = 0
                except TimeoutError:
                    silent += 1
            _log.error("worker hangs", worker=self.place.number, pid=self.process.pid)
            self.signal(signal.SIGKILL)

    @property
    def serves(self) -> bool:
        """Whether it has served and has not ended."""
        return self._has_served and self.process.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal. No effect if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def ended(self) -> float:
        """Wait for its end; return the seconds since its start."""
        await self.process.wait()
        self._control.close()
        return time.monotonic() - self.since


class _Parent:
    """Runs the workers.

    Args:
        arguments: Their command line.
        first: Worker 0, from which the others differ only by their numbers.
        metrics: Their metrics.
        table: What their callers use.
        probes: For the listener of the metrics: the gateway is ready while a worker serves.
    """

    def __init__(
        self, arguments: Sequence[str], first: WorkerProcess, metrics: WorkerMetrics, table: Table, probes: Probes
    ) -> None:
        probes.is_ready = self._is_ready
        self._probes = probes
        self._arguments = arguments
        self._first = first
        self._metrics = metrics
        self._table = table
        self._workers: list[_Worker] = []
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Run them until a signal stops them; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in signals.STOP:
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signals.RELOAD, self._reload)
        if set(signals.STOP) & set(signals.take_recorded()):
            _log.info("stopped before serving")
            return 0
        try:
            status = await self._start_all()
            if status == 0:
                beating = asyncio.create_task(self._beat())
                await asyncio.gather(*map(self._keep, self._workers))
                beating.cancel()
        finally:
            for worker in self._workers:
                if worker.process.returncode is None:
                    worker.signal(signal.SIGKILL)
                    await worker.ended()
        if status == 0:
            _log.info("stopped")
        return status

    async def _start_all(self) -> int:
        """Start all workers. Worker 0 serves last, because the line that it logs means that the gateway serves.

        Returns:
            0 if they serve, or were stopped; otherwise the exit status of one that cannot serve, after its problems are printed.
        """
        for number in range(self._first.count):
            self._workers.append(await self._start(number))
        for worker in self._workers:
            if not await worker.reported("ready"):
                return await self._failed(worker)
        for worker in reversed(self._workers):
            if self._stopping.is_set() or not await worker.serve():
                return await self._failed(worker)
        return 0

    def _is_ready(self) -> bool:
        return not self._stopping.is_set() and any(worker.serves for worker in self._workers)

    async def _beat(self) -> None:
        while True:
            self._probes.beat()
            await asyncio.sleep(BEAT_SECONDS)

    async def _failed(self, worker: _Worker) -> int:
        if self._stopping.is_set():
            return 0
        await worker.ended()
        for problem in worker.problems:
            print(f"deltawire-server: {problem}", file=sys.stderr)
        return max(1, worker.process.returncode or 0)  # negative for a signal

    async def _keep(self, worker: _Worker) -> None:
        """Start a worker again each time it ends, until the gateway is stopped."""
        number = worker.place.number
        delay = FIRST_DELAY
        while True:
            if await worker.ended() >= STABLE_SECONDS:
                delay = FIRST_DELAY
            self._metrics.ended(worker.process.pid, unexpectedly=not self._stopping.is_set())
            self._table.clear(number)
            if self._stopping.is_set():
                return
            _log.warning(
                "worker ended",
                worker=number,
                pid=worker.process.pid,
                status=worker.process.returncode,
                problems=worker.problems,
                restart_seconds=delay,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()
                    return
            delay = min(2 * delay, MAX_DELAY)
            try:
                worker = self._workers[number] = await self._start(number, worker.place.incarnation + 1)
            except OSError as error:
                worker.problems, worker.since = [f"no process can be started: {error}"], time.monotonic()
                continue
            if await worker.reported("ready"):
                await worker.serve()

    async def _start(self, number: int, incarnation: int = 0) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            place = replace(self._first, number=number, incarnation=incarnation, control=theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "deltawire_server", *self._arguments),
                env={**os.environ, **place.variables()},
                pass_fds=[theirs.fileno()],
                # A terminal sends its signals to all processes of a group, and workers get them from here.
                start_new_session=True,
            )
            undo.pop_all()
        worker = _Worker(place, process, *await asyncio.open_connection(sock=ours, limit=MAX_REPORT))
        if self._stopping.is_set():
            worker.signal(signal.SIGKILL)
        return worker

    def _stop(self) -> None:
        """Let all workers drain; the second time, they end at once. One that does not serve yet has no calls and is killed."""
        self._stopping.set()
        for worker in self._workers:
            worker.signal(signal.SIGTERM if worker.may_serve else signal.SIGKILL)

    def _reload(self) -> None:
        """Let all workers read the settings again; one that does not serve yet does so when it serves."""
        for worker in self._workers:
            if worker.may_serve:
                worker.signal(signals.RELOAD)
            else:
                worker.must_reload = True
