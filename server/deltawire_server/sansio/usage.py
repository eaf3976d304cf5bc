"""Tokens used: from the accounts that the engine gives, the best figure there is, and how far it can be trusted.

    every account is missing or unusable                    ESTIMATED: the chunks with output, counted
    only running figures, or a final account that lacks     LOWER_BOUND: the largest that is known; the prompt once, the
    a count, or one that more output followed               sum over the choices of each one's largest figure
    the final account, with both counts                     EXACT

The final account is the one without choices that no output follows; it counts all choices. A running figure counts the
choice that it comes with. A count that cannot be used is `None` here and never ends an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.sansio.chunks import MAX_COUNT
from deltawire_server.sansio.events import Provenance, Usage

if TYPE_CHECKING:
    from collections import Counter

    from deltawire_server.sansio.chunks import UsageFigures


class UsageMeter:
    """Collects the accounts of one answer.

    Args:
        anomalies: Counts the final accounts that lack a count.
    """

    def __init__(self, anomalies: Counter[str]) -> None:
        self._anomalies = anomalies
        self._running: dict[int, UsageFigures] = {}  # of each choice the ones with the most tokens
        self.final: UsageFigures | None = None
        """The last account without choices, if no output followed it."""
        self._overtaken: UsageFigures | None = None  # the largest account that more output followed
        self.output_chunks = 0
        """Chunks' shares with text, reasoning or tool entries; the reader counts them."""

    def receive_running(self, choice: int, figures: UsageFigures) -> None:
        """Take the figures beside a choice's share of a chunk. Once per token."""
        known = self._running.get(choice)
        if known is None or (figures.completion_tokens or 0) >= (known.completion_tokens or 0):
            self._running[choice] = figures

    def receive_account(self, figures: UsageFigures) -> None:
        """Take an account without choices: the final one, unless `continue_after_account` is called."""
        if figures.prompt_tokens is None or figures.completion_tokens is None:
            self._anomalies["usage account without a count"] += 1
        self.final = figures

    def continue_after_account(self) -> None:
        """More choices came: at least as much as the last account says was used."""
        known, account, self.final = self._overtaken, self.final, None
        if known is None or (account and (account.completion_tokens or 0) >= (known.completion_tokens or 0)):
            self._overtaken = account

    @property
    def usage(self) -> Usage:
        """What is known so far; the counts are at most 2**31 - 1, what the API can hold."""
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
