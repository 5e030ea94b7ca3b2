"""Turn documents into token shards, some of them held out.

    output_dir/tokens/train/tokens_00000.bin …   what pretraining learns from
    output_dir/tokens/eval/tokens_00000.bin …    documents it never sees
    output_dir/tokenizer.json …                  the tokenizer the ids belong to

The shards do not depend on how many processes made them, nor on how often they were stopped:
finished ones are kept, and the documents in them are read again but not tokenized again.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from olmo_base.corpus.documents import (
    Document,
    DocumentSource,
    DocumentStream,
    document_files,
)
from olmo_base.corpus.encode import CHARACTERS_PER_BATCH, encoded_batches, gather
from olmo_base.corpus.shards import ShardWriter, dtype_for, vocab_size_of
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    sha256_file,
)
from olmo_base.run.errors import Stopped, UserError, machine_error
from olmo_base.run.launch import stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.tokenizer import (
    end_token,
    load_tokenizer,
    tokenizer_files,
    tokenizer_path,
    write_tokenizer_files,
)


@dataclass(frozen=True)
class TokenizeRecipe:
    """What one tokenisation chooses."""

    stage: Literal["tokenize"]
    tokenizer_name_or_path: str  # a folder with a tokenizer.json, or the file
    dataset_mixer: tuple[DocumentSource, ...]
    run: RunConfig = field(default_factory=RunConfig)
    eval_dataset_mixer: tuple[DocumentSource, ...] = ()  # documents to hold out, or
    eval_fraction: float = setting(0.0, low=0, below=1)  # hold out this part of dataset_mixer
    eos_token: str | None = None  # None: what the tokenizer's own configuration says
    tokens_per_shard: int = setting(100_000_000, low=1)
    num_proc: int = setting(1, low=1, changes_result=False)  # 1: threads of this process

    def __post_init__(self) -> None:
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "the list is empty; name at least one file.")
        if self.eval_dataset_mixer and self.eval_fraction:
            raise RecipeError(
                "eval_fraction",
                "eval_dataset_mixer already names the held-out documents; keep one of the two.",
            )


def is_held_out(text: str, *, fraction: float, seed: int) -> bool:
    """Whether a document goes to the held-out split: decided by its text and the seed alone.

    So it depends on no order, and copies of a document are never on both sides.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


# ---------------------------------------------------------------- the stage


def input_files(recipe: TokenizeRecipe) -> list[Path]:
    """The tokenizer's files and the documents. Errors: UserError naming one that is missing."""
    sources = (*recipe.dataset_mixer, *recipe.eval_dataset_mixer)
    return [*tokenizer_files(recipe.tokenizer_name_or_path), *document_files(sources)]


def _documents(
    recipe: TokenizeRecipe, streams: dict[str, DocumentStream], *, done: dict[str, int]
) -> Iterator[tuple[str, Document]]:
    """Every document with the name of its split, but for the first so many ``done`` of a split."""
    num_left = dict(done)
    for name, stream in streams.items():
        for document in stream:
            is_eval = name == "eval" or is_held_out(
                document.text, fraction=recipe.eval_fraction, seed=recipe.run.seed
            )
            split = "eval" if is_eval else "train"
            if num_left.get(split, 0) > 0:
                num_left[split] -= 1
            else:
                yield split, document


def _streams(recipe: TokenizeRecipe, counts: ExampleCounts) -> dict[str, DocumentStream]:
    streams = {"train": DocumentStream(recipe.dataset_mixer, counts)}
    if recipe.eval_dataset_mixer:
        streams["eval"] = DocumentStream(recipe.eval_dataset_mixer, counts)
    return streams


def plan(recipe: TokenizeRecipe) -> dict[str, object]:
    """What a run would write, for --dry-run. Tokens are estimated from the first documents."""
    tokenizer = load_tokenizer(recipe.tokenizer_name_or_path)
    end_token(tokenizer_path(recipe.tokenizer_name_or_path), tokenizer, recipe.eos_token)
    documents = {"train": 0, "eval": 0}
    num_characters, sample = 0, ""
    for split, document in _documents(recipe, _streams(recipe, ExampleCounts()), done={}):
        documents[split] += 1
        num_characters += len(document.text)
        if len(sample) < CHARACTERS_PER_BATCH:
            sample += document.text[:CHARACTERS_PER_BATCH]
    num_sampled = len(tokenizer.encode(sample, add_special_tokens=False))
    num_tokens = num_characters * num_sampled // max(1, len(sample)) + sum(documents.values())
    itemsize = 2 if dtype_for(vocab_size_of(tokenizer)) == "uint16" else 4
    return {
        "documents": documents["train"],
        "eval_documents": documents["eval"],
        "characters": num_characters,
        "tokens": num_tokens,
        "disk_bytes": num_tokens * itemsize,
    }


