"""Read documents, one at a time, from text files and files of JSON lines.

    .txt .txt.gz                            the whole file is one document
    .jsonl .jsonl.gz .json .json.gz         one JSON object a line, its text under ``text_field``

Nothing is repaired: a line that cannot be read is an error that names file and line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import setting

TEXT_ENDINGS = (".txt", ".txt.gz")
JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class DocumentSource:
    """One item of a ``dataset_mixer`` of documents: a file, or a folder of them."""

    path: str
    text_field: str = "text"  # the key of a JSON line that holds the document
    max_documents: int | None = setting(None, low=1)  # the first so many; None reads all


class Document(NamedTuple):
    """A text and where it stands; ``line`` is None when the whole file is the document."""

    text: str
    path: Path
    line: int | None


def source_files(source: DocumentSource) -> list[Path]:
    """The files of one source: itself, or every document file under the folder, in order of name.

    Errors: UserError if there is no such path, no document file in it, or an unknown file ending.
    """
    path = Path(source.path)
    known = (*TEXT_ENDINGS, *JSON_ENDINGS)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(known))
        if not found:
            raise UserError(f"{path} holds no documents. Needed: files ending {_listed(known)}.")
        return found
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Check the path in dataset_mixer "
            "(paths are relative to the working directory)."
        )
    if not path.name.lower().endswith(known):
        raise UserError(f"{path} is no document file. Needed: a file ending {_listed(known)}.")
    return [path]


def document_files(sources: Sequence[DocumentSource]) -> list[Path]:
    """The files of all sources, each once. Errors: as ``source_files``."""
    return list(dict.fromkeys(file for source in sources for file in source_files(source)))


def _listed(endings: Sequence[str]) -> str:
    return ", ".join(endings[:-1]) + " or " + endings[-1]


class DocumentStream:
    """Every document of the sources in order, in constant memory; to be walked through once.

    ``bytes_read`` of ``bytes_total`` tells how far it is. Documents without any text are left out
    and counted. Errors: UserError for a missing file; DataError for a line that is not JSON, not
    an object, without the text, not UTF-8, or a file that is empty or damaged.
    """

    def __init__(
        self, sources: Sequence[DocumentSource], counts: ExampleCounts | None = None
    ) -> None:
        self._files = [(source, source_files(source)) for source in sources]
        self.counts = counts if counts is not None else ExampleCounts()
        self._finished_bytes = 0
        self._open_file: IO[bytes] | None = None
        self.bytes_total = sum(file.stat().st_size for _, files in self._files for file in files)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as they lie on disk, that have been read so far."""
        is_open = self._open_file is not None and not self._open_file.closed
        return self._finished_bytes + (cast(IO[bytes], self._open_file).tell() if is_open else 0)

    def __iter__(self) -> Iterator[Document]:
        self._finished_bytes = 0
        for source, files in self._files:
            num_left = source.max_documents
            for path in files:
                if num_left == 0:
                    break
                for document in self._read_file(path, source.text_field):
                    if not document.text.strip():
                        self.counts.drop("empty text")
                        continue
                    self.counts.used += 1
                    yield document
                    if num_left is not None:
                        num_left -= 1
                        if num_left == 0:
                            break
                self._finished_bytes += path.stat().st_size

    def _read_file(self, path: Path, text_field: str) -> Iterator[Document]:
        with open(path, "rb") as raw:
            self._open_file = raw
            is_packed = path.name.lower().endswith(".gz")
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_packed else raw
            try:
                if path.name.lower().endswith(TEXT_ENDINGS):
                    text = _decoded(file.read(), path, None)
                    if not text:
                        raise DataError(path, None, "the file is empty.", "Remove it.")
                    yield Document(text, path, None)
                else:
                    yield from _read_json_lines(file, path, text_field)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(
                    path, None, f"the gzip data is damaged ({error}).", "Fetch the file again."
                ) from None


def _read_json_lines(file: IO[bytes], path: Path, text_field: str) -> Iterator[Document]:
    found = False
    for number, line_bytes in enumerate(file, start=1):
        line = _decoded(line_bytes, path, number)
        if not line.strip():
            continue
        found = True
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                path,
                number,
                f"broken JSON ({error}).",
                "Each line must be one whole JSON object.",
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                path,
                number,
                f"found a JSON {type(row).__name__}, needed an object.",
                f'Write {{"{text_field}": "..."}}.',
            )
        if text_field not in row:
            keys = ", ".join(map(repr, row)) or "none"
            raise DataError(
                path,
                number,
                f"the key {text_field!r} is missing; found {keys}.",
                "Name the key that holds the text with text_field.",
            )
        text = row[text_field]
        if not isinstance(text, str):
            raise DataError(
                path,
                number,
                f"{text_field!r} holds {type(text).__name__}, needed text.",
                "Mend or remove the line.",
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair: "\ud83d"
            raise DataError(
                path,
                number,
                f"{text_field!r} holds half a surrogate pair at character {error.start}.",
                "Mend or remove the line.",
            ) from None
        yield Document(text, path, number)
    if not found:
        raise DataError(path, None, "the file is empty.", "Remove it, or write documents to it.")


def _decoded(data: bytes, path: Path, line: int | None) -> str:
    """UTF-8 text without the byte-order mark some editors put first; line ends stay as they are."""
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            path,
            line,
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8.",
            "Save the file as UTF-8.",
        ) from None
