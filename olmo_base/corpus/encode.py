"""Documents become ids, in this process or in several; the order stays as it came.

Kept light (no torch): each of those processes imports this file.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

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


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_token_id: int, dtype: str
) -> Encoded:
    """The ids of the texts one after the other, each followed by the end-of-text id.

    Text that spells a special token is ordinary text if the tokenizer's
    ``encode_special_tokens`` is set, as ``load_tokenizer`` does.
    """
    parts = []
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        parts.append(np.array([*encoding.ids, eos_token_id], dtype=DTYPES[dtype]))
    ids = np.concatenate(parts) if parts else np.empty(0, dtype=DTYPES[dtype])
    return Encoded(ids, np.array([len(part) for part in parts], dtype=np.int64))


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


_worker: dict[str, Any] = {}  # what one encoding process holds


def _start_worker(tokenizer_json: str, eos_token_id: int, dtype: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot say goodbye
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    _worker.update(tokenizer=tokenizer, eos_token_id=eos_token_id, dtype=dtype)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return encode_documents(
        _worker["tokenizer"], texts, eos_token_id=_worker["eos_token_id"], dtype=_worker["dtype"]
    )


def encoded_batches(
    batches: Iterator[DocumentBatch], tokenizer: Tokenizer, *, eos_token_id: int, num_proc: int
) -> Iterator[tuple[DocumentBatch, Encoded]]:
    """Each batch with its ids, in the order the batches came, encoded by ``num_proc`` processes."""
    dtype = dtype_for(vocab_size_of(tokenizer))
    if num_proc == 1:
        for batch in batches:
            yield (
                batch,
                encode_documents(tokenizer, batch.texts, eos_token_id=eos_token_id, dtype=dtype),
            )
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
