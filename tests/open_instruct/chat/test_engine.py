import math
import threading
from collections import Counter, defaultdict
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from olmo_base.model.generate import load_generator
from olmo_base.run.errors import UserError
from open_instruct.chat.engine import Closing, Delta, Engine, QueueFull
from open_instruct.chat.rows import SIZES, AloneBatch, SlotBatch, find_stable_sizes
from open_instruct.chat.sampling import Sampling, choose, penalise
from open_instruct.chat.slots import CHUNK, View
from open_instruct.chat.token_text import TextStream, Token, TokenNames
from tests.open_instruct.tiny import byte_tokenizer, save_tiny_model

SHAPE: dict[str, Any] = dict(
    vocab_size=261,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=640,
    eos_token_id=256,
    pad_token_id=257,
    bos_token_id=None,
)

KINDS = ("olmo2", "olmo3", "llama", "mistral")  # olmo3 and mistral forget after 8 tokens


def save_model(folder, kind: str):
    """A tiny random model that never ends an answer by itself."""
    if kind == "olmo2":
        return save_tiny_model(folder, **(SHAPE | {"eos_token_id": 256}))
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
        "olmo3": lambda: Olmo3ForCausalLM(Olmo3Config(**SHAPE, sliding_window=8)),
    }[kind]()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """An engine for each kind of model."""
    made = {}
    for kind in KINDS:
        folder = save_model(tmp_path_factory.mktemp(kind), kind)
        made[kind] = Engine(load_generator(folder))
    yield made
    for engine in made.values():
        engine.close()


class Ask:
    """A request and what was delivered to it."""

    def __init__(self, engine, prompt, num_answers=1, **sampling) -> None:
        self.deltas: dict[int, list[Delta]] = defaultdict(list)
        self.open = num_answers
        self.has_begun, self.is_over = threading.Event(), threading.Event()
        self.ticket = engine.submit(prompt, Sampling(**sampling), self.deliver, num_answers)

    def deliver(self, delta: Delta) -> None:
        self.deltas[delta.index].append(delta)
        self.open -= bool(delta.finish_reason)
        self.has_begun.set()
        if self.open == 0 or delta.error:
            self.is_over.set()

    def answer(self, index: int = 0) -> tuple[str, list[Token], str | None]:
        assert self.is_over.wait(60)
        deltas = self.deltas[index]
        assert [delta.error for delta in deltas] == [None] * len(deltas)
        tokens = [token for delta in deltas for token in delta.tokens]
        return "".join(delta.text for delta in deltas), tokens, deltas[-1].finish_reason


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


# ---------------------------------------------------------------- the same as alone


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(engines, kind):
    engine = engines[kind]
    prompts = [ids_of("Tell me of the sea" * number) for number in (1, 3, 6)]
    asked = [
        Ask(engine, prompt, max_tokens=30, temperature=0, logit_bias=((256, -100.0),), logprobs=0)
        for prompt in prompts
    ]
    model = AutoModelForCausalLM.from_pretrained(engine.generator.source)
    for prompt, ask in zip(prompts, asked, strict=True):
        ids = list(prompt)
        for token in ask.answer()[1]:
            with torch.no_grad():
                logprobs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token.logprob == pytest.approx(logprobs_V[token.id].item(), abs=1e-4)
            logprobs_V[256] -= 100
            assert logprobs_V[token.id] >= logprobs_V.max() - 1e-5  # the likeliest, or a tie
            ids.append(token.id)
        assert len(ids) == len(prompt) + 30


