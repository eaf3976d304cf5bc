"""Tokens used, and how far each figure can be trusted: point 9 of the contract."""

from __future__ import annotations

import pytest

from deltawire_server.errors import Reason
from deltawire_server.sansio.events import Completed, Fault, Provenance, Usage
from tests.sansio.build import DONE, calls, chunk, end, entry, error, figures, part, read, reader, text

TIMEOUT = Fault(Reason.UPSTREAM_TIMEOUT, "silent")


def _usage(*pieces: bytes, choice_count: int = 1) -> Usage:
    last = read(*pieces, choice_count=choice_count)[-1]
    assert isinstance(last, Completed)
    return last.usage


# --- EXACT


def test_the_account_without_choices_is_exact() -> None:
    """Only the chunk without choices is the whole account; it counts all choices."""
    assert _usage(text("a", finish="stop"), chunk(usage=figures(7, 3)), DONE) == Usage(3, Provenance.EXACT, 7)


def test_the_exact_account_replaces_what_was_known() -> None:
    """The final usage is used, even if an earlier report was larger."""
    streamed = chunk(part({"content": "a"}), usage=figures(9, 8, cached=5, reasoning=4))
    assert _usage(streamed, end("stop"), chunk(usage=figures(7, 3)), DONE) == Usage(3, Provenance.EXACT, 7, 5)


def test_the_exact_account_names_cached_and_reasoning_tokens() -> None:
    """The engine's details are returned; zero is a figure too."""
    account = chunk(usage=figures(7, 3, cached=0, reasoning=2))
    assert _usage(text("a", finish="stop"), account, DONE) == Usage(3, Provenance.EXACT, 7, 0, 2)
    account = chunk(usage={**figures(7, 3), "prompt_tokens_details": None, "completion_tokens_details": None})
    assert _usage(text("a", finish="stop"), account, DONE) == Usage(3, Provenance.EXACT, 7, None, None)
    account = chunk(usage={**figures(7, 3), "prompt_tokens_details": {}, "completion_tokens_details": {}})
    assert _usage(text("a", finish="stop"), account, DONE) == Usage(3, Provenance.EXACT, 7, None, None)


BROKEN: list[object] = [None, -1, 2**31, 3.0, "3", {}, True]


@pytest.mark.parametrize("count", BROKEN)
def test_an_account_without_a_count_is_not_exact(count: object) -> None:
    """The count is absent, or what else is known of it; the answer is whole all the same."""
    words = text("a"), text("b", finish="stop")
    running = chunk(part({"content": "c"}), usage=figures(7, 2))
    completion, prompt, both = (
        chunk(usage={**figures(7, 3), **dict.fromkeys(names, count)})
        for names in (["completion_tokens"], ["prompt_tokens"], ["prompt_tokens", "completion_tokens"])
    )
    assert _usage(*words, completion, DONE) == Usage(2, Provenance.LOWER_BOUND, 7)
    assert _usage(*words, prompt, DONE) == Usage(3, Provenance.LOWER_BOUND)
    assert _usage(*words, both, DONE) == Usage(2, Provenance.ESTIMATED)
    assert _usage(running, *words, completion, DONE) == Usage(2, Provenance.LOWER_BOUND, 7)
    assert _usage(running, *words, prompt, DONE) == Usage(3, Provenance.LOWER_BOUND, 7)
    assert _usage(running, *words, both, DONE) == Usage(2, Provenance.LOWER_BOUND, 7)
    reading = reader()
    reading.receive(text("a", finish="stop") + both)
    assert reading.ended
    assert reading.anomalies["usage account without a count"] == 1


def test_details_without_a_usable_count_are_absent() -> None:
    """They may be left out, so the account is exact without them."""
    account = chunk(usage=figures(7, 3, cached=-1, reasoning=-1))
    assert _usage(text("a", finish="stop"), account, DONE) == Usage(3, Provenance.EXACT, 7)


