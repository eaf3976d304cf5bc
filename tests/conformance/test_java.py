"""The Java client: its conformance program against a scripted gateway."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from deltawire.v1 import chat_completion_pb2 as chat
from deltawire.v1 import model_registry_pb2 as registry
from deltawire.v1.error_reason_pb2 import ErrorReason
from deltawire.v1.tool_pb2 import ToolCall
from tests.client import scripted
from tests.client.proxy import round_robin
from tests.client.scripted import WAIT, Fail, Gateway, Headers
from tests.polyglot.programs import LIMIT, PROTOS, started

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.polyglot

CLIENT = Path(__file__).parent / "clients" / "java"
STATUS = grpc.StatusCode
LOST = Fail(STATUS.INTERNAL, trailers=())
CALL = ToolCall(call_id="call_0", tool_name="get_weather", arguments='{"city":"Oslo"}')


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The messages of the protocol: case and result."""
    output = tmp_path_factory.mktemp("protocol") / "conformance.binpb"
    source = Path(__file__).with_name("conformance.proto")
    command = ["protoc", f"-I{PROTOS}", f"-I{source.parent}", f"--descriptor_set_out={output}", str(source)]
    subprocess.run(command, check=True)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    # Not the default pool, in which another test may have them.
    pool = descriptor_pool.DescriptorPool()
    for imported in (chat, registry):
        _add(pool, imported.DESCRIPTOR)
    pool.AddSerializedFile(file.SerializeToString())
    case, result = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in ("ClientCase", "ClientResult")
    )
    return case, result


