"""A task's data file -> its questions. A row that cannot be used is an error with file and line."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from eval.hub import fetch
from eval.tasks import Task
from olmo_base.corpus.documents import DocumentSource, DocumentStream
from olmo_base.run.errors import DataError, UserError
from open_instruct.examples import BadRow, Message, read_rows
from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.verdict import BadProblem, Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = ("system", "user", "assistant")
# OLMES request files hold each question a second time, without its text ("Answer:" alone), to
# measure how likely the options are by themselves; that copy's doc_id is larger by this much.
UNCONDITIONAL_OFFSET = 1_000_000
# A document is judged in blocks, so that one long document too has a standard error, and so that
# models with different tokenizers are compared on the same pieces of text.
BLOCK_CHARACTERS = 4000


@dataclass(frozen=True)
class Question:
    """To be answered in words."""

    doc_id: str
    messages: tuple[Message, ...]  # the last one is the user's
    targets: tuple[str, ...]  # accepted answers
    category: str | None = None
    cluster: str | None = None  # what it shares with other questions: their passage, say
    truth: Any = None  # what a verifier compares the answer with


@dataclass(frozen=True)
class Choice:
    """To be answered by the likeliest of its options."""

    doc_id: str
    question: str  # for people; what the model reads are the contexts
    contexts: tuple[str, ...]  # one per option; usually all the same
    options: tuple[str, ...]  # continuations of the context, their leading blank included
    gold: int
    unconditional_contexts: tuple[str, ...] | None = None
    golds: tuple[int, ...] = ()  # all right ones, where there may be several
    category: str | None = None
    cluster: str | None = None


@dataclass(frozen=True)
class Document:
    """To be predicted token by token."""

    doc_id: str
    text: str


@dataclass(frozen=True)
class Foreign:
    """Held by lm-eval, which puts the question and judges the answer."""

    doc_id: str


Item = Question | Choice | Document | Foreign


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
        items = _read_choices(task, path, examples)
    elif task.kind == "requests":
        items = _read_requests(task, path)
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


# ---------------------------------------------------------------- rows of JSON


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each row. Errors: DataError."""
    for row in read_rows(path):
        if isinstance(row.value, BadRow):
            raise DataError(path, row.line, row.value.problem, row.value.next_step)
        if not isinstance(row.value, dict):
            raise DataError(path, row.line, f"found {_named(row.value)}, needed an object.")
        yield row.line, row.value


class _Row:
    """A row with its place, for messages."""

    def __init__(self, path: Path, line: int, row: dict[str, Any]) -> None:
        self.path, self.line, self.row = path, line, row

    def fail(self, problem: str, next_step: str = "") -> NoReturn:
        raise DataError(self.path, self.line, problem, next_step)

    def get(self, key: str, kind: type | tuple[type, ...], needed: str) -> Any:
        """The value of a key that must be there and of a type."""
        if key not in self.row:
            keys = ", ".join(map(repr, self.row)) or "none"
            self.fail(f"the key {key!r} is missing; found {keys}.", f"Needed: {needed}.")
        value = self.row[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(f"{key!r} holds {_named(value)}.", f"Needed: {needed}.")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair: "\\ud83d"
            self.fail(f"{key!r} holds half a surrogate pair.", "Mend or remove the row.")
        return value

    def texts(self, key: str, needed: str) -> tuple[str, ...]:
        """A list of texts that is not empty."""
        values = self.get(key, list, needed)
        if not values or not all(isinstance(value, str) for value in values):
            self.fail(f"{key!r} holds {_named(values)}.", f"Needed: {needed}.")
        return tuple(values)

    def text_or_none(self, key: str) -> str | None:
        """The text of a key that may be left out."""
        value = self.row.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key!r} holds {_named(value)}.", "Needed: text.")
        return value


