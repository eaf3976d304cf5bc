"""The load that each call reports to load balancers, in the text form of ORCA (open request cost aggregation).

It is in the trailers, where gRPC has it, and in the headers, because the trailers of a long stream come too late: a balancer that
has read it in the headers ignores the trailers.
"""

from __future__ import annotations

LOAD = "endpoint-load-metrics"


class LoadReport:
    """The report of one process.

    The rate is always 1, so that a balancer, which divides it by the utilization, sends new calls where the fewest run. The true
    rate would lead it the other way: of two gateways, the one that gets more calls would also look like the faster one, and
    streams last too long for its utilization to correct that in time. So the rate of errors is their share. Without it, a gateway
    whose calls all fail at once would look idle.

    Attributes:
        metadata: What calls add to their headers and trailers; empty until `measure`.
        calls: The calls that began since the last `measure`.
        failed: Those that failed for a reason that operators should look at.
    """

    def __init__(self) -> None:
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.calls = 0
        self.failed = 0
        self._errors = 0.0

    def measure(self, utilization: float) -> None:
        """Report this from now on.

        Args:
            utilization: The part of the capacity that is in use; above 0, because balancers ignore reports of 0.
        """
        if self.calls:
            # Streams may have begun long before they fail.
            self._errors = min(1.0, self.failed / self.calls)
            self.calls = self.failed = 0
        report = f"TEXT application_utilization={utilization:.6f},rps_fractional=1,eps={self._errors:.3f}"
        self.metadata = ((LOAD, report),)


NO_LOAD = LoadReport()
"""Never measured: for calls without a report."""
