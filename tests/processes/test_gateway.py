"""A gateway of two worker processes: from one start-up line to the end, whichever process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.completions.records import mark_of
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.processes.worker_process import WorkerProcess
from tests.metrics.scrape import scrape, until_scraped
from tests.metrics.test_listener import status
from tests.support.gateway import WAIT, Running, ask, failure_of, kinds, read_well

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CHUNKS = Chunks()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))


class Workers:
    """A started gateway, and what its processes log."""

    def __init__(self, process: asyncio.subprocess.Process, stack: AsyncExitStack) -> None:
        self.process = process
        self.entries: list[dict[str, Any]] = []
        self._stack = stack
        self._more = asyncio.Event()
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.entries.append(json.loads(line))
            self._more.set()

    async def logged(self, event: str, count: int = 1, **values: object) -> list[dict[str, Any]]:
        """The entries of this event with these values, as soon as there are so many."""
        async with asyncio.timeout(WAIT):
            while len(found := self._entries(event, values)) < count:
                self._more.clear()
                await self._more.wait()
        return found

    def _entries(self, event: str, values: dict[str, object]) -> list[dict[str, Any]]:
        return [e for e in self.entries if e["event"] == event and values.items() <= e.items()]

    async def connected(self) -> list[Running]:
        """A channel to each worker: the kernel chooses one for each connection, and the ids name it."""
        (address,) = (await self.logged("serving"))[0]["addresses"]
        found: dict[int, Running] = {}
        async with asyncio.timeout(WAIT):
            while len(found) < 2:
                options = [("grpc.use_local_subchannel_pool", 1)]
                gateway = Running(None, await self._stack.enter_async_context(aio.insecure_channel(address, options)))  # type: ignore[arg-type]
                with contextlib.suppress(aio.AioRpcError):  # a worker that has just been killed
                    found.setdefault(worker_of((await gateway.create()).started.completion_id), gateway)
        return [found[0], found[1]]

    def pid(self, number: int) -> int:
        """The process of a worker."""
        found: list[int] = []
        for each in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            place = WorkerProcess.taken_from(dict(_variables(int(each))))
            if place is not None and place.number == number:
                found.append(int(each))
        (pid,) = found
        return pid


def _variables(pid: int) -> Iterator[tuple[str, str]]:
    for variable in Path(f"/proc/{pid}/environ").read_text().split("\0"):
        name, _, value = variable.partition("=")
        yield name, value


def worker_of(completion_id: str) -> int:
    """The number of the worker that generated an id."""
    return int(mark_of(completion_id)[4:6], 16)


def command(*arguments: str) -> list[str]:
    """The command of a gateway with two workers."""
    return [sys.executable, "-m", "deltawire_server", "--workers", "2", "--set", "server.drain_delay=0", *arguments]


@asynccontextmanager
async def started(folder: Path, base_url: str, *arguments: str) -> AsyncIterator[Workers]:
    """Run a gateway with two workers."""
    flags = ["--database-url", f"sqlite:///{folder}/registry.db", "--vllm-url", base_url]
    process = await asyncio.create_subprocess_exec(
        *command("--listen", "127.0.0.1:0", *flags, *arguments),
        stderr=asyncio.subprocess.PIPE,
        env={**clean(), "TMPDIR": str(folder)},
    )
    async with AsyncExitStack() as stack:
        workers = Workers(process, stack)
        try:
            async with asyncio.timeout(2 * WAIT):
                yield workers
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # its workers notice
            await process.wait()
            await workers.reading


def private_directories(folder: Path) -> list[Path]:
    """Those that gateways have left."""
    return [*folder.glob("deltawire-*")]


def runs(pid: int) -> bool:
    """Whether a process has not ended."""
    return Path(f"/proc/{pid}/cwd").exists()


def clean() -> dict[str, str]:
    """The environment without the settings of the user who runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DELTAWIRE_", "VLLM_"))}


async def run(*arguments: str) -> tuple[int, list[str]]:
    """The exit status of a gateway with two workers that cannot serve, and what it prints besides its log."""
    process = await asyncio.create_subprocess_exec(*command(*arguments), stderr=asyncio.subprocess.PIPE, env=clean())
    async with asyncio.timeout(WAIT):
        _, output = await process.communicate()
    assert process.returncode is not None
    return process.returncode, [line for line in output.decode().splitlines() if line.startswith("deltawire-server:")]


