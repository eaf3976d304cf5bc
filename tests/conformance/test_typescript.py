"""The TypeScript client: its conformance program against a scripted gateway."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from deltawire import user
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

CLIENT = Path(__file__).parent / "clients" / "typescript"
STATUS = grpc.StatusCode
LOST = Fail(STATUS.INTERNAL, trailers=())
MISSING = Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND")
ELSEWHERE = Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA")
GONE = Fail(STATUS.OUT_OF_RANGE, "REVISION_GONE")
CALL = ToolCall(call_id="call_0", tool_name="get_weather", arguments='{"city":"Oslo"}')


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The messages of the protocol, by name."""
    output = tmp_path_factory.mktemp("protocol") / "conformance.binpb"
    source = Path(__file__).with_name("conformance.proto")
    command = ["protoc", f"-I{PROTOS}", f"-I{source.parent}", f"--descriptor_set_out={output}", str(source)]
    subprocess.run(command, check=True)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    names = [f"{file.package}.{name}" for name in ("ClientCase", "ClientResult")]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The program's command line."""
    folder = tmp_path_factory.mktemp("typescript")
    built = subprocess.run([CLIENT / "build.sh", folder], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    lines = (CLIENT / "command").read_text(encoding="utf-8").splitlines()
    return [line.replace("OUTDIR", str(folder)) for line in lines]


class Program:
    """The program that runs."""

    def __init__(self, process: Process, messages: dict[str, Any], target: str) -> None:
        self._process = process
        self._case, self._result = messages.values()
        self._target = target

    async def does(self, **case: Any) -> Any:  # noqa: ANN401
        """What the client reports of a case."""
        sent = self._case(**({"name": "case", "target": self._target} | case)).SerializeToString()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(len(sent).to_bytes(4) + sent)
        async with asyncio.timeout(LIMIT):
            length = await self._process.stdout.readexactly(4)
            result = self._result.FromString(await self._process.stdout.readexactly(int.from_bytes(length)))
        assert result.name == "case"
        return result

    async def asks(self, retention: float = 0, completion_id: str = "", cancel: int | None = None, **case: Any) -> Any:  # noqa: ANN401
        """What the client reports of a stream."""
        request = chat.StreamChatCompletionRequest(
            chat=chat.ChatRequest(model="llama", messages=[user("hi")], completion_id=completion_id)
        )
        if retention:
            request.options.retention.FromMilliseconds(int(retention * 1000))
        return await self.does(stream={"request": request, "cancel_after_events": cancel}, **case)

    async def watches(self, revision: str = "", bookmarks: int = 1) -> Any:  # noqa: ANN401
        """What the client reports of a watch."""
        request = registry.WatchModelsRequest(revision=revision)
        return await self.does(watch={"request": request, "bookmarks": bookmarks})


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A scripted gateway."""
    with scripted.serve() as gateway:
        yield gateway


@pytest.fixture
async def program(
    command: list[str], messages: dict[str, Any], gateway: Gateway, tmp_path: Path
) -> AsyncIterator[Program]:
    """The program, for calls to that gateway. It exits with 0 and has written no error."""
    async with started(*command, home=tmp_path, stdin=asyncio.subprocess.PIPE) as process:
        yield Program(process, messages, gateway.target)
        assert process.stdin
        assert process.stderr
        process.stdin.close()
        async with asyncio.timeout(LIMIT):
            assert (await process.stderr.read()).decode() == ""
            assert await process.wait() == 0


def unknown() -> chat.StreamChatCompletionResponse:
    """An event of a later version: field 1000, which is a message."""
    return chat.StreamChatCompletionResponse.FromString(b"\xc2\x3e\x02\x08\x01")


async def test_the_events_are_folded(gateway: Gateway, program: Program) -> None:
    """Text, reasoning, log-probabilities, calls, notices and usage of two choices; what is of a later version is skipped."""
    token = chat.TokenLogprob(token="Hel", logprob=-0.5, raw_bytes=b"Hel")
    late = scripted.finished(1, matched_stop="END")
    late.choice_finished.stop_reason = 99  # type: ignore[assignment]
    gateway.will(
        *scripted.numbered(
            scripted.started("mine"),
            scripted.heartbeat(),
            scripted.reasoning("hm"),
            scripted.text("Hel", logprobs=[token]),
            unknown(),
            scripted.text("Ja", choice=1),
            scripted.text("lo"),
            scripted.notice("another replica"),
            scripted.used(3),
            scripted.call_piece(fragment='{"ci'),
            scripted.called(CALL),
            scripted.call_failed("get_time", "{", index=1),
            scripted.finished(reason="END_OF_MESSAGE", engine_finish_reason="tool_calls"),
            late,
            scripted.completed(messages_omitted=True),
        )
    )
    answer = (await program.asks(access_key="secret")).answer
    first, second = answer.choices
    assert (answer.completion_id, answer.model, answer.usage.completion_tokens) == ("mine", "llama", 5)
    assert (first.message.text, first.message.reasoning, list(first.message.tool_calls)) == ("Hello", "hm", [CALL])
    assert (first.engine_finish_reason, list(first.logprobs)) == ("tool_calls", [token])
    assert [each.failure.raw_arguments for each in first.failed_tool_calls] == ["{"]
    assert (second.index, second.message.text, second.stop_reason, second.matched_stop) == (1, "Ja", 99, "END")
    assert [each.message for each in answer.notices] == ["another replica"]
    assert gateway.last.metadata["authorization"] == "Bearer secret"
    assert len(gateway.last.metadata["x-request-id"]) == 32


async def test_calls_may_be_run_only_if_all_went_well(gateway: Gateway, program: Program) -> None:
    """`tool_calls_executable` of an answer without `completed` is false."""
    events = scripted.calling(CALL)
    gateway.will(*events)
    assert (await program.asks()).answer.choices[0].tool_calls_executable
    gateway.will(*events[:-1])
    (choice,) = (await program.asks()).failure.partial.choices
    assert list(choice.message.tool_calls) == [CALL]
    assert not choice.tool_calls_executable


async def test_a_stream_that_stops_is_interrupted(gateway: Gateway, program: Program) -> None:
    """With status OK, or with any other; what had arrived is there."""
    events = scripted.saying("Hel", "lo")
    for end, code in ([], 2), ([Fail(STATUS.UNAVAILABLE, trailers=())], 14):
        gateway.will(*events[:-1], *end)
        failure = (await program.asks()).failure
        assert (failure.code, failure.interrupted) == (code, True)
        assert failure.partial.choices[0].message.text == "Hello"
    gateway.will(events[0], events[2])
    assert (await program.asks()).failure.code == 13  # an event is missing


async def test_the_fault_is_that_of_completed(gateway: Gateway, program: Program) -> None:
    """A proxy has replaced the status, or dropped it."""
    fault = chat.Completed.Error(code=10, reason=ErrorReason.ERROR_REASON_UPSTREAM_ABORTED, message="aborted")
    events = scripted.numbered(scripted.started(), scripted.text("Hel"), scripted.completed(error=fault))
    for end in ([LOST], []):
        gateway.will(*events, *end)
        failure = (await program.asks()).failure
        assert (failure.code, failure.reason, failure.interrupted) == (10, "UPSTREAM_ABORTED", False)
        assert failure.partial.choices[0].message.text == "Hel"


async def test_a_refusal_has_its_details(gateway: Gateway, program: Program) -> None:
    """Reason and fields; and the reason without details."""
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", violations=[("chat.messages", "empty")]))
    failure = (await program.asks()).failure
    assert (failure.code, failure.reason, list(failure.fields)) == (3, "INVALID_REQUEST", ["chat.messages"])
    gateway.will(Fail(STATUS.NOT_FOUND, trailers=(("deltawire-reason", "MODEL_NOT_FOUND"),)))
    assert (await program.asks()).failure.reason == "MODEL_NOT_FOUND"
    assert len(gateway.calls) == 2


async def test_passing_failures_are_retried(gateway: Gateway, program: Program) -> None:
    """Before the first event: UNAVAILABLE, and RESOURCE_EXHAUSTED that names a delay; four attempts, unless it is forbidden."""
    events = scripted.saying("Hello")
    full = Fail(STATUS.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_after=0.01)
    gateway.will(Fail(STATUS.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"))
    gateway.will(full)
    gateway.will(*events)
    assert (await program.asks()).answer.choices[0].message.text == "Hello"
    for _ in range(4):
        gateway.will(full)
    failure = (await program.asks()).failure
    assert (failure.reason, failure.retry_delay.ToMilliseconds()) == ("TOO_MANY_STREAMS", 10)
    gateway.will(Fail(STATUS.RESOURCE_EXHAUSTED, "REGISTRY_FULL"))
    assert (await program.asks()).failure.code == 8
    gateway.will(Fail(STATUS.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", "-1"),)))
    assert (await program.asks()).failure.code == 14
    assert len(gateway.calls) == 3 + 4 + 1 + 1
    ids = [call.metadata["x-request-id"] for call in gateway.calls]
    assert len(set(ids[:3])) == 1


async def test_a_deadline_covers_the_retries(gateway: Gateway, program: Program) -> None:
    """In a call, and in the pause before the next one."""
    gateway.will(scripted.started(), WAIT)
    failure = (await program.asks(timeout={"nanos": 500_000_000})).failure
    assert (failure.code, failure.interrupted, failure.partial.completion_id) == (4, False, "cmpl-1")
    assert await asyncio.to_thread(gateway.last.ended.wait, LIMIT)
    gateway.will(Fail(STATUS.UNAVAILABLE, "DRAINING", retry_after=3600))
    assert (await program.asks(timeout={"nanos": 100_000_000})).failure.code == 4


async def test_a_cancel_reaches_the_gateway(gateway: Gateway, program: Program) -> None:
    """And the client reports it as such."""
    gateway.will(*scripted.saying("Hello")[:2], WAIT)
    failure = (await program.asks(cancel=2)).failure
    assert (failure.code, failure.interrupted) == (1, False)
    assert failure.partial.choices[0].message.text == "Hello"
    assert await asyncio.to_thread(gateway.last.ended.wait, LIMIT)


async def test_a_retained_stream_resumes(gateway: Gateway, program: Program) -> None:
    """After lost connections and a replay: nothing is lost or doubled."""
    events = scripted.saying("Hel", "lo ", "you")
    gateway.will(*events[:2], LOST)
    gateway.will(*events[1:3])  # a replay that begins too early, and ends too early
    gateway.will(Fail(STATUS.RESOURCE_EXHAUSTED, "CALLER_LIMIT_EXCEEDED"))
    gateway.will(*events[3:])
    answer = (await program.asks(retention=60)).answer
    assert answer.choices[0].message.text == "Hello you"
    first, *others = [call.request for call in gateway.calls]
    assert first.chat.completion_id.startswith("own-")
    assert [each.resume.last_sequence for each in others] == [1, 2, 2]
    assert {each.resume.completion_id for each in others} == {first.chat.completion_id}


async def test_a_stream_whose_beginning_was_lost(gateway: Gateway, program: Program) -> None:
    """It is resumed; if there is no such completion it is started again, and what exists already is its own."""
    gateway.will(LOST)
    gateway.will(MISSING)
    gateway.will(Fail(STATUS.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS"))
    gateway.will(*scripted.saying("Hello"))
    assert (await program.asks(retention=60)).answer.choices[0].message.text == "Hello"
    assert [call.request.WhichOneof("start") for call in gateway.calls] == ["chat", "resume", "chat", "resume"]
    gateway.will(MISSING)
    assert (await program.asks()).failure.code == 5


async def test_a_connection_that_breaks(gateway: Gateway, program: Program) -> None:
    """A closed socket. How much had arrived is not known here, so everything is replayed."""
    events = scripted.saying("Hel", "lo ", "you")
    with round_robin(gateway.target) as proxy:
        gateway.will(*events[:3], proxy.cut)
        gateway.will(*events)
        answer = (await program.asks(retention=60, target=proxy.target)).answer
    assert answer.choices[0].message.text == "Hello you"
    assert [call.request.WhichOneof("start") for call in gateway.calls] == ["chat", "resume"]


async def test_a_completion_of_another_process(gateway: Gateway, program: Program) -> None:
    """New connections, and routes for a proxy, until one leads there. The proxy's own header is sent back."""
    events = scripted.saying("Hel", "lo")
    with round_robin(gateway.target) as proxy:
        gateway.will(Headers((("x-deltawire-gateway", "one"),)), *events[:2], LOST)
        gateway.will(ELSEWHERE)
        gateway.will(MISSING)
        gateway.will(*events[2:])
        answer = (await program.asks(retention=60, completion_id="mine", target=proxy.target)).answer
        assert answer.choices[0].message.text == "Hello"
        routes = [call.metadata.get("x-deltawire-route") for call in gateway.calls]
        assert routes == ["mine", "cmpl-1", "cmpl-1#1", "cmpl-1#2"]
        gateways = [call.metadata.get("x-deltawire-gateway") for call in gateway.calls]
        assert gateways == [None, "one", None, None]
        assert proxy.made == 3


async def test_a_watch_folds_and_resumes(gateway: Gateway, program: Program) -> None:
    """Snapshot, changes, a lost connection, and a revision that is gone: then only the differences count."""
    one, two, three = (scripted.model(name) for name in ("one", "two", "three"))
    batch = registry.WatchModelsResponse(change=registry.WatchModelsResponse.CHANGE_ADDED, models=[one, two])
    gateway.will(batch, scripted.bookmark("r1"), scripted.changed("ADDED", three, "r2"), LOST)
    gateway.will(GONE)
    gateway.will(scripted.changed("ADDED", scripted.model("two", aliases=["zwei"])), scripted.bookmark("s1"), WAIT)
    models = (await program.watches(bookmarks=2)).models
    assert [(each.id, list(each.aliases)) for each in models] == [("two", ["zwei"])]
    requests = [(call.request.revision, call.request.batch_snapshot) for call in gateway.calls]
    assert requests == [("", True), ("r2", False), ("", True)]
    gateway.will(Fail(STATUS.PERMISSION_DENIED, "PERMISSION_DENIED"))
    assert (await program.watches()).failure.code == 7