def test_sampled_answers_are_those_of_the_generator(engines):
    """olmo_base's Generator draws its chances from seed and number in the same way."""
    generator = engines["olmo2"].generator
    prompt = ids_of("Hello?")
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}):
        expected = list(generator.stream(prompt, max_new_tokens=40, seed=3, **settings))
        ask = Ask(engines["olmo2"], prompt, max_tokens=40, seed=3, logprobs=0, **settings)
        assert [token.id for token in ask.answer()[1]] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_request_is_answered_the_same_whatever_runs_beside_it(engines, kind):
    engine = engines[kind]
    prompt = ids_of("What is the capital of the moon? " * 4)
    mine: dict[str, Any] = dict(
        max_tokens=60 if kind in ("olmo3", "mistral") else 200, seed=7, logprobs=3, top_p=0.95
    )
    alone = Ask(engine, prompt, **mine).answer()
    assert len(alone[1]) > 20
    for number in (3, 20, 50):
        others, mixed = [], None
        for other in range(number):
            text = "x" * (other * 7 % 150 + 1)
            settings: dict[str, Any] = dict(
                temperature=0.5 + other % 3, top_k=other % 5, seed=other
            )
            others.append(Ask(engine, ids_of(text), max_tokens=5 + 3 * other, **settings))
            if other == number // 2:
                others[0].has_begun.wait(60)  # it joins a batch that is already running
                mixed = Ask(engine, prompt, **mine)
        assert mixed is not None
        assert mixed.answer() == alone  # text, log-probabilities to the last bit, reason
        for ask in others:
            ask.answer()


def test_a_row_that_outgrows_its_span_goes_on_as_the_model_does(engines):
    engine = engines["olmo2"]
    prompt = ids_of("y" * 200)
    biased = ((256, -100.0),)
    asks = [
        Ask(engine, [*prompt, number], max_tokens=330, temperature=0, logprobs=0, logit_bias=biased)
        for number in range(5)
    ]
    for number, ask in enumerate(asks):
        ids = [*prompt, number, *(token.id for token in ask.answer()[1])]
        hidden_1TD = engine.generator.model(torch.tensor([ids[:-1]]))
        logprobs_TV = engine.generator.model.logits(hidden_1TD)[0, 200:].log_softmax(-1)
        found_T = torch.tensor([token.logprob for token in ask.answer()[1]])
        expected_T = logprobs_TV.gather(-1, torch.tensor(ids[201:])[:, None])[:, 0]
        torch.testing.assert_close(found_T, expected_T, atol=2e-4, rtol=0)


def test_answers_to_one_prompt_differ_and_each_can_be_had_again(engines):
    asked: dict[str, Any] = dict(max_tokens=30, seed=5, temperature=1.5)
    one, three = (Ask(engines["olmo2"], ids_of("Hi"), number, **asked) for number in (1, 3))
    assert one.answer() == three.answer(0)
    assert len({three.answer(index)[0] for index in range(3)}) == 3


def test_a_shared_beginning_is_read_once_and_changes_nothing(engines):
    with torch.inference_mode():
        fresh = SlotBatch(
            engines["olmo2"].batch.forward, engines["olmo2"].max_length, torch.device("cpu")
        )
        system = ids_of("You are a helpful assistant. " * 6)
        first, second = system + ids_of("One?"), system + ids_of("Two, and longer?")

        def logits(batch, prompt):
            reading = batch.read(prompt)
            while (found := reading.advance()) is None:
                pass
            return found

        logits(fresh, first)
        assert fresh.num_reused == 0
        shared = logits(fresh, second)
        assert fresh.num_reused == len(system) // CHUNK * CHUNK > 0
        alone = SlotBatch(fresh.forward, fresh.max_length, fresh.device)
        assert torch.equal(shared, logits(alone, second))
        changed = [*second[: CHUNK - 1], 5, *second[CHUNK:]]
        logits(fresh, changed)
        assert fresh.num_reused == len(system) // CHUNK * CHUNK


def test_kept_beginnings_take_bounded_memory(engines):
    with torch.inference_mode():
        batch = SlotBatch(engines["olmo2"].batch.forward, 640, torch.device("cpu"))
        one_chunk = 2 * 2 * 2 * CHUNK * 8 * 4  # layers, keys and values, heads, positions, floats
        batch.prefixes.max_bytes = 3 * one_chunk
        for number in range(6):
            reading = batch.read([number] * (CHUNK + 1))
            while reading.advance() is None:
                pass
        assert batch.prefixes.num_bytes == 3 * one_chunk


