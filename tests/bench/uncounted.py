"""The gateway with metrics that count nothing: what counting costs is measured against it."""

from __future__ import annotations

import sys
from typing import Any, Self

import prometheus_client


class Nothing:
    """Instead of a counter, a gauge or a histogram, with or without labels."""

    def __init__(self, *_: object, buckets: tuple[float, ...] = (), **__: object) -> None:
        self._buckets = [self] * (len(buckets) + 1)
        self._sum = self if not buckets else Nothing()

    def labels(self, *_: object, **__: object) -> Self:
        """The same for all labels."""
        return self

    def nothing(self, *_: object, **__: object) -> None:
        """Count, set or observe nothing."""

    inc = dec = set = observe = nothing


def main() -> int:
    """Run the command `deltawire-server`."""
    library: Any = prometheus_client
    library.Counter = library.Gauge = library.Histogram = Nothing
    from deltawire_server.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
