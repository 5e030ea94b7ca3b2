"""Generation against transformers' own, and its promises about batches, seeds and stops."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MinPLogitsWarper,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from olmo_base.model.generate import (
    Generator,
    Sampling,
    StopRule,
    before_stop,
    likeliest,
    load_generator,
    next_ids,
)
from olmo_base.model.hf_weights import export_hf
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.run.errors import UserError

VOCAB = 40
EOS, PAD = 2, 3
STOPS = [EOS, 11, 25]  # enough that some answers of a random model end by themselves


# What each generation has of its own; the window is shorter than prompts and answers.
OWN: dict[str, dict[str, Any]] = {
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "rope_scaling": Yarn(factor=4.0, original_max_position_embeddings=16),
    },
}


def native_model(seed: int = 0, max_length: int = 64, generation: str = "olmo2") -> Transformer:
    """Weights so large that the likeliest token is never a matter of rounding."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=max_length,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **{"model_type": generation, "num_hidden_layers": 2, **OWN[generation]},
    )
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def native_generator(seed: int = 0, max_length: int = 64, generation: str = "olmo2") -> Generator:
    model = native_model(seed, max_length, generation)
    return Generator(model, eos_token_ids={EOS}, max_length=max_length)


def some_prompts(number: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(number)]


def greedy_by_transformers(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One prompt by itself: no padding, transformers' own loop."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=STOPS,
        pad_token_id=PAD,
    )
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in STOPS else answer


@pytest.mark.parametrize("generation", OWN)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_answers_of_the_native_model_are_those_of_transformers(
    generation: str, seed: int, tmp_path: Path
):
    export_hf(native_model(seed, generation=generation), tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = some_prompts(12, seed=seed)
    expected = [greedy_by_transformers(other, prompt, 30) for prompt in prompts]
    generator = load_generator(tmp_path, device="cpu")
    assert generator.is_native
    assert generator.generate(prompts, max_new_tokens=30, stop_token_ids=STOPS) == expected
    assert len({len(answer) for answer in expected}) > 2  # rows left the batch one by one


OTHER_MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    ),
    "gemma3, whose window slides": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=64,
        )
    ),
    "mamba, which has no attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
}


