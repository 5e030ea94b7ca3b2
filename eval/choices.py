"""Questions with options: rows of a data file, or OLMES' request files -> Choice."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.items import Choice, Item
from eval.rows import Row, numbered, rows
from eval.tasks import Task
from olmo_base.run.errors import DataError
from open_instruct.examples import Message

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# OLMES request files hold each question a second time, without its text ("Answer:" alone), to
# measure how likely the options are by themselves; that copy's doc_id is larger by this much.
UNCONDITIONAL_OFFSET = 1_000_000


def read_choices(task: Task, path: Path, examples: Path | None) -> list[Item]:
    """Questions with their options, after the task's instruction and examples.

    Where the rows have categories, so must the examples, and a question is shown those of its own.
    """
    shown = {} if examples is None else _shown_examples(task, examples)
    items: list[Item] = []
    for number, (line, content) in numbered(path):
        row = _choice_row(Row(path, line, content))
        instruction = None
        if task.instruction is not None:
            if "{category}" in task.instruction and row.category is None:
                raise DataError(path, line, f"it has no category, which {task.name} names.")
            words = (row.category or "").replace("_", " ")
            instruction = task.instruction.replace("{category}", words)
        solved: list[tuple[str, str]] = []
        if examples is not None:
            kind = row.category if row.category in shown else None
            if len(shown.get(kind, [])) < task.num_examples:
                raise DataError(
                    examples,
                    None,
                    f"it holds {len(shown.get(kind, []))} examples of the category "
                    f"{row.category}; the task {task.name} shows {task.num_examples}.",
                )
            solved = shown[kind]
        asked = _asked(task, row)
        before = [] if instruction is None else [instruction]
        context = "\n\n".join([*before, *map(" ".join, solved), asked])
        blank = "" if task.apply_chat_template else " "  # an answer's turn begins with its words
        items.append(
            Choice(
                str(number),
                question=row.question,
                contexts=(context,) * len(row.options),
                options=tuple(f"{blank}{option}" for option in _continuations(task, row)),
                gold=row.gold,
                golds=row.golds,
                category=row.category,
                cluster=row.cluster,
                messages=_dialogue(task, instruction, solved, asked),
            )
        )
    return items


def _dialogue(
    task: Task, instruction: str | None, solved: Sequence[tuple[str, str]], asked: str
) -> tuple[Message, ...]:
    """The same as turns, put as lm-eval puts them; none where the task is a plain text."""
    if not task.apply_chat_template:
        return ()
    system = [part for part in (task.system_prompt, instruction) if part is not None]
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": "\n\n".join(system)})
    if task.fewshot_as_multiturn:
        for question, answer in solved:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        solved = ()
    content = "\n\n".join([*map(" ".join, solved), asked])
    return (*messages, {"role": "user", "content": content})


class _ChoiceRow(NamedTuple):
    """A row {"question", "options" or "choices", "gold" or "answer", ...}."""

    question: str
    options: tuple[str, ...]
    gold: int
    category: str | None
    cluster: str | None
    golds: tuple[int, ...] = ()


def _choice_row(row: Row) -> _ChoiceRow:
    """The right option is a number counted from 0, or a letter; a "subject" is a category too.

    TruthfulQA's "mc2_targets" hold {"choices", "labels"}, a label of 1 for each right option.
    """
    if "mc2_targets" in row.row:
        return _many_right(row)
    question = row.get("question", str, "text")
    options = row.texts("choices" if "choices" in row.row else "options", "a list of texts")
    key = "answer" if "gold" not in row.row and "answer" in row.row else "gold"
    needed = "the number of the right option, counted from 0, or its letter"
    gold = row.get(key, (int, str), needed)
    if isinstance(gold, str):
        gold = LETTERS.find(gold) if len(gold) == 1 else -1
    if len(options) < 2:
        row.fail(f"there is {len(options)} option.", "A choice needs at least 2.")
    if len(set(options)) < len(options):
        row.fail("two options are the same.", "Make them differ.")
    if not all(option.strip() for option in options):
        row.fail("an option is empty.", "Nothing is always likely.")
    if not 0 <= gold < len(options):
        row.fail(f"{key!r} is {row.row[key]}.", f"It counts from 0 to {len(options) - 1} here.")
    category = row.text_or_none("category") or row.text_or_none("subject")
    return _ChoiceRow(question, options, gold, category, row.text_or_none("cluster"))


def _many_right(row: Row) -> _ChoiceRow:
    question = row.get("question", str, "text")
    inner = Row(row.path, row.line, row.get("mc2_targets", dict, '{"choices", "labels"}'))
    options = tuple(dict.fromkeys(inner.texts("choices", "a list of texts")))
    labels = inner.get("labels", list, "a list of 0 and 1")
    choices = inner.row["choices"]
    if len(labels) != len(choices) or not {0, 1} >= {*labels} or {*labels} != {0, 1}:
        row.fail("'labels' must be 0 or 1 for each choice, and both must occur.")
    right = {text for text, label in zip(choices, labels, strict=True) if label}
    golds = tuple(number for number, option in enumerate(options) if option in right)
    return _ChoiceRow(question, options, golds[0], row.text_or_none("category"), None, golds)


def _continuations(task: Task, row: _ChoiceRow) -> Sequence[str]:
    return row.options if task.form == "text" else LETTERS[: len(row.options)]


def _asked(task: Task, row: _ChoiceRow) -> str:
    """A question as OLMES writes it (arXiv:2406.08446), up to its answer."""
    listed = ""
    if task.form == "letters":
        pairs = zip(LETTERS, row.options, strict=False)
        listed = "".join(f"\n {letter}. {option}" for letter, option in pairs)
    return f"Question: {row.question}{listed}\nAnswer:"


def _shown_examples(task: Task, path: Path) -> dict[str | None, list[tuple[str, str]]]:
    """The first examples of each category and their answers; of all rows, under None, if none."""
    shown: dict[str | None, list[tuple[str, str]]] = {}
    for line, content in rows(path):
        row = _choice_row(Row(path, line, content))
        of_kind = shown.setdefault(row.category, [])
        if len(of_kind) < task.num_examples:
            of_kind.append((_asked(task, row), _continuations(task, row)[row.gold]))
    return shown


def read_requests(task: Task, path: Path) -> list[Item]:
    """OLMES request files: one row per option, {doc_id, idx, label, request: {context, ...}}."""
    options_of: dict[int, dict[int, tuple[str, str, int, int]]] = {}
    for line, content in rows(path):
        row = Row(path, line, content)
        doc_id = row.get("doc_id", int, "the number of the question")
        index = row.get("idx", int, "the number of the option")
        label = row.get("label", int, "the number of the right option")
        request = row.get("request", dict, '{"context": text, "continuation": text}')
        inner = Row(path, line, request)
        context = inner.get("context", str, "text")
        continuation = inner.get("continuation", str, "text")
        if not continuation:
            row.fail("the continuation is empty.", "Nothing is always likely.")
        options = options_of.setdefault(doc_id, {})
        if index in options:
            row.fail(f"option {index} of question {doc_id} is there a second time.")
        options[index] = (context, continuation, label, line)
    items: list[Item] = []
    for doc_id, options in options_of.items():
        if doc_id >= UNCONDITIONAL_OFFSET and doc_id - UNCONDITIONAL_OFFSET in options_of:
            continue
        last_line = max(line for *_, line in options.values())
        labels = {label for _, _, label, _ in options.values()}
        problem = None
        if sorted(options) != list(range(len(options))):
            problem = f"has the options {sorted(options)}, which do not count up from 0."
        elif len(labels) != 1 or not labels <= options.keys():
            problem = f"has the label {sorted(labels)}, which is not one of its options."
        alone = options_of.get(doc_id + UNCONDITIONAL_OFFSET)
        continuations = [options[index][1] for index in sorted(options)]
        if alone is not None and continuations != [alone[index][1] for index in sorted(alone)]:
            problem = "has other options than its copy without the question."
        if problem is not None:
            raise DataError(path, last_line, f"question {doc_id} {problem}")
        alone_contexts = None
        if alone is not None:
            alone_contexts = tuple(alone[index][0] for index in sorted(alone))
        items.append(
            Choice(
                str(doc_id),
                question=_last_question(options[min(labels)][0]),
                contexts=tuple(options[index][0] for index in sorted(options)),
                options=tuple(continuations),
                gold=labels.pop(),
                unconditional_contexts=alone_contexts,
                cluster=_passage(options[0][0]) if task.cluster_by == "passage" else None,
            )
        )
    return items


def _passage(context: str) -> str | None:
    """A short name for what stands before the question itself, in its own paragraph."""
    passage = _last_question(context).rpartition("\nQuestion:")[0]
    return hashlib.sha256(passage.encode()).hexdigest()[:16] if passage else None


def _last_question(context: str) -> str:
    """The question at the end of a prompt that may begin with examples."""
    last = context.rpartition("\n\n")[2]
    return last.removeprefix("Question: ").removesuffix("\nAnswer:")
