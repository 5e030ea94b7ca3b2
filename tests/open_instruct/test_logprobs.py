import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from olmo_base.model.packing import ROWS_TOGETHER
from olmo_base.run.errors import UserError
from open_instruct.batches import Examples
from open_instruct.logprobs import LabelLogprobs, head_logprobs, id_logprobs, label_scores


class Encoded(NamedTuple):
    ids: list[int]
    is_learnt: list[bool]


TINY: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
NATIVE = "the native OLMo without padding, head at the labels"
PADDED = "the native OLMo, head at the labels"
HEAD, OWN = "head at the labels", "the model's own logits at the labels"
PACKED_HEAD, PACKED_OWN = f"{HEAD}, without padding", f"{OWN}, without padding"


def olmo1():
    return OlmoForCausalLM(OlmoConfig(**TINY, tie_word_embeddings=True, clip_qkv=0.05))


def olmo2():
    return Olmo2ForCausalLM(Olmo2Config(**TINY))


def olmo2_computed_eagerly():
    model = olmo2()
    model.set_attn_implementation("eager")
    return model


def olmo3_with_windows():
    types = ["sliding_attention", "full_attention"]
    return Olmo3ForCausalLM(Olmo3Config(**TINY, layer_types=types, sliding_window=4))


def llama_with_tied_embeddings():
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))


def gpt2_with_learnt_positions():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    )


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY))


def mamba_without_attention():
    return MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def gemma2_with_capped_logits():
    return Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8))


def cohere_with_scaled_logits():
    return CohereForCausalLM(CohereConfig(**TINY))


def granite_with_scaled_logits():
    return GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0))


MODELS = [
    (olmo1, NATIVE),
    (olmo2, NATIVE),
    (olmo3_with_windows, NATIVE),
    (olmo2_computed_eagerly, HEAD),
    (llama_with_tied_embeddings, PACKED_HEAD),
    (gpt2_with_learnt_positions, PACKED_HEAD),
    (gpt_neox, PACKED_HEAD),
    (mamba_without_attention, HEAD),
    (gemma2_with_capped_logits, OWN),
    (cohere_with_scaled_logits, PACKED_OWN),
    (granite_with_scaled_logits, PACKED_OWN),
]


def a_batch():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, first_learnt in [(9, 4), (5, 1), (7, 7), (12, 8)]:
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append((Encoded(ids, [place >= first_learnt for place in range(length)]),))
    return Examples(rows).batch([0, 1, 2, 3])


def labels_of(batch):
    """As transformers takes them: -100 where nothing is learnt."""
    labels_RT = torch.full_like(batch.ids_RT, -100)
    labels_RT.view(-1)[batch.label_positions_L + 1] = batch.label_ids_L
    return labels_RT


@pytest.mark.parametrize(
    ("make_model", "way"), MODELS, ids=lambda item: getattr(item, "__name__", "")
)
def test_label_logprobs_and_gradients_equal_transformers_own_loss(make_model, way):
    torch.manual_seed(0)
    model = make_model().eval()
    batch = a_batch()
    logprobs = LabelLogprobs(model)
    assert (logprobs.way, logprobs.needs_mask) == (way, False)

    loss = -logprobs(batch).mean()
    loss.backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    mask_RT = (torch.arange(batch.ids_RT.shape[1]) < batch.lengths_R[:, None]).long()
    theirs = model(input_ids=batch.ids_RT, attention_mask=mask_RT, labels=labels_of(batch)).loss
    theirs.backward()

    torch.testing.assert_close(loss, theirs, atol=1e-6, rtol=0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, atol=1e-6, rtol=0, msg=name)


def plain_logprobs(model, batch):
    """From transformers' own forward pass."""
    logits = model(input_ids=batch.ids_RT).logits.flatten(0, 1)
    return id_logprobs(logits[batch.label_positions_L], batch.label_ids_L)


