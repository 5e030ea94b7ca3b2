"""Instructions whose following can be checked by a program: IFEval (arXiv:2311.07911).

An answer's instructions are judged one by one, strictly, and loosely: without its first line, its
last line or its asterisks, whichever of these versions suits. The languages of texts are told by
langdetect, as in the paper, with its seed fixed.
"""

import importlib.util
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from olmo_base.run.errors import UserError
from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

# Prompts of which all instructions are followed; the share of single instructions followed.
METRICS = ("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict")
RELATIONS = ("at least", "less than")
_LANGDETECT = threading.Lock()
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def check_ready() -> None:
    """Errors: UserError where languages cannot be told."""
    if importlib.util.find_spec("langdetect") is None:
        raise UserError(
            "IFEval asks for answers in certain languages, and langdetect, which tells them, is "
            "not installed. Install it: pip install 'open-instruct[ifeval]'."
        )


def language_of(text: str) -> str | None:
    """The ISO code of a text's language; None if it has no letters. Errors: UserError."""
    check_ready()
    from langdetect import DetectorFactory, LangDetectException, detect

    with _LANGDETECT:  # its first call loads what a second one at the same time would miss
        DetectorFactory.seed = 0  # else the same text is told differently from call to call
        try:
            return str(detect(text))
        except LangDetectException:
            return None


def _holds(count: int, relation: str, number: int) -> bool:
    return count >= number if relation == "at least" else count < number


# ---------------------------------------------------------------- counting

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc inc ltd co corp dept fig vol gen col lt sgt capt rev "
    "hon gov sen rep e.g i.e a.m p.m u.s u.k ph.d b.c a.d jan feb mar apr jun jul aug sep sept "
    "oct nov dec".split()
)
_SENTENCE_END = re.compile(r"(?<!\S)(?P<word>\S*?)(?P<end>[.!?]+)[\"'”’)\]}*_]*(?=\s+(?P<next>\S))")


def count_sentences(text: str) -> int:
    """How many sentences a text has.

    One ends at . ! or ? before white space, but not at an abbreviation's or initial's point, nor
    at dots that a small letter follows. The paper's tokenizer (Punkt) needs trained data; on plain
    prose the two agree.
    """
    text = text.strip()
    if not text:
        return 0
    count = 1
    for match in _SENTENCE_END.finditer(text):
        word, goes_on_small = match["word"].lower().lstrip("\"'“‘([{*_"), match["next"].islower()
        if match["end"] == ".":
            is_initial = len(word) == 1 and word.isalpha() and word != "i"
            if word in _ABBREVIATIONS or is_initial or (word.isdigit() and goes_on_small):
                continue
        elif set(match["end"]) == {"."} and goes_on_small:
            continue
        count += 1
    return count


_SPLIT_OFF = re.compile(r"[;?!()\[\]{}<>\"“”«»…&%#$@`|=—–]|--|\.{2,}|[,:](?!\d)")
_CONTRACTION = re.compile(
    r"(?<=\w)(?=(?:'[smd]|'ll|'re|'ve|n't)\b)|(?<=\bcan)(?=not\b)", re.IGNORECASE
)


def count_capital_words(text: str) -> int:
    """How many words are in capitals. As in the paper, I'M and DON'T are two words each."""
    words = _SPLIT_OFF.sub(" ", text.replace("’", "'")).split()
    return sum(part.isupper() for word in words for part in _CONTRACTION.split(word))


# ---------------------------------------------------------------- the 25 checks


def has_keywords(text: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, inside other words too."""
    return all(keyword.lower() in text.lower() for keyword in keywords)


def has_keyword_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs at least, or less than, so many times."""
    return _holds(text.lower().count(keyword.strip().lower()), relation, frequency)


def lacks_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def has_letter_often(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter, or other character, occurs at least, or less than, so many times."""
    return _holds(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def is_in_language(text: str, language: str) -> bool:
    """The text is in a language; one without letters passes."""
    return language_of(text) in (language, None)


def has_sentences(text: str, num_sentences: int, relation: str) -> bool:
    """At least, or fewer than, so many sentences."""
    return _holds(count_sentences(text), relation, num_sentences)


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs between lines of ***."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == num_paragraphs


def has_words(text: str, num_words: int, relation: str) -> bool:
    """At least, or fewer than, so many words."""
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def has_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between empty lines, and one of them begins with a word."""
    parts = [part.strip() for part in text.split("\n\n")]
    num_found = sum(map(bool, parts))
    if nth_paragraph > num_found or num_found != num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def has_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many [placeholders]."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def has_postscript(text: str, postscript_marker: str) -> bool:
    """A postscript that begins with P.S. or P.P.S, or with another marker."""
    marker = postscript_marker.strip()
    spelt = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(spelt.get(marker, re.escape(marker.lower())), text.lower()) is not None


def has_bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with * or -."""
    found = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    found += re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(found) == num_bullets


def has_constrained_response(text: str) -> bool:
    """One of the three answers that the prompt allows."""
    return any(response in text for response in CONSTRAINED_RESPONSES)


def has_highlights(text: str, num_highlights: int) -> bool:
    """At least so many *highlighted* or **highlighted** parts."""
    found = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    found += [part[2:-2] for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip()) for part in found) >= num_highlights


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections that begin with the splitter and a number."""
    found = re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    return len(found) >= num_sections


def is_json(text: str) -> bool:
    """The whole answer is JSON, in a fence perhaps."""
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """A <<title>>."""
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text))


