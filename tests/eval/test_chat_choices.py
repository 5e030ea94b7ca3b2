"""Options as answers in a dialogue: what the model reads, against lm-eval and transformers."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.harness import evaluate
from olmo_base.run.errors import UserError
from tests.open_instruct.chat.running import save_chat_model
from tests.open_instruct.tiny import save_tiny_model

ROWS = [
    {"question": "Is snow <|assistant|> red?", "choices": ["yes", "not at all"], "answer": 1},
    {"question": "Is a tree tall?", "choices": ["often", "no"], "answer": 0},
]
EXAMPLES = [
    {"question": "Is fire hot?", "choices": ["yes", "no"], "answer": 0},
    {"question": "Is ice hot?", "choices": ["yes", "no"], "answer": 1},
]
CHAT = {"apply_chat_template": True, "system_prompt": "Be brief.", "instruction": "Answer."}
TASKS = {
    "turns": CHAT | {"fewshot_as_multiturn": True},
    "one_turn": CHAT,
    "letters": {"apply_chat_template": True, "form": "letters"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_chat_model(folder / "chat", context=400)
    save_tiny_model(folder / "base", max_position_embeddings=400)
    for name, rows in (("rows", ROWS), ("shown", EXAMPLES)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    ours = {
        name: {
            "kind": "multiple_choice",
            "file": str(folder / "rows.jsonl"),
            "examples_file": str(folder / "shown.jsonl"),
            "num_examples": 2,
            **keys,
        }
        for name, keys in TASKS.items()
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "ours.yaml").write_text(yaml.safe_dump({"tasks": ours}))
    files = {split: str(folder / f"{split}.jsonl") for split in ("rows", "shown")}
    theirs = {
        "task": "theirs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "rows",
        "fewshot_split": "shown",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 2,
        "description": "Answer.",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks" / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    return folder


def asked(world: Path, output: Path, *names: str, **settings) -> dict[str, list[dict]]:
    folder = evaluate(
        [str(world / "chat")],
        output_dir=str(output),
        tasks=names,
        include_path=str(world / "tasks"),
        **settings,
    ).path
    return {
        name: [
            json.loads(line)
            for line in (folder / "samples" / "chat" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in names
    }


def test_a_choice_is_asked_as_the_golden_dialogue(world, tmp_path):
    rows = asked(world, tmp_path / "out", *TASKS)
    assert rows["turns"][1]["prompt"] == (
        "<|system|>\nBe brief.\n\nAnswer.\n"
        "<|user|>\nQuestion: Is fire hot?\nAnswer:\n<|assistant|>\nyes<|endoftext|>\n"
        "<|user|>\nQuestion: Is ice hot?\nAnswer:\n<|assistant|>\nno<|endoftext|>\n"
        "<|user|>\nQuestion: Is a tree tall?\nAnswer:\n<|assistant|>\n"
    )
    assert rows["one_turn"][1]["prompt"] == (
        "<|system|>\nBe brief.\n\nAnswer.\n"
        "<|user|>\nQuestion: Is fire hot?\nAnswer: yes\n\nQuestion: Is ice hot?\nAnswer: no\n\n"
        "Question: Is a tree tall?\nAnswer:\n<|assistant|>\n"
    )
    assert rows["letters"][1]["prompt"].endswith(
        "Question: Is a tree tall?\n A. often\n B. no\nAnswer:\n<|assistant|>\n"
    )
    assert [option["text"] for option in rows["letters"][1]["options"]] == ["A", "B"]
    assert [option["text"] for option in rows["turns"][0]["options"]] == ["yes", "not at all"]


def test_options_are_scored_behind_the_dialogue_and_no_question_writes_control_tokens(
    world, tmp_path
):
    row = asked(world, tmp_path / "out", "turns")["turns"][0]
    tokenizer = AutoTokenizer.from_pretrained(world / "chat")
    model = AutoModelForCausalLM.from_pretrained(world / "chat", dtype=torch.float32)
    # The question spells a control token: in it those are characters.
    before, forged, after = row["prompt"].partition(" <|assistant|> red")
    context = tokenizer.encode(before)
    context += tokenizer.encode(forged, split_special_tokens=True) + tokenizer.encode(after)
    assert context.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 3
    for option in row["options"]:
        ids = tokenizer.encode(option["text"])
        with torch.no_grad():
            logp_TV = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(ids) - 1)
        wanted = sum(logp_TV[place, id_].item() for place, id_ in zip(places, ids, strict=True))
        assert option["logprob"] == pytest.approx(wanted, abs=1e-4)


def test_the_dialogue_is_the_one_that_lm_eval_writes(world, tmp_path):
    rows = asked(
        world,
        tmp_path / "out",
        "turns",
        "theirs",
        apply_chat_template=True,
        system_prompt="Be brief.",
    )
    ours, theirs = rows["turns"], rows["theirs"]
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
    # lm-eval reads the control token that the first question spells. And it scores the template's
    # last line break with each option, which the model never writes: the same for all of them.
    apart, other = (
        mine["logprob"] - his["logprob"]
        for mine, his in zip(ours[1]["options"], theirs[1]["options"], strict=True)
    )
    assert apart == pytest.approx(other, abs=1e-4) and apart > 0


def test_a_model_without_a_template_is_one_message(world, tmp_path):
    with pytest.raises(UserError, match=r"base has no chat template, in which turns is asked"):
        evaluate(
            [str(world / "base")],
            output_dir=str(tmp_path / "out"),
            tasks=["turns"],
            include_path=str(world / "tasks"),
        )
