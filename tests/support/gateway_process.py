"""The command `deltawire-server` as a process, for `make run` and for tests that need a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType


class GatewayProcessError(Exception):
    """The gateway did not start; the message has the end of its log."""


class GatewayProcess:
    """The command `deltawire-server` of this environment as a process, with a log of JSON lines.

    `with GatewayProcess(...) as gateway:` starts it and waits until it serves; leaving drains and ends it. After its end it can
    be started again.

    Args:
        arguments: Its flags.
        variables: Environment variables that override those of this process; an empty value is the same as none.
        log: The file for its output; emptied by each start.
    """

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._command = [str(Path(sys.executable).with_name("deltawire-server")), "--log-format", "json", *arguments]
        self._variables = dict(variables)
        self._process: subprocess.Popen[bytes] | None = None
        self._addresses: list[str] = []

    @property
    def address(self) -> str:
        """The first address that it listens on, while it serves."""
        return self._addresses[0]

    @property
    def running(self) -> bool:
        """Whether the process was started and has not exited."""
        return self._process is not None and self._process.poll() is None

    def records(self) -> Iterator[dict[str, Any]]:
        """The entries of its log so far."""
        for line in self.log.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # a warning of a library, or a line that is being written
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it serves.

        Raises:
            GatewayProcessError: It exited, or did not serve within `timeout` seconds and was stopped.
        """
        self._addresses = []
        with self.log.open("wb") as log:
            # In its own session: Ctrl-C is for this process, which then lets the gateway drain.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._variables},
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while not self._addresses:
            if not self.running:
                raise GatewayProcessError(f"the gateway exited with {self._process.returncode}; {self.log_end()}")
            if time.monotonic() > deadline:
                self.stop(grace=0.0)
                raise GatewayProcessError(f"the gateway does not serve after {timeout:g} s; {self.log_end()}")
            time.sleep(0.05)
            self._addresses = next((each["addresses"] for each in self.records() if each["event"] == "serving"), [])

    def log_end(self, lines: int = 20) -> str:
        """The path and the last lines of its log, for the end of an error message."""
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return f"its log is {self.log}, its end:\n{end}"

    def stop(self, grace: float = 45.0) -> int | None:
        """Let it drain and exit; kill it after `grace` seconds. Has no effect if it is not running.

        Returns:
            Its exit status; `None` if it was never started.
        """
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()

    def pause(self) -> None:
        """Suspend it, as if it hung. It must be running, and can still be killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Kill it, as a crash would. It must be running."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop(grace=5.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
