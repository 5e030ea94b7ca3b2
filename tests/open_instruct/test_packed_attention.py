"""transformers' models over rows laid end to end, beside the same models over padded rows."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from olmo_base.model.varlen import Kernel
from olmo_base.run.errors import UserError
from open_instruct.adapters import AdapterConfig, add_adapter
from open_instruct.batches import Examples
from open_instruct.control_tokens import Encoded
from open_instruct.logprobs import PACKED_HEAD, PACKED_LABELS, LabelLogprobs
from open_instruct.loop import Workers
from open_instruct.packed_attention import NAME

LONGEST = 40
TINY: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def llama():
    return LlamaForCausalLM(LlamaConfig(**TINY))


def qwen2_with_biases():
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


def qwen3_with_wide_heads():
    return Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=16))


def mistral_with_a_window():
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=LONGEST))


def gpt2_with_learnt_positions():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def granite_with_scaled_scores_and_logits():
    return GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0, attention_multiplier=0.05))


def adapted(model):
    torch.manual_seed(1)
    with_adapter = add_adapter(
        model, AdapterConfig(use_peft=True, lora_r=4, lora_dropout=0.0), "base", 0
    )
    for name, weight in with_adapter.named_parameters():
        if "lora_B" in name:  # zero at first, so that no gradient would reach the other half
            torch.nn.init.normal_(weight, std=0.1)
    return with_adapter


def adapted_llama():
    return adapted(llama())


def adapted_olmo2():
    return adapted(Olmo2ForCausalLM(Olmo2Config(**TINY)))


PACKABLE = [
    (llama, PACKED_HEAD),
    (qwen2_with_biases, PACKED_HEAD),
    (qwen3_with_wide_heads, PACKED_HEAD),
    (mistral_with_a_window, PACKED_HEAD),
    (gpt2_with_learnt_positions, PACKED_HEAD),
    (granite_with_scaled_scores_and_logits, PACKED_LABELS),
    (adapted_llama, PACKED_HEAD),
    (adapted_olmo2, PACKED_HEAD),
]


def made(make_model):
    torch.manual_seed(0)
    return make_model()


def rows_of_unlike_lengths():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, first_learnt in [(9, 4), (LONGEST, 1), (5, 2), (17, 8), (9, 1)]:
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append((Encoded(ids, [place >= first_learnt for place in range(length)]),))
    return Examples(rows).batch(range(len(rows)))


def gradients(placed, batch):
    placed.model.train()
    placed.zero_grad()
    weights_L = torch.linspace(0.5, 1.5, len(batch.label_ids_L))
    logprobs_L = placed(batch)
    (logprobs_L * weights_L).mean().backward()
    found = {
        name: weight.grad.clone()
        for name, weight in placed.model.named_parameters()
        if weight.grad is not None
    }
    return logprobs_L.detach(), found


@pytest.mark.parametrize(
    ("make_model", "way"), PACKABLE, ids=lambda item: getattr(item, "__name__", "")
)
def test_rows_end_to_end_give_the_gradients_of_padded_rows(make_model, way):
    batch = rows_of_unlike_lengths()
    padded = LabelLogprobs(made(make_model), packs=False)
    packed = LabelLogprobs(made(make_model), longest=LONGEST)
    assert packed.way == way and packed.packs and packed.why_padded is None
    expected_L, expected = gradients(padded, batch)
    found_L, found = gradients(packed, batch)
    torch.testing.assert_close(found_L, expected_L, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys() and len(found) > 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_bf16_computes_the_same_rows_end_to_end_to_its_rounding():
    batch = rows_of_unlike_lengths()

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    packed = LabelLogprobs(made(llama), bf16, tolerance=1.0)
    padded = LabelLogprobs(made(llama), bf16, tolerance=1.0, packs=False)
    assert packed.packs
    exact_L, exact = gradients(LabelLogprobs(made(llama), packs=False), batch)
    theirs_L, theirs = gradients(padded, batch)
    found_L, found = gradients(packed, batch)
    assert found_L.dtype == torch.float32
    assert (found_L - exact_L).abs().max() < 2 * (theirs_L - exact_L).abs().max()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        error, usual = (one[name] - exact[name] for one in (found, theirs))
        assert error.norm() < 2 * usual.norm() + 1e-3 * exact[name].norm(), name


def test_layers_that_are_computed_again_are_computed_by_rows_again():
    batch = rows_of_unlike_lengths()
    plain = LabelLogprobs(made(llama))
    recomputing = LabelLogprobs(made(llama))
    model: Any = recomputing.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for (name, one), (_, other) in zip(
        gradients(plain, batch)[1].items(), gradients(recomputing, batch)[1].items(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6, msg=name)


def test_padding_costs_a_packed_model_no_position():
    batch, seen = rows_of_unlike_lengths(), []
    placed = LabelLogprobs(made(llama))
    model: Any = placed.model
    model.model.layers[0].mlp.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel())
    )
    placed(batch)
    assert seen == [9 + LONGEST + 5 + 17 + 9]


def test_pairs_share_their_prompt_in_rows_end_to_end():
    def answered(prompt, length, seed):
        ids = prompt + [(place * 13 + seed) % 58 + 3 for place in range(length)]
        return Encoded(ids, [place >= len(prompt) for place in range(len(ids))])

    prompts = [[5, 9, 11, 4], [7, 3]]
    pairs = Examples([(answered(p, 6, 1), answered(p, 3, 2)) for p in prompts])
    placed = LabelLogprobs(made(llama))
    assert placed.share_prompts(pairs) is None and placed.packs
    apart, shared = pairs.batch([0, 1]), pairs.sharing_prompts().batch([0, 1])
    apart_L, expected = gradients(LabelLogprobs(made(llama), packs=False), apart)
    placed.model.train()
    placed.zero_grad()
    shared_L = placed(shared)
    weights_L = torch.linspace(0.5, 1.5, len(shared_L))
    (shared_L * weights_L).mean().backward()
    torch.testing.assert_close(shared_L, apart_L, rtol=1e-5, atol=1e-5)
    for name, weight in placed.model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-5)


def test_a_model_that_packs_still_reads_padded_rows_and_is_saved_as_it_came(tmp_path):
    model: Any = made(llama)
    ids_RT = torch.randint(3, 61, (2, 7))
    mask_RT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(input_ids=ids_RT, attention_mask=mask_RT).logits
    LabelLogprobs(model)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(model(input_ids=ids_RT, attention_mask=mask_RT).logits, expected)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def by_hand(q_NHh, k_NKh, v_NKh, row_starts, longest, scale, window):
    """A kernel's attention, row by row."""
    assert window is None
    mixed = []
    for start, end in zip(row_starts[:-1].tolist(), row_starts[1:].tolist(), strict=True):
        assert 0 < end - start <= longest
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_NHh, k_NKh, v_NKh))
        mixed.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        )
    return torch.cat([row_1HTh[0].transpose(0, 1) for row_1HTh in mixed])


