"""A scraper."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prometheus_client.samples import Sample


class Page:
    """One scrape."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.documented = {family.name: family.documentation for family in families}
        self._samples = [sample for family in families for sample in family.samples]
        series = [(sample.name, *sorted(sample.labels.items())) for sample in self._samples]
        assert len(set(series)) == len(series)  # a scraper refuses a page with a series twice

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series of this name with these labels, and any others."""
        return sum(sample.value for sample in self.samples(name, labels))

    def samples(self, name: str, labels: Mapping[str, str] | None = None) -> list[Sample]:
        """The series of this name with these labels, and any others."""
        wanted = (labels or {}).items()
        return [sample for sample in self._samples if sample.name == name and wanted <= sample.labels.items()]


async def scrape(address: str) -> Page:
    """Scrape a gateway."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            text: str = response.read().decode()
            return text

    return Page(await asyncio.to_thread(read))


async def until_scraped(address: str, condition: Callable[[Page], bool]) -> Page:
    """Scrape a gateway until a condition holds: gauges are set once a second, and a call is counted after its end."""
    async with asyncio.timeout(WAIT):
        while not condition(page := await scrape(address)):  # noqa: ASYNC110 (nothing announces it)
            await asyncio.sleep(0.05)
    return page
