"""The named shapes against the published counts of parameters and operations."""

import pytest
import torch

from olmo_base.model.presets import PRESETS, ModelShape, padded_vocab_size
from olmo_base.model.transformer import Transformer, flops_per_token, num_parameters
from olmo_base.run.errors import UserError

# Parameters of the published checkpoints or configurations; operations at the trained length.
FULL_SIZE = {
    "olmo_1b": (1_176_764_416, 2048, 7.87e9),
    "olmo_1b_0724": (1_279_787_008, 4096, 8.67e9),
    "olmo_7b": (6_888_095_744, 2048, 43.3e9),
    "olmo_7b_0424": (6_888_095_744, 4096, 46.5e9),
    "olmo_7b_0724": (6_888_095_744, 4096, 46.5e9),
    "olmo_65b": (65_584_234_496, 2048, 407.1e9),
    "olmo_70b": (69_275_222_016, 4096, 445.4e9),
    "olmo2_1b": (1_484_916_736, 4096, 9.29e9),
    "olmo2_7b": (7_298_617_344, 4096, 47.76e9),
    "olmo2_13b": (13_716_198_400, 4096, 89.28e9),
    "olmo2_32b": (32_234_279_936, 4096, 206.4e9),
    "olmo3_7b": (7_298_617_344, 8192, 49.4e9),
    "olmo3_7b_64k": (7_298_617_344, 8192, 49.4e9),
    "olmo3_32b": (32_234_279_936, 8192, 210.5e9),
    "olmo3_32b_64k": (32_234_279_936, 8192, 210.5e9),
}
# What OLMo-core counts for its configurations of the same names, vocabulary 100352.
OLMO_CORE_LADDER = {
    "olmo2_190m": 267_424_512,
    "olmo2_370m": 474_022_912,
    "olmo2_600m": 732_255_552,
    "olmo2_760m": 912_360_960,
    "olmo3_190m": 267_424_512,
    "olmo3_600m": 676_414_720,
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_shapes_have_the_parameters_of_the_real_models(name: str):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(weight.numel() for weight in model.parameters()) == FULL_SIZE[name][0]


def test_every_full_size_shape_is_checked():
    assert FULL_SIZE.keys() == {name for name in PRESETS if not name.endswith("m")}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_shapes_need_the_known_operations_per_token(name: str):
    _, length, flops = FULL_SIZE[name]
    assert flops_per_token(PRESETS[name], length) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("name", OLMO_CORE_LADDER)
def test_the_ladder_has_the_parameters_that_olmo_core_counts(name: str):
    assert num_parameters(PRESETS[name]) == OLMO_CORE_LADDER[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("m")])
def test_small_shapes_have_about_the_parameters_of_their_name(name: str):
    millions = float(name.partition("_")[2].removesuffix("m"))
    config = PRESETS[name]
    count = num_parameters(config) - 2 * config.vocab_size * config.hidden_size
    if millions >= 20:
        # One embedding of 50304 rows, or OLMo-core's head of 100352
        is_of_core = millions in (190, 370, 600, 760)
        count += (100352 if is_of_core else 50304) * config.hidden_size
    assert count / 1e6 == pytest.approx(millions, rel=0.2)


def test_layers_of_olmo_3_see_a_window_but_for_each_fourth():
    assert PRESETS["olmo3_7b"].windows == (4096, 4096, 4096, None) * 8
    assert PRESETS["olmo3_7b"].rope_scaling is None
    assert PRESETS["olmo3_7b_64k"].rope_scaling is not None
    assert PRESETS["olmo3_7b_64k"].max_position_embeddings == 65536


def test_a_recipe_may_change_the_window_and_the_depth_of_olmo_3():
    shape = ModelShape(model="olmo3_7b", sliding_window=64, num_hidden_layers=6)
    config = shape.config(vocab_size=300, eos_token_id=4, pad_token_id=5)
    assert config.windows == (64, 64, 64, None, 64, None)


def test_a_key_of_another_generation_is_refused_in_a_recipe():
    for shape, words in (
        (ModelShape(model="olmo2_1m", clip_qkv=8.0), "only OLMo-1"),
        (ModelShape(model="olmo_20m", sliding_window=8), "only OLMo-3"),
        (ModelShape(model="olmo_20m", rms_norm_eps=1e-5), "no RMSNorm"),
    ):
        with pytest.raises(UserError, match=words):
            shape.config(vocab_size=300, eos_token_id=4, pad_token_id=5)


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
