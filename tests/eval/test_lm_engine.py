"""Tasks of lm-eval, run by our engine and by lm-eval's own: the same numbers."""

import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
)

from eval.harness import evaluate
from eval.lm_engine import ScoredModel
from eval.subject import load_subject
from eval.tasks import select
from olmo_base.corpus.documents import DocumentSource
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import UserError
from olmo_base.tokenizer import (
    EOS_TOKEN,
    PAD_TOKEN,
    TokenizerRecipe,
    save_tokenizer,
    tokenizer_config,
    train_tokenizer,
)

VOCABULARY, CONTEXT = 300, 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "olmo2": Olmo2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
TASKS = ("rc_plain", "rc_blank", "mc_letters", "mc_words", "say", "text")
WORDS = "red green blue boat house tree river small large old runs sees a the of".split()


def sentence(chance: random.Random, low: int, high: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))


def choice_rows(seed: int, number: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        {
            "query": f"Question: {sentence(chance, 2, 9)}?\nAnswer:",
            "choices": [f"{sentence(chance, 1, 3)} {letter}" for letter in "xyz"],
            "letters": list("ABC"),
            "gold": chance.randrange(3),
            "start": sentence(chance, 2, 5),
            "end": sentence(chance, 1, 4),
        }
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with six tasks of lm-eval, their data, and three random models."""
    root = tmp_path_factory.mktemp("world")
    tasks = root / "tasks"
    (tasks / "inner").mkdir(parents=True)
    for name, seed, number in (("test", 1, 12), ("dev", 2, 6)):
        rows = "".join(json.dumps(row) + "\n" for row in choice_rows(seed, number))
        (root / f"{name}.jsonl").write_text(rows)
    chance = random.Random(3)
    pages = [{"page": sentence(chance, low, low + 9)} for low in (3, 40, 400)]
    (root / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pages))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(root / f"{split}.jsonl") for split in ("test", "dev")},
            "cache_dir": str(root / "cache"),
        },
        "test_split": "test",
        "target_delimiter": " ",
    }
    choosing = common | {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    }
    five_shot = {
        "num_fewshot": 5,
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    }
    names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
    page_files = {"data_files": {"test": str(root / "pages.jsonl")}}
    definitions = {
        "rc_plain": choosing | {"metric_list": [{"metric": name} for name in names]},
        "rc_blank": common
        | {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_target": "end",
            "doc_to_choice": "{{ [start + ' red', start + ' green', start + ' old'] }}",
            "metric_list": [{"metric": "acc"}],
        },
        "mc_letters": choosing
        | five_shot
        | {
            "doc_to_text": "{{query}}\n A. {{choices[0]}}\n B. {{choices[1]}}\n C. {{choices[2]}}",
            "doc_to_choice": "letters",
        },
        "mc_words": choosing | five_shot,
        "say": common
        | {
            "output_type": "generate_until",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{start}}",
            "num_fewshot": 2,
            "fewshot_split": "dev",
            "generation_kwargs": {"until": ["\n\n", "h"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "text": common
        | {
            "dataset_kwargs": common["dataset_kwargs"] | page_files,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        },
    }
    for name, content in definitions.items():
        folder = tasks / "inner" if name == "text" else tasks
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | content))
    group = {"group": "letters_and_words", "task": ["mc_letters", "mc_words"]}
    (tasks / "group.yaml").write_text(yaml.safe_dump(group))
    tokenizer = train_tokenizer(
        [" ".join(WORDS)] * 3,
        TokenizerRecipe(
            stage="tokenizer",
            dataset_mixer=(DocumentSource("unused"),),
            run=RunConfig(output_dir="unused"),
            vocab_size=VOCABULARY,
        ),
    )
    settings = tokenizer_config(eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=CONTEXT)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # an untrained model is nearly uniform, which hides mistakes
        model.save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name, settings)
    return root


def samples(folder: Path, model: str, task: str) -> list[dict[str, Any]]:
    lines = (folder / "samples" / model / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def is_tied(model: Any, tokenizer: Any, prompt: str) -> bool:
    """Whether somewhere in the answer two tokens are as likely as rounding can tell."""
    ids = tokenizer(prompt).input_ids
    for _ in range(12):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-5:
            return True
        ids.append(int(best.indices[0]))
    return False


@pytest.mark.parametrize("name", CONFIGS)
def test_six_tasks_score_as_with_lm_evals_own_model(world, tmp_path, name):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(world / name)
    stock = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32)
    theirs = simple_evaluate(
        model=HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=4, device="cpu"),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(world / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    folder = evaluate(
        [str(world / name)],
        output_dir=str(tmp_path / "out"),
        tasks=TASKS,
        include_path=str(world / "tasks"),
    ).path
    report = json.loads((folder / "report.json").read_text())["models"][0]["tasks"]
    num_compared = 0
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            metric, comma, _ = key.partition(",")
            if comma and "stderr" not in metric:
                assert report[task][metric]["value"] == pytest.approx(value, rel=1e-4), (task, key)
        ours = samples(folder, name, task)
        assert len(ours) == len(theirs["samples"][task])
        for row, sample in zip(ours, theirs["samples"][task], strict=True):
            assert int(row["doc_id"]) == sample["doc_id"]
            if task == "say":
                assert row["prompt"] == sample["arguments"][0][0]
                if row["answer"] != sample["resps"][0][0]:
                    assert is_tied(stock, tokenizer, row["prompt"])
                continue
            if task == "text":
                assert row["logprob"] == pytest.approx(sample["filtered_resps"][0], abs=1e-3)
                num_compared += 1
                continue
            options = row["options"]
            given = [option["logprob"] for option in options]
            if task == "rc_plain":
                given += [option["logprob_alone"] for option in options]
            logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert given == pytest.approx(logprobs, abs=1e-3)
            num_compared += len(given)
    assert num_compared == 12 * (6 + 3 + 3 + 3) + 3


def test_a_group_of_lm_eval_is_averaged_beside_a_task_of_ours(world, tmp_path):
    (tmp_path / "ours.yaml").write_text(
        "tasks: {answers: {kind: exact_match, file: answers.jsonl, max_new_tokens: 4}}"
    )
    (tmp_path / "answers.jsonl").write_text('{"prompt": "red?", "answer": "green"}\n')
    for path in (world / "tasks").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    folder = evaluate(
        [str(world / "olmo2"), str(world / "llama")],
        output_dir=str(tmp_path / "out"),
        tasks=["answers", "letters_and_words"],
        include_path=str(tmp_path),
        data_dir=str(tmp_path),
        limit=5,
    ).path
    report = json.loads((folder / "report.json").read_text())
    model = report["models"][0]
    assert list(model["tasks"]) == ["answers", "mc_letters", "mc_words"]
    both = [model["tasks"][name]["acc"]["value"] for name in ("mc_letters", "mc_words")]
    assert model["groups"]["letters_and_words"]["value"] == pytest.approx(sum(both) / 2)
    assert model["tasks"]["mc_letters"]["acc"]["n"] == 5
    assert {item.get("task") for item in report["comparisons"]} >= {"mc_letters", "answers"}
    assert report["tasks"]["mc_words"]["chance"] == pytest.approx(1 / 3)
    assert "letters_and_words" in (folder / "report.html").read_text()


def test_limited_questions_are_drawn_with_the_seed_and_keep_their_numbers(world, tmp_path):
    def numbers(seed: int) -> list[str]:
        folder = evaluate(
            [str(world / "olmo2")],
            output_dir=str(tmp_path / f"out{seed}"),
            tasks=["mc_words"],
            include_path=str(world / "tasks"),
            limit=4,
            seed=seed,
        ).path
        rows = samples(folder, "olmo2", "mc_words")
        questions = choice_rows(1, 12)
        assert all(questions[int(row["doc_id"])]["query"] in row["prompt"] for row in rows)
        return [row["doc_id"] for row in rows]

    first, second = numbers(1), numbers(2)
    assert len(first) == 4 and first != second


def test_what_lm_eval_computes_from_all_answers_together_is_in_the_report(world, tmp_path):
    definition = yaml.safe_load((world / "tasks" / "rc_plain.yaml").read_text())
    write_task(tmp_path, definition | {"metric_list": [{"metric": "acc"}, {"metric": "mcc"}]})
    lowered = definition | {
        "output_type": "loglikelihood",
        "doc_to_target": " {{end}}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    write_task(tmp_path, lowered | {"task": "ends"})
    folder = evaluate(
        [str(world / "llama"), str(world / "olmo2")],
        output_dir=str(tmp_path / "out"),
        tasks=["rc_plain", "ends"],
        include_path=str(tmp_path),
    ).path
    tasks = json.loads((folder / "report.json").read_text())["models"][0]["tasks"]
    rows = samples(folder, "llama", "ends")
    nats = -sum(row["logprob"] for row in rows) / len(rows)
    assert tasks["ends"]["perplexity"]["value"] == pytest.approx(math.exp(nats), rel=1e-6)
    assert -1 <= tasks["rc_plain"]["mcc"]["value"] <= 1
    assert tasks["rc_plain"]["mcc"]["stderr"] is None
    assert tasks["rc_plain"]["acc"]["stderr"] is not None


def write_task(folder: Path, content: dict[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / f"{content['task']}.yaml").write_text(yaml.safe_dump(kept))


# ---------------------------------------------------------------- dialogues


TEMPLATE = """{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def test_with_a_chat_template_examples_are_turns_and_control_tokens_are_tokens(world, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(world / "llama", chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    settings: dict[str, Any] = {"tasks": ["mc_words"], "include_path": str(world / "tasks")}
    folder = evaluate(
        [str(chat)],
        output_dir=str(tmp_path / "out"),
        apply_chat_template=True,
        system_prompt="Be brief.",
        **settings,
    ).path
    rows = samples(folder, "chat", "mc_words")
    assert rows[0]["prompt"].startswith("<|system|>\nBe brief.\n<|user|>\nQuestion:")
    assert rows[0]["prompt"].count("<|assistant|>") == 6
    # The last option by hand. As in lm-eval, white space before it is scored with it.
    tokenizer = AutoTokenizer.from_pretrained(chat)
    model = AutoModelForCausalLM.from_pretrained(chat, dtype=torch.float32)
    prompt = rows[0]["prompt"]
    context = tokenizer(prompt.rstrip()).input_ids
    whole = tokenizer(prompt + rows[0]["options"][-1]["text"]).input_ids
    option, ids = whole[len(context) :], whole[-CONTEXT - 1 :]
    assert tokenizer.convert_tokens_to_ids("<|assistant|>") in context
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    by_hand = sum(logp_TV[-len(option) + n, token].item() for n, token in enumerate(option))
    assert rows[0]["options"][-1]["logprob"] == pytest.approx(by_hand, abs=1e-3)
    with pytest.raises(UserError, match="llama has no chat template"):
        evaluate(
            [str(world / "llama")],
            output_dir=str(tmp_path / "other"),
            apply_chat_template=True,
            **settings,
        )


# ---------------------------------------------------------------- what is refused


def test_without_lm_eval_one_message_says_what_to_install(world, monkeypatch):
    import eval as package

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "eval.lm_engine")
    monkeypatch.delattr(package, "lm_engine")
    with pytest.raises(UserError, match=r"pip install 'open-instruct\[eval\]'"):
        select(None, ["mc_words"], str(world / "tasks"))


def test_an_unknown_task_is_refused_and_broken_files_are_named(world, tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: [")
    write_task(tmp_path, {"task": "fine", "output_type": "multiple_choice"})
    with pytest.raises(UserError, match=r"no task 'broken'. Known: .*fine.*broken.yaml cannot be"):
        select(None, ["broken"], str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/no/file.jsonl"}}}, "cannot read the task t "),
        ({"unsafe_code": True}, "runs code outside a sandbox"),
        (
            {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]},
            "says of its metric acc that lower is better",
        ),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(world, tmp_path, change, message):
    definition = yaml.safe_load((world / "tasks" / "rc_plain.yaml").read_text())
    write_task(tmp_path, definition | change | {"task": "t"})
    with pytest.raises(UserError, match=message):
        select(None, ["t"], str(tmp_path))


def test_generation_settings_that_nobody_reads_are_refused(world, tmp_path):
    definition = yaml.safe_load((world / "tasks" / "say.yaml").read_text())
    write_task(tmp_path, definition | {"generation_kwargs": {"num_beams": 3, "until": ["x"]}})
    with pytest.raises(UserError, match="'num_beams', which our generator does not read"):
        evaluate(
            [str(world / "olmo2")],
            output_dir=str(tmp_path / "out"),
            tasks=["say"],
            include_path=str(tmp_path),
        )


def test_an_option_longer_than_the_context_is_refused(world):
    subject = load_subject(str(world / "olmo2"), batch_tokens=512, batch_size=4)
    request = Instance("loglikelihood", {}, ("red", " green" * 300), 0)
    with pytest.raises(UserError, match=f"the model reads {CONTEXT}"):
        ScoredModel(subject).loglikelihood([request])
