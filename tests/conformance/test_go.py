"""The Go client's conformance program against a scripted gateway."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from deltawire import user
from deltawire.v1 import chat_completion_pb2 as chat
from tests.client import scripted
from tests.client.scripted import WAIT, Fail, Gateway
from tests.polyglot.programs import LIMIT, PROTOS
from tests.polyglot.stubs import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.polyglot

FOLDER = Path(__file__).parent
CLIENT = FOLDER / "clients" / "go"
LOST = Fail(grpc.StatusCode.INTERNAL, trailers=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program is built, with the descriptors of the protocol."""
    folder = tmp_path_factory.mktemp("go")
    built = subprocess.run([CLIENT / "build.sh", folder], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    output = f"--descriptor_set_out={folder / 'conformance.binpb'}"
    subprocess.run(["protoc", f"-I{PROTOS}", f"-I{FOLDER}", output, FOLDER / "conformance.proto"], check=True)
    return folder


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A scripted gateway."""
    with scripted.serve() as gateway:
        yield gateway


def reported(folder: Path, gateway: Gateway, *cases: dict[str, Any]) -> list[Any]:
    """What the program reports of these cases, one after the other. It exits with 0 and writes no error."""
    (file,) = descriptor_pb2.FileDescriptorSet.FromString((folder / "conformance.binpb").read_bytes()).file
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    case_type, result_type = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in ("ClientCase", "ClientResult")
    )
    sent = [case_type(target=gateway.target, **case).SerializeToString() for case in cases]
    command = (CLIENT / "command").read_text(encoding="utf-8").replace("OUTDIR", str(folder)).splitlines()
    written = b"".join(len(data).to_bytes(4) + data for data in sent)
    done = subprocess.run(command, input=written, capture_output=True, timeout=LIMIT, check=True)
    assert done.stderr == b""
    results, rest = [], done.stdout
    while rest:
        end = 4 + int.from_bytes(rest[:4])
        results.append(result_type.FromString(rest[4:end]))
        rest = rest[end:]
    return results


def stream(cancel: int | None = None, retention: int = 0) -> dict[str, Any]:
    """The case of a stream."""
    request = chat.StreamChatCompletionRequest(chat=chat.ChatRequest(model="llama", messages=[user("hi")]))
    if retention:
        request.options.retention.FromSeconds(retention)
    return {"stream": {"request": request, "cancel_after_events": cancel}}


def test_answers_and_failures(gateway: Gateway, folder: Path) -> None:
    """A whole answer, an interrupted one, a canceled one, and a refusal with its details."""
    events = scripted.saying("Hel", "lo")
    gateway.will(*events)
    gateway.will(*events[:-1])
    gateway.will(*events[:2], WAIT)
    gateway.will(Fail(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", violations=[("chat.messages", "empty")]))
    whole = {"name": "whole", "access_key": "secret"} | stream()
    whole, broken, canceled, refused = reported(folder, gateway, whole, stream(), stream(cancel=2), stream())
    assert (whole.name, whole.answer.completion_id) == ("whole", "cmpl-1")
    assert whole.answer.choices[0].message.text == "Hello"
    assert gateway.calls[0].metadata["authorization"] == "Bearer secret"
    assert (broken.failure.interrupted, broken.failure.partial.choices[0].message.text) == (True, "Hello")
    assert canceled.failure.code == grpc.StatusCode.CANCELLED.value[0]
    assert (refused.failure.code, refused.failure.reason) == (3, "INVALID_REQUEST")
    assert list(refused.failure.fields) == ["chat.messages"]


def test_it_retries_and_resumes(gateway: Gateway, folder: Path) -> None:
    """Before the first event, and after it; a watch folds what comes before and after a lost connection."""
    events = scripted.saying("Hel", "lo ", "you")
    gateway.will(Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_after=0.01))
    gateway.will(*events[:2], LOST)
    gateway.will(*events[1:])  # a replay that begins too early
    one, two = scripted.model("one"), scripted.model("two")
    gateway.will(scripted.changed("ADDED", one), scripted.bookmark("r1"), LOST)
    gateway.will(Fail(grpc.StatusCode.OUT_OF_RANGE, "REVISION_GONE"))
    gateway.will(scripted.changed("ADDED", two), scripted.bookmark("s1"), WAIT)
    answered, watched = reported(folder, gateway, stream(retention=60), {"watch": {"bookmarks": 2}})
    assert answered.answer.choices[0].message.text == "Hello you"
    assert [call.request.WhichOneof("start") for call in gateway.calls[:3]] == ["chat", "chat", "resume"]
    assert gateway.calls[2].request.resume.last_sequence == 1
    assert list(watched.models) == [two]
    assert [call.request.revision for call in gateway.calls[3:]] == ["", "r1", ""]
