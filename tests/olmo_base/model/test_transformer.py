"""The native models against transformers' own, and against what attention must mean."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from olmo_base.model.hf_weights import hf_name
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import (
    FULL,
    GENERATIONS,
    SLIDING,
    EndsInit,
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
)
from olmo_base.run.errors import UserError

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=200,
    eos_token_id=0,
    pad_token_id=1,
)


SMALL_OLMO1 = dataclasses.replace(SMALL, model_type="olmo", clip_qkv=0.5)
SMALL_OLMO3 = dataclasses.replace(
    SMALL,
    model_type="olmo3",
    num_hidden_layers=4,
    sliding_window=11,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=50),
)
EACH_GENERATION = pytest.mark.parametrize(
    "small", [SMALL_OLMO1, SMALL, SMALL_OLMO3], ids=list(GENERATIONS)
)


def random_config(seed: int, generation: str = "olmo2") -> ModelConfig:
    """Odd head counts, grouped heads, tied or not, all sorts of sizes."""
    draw = random.Random(seed)
    num_kv_heads = draw.choice([1, 2, 3, 5])
    num_heads = num_kv_heads * draw.choice([1, 2, 3])
    vocab_size = draw.randint(20, 300)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=num_heads * draw.choice([4, 8, 10, 16]),
        intermediate_size=draw.randint(7, 90),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=draw.choice([70, 100, 130]),
        eos_token_id=draw.randrange(vocab_size),
        pad_token_id=draw.randrange(vocab_size),
        rope_theta=draw.choice([100.0, 10_000.0, 500_000.0]),
        tie_word_embeddings=bool(seed % 2),
        model_type=generation,
        **own_choices(generation, draw),
    )


def own_choices(generation: str, draw: random.Random) -> dict[str, Any]:
    """What only this generation has."""
    if generation == "olmo":
        return {"clip_qkv": draw.choice([None, 0.1, 0.7])}
    eps = draw.choice([1e-6, 1e-5])
    if generation == "olmo2":
        return {"rms_norm_eps": eps}
    yarn = Yarn(
        factor=draw.choice([1.5, 8.0]),
        original_max_position_embeddings=draw.choice([20, 64]),
        beta_fast=draw.choice([2.0, 32.0]),
        attention_factor=draw.choice([None, 1.3]),
    )
    return {
        "rms_norm_eps": eps,
        "sliding_window": draw.choice([1, 2, 9, 33, 500]),
        "rope_scaling": draw.choice([None, yarn]),
    }


def random_model(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> Transformer:
    """Weights much larger than at the start of training, norms not at 1: nothing hides."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=scale)
    return model


def same_in_transformers(model: Transformer) -> Any:
    """transformers' model with the same weights, handed over in memory."""
    shape = dataclasses.asdict(model.config)
    yarn = shape.pop("rope_scaling")
    plain = {"rope_theta": shape.pop("rope_theta"), "rope_type": "default"}
    generation = shape.pop("model_type")
    layer_types, window = shape.pop("layer_types"), shape.pop("sliding_window")
    clip_qkv = shape.pop("clip_qkv")
    other: Any
    if generation == "olmo":
        shape.pop("rms_norm_eps")
        other = OlmoForCausalLM(OlmoConfig(**shape, clip_qkv=clip_qkv, rope_parameters=plain))
    elif generation == "olmo2":
        other = Olmo2ForCausalLM(Olmo2Config(**shape, rope_parameters=plain))
    else:
        if layer_types is None:  # as released: three with a window, one without; the last without
            layer_types = [SLIDING, SLIDING, SLIDING, FULL][: shape["num_hidden_layers"]]
            layer_types[-1] = FULL
        scaled = plain | {"rope_type": "yarn", **yarn} if yarn else dict(plain)
        other = Olmo3ForCausalLM(
            Olmo3Config(
                **shape,
                sliding_window=window,
                layer_types=list(layer_types),
                rope_parameters={FULL: scaled, SLIDING: plain},
            )
        )
    weights = {hf_name(name): weight for name, weight in model.state_dict().items()}
    result = other.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    other.tie_weights()
    return other.eval()


