"""Texts as token ids, with what many begin with tokenised once."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from eval.subject import MIN_COMMON, Subject
from olmo_base.corpus.documents import DocumentSource
from olmo_base.run.artefact import RunConfig
from olmo_base.tokenizer import TokenizerRecipe, train_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
PIECES = (
    *"Question: Answer: it's 12345 3.14 naïve café ☕ ___ <|endoftext|> |||IP_ADDRESS|||".split(),
    *(" ", "  ", "     ", "\n", "\n\n", "\t", "e\u0301", "\u0301", "a" * 30, "\r\n", "中文", "'ll"),
)


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    recipe = TokenizerRecipe(
        stage="tokenizer",
        dataset_mixer=(DocumentSource("unused"),),
        run=RunConfig(output_dir="unused"),
        vocab_size=330,
    )
    small = train_tokenizer(["Question: it's a naïve 12345 café"] * 3, recipe)
    found = {"small": PreTrainedTokenizerFast(tokenizer_object=small)}
    for path in sorted(SHARED.glob("*.json")):
        found[path.stem] = PreTrainedTokenizerFast(tokenizer_file=str(path))
    return found


def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject(None, tokenizer, None, window=8, batch_tokens=8, batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_templated", [False, True])
def test_a_common_beginning_tokenised_once_gives_the_ids_of_whole_texts(is_templated):
    chance = random.Random(0)
    num_cut = 0
    for name, tokenizer in tokenizers().items():
        asked = subject(tokenizer)
        for number in range(40):
            beginning = ""
            pieces = [piece for piece in PIECES if number % 4 == 0 or "\u0301" not in piece]
            while len(beginning) < MIN_COMMON + 100:
                beginning += chance.choice(("", " ")) + chance.choice(pieces)
            texts = [
                beginning + "".join(chance.choices(PIECES, k=chance.randint(0, 4)))
                for _ in range(5)
            ]
            expected = [
                tokenizer(
                    text, add_special_tokens=False, split_special_tokens=not is_templated
                ).input_ids
                for text in texts
            ]
            assert asked.encode(texts, is_templated=is_templated) == expected, name
            num_cut += asked._safe_cut(beginning) > 0
    assert num_cut > 20  # or nothing was tried


def test_texts_of_other_tokenizers_are_read_whole():
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    assert subject(PreTrainedTokenizerFast(tokenizer_object=whole))._safe_cut("a b c " * 99) == 0
