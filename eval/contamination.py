"""Which questions stand in training text: words in a row that both have, noted beside the samples.

the questions' texts + training files or token shards -> overlaps of 13 words -> contamination.json.
The training text streams past the questions; files of dialogues are read one whole file at a time,
as training reads them.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.items import BLOCK_CHARACTERS, Choice, Document, Foreign, Item, Question
from olmo_base.corpus.batches import split_folder
from olmo_base.corpus.documents import JSON_ENDINGS, DocumentSource, DocumentStream, source_files
from olmo_base.corpus.foreign_shards import foreign_files, read_foreign_shards
from olmo_base.corpus.overlap import NGRAM, SHORTEST, Overlaps
from olmo_base.corpus.shards import Shard, read_shards
from olmo_base.run.artefact import atomic_write, sha256_file
from olmo_base.run.errors import DataError, UserError
from olmo_base.tokenizer import load_tokenizer
from open_instruct.examples import BadRow, read_rows

CONTAMINATION = "contamination.json"
TOKENS_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Overlap:
    """Of one task: the questions that training text holds, and those too short to look for."""

    overlapping: frozenset[str]  # doc_ids
    too_short: frozenset[str]
    n: int

    @property
    def words(self) -> str:
        """12 of 500 questions."""
        return f"{len(self.overlapping):,} of {self.n:,} questions"


# ---------------------------------------------------------------- what is looked for


def question_texts(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[str, str]]:
    """(doc_id, text) of a task's questions: without examples, and with the right option if any.

    ``rows`` are samples of the task, which know what lm-eval asked.
    """
    found: list[tuple[str, str]] = []
    of_lm_eval = {str(row["doc_id"]): row for row in rows}
    for item in items:
        match item:
            case Question():
                found.append((item.doc_id, item.messages[-1]["content"]))
            case Choice():
                found.append((item.doc_id, f"{item.question} {item.options[item.gold].strip()}"))
            case Document():
                starts = range(0, len(item.text), BLOCK_CHARACTERS)
                found += [
                    (f"{item.doc_id}:{block}", item.text[start : start + BLOCK_CHARACTERS])
                    for block, start in enumerate(starts)
                ]
            case Foreign() if item.doc_id in of_lm_eval:
                row = of_lm_eval[item.doc_id]
                found.append((item.doc_id, f"{row.get('question', '')} {row['target']}"))
    return found


# ---------------------------------------------------------------- what it is looked for in


def training_texts(path: Path) -> Iterator[str]:
    """Every text at a path: a file or folder of documents, of dialogues, or of token shards.

    Errors: UserError, DataError for what cannot be read.
    """
    refuse_unreadable(path)
    if shards := _shards(path):
        for shard, tokenizer_folder in shards:
            yield from _decoded(shard, tokenizer_folder)
        return
    for file in source_files(DocumentSource(str(path))):
        if _holds_documents(file):
            yield from (document.text for document in DocumentStream([DocumentSource(str(file))]))
            continue
        for row in read_rows(file):
            if isinstance(row.value, BadRow):
                raise DataError(file, row.line, row.value.problem, row.value.next_step)
            yield from _strings(row.value)


def refuse_unreadable(path: Path) -> None:
    """Find, before hours of work, that a path holds no training text. Errors: UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Give the files that the models were trained on.")
    if not _shards(path):
        source_files(DocumentSource(str(path)))


def _holds_documents(file: Path) -> bool:
    """Whether a file is read as documents; JSON without the key "text" is read as any rows."""
    if not file.name.lower().endswith(JSON_ENDINGS) or file.name.lower().endswith(".zst"):
        return True
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        row = json.loads(first.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, OSError, EOFError):
        return False  # a list of rows over several lines; or the reader of rows says what is wrong
    return isinstance(row, dict) and "text" in row


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _shards(path: Path) -> list[tuple[Shard, Path]]:
    """The token shards at a path, with the folder of their tokenizer; none if it holds others.

    Of a tokenize run only what is trained on.
    """
    if split_folder(path, "train").is_dir():
        path = split_folder(path, "train")
    folders = sorted({file.parent for file in path.rglob("tokens_*.bin")}) if path.is_dir() else []
    found = [(shard, _tokenizer_of(folder)) for folder in folders for shard in read_shards(folder)]
    foreign = foreign_files(path)
    if foreign:
        folder = _tokenizer_of(path if path.is_dir() else path.parent)
        shards = read_foreign_shards(path, tokenizer_name_or_path=folder)
        found += [(shard, folder) for shard in shards]
    for shard, folder in found:
        if sha256_file(folder / "tokenizer.json") != shard.info.tokenizer_sha256:
            raise UserError(
                f"{shard.path} was not made with the tokenizer {folder / 'tokenizer.json'}. "
                "Put the right tokenizer.json beside the shards."
            )
    return found