def layer_outputs(model: Transformer, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in (model.embed_tokens, *model.layers)
    ]
    final = model(ids_BT)
    for hook in hooks:
        hook.remove()
    return [*outputs[:-1], final]  # as transformers lists them: the last one is normed


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_training", [False, True])
def test_logits_and_every_layer_equal_those_of_transformers(
    generation: str, seed: int, is_training: bool
):
    config = random_config(seed, generation)
    model = random_model(config, seed)
    other = same_in_transformers(model)
    length = random.Random(seed).choice([1, 7, config.max_position_embeddings])
    ids_BT = torch.randint(config.vocab_size, (3, length))
    with torch.set_grad_enabled(is_training):  # the CPU trains through kernels of its own
        ours = layer_outputs(model, ids_BT)
        logits_BTV = model.logits(ours[-1])
        theirs = other(ids_BT, output_hidden_states=True)
    assert len(ours) == len(theirs.hidden_states)
    for mine, yours in zip(ours, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_BTV, theirs.logits, atol=1e-5, rtol=1e-5)


def test_the_random_shapes_hold_every_choice():
    configs = [random_config(seed, generation) for seed in range(8) for generation in GENERATIONS]
    assert any(config.clip_qkv for config in configs)
    assert any(config.rope_scaling for config in configs)
    assert any(config.tie_word_embeddings for config in configs if config.model_type == "olmo")
    assert any(config.num_attention_heads % 2 for config in configs)
    assert any(config.num_key_value_heads < config.num_attention_heads for config in configs)
    assert any(
        window is not None and window < config.max_position_embeddings
        for config in configs
        for window in config.windows
    )


def test_layers_may_be_windowed_in_any_order():
    types = (FULL, SLIDING, FULL, SLIDING)
    model = random_model(dataclasses.replace(SMALL_OLMO3, layer_types=types))
    assert model.windows == (None, 11, None, 11)
    ids_BT = torch.randint(61, (2, 90))
    with torch.no_grad():
        theirs = same_in_transformers(model)(ids_BT).logits
        torch.testing.assert_close(model.logits(model(ids_BT)), theirs, atol=1e-5, rtol=1e-5)


def test_a_windowed_layer_sees_its_window_and_no_further():
    config = dataclasses.replace(
        SMALL_OLMO3, num_hidden_layers=1, sliding_window=3, layer_types=(SLIDING,)
    )
    model = random_model(config)
    ids_BT = torch.randint(61, (1, 20))
    before_BTD = model(ids_BT)
    changed_BT = ids_BT.clone()
    changed_BT[0, 5] = (ids_BT[0, 5] + 1) % 61
    is_other_T = (model(changed_BT) - before_BTD).abs().amax(-1)[0] > 1e-4
    assert is_other_T.nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_gradients_equal_those_of_transformers(generation: str, seed: int):
    # transformers gives the padding id's embedding no gradient, so it does not occur in the text.
    config = dataclasses.replace(random_config(seed, generation), pad_token_id=0)
    model = random_model(config, seed)
    other = same_in_transformers(model)
    ids_BT = torch.randint(1, config.vocab_size, (2, config.max_position_embeddings))
    for logits_BTV in (model.logits(model(ids_BT)), other(ids_BT).logits):
        torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
        ).backward()
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, theirs[hf_name(name)].grad, atol=1e-6, rtol=1e-4, msg=name
        )


@EACH_GENERATION
def test_a_position_never_sees_what_comes_after_it(small: ModelConfig):
    model = random_model(small)
    ids_BT = torch.randint(61, (2, 150))
    changed_BT = ids_BT.clone()
    changed_BT[:, 90:] = torch.randint(61, (2, 60))
    torch.testing.assert_close(model(ids_BT)[:, :90], model(changed_BT)[:, :90])