# ---------------------------------------------------------------- which shapes are safe


def test_sizes_that_change_a_row_are_left_out(engines):
    engine = engines["olmo2"]

    def forward(ids_BT, view: View):
        logits_BV = engine.batch.forward(ids_BT, view)
        noise = {1: 0.5, 48: 0.25}.get(len(ids_BT), 0.0)  # whole other results at two sizes
        if len(ids_BT) == 64:
            logits_BV[63] += 1.0  # a place of its own
        return logits_BV + noise

    with torch.inference_mode():
        batch = SlotBatch(forward, 640, torch.device("cpu"))
        sizes = find_stable_sizes(batch, 261)
        assert set(sizes) <= set(SIZES) - {1, 48, 64} and 32 in sizes
        batch.stable_sizes = (1, 2)  # more rows than the largest size are stepped in blocks
        reading = batch.read([1, 2, 3])
        first = reading.advance()
        rows = batch.join(reading, 5)
        stepped, results_RV = batch.step({row: 4 for row in rows})
        assert set(stepped) == set(rows) and len(results_RV) == 5
        batch.leave(rows[0])
        _, results_RV = batch.step({row: 5 for row in rows[1:]})
        expected = engine.generator.model(torch.tensor([[1, 2, 3, 4, 5]]))
        assert len(results_RV) == 4
        for logits_V in results_RV:
            torch.testing.assert_close(
                logits_V, engine.generator.model.logits(expected)[0, -1], atol=1e-4, rtol=0
            )
        assert first is not None


def test_each_model_gets_the_batch_that_fits_it(engines):
    assert isinstance(engines["olmo2"].batch, SlotBatch)
    assert isinstance(engines["llama"].batch, SlotBatch)
    assert isinstance(engines["mistral"].batch, AloneBatch)  # its layers forget after 8 tokens


# ---------------------------------------------------------------- choosing


def test_a_temperature_of_zero_takes_the_likeliest():
    logits_RV = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    assert choose(logits_RV, [Sampling(temperature=0)] * 2, [0.9, 0.9]).tolist() == [1, 0]


def test_chance_picks_by_the_cumulated_probability():
    logits_RV = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(4, -1)
    chances = [0.05, 0.15, 0.29, 0.31]
    assert choose(logits_RV, [Sampling()] * 4, chances).tolist() == [0, 1, 1, 2]


def test_cuts_keep_what_transformers_keeps():
    torch.manual_seed(0)
    logits_RV = 3 * torch.randn(40, 50)
    uniform_R = torch.rand(40).tolist()
    cases: list[dict[str, Any]] = [
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.3, top_p=0.6),
        dict(temperature=1.0, min_p=0.1),
        dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05),
    ]
    for case in cases:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(case["temperature"])])
        if "top_k" in case:
            warpers.append(TopKLogitsWarper(case["top_k"]))
        if "top_p" in case:
            warpers.append(TopPLogitsWarper(case["top_p"]))
        if "min_p" in case:
            warpers.append(MinPLogitsWarper(case["min_p"]))
        warped_RV: Any = warpers(cast(Any, torch.zeros(40, 1)), cast(Any, logits_RV.clone()))
        kept_RV = warped_RV.isfinite()
        # Each row many times over, so that every kept token is seen
        chances = torch.linspace(0, 0.99999, 2000).tolist()
        for row in range(0, 40, 8):
            many_RV = logits_RV[row].expand(2000, -1)
            seen = set(choose(many_RV, [Sampling(**case)] * 2000, chances).tolist())
            likely = {i for i, p in enumerate(warped_RV[row].softmax(-1).tolist()) if p > 1e-3}
            assert likely <= seen <= set(kept_RV[row].nonzero()[:, 0].tolist())
        mixed = [Sampling(**cases[number % 4]) for number in range(40)]
        together = choose(logits_RV, mixed, uniform_R).tolist()
        each = [
            choose(logits_RV[row : row + 1], [mixed[row]], [uniform_R[row]]).item()
            for row in range(40)
        ]
        assert together == each


