"""Documents become the ids that their tokenizer gives them, by the shorter way too."""

import random
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from olmo_base.corpus.encode import _FORM_C_KEEPS, Encoder

KEPT = "".join(filter(_FORM_C_KEEPS.fullmatch, map(chr, range(sys.maxunicode + 1))))


def test_form_c_changes_none_of_the_characters_called_kept():
    chance = random.Random(0)
    form_c = normalizers.NFC()
    for _ in range(3):
        text = "".join(chance.sample(KEPT, len(KEPT)))
        assert unicodedata.normalize("NFC", text) == text
        assert form_c.normalize_str(text) == text
    assert len(KEPT) > 30_000


def test_none_of_them_is_the_second_half_of_a_composed_character():
    halves = {
        parts[1]
        for code in range(sys.maxunicode + 1)
        if len(parts := unicodedata.decomposition(chr(code)).split()) == 2 and "<" not in parts[0]
    }
    assert len(halves) > 50
    assert not [half for half in halves if chr(int(half, 16)) in KEPT]
    assert not [c for c in KEPT if unicodedata.combining(c)]


@pytest.fixture
def tokenizer():
    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["née naïve “quoted” café", "a plain line, and another one", "<|end|>  spaces"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    found.add_tokens(["  ", "plain line"])
    found.encode_special_tokens = True
    return found


TEXTS = [
    "a plain line,  and café",
    "cafe\u0301 ne\u0301e",  # e and an accent, which form C makes one
    "“quoted” <|end|> naïve",
    "\u2126 \u212b \u037e",  # ohm, ångström, a Greek question mark: form C replaces them
    "",
    "\uac00\u11a8 가각 ﬁ 日本 が か\u3099",
]


def test_ids_are_those_of_the_tokenizer_in_order(tokenizer):
    encoded = Encoder(tokenizer, eos_token_id=7, dtype="uint16")(TEXTS)
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, 7] for text in TEXTS]
    assert encoded.lengths_N.tolist() == [len(ids) for ids in expected]
    assert encoded.ids.tolist() == [number for ids in expected for number in ids]
    assert 0 not in encoded.ids  # what spells a special token is text


def test_no_other_normalizer_is_spared(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()
    encoded = Encoder(tokenizer, eos_token_id=7, dtype="uint16")(["A PLAIN line"])
    lower = tokenizer.encode("a plain line", add_special_tokens=False).ids
    assert encoded.ids.tolist() == [*lower, 7]
