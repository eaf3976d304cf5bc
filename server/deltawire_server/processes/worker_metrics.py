"""The metrics of all workers, which they write to files, and those of the parent."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, multiprocess

from deltawire_server.metrics.table import WORKER_ENDS


class WorkerMetrics:
    """What the parent serves.

    Args:
        folder: The directory of the files; it is created.

    Attributes:
        registry: The sum of the workers, and the parent's own metrics.
    """

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir()
        self._folder = folder
        self.registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(self.registry, path=folder)  # type: ignore[no-untyped-call]
        self._ends = Counter(WORKER_ENDS.name, WORKER_ENDS.description, registry=self.registry)

    def ended(self, pid: int, *, unexpectedly: bool) -> None:
        """Record that a worker has ended, or could not be started: its gauges no longer count, its counters do."""
        multiprocess.mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
        if unexpectedly:
            self._ends.inc()