def test_penalties_and_bias_are_subtracted_by_hand():
    logits_V = torch.zeros(4)
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 2.0),))
    penalise(logits_V, sampling, Counter({0: 3, 1: 1}))
    assert logits_V.tolist() == [-1.75, -0.75, 0.0, 2.0]


def test_a_presence_penalty_makes_the_engine_repeat_less(engines):
    prompt = ids_of("aaaa")
    plain, varied = (
        Ask(engines["olmo2"], prompt, max_tokens=60, temperature=0, logprobs=0, **penalty)
        for penalty in ({}, {"presence_penalty": 2.0, "frequency_penalty": 2.0})
    )
    kinds = [len({token.id for token in ask.answer()[1]}) for ask in (plain, varied)]
    assert kinds[1] > kinds[0]


def test_logprobs_name_the_likeliest_and_the_chosen(engines):
    ask = Ask(engines["olmo2"], ids_of("a"), max_tokens=5, temperature=0, logprobs=4)
    for token in ask.answer()[1]:
        assert token.alternatives[0] == (token.id, token.logprob)
        assert [p for _, p in token.alternatives] == sorted(
            (p for _, p in token.alternatives), reverse=True
        )
        assert len(token.alternatives) == 4
        assert sum(math.exp(p) for _, p in token.alternatives) < 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0; it must be above 0"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"min_p": 2}, "min_p is 2; it must be from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"frequency_penalty": 3}, "frequency_penalty is 3; it must be from -2 to 2"),
        ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20"),
        ({"stop": ("",)}, "empty text"),
    ],
)
def test_values_out_of_range_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        Sampling(**setting)


