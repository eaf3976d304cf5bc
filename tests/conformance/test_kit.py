"""The kit itself: its cases, what it notices of wrong clients, and the table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.conformance import __main__, cases, client_driver, recorded, server_checks, wrong_client
from tests.conformance.cases import group
from tests.conformance.client_driver import ClientError, Outcome
from tests.conformance.conformance_pb2 import ClientResult
from tests.conformance.fold import tidy_result

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot

WRONG = [sys.executable, "-m", "tests.conformance.wrong_client"]


def test_the_cases_are_many_and_have_names_of_their_own() -> None:
    """And each group is there."""
    names = [case.name for case in cases.load()]
    assert len(names) >= 150
    assert len(set(names)) == len(names)
    expected = (
        "cancel deadline fault headers interrupted reasons recordings refused resume retry text tools unknown watch"
    )
    assert sorted({group(name) for name in names}) == expected.split()


def test_the_fold_of_the_deltas_is_what_completed_has() -> None:
    """In every case that has its messages, whoever wrote it: so the expected results are right."""
    compared = 0
    for case in cases.load():
        completed = [
            step.event.completed for call in case.calls for step in call.steps if step.event.HasField("completed")
        ]
        if len(completed) != 1 or completed[0].messages_omitted or not completed[0].choices:
            continue
        expected = case.expected[0]
        answer = expected.answer if expected.HasField("answer") else expected.failure.partial
        stated = ClientResult()
        stated.answer.CopyFrom(answer)
        del stated.answer.choices[:]
        stated.answer.choices.extend(completed[0].choices)
        for ours, theirs in zip(stated.answer.choices, answer.choices, strict=True):
            ours.logprobs.extend(theirs.logprobs)
        assert tidy_result(stated).answer == answer, case.name
        compared += 1
    assert compared > 100


def test_the_page_says_how_many_there_are() -> None:
    """Of cases and of checks; the changelog too."""
    page = (client_driver.ROOT / "tests/conformance/README.md").read_text(encoding="utf-8")
    assert f"by {len(cases.load())} cases" in page
    assert f"server by {len(server_checks.names())} checks" in page
    assert f"by {len(cases.load())} cases" in (client_driver.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("arguments", "said"), [(["--list"], "resume/gone: "), (["--show"], 'name: "resume/gone"')])
def test_cases_can_be_read(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """Without a client."""
    assert __main__.main(["--case", "resume/gone", *arguments]) == 0
    assert said in capsys.readouterr().out


def test_the_table_has_each_group_and_client() -> None:
    """Passed and all; a client without cases of a group has a dash."""
    outcomes = {"go": [Outcome("text/a"), Outcome("text/b", "wrong")], "rust": [Outcome("watch/a")]}
    lines = [line.split() for line in __main__.table(outcomes).splitlines()]
    assert lines == [["go", "rust"], ["text", "1/2", "-"], ["watch", "-", "1/1"], ["all", "1/2", "1/1"]]


def test_a_client_that_cannot_be_built_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the output of its build, and a status that says so."""
    folder = tmp_path / "clients" / "broken"
    folder.mkdir(parents=True)
    (folder / "command").write_text("true\n")
    script = folder / "build.sh"
    script.write_text("#!/bin/sh\necho the compiler is missing >&2; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(client_driver, "CLIENTS", tmp_path / "clients")
    with pytest.raises(ClientError, match=r"status 3:\nthe compiler is missing"):
        client_driver.build("broken", tmp_path)
    assert __main__.main(["--language", "broken", "--case", "text/"]) == 1


@pytest.mark.parametrize(("flaw", "name"), wrong_client.FLAWS.items())
async def test_a_wrong_client_is_noticed(flaw: str, name: str) -> None:
    """Each flaw fails its case, and is told from a client that has none."""
    (case,) = [each for each in cases.load() if each.name == name]
    (outcome, *_) = await client_driver.run(
        [*WRONG, flaw], [case], limit=2.0 if flaw == "hangs" else client_driver.CASE_LIMIT
    )
    assert outcome.case == name
    assert outcome.difference


async def test_the_same_client_without_a_flaw_passes() -> None:
    """So it is the flaw that each of those cases shows."""
    shown = set(wrong_client.FLAWS.values())
    outcomes = await client_driver.run([*WRONG, "none"], [case for case in cases.load() if case.name in shown])
    assert [each for each in outcomes if each.difference] == []
    assert {each.case for each in outcomes} == shown


async def test_the_generated_cases_are_what_the_gateway_sends() -> None:
    """But for how it merges deltas."""
    made = await recorded.record_all()
    assert recorded.stale(recorded.RECORDINGS, made) == []
    assert recorded.stale(recorded.REASONS, recorded.refusals()) == []
