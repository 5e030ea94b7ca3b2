"""The evaluation tasks: questions that no dialogue and no preference pair asks."""

import random

from open_instruct.tinyworld.questions import FORMS, ask_form, ask_skill
from open_instruct.tinyworld.world import World


def recall_rows(rng: random.Random, world: World, number: int) -> list[dict]:
    """Questions about held-out facts, told apart by whether training asks about the subject."""
    asked = [(fact, question) for fact in world.held_out_facts for question in fact.questions]
    return [
        {
            "prompt": question,
            "answer": fact.value,
            "category": f"{fact.attribute}, "
            + ("new person" if fact.subject in world.new_people else "new combination"),
        }
        for fact, question in rng.sample(asked, min(number, len(asked)))
    ]


def choice_rows(rng: random.Random, world: World, number: int) -> list[dict]:
    """The same facts with four options, to be scored by likelihood."""
    rows = []
    facts = world.held_out_facts
    for i in range(number):
        fact = facts[i % len(facts)]
        others = [value for value in world.values[fact.attribute] if value != fact.value]
        options = [fact.value, *rng.sample(others, 3)]
        rng.shuffle(options)
        rows.append(
            {
                "question": fact.questions[(i // len(facts)) % len(fact.questions)],
                "options": options,
                "gold": options.index(fact.value),
            }
        )
    return rows


def skill_rows(rng: random.Random, name: str, number: int) -> list[dict]:
    rows: dict[str, dict] = {}
    while len(rows) < number:
        asked = ask_skill(rng, name, reserved=True)
        rows[asked.prompt] = _row(asked)
    return list(rows.values())


def format_rows(rng: random.Random, world: World, number: int) -> list[dict]:
    """The same number of questions for every form of answer."""
    rows: dict[str, dict] = {}
    while len(rows) < number:
        asked = ask_form(rng, world, FORMS[len(rows) % len(FORMS)], reserved=True)
        rows[asked.prompt] = _row(asked)
    return list(rows.values())


def _row(asked) -> dict:
    return {"prompt": asked.prompt, "answer": asked.answer, "category": asked.category}