# ---------------------------------------------------------------- tokens to text


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What a text comes out as, byte by byte, and whether it was stopped."""
    backend = byte_tokenizer().backend_tokenizer
    reader = TextStream(backend, stop)
    pieces: list[str] = []
    tokens: list[Token] = []
    for id_ in backend.encode(text).ids:
        piece, released, is_stopped = reader.push(Token(id_))
        pieces.append(piece)
        tokens += released
        if is_stopped:
            return pieces, True
    rest, released = reader.finish()
    assert [token.id for token in (*tokens, *released)] == backend.encode(text).ids
    return [*pieces, rest], False


def test_characters_of_several_tokens_come_whole():
    text = "Grüß dich, 漢字 🦊!"
    pieces, _ = stream(text)
    assert "".join(pieces) == text and "�" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_a_stop_string_over_several_tokens_never_shows():
    pieces, is_stopped = stream("one END two", ("END", "never"))
    assert is_stopped and "".join(pieces) == "one "
    assert "".join(stream("one EN", ("END",))[0]) == "one EN"
    assert "".join(stream("E EENE EN", ("END",))[0]) == "E EENE EN"
    assert "".join(stream("aab", ("ab", "b"))[0]) == "a"  # the one that begins first


def test_stop_strings_are_seen_text_or_the_whole_name_of_a_special_token(engines):
    ids = [byte_tokenizer().get_vocab()[name] for name in ("<|user|>", "h", "i")]
    for stop, number in (("user", 3), ("<|user|>", 1)):
        asked = Ask(
            engines["olmo2"],
            ids_of("x"),
            max_tokens=3,
            temperature=0,
            logit_bias=((ids[0], 100.0),),
            stop=(stop,),
        )
        assert asked.answer()[0] == ""
        assert asked.deltas[0][-1].num_tokens == number
        stream = TextStream(byte_tokenizer().backend_tokenizer, (stop,))
        assert "".join(stream.push(Token(id_))[0] for id_ in ids) == "hi"


def test_bytes_that_become_no_character_are_shown_as_such():
    backend = byte_tokenizer().backend_tokenizer
    reader = TextStream(backend, ())
    half = backend.encode("ü").ids[0]
    assert reader.push(Token(half))[0] == ""
    assert reader.push(Token(backend.encode("a").ids[0]))[0] == "�a"
    assert reader.push(Token(half))[0] == ""
    assert reader.finish()[0] == "�"


def test_a_token_has_the_bytes_that_it_stands_for():
    names = TokenNames(byte_tokenizer().backend_tokenizer)
    assert b"".join(names.bytes_of(id_) for id_ in ids_of("ü \n漢")) == "ü \n漢".encode()
    assert names.bytes_of(256) == b"<|endoftext|>"


# ---------------------------------------------------------------- taking and giving up


def test_a_cancelled_request_leaves_its_row_and_says_no_more(engines):
    engine = engines["olmo2"]
    before = engine.figures.finished["cancelled"]
    long = Ask(engine, ids_of("x"), max_tokens=600, logit_bias=((256, -100.0),))
    assert long.has_begun.wait(60)
    engine.cancel(long.ticket)
    Ask(engine, ids_of("y"), max_tokens=2).answer()  # a step was taken since
    said = len(long.deltas[0])
    Ask(engine, ids_of("y"), max_tokens=2).answer()
    assert len(long.deltas[0]) == said < 600
    assert engine.num_running == 0
    assert engine.figures.finished["cancelled"] == before + 1


def test_a_full_queue_is_said_and_first_come_is_first_served(engines):
    engine = Engine(engines["olmo2"].generator, max_rows=1, max_waiting=2)
    never = ((256, -100.0),)
    running = Ask(engine, ids_of("x"), max_tokens=600, logit_bias=never)
    assert running.has_begun.wait(60)
    second, third = (Ask(engine, ids_of("y"), max_tokens=3) for _ in range(2))
    assert engine.num_waiting == 2
    with pytest.raises(QueueFull):
        Ask(engine, ids_of("z"), max_tokens=3)
    assert not second.has_begun.is_set()
    engine.cancel(running.ticket)
    third.answer()
    assert second.is_over.is_set()
    engine.close()
    with pytest.raises(Closing):
        Ask(engine, ids_of("z"), max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 630, {"max_tokens": 11}, "630 tokens and max_tokens is 11; together .* 640"),
        ([999], {"max_tokens": 1}, "id 999 is not one of the model's 261"),
        ([1], {"max_tokens": 1, "logit_bias": ((261, 1.0),)}, "id 261"),
    ],
)
def test_requests_that_the_model_cannot_answer_are_refused(engines, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        engines["olmo2"].submit(prompt, Sampling(**settings), lambda delta: None)


def test_an_error_of_the_model_ends_what_runs_and_nothing_else(tmp_path):
    generator = load_generator(save_model(tmp_path, "olmo2"))
    engine = Engine(generator, max_rows=1)
    weight = generator.model.norm.weight
    whole = weight.data
    running = Ask(engine, [5], max_tokens=600, logit_bias=((256, -100.0),))
    waiting = Ask(engine, [6], max_tokens=3)
    assert running.has_begun.wait(60)
    weight.data = torch.zeros(5)
    assert running.is_over.wait(60)
    assert "The model failed: RuntimeError" in str(running.deltas[0][-1].error)
    weight.data = whole
    waiting.is_over.wait(60)  # answered, or ended by the same damage
    assert Ask(engine, [6], max_tokens=3).answer()[2]
    engine.close()


def test_broken_weights_are_said_and_the_others_are_still_served(tmp_path):
    generator = load_generator(save_model(tmp_path, "olmo2"))
    engine = Engine(generator)
    with torch.no_grad():
        generator.model.embed_tokens.weight[5] = torch.nan
    broken = Ask(engine, [5], max_tokens=3)
    assert broken.is_over.wait(60)
    assert "not finite" in str(broken.deltas[0][-1].error)
    assert Ask(engine, [6], max_tokens=3).answer()[2]
    engine.close()
