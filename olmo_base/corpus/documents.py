"""Read documents, one at a time, from text files, files of JSON lines and Parquet files.

    .txt            the whole file is one document
    .jsonl .json    one JSON object a line, its text under ``text_field``
    .parquet        one document a row, its text in the column ``text_field``

The first two may be packed: .gz, or .zst (with the package zstandard). Nothing is repaired: a
line that cannot be read is an error that names file and line, or the row, counted from 1.
"""

import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import setting

TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.zst")
JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
PARQUET_ENDING = ".parquet"
PACKAGES = {".zst": "zstandard", PARQUET_ENDING: "pyarrow"}  # of the extra "data"
ROWS_AT_A_TIME = 256  # of a Parquet file
PACKED_BYTES_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class DocumentSource:
    """One item of a ``dataset_mixer`` of documents: a file, or a folder of them."""

    path: str
    text_field: str = "text"  # the key of a JSON line that holds the document
    max_documents: int | None = setting(None, low=1)  # the first so many; None reads all


class Document(NamedTuple):
    """A text and where it stands: the line or row, None when the whole file is the document."""

    text: str
    path: Path
    line: int | None


def source_files(source: DocumentSource) -> list[Path]:
    """The files of one source: itself, or every document file under the folder, in order of name.

    Errors: UserError if there is no such path, no document file in it, an unknown file ending, or
    one that needs a package which is not installed.
    """
    path = Path(source.path)
    known = (*TEXT_ENDINGS, *JSON_ENDINGS, PARQUET_ENDING)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(known))
        if not found:
            raise UserError(f"{path} holds no documents. Needed: files ending {_listed(known)}.")
        _refuse_missing_package(found)
        return found
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Check the path in dataset_mixer "
            "(paths are relative to the working directory)."
        )
    if not path.name.lower().endswith(known):
        raise UserError(f"{path} is no document file. Needed: a file ending {_listed(known)}.")
    _refuse_missing_package([path])
    return [path]


def _refuse_missing_package(files: Sequence[Path]) -> None:
    for ending, package in PACKAGES.items():
        needing = [file for file in files if file.name.lower().endswith(ending)]
        if needing and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{needing[0]} needs the package {package} to be read, which is not installed. "
                "Install it: pip install 'open-instruct[data]'."
            )


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
        name = path.name.lower()
        with open(path, "rb") as raw:
            self._open_file = raw
            if name.endswith(PARQUET_ENDING):
                yield from _read_parquet(raw, path, text_field)
                return
            file: IO[bytes] = raw
            if name.endswith(".gz"):
                file = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
            elif name.endswith(".zst"):
                file = io.BufferedReader(ZstandardFile(raw), 1 << 20)
            try:
                if name.endswith(TEXT_ENDINGS):
                    text = _decoded(file.read(), path, None)
                    if not text:
                        raise DataError(path, None, "the file is empty.", "Remove it.")
                    yield Document(text, path, None)
                else:
                    yield from _read_json_lines(file, path, text_field)
            except (EOFError, gzip.BadGzipFile, zlib.error, ZstandardDamage) as error:
                kind = "zstandard" if name.endswith(".zst") else "gzip"
                raise DataError(
                    path, None, f"the {kind} data is damaged ({error}).", "Fetch the file again."
                ) from None


class ZstandardDamage(Exception):
    """Packed bytes that cannot be unpacked."""


class ZstandardFile(io.RawIOBase):
    """The unpacked bytes of a file of one or more Zstandard frames.

    The package's own reader takes a file that was cut off for one that ends there.
    """

    def __init__(self, packed: IO[bytes]) -> None:
        import zstandard  # optional, and only for such files

        self._packed = packed
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)  # zstd --long=31
        self._damage = zstandard.ZstdError
        self._frame: Any = None  # the one being unpacked; None between two
        self._rest = b""  # packed bytes of the next frame, already read
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._packed.read(PACKED_BYTES_AT_A_TIME)
            self._rest = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its last frame does")
                return 0
            if self._frame is None:
                self._frame = self._unpacker.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._damage as error:
                raise ZstandardDamage(str(error)) from None
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes


def _read_parquet(file: IO[bytes], path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow  # optional, and only for such files
    from pyarrow import parquet

    def is_text(kind: Any) -> bool:
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        types = pyarrow.types
        return bool(
            types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        )

    row = 0
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        schema = table.schema_arrow
        if text_field not in schema.names:
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise DataError(
                path,
                None,
                f"the column {text_field!r} is missing; found {columns}.",
                "Name the column that holds the text with text_field.",
            )
        kind = schema.field(text_field).type
        if not is_text(kind):
            raise DataError(
                path,
                None,
                f"the column {text_field!r} holds {kind}, needed text.",
                "Name the column that holds the text with text_field.",
            )
        batches = table.iter_batches(ROWS_AT_A_TIME, columns=[text_field], use_threads=False)
        for batch in batches:
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        path,
                        row,
                        f"byte {error.start} of {text_field!r} is not UTF-8.",
                        "Mend or remove the row.",
                    ) from None
                if text is None:
                    raise DataError(
                        path, row, f"{text_field!r} is null.", "Mend or remove the row."
                    )
                yield Document(text, path, row)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            path, None, f"the Parquet data is damaged ({first_line}).", "Fetch the file again."
        ) from None
    if row == 0:
        raise DataError(path, None, "the file is empty.", "Remove it, or write documents to it.")


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
