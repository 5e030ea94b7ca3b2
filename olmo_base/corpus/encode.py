"""Documents become ids, in this process or in several; the order stays as it came.

Kept light (no torch): each of those processes imports this file.
"""

import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from olmo_base.corpus.shards import DTYPES, Ids, Place, dtype_for, vocab_size_of

if TYPE_CHECKING:
    from olmo_base.corpus.documents import Document

CHARACTERS_PER_BATCH = 250_000  # sent to a process at a time: a tenth of a second's work


class Encoded(NamedTuple):
    """Documents as ids: N documents of ``lengths_N`` tokens, their ends of text included."""

    ids: Ids
    lengths_N: npt.NDArray[np.int64]


# Texts of these characters alone are as Unicode's form C has them, in every version of Unicode:
# none of them decomposes, and none combines with one before it.
_FORM_C_KEEPS = re.compile(
    "[\x00-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u2030-\u205e\u20a0-\u20bf"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3]*"
)


class Encoder:
    """Texts to the ids of a tokenizer, each followed by the end-of-text id, as ``dtype``.

    Text that spells a special token is ordinary text if the tokenizer's
    ``encode_special_tokens`` is set, as ``load_tokenizer`` does. A tokenizer that normalises to
    form C only is spared it for texts that form C leaves as they are: the ids are the same, an
    eighth sooner.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int, dtype: str) -> None:
        self._tokenizer, self._eos_token_id, self._dtype = tokenizer, eos_token_id, DTYPES[dtype]
        self._without_normalizer: Tokenizer | None = None
        content = json.loads(tokenizer.to_str())
        added = [token["content"] for token in content["added_tokens"]]
        if content["normalizer"] == {"type": "NFC"} and all(map(_FORM_C_KEEPS.fullmatch, added)):
            self._without_normalizer = Tokenizer.from_str(
                json.dumps(content | {"normalizer": None})
            )
            self._without_normalizer.encode_special_tokens = tokenizer.encode_special_tokens

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The ids of the texts, one after the other."""
        parts: list[Ids | None] = [None] * len(texts)
        for tokenizer, places in self._shared_out(texts):
            chosen = [texts[place] for place in places]
            encodings = tokenizer.encode_batch_fast(chosen, add_special_tokens=False)
            for place, encoding in zip(places, encodings, strict=True):
                parts[place] = np.array([*encoding.ids, self._eos_token_id], dtype=self._dtype)
        done = [part for part in parts if part is not None]
        ids = np.concatenate(done) if done else np.empty(0, dtype=self._dtype)
        return Encoded(ids, np.array([len(part) for part in done], dtype=np.int64))

    def _shared_out(self, texts: Sequence[str]) -> Iterator[tuple[Tokenizer, list[int]]]:
        """Which tokenizer encodes which of the texts."""
        if self._without_normalizer is None:
            yield self._tokenizer, list(range(len(texts)))
            return
        is_kept = [_FORM_C_KEEPS.fullmatch(text) is not None for text in texts]
        for tokenizer, kept in ((self._without_normalizer, True), (self._tokenizer, False)):
            places = [place for place, this in enumerate(is_kept) if this is kept]
            if places:
                yield tokenizer, places


class DocumentBatch(NamedTuple):
    """Documents of one split on their way to the tokenizer."""

    split: str
    texts: list[str]
    places: list[Place]
    num_bytes: int


def gather(documents: "Iterator[tuple[str, Document]]") -> Iterator[DocumentBatch]:
    """Gather (split, document) pairs into batches, per split, of about CHARACTERS_PER_BATCH."""
    gathered: dict[str, list[Document]] = {}
    sizes: dict[str, int] = {}
    for split, document in documents:
        gathered.setdefault(split, []).append(document)
        sizes[split] = sizes.get(split, 0) + len(document.text)
        if sizes[split] >= CHARACTERS_PER_BATCH:
            yield _document_batch(split, gathered.pop(split))
            sizes[split] = 0
    for split, rest in gathered.items():
        yield _document_batch(split, rest)


def _document_batch(split: str, documents: "list[Document]") -> DocumentBatch:
    return DocumentBatch(
        split,
        [document.text for document in documents],
        [Place(str(document.path), document.line) for document in documents],
        sum(len(document.text.encode("utf-8")) for document in documents),
    )


_encoder: Encoder | None = None  # of one encoding process


def _start_worker(tokenizer_json: str, eos_token_id: int, dtype: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot say goodbye
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    _encoder = Encoder(tokenizer, eos_token_id=eos_token_id, dtype=dtype)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder(texts)


def encoded_batches(
    batches: Iterator[DocumentBatch], tokenizer: Tokenizer, *, eos_token_id: int, num_proc: int
) -> Iterator[tuple[DocumentBatch, Encoded]]:
    """Each batch with its ids, in the order the batches came, encoded by ``num_proc`` processes."""
    dtype = dtype_for(vocab_size_of(tokenizer))
    if num_proc == 1:
        encoder = Encoder(tokenizer, eos_token_id=eos_token_id, dtype=dtype)
        for batch in batches:
            yield batch, encoder(batch.texts)
        return
    waiting: deque[tuple[DocumentBatch, Future[Encoded]]] = deque()
    with ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("spawn"),  # fork would copy the parent's threads
        initializer=_start_worker,
        initargs=(tokenizer.to_str(), eos_token_id, dtype),
    ) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
            if len(waiting) > 2 * num_proc:  # bounds the memory
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
