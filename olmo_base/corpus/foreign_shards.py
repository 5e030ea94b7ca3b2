"""Token shards that other tools wrote, read as they are.

.npy   of dolma: little-endian uint16 or uint32 ids one after the other, without the header of a
       NumPy file. Beside it may stand the same name with .csv.gz, a line for each document:
       start, end, id, source file, line in it
.ds    of datatrove: the same bytes. Beside it may stand .ds.index, the documents' ends as
       little-endian uint64, and .ds.metadata: "tokenizer|bytes of an id", then the number of ids

The files do not say which tokenizer they are for or which id ends a document: the recipe does, and
what it says is held against the ids. A file without anything beside it that was cut off between two
ids cannot be told from a whole one: dolma goes on with a document in the next file.
"""

import csv
import gzip
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from olmo_base.corpus.shards import DTYPES, Ids, Place, Shard, ShardInfo, dtype_for, vocab_size_of
from olmo_base.run.artefact import sha256_file
from olmo_base.run.errors import UserError
from olmo_base.tokenizer import end_token, load_tokenizer, tokenizer_path

ENDINGS = (".npy", ".ds")
TOKENS_AT_A_TIME = 1 << 24
FETCH_AGAIN = "Fetch the file again."


@dataclass(frozen=True)
class ForeignShard(Shard):
    """One shard of dolma's or datatrove's."""

    tokenizer_path: Path

    @property
    def identity_file(self) -> Path:
        return self.path

    @property
    def num_documents(self) -> int:
        """By what stands beside the file, or by counting end tokens."""
        return self._num_ends if self._document_ends is None else len(self._document_ends)

    def places(self, start: int, stop: int) -> list[Place]:
        """The documents that the tokens start..stop-1 belong to; the file, if nothing says them."""
        if self._document_ends is None:
            return [Place(str(self.path), None)]
        first = int(np.searchsorted(self._document_ends, start, side="right"))
        last = int(np.searchsorted(self._document_ends, stop, side="left"))
        numbers = range(first, min(last + 1, len(self._document_ends)))
        if self.path.suffix == ".npy":
            return [self._dolma_documents[1][number] for number in numbers]
        return [Place(f"{self.path}, document {number + 1}", None) for number in numbers]

    def verify(self) -> None:
        """Look at every id. Errors: UserError for one that the tokenizer does not have, no end of
        text anywhere, or other documents than those that are described beside the file."""
        tokens = self.tokens()
        for first in range(0, len(tokens), TOKENS_AT_A_TIME):
            self.refuse_unknown_ids(tokens[first : first + TOKENS_AT_A_TIME], first)
        ends = self._document_ends
        if ends is None:
            if self._num_ends == 0:
                raise UserError(
                    f"{self.path} holds no {self.info.eos_token_id} ({self.eos_token}) at all, the "
                    "id that should end its documents. Name the token that does with eos_token."
                )
            return
        if len(ends) == 0 or ends[-1] != len(tokens) or np.any(np.diff(ends) <= 0):
            told = ends[-1] if len(ends) else 0
            raise UserError(
                f"{self.path} holds {len(tokens):,} ids; the list of documents beside it ends at "
                f"{told:,}. {FETCH_AGAIN}"
            )
        found = np.asarray(tokens[ends.astype(np.int64) - 1])
        wrong = np.flatnonzero(found != self.info.eos_token_id)
        if len(wrong) == len(ends):
            raise UserError(
                f"{self.path}: its documents end with the id {found[0]}, not with "
                f"{self.info.eos_token_id} ({self.eos_token}). Name the token that ends them with "
                "eos_token, or give the tokenizer that the file was made with."
            )

    def refuse_unknown_ids(self, ids: Ids, first: int) -> None:
        """Errors: UserError if an id, the first of which is number ``first``, is not a token's."""
        if len(ids) == 0 or (largest := int(ids.max())) < self.info.vocab_size:
            return
        raise UserError(
            f"{self.path}: id number {first + int(ids.argmax()):,} is {largest:,}; those of "
            f"{self.tokenizer_path} are below {self.info.vocab_size:,}. Give the tokenizer that "
            f"the file was made with, or the right dtype (it was read as {self.info.dtype})."
        )

    @property
    def eos_token(self) -> str | None:
        return load_tokenizer(self.tokenizer_path).id_to_token(self.info.eos_token_id)

    @cached_property
    def _num_ends(self) -> int:
        tokens, eos = self.tokens(), self.info.eos_token_id
        return sum(
            int(np.count_nonzero(tokens[first : first + TOKENS_AT_A_TIME] == eos))
            for first in range(0, len(tokens), TOKENS_AT_A_TIME)
        )

    @cached_property
    def _document_ends(self) -> npt.NDArray[np.int64] | None:
        if self.path.suffix == ".npy":
            return self._dolma_documents[0] if _beside_npy(self.path).is_file() else None
        index = self.path.with_name(self.path.name + ".index")
        if not index.is_file():
            return None
        if index.stat().st_size % 8:
            raise UserError(f"{index} is not a list of 8-byte numbers. {FETCH_AGAIN}")
        return np.fromfile(index, dtype="<u8").astype(np.int64)

    @cached_property
    def _dolma_documents(self) -> tuple[npt.NDArray[np.int64], list[Place]]:
        """The end of each document and where it came from."""
        path, ends, places = _beside_npy(self.path), [], []
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                for _, end, _, source, line in csv.reader(file):
                    ends.append(int(end))
                    places.append(Place(source, int(line)))
        except (EOFError, OSError, zlib.error, ValueError, csv.Error) as error:
            raise UserError(
                f"{path}, line {len(ends) + 1} cannot be read as start, end, id, file, line "
                f"({error}). {FETCH_AGAIN} Or remove it: documents then go unnamed."
            ) from None
        return np.array(ends, dtype=np.int64), places


