"""Answers held to JSON, and tools: told to the model, called by it, and answered."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import Olmo2ForCausalLM

from open_instruct.chat.tool_calls import CallReader, split_calls
from open_instruct.encode import load_chat_encoder, save_chat_files
from tests.open_instruct.chat.running import Running, save_chat_model
from tests.open_instruct.tiny import byte_tokenizer, save_tiny_model

HELLO: Any = [{"role": "user", "content": "Hello?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SPOKEN = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)


def as_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def learn_to_call(folder: Path) -> None:
    """Train the model in a folder until it answers HELLO with SPOKEN when it is told of WEATHER."""
    encoder = load_chat_encoder(folder)
    prompt = encoder.encode_prompt(HELLO, tools=[WEATHER])
    answer = [*encoder.tokenizer.encode(SPOKEN), *sorted(encoder.end_of_turn_ids)[:1]]
    ids_1T = torch.tensor([prompt + answer])
    model = Olmo2ForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        logits_TV = model(ids_1T, logits_to_keep=len(answer) + 1).logits[0, :-1]
        losses_T = torch.nn.functional.cross_entropy(
            logits_TV, torch.tensor(answer), reduction="none"
        )
        if losses_T.max() < 0.1:  # each token has nine tenths of the chance
            break
        losses_T.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError("it has not learnt the call")
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("forms")
    plain = save_chat_model(folder / "plain")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    caller = folder / "caller"
    shape = dict(hidden_size=32, max_position_embeddings=1500, vocab_size=len(tokenizer))
    save_tiny_model(caller, 1, **shape)
    tokenizer.save_pretrained(caller)
    save_chat_files(load_chat_encoder(caller, "chatml"), caller)
    learn_to_call(caller)
    made = Running([plain, str(caller)])
    yield made
    made.stop()


# ---------------------------------------------------------------- response_format


def test_answers_held_to_a_schema_are_such_json_whatever_the_model_would_say(running):
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    create = running.client().chat.completions.create
    asked: dict[str, Any] = dict(model=running.name, messages=HELLO, seed=5, n=6, max_tokens=120)
    answer = create(**asked, response_format=as_schema(SCHEMA))
    found = [json.loads(choice.message.content) for choice in answer.choices]
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 6
    for value in found:
        assert value.keys() == {"age", "kind", "tags"} and value["kind"] in ("cat", "dog")
        assert 0 <= value["age"] <= 150 and len(value["tags"]) <= 3
        assert all(isinstance(tag, bool) for tag in value["tags"])
    assert len({json.dumps(value) for value in found}) > 1
    pieces = create(**asked | {"n": 1}, response_format=as_schema(SCHEMA), stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert json.loads(said) == found[0]


def test_json_object_gives_an_object_and_text_gives_what_is_given_without(running):
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    create = running.client().chat.completions.create
    closing = {str(byte_tokenizer().encode(mark)[0]): 9 for mark in '"}'}
    asked: dict[str, Any] = dict(
        model=running.name, messages=HELLO, seed=2, max_tokens=300, logit_bias=closing
    )
    said = [
        create(**asked | {"seed": seed}, response_format={"type": "json_object"}).choices[0]
        for seed in range(3)
    ]
    for choice in said:
        assert isinstance(json.loads(choice.message.content), dict)
    plain = create(**asked | {"max_tokens": 20})
    text = create(**asked | {"max_tokens": 20}, response_format={"type": "text"})
    assert plain.choices[0].message.content == text.choices[0].message.content


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "xml"}, "its type is text, json_object or json_schema"),
        ({"type": "json_schema"}, "must be an object with a schema"),
        (as_schema({"type": "thing"}), "cannot be kept to: Invalid type: thing"),
        (as_schema({"not": {"type": "string"}}), "cannot be kept to: Unimplemented keys"),
        ({"type": "json_object", "more": 1}, "its type is"),
    ],
)
def test_forms_that_cannot_be_kept_to_are_refused(running, form, message):
    if "cannot be kept" in message:
        pytest.importorskip("llguidance", reason="the extra json is not installed")
    with pytest.raises(openai.BadRequestError, match=message):
        running.client().chat.completions.create(
            model=running.name, messages=HELLO, response_format=form
        )


def test_without_the_package_a_form_is_refused_with_what_to_install(running, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'open-instruct\[json\]'"):
        running.client().chat.completions.create(
            model=running.name, messages=HELLO, response_format={"type": "json_object"}
        )


# ---------------------------------------------------------------- tools


def rendered(running: Running, name: str, **asked: Any) -> str:
    status, answer, _ = running.post("/page/prompt", {"model": name, "messages": HELLO} | asked)
    assert status == 200, answer
    return answer["text"]


def test_tools_stand_in_the_prompt_unless_none_shall_be_called(running):
    caller = [*running.server.models][1]
    text = rendered(running, caller, tools=[WEATHER])
    assert '"name": "weather"' in text and "The weather in a city." in text
    plain = rendered(running, caller)
    assert rendered(running, caller, tools=[WEATHER], tool_choice="none") == plain
    assert rendered(running, caller, tools=[]) == plain


def test_calls_and_their_results_are_read_back(running):
    caller = [*running.server.models][1]
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    text = rendered(running, caller, tools=[WEATHER], messages=messages)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    assert text.endswith("<|im_start|>tool\nRain.<|im_end|>\n<|im_start|>assistant\n")
    messages[-1]["tool_call_id"] = "call_2"
    status, answer, _ = running.post("/page/prompt", {"model": caller, "messages": messages})
    assert status == 400 and "no call before it has that id" in answer["error"]["message"]


def test_a_call_in_an_answer_is_split_off_whole_and_piece_by_piece():
    for text, said, names in (
        (SPOKEN, "Let me see.", ["weather"]),
        (SPOKEN + SPOKEN, "Let me see.\nLet me see.", ["weather", "weather"]),
        ("no call <tool", "no call <tool", []),
        ("<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", []),
        ('<tool_call>{"name": "f", "arguments": {}}', "", ["f"]),  # cut after the call
    ):
        found, calls = split_calls(text)
        assert (found, [call["function"]["name"] for call in calls]) == (said, names)
        reader = CallReader()
        shown = "".join(map(reader.push, text))
        rest, streamed = reader.finish()
        assert (shown + rest).strip() == said.strip() or names[1:]
        assert [call["function"] for call in streamed] == [call["function"] for call in calls]
    arguments = split_calls(SPOKEN)[1][0]["function"]["arguments"]
    assert json.loads(arguments) == {"city": "Zürich"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_calls_a_tool_is_understood_by_the_client(running, stream):
    caller = [*running.server.models][1]
    made = running.client().chat.completions.create(
        model=caller, messages=HELLO, tools=[WEATHER], temperature=0, stream=stream
    )
    if stream:
        choices = [piece.choices[0] for piece in made]
        said = "".join(choice.delta.content or "" for choice in choices)
        (calls,) = [choice.delta.tool_calls for choice in choices if choice.delta.tool_calls]
        reason = choices[-1].finish_reason
    else:
        (choice,) = made.choices
        said, calls, reason = (
            choice.message.content,
            choice.message.tool_calls,
            choice.finish_reason,
        )
    assert said.strip() == "Let me see." and reason == "tool_calls"
    assert calls[0].function.name == "weather" and calls[0].id.startswith("call_")
    assert json.loads(calls[0].function.arguments) == {"city": "Zürich"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool_choice": "required"}, "a call cannot be forced"),
        ({"tools": [{"type": "retrieval"}]}, "must be an object of the type function"),
        ({"tools": [{"type": "function", "function": {}}]}, "must be an object with a name"),
        ({"parallel_tool_calls": False}, "may call several tools"),
        ({"response_format": {"type": "json_object"}}, "cannot be asked for together"),
        ({"tools": None, "tool_choice": "auto"}, "needs tools beside it"),
    ],
)
def test_tools_that_cannot_be_had_are_refused(running, changes, message):
    body = {"model": [*running.server.models][1], "messages": HELLO, "tools": [WEATHER]}
    status, answer, _ = running.post("/v1/chat/completions", body | changes)
    assert status == 400 and message in answer["error"]["message"]


def test_a_template_without_tools_refuses_them(running):
    body = {"model": running.name, "messages": HELLO, "tools": [WEATHER]}
    status, answer, _ = running.post("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] == "unsupported_parameter"
    assert "does not write tools" in answer["error"]["message"]
