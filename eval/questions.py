"""A task's data file -> its questions. A row that cannot be used is an error with file and line."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from eval.choices import UNCONDITIONAL_OFFSET, read_choices, read_requests
from eval.hub import fetch
from eval.items import Choice, Document, Item, Question
from eval.rows import Row, named, numbered, rows
from eval.tasks import Task
from olmo_base.corpus.documents import DocumentSource, DocumentStream
from olmo_base.run.errors import DataError, UserError
from open_instruct.examples import Message
from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.verdict import BadProblem, Problem

ROLES = ("system", "user", "assistant")


def data_file(task: Task, data_dir: str | None) -> Path:
    """Where a task's questions are. Errors: UserError that says what is there instead."""
    return _file(task, task.file, data_dir, task.hub)


def examples_file(task: Task, data_dir: str | None) -> Path | None:
    """Where the examples before its questions are, if it has any. Errors: UserError."""
    if task.examples_file is None:
        return None
    return _file(task, task.examples_file, data_dir, task.hub_examples)


def _file(task: Task, name: str, data_dir: str | None, hub: str | None) -> Path:
    """A file of data_dir, fetched from the hub if it is missing and the task says from where."""
    path = Path(name)
    if not path.is_absolute():
        if data_dir is None:
            raise UserError(
                f"The task {task.name} reads {name} from a folder of data. "
                "Say which folder with data_dir (--data-dir)."
            )
        if not Path(data_dir).is_dir():
            raise UserError(
                f"data_dir {data_dir} is not a folder; the task {task.name} reads {name} "
                "from it. Say where the data is with data_dir (--data-dir)."
            )
        path = Path(data_dir) / path
    problem = ""
    if not path.is_file() and hub is not None:
        try:
            fetch(hub, path)
        except UserError as error:
            problem = f" {error}"
    if not path.is_file():
        found = sorted(file.name for file in path.parent.glob("*.json*"))
        listed = f" That folder holds {', '.join(found[:8])}." if found else ""
        raise UserError(
            f"{path} does not exist; the task {task.name} asks its questions from it.{listed}"
            f"{problem} Check data_dir."
        )
    return path


def read_items(
    task: Task,
    path: Path,
    examples: Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 42,
) -> list[Item]:
    """The questions of a task in the file's order; ``limit`` draws that many of them at random.

    ``examples``: the file of solved problems for tasks that show some. Errors: DataError naming
    file and line.
    """
    if task.kind == "verified":
        items = _read_problems(task, path, {} if examples is None else _read_turns(task, examples))
    elif task.kind == "multiple_choice":
        items = read_choices(task, path, examples)
    elif task.kind == "requests":
        items = read_requests(task, path)
    elif task.kind == "judged":
        items = _read_judged(task, path)
    else:
        items = READERS[task.kind](path)
    if task.main_metric == "acc_uncond":
        bare = [i for i in items if isinstance(i, Choice) and i.unconditional_contexts is None]
        if bare:
            raise DataError(
                path,
                None,
                f"question {bare[0].doc_id} has no second copy without its text (doc_id + "
                f"{UNCONDITIONAL_OFFSET:,}), and {task.name} is judged against that (acc_uncond).",
                "Choose another metric, or the file with both copies.",
            )
    return drawn(items, limit, seed)


def drawn(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """So many of the items, by chance and in their order; all of them without a limit."""
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in chosen]


# ---------------------------------------------------------------- each kind


def _read_questions(path: Path) -> list[Item]:
    """Rows {"prompt": text} or {"messages": [...]}, with "answer": text or a list of texts.

    "category" sorts questions in the report; those of one "cluster" (a passage) count as related.
    """
    return [_question(Row(path, line, row), number) for number, (line, row) in numbered(path)]


def _messages(row: Row) -> tuple[Message, ...]:
    """The dialogue that a row asks to go on, its last turn the user's."""
    if "messages" in row.row:
        needed = "a list of {role, content} that ends with the user's turn"
        messages = row.get("messages", list, needed)
        for turn in messages:
            is_turn = isinstance(turn, dict) and isinstance(turn.get("content"), str)
            if not is_turn or turn.get("role") not in ROLES:
                row.fail(f"'messages' holds {named(turn)}.", f"Needed: {needed}; roles {ROLES}.")
        if not messages or messages[-1]["role"] != "user":
            row.fail("the last message is not the user's.", f"Needed: {needed}.")
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    else:
        messages = [
            {"role": "user", "content": row.get("prompt", str, "a question, or 'messages'")}
        ]
    if not messages[-1]["content"].strip():
        row.fail("the question is empty.", "Write it, or remove the row.")
    return tuple(messages)


