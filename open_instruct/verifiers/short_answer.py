"""Short answers in words: PopQA, DROP, BIG-Bench Hard, and any rows of question and answers.

An answer is what follows the last "the answer is", or the whole text. Compared are its words:
letter case, punctuation and articles do not count, and numbers count by their value, as in DROP's
own measure (arXiv:1903.00161).
"""

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

# The same words; the words of an accepted answer somewhere in the text; DROP's F1 of the words.
METRICS = ("answer_match", "answer_contains", "answer_f1")
_MARK = re.compile(r"\banswer\s*(?:is\b|:)\s*", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def given_answer(text: str) -> str:
    """What follows the last "the answer is" in its line, or the whole text."""
    marks = list(_MARK.finditer(text))
    if marks:
        text = text[marks[-1].end() :].partition("\n")[0]
    return text.strip()


def _number(word: str) -> float | None:
    try:
        return float(word.replace(",", ""))
    except ValueError:
        return None


def words_of(text: str) -> list[str]:
    """The words of an answer, as they are compared."""
    found = []
    for word in re.split(r"[\s-]+", text.lower()):
        number = _number(word.strip(string.punctuation.replace("-", "").replace(".", "")))
        bare = str(number) if number is not None else word.translate(_PUNCTUATION)
        found += _ARTICLES.sub(" ", bare).split()
    return found


def _f1(given: set[str], accepted: set[str]) -> float:
    """The harmonic mean of precision and recall; 0 if the accepted words hold another number."""
    numbers = {word for word in accepted if _number(word) is not None}
    shared = given & accepted
    if numbers and not numbers & given:
        return 0.0
    if not given or not accepted:
        return float(given == accepted)
    return 2 * len(shared) / (len(given) + len(accepted))


def answer_f1(text: str, accepted: Sequence[Sequence[str]]) -> float:
    """DROP's F1 of one text against the best accepted answer, each of one or more spans."""
    given = set(words_of(text))
    return max(
        max(_f1(given, set(words_of(span))) for span in spans) / len(spans) for spans in accepted
    )


def judge(answer: str, truth: Sequence[Sequence[str]]) -> Verdict:
    """How an answer compares with the accepted ones."""
    found = given_answer(answer)
    given, all_words = words_of(found), f" {' '.join(words_of(answer))} "
    accepted = [[words_of(span) for span in spans] for spans in truth]
    return Verdict(
        {
            "answer_match": float(any([given] == spans for spans in accepted)),
            "answer_contains": float(
                any(all(f" {' '.join(span)} " in all_words for span in spans) for spans in accepted)
            ),
            "answer_f1": answer_f1(found, truth),
        },
        found,
    )


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A row of PopQA, DROP or BIG-Bench Hard, or {question or prompt, answer: text or a list}.

    Errors: BadProblem.
    """
    passage = ""
    if "input" in row and "target" in row:
        prompt, given = field(row, "input"), [field(row, "target")]
    elif "possible_answers" in row:
        prompt, given = field(row, "question"), _listed(row, "possible_answers")
    elif "passage" in row:
        passage = field(row, "passage")
        prompt = f"{passage}\n{field(row, 'question')}"
        spans = row.get("answers_spans")
        given = _listed(spans, "spans") if isinstance(spans, dict) else _listed(row, "answers")
    else:
        prompt = field(row, "question" if "question" in row else "prompt")
        given = [row["answer"]] if isinstance(row.get("answer"), str) else _listed(row, "answer")
    accepted = [[item] if isinstance(item, str) else item for item in given]
    for spans in accepted:
        is_told = isinstance(spans, list) and spans and all(isinstance(s, str) for s in spans)
        if not is_told or not all(words_of(span) for span in spans):
            raise BadProblem(f"an accepted answer is {json.dumps(spans)[:60]}, needed words.")
    shown = " or ".join(", ".join(spans) for spans in accepted)
    category = row.get("category") or row.get("task")
    return Problem(
        prompt,
        accepted,
        shown,
        solution=row.get("solution") or ", ".join(accepted[0]),
        category=category if isinstance(category, str) else None,
        cluster=hashlib.sha256(passage.encode()).hexdigest()[:16] if passage else None,
    )


def _listed(row: Mapping[str, Any], key: str) -> list[Any]:
    """A list of a row, or one written as JSON in a text, as PopQA has it."""
    if isinstance(row.get(key), str):
        try:
            row = {key: json.loads(row[key])}
        except ValueError:
            raise BadProblem(f"{key!r} is no JSON list.") from None
    return field(row, key, list)