def other_model(name: str) -> Any:
    torch.manual_seed(0)
    model = OTHER_MODELS[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_greedy_answers_of_other_architectures_are_those_of_transformers(name: str, tmp_path: Path):
    model = other_model(name)
    model.config.eos_token_id = EOS
    model.generation_config.eos_token_id = EOS
    model.config.pad_token_id = PAD
    model.save_pretrained(tmp_path)
    generator = load_generator(tmp_path, device="cpu")
    assert not generator.is_native
    assert generator.eos_token_ids == {EOS}
    prompts = some_prompts(6)
    expected = [greedy_by_transformers(model, prompt, 20) for prompt in prompts]
    assert generator.generate(prompts, max_new_tokens=20, stop_token_ids=STOPS) == expected


@pytest.mark.parametrize("generation", OWN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_what_shares_its_batch(temperature: float, generation: str):
    generator = native_generator(generation=generation)
    settings: dict[str, Any] = {"max_new_tokens": 25, "temperature": temperature, "seed": 5}
    prompts = some_prompts(9)
    together = generator.generate(prompts, **settings)
    others = [[1] * 30 if index != 4 else prompt for index, prompt in enumerate(prompts)]
    assert generator.generate(others, **settings)[4] == together[4]
    if temperature == 0.0:
        assert [generator.generate([prompt], **settings)[0] for prompt in prompts] == together


def test_more_prompts_than_a_batch_holds_are_answered_in_their_order():
    generator = native_generator()
    prompts = some_prompts(150)
    answers = generator.generate(prompts, max_new_tokens=4)
    for index in (0, 63, 64, 149):
        assert generator.generate([prompts[index]], max_new_tokens=4) == [answers[index]]


@pytest.mark.parametrize("name", ["olmo2", "olmo3", *OTHER_MODELS])
def test_prompts_that_begin_alike_are_answered_as_each_alone(name: str):
    """With more prompts than rows, so that some join those that have not ended."""
    if name in OWN:
        generator = native_generator(generation=name)
    else:
        generator = Generator(other_model(name), eos_token_ids={EOS}, max_length=64)
    chance = random.Random(1)
    beginning = [chance.randrange(4, VOCAB) for _ in range(36)]
    prompts = [
        beginning + [chance.randrange(4, VOCAB) for _ in range(chance.randint(1, 9))]
        for _ in range(11)
    ]
    shapes: list[tuple[int, ...]] = []  # of each call: rows, positions
    generator.model.register_forward_pre_hook(
        lambda _, given, named: shapes.append((*given, named.get("input_ids"))[0].shape),
        with_kwargs=True,
    )
    whole = [generator.generate([prompt], max_new_tokens=14)[0] for prompt in prompts]
    # An id that ends answers at many places
    stop = max(range(VOCAB), key=lambda id_: len({x.index(id_) for x in whole if id_ in x}))
    settings: dict[str, Any] = {"max_new_tokens": 14, "stop_token_ids": [stop]}
    alone = [generator.generate([prompt], **settings)[0] for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 1
    shapes.clear()
    ended: dict[int, list[int]] = {}
    found = generator.generate(
        prompts, max_rows=4, on_answer=lambda index, ids: ended.update({index: ids}), **settings
    )
    assert found == alone == [ended[index] for index in range(11)]
    if name in ("olmo2", "llama", "gpt2"):  # the others' caches do not keep all positions
        assert shapes[0] == (1, 36)  # the beginning, once
        assert max(width for _, width in shapes[1:]) <= 9
        # Not in batches of four, but as soon as two rows have ended.
        assert [rows for rows, width in shapes[1:] if width > 1] != [4, 4, 3]


def test_prompts_read_in_parts_are_answered_as_at_once(monkeypatch):
    generator = native_generator()
    prompts = some_prompts(20)
    shared = [[4 + place % 30 for place in range(36)] + prompt for prompt in prompts]
    wholes = [generator.generate(asked, max_new_tokens=5) for asked in (prompts, shared)]
    monkeypatch.setattr("olmo_base.model.generate.PREFILL_TOKENS", 24)
    monkeypatch.setattr("olmo_base.model.generate.MAX_STEP_LOGITS", 7 * VOCAB)
    shapes: list[tuple[int, ...]] = []  # of each call: rows, positions
    generator.model.register_forward_pre_hook(
        lambda _, given: shapes.append(tuple(given[0].shape)),
    )
    for asked, whole in zip((prompts, shared), wholes, strict=True):
        shapes.clear()
        assert generator.generate(asked, max_new_tokens=5) == whole
        read = [shape for shape in shapes if shape != (1, 36)]
        assert max(rows for rows, _ in read) <= 7
        assert all(rows * width <= 24 or rows == 1 for rows, width in read)


def test_no_prompts_have_no_answers():
    assert native_generator().generate([], max_new_tokens=5) == []


def test_the_stream_is_the_answer():
    generator = native_generator()
    for prompt in some_prompts(5):
        for sampling in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
            settings: dict[str, Any] = {"max_new_tokens": 20, **sampling}
            [whole] = generator.generate([prompt], **settings)
            assert list(generator.stream(prompt, **settings)) == whole


def test_a_stream_may_be_left_early_without_a_trace():
    generator = native_generator()
    next(generator.stream([5, 6], max_new_tokens=20))
    assert not torch.is_inference_mode_enabled()


def test_stop_tokens_end_the_answer_and_are_not_part_of_it():
    generator = native_generator()
    prompt = next(
        p for p in some_prompts(20) if len(generator.generate([p], max_new_tokens=9)[0]) > 5
    )
    [answer] = generator.generate([prompt], max_new_tokens=9)
    stop = answer[4]
    [stopped] = generator.generate([prompt], max_new_tokens=9, stop_token_ids=[stop])
    assert stopped == answer[: answer.index(stop)]


# One character each but for a few longer tokens, in which a stop string may begin or end.
TOKENS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "é", "bc", "de", "xyz"]


def write_tokenizer(folder: Path) -> None:
    assert len(TOKENS) == VOCAB
    vocab = {"".join(byte_alphabet(token)): index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def byte_alphabet(token: str) -> list[str]:
    """How a byte-level tokenizer writes the bytes of a token: é is two of them."""
    return [character for character in ("Ã©" if token == "é" else token)]


@pytest.mark.parametrize("seed", range(3))
def test_answers_ended_by_stop_strings_are_those_of_transformers(seed: int, tmp_path: Path):
    export_hf(native_model(seed), tmp_path)
    write_tokenizer(tmp_path)
    other: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    generator = load_generator(tmp_path, device="cpu")
    generator.eos_token_ids = set()
    prompts = some_prompts(12, seed=seed)
    whole = generator.generate(prompts, max_new_tokens=30)
    texts = [generator.tokenizer.decode(ids) for ids in whole]
    # Two characters out of three of the answers: most of them end early, at different places.
    strings = [texts[row][start : start + 2] for row, start in ((0, 9), (1, 4), (2, 17))]
    found = generator.generate(prompts, max_new_tokens=30, stop_strings=strings)
    assert sum(len(one) < len(all_) for one, all_ in zip(found, whole, strict=True)) >= 3
    for prompt, answer in zip(prompts, found, strict=True):
        output = other.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            stop_strings=strings,
            tokenizer=generator.tokenizer,
        )
        assert output[0, len(prompt) :].tolist() == answer
        streamed = generator.stream(prompt, max_new_tokens=30, stop_strings=strings)
        assert list(streamed) == answer


def test_a_stop_string_is_text_that_is_seen_and_no_part_of_a_special_tokens_name(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|abc|>"]})
    special = tokenizer.get_vocab()["<|abc|>"]
    a, b = TOKENS.index("a"), TOKENS.index("b")

    def places_of_end(string: str, ids: list[int]) -> list[int]:
        rule = StopRule(frozenset(), (string,), tokenizer)
        tail: list[int] = []
        return [place for place, token in enumerate(ids) if rule.is_complete(tail, token)]

    assert places_of_end("b", [a, special, a, b]) == [3]
    assert places_of_end("<|abc|>", [a, special, a]) == [1]
    assert places_of_end("ab", [a, *[special] * 20, b]) == [21]  # a reader sees ab


def test_the_text_is_cut_before_the_first_stop_string():
    assert before_stop("one\n\ntwo###", ["###", "\n\n"]) == "one"
    assert before_stop("nothing here", ["###"]) == "nothing here"
    assert before_stop("anything", []) == "anything"


def test_an_empty_stop_string_is_refused(tmp_path: Path):
    export_hf(native_model(), tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="stop string is empty"):
        load_generator(tmp_path).generate([[1]], max_new_tokens=3, stop_strings=["x", ""])


def test_an_answer_ends_where_the_model_can_hold_no_more():
    generator = native_generator(max_length=16)
    generator.eos_token_ids = set()
    prompts = [[5] * 10, [6] * 15, [7]]
    assert [len(answer) for answer in generator.generate(prompts, max_new_tokens=99)] == [6, 1, 15]


@pytest.mark.parametrize("generation", OWN)
def test_growing_the_cache_changes_nothing(generation: str, tmp_path: Path):
    generator = native_generator(max_length=400, generation=generation)
    generator.eos_token_ids = set()
    export_hf(generator.model, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    [answer] = generator.generate([[5, 9]], max_new_tokens=150)
    assert len(answer) == 150
    with torch.no_grad():  # each id is the likeliest after all before it, seen in one pass
        likeliest = other(torch.tensor([[5, 9, *answer]])).logits[0].argmax(-1).tolist()
    assert likeliest[1:-1] == answer


def test_the_same_seed_gives_the_same_answer_and_another_seed_another():
    generator = native_generator()
    prompts = some_prompts(4)
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.5}
    one, two, three = (generator.generate(prompts, seed=seed, **settings) for seed in (1, 1, 2))
    assert one == two != three


def test_the_same_prompt_twice_is_answered_twice_and_not_alike():
    generator = native_generator()
    one, two = generator.generate([[5, 6]] * 2, max_new_tokens=20, temperature=2.0)
    assert one != two


# ---------------------------------------------------------------- sampling


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits_BV = probabilities.log().expand(20_000, 4)
    uniform_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = next_ids(logits_BV, Sampling(temperature=1.0), uniform_B)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_top_k_and_top_p_by_hand():
    logits_BV = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(1000, 4)
    uniform_B = torch.linspace(0, 1 - 1e-7, 1000)

    def shares(**settings: Any) -> list[float]:
        drawn = next_ids(logits_BV, Sampling(temperature=1.0, **settings), uniform_B)
        return [round(share, 2) for share in (drawn.bincount(minlength=4) / 1000).tolist()]

    assert shares(top_k=2) == [0.0, 0.62, 0.0, 0.38]  # 0.5 / 0.8 and 0.3 / 0.8
    assert shares(top_p=0.79) == [0.0, 0.62, 0.0, 0.38]
    assert shares(top_p=0.81) == [0.16, 0.53, 0.0, 0.32]
    assert shares(top_p=0.01) == [0.0, 1.0, 0.0, 0.0]
    # top_k first: of 0.625 and 0.375 the first already has half
    assert shares(top_k=2, top_p=0.5) == [0.0, 1.0, 0.0, 0.0]
    assert shares(top_k=99) == [0.15, 0.5, 0.05, 0.3]
    assert shares(min_p=0.5) == [0.0, 0.62, 0.0, 0.38]  # at least 0.25
    assert shares(min_p=0.09) == [0.15, 0.5, 0.05, 0.3]
    assert shares(min_p=1.0) == [0.0, 1.0, 0.0, 0.0]


def test_what_min_p_and_the_others_keep_is_what_transformers_keeps():
    logits_BV = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)) * 3
    cases: list[dict[str, Any]] = [
        {"min_p": 0.1},
        {"min_p": 0.05, "top_k": 6},
        {"min_p": 0.2, "top_p": 0.8},
    ]
    warpers: dict[str, Any] = {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for settings in cases:
        kept_BV = logits_BV / 0.7
        for name, warper in warpers.items():
            if name in settings:
                kept_BV = warper(settings[name])(torch.zeros(200, 1), kept_BV)
        sampling = Sampling(temperature=0.7, **settings)
        drawn = [next_ids(logits_BV, sampling, torch.full((200,), u / 400)) for u in range(400)]
        was_drawn_BV = torch.zeros(200, 30, dtype=torch.bool)
        for ids_B in drawn:
            was_drawn_BV[torch.arange(200), ids_B] = True
        assert not (was_drawn_BV & kept_BV.isinf()).any()
        probability_BV = kept_BV.softmax(-1)
        assert was_drawn_BV[probability_BV > 0.01].all()


def test_temperature_sharpens_by_hand():
    logits_BV = torch.tensor([0.8, 0.2]).log().expand(1000, 2)
    drawn = next_ids(logits_BV, Sampling(temperature=0.5), torch.linspace(0, 1 - 1e-7, 1000))
    assert drawn.eq(0).float().mean().item() == pytest.approx(0.64 / 0.68, abs=0.01)


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_token_of_no_probability_is_never_drawn(top_p: float):
    logits_BV = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]).expand(3, 4)
    uniform_B = torch.tensor([0.0, 0.5, 1.0])  # 1.0 is what rounding up could give
    drawn = next_ids(logits_BV, Sampling(temperature=1.0, top_p=top_p), uniform_B)
    assert set(drawn.tolist()) <= {1, 2}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[1], []], {}, "Prompt 2 of 2 is empty"),
        ([[1] * 64], {}, "64 tokens; this model can hold 64"),
        ([[1, VOCAB]], {}, "the id 40; the model's vocabulary has 40"),
        ([[-1]], {}, "the id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_words(
    prompts: list[list[int]], settings: dict[str, Any], words: str
):
    with pytest.raises(UserError, match=words):
        native_generator().generate(prompts, **{"max_new_tokens": 5, **settings})