def test_the_native_model_has_no_weights_of_its_own():
    model = olmo2()
    logprobs = LabelLogprobs(model)
    assert logprobs.way == NATIVE
    names = [name.removeprefix("model.") for name, _ in logprobs.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    before = logprobs(a_batch()).detach()
    with torch.no_grad():
        for weight in model.parameters():  # as an optimizer does
            weight.add_(0.1 * torch.randn_like(weight))
    after = logprobs(a_batch())
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, plain_logprobs(model, a_batch()), atol=1e-5, rtol=0)
    copied = copy.deepcopy(logprobs)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    torch.testing.assert_close(copied(a_batch()), torch.full_like(before, -math.log(61)))
    assert torch.equal(logprobs(a_batch()), after)


def test_the_native_model_learns_nothing_of_padding_as_transformers_does_not():
    model = olmo2().eval()
    rows = [Encoded([5, 0, 7, 0, 9], [False, True, True, True, True])]  # 0 is pad_token_id
    batch = Examples([rows]).batch([0])
    gradients: list[Any] = []
    for logprobs_L in (LabelLogprobs(model)(batch), plain_logprobs(model, batch)):
        model.zero_grad()
        logprobs_L.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert not gradients[0][0].any() and gradients[0][5].any()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_the_native_model_computes_in_bf16_under_autocast_and_keeps_float32_weights():
    torch.manual_seed(0)
    model = olmo2()

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    logprobs = LabelLogprobs(model, bf16, tolerance=1.0)
    assert logprobs.way == NATIVE
    exact = plain_logprobs(model, a_batch())
    with bf16():
        theirs = plain_logprobs(model, a_batch())
    found = logprobs(a_batch())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2 * (theirs - exact).abs().max()
    assert (found != exact).any()
    found.sum().backward()
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}


def test_gradient_checkpointing_reaches_the_native_model():
    model = olmo2().train()
    logprobs = LabelLogprobs(model)

    def kept_bytes():
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            logprobs(a_batch())
        return sum(kept.values())

    everything = kept_bytes()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_bytes() < 0.6 * everything


def test_an_adapter_is_computed_by_transformers():
    adapted = get_peft_model(olmo2(), LoraConfig(target_modules=["q_proj"], r=2))
    assert LabelLogprobs(adapted).way == PACKED_HEAD