@pytest.mark.parametrize(
    "make_model", [llama, adapted_llama, granite_with_scaled_scores_and_logits]
)
def test_a_kernel_takes_the_rows_as_they_lie(make_model):
    batch = rows_of_unlike_lengths()
    kernel = Kernel("by hand", by_hand, None, (0, 0))
    placed = LabelLogprobs(made(make_model), kernel=kernel)
    assert placed.packs and placed.kernel is kernel
    expected_L, expected = gradients(LabelLogprobs(made(make_model), packs=False), batch)
    found_L, found = gradients(placed, batch)
    torch.testing.assert_close(found_L, expected_L, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def leaking(q_NHh, k_NKh, v_NKh, row_starts, longest, scale, window):
    """One row of them all."""
    ends = row_starts[[0, -1]]
    return by_hand(q_NHh, k_NKh, v_NKh, ends, int(ends[1]), scale, window)


@pytest.mark.parametrize("attend", [leaking, None], ids=["leaks", "cannot"])
def test_a_kernel_that_is_wrong_or_fails_on_the_probe_is_not_used(attend):
    placed = LabelLogprobs(made(llama), kernel=Kernel("bad", attend, None, (0, 0)))
    assert placed.kernel is None and placed.packs
    assert placed.wrong_kernel is not None and placed.wrong_kernel.name == "bad"


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def short_convolutions():
    kinds = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**TINY, layer_types=kinds))


def recurrent_beside_attention():
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **TINY,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )


def gemma2_with_capped_scores():
    return Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8))


def llama_computed_eagerly():
    model = llama()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("make_model", "longest", "words"),
    [
        (short_convolutions, 8, "a layer of kind conv goes on from one row into the next"),
        (recurrent_beside_attention, 8, "a layer of kind linear_attention goes on"),
        (mamba, 8, "change what the model computes|attn_implementation is"),
        (mistral_with_a_window, LONGEST + 1, f"reaches back {LONGEST} tokens, and a row has 41"),
        (mistral_with_a_window, None, "how long rows are is not known"),
        (gemma2_with_capped_scores, 8, "change what the model computes|attn_implementation is"),
        (llama_computed_eagerly, 8, "attn_implementation is eager"),
    ],
    ids=["convolution", "recurrent", "state", "window", "unknown length", "capped scores", "eager"],
)
def test_what_cannot_lie_end_to_end_is_padded_and_says_why(make_model, longest, words):
    model = made(make_model)
    before = model.config._attn_implementation
    placed = LabelLogprobs(model, longest=longest)
    assert not placed.packs and model.config._attn_implementation == before
    with pytest.raises(UserError, match=words):
        Workers(False).place(made(make_model), "packed", longest)


def test_a_row_that_is_longer_than_a_layers_window_is_never_attended_to():
    batch = rows_of_unlike_lengths()
    placed = LabelLogprobs(made(mistral_with_a_window), longest=LONGEST)
    model: Any = placed.model
    model.config.sliding_window = LONGEST - 1
    with pytest.raises(ValueError, match="a row is longer than the window of 39 tokens"):
        placed(batch)