async def test_health_of_all_workers(vllm: FakeVllm, tmp_path: Path) -> None:
    """A probe reaches one of the workers, as a call does. While one is started again, the other is reached; a drain is seen."""
    async with started(tmp_path, vllm.base_url, "--health-listen", "127.0.0.1:0") as gateway:
        workers = await gateway.connected()
        address = (await gateway.logged("serving"))[0]["health"]

        async def probe() -> int:
            async with aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                return int(response.status)

        assert {await probe() for _ in range(10)} == {SERVING}
        os.kill(gateway.pid(1), signal.SIGKILL)
        await gateway.logged("worker ended")
        assert {await probe() for _ in range(10)} == {SERVING}

        gate = asyncio.Event()
        vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
        stream = aiter(workers[0].stream())
        await anext(stream)
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.logged("draining", worker=0)
        async with asyncio.timeout(WAIT):
            while (status := await probe()) == SERVING:
                pass
        assert status == NOT_SERVING
        taken = ["--listen", "127.0.0.1:0", "--health-listen", address, "--vllm-url", vllm.base_url]
        status, (problem,) = await run(*taken)
        assert (status, "Address already in use; use another address (--health-listen)" in problem) == (1, True)
        gate.set()
        assert kinds([event async for event in stream])[-1] == "completed"


async def test_from_start_to_sigterm(vllm: FakeVllm, tmp_path: Path) -> None:
    """One start-up line, calls at both workers, one registry, a reload of both, no second gateway, and a drain of all calls."""
    file = tmp_path / "deltawire.toml"
    file.write_text("")
    async with started(tmp_path, vllm.base_url, "--config", str(file)) as gateway:
        workers = await gateway.connected()
        await workers[0].models.RegisterModel(
            model_registry_pb2.RegisterModelRequest(
                model_id="mine", provider_id="vllm", provider_model_id="fake", type=model_registry_pb2.MODEL_TYPE_LLM
            )
        )
        async with asyncio.timeout(WAIT):
            while True:
                with contextlib.suppress(aio.AioRpcError):
                    await workers[1].models.GetModel(model_registry_pb2.GetModelRequest(model_id="mine"))
                    break

        gateway.process.send_signal(signal.SIGHUP)
        reloaded = await gateway.logged("settings reloaded", 2)
        assert {entry["worker"] for entry in reloaded} == {0, 1}

        (serving,) = await gateway.logged("serving")
        (address,) = serving["addresses"]
        assert serving["workers"] == 2
        other = [
            "--listen",
            address,
            "--vllm-url",
            vllm.base_url,
            "--database-url",
            f"sqlite:///{tmp_path}/registry.db",
        ]
        for status, (problem,) in await asyncio.gather(run(*other), run(*other, "--workers", "1")):
            assert status == 1
            assert problem == (
                f"deltawire-server: cannot listen on {address}: Address already in use; use another address (--listen)"
            )

        gates = [asyncio.Event() for _ in range(4)]
        streams = []
        for number, gate in enumerate(gates):
            vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
            # Each worker passes some of them on.
            stream = aiter(workers[number % 2].stream(ask(completion_id=f"c{number}")))
            await anext(stream)
            streams.append(stream)
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.logged("draining", 2)
        for gate in gates:
            gate.set()
        for stream in streams:
            assert kinds([event async for event in stream])[-1] == "completed"
        assert await gateway.process.wait() == 0
        await gateway.reading
        assert gateway.entries[-1]["event"] == "stopped"
        assert "worker" not in gateway.entries[-1]
        assert not private_directories(tmp_path)


async def test_a_worker_is_killed_and_then_the_parent(vllm: FakeVllm, tmp_path: Path) -> None:
    """Only its own streams fail, its ids are lost, and another takes its place. Without the parent, all end.

    While the settings file is invalid, the worker is not replaced.
    """
    file = tmp_path / "deltawire.toml"
    file.write_text("")
    async with started(tmp_path, vllm.base_url, "--config", str(file)) as gateway:
        workers = await gateway.connected()
        gate = asyncio.Event()
        streams = []
        for worker in workers:
            vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
            streams.append(aiter(worker.stream(options=KEPT)))
        first = [[await anext(stream), await anext(stream)] for stream in streams]
        ids = [events[0].started.completion_id for events in first]
        assert [*map(worker_of, ids)] == [0, 1]
        assert (await workers[1].look_up(ids[0])).state == chat_pb.COMPLETION_STATE_RUNNING

        file.write_text("nonsense = 1")
        os.kill(gateway.pid(1), signal.SIGKILL)
        with pytest.raises(aio.AioRpcError) as caught:
            await anext(streams[1])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        (killed, refused, *_) = await gateway.logged("worker ended", 2)
        assert (killed["worker"], killed["status"], killed["problems"]) == (1, -signal.SIGKILL, [])
        assert (refused["worker"], refused["status"]) == (1, 2)
        assert "nonsense" in refused["problems"][0]
        assert refused["restart_seconds"] == 2 * killed["restart_seconds"]
        file.write_text("")
        failure = await failure_of(workers[0].look_up(ids[1]))
        assert failure.reason == "COMPLETION_GONE"
        gate.set()
        assert kinds([event async for event in streams[0]])[-1] == "completed"

        await gateway.logged("serving", 2)
        again = await gateway.connected()
        for worker in again:
            failure = await failure_of(worker.look_up(ids[1]))
            assert failure.reason == "COMPLETION_GONE"
            assert (await worker.look_up(ids[0])).state == chat_pb.COMPLETION_STATE_COMPLETED
            assert kinds(await read_well(worker.stream(ask(completion_id="d"))))[-1] == "completed"

        processes = [gateway.pid(number) for number in range(2)]
        gateway.process.kill()
        await gateway.logged("stopped", 2)
        await gateway.reading  # which ends when the last one has closed its output
        assert not any(map(runs, processes))
        assert not private_directories(tmp_path)