def has_two_responses(text: str) -> bool:
    """Two different responses with ****** between them."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The answer begins with the request."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def has_end(text: str, end_phrase: str) -> bool:
    """The answer ends with a phrase."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    """Double quotation marks around everything."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def is_capital_english(text: str) -> bool:
    """English, in capitals."""
    return text.isupper() and is_in_language(text, "en")


def is_small_english(text: str) -> bool:
    """English, without capitals."""
    return text.islower() and is_in_language(text, "en")


def has_capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """At least, or fewer than, so many words in capitals."""
    return _holds(count_capital_words(text), capital_relation, capital_frequency)


def lacks_commas(text: str) -> bool:
    """No comma."""
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": has_keywords,
    "keywords:frequency": has_keyword_often,
    "keywords:forbidden_words": lacks_words,
    "keywords:letter_frequency": has_letter_often,
    "language:response_language": is_in_language,
    "length_constraints:number_sentences": has_sentences,
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:number_words": has_words,
    "length_constraints:nth_paragraph_first_word": has_first_word,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": has_bullets,
    "detectable_format:constrained_response": has_constrained_response,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": has_two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": has_end,
    "startend:quotation": is_quoted,
    "change_case:english_capital": is_capital_english,
    "change_case:english_lowercase": is_small_english,
    "change_case:capital_word_frequency": has_capital_words,
    "punctuation:no_comma": lacks_commas,
}


# ---------------------------------------------------------------- strict and loose


def is_followed(answer: str, instruction: str, settings: Mapping[str, Any]) -> bool:
    """Whether one instruction is followed; by an empty answer none is."""
    return bool(answer.strip()) and CHECKS[instruction](answer, **settings)


def loose_versions(answer: str) -> list[str]:
    """The answer as it is, and without its first line, its last, both; each without asterisks."""
    lines = answer.split("\n")
    shortened = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    versions = [answer, *shortened]
    return [*versions, *(version.replace("*", "") for version in versions)]


def judge(answer: str, truth: Sequence[Sequence[Any]]) -> Verdict:
    """Which of the instructions [[id, settings], ...] an answer follows. Errors: UserError."""
    strict = [is_followed(answer, name, settings) for name, settings in truth]
    versions = loose_versions(answer)
    loose = [
        is_strict or any(is_followed(version, name, settings) for version in versions)
        for is_strict, (name, settings) in zip(strict, truth, strict=True)
    ]
    failed = [name for (name, _), is_loose in zip(truth, loose, strict=True) if not is_loose]
    return Verdict(
        {
            "prompt_loose": float(all(loose)),
            "prompt_strict": float(all(strict)),
            "instruction_loose": sum(loose) / len(loose),
            "instruction_strict": sum(strict) / len(strict),
        },
        f"not followed: {', '.join(failed)}" if failed else "all followed",
        num_parts=len(truth),
    )


# ---------------------------------------------------------------- rows


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A row {prompt, instruction_id_list, kwargs}. Errors: BadProblem, for unknown checks too."""
    names, given = field(row, "instruction_id_list", list), row.get("kwargs")
    if not isinstance(given, list) or len(given) != len(names):
        raise BadProblem(f"'kwargs' must be a list of {len(names)} objects, one per instruction.")
    truth = [[name, _settings(name, settings)] for name, settings in zip(names, given, strict=True)]
    shown = "\n".join(
        name + "".join(f" {key}={value!r}" for key, value in settings.items())
        for name, settings in truth
    )
    return Problem(field(row, "prompt"), truth, shown)


def _settings(name: Any, given: Any) -> dict[str, Any]:
    """What one check is told; nulls, which some copies of the data fill in, say nothing."""
    if name not in CHECKS:
        raise BadProblem(f"there is no check for the instruction {name!r}.")
    if not isinstance(given, dict):
        raise BadProblem(f"the settings of {name} are {given!r}, needed an object.")
    settings = {key: value for key, value in given.items() if value is not None}
    needed = [*inspect.signature(CHECKS[name]).parameters][1:]
    if sorted(settings) != sorted(needed):
        raise BadProblem(
            f"{name} is told {', '.join(sorted(settings)) or 'nothing'}, "
            f"needed {', '.join(needed) or 'nothing'}."
        )
    for key, value in settings.items():
        if key.endswith("relation") and value not in RELATIONS:
            raise BadProblem(f"{name}: {key} is {value!r}, needed one of {', '.join(RELATIONS)}.")
        is_count = key.startswith(("num_", "nth_")) or key.endswith("frequency")
        if is_count and not (isinstance(value, int | float) and value == int(value)):
            raise BadProblem(f"{name}: {key} is {value!r}, needed a whole number.")
    return settings
