"""Each of IFEval's 25 checks passing and failing, strict and loose, and lm-eval's own verdicts."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from olmo_base.run.errors import UserError
from open_instruct.verifiers import ifeval
from open_instruct.verifiers.ifeval import (
    CHECKS,
    count_capital_words,
    count_sentences,
    is_followed,
    judge,
    language_of,
    loose_versions,
    read_problem,
)
from open_instruct.verifiers.verdict import BadProblem

DATA = Path(__file__).parents[4] / "shared" / "data" / "verifiable" / "ifeval.jsonl"
HAS_LANGDETECT = importlib.util.find_spec("langdetect") is not None
needs_langdetect = pytest.mark.skipif(not HAS_LANGDETECT, reason="langdetect is not installed")
TELLS_LANGUAGE = (
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
)
ENGLISH = "the boat came into the harbour late in the evening, and everybody was glad to see it"
# instruction, settings, an answer that follows, an answer that does not
EXAMPLES = [
    ("keywords:existence", {"keywords": ["sun", "Sea"]}, "Sunny seas.", "The sun."),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "at least"},
        "Sea, seaside.",
        "One sea.",
    ),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "less than"},
        "One sea.",
        "Sea, sea.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["can"]}, "A candle.", "You can."),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
        "Even she.",
        "See.",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "at least"},
        "Oh! Oh!",
        "aeiou aeiou!",
    ),
    (
        "language:response_language",
        {"language": "de"},
        "Das Boot kam am Abend in den Hafen und alle freuten sich darüber.",
        ENGLISH,
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One. Two! Three?",
        "Dr. Who came at 3.5 p.m. today. He left.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One\n***\nTwo",
        "One\n\nTwo",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "three words here",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "boat"},
        'One.\n\n"Boat," he said.',
        "Boat.\n\nTwo.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\np. s. y", "PS y"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x P.P.S y", "P.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSection 2\nb",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', 'Here: {"a": 1}'),
    ("detectable_format:title", {}, "<<Boats>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all?"},
        'So: "is that all?"',
        "Is that all? No",
    ),
    ("startend:quotation", {}, ' "all of it" ', '"some" of it'),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.title()),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BOAT-HOUSE",
        "A Boat",
    ),
    ("punctuation:no_comma", {}, "No; none.", "One, two."),
]


def test_there_is_an_example_of_every_check():
    assert {name for name, *_ in EXAMPLES} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(("name", "settings", "follows", "fails"), EXAMPLES)
def test_every_check_passes_and_fails(name, settings, follows, fails):
    if name in TELLS_LANGUAGE and not HAS_LANGDETECT:
        pytest.skip("langdetect is not installed")
    assert is_followed(follows, name, settings)
    assert not is_followed(fails, name, settings)
    assert not is_followed(" \n", name, settings)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two.", 2),
        ("Mr. Smith met Dr. J. Doe of the U.S. Navy. They talked.", 2),
        ("It costs 3.50 dollars, e.g. at shop 5! Really?", 2),
        ("Wait... what? Yes.", 2),
        ("Wait... What? Yes.", 3),
        ('He said "No." Then he left.', 2),
        ("First line\nsecond line", 1),
        ("I saw what I saw, and so did I. You too.", 2),
    ],
)
def test_sentences_are_counted(text, number):
    assert count_sentences(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I AM here", 2),
        ("DON'T", 2),
        ("NASA, (ESA); JAXA!", 3),
        ("COVID-19 and 3D", 2),
        ('**BOLD** and "QUOTED"', 2),
        ("Not One", 0),
        ("42 7", 0),
    ],
)
def test_words_in_capitals_are_counted(text, number):
    assert count_capital_words(text) == number


def test_words_in_capitals_are_those_of_nltks_word_tokenizer():
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    pieces = (
        "I AM, a BOAT! NASA's X-RAY (USA) \"GO\" don't DON'T CAN'T 3D A/B U.S. ok: YES: no; WHY? "
        "**BOLD** #TAG E-MAIL R&D 10:30AM WAIT... I'LL WE'RE CANNOT C++ 100% $5 — A.B.C <TAG>"
    ).split()
    chance = random.Random(0)
    for _ in range(300):
        text = " ".join(chance.choices(pieces, k=8))
        expected = sum(token.isupper() for token in tokenizer.tokenize(text))
        assert count_capital_words(text) == expected, text


# ---------------------------------------------------------------- strict and loose


def test_loose_versions_leave_out_lines_and_asterisks():
    assert loose_versions("Sure:\n*a*\nBye") == [
        "Sure:\n*a*\nBye",
        "*a*\nBye",
        "Sure:\n*a*",
        "*a*",
        "Sure:\na\nBye",
        "a\nBye",
        "Sure:\na",
        "a",
    ]


def test_prompt_level_needs_all_instructions_and_instruction_level_counts_them():
    truth = [
        ["punctuation:no_comma", {}],
        ["startend:quotation", {}],
        ["detectable_format:title", {}],
    ]
    verdict = judge('Sure, here:\n"<<Boats>> sail"', truth)
    assert verdict.num_parts == 3
    assert verdict.scores == {
        "prompt_loose": 1.0,
        "prompt_strict": 0.0,
        "instruction_loose": 1.0,
        "instruction_strict": pytest.approx(1 / 3),
    }
    assert verdict.found == "all followed"
    assert judge("", truth).scores == dict.fromkeys(verdict.scores, 0.0)
    assert "startend:quotation" in judge("x", truth).found


@needs_langdetect
def test_a_language_is_told_the_same_every_time():
    text = "Boot boat bateau"
    assert len({language_of(text) for _ in range(20)}) == 1
    assert language_of("123 !") is None


def test_without_langdetect_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'open-instruct\[ifeval\]'"):
        ifeval.check_ready()
    with pytest.raises(UserError, match="langdetect"):
        is_followed("x", "language:response_language", {"language": "de"})


# ---------------------------------------------------------------- rows


def rows() -> list[dict]:
    if not DATA.is_file():
        pytest.skip("the shared data is not here")
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_of_the_data_set_has_its_checks():
    problems = [read_problem(row) for row in rows()]
    assert len(problems) == 541
    assert sum(len(problem.truth) for problem in problems) == 834  # the paper's count
    assert {name for problem in problems for name, _ in problem.truth} == set(CHECKS)


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        (["punctuation:no_dot"], [{}], "no check for the instruction 'punctuation:no_dot'"),
        (["punctuation:no_comma"], [], "list of 1 objects"),
        (["punctuation:no_comma"], [{"x": 1}], "is told x, needed nothing"),
        (["detectable_format:title"], [3], "needed an object"),
        (["detectable_format:number_bullet_lists"], [{}], "told nothing, needed num_bullets"),
        (
            ["detectable_format:number_bullet_lists"],
            [{"num_bullets": "3"}],
            "num_bullets is '3', needed a whole number",
        ),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3, "relation": "about"}],
            "relation is 'about', needed one of at least, less than",
        ),
    ],
)
def test_a_row_with_unknown_or_incomplete_instructions_is_refused(names, settings, problem):
    row = {"prompt": "p", "instruction_id_list": names, "kwargs": settings}
    with pytest.raises(BadProblem, match=problem):
        read_problem(row)


def test_nulls_in_the_settings_say_nothing():
    row = {
        "prompt": "p",
        "instruction_id_list": ["detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": 3, "letter": None}],
    }
    assert read_problem(row).truth == [
        ["detectable_format:number_bullet_lists", {"num_bullets": 3}]
    ]


# ---------------------------------------------------------------- lm-eval as the oracle


@pytest.fixture(scope="module")
def lm_eval_ifeval():
    """lm-eval's own checks. Punkt's data is not needed for what is compared here."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    download, find = nltk.download, nltk.data.find
    nltk.download = nltk.data.find = lambda *arguments: True  # else it looks for a network
    try:
        from lm_eval.tasks.ifeval import utils
    finally:
        nltk.download, nltk.data.find = download, find
    import langdetect

    langdetect.DetectorFactory.seed = 0
    return utils