@EACH_GENERATION
@pytest.mark.parametrize("is_training", [False, True])
def test_documents_packed_into_a_row_give_what_they_give_alone(
    small: ModelConfig, is_training: bool
):
    model = random_model(small)
    documents = [torch.randint(61, (1, length)) for length in (5, 90, 1, 40)]
    packed_BT = torch.cat(documents, dim=1)
    numbers_BT = torch.cat([torch.full_like(ids, n) for n, ids in enumerate(documents)], dim=1)
    with torch.set_grad_enabled(is_training):
        packed_BTD = model(packed_BT, document_ids_BT=numbers_BT)
        alone_BTD = torch.cat([model(ids) for ids in documents], dim=1)
    torch.testing.assert_close(packed_BTD, alone_BTD, atol=1e-5, rtol=1e-5)


@EACH_GENERATION
def test_gradients_of_packed_documents_are_those_of_the_documents_alone(small: ModelConfig):
    model = random_model(small)
    documents = [torch.randint(61, (1, length)) for length in (70, 3, 80)]
    packed_BT = torch.cat(documents, dim=1)
    numbers_BT = torch.cat([torch.full_like(ids, n) for n, ids in enumerate(documents)], dim=1)
    model(packed_BT, document_ids_BT=numbers_BT).square().sum().backward()
    packed = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad()
    sum(model(ids).square().sum() for ids in documents).backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(packed[name], weight.grad, atol=1e-4, rtol=1e-4, msg=name)


@EACH_GENERATION
def test_bf16_autocast_stays_close_to_fp32_and_keeps_the_residual_stream_in_fp32(
    small: ModelConfig,
):
    model = random_model(small, scale=0.02)
    ids_BT = torch.randint(61, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = model(ids_BT)
    assert hidden_BTD.dtype == torch.float32
    torch.testing.assert_close(hidden_BTD, model(ids_BT), atol=0.1, rtol=0.05)
    hidden_BTD.sum().backward()
    assert all(
        weight.grad is not None
        for name, weight in model.named_parameters()
        if name != "lm_head.weight"
    )


@EACH_GENERATION
@pytest.mark.parametrize("is_training", [False, True])
def test_bf16_weights_give_what_transformers_gives_in_bf16(small: ModelConfig, is_training: bool):
    model = random_model(small).bfloat16()
    other = same_in_transformers(model).bfloat16()
    ids_BT = torch.randint(61, (2, 64))
    with torch.set_grad_enabled(is_training):
        logits_BTV = model.logits(model(ids_BT))
        theirs_BTV = other(ids_BT).logits
    assert logits_BTV.dtype == theirs_BTV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BTV, theirs_BTV, atol=0.1, rtol=0.05)


@EACH_GENERATION
def test_recomputing_layers_in_the_backward_pass_changes_no_gradient(small: ModelConfig):
    model = random_model(small)
    ids_BT = torch.randint(61, (2, 70))
    grads = []
    for model.gradient_checkpointing in (False, True, "none", "selective", "full"):
        model.zero_grad()
        model(ids_BT).square().sum().backward()
        grads.append(
            [weight.grad.clone() for weight in model.layers.parameters() if weight.grad is not None]
        )
    for kind in grads[1:]:
        for plain, recomputed in zip(grads[0], kind, strict=True):
            assert torch.equal(plain, recomputed)


def test_selective_recomputation_makes_no_matrix_product_twice():
    model = random_model(SMALL)
    ids_BT = torch.randint(61, (2, 70))
    kept = {}
    for kind in ("none", "selective", "full"):
        model.gradient_checkpointing = kind
        multiplied = CountProducts()
        loss = model(ids_BT).square().sum()
        with multiplied:
            loss.backward()
        kept[kind] = multiplied.count
    assert kept["none"] == kept["selective"] < kept["full"]


