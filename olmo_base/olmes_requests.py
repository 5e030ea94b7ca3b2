"""Questions with given answers, as the JSONL requests of OLMES, scored while a model trains.

Request files -> questions -> ids, once -> the log-probability of each answer (scorer.py) ->
accuracy and bits per byte of the right answer, a row of metrics.jsonl. Needs no evaluation library.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from olmo_base.model.transformer import Transformer
from olmo_base.run.errors import DataError, UserError
from olmo_base.scored_rows import Request
from olmo_base.scorer import continuation_logprobs

ENDINGS = (".jsonl", ".jsonl.gz")
# From this doc_id on, questions stand a second time without their text, for another metric.
BARE_DOC_IDS = 1_000_000


@dataclass(frozen=True)
class RequestQuestion:
    """A question: its answers as (context, continuation), and which is right."""

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class RequestFile:
    """The questions of one file, ready to be scored."""

    name: str  # in metrics.jsonl
    questions: tuple[RequestQuestion, ...]
    requests: tuple[Request, ...]  # the ids of all options, in order


def request_paths(paths: Sequence[str]) -> dict[str, Path]:
    """Name -> file: each file named, and all in the folders named, by their place there.

    Errors: UserError for what is missing, a folder without such files, or two of one name.
    """
    found: dict[str, Path] = {}
    for text in paths:
        root = Path(text)
        if not root.exists():
            raise UserError(f"eval_requests: {root} does not exist.")
        files = [root]
        if root.is_dir():
            files = sorted(file for file in root.rglob("*") if file.name.endswith(ENDINGS))
            if not files:
                raise UserError(f"eval_requests: {root} holds no {' or '.join(ENDINGS)} file.")
        for file in files:
            place = file.relative_to(root) if root.is_dir() else Path(file.name)
            name = str(place).removesuffix(".gz").removesuffix(".jsonl")
            if name in found:
                raise UserError(f"eval_requests: {found[name]} and {file} are both called {name}.")
            found[name] = file
    return found


def read_questions(path: Path, limit: int) -> list[RequestQuestion]:
    """The first ``limit`` questions of a request file (0: all). Errors: DataError."""
    options: dict[Any, dict[int, tuple[str, str]]] = {}
    golds: dict[Any, int] = {}
    for line, row in _rows(path):
        try:
            doc_id, gold = row["doc_id"], row["label"]
            request = row["request"]
            index, pair = row["idx"], (request["context"], request["continuation"])
        except (KeyError, TypeError):
            raise DataError(
                path, line, "needed doc_id, idx, label and request: {context, continuation}."
            ) from None
        is_number = all(isinstance(one, int) for one in (doc_id, gold, index))
        if not is_number or not all(isinstance(text, str) and text for text in pair):
            raise DataError(path, line, "doc_id, idx, label must be numbers, the request texts.")
        if doc_id >= BARE_DOC_IDS:
            continue
        if limit and doc_id not in golds and len(golds) == limit:
            break
        if golds.setdefault(doc_id, gold) != gold or index in options.get(doc_id, {}):
            raise DataError(
                path, line, f"question {doc_id} has two labels, or option {index} twice."
            )
        options.setdefault(doc_id, {})[index] = pair
    for doc_id, by_index in options.items():
        if sorted(by_index) != list(range(len(by_index))) or not 0 <= golds[doc_id] < len(by_index):
            raise DataError(
                path, None, f"question {doc_id}: options {sorted(by_index)}, label {golds[doc_id]}."
            )
    if not options:
        raise DataError(path, None, "holds no question.")
    return [
        RequestQuestion(tuple(by_index[i] for i in range(len(by_index))), golds[doc_id])
        for doc_id, by_index in options.items()
    ]


def _rows(path: Path) -> Any:
    opened = gzip.open if path.name.endswith(".gz") else open
    line = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                yield line, json.loads(text)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise DataError(path, line + 1, f"cannot be read: {error}.") from None
    except ValueError:
        raise DataError(path, line, "is no JSON in UTF-8.") from None


def encode_option(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The ids of both as one text, split where the context's own ids end, as lm-eval does.

    Blanks at the end of the context belong to the continuation.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept, add_special_tokens=False).ids
    whole = tokenizer.encode(kept + continuation, add_special_tokens=False).ids
    after = whole[len(before) :]
    if not after:  # the last token of the context took the whole continuation in
        after = tokenizer.encode(continuation, add_special_tokens=False).ids
        return before, after
    return whole[: len(before)], after


def load_requests(paths: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[RequestFile]:
    """The questions of all files, encoded; ``limit`` of each file (0: all). Errors: UserError."""
    files = []
    for name, path in request_paths(paths).items():
        questions = read_questions(path, limit)
        requests = tuple(
            encode_option(tokenizer, *pair) for question in questions for pair in question.options
        )
        files.append(RequestFile(name, tuple(questions), requests))
    return files


def score_requests(
    model: Transformer, files: Sequence[RequestFile], *, bf16: bool
) -> dict[str, float]:
    """Figures of each file, as a row of metrics.jsonl, ``name`` behind each key.

    ``requests_accuracy``: how often the right answer is the likeliest; ``…_per_char``: judged per
    character of the answer. ``requests_bits_per_byte``: of the right answer. ``requests_cut``:
    tokens of contexts that were too long for the model, where there were any.
    """
    row: dict[str, float] = {}
    for file in files:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scores = continuation_logprobs(model, file.requests)
        num_right = num_right_per_char = 0
        bits, start = 0.0, 0
        for question in file.questions:
            logprobs = [score.logprob for score in scores[start : start + len(question.options)]]
            start += len(question.options)
            lengths = [len(answer) for _, answer in question.options]
            per_char = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
            num_right += logprobs.index(max(logprobs)) == question.gold
            num_right_per_char += per_char.index(max(per_char)) == question.gold
            gold = question.options[question.gold][1]
            bits -= logprobs[question.gold] / math.log(2) / len(gold.encode())
        count = len(file.questions)
        row[f"requests_accuracy/{file.name}"] = num_right / count
        row[f"requests_accuracy_per_char/{file.name}"] = num_right_per_char / count
        row[f"requests_bits_per_byte/{file.name}"] = bits / count
        if num_cut := sum(score.num_cut for score in scores):
            row[f"requests_cut/{file.name}"] = num_cut
    return row
