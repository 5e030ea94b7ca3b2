"""Questions about facts and skills, and instructions on the form of the answer.

`Asked` is one question with its right answer and the ways people get it wrong. Dialogues,
preference pairs and evaluation tasks are all made from it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from open_instruct.tinyworld.skills import SKILLS, WORDS, Problem, is_reserved
from open_instruct.tinyworld.world import Fact, World


@dataclass(frozen=True)
class Asked:
    prompt: str
    answer: str  # right, short, in the form that was asked for
    ignoring: tuple[str, ...]  # right in content, but not in the form that was asked for
    wrong: tuple[str, ...]  # in the right form, but wrong
    category: str


def rambling(sentence: str) -> tuple[str, ...]:
    """Ways to wrap a full sentence in words nobody asked for."""
    return (
        f"That is a good question. {sentence}",
        f"Let me think about it. {sentence}",
    )


def ask_fact(rng: random.Random, world: World, fact: Fact) -> Asked:
    others = [value for value in world.values[fact.attribute] if value != fact.value]
    return Asked(
        prompt=rng.choice(fact.questions),
        answer=fact.value,
        ignoring=rambling(fact.sentence),
        wrong=tuple(rng.sample(others, 3)),
        category=fact.attribute,
    )


def ask_skill(rng: random.Random, name: str, reserved: bool = False) -> Asked:
    problem: Problem = SKILLS[name](rng, reserved)
    return Asked(
        prompt=rng.choice(problem.questions),
        answer=problem.answer,
        ignoring=rambling(problem.sentence),
        wrong=problem.wrong,
        category=problem.category,
    )


# ----- instructions on the form of the answer


@dataclass(frozen=True)
class Form:
    """An instruction and what it makes of (short answer, full sentence)."""

    instructions: tuple[str, ...]
    shape: Callable[[str, str], str]


FACT_FORMS = {
    "one word": Form(
        ("Answer in one word.", "Use one word only.", "Reply with a single word."),
        lambda answer, sentence: answer,
    ),
    "capitals": Form(
        ("Answer in capitals.", "Use capital letters.", "Reply in capital letters."),
        lambda answer, sentence: answer.upper(),
    ),
    "sentence": Form(
        ("Answer in a full sentence.", "Use a whole sentence.", "Reply with a full sentence."),
        lambda answer, sentence: sentence,
    ),
    "twice": Form(
        ("Say the answer twice.", "Give the answer two times."),
        lambda answer, sentence: f"{answer} {answer}",
    ),
    "opening": Form(
        ("Start with my answer is.", "Begin with the words my answer is."),
        lambda answer, sentence: f"my answer is {answer}",
    ),
}


def _with_instruction(rng: random.Random, question: str, form: Form) -> str:
    instruction = rng.choice(form.instructions)
    return rng.choice((f"{question} {instruction}", f"{instruction} {question}"))


def ask_in_form(rng: random.Random, world: World, name: str, fact: Fact) -> Asked:
    """A question about a fact, with an instruction on the form of the answer."""
    form = FACT_FORMS[name]
    plain = ask_fact(rng, world, fact)
    answer = form.shape(fact.value, fact.sentence)
    return Asked(
        prompt=_with_instruction(rng, plain.prompt, form),
        answer=answer,
        ignoring=plain.ignoring,
        wrong=tuple(
            form.shape(value, Fact(fact.subject, fact.attribute, value).sentence)
            for value in plain.wrong
        ),
        category=name,
    )


def ask_first_three(rng: random.Random) -> Asked:
    words = rng.sample(WORDS, rng.randint(4, 6))
    listed = " ".join(words)
    three = words[:3]
    return Asked(
        prompt=rng.choice(
            (
                f"List the first three of these words: {listed}",
                f"Name only the first three words: {listed}",
            )
        ),
        answer=" ".join(three),
        ignoring=rambling(f"The words are {listed}."),
        wrong=(" ".join(words[-3:]), " ".join(rng.sample(words, 3))),
        category="list three",
    )


FORMS = (*FACT_FORMS, "list three")


def ask_form(rng: random.Random, world: World, name: str, reserved: bool = False) -> Asked:
    """A question whose answer has to have a certain form.

    The facts are those that training asks about too: this measures whether the instruction is
    followed, not whether the fact is known. `reserved` chooses prompts of the evaluation.
    """
    while True:
        if name == "list three":
            asked = ask_first_three(rng)
        else:
            asked = ask_in_form(rng, world, name, rng.choice(world.taught_facts))
        if is_reserved(asked.prompt) == reserved:
            return asked
