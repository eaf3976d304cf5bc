"""Halves of characters: joined where both come, replaced where one is alone, in whole texts and in pieces."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.characters import Halves, mend

HIGH, LOW = "\ud83d", "\ude00"


@pytest.mark.parametrize(
    ("text", "mended", "broken"),
    [
        ("", "", 0),
        ("aé日😀", "aé日😀", 0),
        (HIGH + LOW, "😀", 0),
        (HIGH, "\ufffd", 1),
        (LOW, "\ufffd", 1),
        (LOW + HIGH, "\ufffd\ufffd", 2),
        (HIGH + HIGH + LOW + LOW, "\ufffd😀\ufffd", 2),
        (HIGH + "a" + LOW, "\ufffda\ufffd", 2),
    ],
)
def test_mends_a_whole_text(text: str, mended: str, broken: int) -> None:
    """Pairs become characters, halves become U+FFFD and are counted."""
    anomalies: Counter[str] = Counter()
    assert mend(text, anomalies) == mended
    assert anomalies == ({"broken character": broken} if broken else {})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 1), st.text(st.sampled_from(["a", "é", "😀", HIGH, LOW]), max_size=4))))
def test_pieces_give_what_the_whole_gives(pieces: list[tuple[int, str]]) -> None:
    """However two texts are cut and mixed, each is mended as if it had come whole, and nothing waits at the end."""
    anomalies: Counter[str] = Counter()
    halves = Halves(anomalies)
    read = {0: "", 1: ""}
    for key, piece in pieces:
        read[key] += halves.receive(key, piece)
    whole: Counter[str] = Counter()
    for key in read:
        read[key] += halves.finish(key)
        assert read[key] == mend("".join(piece for other, piece in pieces if other == key), whole)
        read[key].encode()
    assert anomalies == whole
    assert not halves.pending
