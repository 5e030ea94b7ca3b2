"""Which texts have words in a row that other text has too.

texts to look for -> their n-grams of words, hashed -> any amount of other text, held against them
a piece at a time, in constant memory. Evaluation looks for its questions in training text; data
filters drop training text in which a question is found.

A word is a run of letters, digits and underscores, letter case aside. What has fewer words than n
is looked for as a whole, as long as it has at least ``shortest``; shorter texts are found by
chance, and are not looked for.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

NGRAM = 13  # words, as GPT-3 (arXiv:2005.14165, appendix C) and many since
SHORTEST = 8  # words of a text that is looked for as a whole; GPT-3's least
WORD = re.compile(r"\w+")
# An odd number; a window's hash is the sum of its words' hashes times powers of it, modulo 2**64.
BASE = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    return WORD.findall(text.casefold())


def _window_hashes(word_hashes: Hashes, n: int) -> Hashes:
    """A number for every n words in a row; the same words always give the same one."""
    num_windows = len(word_hashes) - n + 1
    found = np.zeros(max(0, num_windows), dtype=np.uint64)
    for place in range(n if num_windows > 0 else 0):
        found = found * np.uint64(BASE) + word_hashes[place : place + num_windows]
    return found


def _word_hashes(words: Sequence[str]) -> Hashes:
    # Python's own hashes differ between processes; what is found does not, as it is compared
    # word by word.
    return np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)


class Overlaps:
    """Texts, to be looked for in others by their n-grams."""

    def __init__(
        self, texts: Iterable[str], *, ngram: int = NGRAM, shortest: int = SHORTEST
    ) -> None:
        """``too_short`` holds the numbers of the texts that cannot be looked for."""
        assert 1 <= shortest <= ngram, (shortest, ngram)
        self._words = [words_of(text) for text in texts]
        self.too_short = {n for n, words in enumerate(self._words) if len(words) < shortest}
        by_length: dict[int, list[int]] = {}
        for number, words in enumerate(self._words):
            if number not in self.too_short:
                by_length.setdefault(min(ngram, len(words)), []).append(number)
        self._grams = {n: self._index(n, numbers) for n, numbers in sorted(by_length.items())}

    def _index(self, n: int, numbers: Sequence[int]) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """Sorted hashes of all n-grams, and for each the text's number and the first word's."""
        hashes = [_window_hashes(_word_hashes(self._words[number]), n) for number in numbers]
        places = [
            np.stack([np.full(len(found), number), np.arange(len(found))], axis=1)
            for number, found in zip(numbers, hashes, strict=True)
        ]
        all_hashes, all_places = np.concatenate(hashes), np.concatenate(places)
        order = np.argsort(all_hashes, kind="stable")
        return all_hashes[order], all_places[order]

    def found_in(self, text: str) -> set[int]:
        """The numbers of the texts of which n words in a row stand in this text."""
        words = words_of(text)
        if not self._grams or len(words) < min(self._grams):
            return set()
        word_hashes = _word_hashes(words)
        found: set[int] = set()
        for n, (hashes, places) in self._grams.items():
            windows = _window_hashes(word_hashes, n)
            first = np.searchsorted(hashes, windows)
            is_hit = hashes[np.minimum(first, len(hashes) - 1)] == windows
            for start in np.flatnonzero(is_hit).tolist():
                found |= self._matching(n, hashes, places, int(first[start]), words, start)
        return found

    def _matching(
        self,
        n: int,
        hashes: Hashes,
        places: npt.NDArray[np.int64],
        index: int,
        words: list[str],
        start: int,
    ) -> set[int]:
        """The texts that hold the words from ``start``, among those of one hash."""
        window, value = words[start : start + n], hashes[index]
        numbers: set[int] = set()
        while index < len(hashes) and hashes[index] == value:
            number, place = places[index].tolist()
            if number not in numbers and self._words[number][place : place + n] == window:
                numbers.add(number)
            index += 1
        return numbers
