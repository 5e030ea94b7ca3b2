"""The engine with laid-out weights against the model itself."""

from typing import Any

import pytest
import torch

from olmo_base.model.decode import LaidOutDecoder, LaidOutWeights, NativeDecoder
from olmo_base.model.generate import Generator
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import ModelConfig, Transformer

SHAPES: dict[str, dict[str, Any]] = {
    "olmo, clipped and tied": {
        "model_type": "olmo",
        "clip_qkv": 0.5,
        "tie_word_embeddings": True,
        "num_key_value_heads": 3,
    },
    "olmo2, grouped heads": {"num_key_value_heads": 1},
    "olmo3, windowed, with YaRN": {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "sliding_window": 5,
        "rope_scaling": Yarn(factor=4.0, original_max_position_embeddings=16),
    },
}


def a_model(name: str) -> Transformer:
    torch.manual_seed(3)
    config = ModelConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 128,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **SHAPES[name],
        }
    )
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [9, 2, 5]])
@torch.inference_mode()
def test_a_step_over_laid_out_weights_gives_the_models_logits(name: str, lengths: list[int]):
    model = a_model(name)
    prompts = [list(range(2, 2 + length)) for length in lengths]
    plain = NativeDecoder(model, prompts)
    laid_out = LaidOutDecoder(model, prompts, LaidOutWeights(model, len(prompts)))
    torch.testing.assert_close(laid_out.prefill(), plain.prefill())
    for step in range(8):  # past the window
        ids_B = torch.arange(plain.cache.num_rows) + step
        expected_BV = plain.step(ids_B)
        torch.testing.assert_close(laid_out.step(ids_B), expected_BV, rtol=1e-5, atol=1e-5)
        if step == 4 and len(prompts) > 1:
            plain.keep_rows([2, 0])
            laid_out.keep_rows([2, 0])


@pytest.mark.parametrize("name", ["olmo, clipped and tied", "olmo2, grouped heads"])
@torch.inference_mode()
def test_rows_behind_one_beginning_keep_it_once_and_have_the_logits_of_whole_rows(name: str):
    model = a_model(name)
    beginning = [2 + place % 40 for place in range(50)]
    ends = [[5, 6, 7, 8], [9], [10, 11]]
    prefix = NativeDecoder(model, [beginning])
    prefix.prefill()
    laid_out, whole = (
        LaidOutDecoder(model, [first + end for end in ends], LaidOutWeights(model, 3), before)
        for first, before in ((beginning, prefix), (beginning, None))
    )
    torch.testing.assert_close(laid_out.prefill(), whole.prefill(), rtol=1e-5, atol=1e-5)
    assert laid_out.cache.capacity <= whole.cache.capacity - 50
    late, late_whole = (
        LaidOutDecoder(model, [[*beginning, 12, 13]], LaidOutWeights(model, 1), before)
        for before in (prefix, None)
    )
    for step in range(6):
        ids_B = torch.arange(laid_out.cache.num_rows) + step
        expected_BV = whole.step(ids_B)
        torch.testing.assert_close(laid_out.step(ids_B), expected_BV, rtol=1e-5, atol=1e-5)
        if step == 2:
            for decoder, other in ((laid_out, late), (whole, late_whole)):
                decoder.keep_rows([2, 0])
                other.prefill()
                decoder.join(other)


def test_weights_that_were_changed_are_laid_out_anew():
    model = a_model("olmo2, grouped heads")
    generator = Generator(model, eos_token_ids=[], max_length=128)
    prompts = [[4, 5, 6]]
    generator.generate(prompts, max_new_tokens=4)
    other = a_model("olmo2, grouped heads")
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            new.mul_(-1.7)
            weight.copy_(new)
    expected = Generator(other, eos_token_ids=[], max_length=128).generate(
        prompts, max_new_tokens=20
    )
    assert generator.generate(prompts, max_new_tokens=20) == expected
