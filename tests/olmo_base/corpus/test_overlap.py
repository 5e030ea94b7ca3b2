"""N-gram overlap, against one that compares every window with every other."""

import random

import pytest

from olmo_base.corpus.overlap import Overlaps, words_of


def naive(texts: list[str], other: str, ngram: int, shortest: int) -> set[int]:
    """Every n words in a row of each text, as one string looked for in the other's."""
    haystack = f" {' '.join(words_of(other))} "
    found = set()
    for number, text in enumerate(texts):
        words = words_of(text)
        n = min(ngram, len(words))
        windows = [f" {' '.join(words[at : at + n])} " for at in range(len(words) - n + 1)]
        if len(words) >= shortest and any(window in haystack for window in windows):
            found.add(number)
    return found


def test_overlap_is_that_of_comparing_every_window_with_every_other():
    chance = random.Random(3)
    hits = 0
    for _ in range(300):
        texts = [" ".join(chance.choices("ab", k=chance.randrange(12))) for _ in range(6)]
        other = " ".join(chance.choices("ab", k=chance.randrange(30)))
        expected = naive(texts, other, 5, 3)
        assert Overlaps(texts, ngram=5, shortest=3).found_in(other) == expected
        hits += len(expected)
    assert 100 < hits < 1700  # neither none nor all


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not():
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    overlaps = Overlaps([question])
    words = question.split()
    assert overlaps.found_in("Before. " + " ".join(words[1:14]) + " after") == {0}
    assert overlaps.found_in(" ".join(words[:12]) + " and " + " ".join(words[12:])) == set()


def test_letter_case_spacing_and_punctuation_do_not_count():
    question = "What is it, that has four legs in the morning and two at noon?"
    seen = "what is it that\nhas FOUR legs -- in the morning, and two (at noon)"
    assert Overlaps([question]).found_in(seen) == {0}


def test_a_short_text_must_stand_there_whole_and_a_shorter_one_is_not_looked_for():
    overlaps = Overlaps(["a b c d e f g h", "a b c d e f g", ""])
    assert overlaps.too_short == {1, 2}
    assert overlaps.found_in("x a b c d e f g h y") == {0}
    assert overlaps.found_in("a b c d e f g") == set()


def test_texts_that_share_words_are_all_found():
    passage = " ".join(f"word{number}" for number in range(20))
    texts = [passage + " first?", passage + " second?", "other " * 20]
    assert Overlaps(texts).found_in(passage) == {0, 1}


@pytest.mark.parametrize("text", ["", "   ", "short"])
def test_nothing_is_found_in_nothing(text):
    assert Overlaps(["a b c d e f g h i j k l m n"]).found_in(text) == set()
    assert Overlaps([]).found_in("a b c") == set()