def test_the_head_sees_the_labels_and_nothing_else():
    model = olmo2()
    logprobs = LabelLogprobs(model)
    batch = a_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    logprobs(batch)
    assert seen == [(-(-len(batch.label_ids_L) // ROWS_TOGETHER) * ROWS_TOGETHER, 16)]


def test_a_large_vocabulary_is_worked_through_in_pieces_with_the_same_gradients():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden_LD = torch.randn(23, 8, requires_grad=True)
    ids_L = torch.randint(0, 50, (23,))

    def gradients(max_logits):
        weights = torch.arange(23.0)  # every label's gradient has its own weight, as in DPO
        (weights * head_logprobs(hidden_LD, ids_L, head, max_logits)).sum().backward()
        found = hidden_LD.grad, head.weight.grad, head.bias.grad
        hidden_LD.grad = head.weight.grad = head.bias.grad = None
        return found

    for whole, pieces in zip(gradients(10**9), gradients(50 * 4), strict=True):
        torch.testing.assert_close(whole, pieces)


def test_logprobs_are_float32_also_for_bfloat16_logits():
    logits = torch.randn(3, 11).bfloat16()
    found = id_logprobs(logits, torch.tensor([1, 2, 3]))
    expected = logits.double().log_softmax(-1)[torch.arange(3), torch.tensor([1, 2, 3])]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_the_probe_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = olmo2().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_before = torch.get_rng_state()
    LabelLogprobs(model)
    assert model.training and not model.lm_head._forward_hooks
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_model_that_looks_ahead_is_refused():
    model = BertLMHeadModel(
        BertConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            is_decoder=False,
        )
    )
    with pytest.raises(UserError, match="causal language models"):
        LabelLogprobs(model)


def test_statistics_of_the_vocabulary_by_hand():
    # probabilities 1/2, 1/4, 1/4, whatever is added to all logits
    logits_LV = torch.tensor([[0.5, 0.25, 0.25]]).log() + 3
    found = label_scores(logits_LV, torch.tensor([1]), "mean_logprob")
    mean = (math.log(0.5) + 2 * math.log(0.25)) / 3
    torch.testing.assert_close(found, torch.tensor([[math.log(0.25), mean]]))
    found = label_scores(logits_LV, torch.tensor([0]), "log_sum_squares")
    torch.testing.assert_close(found, torch.tensor([[math.log(0.5), math.log(0.375)]]))


@pytest.mark.parametrize("statistic", ["mean_logprob", "log_sum_squares"])
@pytest.mark.parametrize(("make_model", "way"), [MODELS[0], MODELS[5]])
def test_statistics_stand_beside_the_logprobs_whatever_the_way(make_model, way, statistic):
    torch.manual_seed(0)
    model = make_model().eval()
    logprobs, batch = LabelLogprobs(model), a_batch()
    assert logprobs.way == way
    found = logprobs(batch, statistic)
    logits_LV = model(batch.ids_RT).logits.flatten(0, 1)[batch.label_positions_L]
    expected = label_scores(logits_LV, batch.label_ids_L, statistic)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_head_in_pieces_gives_the_same_statistics_and_gradients():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11)
    hidden_LD, ids_L = torch.randn(7, 8), torch.arange(7)
    found = []
    for max_logits in (1000, 22):
        head.zero_grad()
        scores_L2 = head_logprobs(hidden_LD, ids_L, head, max_logits, "mean_logprob")
        scores_L2.square().sum().backward()
        assert head.weight.grad is not None
        found.append((scores_L2.detach(), head.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


# ---------------------------------------------------------------- two answers behind one prompt


def some_pairs(number=6):
    """Prompts of 2 to 7 tokens; the answers of some begin alike."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    pairs = []
    for place in range(number):
        prompt = ids(2 + place)
        chosen, rejected = prompt + ids(3 + place % 3), prompt + ids(7 - place)
        if place % 2:
            rejected[len(prompt)] = chosen[len(prompt)]
        pairs.append(
            [
                Encoded(row, [column >= len(prompt) for column in range(len(row))])
                for row in (chosen, rejected)
            ]
        )
    return Examples(pairs)


SHARING = [
    (olmo1, "boolean"),
    (olmo2, "boolean"),
    (olmo3_with_windows, "boolean"),
    (olmo2_computed_eagerly, "additive"),
    (llama_with_tied_embeddings, "boolean"),
    (gpt2_with_learnt_positions, "boolean"),
    (gpt_neox, "boolean"),
    (gemma2_with_capped_logits, "additive"),  # computes eagerly
    (cohere_with_scaled_logits, "boolean"),
]


@pytest.mark.parametrize(
    ("make_model", "mask"), SHARING, ids=lambda item: getattr(item, "__name__", "")
)
def test_answers_behind_one_prompt_have_the_log_probabilities_and_gradients_of_two_rows(
    make_model, mask
):
    torch.manual_seed(0)
    logprobs = LabelLogprobs(make_model().eval())
    pairs = some_pairs()
    assert logprobs.share_prompts(pairs) is None
    assert logprobs.pair_mask == mask

    def step(examples, groups):
        logprobs.zero_grad()
        found = []
        for group in groups:  # one after the other, as under accumulation
            batch = examples.batch(group)
            sums_S = batch.sums_over_sequences(logprobs(batch))
            margin_B = sums_S.view(-1, 2)[:, 0] - sums_S.view(-1, 2)[:, 1]
            (-torch.nn.functional.logsigmoid(margin_B).sum() / len(examples)).backward()
            found.append(sums_S.detach())
        gradients: dict[str, Any] = {
            name: weight.grad for name, weight in logprobs.named_parameters()
        }
        return torch.cat(found), gradients

    apart_S, expected = step(pairs, [[0, 1, 2, 3, 4, 5]])
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for groups in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2], [3, 4, 5]]):
        shared_S, found = step(pairs.sharing_prompts(), groups)
        torch.testing.assert_close(shared_S, apart_S, atol=1e-5, rtol=0)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_statistics_are_the_same_behind_one_prompt():
    torch.manual_seed(0)
    logprobs = LabelLogprobs(olmo2().eval())
    pairs = some_pairs()
    assert logprobs.share_prompts(pairs) is None
    apart = logprobs(pairs.batch([0, 3]), "log_sum_squares")
    shared = logprobs(pairs.sharing_prompts().batch([0, 3]), "log_sum_squares")
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)


def mistral_with_windows():
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=8))


class SeesAll(Olmo2ForCausalLM):
    """Takes no attention mask but its own."""

    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)

    def get_decoder(self):
        body = super().get_decoder()

        def forward(input_ids, attention_mask=None, position_ids=None, **kwargs):
            return body(input_ids=input_ids, position_ids=position_ids, **kwargs)

        return Body(forward)


class Body(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def deaf_olmo():
    return SeesAll(Olmo2Config(**TINY))


@pytest.mark.parametrize(
    ("make_model", "words"),
    [
        (mamba_without_attention, "takes no position ids"),
        (mistral_with_windows, "reaches back 8 tokens"),
        (deaf_olmo, "gives other log-probabilities"),
    ],
)
def test_a_model_that_cannot_share_says_why_and_reads_prompts_twice(make_model, words):
    torch.manual_seed(0)
    logprobs = LabelLogprobs(make_model().eval(), packs=False)
    reason = logprobs.share_prompts(some_pairs())
    assert reason is not None and words in reason
    assert logprobs.pair_mask is None
    assert logprobs(some_pairs().batch([0])).shape == (3 + 7,)


def test_a_sliding_window_longer_than_every_pair_does_not_matter():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=40)).eval()
    logprobs = LabelLogprobs(model)
    pairs = some_pairs()
    assert logprobs.share_prompts(pairs) is None
    torch.testing.assert_close(
        logprobs(pairs.sharing_prompts().batch([5, 0])),
        logprobs(pairs.batch([5, 0])),
        atol=1e-5,
        rtol=0,
    )


def test_an_olmo_computes_the_same_with_and_without_padding():
    torch.manual_seed(0)
    model = olmo2().eval()
    found = []
    for packs, way in ((True, NATIVE), (False, PADDED)):
        logprobs = LabelLogprobs(model, packs=packs)
        assert (logprobs.way, logprobs.packs) == (way, packs)
        model.zero_grad()
        values = logprobs(a_batch())
        (-values.mean()).backward()
        found.append((values.detach(), [weight.grad.clone() for weight in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows_in_cache", [1, 3, 100])
def test_log_probabilities_in_the_memory_of_the_logits_equal_cross_entropy(
    monkeypatch, rows_in_cache
):
    monkeypatch.setattr("open_instruct.logprobs.LOGITS_IN_CACHE", rows_in_cache * 11)
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11).double()
    hidden_LD = (30 * torch.randn(7, 5)).double().requires_grad_()
    ids_L = torch.arange(7) % 11
    weights_L = torch.randn(7)
    found_L = head_logprobs(hidden_LD, ids_L, head, max_logits=10**6)
    expected_L = -torch.nn.functional.cross_entropy(head(hidden_LD), ids_L, reduction="none")
    torch.testing.assert_close(found_L, expected_L.float(), atol=1e-5, rtol=1e-6)
    inputs = [hidden_LD, head.weight, head.bias]
    torch.testing.assert_close(
        torch.autograd.grad((found_L * weights_L).sum(), inputs),
        torch.autograd.grad((expected_L * weights_L).sum(), inputs),
        atol=1e-4,
        rtol=1e-5,
    )
