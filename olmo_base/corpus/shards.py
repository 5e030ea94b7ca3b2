"""Token shards: documents as ids in flat files that are mapped into memory.

tokens_00000.bin     ids one after the other, little-endian uint16 or uint32, no header;
                     every document is followed by one end-of-text id
tokens_00000.origin  where each document came from, little-endian int64, three a document: its
                     first token in the .bin, its file (a number in ``files``), its line (0: all)
tokens_00000.json    what the two hold: the fields of ``ShardInfo``
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from olmo_base.run.errors import UserError

ORIGIN_DTYPE = np.dtype("<i8")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
Ids = npt.NDArray[np.unsignedinteger]


class Place(NamedTuple):
    """Where a document stands; ``line`` is None when the whole file is the document."""

    path: str
    line: int | None

    def __str__(self) -> str:
        return self.path if self.line is None else f"{self.path}, line {self.line}"


@dataclass(frozen=True)
class ShardInfo:
    """The sidecar of one shard."""

    dtype: str
    vocab_size: int  # one more than the largest id the tokenizer can give
    eos_token_id: int
    tokenizer_sha256: str  # of tokenizer.json
    num_tokens: int
    num_documents: int
    num_bytes: int  # of the documents' text as UTF-8
    sha256: str  # of the .bin
    origin_sha256: str  # of the .origin
    files: tuple[str, ...]  # that the documents came from, as the recipe named them


@dataclass(frozen=True)
class Shard:
    """One shard on disk."""

    path: Path  # the .bin
    info: ShardInfo

    @property
    def identity_file(self) -> Path:
        """The file whose content says what the shard holds."""
        return self.path.with_suffix(".json")

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return self.info.num_documents

    def tokens(self) -> Ids:
        """All ids, mapped into memory and read-only."""
        return np.memmap(self.path, dtype=DTYPES[self.info.dtype], mode="r")

    def origin(self) -> npt.NDArray[np.int64]:
        """Rows (first token, file, line) of the documents in order, mapped into memory."""
        path = self.path.with_suffix(".origin")
        return np.memmap(path, dtype=ORIGIN_DTYPE, mode="r", shape=(self.info.num_documents, 3))

    def places(self, start: int, stop: int) -> list[Place]:
        """The documents that the tokens start..stop-1 belong to."""
        origin_N3 = self.origin()
        first = int(np.searchsorted(origin_N3[:, 0], start, side="right")) - 1
        last = int(np.searchsorted(origin_N3[:, 0], stop, side="left"))
        return [
            Place(self.info.files[int(file)], int(line) or None)
            for _, file, line in origin_N3[first:last]
        ]

    def verify(self) -> None:
        """Compare the SHA-256 with the sidecar's. Errors: UserError if they differ."""
        origin = self.path.with_suffix(".origin")
        for path, expected in ((self.path, self.info.sha256), (origin, self.info.origin_sha256)):
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise UserError(
                    f"The content of {path} is not what was written (its SHA-256 differs from the "
                    "description's). Run the tokenize stage again into a new folder."
                )


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest id; not the number of tokens, for ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class ShardWriter:
    """Writes ``tokens_00000``, ``tokens_00001``, … in a folder, each of whole documents.

    A shard's description is written last, when its other two files are safe on disk: with it the
    shard is finished. A writer goes on after those that are finished in its folder; other files
    there are what was left of an unfinished one and are removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        eos_token_id: int,
        tokenizer_sha256: str,
        tokens_per_shard: int,
    ) -> None:
        self._folder = folder
        self._vocab_size, self._eos_token_id = vocab_size, eos_token_id
        self._tokenizer_sha256 = tokenizer_sha256
        self._tokens_per_shard = tokens_per_shard
        self._dtype = dtype_for(vocab_size)
        finished = finished_shards(folder)
        self._num_shards = len(finished)
        self.num_tokens = sum(shard.info.num_tokens for shard in finished)
        self.num_documents = sum(shard.info.num_documents for shard in finished)
        self.num_bytes = sum(shard.info.num_bytes for shard in finished)
        kept = {shard.path.stem for shard in finished}
        for path in folder.glob("tokens_*"):
            if path.stem not in kept:
                path.unlink()
        self._file: IO[bytes] | None = None

    def _start(self) -> None:
        self._path = self._folder / f"tokens_{self._num_shards:05d}.bin"
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by _end
        self._origin_file = open(self._path.with_suffix(".origin"), "wb")  # noqa: SIM115
        self._hash, self._origin_hash = hashlib.sha256(), hashlib.sha256()
        self._files: dict[str, int] = {}
        self._tokens = self._documents = self._bytes = 0

    def add(
        self,
        ids: Ids,
        lengths_N: npt.NDArray[np.int64],
        *,
        places: Sequence[Place],
        num_bytes: int,
    ) -> None:
        """Append N documents that ``Encoder`` encoded, and say where each stands.

        ``num_bytes`` is that of the text.
        """
        if self._file is None:
            self._start()
            assert self._file is not None
        data = ids.astype(DTYPES[self._dtype], copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        origin_N3 = np.empty((len(places), 3), ORIGIN_DTYPE)
        origin_N3[:, 0] = self._tokens + np.cumsum(lengths_N) - lengths_N
        for row, (path, line) in zip(origin_N3, places, strict=True):
            row[1:] = self._files.setdefault(path, len(self._files)), line or 0
        self._origin_file.write(origin_N3.tobytes())
        self._origin_hash.update(origin_N3.tobytes())
        self._tokens += len(ids)
        self._documents += len(places)
        self._bytes += num_bytes
        self.num_tokens += len(ids)
        self.num_documents += len(places)
        self.num_bytes += num_bytes
        if self._tokens >= self._tokens_per_shard:
            self._end()

    def _end(self) -> None:
        assert self._file is not None
        for written in (self._file, self._origin_file):
            written.flush()
            os.fsync(written.fileno())
            written.close()
        self._file = None
        info = ShardInfo(
            dtype=self._dtype,
            vocab_size=self._vocab_size,
            eos_token_id=self._eos_token_id,
            tokenizer_sha256=self._tokenizer_sha256,
            num_tokens=self._tokens,
            num_documents=self._documents,
            num_bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            origin_sha256=self._origin_hash.hexdigest(),
            files=tuple(self._files),
        )
        content = json.dumps(asdict(info), indent=2) + "\n"
        described = self._path.with_suffix(".json")
        temporary = described.with_suffix(".unfinished")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, described)
        self._num_shards += 1

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._end()


def finished_shards(folder: Path) -> list[Shard]:
    """The shards at the start of a folder that are whole, by their SHA-256."""
    finished: list[Shard] = []
    while (path := folder / f"tokens_{len(finished):05d}.bin").is_file():
        try:
            shard = Shard(path, _read_info(path))
            shard.verify()
        except UserError:
            break
        finished.append(shard)
    return finished


def read_shards(folder: Path) -> list[Shard]:
    """The shards of a folder in order, their sizes checked.

    Errors: UserError for a folder without shards, a sidecar that is missing or broken, a .bin of
    another size than its sidecar says.
    """
    paths = sorted(folder.glob("tokens_*.bin")) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"{folder} holds no token shards (tokens_*.bin). Give the output_dir of a finished "
            "tokenize run."
        )
    return [Shard(path, _read_info(path)) for path in paths]


def _read_info(path: Path) -> ShardInfo:
    sidecar = path.with_suffix(".json")
    again = "Run the tokenize stage again into a new folder."
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        info = ShardInfo(**{item.name: content[item.name] for item in fields(ShardInfo)})
        info = dataclasses.replace(info, files=tuple(info.files))
        itemsize = DTYPES[info.dtype].itemsize
    except FileNotFoundError:
        raise UserError(f"{sidecar} is missing beside {path.name}. {again}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{sidecar} cannot be read as a shard's description. {again}") from None
    origin = path.with_suffix(".origin")
    if not origin.is_file():
        raise UserError(f"{origin} is missing beside {path.name}. {again}")
    for file, expected in ((path, info.num_tokens * itemsize), (origin, info.num_documents * 24)):
        if file.stat().st_size != expected:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes; its description says {expected}. {again}"
            )
    return info
