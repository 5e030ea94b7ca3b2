"""A mixture as token ids: read, cleaned and tokenised once, and kept for the next run.

    rows -> examples -> without those that evaluation data shares -> sequences of bounded length
        -> a folder of arrays, named by everything that decides them

Two runs that start at once make it once: the second waits for the first. What was kept is used
only if all that decides it is the same and every array is as it was written.
"""

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from olmo_base.corpus.overlap import NGRAM, Overlaps
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    atomic_folder,
    atomic_write,
    sha256_file,
)
from olmo_base.run.launch import versions
from open_instruct.control_tokens import Encoded
from open_instruct.encode import ChatEncoder, EncodedPair, EncodedRated
from open_instruct.examples import (
    DataConfig,
    Dialogue,
    Pair,
    Rated,
    Source,
    SourceUse,
    mixture_lines,
    read_dialogues,
    read_pairs,
    read_rated,
    read_rows,
    source_files,
)
from open_instruct.lengths import encode_dialogues, encode_pairs, encode_rated
from open_instruct.turns import Message

KEPT_IN = ".tokenised"  # a folder beside those of the runs
DROPPED_FILE = "decontaminated.jsonl"
ABOUT = "about.json"
# The code that decides what is kept; a change of any of these files makes it anew.
CODE = (
    *("turns", "formats", "sources", "examples"),
    *("control_tokens", "chat_template", "encode", "lengths", "tokenised"),
)