def _tokenizer_of(folder: Path) -> Path:
    for place in (folder, *folder.resolve().parents[:2]):
        if (place / "tokenizer.json").is_file():
            return place
    raise UserError(
        f"{folder} holds token shards and no tokenizer.json to decode them with, nor do the two "
        "folders above. Put one beside them, or give the text files."
    )


def _decoded(shard: Shard, tokenizer_folder: Path) -> Iterator[str]:
    """The documents of a shard as text, a long one in pieces that share their ends."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids, eos = shard.tokens(), shard.info.eos_token_id
    shared = 64 * NGRAM  # tokens; no 13 words are likely to need more
    start = 0
    while start < len(ids):
        stop = min(len(ids), start + TOKENS_AT_A_TIME)
        piece = np.asarray(ids[start:stop])
        ends = np.flatnonzero(piece == eos).tolist()
        bounds = [-1, *ends, *([] if ends and ends[-1] == len(piece) - 1 else [len(piece)])]
        documents = [piece[a + 1 : b].tolist() for a, b in itertools.pairwise(bounds)]
        yield from tokenizer.decode_batch(documents, skip_special_tokens=False)
        start = stop if stop == len(ids) else stop - shared


# ---------------------------------------------------------------- noted, and read again


def note_overlaps(
    folder: Path,
    paths: Sequence[str],
    texts: Mapping[str, Sequence[tuple[str, str]]],
    log: Callable[[str], None],
) -> None:
    """Look for every task's questions in the training text; writes contamination.json.

    What was noted of the same questions and files is kept. Errors: as ``training_texts``.
    """
    key = _key(paths, texts)
    target = folder / CONTAMINATION
    if target.is_file() and _read(target).get("key") == key:
        return
    started = time.monotonic()
    numbered = [(task, doc_id, text) for task, pairs in texts.items() for doc_id, text in pairs]
    overlaps = Overlaps(text for _, _, text in numbered)
    found: set[int] = set()
    sources = []
    for path in paths:
        num_texts, num_characters = 0, 0
        for text in training_texts(Path(path)):
            num_texts, num_characters = num_texts + 1, num_characters + len(text)
            found |= overlaps.found_in(text)
        sources.append({"path": path, "texts": num_texts, "characters": num_characters})
    tasks: dict[str, dict[str, Any]] = {
        task: {"overlapping": [], "too_short": [], "n": len(pairs)} for task, pairs in texts.items()
    }
    for number, (task, doc_id, _) in enumerate(numbered):
        if number in found:
            tasks[task]["overlapping"].append(doc_id)
        if number in overlaps.too_short:
            tasks[task]["too_short"].append(doc_id)
    content = {
        "key": key,
        "ngram": NGRAM,
        "shortest": SHORTEST,
        "sources": sources,
        "seconds": round(time.monotonic() - started, 3),
        "tasks": tasks,
    }
    atomic_write(target, json.dumps(content, indent=2) + "\n")
    log(
        f"{len(found):,} of {len(numbered):,} questions have {NGRAM} words in a row of the "
        f"training text; {len(overlaps.too_short):,} are too short to tell."
    )


def _key(paths: Sequence[str], texts: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """What decides the overlaps: the questions, and the files by size and time of change."""
    files = sorted(
        file
        for path in paths
        for file in ([Path(path)] if Path(path).is_file() else Path(path).rglob("*"))
        if file.is_file()
    )
    stated = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([NGRAM, SHORTEST, list(paths), stated, texts], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, None, f"broken JSON ({error}).", "Delete the file.") from None
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Contamination:
    """What an evaluation's folder says of training text."""

    ngram: int
    sources: Sequence[dict[str, Any]]  # path, texts, characters
    tasks: dict[str, Overlap]

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "ngram": self.ngram,
            "sources": list(self.sources),
            "tasks": {
                task: {
                    key: sorted(value) if isinstance(value, frozenset) else value
                    for key, value in dataclasses.asdict(overlap).items()
                }
                for task, overlap in self.tasks.items()
            },
        }


def read_overlaps(folder: Path) -> Contamination | None:
    """What was noted in an evaluation's folder; None if nothing was. Errors: DataError."""
    path = folder / CONTAMINATION
    if not path.is_file():
        return None
    content = _read(path)
    try:
        tasks = {
            task: Overlap(frozenset(item["overlapping"]), frozenset(item["too_short"]), item["n"])
            for task, item in content["tasks"].items()
        }
        return Contamination(content["ngram"], content["sources"], tasks)
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            path, None, "it is no note of overlaps.", "Delete it and evaluate again."
        ) from None
