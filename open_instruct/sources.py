"""Where rows are: files, folders, saved data sets and names on the hub -> rows with their line.

.jsonl .json     JSON lines, or one JSON list; plain, or packed as .gz or .zst
.parquet         one row a row
a folder         all such files in it; or what save_to_disk of the package datasets wrote
org/name         a data set of the Hugging Face hub
"""

import gzip
import importlib.util
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from olmo_base.corpus.documents import ZstandardDamage, ZstandardFile
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import RecipeError, setting
from open_instruct.formats import COLUMNS, ScoredPairs
from open_instruct.turns import BadRow

READABLE = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".json", ".json.gz", ".json.zst"),
    ".parquet",
)
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow"}  # of the extra "data"
ROWS_AT_A_TIME = 256  # of a Parquet file


@dataclass(frozen=True)
class Source:
    """One item of a ``dataset_mixer``: where rows are and how many to take.

    At most one of ``samples`` (a count), ``fraction`` (a share, drawn by the seed) and ``repeat``
    (2.5: every row twice and half of them once more); none of them takes every row once.

    ``part`` shares one set between training and its held-out loss: the hash of a row's first
    question decides, so neither seed nor order nor a repeated question moves a row across.

    ``columns`` gives keys of a row the names that formats know: {prompt: question}.
    """

    path: str  # a file, a folder of files, or the name of a data set on the Hugging Face hub
    samples: int | None = setting(None, low=1)
    fraction: float | None = setting(None, above=0, high=1)
    repeat: float | None = setting(None, low=1)
    part: Literal["all", "train", "held_out"] = setting("all")
    held_out_fraction: float = setting(0.1, above=0, below=1)  # of all rows, where part is not all
    split: str = "train"  # of a data set on the hub, or one saved with several
    columns: dict[str, str] | None = None  # name that a format knows -> the row's own key
    # Of several scored answers: best against worst, best against each other one, or every two.
    scored_pairs: ScoredPairs = "best_worst"

    def __post_init__(self) -> None:
        asked = [key for key in ("samples", "fraction", "repeat") if getattr(self, key) is not None]
        if len(asked) > 1:
            raise RecipeError(
                asked[1], f"{self.path} asks for {' and '.join(asked)}. Keep one of them."
            )
        for name in self.columns or {}:
            if name not in COLUMNS:
                raise RecipeError(
                    "columns",
                    f"no format knows the name {name!r}. Known: {', '.join(sorted(COLUMNS))}.",
                )


@dataclass(frozen=True)
class Row:
    """A row as it stands in its source; ``value`` is a BadRow if it could not be parsed."""

    value: Any
    source: str
    line: int
    number: int | None = None  # of the row, where that is not its line


# ---------------------------------------------------------------- a source -> its files


def source_files(sources: Iterable[Source]) -> list[Path]:
    """The files behind a mixture, those of data sets of the hub included.

    Errors: UserError for a path that does not exist, or a name that cannot be fetched.
    """
    return [
        file
        for source in sources
        for file in _files(source) or _files_of_dataset(_hub_dataset(source))
    ]


def rows_of(source: Source) -> Iterator[Row]:
    """All rows of a source, with the names that its ``columns`` give their keys.

    Errors: DataError for a file that cannot be read, UserError for a source that is not there.
    """
    rows = _rows(source)
    if source.columns is None:
        return rows
    return (_renamed(row, source.columns) for row in rows)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its keys renamed; its value is a BadRow if one of them is missing."""
    if not isinstance(row.value, dict):
        return row
    value: Any = {key: item for key, item in row.value.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if theirs not in row.value:
            found = ", ".join(map(repr, row.value)) or "no keys"
            value = BadRow(
                "missing key",
                f"the key {theirs!r}, which columns names for {ours!r}, is missing; found {found}.",
                "Mend columns, or the row.",
            )
            break
        value[ours] = row.value[theirs]
    return Row(value, row.source, row.line, row.number)


def _rows(source: Source) -> Iterator[Row]:
    if _is_saved_dataset(Path(source.path)):
        return _dataset_rows(_saved_dataset(source), source)
    files = _files(source)
    if not files:
        return _dataset_rows(_hub_dataset(source), source)
    return itertools.chain.from_iterable(read_rows(file) for file in files)


def _files(source: Source) -> list[Path]:
    """The files of a source; none for a name on the hub."""
    path = Path(source.path)
    if _is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.name.endswith(READABLE) and file.is_file()
        )
        if not files:
            raise DataError(
                path,
                None,
                "this folder holds no data file.",
                f"Files that can be read end in {', '.join(READABLE)}.",
            )
        return files
    if path.exists():
        return [path]
    if _may_be_on_the_hub(source.path):
        return []
    raise UserError(
        f"{path} does not exist. Give a file ({', '.join(READABLE)}), a folder of them, or the "
        "name of a data set on the Hugging Face hub; paths are relative to the working directory."
    )


def _may_be_on_the_hub(name: str) -> bool:
    has_form = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    return has_form and not name.endswith(READABLE)


# ---------------------------------------------------------------- a file -> its rows


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file of JSON lines, one JSON list or one Parquet file.

    A line that cannot be parsed is a row whose value is a BadRow. Errors: DataError if the file
    as a whole cannot be read.
    """
    if not path.name.endswith(READABLE):
        raise DataError(
            path,
            None,
            "this kind of file is not read.",
            f"Convert it to JSON lines; files that can be read end in {', '.join(READABLE)}.",
        )
    package = PACKAGES.get(path.suffix)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{path} needs the package {package} to be read, which is not installed. "
            "Install it: pip install 'open-instruct[data]'."
        )
    kind = {".gz": "gzip", ".zst": "zstandard", ".parquet": "Parquet"}.get(path.suffix, "")
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".parquet":
                yield from _parquet_rows(path, raw)
            else:
                yield from _json_rows(path, _unpacked(path, raw))
    except (gzip.BadGzipFile, EOFError, zlib.error, ZstandardDamage) as error:
        raise DataError(
            path, None, f"broken {kind} file ({error}).", "Copy or download it again."
        ) from None
    except OSError as error:
        raise DataError(path, None, f"cannot be read ({error.strerror}).") from None


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        return io.BufferedReader(ZstandardFile(raw), 1 << 20)
    return raw


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    numbered = enumerate(file, start=1)
    for line, text in numbered:
        if line == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")  # Windows editors write this mark
        if not text.strip():
            continue
        if text.lstrip()[:1] == b"[":
            yield from _list_rows(path, text + file.read(), line)
            return
        yield _line_row(path, line, text)
        for rest_line, rest_text in numbered:
            if rest_text.strip():
                yield _line_row(path, rest_line, rest_text)
        return
    raise DataError(path, None, "this file is empty.", "Remove it or write one row a line.")