class CountProducts(TorchDispatchMode):
    """Counts plain matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@EACH_GENERATION
@pytest.mark.parametrize("sizes", [[20, 1, 1, 30, 8], [1, 2, 3, 4, 50], [1] * 60, [60]])
def test_cached_steps_of_any_size_give_what_one_pass_gives(small: ModelConfig, sizes: list[int]):
    model = random_model(small)
    ids_BT = torch.randint(61, (3, 60))
    cache = model.new_cache([0, 0, 0], capacity=8)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids_BT.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids_BT), atol=1e-5, rtol=1e-5)


@EACH_GENERATION
@pytest.mark.parametrize("sizes", [[20, 1, 1, 30, 8], [7, 5, 18] + [1] * 30])
def test_cached_rows_with_padding_give_what_each_gives_alone(small: ModelConfig, sizes: list[int]):
    model = random_model(small)
    padding = [0, 7, 17]
    rows = [torch.randint(61, (1, 60 - number)) for number in padding]
    filled_BT = torch.cat(
        [torch.nn.functional.pad(row, (60 - row.shape[1], 0), value=1) for row in rows]
    )
    cache = model.new_cache(padding, capacity=8)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in filled_BT.split(sizes, dim=1)]
        together_BTD = torch.cat(pieces, 1)
        for row, number, hidden_TD in zip(rows, padding, together_BTD, strict=True):
            torch.testing.assert_close(hidden_TD[number:], model(row)[0], atol=1e-5, rtol=1e-5)


def test_a_windowed_layers_cache_keeps_no_more_than_its_window():
    model = random_model(SMALL_OLMO3)  # three layers of window 11 and one that sees all
    cache = model.new_cache([0], capacity=8)
    with torch.no_grad():
        for piece in torch.randint(61, (1, 128)).split([40, *[1] * 88], dim=1):
            model(piece, cache=cache)
    slots = 3 * 11 + cache.capacity
    assert cache.num_bytes == 2 * slots * 2 * 8 * 4  # keys and values, 2 heads of 8, fp32
    assert cache.capacity < 256


def test_weights_start_normal_with_std_002_cut_at_three_sigma_and_norms_at_one():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, vocab_size=5000))
    weight = model.embed_tokens.weight
    assert weight.abs().max() <= 0.06
    # A normal cut at 3 sigma has 0.9866 of its standard deviation left.
    assert weight.std().item() == pytest.approx(0.02 * 0.9866, rel=0.01)
    assert torch.equal(model.state_dict()["norm.weight"], torch.ones(32))


def test_embedding_and_head_of_their_own_size_leave_the_other_weights_as_they_were():
    drawn = []
    for ends in (EndsInit(), EndsInit(embedding_init_std=1.0, head_init_std=0.002)):
        torch.manual_seed(0)
        drawn.append(Transformer(SMALL, ends).state_dict())
    usual, other = drawn
    assert usual.pop("embed_tokens.weight").mul(50).allclose(other.pop("embed_tokens.weight"))
    assert usual.pop("lm_head.weight").div(10).allclose(other.pop("lm_head.weight"))
    assert all(torch.equal(usual[name], other[name]) for name in usual)


def test_weights_of_olmo_1_start_by_width_and_depth():
    """Standard deviations of the original's "mitchell" scheme, worked out by hand."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        SMALL_OLMO1,
        hidden_size=100,
        intermediate_size=400,
        num_attention_heads=2,
        vocab_size=500,
    )
    model = Transformer(config)
    expected = {
        "embed_tokens.weight": 0.1,
        "lm_head.weight": 0.1,
        "layers.1.attention.q_proj.weight": 0.1,
        "layers.1.feed_forward.up_proj.weight": 0.1,
        "layers.0.attention.o_proj.weight": 200**-0.5,
        "layers.1.attention.o_proj.weight": 400**-0.5,
        "layers.1.feed_forward.down_proj.weight": 1600**-0.5,
    }
    weights = model.state_dict()
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std * 0.9866, rel=0.03), name
        assert weights[name].abs().max() <= 3 * std