def _beside_npy(path: Path) -> Path:
    return path.with_suffix(".csv.gz")


def foreign_files(path: str | Path) -> list[Path]:
    """The .npy and .ds files at a path, itself or in the folder, in order of name."""
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix in ENDINGS else []
    return sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file())


def read_foreign_shards(
    path: str | Path,
    *,
    tokenizer_name_or_path: str | Path,
    eos_token: str | None = None,
    dtype: str | None = None,
) -> list[Shard]:
    """The shards at a path, as the recipe describes them; only the start of each is looked at.

    ``dtype`` None is what a .ds.metadata says, or the smallest that holds the tokenizer's ids, as
    both tools choose it. Errors: UserError for a file that cannot be what it is said to be.
    """
    tokenizer = load_tokenizer(tokenizer_name_or_path)
    json_path = tokenizer_path(tokenizer_name_or_path)
    eos_token_id = end_token(json_path, tokenizer, eos_token)[1]
    vocab_size, sha256 = vocab_size_of(tokenizer), sha256_file(json_path)
    shards: list[Shard] = []
    for file in foreign_files(path):
        if file.with_name(file.name + ".loss").exists():
            raise UserError(
                f"{file}.loss says which ids not to learn from, which pretraining here does not "
                "do. Move it away to learn from all."
            )
        told = _metadata(file)
        chosen = dtype or (told.dtype if told else None) or dtype_for(vocab_size)
        if told and chosen != told.dtype:
            raise UserError(
                f"{file}.metadata says that its ids are {told.dtype}; dtype is {chosen}. "
                "Leave dtype out."
            )
        num_bytes, itemsize = file.stat().st_size, DTYPES[chosen].itemsize
        if num_bytes == 0:
            raise UserError(f"{file} is empty. {FETCH_AGAIN}")
        if num_bytes % itemsize:
            raise UserError(
                f"{file} has {num_bytes:,} bytes, which is no whole number of {chosen} ids. It was "
                f"cut off, or has another dtype. {FETCH_AGAIN}"
            )
        if told and num_bytes != told.num_tokens * itemsize:
            raise UserError(
                f"{file} holds {num_bytes // itemsize:,} ids; its .metadata says "
                f"{told.num_tokens:,}. {FETCH_AGAIN}"
            )
        info = ShardInfo(
            dtype=chosen,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            tokenizer_sha256=sha256,
            num_tokens=num_bytes // itemsize,
            num_documents=0,  # counted when asked for
            num_bytes=0,  # of text: not known
            sha256="",
            origin_sha256="",
            files=(str(file),),
        )
        shard = ForeignShard(file, info, json_path)
        _refuse_other_dtype(shard)
        shards.append(shard)
    return shards


@dataclass(frozen=True)
class _Metadata:
    dtype: str
    num_tokens: int


def _metadata(file: Path) -> _Metadata | None:
    """What datatrove wrote beside a .ds file."""
    path = file.with_name(file.name + ".metadata")
    if not path.is_file():
        return None
    try:
        tokenizer, count = path.read_text(encoding="utf-8").splitlines()[:2]
        return _Metadata({"2": "uint16", "4": "uint32"}[tokenizer.rpartition("|")[2]], int(count))
    except (ValueError, KeyError):
        raise UserError(
            f"{path} does not say the bytes of an id and their number. {FETCH_AGAIN}"
        ) from None


def _refuse_other_dtype(shard: ForeignShard) -> None:
    start = np.asarray(shard.tokens()[: 1 << 20])
    if start[:4].tobytes()[:6] == b"\x93NUMPY":
        raise UserError(
            f"{shard.path} is a NumPy file with a header; dolma's .npy shards have none. Write its "
            "array without: array.tofile(path)."
        )
    # The upper halves of uint32 ids are all but zero; in uint16 text that never happens.
    upper = start[1::2]
    is_doubled = shard.info.dtype == "uint16" and shard.info.num_tokens % 2 == 0
    if is_doubled and len(upper) >= 32 and int(upper.max()) <= 1:
        raise UserError(
            f"{shard.path} was read as uint16, and every second id is 0 or 1: its ids look like "
            "uint32. Set dtype: uint32."
        )
    shard.refuse_unknown_ids(start, 0)
