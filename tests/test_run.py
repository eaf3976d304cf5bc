"""The parts of `make run` that need no vLLM."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import run
from tests.support.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stopped(tmp_path: Path) -> GatewayProcess:
    """A gateway that is not running; its log has one line."""
    log = tmp_path / "gateway.log"
    log.write_text("last line\n")
    return GatewayProcess([], {}, log)


def test_a_signal_right_after_the_last_line_is_a_normal_end(
    monkeypatch: pytest.MonkeyPatch, stopped: GatewayProcess
) -> None:
    """A program that waits for the line "serving until Ctrl-C" may send a signal at once."""

    def say(_: str) -> None:
        raise run.SignalReceivedError(signal.SIGTERM)

    monkeypatch.setattr(run, "_say", say)
    run._serve(stopped, None)


def test_an_exited_gateway_is_an_error_with_the_end_of_its_log(stopped: GatewayProcess) -> None:
    """The error names the log and ends with its last lines."""
    with pytest.raises(run.RunError, match=f"exited unexpectedly; its log is {stopped.log}, its end:\nlast line"):
        run._serve(stopped, None)


def test_the_log_is_kept_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no vLLM listens at VLLM_URL, the command fails, and the announced log of the gateway remains."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("VLLM_URL", "http://127.0.0.1:9/v1")
    assert run.main(["--once", "--port", "0"]) == 1
    output = capsys.readouterr()
    assert "vLLM does not list its models" in output.err
    [log] = tmp_path.iterdir()
    assert f"stopped; the gateway's log is kept in {log}" in output.out
    assert b'"serving"' in log.read_bytes()
