"""What a model will see of a recipe's data: for `open-instruct data inspect`.

recipe -> the rows that training would read -> ids and which are learnt -> lines for a person.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from olmo_base.run.artefact import ExampleCounts
from open_instruct.control_tokens import Encoded
from open_instruct.encode import ChatEncoder, encode_dialogues, encode_pairs, load_chat_encoder
from open_instruct.examples import (
    SourceUse,
    mixture_lines,
    read_dialogues,
    read_pairs,
)
from open_instruct.preference import PreferenceRecipe
from open_instruct.sft import SftRecipe

Sequences = dict[str, Encoded]  # one example: a name ("dialogue", "chosen", "rejected") -> ids


def preview(
    recipe: SftRecipe | PreferenceRecipe, num_examples: int, *, by_token: bool, colour: bool
) -> Iterator[str]:
    """The first examples as training sees them, then lengths and what was cut or dropped.

    Learnt text is green where ``colour``, else between ⟦ and ⟧; ``by_token`` gives each token a
    line of its own. Errors: those of the run itself (DataError, UserError).
    """
    encoder = load_chat_encoder(recipe.model.model_name_or_path, recipe.chat_template)
    counts = ExampleCounts()
    uses: list[SourceUse] = []
    examples = _examples(recipe, encoder, counts, uses)
    for number, example in enumerate(examples[:num_examples], start=1):
        for name, sequence in example.items():
            yield (
                f"--- {name} {number}: {len(sequence.ids):,} tokens, "
                f"{sum(sequence.is_learnt):,} learnt"
            )
            if by_token:
                yield from _token_lines(sequence, encoder, colour)
            else:
                yield _marked_text(sequence, encoder, colour)
    yield "--- all examples"
    yield from mixture_lines(uses)
    num_dropped = counts.dropped.total()
    yield f"{counts.used:,} used, {counts.truncated:,} truncated, {num_dropped:,} dropped"
    yield from (f"  dropped, {reason}: {number:,}" for reason, number in counts.dropped.items())
    sequences = list(itertools.chain(*(example.values() for example in examples)))
    if sequences:
        yield from _length_lines(sequences, recipe.data.max_length)


def _examples(
    recipe: SftRecipe | PreferenceRecipe,
    encoder: ChatEncoder,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> list[Sequences]:
    data = recipe.data
    if isinstance(recipe, SftRecipe):
        dialogues = read_dialogues(
            data.dataset_mixer,
            seed=recipe.run.seed,
            on_bad_row=data.on_bad_row,
            counts=counts,
            uses=uses,
        )
        encoded = encode_dialogues(dialogues, encoder, data, counts)
        return [{"dialogue": sequence} for sequence in encoded]
    pairs = read_pairs(
        data.dataset_mixer,
        seed=recipe.run.seed,
        on_bad_row=data.on_bad_row,
        counts=counts,
        uses=uses,
    )
    return [
        {"chosen": pair.chosen, "rejected": pair.rejected}
        for pair in encode_pairs(pairs, encoder, data, counts)
    ]


def _spans(sequence: Encoded) -> Iterator[tuple[bool, list[int]]]:
    """Runs of ids that are all learnt or all not."""
    pairs = zip(sequence.is_learnt, sequence.ids, strict=True)
    for is_learnt, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield is_learnt, [token_id for _, token_id in run]


def _marked_text(sequence: Encoded, encoder: ChatEncoder, colour: bool) -> str:
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    text = ""
    for is_learnt, ids in _spans(sequence):
        words = encoder.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        text += f"{opening}{words}{closing}" if is_learnt else words
    return text


def _token_lines(sequence: Encoded, encoder: ChatEncoder, colour: bool) -> Iterator[str]:
    for token_id, is_learnt in zip(sequence.ids, sequence.is_learnt, strict=True):
        text = encoder.tokenizer.backend_tokenizer.decode([token_id], skip_special_tokens=False)
        line = f"{token_id:>8}  {'learnt' if is_learnt else '      '}  {text!r}"
        yield f"\033[32m{line}\033[0m" if colour and is_learnt else line


def _length_lines(sequences: Sequence[Encoded], max_length: int) -> Iterator[str]:
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    num_learnt = sum(sum(sequence.is_learnt) for sequence in sequences)
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    yield (
        f"tokens: {lengths.sum():,} in {len(sequences):,} sequences, {num_learnt:,} learnt "
        f"({num_learnt / lengths.sum():.0%})"
    )
    yield (
        f"length: shortest {lengths.min():,}, median {middle:,}, 95% at most {most:,}, "
        f"longest {lengths.max():,} (max_length {max_length:,})"
    )