async def test_metrics_of_all_workers(vllm: FakeVllm, tmp_path: Path) -> None:
    """One page with their sum. A worker that has ended takes its gauges along, and its counters stay."""

    async def value(name: str, **labels: str) -> float:
        return (await scrape(address)).value(name, **labels)

    calls = {"grpc_method": "CreateChatCompletion", "grpc_code": "OK"}
    async with started(tmp_path, vllm.base_url, "--metrics-listen", "127.0.0.1:0") as gateway:
        workers = await gateway.connected()
        address = (await gateway.logged("serving"))[0]["metrics"]
        before = await value("grpc_server_handled_total", **calls)
        assert before >= 2
        for each in workers:
            await each.create()
        await until_scraped(address, lambda page: page.value("grpc_server_handled_total", **calls) == before + 2)
        await until_scraped(address, lambda page: page.value("deltawire_streams_limit") == 2000)
        os.kill(gateway.pid(1), signal.SIGKILL)
        await gateway.logged("worker ended")
        assert status(address, "/readyz")[0] == 200  # the other one serves
        assert await value("deltawire_worker_ends_total") == 1
        assert await value("grpc_server_handled_total", **calls) == before + 2
        assert await value("deltawire_info") == 1
        await gateway.logged("serving", 2)
        await until_scraped(address, lambda page: page.value("deltawire_streams_limit") == 2000)
        assert "completions" in status(address, "/")[1]
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.logged("draining")
        assert (status(address, "/readyz")[0], status(address, "/livez")[0]) == (503, 200)
        assert await gateway.process.wait() == 0
    assert not private_directories(tmp_path)


async def test_limits_of_callers_count_over_all_workers(vllm: FakeVllm, tmp_path: Path) -> None:
    """A caller has two streams, wherever they run; what a killed worker ran is given back."""
    gate = asyncio.Event()
    async with started(tmp_path, vllm.base_url, "--set", "limits.streams=2") as gateway:
        both = await gateway.connected()
        vllm.play(*[Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()])] * 3)
        calls = [aiter(each.stream()) for each in both]
        for call in calls:
            await anext(call)
        for each in both:
            failure = await failure_of(each.create())
            assert (failure.reason, failure.metadata["value"]) == ("CALLER_LIMIT_EXCEEDED", "2")
        os.kill(gateway.pid(1), signal.SIGKILL)
        await gateway.logged("worker ended")
        another = aiter(both[0].stream())
        await anext(another)
        assert (await failure_of(both[0].create())).reason == "CALLER_LIMIT_EXCEEDED"
        gate.set()
        for call in (calls[0], another):
            assert [event async for event in call]


async def test_what_cannot_serve(tmp_path: Path) -> None:
    """One message for all workers, and the exit status of one process."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    url = f"sqlite:///{tmp_path}"  # a directory
    usual = ["--vllm-url", "http://127.0.0.1:1", "--listen", "127.0.0.1:0"]
    ca = ["--set", f"providers.vllm.tls_verify={file}", "--database-url", f"{url}/registry.db"]
    database, authority = await asyncio.gather(run(*usual, "--database-url", url), run(*usual, *ca))
    assert [status for status, _ in (database, authority)] == [1, 2]
    assert [len(problems) for _, problems in (database, authority)] == [1, 1]
    assert database[1][0].startswith("deltawire-server: cannot use the database")
    assert authority[1][0].startswith(f"deltawire-server: providers.vllm.tls_verify: {file} cannot be used")