def test_olmo_1_has_no_weights_in_its_norms():
    assert not [name for name in Transformer(SMALL_OLMO1).state_dict() if "norm" in name]


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_by_the_factor():
    yarn = Yarn(factor=8.0, original_max_position_embeddings=8192)
    frequencies = 500_000.0 ** (-torch.arange(0, 128, 2) / 128)
    ratio = yarn.stretched(frequencies, 128, 500_000.0) / frequencies
    turns = 8192 * frequencies / (2 * torch.pi)
    torch.testing.assert_close(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 1 / 8))
    assert yarn.scale == pytest.approx(1.2079, abs=1e-4)


def test_the_same_seed_draws_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(Transformer(SMALL))
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


def test_tied_embeddings_are_one_tensor_in_the_state_dict():
    model = Transformer(dataclasses.replace(SMALL, tie_word_embeddings=True))
    assert "lm_head.weight" not in model.state_dict()
    assert model.output_weight is model.embed_tokens.weight


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_counted_parameters_are_those_that_are_there(generation: str, seed: int):
    config = random_config(seed, generation)
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(config) == sum(weight.numel() for weight in model.parameters())


def test_flops_of_a_tiny_model_by_hand():
    config = dataclasses.replace(SMALL, num_key_value_heads=4, tie_word_embeddings=True)
    # per layer 4*32*32 + 3*32*48 = 8704 weights, two layers, and 61*32 = 1952 of the head
    assert flops_per_token(config, 10) == 6 * (2 * 8704 + 1952) + 12 * 2 * 32 * 10


def test_flops_of_windowed_layers_count_the_window():
    config = dataclasses.replace(SMALL_OLMO3, num_key_value_heads=4)
    plain = dataclasses.replace(SMALL, num_key_value_heads=4, num_hidden_layers=4)
    saved = 12 * 32 * 3 * (100 - 11)
    assert flops_per_token(plain, 100) - flops_per_token(config, 100) == saved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "olmo4"}, ["'olmo4'", "olmo, olmo2, olmo3"]),
        ({"clip_qkv": 8.0}, ["clip_qkv is 8.0", "only OLMo-1"]),
        ({"model_type": "olmo", "clip_qkv": 0.0}, ["clip_qkv is 0.0", "above 0"]),
        ({"model_type": "olmo", "rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-05", "no RMSNorm"]),
        ({"sliding_window": 5}, ["sliding_window is given", "only OLMo-3"]),
        ({"model_type": "olmo3"}, ["sliding_window is None", "at least 1"]),
        (
            {"model_type": "olmo3", "sliding_window": 5, "layer_types": (FULL,)},
            ["layer_types names 1 layers", "num_hidden_layers is 2"],
        ),
        (
            {"model_type": "olmo3", "sliding_window": 5, "layer_types": (FULL, "chunked")},
            ["'chunked'", "sliding_attention"],
        ),
        (
            {
                "model_type": "olmo3",
                "sliding_window": 5,
                "rope_theta": 1.0,
                "rope_scaling": Yarn(factor=2.0, original_max_position_embeddings=8),
            },
            ["rope_theta is 1.0", "above 1"],
        ),
        ({"num_attention_heads": 5}, ["hidden_size 32", "num_attention_heads 5"]),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, ["heads of 1", "even"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 4"]),
        ({"vocab_size": 0}, ["vocab_size is 0", "at least 1"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers is 2.5"]),
        ({"eos_token_id": 61}, ["eos_token_id is 61", "0 to 60"]),
        ({"rope_theta": -1.0}, ["rope_theta is -1.0"]),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_words(changes: dict[str, float], words: list[str]):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words)


def test_a_row_longer_than_the_model_was_made_for_is_refused():
    model = Transformer(dataclasses.replace(SMALL, max_position_embeddings=8))
    with pytest.raises(UserError, match="9 tokens; this model was made for at most 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