class DataRecipe(Protocol):
    """What is read of a stage's recipe."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def run(self) -> RunConfig: ...


class Prints(NamedTuple):
    """A number for each example of a mixture: of its whole text, and of its prompt alone."""

    whole: np.ndarray
    prompt: np.ndarray


@dataclass
class DataReport:
    """What is to be said about the data of a run."""

    kept_in: Path | None = None  # where tokenised examples are kept; None: nowhere
    uses: list[SourceUse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_repeated: int = 0
    contaminated: list[dict[str, Any]] = field(default_factory=list)
    prints: list[Prints] = field(default_factory=list)  # of the training data, then held-out data

    def overlap(self) -> tuple[int, int]:
        """How many training examples are held out too, and how many share a prompt with those."""
        if len(self.prints) < 2:
            return 0, 0
        train, held_out = self.prints[:2]
        return (
            int(np.isin(train.whole, held_out.whole).sum()),
            int(np.isin(train.prompt, held_out.prompt).sum()),
        )

    def tell(self, folder: RunFolder) -> None:
        """Log it, put it into the manifest, and write which rows were dropped as contaminated."""
        same, same_prompt = self.overlap()
        lines = [*mixture_lines(self.uses), *self.notes]
        if self.num_repeated:
            lines.append(f"{self.num_repeated:,} rows say the same as an earlier row; all are used")
        if same_prompt:
            lines.append(
                f"{same_prompt:,} training examples ask what held-out ones ask, {same:,} of them "
                "with the same answer: the held-out loss looks better than it is"
            )
        if self.contaminated:
            lines.append(
                f"{len(self.contaminated):,} training rows share {NGRAM} words in a row with "
                f"evaluation data and were dropped; {DROPPED_FILE} says which"
            )
            text = "".join(
                json.dumps(item, ensure_ascii=False) + "\n" for item in self.contaminated
            )
            if folder.is_main:
                atomic_write(folder.path / DROPPED_FILE, text)
        for line in lines:
            folder.log(line)
        folder.data = {
            "mixture": [asdict(use) for use in self.uses],
            "repeated_rows": self.num_repeated,
            "also_held_out": same,
            "prompt_also_held_out": same_prompt,
            "decontaminated": len(self.contaminated),
        }


def report_for(recipe: DataRecipe) -> DataReport:
    """A report to be filled, with the folder that this run keeps tokenised examples in."""
    if not recipe.data.keep_tokenised:
        return DataReport()
    return DataReport(Path(recipe.run.output_dir).absolute().parent / KEPT_IN)


# ---------------------------------------------------------------- what a stage asks for

Example = TypeVar("Example", Dialogue, Pair, Rated)
Result = TypeVar("Result", Encoded, EncodedPair, EncodedRated)


def tokenised_dialogues(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: DataRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> list[Encoded]:
    """The dialogues of a mixture. Errors: as of ``read_dialogues`` and ``encode_dialogues``."""
    made = _kept_or_made(
        "dialogues",
        (sources, encoder, recipe, report),
        lambda keys: read_dialogues(sources, **keys),
        encode_dialogues,
        lambda encoded: ([encoded], (0, 0)),
        counts,
    )
    return [rows[0] for rows, _ in made]


def tokenised_pairs(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: DataRecipe,
    counts: ExampleCounts,
    report: DataReport,
    *,
    with_margin: bool = False,
) -> list[EncodedPair]:
    """The pairs of a mixture. Errors: as of ``read_pairs`` and ``encode_pairs``."""
    made = _kept_or_made(
        f"pairs {with_margin}",
        (sources, encoder, recipe, report),
        lambda keys: read_pairs(sources, with_margin=with_margin, **keys),
        encode_pairs,
        lambda pair: ([pair.chosen, pair.rejected], (pair.shared_prompt_length, pair.margin)),
        counts,
    )
    return [EncodedPair(rows[0], rows[1], int(shared), margin) for rows, (shared, margin) in made]


def tokenised_rated(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: DataRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> list[EncodedRated]:
    """The rated answers of a mixture. Errors: as of ``read_rated`` and ``encode_rated``."""
    made = _kept_or_made(
        "rated answers",
        (sources, encoder, recipe, report),
        lambda keys: read_rated(sources, **keys),
        encode_rated,
        lambda rated: ([rated.sequence], (rated.prompt_length, rated.is_desirable)),
        counts,
    )
    return [EncodedRated(rows[0], int(length), good == 1) for rows, (length, good) in made]


# ---------------------------------------------------------------- kept, or made now


def _kept_or_made(
    kind: str,
    asked: tuple[tuple[Source, ...], ChatEncoder, DataRecipe, DataReport],
    read: Callable[[dict[str, Any]], list[Example]],
    encode: Callable[[list[Example], ChatEncoder, DataConfig, ExampleCounts], list[Result]],
    flat: Callable[[Result], tuple[list[Encoded], tuple[float, float]]],
    counts: ExampleCounts,
) -> list[tuple[list[Encoded], tuple[float, float]]]:
    """Each example's sequences and two numbers beside them."""
    sources, encoder, recipe, report = asked
    config = recipe.data
    is_training = sources == config.dataset_mixer
    against = config.decontaminate_against if is_training else ()

    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        started = time.monotonic()
        found, uses = ExampleCounts(), list[SourceUse]()
        keys = {"seed": recipe.run.seed, "on_bad_row": config.on_bad_row}
        examples = read({**keys, "counts": found, "uses": uses})
        parts = [parts_of(example) for example in examples]
        clean, contaminated = decontaminated(examples, parts, against)
        if contaminated:
            reason = f"shares {NGRAM} words in a row with evaluation data"
            found.drop(reason, len(contaminated))
        prints = [prints_of(item) for item in parts]
        encoded = [flat(item) for item in encode(clean, encoder, config, found)]
        sequences = [sequence for rows, _ in encoded for sequence in rows]
        arrays = {
            "ids": _joined([item.ids for item in sequences], np.int32),
            "is_learnt": _joined([item.is_learnt for item in sequences], np.bool_),
            "lengths": np.array([len(item.ids) for item in sequences], np.int64),
            "rows": np.array([len(rows) for rows, _ in encoded], np.int64),
            "beside": np.array([beside for _, beside in encoded], np.float64).reshape(-1, 2),
            "whole": np.array([item[0] for item in prints], np.uint64),
            "prompt": np.array([item[1] for item in prints], np.uint64),
        }
        about = {
            "counts": found.as_dict(),
            "uses": [asdict(use) for use in uses],
            "contaminated": contaminated,
            "repeated": num_repeated(examples, prints),
            "seconds": round(time.monotonic() - started, 1),
        }
        return arrays, about

    if report.kept_in is None:
        arrays, about = make()
    else:
        key = _key(kind, sources, encoder, recipe, against)
        arrays, about = _kept(report.kept_in, key, make, report.notes)
    made = about["counts"]
    counts.used += made["used"]
    counts.truncated += made["truncated"]
    counts.split += made.get("split", 0)
    for reason, number in made["dropped"].items():
        counts.drop(reason, number)
    report.uses += [SourceUse(**{**use, "formats": tuple(use["formats"])}) for use in about["uses"]]
    report.contaminated += about["contaminated"]
    if is_training:
        report.num_repeated += about["repeated"]
    report.prints.append(Prints(arrays["whole"], arrays["prompt"]))
    return list(_examples(arrays))


def _joined(rows: Sequence[Sequence[int]], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.array(row, kind) for row in rows)])


def _examples(arrays: dict[str, np.ndarray]) -> Iterator[tuple[list[Encoded], tuple[float, float]]]:
    ends = np.cumsum(arrays["lengths"]).tolist()
    starts = [0, *ends[:-1]]
    row = 0
    for num_rows, beside in zip(arrays["rows"].tolist(), arrays["beside"].tolist(), strict=True):
        yield (
            [
                Encoded(
                    arrays["ids"][starts[at] : ends[at]].tolist(),
                    arrays["is_learnt"][starts[at] : ends[at]].tolist(),
                )
                for at in range(row, row + num_rows)
            ],
            (beside[0], beside[1]),
        )
        row += num_rows


