"""What of `make run` needs no vLLM."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, cast

from tests.support import run

if TYPE_CHECKING:
    import pytest


def test_told_to_stop_while_it_says_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for that line may stop it at once: from there on, being told to is the end that was meant."""

    def say(_: str) -> None:
        raise run.ToldToStopError(signal.SIGTERM)

    monkeypatch.setattr(run, "_say", say)
    run._serve(cast("run.GatewayProcess", None), None)
