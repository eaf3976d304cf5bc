"""The arithmetic of the rig, and that it runs; no figure of a run is compared with a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from tests.bench import costs, curves, guard, report
from tests.bench.measure import SCENARIOS, Field, Scenario, measure, noted, percentile_99
from tests.bench.results import CURVES, RESULTS, Figure, Results, Row, Sample, machine
from tests.bench.servers import BARE, DELTAWIRE, SMALLEST, UPSTREAM, Pace
from tests.support.generated import part

if TYPE_CHECKING:
    from pathlib import Path


def sample(cpu: float, per_second: float = 1.0, seconds: float = 2.0) -> Sample:
    """A repetition with these figures."""
    return Sample(cpu, seconds, per_second, 1.5, 2.5, 1.25, 0.5)


def run(cost: float, **costs_of: float) -> Results:
    """A run in which the gateway had this cost, under some loads another one, and bare grpc.aio 10 µs."""
    ours = {scenario.name: costs_of.get(scenario.name.replace("-", "_"), cost) for scenario in SCENARIOS}
    rows = [
        Row(name, f"title of {name}", who, samples=[sample(value, seconds=seconds)])
        for name, own in ours.items()
        for who, value, seconds in ((DELTAWIRE, own, 3.0), (BARE, 10.0, 2.0), (UPSTREAM, 1.0, 2.0))
    ]
    figures = [Figure(costs.IMPORT, statement, 50.0) for statement in costs.IMPORTS]
    figures += [Figure(costs.CAPACITY, name, calls) for name, calls in (("1 worker", 300.0), ("2 workers", 540.0))]
    return Results(
        {"cores": 2, "cpu": "a CPU", "memory_gib": 4.0, "kernel": "6.1", "versions": {"Python": "3"}}, rows, figures
    )


class TestFigures:
    def test_the_least_disturbed_repetition_counts(self) -> None:
        """The fastest, even if another one had a lower cost."""
        row = Row(
            "flat", "", DELTAWIRE, samples=[sample(3, seconds=3.0), sample(2, seconds=1.0), sample(1, seconds=2.0)]
        )
        assert row.fastest.cpu_micros == 2

    def test_a_cost_is_per_token_or_per_call(self) -> None:
        """Two callers with three calls of four tokens each."""
        assert Scenario("", "", 2, Pace(4), calls=3).units == 24
        assert Scenario("", "", 2, Pace(4), calls=3, per_call=True).units == 6

    def test_the_percentile_is_within_the_values(self) -> None:
        """Also of few values, where an extrapolation would be above all of them."""
        assert percentile_99([7.0]) == 7.0
        assert percentile_99([1.0, 2.0]) == pytest.approx(1.99)

    def test_a_failed_server_does_not_end_the_run(self) -> None:
        """It has no samples and is no part of the tables; the command fails if it is the gateway."""
        with noted("smg"):
            raise RuntimeError("it ended a stream early")
        failed = Row("flat", "", "smg")
        measured = Row("flat", "", DELTAWIRE, samples=[sample(1)])
        assert Results({}, [failed]).of("flat") == {}
        assert "failed" in report.text([measured, failed])
        assert not report.failures(Results({}, [measured, failed]))
        assert report.failures(Results({}, [Row("streams", "", DELTAWIRE, 10)])) == "deltawire failed: streams at 10"


class TestFiles:
    def test_results_are_read_as_they_were_written(self, tmp_path: Path) -> None:
        """Rows, points of curves and single figures."""
        written = run(20)
        written.rows.append(Row("streams", "", DELTAWIRE, 10, [sample(1), sample(2)]))
        written.write(tmp_path / "new" / RESULTS)
        assert Results.read(tmp_path / "new" / RESULTS) == written

    def test_a_point_of_a_curve_is_no_load(self) -> None:
        """Even under the same name."""
        assert Results({}, [Row("flat", "", DELTAWIRE, 10, [sample(1)])]).of("flat") == {}

    def test_the_card_of_the_machine(self, tmp_path: Path) -> None:
        """Every version that is part of the figures; peers only if they are there."""
        card = machine(tmp_path)
        assert card["cores"] >= 1
        assert card["memory_gib"] > 0
        assert card["versions"].keys() == {"Python", "grpcio", "protobuf", "uvloop"}


class TestGuard:
    def test_it_allows_noise(self) -> None:
        """Up to 1.5 times the stated ratio, in whatever time."""
        assert guard.regressions(run(30), run(20)) == []

    def test_it_names_the_load(self) -> None:
        """With both ratios and the limit."""
        [line] = guard.regressions(run(20, short_16=31), run(20))
        assert line.startswith("short-16: the gateway costs 3.10 times bare grpc.aio; 2.00 is stated and at most 3.00")

    def test_it_compares_ratios(self) -> None:
        """A machine that is three times as slow is no regression."""
        slow = run(60)
        for row in slow.rows:
            row.samples = [sample(30.0 if row.who == BARE else 60.0)]
        assert guard.regressions(slow, run(20)) == []

    def test_the_documentation_states_all_that_it_guards(self) -> None:
        """The run that is checked in has a ratio for each load."""
        stated = Results.read(report.STATED / RESULTS)
        assert all(math.isfinite(guard.ratio(stated.of(name))) for name in guard.GUARDED)


class TestDocumentation:
    def test_the_tables_are_those_of_the_results(self) -> None:
        """If they are not, run `make bench-docs`."""
        stated = report.markdown(Results.read(report.STATED / RESULTS))
        assert part(report.README, report.PART, report.COMMAND) == stated

    @pytest.mark.parametrize("plot", report.PLOTS)
    def test_the_plots_are_those_of_the_results(self, plot: str) -> None:
        """Each names the results that it was drawn from. If these have changed, run `make bench-docs`."""
        drawn = (report.STATED / plot).read_text()
        assert report.digest(report.STATED / report.PLOTS[plot]) in drawn

    def test_the_curves_are_complete(self) -> None:
        """Each has all its points of the gateway."""
        measured = {(row.scenario, row.at) for row in Results.read(report.STATED / CURVES).rows if row.who == DELTAWIRE}
        points = {(point.name, point.at) for curve in curves.LOADS.values() for point in curve}
        assert measured == points | {("models", count) for count in curves.MODELS}

    def test_costs_and_ratios(self) -> None:
        """20 µs beside 10 µs; a peer that was not measured has no column."""
        cpu = report.markdown(run(20)).partition("\n\n")[2]
        assert cpu.startswith("| CPU µs per token, or per call | deltawire | bare grpc.aio | ÷ bare grpc.aio |\n")
        assert "| title of steps-64 | 20.0 | 10.0 | 2.00 |\n" in cpu

    def test_times_are_relative_to_the_upstream(self) -> None:
        """3 s beside 2 s, and half a core of the load generator."""
        assert "| title of flat | 1.00 | 1.50 | 1.25 | 1.50 / 2.50 | 1.50 / 2.50 | 50% |" in report.markdown(run(20))

    def test_a_part_of_a_run_is_refused(self) -> None:
        """The documentation states whole runs only."""
        partial = run(20)
        partial.rows = [row for row in partial.rows if row.scenario != "flat"]
        with pytest.raises(ValueError, match="flat missing"):
            report.markdown(partial)

    def test_numbers(self) -> None:
        """Enough digits for a comparison, and not more."""
        assert [report.number(value) for value in (0.00271, 0.456, 9.871, 12.34, 123.4, 50324.0)] == [
            *("0.0027", "0.46", "9.87", "12.3", "123", "50,324")
        ]


async def test_it_measures(tmp_path: Path) -> None:
    """The gateway, the two references and the upstream, for a moment."""
    rows = await measure(Scenario("tiny", "", 2, Pace(5)), Field(tmp_path), repeat=1)
    assert [row.who for row in rows] == [DELTAWIRE, SMALLEST, BARE, UPSTREAM]
    assert all(len(row.samples) == 1 and row.fastest.cpu_micros > 0 for row in rows)
