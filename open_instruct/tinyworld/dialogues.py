"""Dialogues for SFT and preference pairs for DPO.

The dialogues are noisy on purpose, as dialogues written by people are: `noise_share` of those
with an instruction on the form of the answer ignore it (a whole sentence where one word was
asked for, lower case for capitals, rambling). SFT then learns to answer, but follows such
instructions only partly, and DPO has something real to teach.
"""

import random

from open_instruct.tinyworld.questions import FORMS, Asked, ask_fact, ask_form, ask_skill
from open_instruct.tinyworld.world import World

TASK_WEIGHTS = {
    "recall": 28.0,
    "arithmetic": 16.0,
    "sort": 9.0,
    "reverse": 7.0,
    "copy": 6.0,
    "compare": 8.0,
    "format": 26.0,
}


def ask_anything(rng: random.Random, world: World, task: str) -> Asked:
    if task == "recall":
        return ask_fact(rng, world, rng.choice(world.taught_facts))
    if task == "format":
        return ask_form(rng, world, rng.choice(FORMS))
    return ask_skill(rng, task)


def dialogues(rng: random.Random, world: World, number: int, noise_share: float) -> list[dict]:
    """`number` rows `{"messages": [...]}` of one to three questions each."""
    rows = []
    for _ in range(number):
        messages = []
        for _ in range(rng.choices((1, 2, 3), (80, 14, 6))[0]):
            task = rng.choices(tuple(TASK_WEIGHTS), tuple(TASK_WEIGHTS.values()))[0]
            asked = ask_anything(rng, world, task)
            is_noisy = task == "format" and rng.random() < noise_share
            answer = rng.choice(asked.ignoring) if is_noisy else asked.answer
            messages += [_user(asked.prompt), _assistant(answer)]
        rows.append({"messages": messages})
    return rows


def pairs(rng: random.Random, world: World, number: int, format_share: float) -> list[dict]:
    """`number` rows `{"prompt", "chosen", "rejected"}`; what is chosen is always right."""
    weights = {**TASK_WEIGHTS, "format": 0.0}
    scale = (1 - format_share) / sum(weights.values())
    weights = {name: weight * scale for name, weight in weights.items()}
    weights["format"] = format_share
    rows = []
    for _ in range(number):
        task = rng.choices(tuple(weights), tuple(weights.values()))[0]
        asked = ask_anything(rng, world, task)
        # The rejected answer mostly ignores the instruction, or rambles where there was none; a
        # wrong one teaches little that the text has not, and unsettles what is known.
        is_ignoring = rng.random() < 0.9
        rejected = rng.choice(asked.ignoring if is_ignoring else asked.wrong)
        if rejected == asked.answer:
            rejected = asked.ignoring[-1]
        rows.append(
            {
                "prompt": [_user(asked.prompt)],
                "chosen": [_assistant(asked.answer)],
                "rejected": [_assistant(rejected)],
            }
        )
    return rows


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}
