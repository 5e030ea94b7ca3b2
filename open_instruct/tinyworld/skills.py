"""Problems with one right answer: sums, comparing, sorting, reversing, copying.

A problem carries everything the rest needs: declarative statements for pretraining text, the
questions people ask, the right short answer, the answer as a full sentence, and plausible wrong
answers. `is_reserved` says which problems only the evaluation may use.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from open_instruct.tinyworld.world import (
    COLOURS,
    FOODS,
    LETTERS,
    MATERIALS,
    NUMERALS,
    PETS,
    THINGS,
)

WORDS = tuple(dict.fromkeys(PETS + THINGS + FOODS + COLOURS + MATERIALS))
LARGEST_SUM = 30
RESERVED_SHARE = 8  # one problem in this many is kept for the evaluation


@dataclass(frozen=True)
class Problem:
    category: str
    statements: tuple[str, ...]  # declarative, for pretraining text
    questions: tuple[str, ...]
    answer: str
    sentence: str
    wrong: tuple[str, ...]


def is_reserved(*items: str) -> bool:
    """Whether only the evaluation may use a problem over these items, in whatever order.

    A pure function of the items, the same in every process (`hash` of a str is not): training
    data can avoid what the evaluation asks without the two being made together.
    """
    return zlib.crc32(" ".join(sorted(items)).encode()) % RESERVED_SHARE == 0


def arithmetic(rng: random.Random, reserved: bool = False) -> Problem:
    """A sum or difference of two numbers, nothing above `LARGEST_SUM`.

    Numbers are written so that each is one token, without blanks around the signs. With digits
    as tokens, numbers in words, or sums up to 99, a model of this size stays below 15 % in the
    minutes that the quickstart has (docs/decisions).
    """
    while True:
        a, b = rng.randint(0, LARGEST_SUM), rng.randint(0, LARGEST_SUM)
        if a + b <= LARGEST_SUM and is_reserved(str(a), str(b)) == reserved:
            break
    if rng.random() < 0.5:
        category, asked, result = "plus", f"{a}+{b}", a + b
    else:
        category, asked, result = "minus", f"{a + b}-{b}", a
    near = [result + shift for shift in (-2, -1, 1, 2) if 0 <= result + shift <= LARGEST_SUM]
    return Problem(
        category=category,
        statements=(f"{asked}={result}",),
        questions=(f"What is {asked}?", f"How much is {asked}?", f"Work out {asked}."),
        answer=str(result),
        sentence=f"{asked}={result}.",
        wrong=tuple(str(number) for number in near),
    )


def compare(rng: random.Random, reserved: bool = False) -> Problem:
    """The bigger or smaller of two numbers, or the letter that comes first."""
    words = LETTERS if rng.random() < 0.3 else NUMERALS
    while True:
        a, b = rng.randrange(len(words)), rng.randrange(len(words))
        if a != b and is_reserved(words[a], words[b]) == reserved:
            break
    x, y = words[a], words[b]
    low, high = words[min(a, b)], words[max(a, b)]
    if words is LETTERS:
        return Problem(
            category="letters",
            statements=(
                f"{low} comes before {high} in the alphabet",
                f"the first of the letters {x} and {y}\n{low}",
            ),
            questions=(f"Which letter comes first in the alphabet, {x} or {y}?",),
            answer=low,
            sentence=f"{low} comes before {high}.",
            wrong=(high,),
        )
    word, answer, other = rng.choice((("bigger", high, low), ("smaller", low, high)))
    return Problem(
        category=word,
        statements=(
            f"{answer} is {word} than {other}",
            f"the {word} of {x} and {y} is {answer}",
            f"the {word} of {x} and {y}\n{answer}",
        ),
        questions=(f"Which is {word}, {x} or {y}?", f"Which number is {word}, {x} or {y}?"),
        answer=answer,
        sentence=f"{answer} is {word} than {other}.",
        wrong=(other,),
    )


def _items(rng: random.Random, pool: tuple[str, ...], reserved: bool) -> list[str]:
    while True:
        items = rng.sample(pool, rng.randint(3, 5))
        if is_reserved(*items) == reserved:
            return items


def _shuffled(rng: random.Random, items: list[str]) -> list[str]:
    return rng.sample(items, len(items))


def sort(rng: random.Random, reserved: bool = False) -> Problem:
    """Letters into alphabetical order, two-digit numbers into rising order."""
    kind, pool = rng.choice((("letters", LETTERS), ("numbers", NUMERALS[10:])))
    items = _items(rng, pool, reserved)
    before, after = " ".join(items), " ".join(sorted(items, key=pool.index))
    return Problem(
        category=kind,
        statements=(
            f"the {kind} {before} in order are {after}",
            f"{kind} in order\n{before}\n{after}",
        ),
        questions=(f"Sort these {kind}: {before}", f"Put these {kind} in order: {before}"),
        answer=after,
        sentence=f"The {kind} in order are {after}.",
        wrong=(" ".join(_shuffled(rng, items)), before),
    )


def reverse(rng: random.Random, reserved: bool = False) -> Problem:
    """Words from the last to the first."""
    items = _items(rng, WORDS, reserved)
    before, after = " ".join(items), " ".join(reversed(items))
    return Problem(
        category=f"{len(items)} words",
        statements=(
            f"the words {before} backwards are {after}",
            f"backwards\n{before}\n{after}",
        ),
        questions=(f"Reverse these words: {before}", f"Say these words backwards: {before}"),
        answer=after,
        sentence=f"The words backwards are {after}.",
        wrong=(before, " ".join(_shuffled(rng, items))),
    )


def copy(rng: random.Random, reserved: bool = False) -> Problem:
    """The same words again."""
    items = _items(rng, WORDS, reserved)
    before = " ".join(items)
    return Problem(
        category=f"{len(items)} words",
        statements=(
            f"the words {before} said again are {before}",
            f"again\n{before}\n{before}",
        ),
        questions=(f"Repeat these words: {before}", f"Copy these words: {before}"),
        answer=before,
        sentence=f"The words are {before}.",
        wrong=(" ".join(reversed(items)), " ".join(items[:-1])),
    )


SKILLS: dict[str, Callable[..., Problem]] = {
    "arithmetic": arithmetic,
    "compare": compare,
    "sort": sort,
    "reverse": reverse,
    "copy": copy,
}