def _line_row(path: Path, line: int, text: bytes) -> Row:
    try:
        value = json.loads(text.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        value = _not_utf8(text, error)
    except (ValueError, RecursionError) as error:
        value = _broken_json(error, "Each line must hold one whole JSON object.")
    return Row(value, str(path), line)


def _list_rows(path: Path, content: bytes, first_line: int) -> Iterator[Row]:
    """The items of a JSON list that begins in line ``first_line``, with the line each begins in."""
    before = first_line - 1
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = _not_utf8(content, error)
        line = before + content.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, bad.problem, bad.next_step) from None
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]  # matches anywhere

    position = skip(skip(0) + 1)  # behind the bracket
    line, counted = first_line, 0
    for number in itertools.count(1):
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and number == 1:
            raise DataError(path, line, "this JSON list is empty.", "Write rows into it.")
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = before + error.lineno if isinstance(error, json.JSONDecodeError) else line
            bad = _broken_json(error, f"This is row {number} of a JSON list.")
            raise DataError(path, line, bad.problem, bad.next_step) from None
        yield Row(value, str(path), line, number)
        position = skip(position)
        if text[position : position + 1] == "]":
            rest = skip(position + 1)
            if rest == len(text):
                return
            line = before + text.count("\n", 0, rest) + 1
            raise DataError(path, line, "text after the end of the JSON list.", "Remove it.")
        if text[position : position + 1] != ",":
            line = before + text.count("\n", 0, position) + 1
            raise DataError(
                path, line, f"broken JSON: a comma or ] must follow row {number}.", "Mend the list."
            )
        position = skip(position + 1)


def _broken_json(error: Exception, next_step: str) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        detail = f"{error.msg} at column {error.colno}"
    else:
        detail = "nested too deep" if isinstance(error, RecursionError) else str(error)
    return BadRow("broken JSON", f"broken JSON: {detail}.", next_step)


def _not_utf8(text: bytes, error: UnicodeDecodeError) -> BadRow:
    return BadRow(
        "not UTF-8",
        f"not UTF-8: byte 0x{text[error.start]:02x} ({error.reason}).",
        "Save the file as UTF-8.",
    )


def _parquet_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow  # optional, and only for such files
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        for batch in table.iter_batches(ROWS_AT_A_TIME, use_threads=False):
            for index in range(batch.num_rows):
                number += 1
                try:
                    (value,) = batch.slice(index, 1).to_pylist()
                except UnicodeDecodeError as error:
                    value = _not_utf8(error.object, error)
                yield Row(value, str(path), number, number)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            path, None, f"broken Parquet file ({first_line}).", "Copy or download it again."
        ) from None
    if number == 0:
        raise DataError(path, None, "this file is empty.", "Remove it or write rows into it.")


# ---------------------------------------------------------------- data sets of the package datasets


def _is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` made this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _saved_dataset(source: Source) -> Any:
    """What ``save_to_disk`` wrote: the split if it is a set of several."""
    load_from_disk = _datasets(f"{source.path} was written by save_to_disk").load_from_disk
    try:
        dataset = load_from_disk(source.path)
    except Exception as error:  # Arrow, JSON and file errors have no common base
        raise UserError(
            f"{source.path} was written by save_to_disk and cannot be loaded: {_first_line(error)} "
            "Save or copy it again."
        ) from error
    if not isinstance(dataset, dict):
        return dataset
    if source.split not in dataset:
        raise UserError(
            f"{source.path} has no split {source.split!r}; it has {', '.join(dataset)}. Name one "
            "of them with split."
        )
    return dataset[source.split]


def _hub_dataset(source: Source) -> Any:
    """A data set of the Hugging Face hub, from its cache where it was fetched before."""
    looked = f"There is no file or folder {source.path} here"
    load_dataset = _datasets(
        f"{looked}, and to fetch a data set of that name from the Hugging Face hub"
    ).load_dataset
    try:
        return load_dataset(source.path, split=source.split)
    except Exception as error:  # hub, network, file and split errors have no common base
        raise UserError(
            f"{looked}, and as a data set of the Hugging Face hub (split {source.split}) it could "
            f"not be loaded: {_first_line(error)}"
        ) from error


def _datasets(why: str) -> Any:
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise UserError(
            f"{why}; the package datasets is needed: pip install 'open-instruct[data]'."
        ) from None
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]


def _files_of_dataset(dataset: Any) -> list[Path]:
    return sorted(Path(item["filename"]) for item in dataset.cache_files)


def _dataset_rows(dataset: Any, source: Source) -> Iterator[Row]:
    """The rows of a data set; the line is the row's number."""
    for number, value in enumerate(dataset, start=1):
        yield Row(value, f"{source.path} ({source.split})", number, number)