def _named(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else words[:57] + "…"


# ---------------------------------------------------------------- each kind


def _read_questions(path: Path) -> list[Item]:
    """Rows {"prompt": text} or {"messages": [...]}, with "answer": text or a list of texts.

    "category" sorts questions in the report; those of one "cluster" (a passage) count as related.
    """
    return [_question(_Row(path, line, row), number) for number, (line, row) in _numbered(path)]


def _messages(row: _Row) -> tuple[Message, ...]:
    """The dialogue that a row asks to go on, its last turn the user's."""
    if "messages" in row.row:
        needed = "a list of {role, content} that ends with the user's turn"
        messages = row.get("messages", list, needed)
        for turn in messages:
            is_turn = isinstance(turn, dict) and isinstance(turn.get("content"), str)
            if not is_turn or turn.get("role") not in ROLES:
                row.fail(f"'messages' holds {_named(turn)}.", f"Needed: {needed}; roles {ROLES}.")
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


def _question(row: _Row, number: int) -> Question:
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
    for number, (line, content) in _numbered(path):
        for key, other in (("prompt", "instruction"), ("reference", "output")):
            if key not in content and other in content:
                content[key] = content[other]
        row = _Row(path, line, content)
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
    for line, content in _rows(path):
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


def _read_choices(task: Task, path: Path, examples: Path | None) -> list[Item]:
    """Questions with their options, after the task's instruction and examples.

    Where the rows have categories, so must the examples, and a question is shown those of its own.
    """
    shown = {} if examples is None else _shown_examples(task, examples)
    items: list[Item] = []
    for number, (line, content) in _numbered(path):
        row = _choice_row(_Row(path, line, content))
        before = []
        if task.instruction is not None:
            if "{category}" in task.instruction and row.category is None:
                raise DataError(path, line, f"it has no category, which {task.name} names.")
            words = (row.category or "").replace("_", " ")
            before.append(task.instruction.replace("{category}", words))
        if examples is not None:
            kind = row.category if row.category in shown else None
            if len(shown.get(kind, [])) < task.num_examples:
                raise DataError(
                    examples,
                    None,
                    f"it holds {len(shown.get(kind, []))} examples of the category "
                    f"{row.category}; the task {task.name} shows {task.num_examples}.",
                )
            before += shown[kind]
        context = "\n\n".join([*before, _asked(task, row)])
        items.append(
            Choice(
                str(number),
                question=row.question,
                contexts=(context,) * len(row.options),
                options=tuple(f" {option}" for option in _continuations(task, row)),
                gold=row.gold,
                golds=row.golds,
                category=row.category,
                cluster=row.cluster,
            )
        )
    return items


class _ChoiceRow(NamedTuple):
    """A row {"question", "options" or "choices", "gold" or "answer", ...}."""

    question: str
    options: tuple[str, ...]
    gold: int
    category: str | None
    cluster: str | None
    golds: tuple[int, ...] = ()


def _choice_row(row: _Row) -> _ChoiceRow:
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


def _many_right(row: _Row) -> _ChoiceRow:
    question = row.get("question", str, "text")
    inner = _Row(row.path, row.line, row.get("mc2_targets", dict, '{"choices", "labels"}'))
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


def _shown_examples(task: Task, path: Path) -> dict[str | None, list[str]]:
    """The first examples of each category, solved; of all rows, under None, if none has one."""
    shown: dict[str | None, list[str]] = {}
    for line, content in _rows(path):
        row = _choice_row(_Row(path, line, content))
        of_kind = shown.setdefault(row.category, [])
        if len(of_kind) < task.num_examples:
            of_kind.append(f"{_asked(task, row)} {_continuations(task, row)[row.gold]}")
    return shown


def _read_requests(task: Task, path: Path) -> list[Item]:
    """OLMES request files: one row per option, {doc_id, idx, label, request: {context, ...}}."""
    options_of: dict[int, dict[int, tuple[str, str, int, int]]] = {}
    for line, content in _rows(path):
        row = _Row(path, line, content)
        doc_id = row.get("doc_id", int, "the number of the question")
        index = row.get("idx", int, "the number of the option")
        label = row.get("label", int, "the number of the right option")
        request = row.get("request", dict, '{"context": text, "continuation": text}')
        inner = _Row(path, line, request)
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


def _read_documents(path: Path) -> list[Item]:
    """Text files, or JSON lines with the key "text"."""
    documents = DocumentStream([DocumentSource(str(path))])
    items: list[Item] = [
        Document(str(number), document.text) for number, document in enumerate(documents)
    ]
    if not items:
        raise DataError(path, None, "no document has any text.")
    return items


def _numbered(path: Path) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    return enumerate(_rows(path))


READERS = {
    "exact_match": _read_questions,
    "perplexity": _read_documents,
}
