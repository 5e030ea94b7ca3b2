"""Prompts that come back scored: against transformers, and what is refused."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct.chat.echo import BLOCK_LOGITS, scored_tokens
from tests.open_instruct.chat.running import Running, save_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny", context=64)


@pytest.fixture(scope="module")
def running(model) -> Iterator[Running]:
    server = Running([model])
    yield server
    server.stop()


def test_every_token_of_a_prompt_has_the_log_probability_that_transformers_gives(model, running):
    text = "Où est-elle? In town."
    ids = AutoTokenizer.from_pretrained(model).encode(text)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logp_TV = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = running.client().completions.create(
        model=model, prompt=text, echo=True, max_tokens=1, temperature=0, logprobs=2
    )
    (choice,) = answer.choices
    next_id = int(logp_TV[-1].argmax())
    given = [logp_TV[place, id_].item() for place, id_ in enumerate([*ids[1:], next_id])]
    assert choice.text.startswith(text) and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    first, *found = choice.logprobs.token_logprobs
    assert first is None and found == pytest.approx(given, abs=1e-4)
    assert choice.logprobs.top_logprobs is not None
    nothing, *alternatives = choice.logprobs.top_logprobs
    assert nothing is None and all(len(item) == 2 for item in alternatives)
    best = [max(item.values()) for item in alternatives]
    assert best == pytest.approx(logp_TV.max(-1).values.tolist(), abs=1e-4)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 1)


def test_without_a_new_token_only_the_prompts_come_back(model, running):
    body = {"model": model, "prompt": [[70, 71, 72], [80, 81]], "echo": True, "max_tokens": 0}
    status, answer, _ = running.post("/v1/completions", body | {"logprobs": 0})
    assert status == 200
    assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [3, 2]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    status, answer, _ = running.post("/v1/completions", body)
    assert status == 200 and answer["choices"][0]["logprobs"] is None


def test_a_prompt_of_several_blocks_is_scored_like_one(running, monkeypatch):
    (served,) = running.server.models.values()
    generator = served.engine.generator
    ids = list(range(60, 90))
    whole = scored_tokens(generator, ids, 3, 1)
    assert BLOCK_LOGITS // generator.vocab_size > len(ids)
    monkeypatch.setattr("open_instruct.chat.echo.BLOCK_LOGITS", 7 * generator.vocab_size)
    parts = scored_tokens(generator, ids, 3, 1)
    assert [token.id for token in parts] == [token.id for token in whole]
    found = [token.logprob for token in parts[1:]]
    assert found == pytest.approx([token.logprob for token in whole[1:]], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),  # OpenAI's own number is 16
        ({"max_tokens": 1}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"stop": "x"}, "stop"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [70] * 65}, "prompt"),
    ],
)
def test_what_an_echo_cannot_do_is_refused_by_name(model, running, changes, param):
    body = {"model": model, "prompt": "Hi there", "echo": True, "max_tokens": 0} | changes
    status, answer, _ = running.post("/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == param