# Sentences and words are told by data that lm-eval downloads; characters that are no letters are
# replaced by a random letter there.
NOT_COMPARED = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


def pieces_of_answers(chance: random.Random, row: dict) -> str:
    """An answer that follows some instructions by accident."""
    texts = [
        ENGLISH,
        ENGLISH.upper(),
        row["prompt"],
        "* a point\n* another\n- third",
        "*one* **two** *three*",
        "[name] [address] [x]",
        "<<A title>>",
        "P.S. more",
        "P.P.S and more",
        "******",
        "***",
        '{"a": 1}',
        "Section 1\nSECTION 2\nDay 3 PARAGRAPH 4",
        "My answer is maybe.",
        "Das ist ein deutscher Satz, der etwas länger ist.",
    ]
    for settings in row["kwargs"]:
        for value in settings.values():
            texts += value if isinstance(value, list) else [str(value)]
            if isinstance(value, str):
                texts.append(value)
    answer = chance.choice(["\n", "\n\n", " "]).join(chance.choices(texts, k=chance.randint(1, 9)))
    return chance.choice(["{}", '"{}"', "Sure!\n{}", "```json\n{}\n```"]).replace("{}", answer)


def test_verdicts_are_those_of_lm_eval(lm_eval_ifeval):
    chance = random.Random(1)
    num_compared, num_followed = 0, 0
    cases: list[dict] = [
        {"prompt": f"p{number}", "instruction_id_list": [name], "kwargs": [settings]}
        for number, (name, settings, *_) in enumerate(EXAMPLES)
    ] * 8
    answers = [
        *(example[2] for example in EXAMPLES),
        *(example[3] for example in EXAMPLES),
        *(None for _ in range(len(cases) - 2 * len(EXAMPLES))),
    ]
    if DATA.is_file():
        cases += chance.sample(rows(), 150)
        answers += [None] * 150
    for case, given in zip(cases, answers, strict=True):
        kept = [
            (name, settings)
            for name, settings in zip(case["instruction_id_list"], case["kwargs"], strict=True)
            if name not in NOT_COMPARED and str(settings.get("letter", "a")).isalpha()
        ]
        if not kept:
            continue
        row = {
            "key": 0,
            "prompt": case["prompt"],
            "instruction_id_list": [name for name, _ in kept],
            "kwargs": [settings for _, settings in kept],
        }
        answer = pieces_of_answers(chance, row) if given is None else given
        theirs = lm_eval_ifeval.process_results(row, [answer])
        verdict = judge(answer, read_problem(row).truth)
        expected = {
            "prompt_strict": float(theirs["prompt_level_strict_acc"]),
            "prompt_loose": float(theirs["prompt_level_loose_acc"]),
            "instruction_strict": sum(theirs["inst_level_strict_acc"]) / len(kept),
            "instruction_loose": sum(theirs["inst_level_loose_acc"]) / len(kept),
        }
        assert verdict.scores == pytest.approx(expected), (row, answer)
        num_compared += len(kept)
        num_followed += sum(theirs["inst_level_strict_acc"])
    assert num_compared >= 200
    assert 0.1 < num_followed / num_compared < 0.9
