"""The named shapes against the published counts of parameters and operations."""

import pytest
import torch

from olmo_base.model.presets import PRESETS, ModelShape, padded_vocab_size
from olmo_base.model.transformer import Transformer, flops_per_token, num_parameters
from olmo_base.run.errors import UserError

RELEASED = {
    "olmo2_1b": (1_484_916_736, 9.29e9),
    "olmo2_7b": (7_298_617_344, 47.76e9),
    "olmo2_13b": (13_716_198_400, 89.28e9),
    "olmo2_32b": (32_234_279_936, 206.4e9),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_have_the_parameters_of_the_released_models(name: str):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(weight.numel() for weight in model.parameters()) == RELEASED[name][0]


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_need_the_known_operations_per_token(name: str):
    assert flops_per_token(PRESETS[name], 4096) == pytest.approx(RELEASED[name][1], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("m")])
def test_small_shapes_have_about_the_parameters_of_their_name(name: str):
    millions = float(name.removeprefix("olmo2_").removesuffix("m"))
    config = PRESETS[name]
    count = num_parameters(config) - 2 * config.vocab_size * config.hidden_size
    if millions >= 20:  # named with one embedding of 50304 rows
        count += 50304 * config.hidden_size
    assert count / 1e6 == pytest.approx(millions, rel=0.2)


def test_a_recipe_may_change_any_part_of_a_preset():
    shape = ModelShape(model="olmo2_1m", num_attention_heads=8, tie_word_embeddings=True)
    config = shape.config(vocab_size=300, eos_token_id=4, pad_token_id=5)
    assert (config.hidden_size, config.num_attention_heads) == (128, 8)
    assert config.num_key_value_heads == 8
    assert config.tie_word_embeddings
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (300, 4, 5)


def test_changes_that_do_not_fit_together_are_refused():
    shape = ModelShape(model="olmo2_1m", hidden_size=130)
    with pytest.raises(UserError, match="hidden_size 130 does not divide"):
        shape.config(vocab_size=300, eos_token_id=4, pad_token_id=5)


def test_vocabularies_are_rounded_up_to_whole_blocks():
    assert padded_vocab_size(100_278) == 100_352
    assert padded_vocab_size(128) == 128
    assert padded_vocab_size(2000, multiple=64) == 2048