def test_a_stream_refuses_at_once_and_not_at_its_first_token():
    with pytest.raises(UserError, match="The prompt is empty"):
        native_generator().stream([], max_new_tokens=5)


def test_weights_that_are_not_numbers_are_said_to_be_damaged():
    generator = native_generator()
    with torch.no_grad():
        generator.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="weights are damaged"):
        generator.generate([[1]], max_new_tokens=3)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path):
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be opened as a causal language model"):
        load_generator(tmp_path)


def test_a_folder_that_lacks_weights_is_refused_rather_than_filled_at_random(tmp_path: Path):
    OTHER_MODELS["gpt2"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a GPT2LMHeadModel.*c_fc\.weight"):
        load_generator(tmp_path, device="cpu")


def test_a_folder_without_tokenizer_generates_but_has_no_words(tmp_path: Path):
    export_hf(native_model(), tmp_path)
    generator = load_generator(tmp_path)
    assert generator.generate([[1]], max_new_tokens=2)
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json\)"):
        _ = generator.tokenizer


@pytest.mark.parametrize("size", [100, 2**14, 2**14 + 1, 50_304])
def test_the_likeliest_is_the_first_of_the_largest(size):
    generator = torch.Generator().manual_seed(size)
    many_BV = torch.randint(0, 5, (16, size), generator=generator).float()  # full of equals
    last_BV = torch.randn(16, size, generator=generator)
    last_BV[:8, -1] = 9.0
    for logits_BV in (many_BV, last_BV):
        assert likeliest(logits_BV).tolist() == logits_BV.argmax(-1).tolist()
