"""Pretraining text: the world and its skills stated in sentences, lists and notes, never as chat.

Knowledge that is to be asked for later must be stated in many wordings and in both orders, the
subject before the value and the value before the subject: a model that has read each fact in one
wording only can recite it but not use it (arXiv:2309.14316).
"""

import random
from collections.abc import Callable, Sequence

from open_instruct.tinyworld.questions import FACT_FORMS, rambling
from open_instruct.tinyworld.skills import SKILLS, Problem
from open_instruct.tinyworld.world import (
    ATTRIBUTES,
    LETTERS,
    NUMERALS,
    THINGS,
    TOWNS,
    World,
)

PLACES = ("market", "bridge", "station", "garden", "harbour", "square")


def biography(rng: random.Random, world: World) -> str:
    """Everything about one person, in a random order and wording."""
    person = rng.choice(world.people)
    facts = world.about(person)
    rng.shuffle(facts)
    sentences = []
    for i, fact in enumerate(facts):
        attribute = ATTRIBUTES[fact.attribute]
        named = i == 0 or rng.random() < 0.7
        sentences.append(
            fact.fill(rng.choice(attribute.statements if named else attribute.continuations))
        )
    return " ".join(sentences)


def single_facts(rng: random.Random, world: World) -> str:
    """A few unrelated facts, each naming its subject."""
    facts = rng.choices(tuple(world.facts.values()), k=5)
    return " ".join(fact.fill(rng.choice(ATTRIBUTES[fact.attribute].statements)) for fact in facts)


def description(rng: random.Random, world: World) -> str:
    """Towns and things."""
    sentences = []
    for subject in rng.sample((*TOWNS, *THINGS), 2):
        for i, fact in enumerate(world.about(subject)):
            attribute = ATTRIBUTES[fact.attribute]
            named = i == 0 or rng.random() < 0.7
            sentences.append(
                fact.fill(rng.choice(attribute.statements if named else attribute.continuations))
            )
    return " ".join(sentences)


def meeting(rng: random.Random, world: World) -> str:
    """Two people meet; relative clauses say who they are."""
    one, two = rng.sample(world.people, 2)

    def described(person: str) -> str:
        fact = rng.choice(world.about(person))
        return f"{person}, {fact.fill(ATTRIBUTES[fact.attribute].clause)},"

    def told(person: str) -> str:
        fact = rng.choice(world.about(person))
        return fact.fill(rng.choice(ATTRIBUTES[fact.attribute].statements))

    return (
        f"{described(one)} met {described(two)} at the {rng.choice(PLACES)}. "
        f"{told(one)} {told(two)} {told(one)} {told(two)}"
    )


def person_notes(rng: random.Random, world: World) -> str:
    """A note about one subject: a title, then what is known, one item a line."""
    person = rng.choice(world.people)
    facts = world.about(person)
    rng.shuffle(facts)
    return "\n".join(
        line
        for fact in facts
        for line in (f"{ATTRIBUTES[fact.attribute].title} of {person}", fact.value)
    )


def list_notes(rng: random.Random, world: World) -> str:
    """A list of one attribute over several subjects, name and value on lines of their own."""
    name = rng.choice(tuple(ATTRIBUTES))
    facts = [fact for fact in world.facts.values() if fact.attribute == name]
    lines = [ATTRIBUTES[name].title]
    for fact in rng.sample(facts, 5):
        lines += [fact.subject, fact.value]
    return "\n".join(lines)


def skill_sentences(rng: random.Random, problems: Callable[[random.Random], Problem]) -> str:
    return "\n".join(rng.choice(problems(rng).statements) for _ in range(8))


def counting(rng: random.Random, world: World) -> str:
    start = rng.randrange(90)
    words = NUMERALS[start : start + rng.randint(6, 10)]
    if rng.random() < 0.3:
        words = words[::-1]
        return "counting down\n" + " ".join(words)
    return "counting\n" + " ".join(words)


def alphabet(rng: random.Random, world: World) -> str:
    start = rng.randrange(16)
    return "the alphabet\n" + " ".join(LETTERS[start : start + rng.randint(6, 26)])


def capitals(rng: random.Random, world: World) -> str:
    """Words next to the same words in capitals."""
    values = [value for values in world.values.values() for value in values]
    return "\n".join(
        rng.choice((f"{word} in capitals is {word.upper()}", f"{word}\n{word.upper()}"))
        for word in rng.sample(values, 6)
    )


def phrase_book(rng: random.Random, world: World) -> str:
    """How people put questions and requests, without a single answer."""
    attribute = rng.choice(tuple(ATTRIBUTES.values()))
    lines = [f"asking for the {attribute.title}"]
    lines += [question.format(name="somebody") for question in attribute.questions]
    form = rng.choice(tuple(FACT_FORMS.values()))
    lines += ["asking for a form", *form.instructions]
    skill = SKILLS[rng.choice(tuple(SKILLS))](rng)
    lines += ["asking for work", *(question.split(":")[0] for question in skill.questions)]
    lines += ["polite people say", *rambling("So it is.")]
    return "\n".join(lines)


# How often each kind of document is drawn. Tuned on the tokens each kind costs and the accuracy
# it buys: docs/decisions has the figures.
KINDS: dict[Callable[[random.Random, World], str], float] = {
    biography: 16,
    single_facts: 6,
    meeting: 6,
    person_notes: 8,
    description: 8,
    list_notes: 5,
    counting: 1,
    alphabet: 1,
    capitals: 4,
    phrase_book: 1.5,
}
SKILL_WEIGHTS = {"arithmetic": 13.0, "compare": 5.0, "sort": 8.0, "reverse": 11.0, "copy": 9.0}


def documents(
    rng: random.Random, world: World, number: int, but_not: Sequence[dict] = ()
) -> list[dict]:
    """`number` rows `{"text"}`, the kinds of documents mixed, none of them a row of `but_not`."""
    kinds: list[tuple[Callable, object]] = [(kind, world) for kind in KINDS]
    kinds += [(skill_sentences, SKILLS[name]) for name in SKILL_WEIGHTS]
    weights = (*KINDS.values(), *SKILL_WEIGHTS.values())
    known = {row["text"] for row in but_not}
    rows: list[dict] = []
    while len(rows) < number:
        drawn = rng.choices(kinds, weights, k=number - len(rows))
        texts = [kind(rng, material) for kind, material in drawn]
        rows += [{"text": text} for text in texts if text not in known]
    return rows