def test_running_figures_without_a_count() -> None:
    """What one of them lacks is known from another."""
    lacking = chunk(part({"content": "x"}), usage={"prompt_tokens": 7, "completion_tokens": None})
    assert _usage(lacking) == Usage(1, Provenance.LOWER_BOUND, 7)
    assert _usage(lacking, chunk(part({"content": "y"}), usage={"completion_tokens": 2})) == Usage(
        2, Provenance.LOWER_BOUND
    )


def test_a_sum_of_figures_is_what_the_api_can_hold() -> None:
    """Two choices that each claim the most there can be do not overflow."""
    most = 2**31 - 1
    claims = [chunk(part({"content": "x"}, choice=choice), usage=figures(7, most, reasoning=most)) for choice in (0, 1)]
    assert _usage(*claims, choice_count=2) == Usage(most, Provenance.LOWER_BOUND, 7, None, most)


def test_the_exact_account_is_kept_though_a_fault_follows() -> None:
    """Whatever breaks after it, it counted everything."""
    assert _usage(text("a"), chunk(usage=figures(7, 3))) == Usage(3, Provenance.EXACT, 7)
    assert _usage(text("a"), chunk(usage=figures(7, 3)), error()) == Usage(3, Provenance.EXACT, 7)


# --- LOWER_BOUND


def test_figures_of_a_cut_answer_are_a_lower_bound() -> None:
    """More may have been generated than the last figure that arrived says."""
    streamed = [chunk(part({"content": "x"}), usage=figures(7, count)) for count in (1, 2, 3)]
    assert _usage(*streamed) == Usage(3, Provenance.LOWER_BOUND, 7)


def test_figures_of_choices_are_summed_and_the_prompt_counted_once() -> None:
    """Each choice's figure is its own: their largest are added, however the chunks are mixed."""
    assert _usage(
        chunk(part(choice=0), usage=figures(7, 0)),
        chunk(part(choice=1), usage=figures(7, 0)),
        chunk(part({"content": "a"}, choice=1), usage=figures(7, 5)),
        chunk(part({"content": "b"}, choice=0), usage=figures(7, 2)),
        chunk(part({"content": "c"}, choice=1), usage=figures(7, 4)),
        choice_count=2,
    ) == Usage(7, Provenance.LOWER_BOUND, 7)


def test_figures_may_come_for_some_choices_only() -> None:
    """A choice that had no figure adds nothing."""
    streamed = chunk(part({"content": "a"}), usage=figures(7, 2)), text("b", choice=1)
    assert _usage(*streamed, choice_count=2) == Usage(2, Provenance.LOWER_BOUND, 7)


def test_reasoning_and_cached_tokens_of_figures() -> None:
    """Reasoning is summed over the choices that have it, as accounted last; cached tokens belong to the one prompt."""
    assert _usage(
        chunk(part({"reasoning": "a"}, choice=0), usage=figures(7, 2, cached=4, reasoning=2)),
        chunk(part({"reasoning": "b"}, choice=0), usage=figures(7, 3, cached=4, reasoning=3)),
        chunk(part({"reasoning": "c"}, choice=1), usage=figures(7, 5, reasoning=5)),
        chunk(part({"content": "d"}, choice=2), usage=figures(7, 1)),
        choice_count=3,
    ) == Usage(9, Provenance.LOWER_BOUND, 7, 4, 8)


def test_figures_without_reasoning_leave_it_unknown() -> None:
    """Unknown is not zero."""
    streamed = chunk(part({"content": "a"}), usage={**figures(7, 1), "completion_tokens_details": None})
    assert _usage(streamed) == Usage(1, Provenance.LOWER_BOUND, 7)
    assert _usage(chunk(part({"content": "a"}), usage=figures(7, 1, reasoning=0))).reasoning_tokens == 0