def _key(
    kind: str,
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: DataRecipe,
    against: tuple[str, ...],
) -> str:
    """What decides the tokenised examples: content of files, not their names or dates."""
    config = asdict(recipe.data)
    for unread in ("dataset_mixer", "eval_dataset_mixer", "keep_tokenised"):
        del config[unread]
    code = Path(__file__).parent
    content = {
        "kind": kind,
        "sources": [asdict(source) for source in sources],
        "data": [sha256_file(file) for file in source_files(sources)],
        "against": [sha256_file(file) for file in against],
        "settings": config,
        "seed": recipe.run.seed,
        "tokenizer": encoder.tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {k: str(v) for k, v in encoder.tokenizer.special_tokens_map.items()},
        "template": encoder.template,
        "written": encoder.sample_text(),  # a template may write the date
        "code": [sha256_file(code / f"{name}.py") for name in CODE],
        "versions": {name: versions().get(name) for name in ("tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kept(
    folder: Path,
    key: str,
    make: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]],
    notes: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is kept under this key; made and kept now if it is not, or is damaged."""
    entry = folder / key[:16]
    name = f"{folder.name}/{entry.name}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder / f"{entry.name}.lock"))
        except OSError as error:  # a read-only place: the run does not depend on it
            notes.append(f"tokenised examples are not kept: {folder} ({error.strerror})")
            return make()
        if entry.exists():
            kept = _read_entry(entry, key)
            if kept is not None:
                notes.append(f"tokenised before: {len(kept[0]['lengths']):,} sequences in {name}")
                return kept
            notes.append(f"{name} is damaged and was made again")
        arrays, about = make()
        with atomic_folder(entry) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            hashes = {name: sha256_file(temporary / f"{name}.npy") for name in arrays}
            text = json.dumps({**about, "key": key, "sha256": hashes}, ensure_ascii=False)
            (temporary / ABOUT).write_text(
                json.dumps({"about": text, "sha256": _sha256(text)}), encoding="utf-8"
            )
        notes.append(
            f"tokenised {len(arrays['lengths']):,} sequences in {about['seconds']} s; "
            f"kept in {name}"
        )
        return arrays, about


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Only one process of all is inside at a time; a process that ends lets go."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_entry(entry: Path, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What an entry holds; None if any of it is not what was written."""
    try:
        outer = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        if _sha256(outer["about"]) != outer["sha256"]:
            return None
        about = json.loads(outer["about"])
        if about["key"] != key:
            return None
        arrays = {}
        for name, sha256 in about["sha256"].items():
            if sha256_file(entry / f"{name}.npy") != sha256:
                return None
            arrays[name] = np.load(entry / f"{name}.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays, about


# ---------------------------------------------------------------- the same text twice


Parts = tuple[str, Sequence[Message], Sequence[Message]]  # a text; a prompt, and what follows it


def parts_of(example: Dialogue | Pair | Rated) -> Parts:
    """What an example says."""
    if isinstance(example, Dialogue):
        return example.text or "", [], example.messages
    if isinstance(example, Pair):
        return "", example.prompt, [*example.chosen, *example.rejected]
    return "", example.prompt, example.answer


def prints_of(parts: Parts) -> tuple[int, int]:
    """Numbers that are equal for equal examples, and for equal prompts."""
    text, prompt, rest = parts
    if not prompt and rest:  # a dialogue: what stands before its first answer
        first = next(n for n, turn in enumerate(rest) if turn["role"] == "assistant")
        prompt, rest = rest[:first], rest[first:]
    asked = json.dumps([text, prompt], sort_keys=True)
    whole = json.dumps([asked, rest], sort_keys=True)
    numbers = [hashlib.blake2b(item.encode(), digest_size=8).digest() for item in (whole, asked)]
    return int.from_bytes(numbers[0], "big"), int.from_bytes(numbers[1], "big")


def num_repeated(
    examples: Sequence[Dialogue | Pair | Rated], prints: Sequence[tuple[int, int]]
) -> int:
    """Rows whose text an earlier row has; what the recipe itself repeats does not count."""
    places: dict[int, set[tuple[str, int]]] = {}
    for example, (whole, _) in zip(examples, prints, strict=True):
        places.setdefault(whole, set()).add((example.source, example.line))
    return sum(len(found) - 1 for found in places.values())


def decontaminated(
    examples: list[Example],
    parts: Sequence[Parts],
    against: Sequence[str],
) -> tuple[list[Example], list[dict[str, Any]]]:
    """The examples that share no n-gram with the evaluation files, and where the others do."""
    if not against:
        return examples, []
    rows = [row for file in against for row in read_rows(Path(file))]
    placed = [(row, text) for row in rows for text in _texts_in(row.value)]
    overlaps = Overlaps(text for _, text in placed)
    clean: list[Example] = []
    contaminated: list[dict[str, Any]] = []
    for example, said in zip(examples, parts, strict=True):
        found = sorted({number for item in _said(said) for number in overlaps.found_in(item)})
        if not found:
            clean.append(example)
            continue
        row = placed[found[0]][0]
        contaminated.append(
            {
                "source": example.source,
                "line": example.line,
                "evaluation": row.source,
                "evaluation_line": row.line,
                "shared_with": len(found),
            }
        )
    return clean, contaminated


def _said(parts: Parts) -> list[str]:
    text, prompt, rest = parts
    return [text, *(turn["content"] for turn in [*prompt, *rest])]


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a row of evaluation data, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)
