"""Measures the process itself, as far as the system shows it (Linux): memory, CPU time, file descriptors, start."""

from __future__ import annotations

from prometheus_client import ProcessCollector

from deltawire_server.metrics.table import PROCESS, PROCESS_CPU


class ProcessMetrics:
    """Sets the metrics of this process.

    The library's collector is not registered itself: it would show one process, and workers are several.
    """

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)
        self._cpu = 0.0

    def measure(self) -> None:
        """Set them to the current values."""
        for family in self._collector.collect():
            for sample in family.samples:
                if sample.name in PROCESS:
                    PROCESS[sample.name].set(sample.value)
                elif sample.name == "process_cpu_seconds_total":
                    PROCESS_CPU.inc(max(0.0, sample.value - self._cpu))
                    self._cpu = sample.value