def test_an_account_that_more_output_follows_is_a_lower_bound() -> None:
    """It was not the final one: at least that much was used; the final one makes it exact again."""
    early = chunk(usage=figures(7, 3, cached=2))
    assert _usage(early, text("a"), end("stop"), DONE) == Usage(3, Provenance.LOWER_BOUND, 7, 2)
    assert _usage(text("a"), early, text("b")) == Usage(3, Provenance.LOWER_BOUND, 7, 2)
    assert _usage(text("a"), early, text("b"), end("stop"), chunk(usage=figures(7, 5)), DONE) == Usage(
        5, Provenance.EXACT, 7, 2
    )


def test_figures_that_outgrow_an_early_account_count() -> None:
    """The larger of the early account and the figures' sum is the better bound."""
    early, more = chunk(usage=figures(7, 3)), [chunk(part({"content": "x"}), usage=figures(7, n)) for n in (2, 4)]
    assert _usage(early, more[0]) == Usage(3, Provenance.LOWER_BOUND, 7)
    assert _usage(early, *more) == Usage(4, Provenance.LOWER_BOUND, 7)


def test_a_lower_bound_never_falls() -> None:
    """Of several early accounts the largest counts."""
    accounts = chunk(usage=figures(7, 9)), text("a"), chunk(usage=figures(7, 3)), text("b")
    assert _usage(*accounts) == Usage(9, Provenance.LOWER_BOUND, 7)


# --- ESTIMATED


def test_without_any_figure_output_is_counted_by_chunks() -> None:
    """Text, reasoning and tool entries count one each, fillers none; of the prompt nothing is known."""
    assert _usage(
        chunk(part({"role": "assistant", "content": ""})),
        text("a"),
        chunk(part({"reasoning": "b"})),
        chunk(part({"content": None})),
        chunk(part({"reasoning": ""})),
        calls(entry("{}", call_id="c", name="f")),
        calls(),
        chunk(part({"content": "c", "reasoning": "d", "tool_calls": [entry("")]})),
        end("stop"),
        DONE,
    ) == Usage(4, Provenance.ESTIMATED)


def test_nothing_generated_is_estimated_at_nothing() -> None:
    """An empty answer used no tokens that anybody knows of."""
    assert _usage(end("stop"), DONE) == Usage(0, Provenance.ESTIMATED)


# --- when


def test_usage_is_known_at_any_time() -> None:
    """What a reader says between two chunks is what it would say if the answer ended there."""
    reading = reader()
    known = [reading.usage]
    for piece in [
        text("a"),
        chunk(part({"content": "b"}), usage=figures(7, 2)),
        end("stop"),
        chunk(usage=figures(7, 3)),
        DONE,
    ]:
        reading.receive(piece)
        known.append(reading.usage)
    assert known == [
        Usage(0, Provenance.ESTIMATED),
        Usage(1, Provenance.ESTIMATED),
        Usage(2, Provenance.LOWER_BOUND, 7),
        Usage(2, Provenance.LOWER_BOUND, 7),
        Usage(3, Provenance.EXACT, 7),
        Usage(3, Provenance.EXACT, 7),
    ]


@pytest.mark.parametrize("last", [[error()], [b"data: nonsense\n\n"], [b"data: [DONE]\n\n"], []])
def test_usage_is_there_whatever_ends_the_answer(last: list[bytes]) -> None:
    """A fault keeps the usage reported before it."""
    assert _usage(chunk(part({"content": "a"}), usage=figures(7, 2)), *last) == Usage(2, Provenance.LOWER_BOUND, 7)


def test_usage_is_there_when_the_reader_gives_up() -> None:
    """After a silence or a time limit, usage is what is known so far."""
    reading = reader()
    reading.receive(chunk(part({"content": "a"}), usage=figures(7, 2)))
    last = reading.finish(TIMEOUT)[-1]
    assert isinstance(last, Completed)
    assert (last.usage, last.fault) == (Usage(2, Provenance.LOWER_BOUND, 7), TIMEOUT)
