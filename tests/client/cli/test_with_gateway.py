"""The command and the gateway itself: what people type, what they see, and the exit status that scripts see."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Protocol

import pytest

from deltawire._cli import main

if TYPE_CHECKING:
    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import StartGateway
    from tests.support.gateway import Lines, Running

READER, WRITER = "secret-of-the-reader", "secret-of-the-writer"
ACCESS = {"keys": f"reader read {READER}; writer change,read {WRITER}"}


class Command(Protocol):
    """Runs the command against a gateway: its exit status, standard output, standard error."""

    async def __call__(self, gateway: Running, *arguments: str) -> tuple[int, str, str]: ...


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """In a thread, since the gateway is in this one."""

    async def run(gateway: Running, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what the gateway has logged
        status = await asyncio.to_thread(main, (*arguments, "--target", gateway.address))
        out, errors = capsys.readouterr()
        return status, out, errors

    return run


@pytest.fixture(autouse=True)
def quiet(lines: Lines) -> None:
    """The gateway's log is kept from standard output, which is the command's here."""


async def test_update(served: Running, command: Command) -> None:
    """What is given is changed and the rest stays; an etag that is old is refused, with the one that it is now."""
    arguments = ("--provider-model", "fake", "--alias", "a", "--annotation", "k=v", "--json")
    status, out, _ = await command(served, "models", "register", "mine", *arguments)
    before = json.loads(out)
    status, out, _ = await command(served, "models", "update", "a", "--alias", "b", "--etag", before["etag"], "--json")
    after = json.loads(out)
    assert (status, after["id"], after["aliases"], after["annotations"]) == (0, "mine", ["b"], {"k": "v"})
    for change in (("update", "b", "--no-annotations"), ("unregister", "b")):
        status, out, errors = await command(served, "models", *change, "--etag", before["etag"])
        assert (status, out) == (1, "")
        assert "ETAG_MISMATCH" in errors
        assert after["etag"] in errors
    status, out, _ = await command(served, "models", "update", "b", "--type", "embedding", "--embedding-dimension", "8")
    assert (status, "type:        embedding\ndimension:   8\n" in out) == (0, True)
    # Other types have no dimension, so it goes with the old one.
    status, out, _ = await command(served, "models", "update", "b", "--type", "llm", "--no-aliases", "--no-annotations")
    assert status == 0
    assert not {"dimension", "aliases", "annotations"} & {line.partition(":")[0] for line in out.splitlines()}
    status, out, _ = await command(served, "models", "unregister", "mine")
    assert (status, out) == (0, "mine is no longer registered\n")


async def test_filters_and_refresh(served: Running, vllm: FakeVllm, command: Command) -> None:
    """What is down is told on standard error, and by the status of a refresh."""
    await command(served, "models", "register", "mine", "--provider-model", "fake", "--type", "rerank")

    async def listed(*filters: str) -> list[str]:
        status, out, _ = await command(served, "models", "list", "--json", *filters)
        assert status == 0
        return [json.loads(line)["id"] for line in out.splitlines()]

    assert await listed("--type", "rerank", "--state", "serving", "--source", "registered") == ["mine"]
    assert await listed("--type", "llm") == []
    status, out, errors = await command(served, "models", "list", "--provider", "nope")
    assert (status, out, errors) == (1, "", "error: there is no provider nope; there are: vllm\n")
    assert await command(served, "models", "refresh") == (0, "PROVIDER  MODELS\nvllm      1\n", "")
    await vllm.crash()
    status, out, errors = await command(served, "models", "refresh", "vllm")
    assert (status, out) == (1, "PROVIDER  MODELS\nvllm      -\n")
    assert errors.startswith("error: vllm could not be listed: ")
    status, out, errors = await command(served, "models", "list", "--state", "unavailable")
    assert (status, out.splitlines()[1].split()[:3]) == (0, ["mine", "rerank", "unavailable"])
    assert errors == "note: no answer from vllm: models are shown as they were, and new ones not at all\n"
    status, _, errors = await command(served, "models", "refresh", "nobody")
    assert (status, "PROVIDER_NOT_FOUND" in errors) == (1, True)


async def test_watch(served: Running, command: Command) -> None:
    """Until its timeout; a revision of a gateway that is no more ends it, since nobody has said what was known then."""
    await command(served, "models", "register", "mine", "--provider-model", "fake")
    status, out, errors = await command(served, "models", "watch", "--timeout", "0.5")
    assert [line.split()[:2] for line in out.splitlines()] == [["CHANGE", "ID"], ["ADDED", "mine"]]
    assert (status, errors.startswith("error: DEADLINE_EXCEEDED")) == (1, True)
    status, out, errors = await command(served, "models", "watch", "--revision", "00000000-1")
    assert (status, "REVISION_GONE" in errors) == (1, True)


async def test_completions(served: Running, command: Command) -> None:
    """One is asked for and kept, looked up, read again, cancelled too late; and the tokens of a prompt are counted."""
    asked = ("chat", "--model", "fake", "--retention", "60", "--completion-id", "mine", "--max-tokens", "4")
    status, said, errors = await command(served, *asked, "hi")
    assert (status, errors) == (0, "note: the answer ended with OUT_OF_TOKENS\n")
    status, out, _ = await command(served, "get", "mine")
    assert (status, out.splitlines()[:2]) == (0, ["id:         mine", "state:      completed"])
    assert out.endswith(f"--- choice 0\n{said}")
    status, out, _ = await command(served, "resume", "mine")
    assert (status, out) == (0, said)
    status, events, _ = await command(served, "resume", "mine", "--json")
    status, rest, _ = await command(served, "resume", "mine", "--json", "--after", "1")
    assert rest.splitlines() == events.splitlines()[2:]
    status, out, _ = await command(served, "cancel", "mine")
    assert (status, out.startswith("mine had ended before: completed; ")) == (0, True)
    status, _, errors = await command(served, "cancel", "nobody")
    assert (status, "COMPLETION_NOT_FOUND" in errors) == (1, True)
    status, out, _ = await command(served, "count-tokens", "--model", "fake", "hi")
    assert (status, out.strip().isdigit()) == (0, True)


async def test_keys(start_gateway: StartGateway, command: Command) -> None:
    """Who is not known, and who is but may not, is told so, and what would be needed."""
    register = ("models", "register", "mine", "--provider-model", "fake")
    async with start_gateway(access=ACCESS) as gateway:
        for arguments in (register, ("models", "list"), ("models", "watch")):
            status, _, errors = await command(gateway, *arguments)
            assert (status, errors.startswith("error: UNAUTHENTICATED")) == (1, True)
        status, _, errors = await command(gateway, *register, "--token", READER)
        assert (status, errors.startswith("error: PERMISSION_DENIED")) == (1, True)
        assert READER not in errors
        for arguments in (register, ("models", "update", "mine", "--alias", "a"), ("models", "refresh")):
            status, _, errors = await command(gateway, *arguments, "--token", WRITER)
            assert (status, errors) == (0, "")
        status, out, _ = await command(gateway, "models", "get", "a", "--token", READER)
        assert (status, out.splitlines()[0]) == (0, "id:          mine")