def _question(row: Row, number: int) -> Question:
    messages = _messages(row)
    answer = row.get("answer", (str, list), "the answer, or a list of accepted answers")
    targets = (answer,) if isinstance(answer, str) else row.texts("answer", "texts")
    if not all(target.strip() for target in targets):
        row.fail("an accepted answer is empty.", "Every model that says nothing would be right.")
    return Question(
        str(number),
        messages,
        targets,
        row.text_or_none("category"),
        row.text_or_none("cluster"),
    )


def _read_judged(task: Task, path: Path) -> list[Item]:
    """Rows of {"prompt" or "instruction": text} or {"messages": [...]}.

    Where a judge compares, "reference" or "output" is the answer that others are compared with, as
    in AlpacaEval's file. "category" or "dataset" sorts questions in the report.
    """
    items: list[Item] = []
    for number, (line, content) in numbered(path):
        for key, other in (("prompt", "instruction"), ("reference", "output")):
            if key not in content and other in content:
                content[key] = content[other]
        row = Row(path, line, content)
        references: tuple[str, ...] = ()
        if task.rubric == "better":
            reference = row.get("reference", str, "the answer to compare with, or 'output'")
            if not reference.strip():
                row.fail("the reference answer is empty.", "Write it, or remove the row.")
            references = (reference,)
        category = row.text_or_none("category" if "category" in content else "dataset")
        items.append(Question(str(number), _messages(row), references, category))
    if not items:
        raise DataError(path, None, "the file holds no question.")
    return items


def _problems(task: Task, path: Path) -> Iterator[Problem]:
    """The rows of a verifier's data set."""
    assert task.verifier is not None
    for line, content in rows(path):
        try:
            problem = VERIFIERS[task.verifier].read_problem(content)
            json.dumps(dataclasses.asdict(problem), ensure_ascii=False).encode()
        except BadProblem as error:
            next_step = f"The verifier {task.verifier} reads this file."
            raise DataError(path, line, str(error), next_step) from None
        except UnicodeEncodeError:
            raise DataError(path, line, "it holds half a surrogate pair.", "Mend it.") from None
        yield problem


def _read_problems(task: Task, path: Path, turns: dict[str | None, list[Message]]) -> list[Item]:
    """The problems, each after the examples: those of its category, if the task says so."""
    items: list[Item] = []
    for number, problem in enumerate(_problems(task, path)):
        kind = problem.category if task.examples_by_category else None
        if turns and kind not in turns:
            raise DataError(
                path,
                None,
                f"problem {number} is of the category {kind}; the examples are of "
                f"{', '.join(map(str, turns))}.",
                "Give examples of each category.",
            )
        asked: Message = {"role": "user", "content": problem.prompt}
        items.append(
            Question(
                str(number),
                (*turns.get(kind, ()), asked),
                (problem.shown_truth,),
                problem.category,
                truth=problem.truth,
                cluster=problem.cluster,
            )
        )
    if not items:
        raise DataError(path, None, "the file holds no problem.")
    return items


def _read_turns(task: Task, path: Path) -> dict[str | None, list[Message]]:
    """The first problems of each category with their solutions, as turns of a dialogue.

    Unless the task shows each question those of its category, there is one, called None.
    """
    problems: dict[str | None, list[Problem]] = {}
    for problem in _problems(task, path):
        of_kind = problems.setdefault(problem.category if task.examples_by_category else None, [])
        if len(of_kind) < task.num_examples:
            of_kind.append(problem)
        elif not task.examples_by_category:
            break
    turns: dict[str | None, list[Message]] = {}
    for kind, of_kind in (problems or {None: []}).items():
        if len(of_kind) < task.num_examples:
            named = "" if kind is None else f" of the category {kind}"
            raise DataError(
                path,
                None,
                f"it holds {len(of_kind)} problems{named}; the task {task.name} shows "
                f"{task.num_examples}.",
            )
        turns[kind] = []
        for number, problem in enumerate(of_kind, start=1):
            if problem.solution is None:
                raise DataError(path, None, f"example {number} has no worked solution.")
            turns[kind].append({"role": "user", "content": problem.prompt})
            turns[kind].append({"role": "assistant", "content": problem.solution})
    return turns


def _read_documents(path: Path) -> list[Item]:
    """Text files, or JSON lines with the key "text"."""
    documents = DocumentStream([DocumentSource(str(path))])
    items: list[Item] = [
        Document(str(number), document.text) for number, document in enumerate(documents)
    ]
    if not items:
        raise DataError(path, None, "no document has any text.")
    return items


READERS = {
    "exact_match": _read_questions,
    "perplexity": _read_documents,
}