def run(recipe: TokenizeRecipe) -> RunFolder:
    """Write the shards. A stopped run goes on after the shards that were finished."""
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    tokenizer = load_tokenizer(recipe.tokenizer_name_or_path)
    path = tokenizer_path(recipe.tokenizer_name_or_path)
    eos_token, eos_token_id = end_token(path, tokenizer, recipe.eos_token)
    unfinished, tokens = folder.path / ".tokens.unfinished", folder.path / "tokens"
    if tokens.is_dir():  # killed after the last shard, before the run was called finished
        os.replace(tokens, unfinished)
    try:
        writers = _write_shards(recipe, folder, unfinished, tokenizer, eos_token_id)
        _refuse_empty_split(recipe, writers)
    except UserError:  # once mended the documents are others, and so are the shards
        shutil.rmtree(unfinished)
        raise
    except OSError as error:
        if (problem := machine_error(error)) is None:
            raise
        raise UserError(
            f"The shards could not be written to {unfinished}: {problem} Those that are finished "
            "are kept. Make room and run again; the run goes on after them."
        ) from error
    os.replace(unfinished, tokens)
    # beside the shards, so that pretraining need not be told which it was
    write_tokenizer_files(path, tokenizer, eos_token, folder.path)
    results = _results(writers)
    folder.log(
        f"{results['train_tokens']:,} tokens of {results['train_documents']:,} documents to learn "
        f"from, {results['eval_tokens']:,} of {results['eval_documents']:,} held out"
    )
    folder.finish(**results)
    return folder


def _write_shards(
    recipe: TokenizeRecipe,
    folder: RunFolder,
    unfinished: Path,
    tokenizer: Tokenizer,
    eos_token_id: int,
) -> dict[str, ShardWriter]:
    """Write what is missing of ``unfinished/train`` and ``unfinished/eval``."""
    writers = {}
    for split in ("train", "eval"):
        (unfinished / split).mkdir(parents=True, exist_ok=True)
        writers[split] = ShardWriter(
            unfinished / split,
            vocab_size=vocab_size_of(tokenizer),
            eos_token_id=eos_token_id,
            tokenizer_sha256=sha256_file(tokenizer_path(recipe.tokenizer_name_or_path)),
            tokens_per_shard=recipe.tokens_per_shard,
        )
    done = {split: writer.num_documents for split, writer in writers.items()}
    if any(done.values()):
        folder.log(f"going on after {sum(done.values()):,} documents in finished shards")
    streams = _streams(recipe, folder.counts)
    bytes_total = sum(stream.bytes_total for stream in streams.values())
    with (
        stop_signals() as flag,
        Progress(folder, "reading documents", bytes_total, unit="bytes") as progress,
    ):
        batches = gather(_documents(recipe, streams, done=done))
        for batch, encoded in encoded_batches(
            batches, tokenizer, eos_token_id=eos_token_id, num_proc=recipe.num_proc
        ):
            if flag.requested:
                raise Stopped(flag.signal_number, "; finished shards are kept")
            writers[batch.split].add(*encoded, places=batch.places, num_bytes=batch.num_bytes)
            num_read = sum(stream.bytes_read for stream in streams.values())
            progress.update(num_read, tokens=sum(w.num_tokens for w in writers.values()))
    for writer in writers.values():
        writer.close()
    return writers


def _refuse_empty_split(recipe: TokenizeRecipe, writers: dict[str, ShardWriter]) -> None:
    num_documents = {split: writer.num_documents for split, writer in writers.items()}
    if num_documents["train"] == 0:
        raise UserError(
            f"No document is left to learn from: eval_fraction {recipe.eval_fraction} holds out "
            f"all {num_documents['eval']}. Lower it."
        )
    if recipe.eval_fraction > 0 and num_documents["eval"] == 0:
        raise UserError(
            f"eval_fraction {recipe.eval_fraction} holds out none of the {num_documents['train']} "
            "documents. Raise it, choose another seed, or name held-out documents with "
            "eval_dataset_mixer."
        )


def _results(writers: dict[str, ShardWriter]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for split, writer in writers.items():
        results[f"{split}_tokens"] = writer.num_tokens
        results[f"{split}_documents"] = writer.num_documents
        results[f"{split}_text_bytes"] = writer.num_bytes
    results["bytes_per_token"] = round(writers["train"].num_bytes / writers["train"].num_tokens, 4)
    return results
