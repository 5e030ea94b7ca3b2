"""Scores against a naive computation with transformers, against lm-eval, and as properties."""

import copy
import dataclasses
import json
import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from olmo_base.model.hf_weights import load_native
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.reading import sharing
from olmo_base.scorer import (
    MIN_BLOCK,
    Score,
    continuation_logprobs,
    rolling_logprob,
    rolling_logprobs,
    rolling_windows,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "olmo2": Olmo2Config(**SIZES, eos_token_id=0, pad_token_id=1),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=24),
    # A cap on the logits that a scorer calling the head by itself would miss.
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, sliding_window=8),
    "mistral": MistralConfig(**SIZES, sliding_window=7),  # in every layer
    "olmo3": Olmo3Config(**SIZES, sliding_window=7, eos_token_id=0, pad_token_id=1, **KINDS),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7, **KINDS),
}


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # an untrained model is nearly uniform, which hides mistakes
    return model


def random_requests(number: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    chance = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [chance.randrange(97) for _ in range(chance.randint(low, high))]

    contexts = [ids(1, 14) for _ in range(number // 3 + 1)]
    return [(chance.choice(contexts), ids(1, 6)) for _ in range(number)]


@torch.no_grad()
def naive_score(model, context, continuation) -> tuple[float, bool]:
    """One request by itself: all logits, log-softmax, pick."""
    logp_TV = model(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    rows = logp_TV[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    logprob = rows.gather(-1, targets[:, None]).sum().item()
    return logprob, bool((rows.argmax(-1) == targets).all())


@pytest.fixture
def word_tokenizer():
    """One token per word of a made-up language."""
    words = [a + b for a in ("ka", "lo", "mi", "su") for b in ("ra", "ne", "ti", "po", "du")]
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words, ":"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


def logprobs(scores: list[Score]) -> torch.Tensor:
    return torch.tensor([score.logprob for score in scores], dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_transformers_one_request_at_a_time(name):
    model = random_model(name)
    requests = random_requests(40)
    # Some continuations the model itself would choose, so that both answers of is_greedy occur.
    for context, _ in requests[:5]:
        chosen = model(torch.tensor([context])).logits[0, -1].argmax().item()
        requests.append((context, [chosen]))
    scores = continuation_logprobs(model, requests, batch_tokens=100, pad_id=3)
    naive = [naive_score(model, *request) for request in requests]
    torch.testing.assert_close(
        logprobs(scores), torch.tensor([item[0] for item in naive]).double(), atol=1e-4, rtol=1e-6
    )
    assert [score.is_greedy for score in scores] == [item[1] for item in naive]
    assert {True, False} == {score.is_greedy for score in scores}
    assert [score.num_tokens for score in scores] == [len(request[1]) for request in requests]


def test_native_model_and_its_hugging_face_folder_score_alike(tmp_path):
    model = random_model("olmo2")
    model.save_pretrained(tmp_path)
    requests = random_requests(30)
    torch.testing.assert_close(
        logprobs(continuation_logprobs(load_native(tmp_path), requests, batch_tokens=64)),
        logprobs(continuation_logprobs(model, requests, batch_tokens=64)),
        atol=1e-4,
        rtol=1e-6,
    )


@pytest.mark.parametrize("seed", range(5))
def test_batch_size_and_order_do_not_change_a_score(seed):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES, eos_token_id=0, pad_token_id=1))
    requests = random_requests(60, seed)
    one_by_one = [continuation_logprobs(model, [request])[0] for request in requests]
    order = random.Random(seed).sample(range(60), 60)
    for batch_tokens in (1, 50, 10_000):
        shuffled = continuation_logprobs(
            model, [requests[index] for index in order], batch_tokens=batch_tokens
        )
        torch.testing.assert_close(
            logprobs(shuffled),
            logprobs([one_by_one[index] for index in order]),
            atol=1e-5,
            rtol=0,
        )


def test_requests_that_share_their_input_run_once():
    model = random_model("llama")
    num_read = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, keywords: num_read.append(keywords["input_ids"].numel()),
        with_kwargs=True,
    )
    # Four one-token options and two options of which one begins the other: one row of 4 tokens.
    requests = [([5, 6, 7], [option]) for option in (1, 2, 3, 4)]
    requests += [([5, 6, 7], [8, 9]), ([5, 6, 7], [8])]
    scores = continuation_logprobs(model, requests)
    assert num_read == [4]
    for request, score in zip(requests, scores, strict=True):
        assert score.logprob == pytest.approx(naive_score(model, *request)[0], abs=1e-5)


def test_head_runs_on_continuation_positions_only():
    model = random_model("llama")
    assert sharing(model).trees  # found out with forward passes of its own
    num_scored = []
    model.lm_head.register_forward_hook(
        lambda module, arguments, output: num_scored.append(output.shape[:-1])
    )
    continuation_logprobs(model, [(list(range(15)), [1, 2]), ([1, 2], [3])])
    assert [shape.numel() for shape in num_scored] == [3]


def test_a_vocabulary_of_several_blocks_scores_like_one():
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 5 * MIN_BLOCK + 7}
    model = Transformer(ModelConfig(**sizes, eos_token_id=0, pad_token_id=1)).eval()
    twin, best = 2 * MIN_BLOCK + 1, 4 * MIN_BLOCK + 3
    with torch.no_grad():
        model.output_weight.mul_(40)
        logits_TV = model.logits(model(torch.arange(20)[None]))[0]
        # Two ids of different blocks are equally likely after the last token, and the likeliest.
        model.output_weight[[twin, best]] = model.output_weight[logits_TV[-1].argmax()] * 1.5
        logits_TV = model.logits(model(torch.arange(20)[None]))[0]
    assert logits_TV[-1].argmax() in (twin, best)
    places = [0, 1, 700, MIN_BLOCK, twin, best, 5 * MIN_BLOCK + 6]
    requests = [(list(range(20)), [place]) for place in places]
    # Many positions, so that blocks are as narrow as they get.
    chance = random.Random(0)
    texts = [[chance.randrange(sizes["vocab_size"]) for _ in range(20)] for _ in range(40)]
    requests += [(text[:1], text[1:]) for text in texts]
    scores = continuation_logprobs(model, requests)
    logp_V = logits_TV[-1].double().log_softmax(-1)
    torch.testing.assert_close(
        logprobs(scores[:7]), logp_V[torch.tensor(places)], atol=1e-4, rtol=0
    )
    logp_BTV = model.logits(model(torch.tensor(texts))).double().log_softmax(-1)[:, :-1]
    naive_BT = logp_BTV.gather(-1, torch.tensor(texts)[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs(scores[7:]), naive_BT.sum(-1), atol=1e-3, rtol=1e-6)
    is_greedy = [score.is_greedy for score in scores[:7]]
    assert is_greedy[:4] == [False] * 4 and is_greedy[6] is False
    assert is_greedy[4] != is_greedy[5]


def test_probabilities_of_all_tokens_add_up_to_one():
    model = random_model("olmo2")
    scores = continuation_logprobs(model, [([4, 5], [token]) for token in range(97)])
    assert logprobs(scores).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert sum(score.is_greedy for score in scores) == 1


def test_a_context_that_does_not_fit_loses_its_beginning_and_says_so():
    model = random_model("olmo2")
    long = [index % 97 for index in range(40)]
    (score,) = continuation_logprobs(model, [(long, [1, 2, 3])])
    (same,) = continuation_logprobs(model, [(long[-22:], [1, 2, 3])])  # 22 + 2 read, 24 positions
    assert score.num_cut == 18
    assert dataclasses.replace(score, num_cut=0) == same


def test_a_model_in_training_stays_in_training():
    model = random_model("olmo2").train()
    continuation_logprobs(model, [([1], [2])])
    assert model.training


def test_empty_sides_and_oversized_continuations_are_refused():
    model = random_model("olmo2")
    with pytest.raises(ValueError, match="request 1 has an empty context"):
        continuation_logprobs(model, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="request 0 has an empty continuation"):
        continuation_logprobs(model, [([1], [])])
    with pytest.raises(ValueError, match="continuation of 25 tokens"):
        continuation_logprobs(model, [([1], [2] * 25)])
    with pytest.raises(ValueError, match="document 1 is empty"):
        rolling_logprobs(model, [[1], []], prefix_id=0)


# ---------------------------------------------------------------- whole documents


def test_rolling_windows_are_hand_worked():
    assert rolling_windows([1, 2, 3, 4, 5, 6, 7, 8], prefix_id=0, max_length=3) == [
        ([0], [1, 2, 3]),
        ([3], [4, 5, 6]),
        ([5, 6], [7, 8]),  # the last window is filled up with earlier text
    ]
    assert rolling_windows([1, 2], prefix_id=0, max_length=3) == [([0], [1, 2])]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 23, 24, 25, 100])
def test_rolling_windows_equal_those_of_lm_eval(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # slow to import

    ids = list(range(1, length + 1))
    theirs = get_rolling_token_windows(ids, prefix_token=0, max_seq_len=5, context_len=1)
    assert rolling_windows(ids, prefix_id=0, max_length=5) == [
        make_disjoint_window(window) for window in theirs
    ]


def test_a_document_that_fits_is_scored_like_one_continuation():
    model = random_model("olmo2")
    ids = [7, 8, 9, 10]
    score = rolling_logprob(model, ids, prefix_id=0)
    assert score.logprob == pytest.approx(naive_score(model, [0], ids)[0], abs=1e-5)
    assert score.num_tokens == len(score.token_logprobs) == 4


def test_documents_are_scored_alike_together_and_alone():
    model = random_model("gpt2")
    chance = random.Random(1)
    documents = [[chance.randrange(97) for _ in range(length)] for length in (3, 70, 24, 25)]
    together = rolling_logprobs(model, documents, prefix_id=0, batch_tokens=48)
    alone = [rolling_logprob(model, document, prefix_id=0) for document in documents]
    torch.testing.assert_close(logprobs(together), logprobs(alone), atol=1e-4, rtol=0)
    assert [score.num_tokens for score in together] == [3, 70, 24, 25]


# ---------------------------------------------------------------- an independent harness


def test_accuracy_and_log_likelihoods_equal_lm_eval(tmp_path, word_tokenizer):
    from lm_eval import simple_evaluate  # slow to import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chance = random.Random(2)
    words = [word for word in word_tokenizer.get_vocab() if word.isalpha()]
    rows: list[dict[str, Any]] = [
        {
            "query": "Question: " + " ".join(chance.choices(words, k=chance.randint(1, 8))),
            "choices": [" ".join(chance.choices(words, k=chance.randint(1, 3))) for _ in "abc"],
            "gold": chance.randrange(3),
        }
        for _ in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "hf")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    config = LlamaConfig(**{**SIZES, "vocab_size": len(word_tokenizer)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=word_tokenizer, batch_size=4, device="cpu"),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    by_row = {sample["doc_id"]: sample for sample in theirs["samples"]["local_choice"]}
    requests, theirs_flat = [], []
    for number, row in enumerate(rows):
        context = word_tokenizer(row["query"]).input_ids
        for choice, (logprob, is_greedy) in zip(
            row["choices"], by_row[number]["filtered_resps"], strict=True
        ):
            whole = word_tokenizer(row["query"] + " " + choice).input_ids
            requests.append((context, whole[len(context) :]))
            theirs_flat.append((float(logprob), bool(is_greedy)))
    ours = continuation_logprobs(model, requests, batch_tokens=64)
    torch.testing.assert_close(
        logprobs(ours),
        torch.tensor([item[0] for item in theirs_flat], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
    assert [score.is_greedy for score in ours] == [item[1] for item in theirs_flat]
    accuracy = sum(
        max(range(3), key=lambda option: ours[3 * number + option].logprob) == row["gold"]
        for number, row in enumerate(rows)
    ) / len(rows)
    assert accuracy == pytest.approx(theirs["results"]["local_choice"]["acc,none"])


# ---------------------------------------------------------------- what is shared is run once


def questions(number: int, num_options: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Requests with a common beginning of 40 tokens, a question of their own, and options."""
    chance = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [chance.randrange(97) for _ in range(length)]

    beginning = ids(40)
    requests = []
    for _ in range(number):
        context = beginning + ids(chance.randint(1, 12))
        requests += [(context, ids(chance.randint(1, 5))) for _ in range(num_options)]
        requests.append((context, requests[-1][1][:1]))  # the beginning of another option
    return requests


def long_model(name: str) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS[name])
    setattr(config, "n_positions" if name == "gpt2" else "max_position_embeddings", 128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_questions_with_a_common_beginning_score_as_one_by_one(name, tmp_path):
    model = long_model(name)
    requests = questions(9, 4) + random_requests(12)
    naive = torch.tensor([naive_score(model, *request)[0] for request in requests]).double()
    model.save_pretrained(tmp_path)
    models = [model] + ([load_native(tmp_path)] if name in ("olmo2", "olmo3") else [])
    for each in models:
        assert sharing(each).trees
        for batch_tokens in (1, 90, 10_000):
            scores = continuation_logprobs(each, requests, batch_tokens=batch_tokens, pad_id=3)
            torch.testing.assert_close(logprobs(scores), naive, atol=2e-4, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_sharing_depends_on_neither_batch_nor_order_beyond_rounding(seed):
    torch.manual_seed(seed)
    sizes = {**SIZES, "max_position_embeddings": 128}
    model = Transformer(ModelConfig(**sizes, eos_token_id=0, pad_token_id=1))
    requests = questions(8, 3, seed)
    alone = [continuation_logprobs(model, [request])[0] for request in requests]
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    for batch_tokens in (1, 60, 10_000):
        together = continuation_logprobs(
            model, [requests[index] for index in order], batch_tokens=batch_tokens
        )
        torch.testing.assert_close(
            logprobs(together), logprobs([alone[index] for index in order]), atol=1e-5, rtol=0
        )


def test_a_common_beginning_and_a_context_are_run_once():
    model = long_model("llama")
    assert sharing(model).trees
    num_read = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, keywords: num_read.append(keywords["input_ids"].shape),
        with_kwargs=True,
    )
    beginning = list(range(40))
    requests = [
        ([*beginning, 50 + n, 60], [option, option]) for n in range(4) for option in (1, 2, 3)
    ]
    continuation_logprobs(model, requests)
    # The beginning by itself; then for each question two tokens and one of each option.
    assert num_read == [(1, 40), (4, 5)]


def test_a_context_cut_on_the_left_is_scored_like_the_rest_of_it():
    model = long_model("olmo2")
    chance = random.Random(5)
    long = [chance.randrange(97) for _ in range(150)]
    requests = [(long, [chance.randrange(97) for _ in range(number)]) for number in (2, 4, 2)]
    scores = continuation_logprobs(model, requests)
    naive = [naive_score(model, long[-129 + len(ids) :], ids)[0] for _, ids in requests]
    torch.testing.assert_close(logprobs(scores), torch.tensor(naive).double(), atol=1e-4, rtol=1e-6)
    assert [score.num_cut for score in scores] == [23, 25, 23]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trees_are_read_under_both_kinds_of_attention(attention):
    model = long_model("llama")
    model.set_attn_implementation(attention)
    assert sharing(model).trees
    requests = questions(5, 3)
    naive = torch.tensor([naive_score(model, *request)[0] for request in requests]).double()
    torch.testing.assert_close(
        logprobs(continuation_logprobs(model, requests)), naive, atol=2e-4, rtol=1e-6
    )


def test_a_model_that_mistakes_a_mask_is_found_out_and_goes_on_from_a_beginning():
    """One that ignores positions: its tree has other logits than its texts."""

    class Careless(type(long_model("llama"))):  # type: ignore[misc]
        def forward(self, *arguments, past_key_values=None, position_ids=None, **keywords):
            return super().forward(*arguments, past_key_values=past_key_values, **keywords)

    model = Careless(long_model("llama").config).eval()
    assert sharing(model) == (False, True)
    assert num_read_of(model) == [(1, 40), (4, 4), (4, 4), (4, 4)]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo3"])
def test_where_a_model_takes_no_mask_the_keys_of_a_beginning_are_kept(name, monkeypatch):
    """As flash attention does not: nothing of a tree may reach the model."""
    model = long_model(name)
    monkeypatch.setattr("olmo_base.reading._may_read_trees", lambda model: False)
    assert sharing(model) == (False, True)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords.get("attention_mask")),
        with_kwargs=True,
    )
    requests = questions(9, 4)
    naive = torch.tensor([naive_score(model, *request)[0] for request in requests]).double()
    for batch_tokens in (1, 90, 10_000):
        scores = continuation_logprobs(model, requests, batch_tokens=batch_tokens, pad_id=3)
        torch.testing.assert_close(logprobs(scores), naive, atol=1e-4, rtol=1e-6)
    assert seen and all(mask is None for mask in seen)
    assert num_read_of(model)[0] == (1, 40) and num_read_of(model).count((1, 40)) == 1


def num_read_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Rows and tokens of each pass that scores four questions of three options."""
    num_read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, arguments, keywords: num_read.append(tuple(keywords["input_ids"].shape)),
        with_kwargs=True,
    )
    beginning = list(range(40))
    requests = [
        ([*beginning, 50 + n, 60], [option, option, 3]) for n in range(4) for option in (1, 2, 4)
    ]
    naive = torch.tensor([naive_score(model, *request)[0] for request in requests]).double()
    num_read.clear()
    scores = continuation_logprobs(model, requests, batch_tokens=36)
    hook.remove()
    torch.testing.assert_close(logprobs(scores), naive, atol=1e-4, rtol=1e-6)
    return num_read


@pytest.mark.parametrize("name", ["mistral", "gemma3", "olmo3"])
def test_trees_of_windows_run_a_beginning_once(name):
    model = long_model(name)
    assert sharing(model) == (True, True)
    # Each question: two tokens of its own and two of each option.
    assert num_read_of(model) == [(1, 40), (2, 8), (2, 8)]


def test_a_window_that_a_model_does_not_keep_to_is_found_out():
    """One whose configuration names a window and whose layers see everything."""
    model = long_model("llama")
    model.config.sliding_window = 7
    assert not sharing(model).trees
    assert model.config.sliding_window == 7