def _add(pool: descriptor_pool.DescriptorPool, file: Any) -> None:  # noqa: ANN401
    """Add a file after those that it imports."""
    for imported in file.dependencies:
        _add(pool, imported)
    pool.AddSerializedFile(file.serialized_pb)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The program's command line."""
    folder = tmp_path_factory.mktemp("java")
    built = subprocess.run([CLIENT / "build.sh", folder], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    lines = (CLIENT / "command").read_text(encoding="utf-8").splitlines()
    return [line.replace("OUTDIR", str(folder)) for line in lines]


class Program:
    """The program that runs."""

    def __init__(self, process: Process, messages: tuple[Any, Any], target: str) -> None:
        self._process = process
        self._case, self._result = messages
        self._target = target

    async def does(self, **case: Any) -> Any:  # noqa: ANN401
        """What the client reports of a case."""
        sent = self._case(name="case", target=case.pop("target", self._target), **case).SerializeToString()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(len(sent).to_bytes(4) + sent)
        async with asyncio.timeout(LIMIT):
            length = await self._process.stdout.readexactly(4)
            result = self._result.FromString(await self._process.stdout.readexactly(int.from_bytes(length)))
        assert result.name == "case"
        return result

    async def asks(self, retention: int = 0, cancel: int | None = None, **case: Any) -> Any:  # noqa: ANN401
        """What the client reports of a stream."""
        request: dict[str, Any] = {"chat": {"model": "llama", "messages": [{"user": {"text": "hi"}}]}}
        if retention:
            request["options"] = {"retention": {"seconds": retention}}
        return await self.does(stream={"request": request, "cancel_after_events": cancel}, **case)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A scripted gateway."""
    with scripted.serve() as gateway:
        yield gateway


@pytest.fixture
async def program(
    command: list[str], messages: tuple[Any, Any], gateway: Gateway, tmp_path: Path
) -> AsyncIterator[Program]:
    """The program, for calls to that gateway. It exits with 0 at the end of its input."""
    async with started(*command, home=tmp_path, stdin=asyncio.subprocess.PIPE) as process:
        yield Program(process, messages, gateway.target)
        assert process.stdin
        process.stdin.close()
        async with asyncio.timeout(LIMIT):
            assert await process.wait() == 0


async def test_the_events_are_folded(gateway: Gateway, program: Program) -> None:
    """Two choices; an event of a later version is skipped. Without `completed` it is not an answer, and no call may run."""
    later = chat.StreamChatCompletionResponse.FromString(b"\xc2\x3e\x02\x08\x01")
    events = scripted.numbered(
        scripted.heartbeat(),
        scripted.started("mine"),
        scripted.text("Hel"),
        later,
        scripted.text("Ja", choice=1),
        scripted.text("lo"),
        scripted.called(CALL),
        scripted.finished(reason="END_OF_MESSAGE", tool_calls_executable=True),
        scripted.finished(1),
        scripted.completed(
            scripted.choice(reason="END_OF_MESSAGE", tool_calls_executable=True),
            scripted.choice(1),
            messages_omitted=True,
        ),
    )
    gateway.will(*events)
    answer = (await program.asks(access_key="secret")).answer
    assert (answer.completion_id, [each.message.text for each in answer.choices]) == ("mine", ["Hello", "Ja"])
    assert answer.choices[0].tool_calls_executable
    assert gateway.last.metadata["authorization"] == "Bearer secret"
    gateway.will(*events[:-1])
    failure = (await program.asks()).failure
    assert (failure.code, failure.interrupted, failure.partial.choices[0].message.text) == (2, True, "Hello")
    assert not failure.partial.choices[0].tool_calls_executable
    gateway.will(events[0], events[2])
    assert (await program.asks()).failure.code == 13  # an event is missing


async def test_failures(gateway: Gateway, program: Program) -> None:
    """A fault wins over a replaced status; a refusal has its details; a passing failure is retried after its delay."""
    fault = chat.Completed.Error(code=10, reason=ErrorReason.ERROR_REASON_UPSTREAM_ABORTED, message="aborted")
    gateway.will(*scripted.numbered(scripted.started(), scripted.completed(error=fault)), LOST)
    failure = (await program.asks()).failure
    assert (failure.code, failure.reason, failure.interrupted) == (10, "UPSTREAM_ABORTED", False)
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", violations=[("chat.messages", "empty")]))
    failure = (await program.asks()).failure
    assert (failure.code, failure.reason, list(failure.fields)) == (3, "INVALID_REQUEST", ["chat.messages"])
    full = Fail(STATUS.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_after=0.01)
    gateway.calls.clear()
    gateway.will(Fail(STATUS.UNAVAILABLE, trailers=()))
    gateway.will(full)
    gateway.will(*scripted.saying("Hello"))
    assert (await program.asks()).answer.choices[0].message.text == "Hello"
    for _ in range(4):
        gateway.will(full)
    failure = (await program.asks()).failure
    assert (failure.reason, failure.retry_delay.ToMilliseconds()) == ("TOO_MANY_STREAMS", 10)
    gateway.will(Fail(STATUS.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", "-1"),)))
    assert (await program.asks()).failure.code == 14
    gateway.will(Fail(STATUS.UNAVAILABLE, "DRAINING", retry_after=3600))
    assert (await program.asks(timeout={"seconds": 60})).failure.retry_delay.seconds == 3600
    assert len(gateway.calls) == 3 + 4 + 1 + 1


async def test_deadline_and_cancel_reach_the_gateway(gateway: Gateway, program: Program) -> None:
    """What had arrived is reported."""
    for case, code in ({"timeout": {"seconds": 2}}, 4), ({"cancel": 2}, 1):
        gateway.will(*scripted.saying("Hello")[:2], WAIT)
        failure = (await program.asks(**case)).failure
        assert (failure.code, failure.interrupted) == (code, False)
        assert failure.partial.choices[0].message.text == "Hello"
        assert await asyncio.to_thread(gateway.last.ended.wait, LIMIT)


async def test_a_retained_stream_resumes(gateway: Gateway, program: Program) -> None:
    """After a replay that ends early, and on new connections until one reaches the process that has the completion."""
    events = scripted.saying("Hel", "lo ", "you")
    with round_robin(gateway.target) as proxy:
        gateway.will(Headers((("x-deltawire-gateway", "one"),)), *events[:2], LOST)
        gateway.will(*events[1:3])
        gateway.will(Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA"))
        gateway.will(Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND"))
        gateway.will(*events[3:])
        answer = (await program.asks(retention=60, target=proxy.target)).answer
        assert proxy.made == 3
    assert answer.choices[0].message.text == "Hello you"
    first, *others = [call.request for call in gateway.calls]
    assert first.chat.completion_id.startswith("own-")
    assert [each.resume.last_sequence for each in others] == [1, 2, 2, 2]
    assert [call.metadata.get("x-deltawire-gateway") for call in gateway.calls] == [None, "one", None, None, None]
    routes = [call.metadata["x-deltawire-route"] for call in gateway.calls]
    assert routes == [first.chat.completion_id, *("cmpl-1" + moved for moved in ("", "", "#1", "#2"))]


async def test_a_stream_whose_beginning_was_lost(gateway: Gateway, program: Program) -> None:
    """It is resumed; if there is no such completion it is started again, and what exists already is its own."""
    gateway.will(LOST)
    gateway.will(Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND"))
    gateway.will(Fail(STATUS.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS"))
    gateway.will(*scripted.saying("Hello"))
    assert (await program.asks(retention=60)).answer.choices[0].message.text == "Hello"
    assert [call.request.WhichOneof("start") for call in gateway.calls] == ["chat", "resume", "chat", "resume"]


async def test_a_watch_folds_and_resumes(gateway: Gateway, program: Program) -> None:
    """Snapshot, changes, a lost connection, and a revision that is gone: then only the differences count."""
    one, two, three = (scripted.model(name) for name in ("one", "two", "three"))
    batch = registry.WatchModelsResponse(change=registry.WatchModelsResponse.CHANGE_ADDED, models=[one, two])
    gateway.will(batch, scripted.bookmark("r1"), scripted.changed("ADDED", three, "r2"), LOST)
    gateway.will(Fail(STATUS.OUT_OF_RANGE, "REVISION_GONE"))
    gateway.will(scripted.changed("ADDED", scripted.model("two", aliases=["zwei"])), scripted.bookmark("s1"), WAIT)
    models = (await program.does(watch={"bookmarks": 2})).models
    assert [(each.id, list(each.aliases)) for each in models] == [("two", ["zwei"])]
    requests = [(call.request.revision, call.request.batch_snapshot) for call in gateway.calls]
    assert requests == [("", True), ("r2", False), ("", True)]
    gateway.will(Fail(STATUS.OUT_OF_RANGE, "REVISION_GONE"))
    failure = (await program.does(watch={"request": {"revision": "r9"}, "bookmarks": 1})).failure
    assert failure.reason == "REVISION_GONE"
