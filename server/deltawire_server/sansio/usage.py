"""Usage accounting: combines the usage reports of the engine into the best available numbers, with their accuracy.

    no valid report                                         ESTIMATED: the number of chunks with output
    only running reports, or a final report that lacks      LOWER_BOUND: the largest numbers; the prompt is counted once,
    a count, or one that more output followed               and the largest numbers of the choices are added up
    a final report with both counts                         EXACT

The final report is a chunk without choices that no output follows; it counts all choices. A running report counts the choice of
its chunk. An invalid count is `None` here and never ends an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.sansio.chunks import MAX_COUNT
from deltawire_server.sansio.events import Provenance, Usage

if TYPE_CHECKING:
    from collections import Counter

    from deltawire_server.sansio.chunks import UsageFigures


class UsageMeter:
    """Collects the usage reports of one answer.

    Args:
        anomalies: Counts the final reports that lack a count.
    """

    def __init__(self, anomalies: Counter[str]) -> None:
        self._anomalies = anomalies
        self._running: dict[int, UsageFigures] = {}  # for each choice the report with the most tokens
        self.final: UsageFigures | None = None
        """The last report without choices, if no output followed it."""
        self._overtaken: UsageFigures | None = None  # the largest report that more output followed
        self.output_chunks = 0
        """Number of chunks with text, reasoning or tool entries, per choice; the reader counts them."""

    def receive_running(self, choice: int, figures: UsageFigures) -> None:
        """Take a running report of a choice. Once per token."""
        before = self._running.get(choice)
        if before is None or (figures.completion_tokens or 0) >= (before.completion_tokens or 0):
            self._running[choice] = figures

    def receive_account(self, figures: UsageFigures) -> None:
        """Take a report without choices: the final one, unless `continue_after_account` is called."""
        if figures.prompt_tokens is None or figures.completion_tokens is None:
            self._anomalies["usage account without a count"] += 1
        self.final = figures

    def continue_after_account(self) -> None:
        """Note that output followed the last report, whose numbers are now a lower bound."""
        before, account, self.final = self._overtaken, self.final, None
        if before is None or (account and (account.completion_tokens or 0) >= (before.completion_tokens or 0)):
            self._overtaken = account

    @property
    def usage(self) -> Usage:
        """The usage so far; the counts are at most 2**31 - 1, the limit of the API."""
        running = list(self._running.values())
        accounts = [account for account in (self._overtaken, *running, self.final) if account is not None]
        cached = [tokens for tokens in map(_cached_tokens, accounts) if tokens is not None]
        final = self.final
        if final is not None and final.prompt_tokens is not None and final.completion_tokens is not None:
            return Usage(
                final.completion_tokens,
                Provenance.EXACT,
                final.prompt_tokens,
                cached[-1] if cached else None,
                _reasoning_tokens(final),
            )
        prompts = [account.prompt_tokens for account in accounts if account.prompt_tokens is not None]
        of_choices = [account.completion_tokens for account in running if account.completion_tokens is not None]
        counts = [min(sum(of_choices), MAX_COUNT)] if of_choices else []
        counts += [
            account.completion_tokens
            for account in (self._overtaken, final)
            if account is not None and account.completion_tokens is not None
        ]
        if not counts and not prompts:
            return Usage(self.output_chunks, Provenance.ESTIMATED)
        reasoning = [tokens for tokens in map(_reasoning_tokens, running) if tokens is not None]
        return Usage(
            max(counts, default=self.output_chunks),
            Provenance.LOWER_BOUND,
            max(prompts, default=None),
            cached[-1] if cached else None,
            min(sum(reasoning), MAX_COUNT) if reasoning else None,
        )


def _reasoning_tokens(figures: UsageFigures) -> int | None:
    return figures.completion_tokens_details.reasoning_tokens if figures.completion_tokens_details else None


def _cached_tokens(figures: UsageFigures) -> int | None:
    return figures.prompt_tokens_details.cached_tokens if figures.prompt_tokens_details else None
