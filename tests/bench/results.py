"""The figures of a run, and the file that has them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RUN = Path(".cache/bench")
"""Where runs write their files; those that the documentation states are beside this module."""

RESULTS, CURVES = "results.json", "curves.json"
PEERS = Path(".cache/peers/bin")
"""Where `make bench-peers` installs the peers."""

LIBRARIES = ("grpcio", "protobuf", "uvloop")
PROGRAMS = ("vllm-router", "smg", "litellm")
"""The peers that forward HTTP: their names are those of their packages and of their commands."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition of a load.

    Attributes:
        cpu_micros: CPU time of the server, user and system, per token or call.
        seconds: From the first request to the end of the last answer.
        per_second: Tokens or calls per second.
        first_p50_ms: Median time to the first event.
        first_p99_ms: The same, 99th percentile.
        slowest: The longest answer's duration over the median's.
        load_cores: CPU time of the load generator per second. Near 1, the load generator is the limit, because it has one thread
            for Python.
    """

    cpu_micros: float
    seconds: float
    per_second: float
    first_p50_ms: float
    first_p99_ms: float
    slowest: float
    load_cores: float


@dataclass(slots=True)
class Row:
    """The measurement of one server under one load.

    Attributes:
        scenario: The name of the load or of the curve.
        title: The load's name in tables.
        who: The server's name.
        at: The place on the curve, such as the number of streams; 0 for a load that is not on a curve.
        samples: The repetitions; none if the server failed.
    """

    scenario: str
    title: str
    who: str
    at: int = 0
    samples: list[Sample] = field(default_factory=list)

    @property
    def fastest(self) -> Sample:
        """The least disturbed repetition, of at least one.

        It is not the one with the lowest cost: if other work delays the gateway, it merges deltas, which lowers its cost.
        """
        return min(self.samples, key=lambda sample: sample.seconds)


@dataclass(frozen=True, slots=True)
class Figure:
    """A single figure of one server or module, such as its memory per idle stream.

    Attributes:
        name: What is measured, with its unit.
        who: The server's or the module's name.
        value: In that unit.
    """

    name: str
    who: str
    value: float


@dataclass(slots=True)
class Results:
    """What a run measured.

    Attributes:
        machine: The card of the machine: cores, memory, versions.
        rows: The loads, or the points of curves.
        figures: The single figures.
    """

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        data = json.loads(path.read_text())
        rows = [Row(**row | {"samples": [Sample(**sample) for sample in row["samples"]]}) for row in data["rows"]]
        return cls(data["machine"], rows, [Figure(**figure) for figure in data["figures"]])

    def write(self, path: Path) -> None:
        """Write everything as JSON, a row on a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Sequence[Row | Figure]] = {"rows": self.rows, "figures": self.figures}
        lines = [f'  "{name}": [{_lines(part)}\n  ]' for name, part in parts.items()]
        path.write_text("{\n" + ",\n".join([f'  "machine": {json.dumps(self.machine)}', *lines]) + "\n}\n")

    def of(self, scenario: str) -> dict[str, Row]:
        """The rows of a load that is not on a curve, by the server's name, without servers that failed."""
        return {row.who: row for row in self.rows if row.scenario == scenario and not row.at and row.samples}

    def values(self, name: str) -> dict[str, float]:
        """The single figures of that name, by the server or module."""
        return {figure.who: figure.value for figure in self.figures if figure.name == name}


def machine(programs: Path) -> dict[str, Any]:
    """The card of this machine.

    Args:
        programs: The folder of the peers' programs; the versions of those that are there are included.
    """
    described = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "memory_gib": round(memory, 1),
        "kernel": platform.release().partition("-")[0],
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
            **{name: _version(programs, name) for name in PROGRAMS if (programs / name).exists()},
        },
    }


def _version(programs: Path, package: str) -> str:
    command = [str(programs / "python"), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _lines(entries: Iterable[Row | Figure]) -> str:
    return ",".join("\n    " + json.dumps(asdict(entry)) for entry in entries)
