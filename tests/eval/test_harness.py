"""The evaluation stage from end to end, with a small model that knows its answers by heart."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from eval.asking import ask
from eval.harness import evaluate, input_files, plan, run
from eval.items import Choice, Document, Question
from eval.recipe import EvalRecipe, model_names
from eval.subject import encode_pairs, load_subject
from eval.tasks import Task
from olmo_base.run.errors import DataError, Stopped, UserError
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import load_recipe
from open_instruct.encode import load_chat_encoder, load_chat_tokenizer
from tests.eval.knowing import save_knowing_models

COLOURS = {"Mila": "green", "Oren": "dark blue", "Tess": "red", "Juno": "yellow", "Ada": "pink"}
QUESTIONS = {f"What is the colour of {name}?": colour for name, colour in COLOURS.items()}
PLAIN = [f"Question: {question}\nAnswer: {answer}\n" for question, answer in QUESTIONS.items()]
CONTEXT = 64


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with base (knows PLAIN), chat (knows the same as dialogues) and blank."""
    return save_knowing_models(
        tmp_path_factory.mktemp("models"),
        PLAIN,
        list(QUESTIONS.items()),
        vocab_size=330,
        context=CONTEXT,
        steps=80,
    )


@pytest.fixture
def data(tmp_path) -> Path:
    """Task files and their data, with questions the models know."""
    folder = tmp_path / "data"
    folder.mkdir()
    words = [
        {"prompt": question, "answer": [answer, "?"], "category": "colours"}
        for question, answer in QUESTIONS.items()
    ]
    options = sorted(COLOURS.values())
    choices = [
        {"question": question, "options": options, "gold": options.index(answer)}
        for question, answer in QUESTIONS.items()
    ]
    requests = [
        {
            "doc_id": number + shift,
            "idx": index,
            "label": options.index(answer),
            "request": {
                "context": "Answer:" if shift else f"Question: {question}\nAnswer:",
                "continuation": f" {option}",
            },
        }
        for shift in (0, 1_000_000)
        for number, (question, answer) in enumerate(QUESTIONS.items())
        for index, option in enumerate(options)
    ]
    for name, rows in (("words", words), ("choices", choices), ("requests", requests)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("".join(PLAIN))
    tasks = {
        "words": {"kind": "exact_match", "file": "words.jsonl", "max_new_tokens": 12},
        "choices": {"kind": "multiple_choice", "file": "choices.jsonl"},
        "requests": {"kind": "requests", "file": "requests.jsonl", "metric": "acc_per_char"},
        "text": {"kind": "perplexity", "file": "text.txt"},
    }
    suites = {"all": {"groups": {"words": ["words"], "text": ["text"]}}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks, "suites": suites}))
    return folder


def recipe(folder: Path, data: Path, output: Path, *names: str, **keys) -> EvalRecipe:
    path = output.parent / "recipe.yaml"
    content = {
        "stage": "eval",
        "models": [str(folder / name) for name in names],
        "tasks": ["words", "choices", "requests", "text"],
        "include_path": str(data),
        "data_dir": str(data),
        "output_dir": str(output),
    }
    path.write_text(yaml.safe_dump(content | keys))
    return load_recipe(EvalRecipe, path)


def scores(folder: Path) -> dict[str, dict[str, float]]:
    report = json.loads((folder / "report.json").read_text())
    return {
        model["name"]: {
            f"{task} {metric}": score["value"]
            for task, metrics in model["tasks"].items()
            for metric, score in metrics.items()
        }
        for model in report["models"]
    }


def samples(folder: Path, model: str, task: str) -> list[dict]:
    lines = (folder / "samples" / model / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_models_that_know_the_answers_get_them_right(models, data, tmp_path, capsys):
    folder = run(recipe(models, data, tmp_path / "out", "blank", "base", "chat"))
    found = scores(folder.path)
    assert found["blank"]["words exact_match"] == 0.0
    assert found["base"]["words exact_match"] == 1.0  # plain prompt, cut at the line's end
    assert found["chat"]["words exact_match"] == 1.0  # chat template, cut at the turn's end
    for metric in ("acc", "acc_per_token", "acc_per_char", "acc_per_byte"):
        assert found["base"][f"requests {metric}"] == 1.0
    assert found["base"]["choices acc"] == 1.0
    assert found["base"]["text bits_per_byte"] < 1.5 < found["blank"]["text bits_per_byte"]
    first = samples(folder.path, "chat", "words")[0]
    assert first["prompt"] == "<|user|>\nWhat is the colour of Mila?\n<|assistant|>\n"
    assert (first["answer"], first["correct"], first["is_cut"]) == ("green", True, False)
    assert first["category"] == "colours"
    assert samples(folder.path, "base", "words")[0]["prompt"] == PLAIN[0].removesuffix(" green\n")
    assert {"report.html", "report.md", "report.json"} <= {p.name for p in folder.path.iterdir()}
    output = capsys.readouterr().out
    assert "report.html" in output
    assert "words" in output
    assert json.loads((folder.path / "manifest.json").read_text())["status"] == "finished"


def test_batch_sizes_do_not_change_an_evaluation(models, data, tmp_path):
    large = run(recipe(models, data, tmp_path / "large", "base")).path
    small = run(
        recipe(models, data, tmp_path / "small", "base", batch_tokens=64, generation_batch_size=2)
    ).path
    for name, value in scores(large)["base"].items():
        assert scores(small)["base"][name] == pytest.approx(value, abs=1e-5), name


def test_a_killed_evaluation_asks_only_what_is_missing(models, data, tmp_path):
    settings = recipe(models, data, tmp_path / "out", "base", "chat")
    folder = run(settings).path
    before = scores(folder)
    # As a kill would leave it: the manifest says running, one record was never written, and one
    # task was half done under another definition.
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    (folder / "samples" / "chat" / "words.json").unlink()
    record = folder / "samples" / "chat" / "text.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "another"}))
    times = {path: path.stat().st_mtime_ns for path in (folder / "samples").rglob("*.jsonl")}
    run(settings)
    assert scores(folder) == before
    changed = {
        path.relative_to(folder / "samples").as_posix()
        for path, time in times.items()
        if path.stat().st_mtime_ns != time
    }
    assert changed == {"chat/words.jsonl", "chat/text.jsonl"}


def test_a_finished_evaluation_is_shown_again_and_not_asked(models, data, tmp_path, capsys):
    settings = recipe(models, data, tmp_path / "out", "base")
    folder = run(settings).path
    shutil.rmtree(models / "moved", ignore_errors=True)
    marker = folder / "samples" / "base" / "words.jsonl"
    time = marker.stat().st_mtime_ns
    capsys.readouterr()
    assert run(settings).is_finished
    assert marker.stat().st_mtime_ns == time
    assert "report.html" in capsys.readouterr().out


def test_tasks_without_their_files_are_all_named_and_can_be_left_out(models, data, tmp_path):
    (data / "choices.jsonl").unlink()
    (data / "text.txt").unlink()
    with pytest.raises(UserError, match=r"2 of 4 tasks lack their files \(choices, text\)"):
        run(recipe(models, data, tmp_path / "out", "base"))
    folder = run(recipe(models, data, tmp_path / "out", "base", skip_missing=True)).path
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"][0]["tasks"]) == ["words", "requests"]
    assert list(report["skipped"]) == ["choices", "text"]
    assert "choices was left out, also of averages: " in (folder / "report.html").read_text()


def test_training_text_is_looked_through_without_asking_again(models, data, tmp_path):
    """The text is in it whole; the other questions have too few words to tell."""
    folder = run(recipe(models, data, tmp_path / "out", "base")).path
    samples_file = folder / "samples" / "base" / "words.jsonl"
    time = samples_file.stat().st_mtime_ns
    train = tmp_path / "train.txt"
    train.write_text("Before. " + (data / "text.txt").read_text())
    again = recipe(models, data, tmp_path / "out", "base", contamination=[str(train)])
    assert run(again).is_finished
    assert samples_file.stat().st_mtime_ns == time
    report = json.loads((folder / "report.json").read_text())
    (found,) = report["contamination"]
    assert found["tasks"]["text"]["overlapping"]
    assert len(found["tasks"]["words"]["too_short"]) == len(QUESTIONS)
    with pytest.raises(UserError, match="Give the files that the models were trained on"):
        run(recipe(models, data, tmp_path / "new", "base", contamination=["nowhere"]))


def test_a_changed_question_makes_it_another_run(models, data, tmp_path):
    settings = recipe(models, data, tmp_path / "out", "base")
    run(settings)
    path = data / "words.jsonl"
    path.write_text(path.read_text().replace("Mila", "Tilo"))
    with pytest.raises(UserError, match="holds another run"):
        run(settings)


def test_the_verb_takes_the_same_settings(models, data, tmp_path):
    folder = evaluate(
        [str(models / "base")],
        output_dir=str(tmp_path / "out"),
        suite="all",
        data_dir=str(data),
        include_path=str(data),
        limit=2,
    )
    report = json.loads((folder.path / "report.json").read_text())
    assert report["suite"] == "all"
    (model,) = report["models"]
    assert model["groups"]["words"]["value"] == 1.0
    assert model["tasks"]["words"]["exact_match"]["n"] == 2
    with pytest.raises(UserError, match="Say what to ask: a suite"):
        evaluate([str(models / "base")], output_dir=str(tmp_path / "other"))


def test_the_plan_counts_questions_and_touches_nothing(models, data, tmp_path):
    settings = recipe(models, data, tmp_path / "out", "base", "chat", limit=3)
    planned = plan(settings)
    assert planned["questions"] == {"words": 3, "choices": 3, "requests": 3, "text": 1}
    assert planned["questions_in_all"] == 20
    assert not (tmp_path / "out").exists()
    names = {path.name for path in input_files(settings)}
    assert {"words.jsonl", "tasks.yaml", "model.safetensors", "tokenizer.json"} <= names


def test_models_get_short_names_that_differ():
    assert model_names(["runs/a/base", "runs/a/sft/"]) == ["base", "sft"]
    assert model_names(["runs/a/sft", "runs/b/sft"]) == ["a-sft", "b-sft"]
    assert model_names(["sft", "./sft"]) == ["sft-1", "sft-2"]
    assert model_names(["/", "a"]) == ["model", "a"]


# ---------------------------------------------------------------- what cannot be asked


def test_a_question_longer_than_the_context_counts_as_wrong_and_is_reported(
    models, data, tmp_path, capsys
):
    with open(data / "words.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "why " * 200, "answer": "because"}) + "\n")
    with open(data / "choices.jsonl", "a") as file:
        row = {"question": "why " * 200, "options": ["a", "b"], "gold": 0}
        file.write(json.dumps(row) + "\n")
        row = {"question": "why?", "options": ["a " * 200, "b"], "gold": 0}
        file.write(json.dumps(row) + "\n")
    folder = run(recipe(models, data, tmp_path / "out", "base")).path
    assert scores(folder)["base"]["words exact_match"] == pytest.approx(5 / 6)
    assert samples(folder, "base", "words")[-1]["not_fitting"]
    assert samples(folder, "base", "choices")[-1]["not_fitting"]
    assert samples(folder, "base", "choices")[-2]["context_cut"]
    page = (folder / "report.html").read_text()
    assert (
        "base: 1 of 6 questions of words, 1 of 7 questions of choices do not fit the model" in page
    )
    assert "1 of 7 contexts of choices lost their beginning" in page
    assert "1 of 6 questions of words do not fit" in capsys.readouterr().err
    assert json.loads((folder / "report.json").read_text())["models"][0]["not_fitting"] == {
        "words": 1,
        "choices": 1,
    }


def test_a_model_without_tokenizer_is_refused_before_anything_is_asked(models, data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(models / "base", bare)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink(missing_ok=True)
    settings = recipe(
        models, data, tmp_path / "out", "base", models=[str(models / "base"), str(bare)]
    )
    with pytest.raises(UserError, match="bare holds no tokenizer"):
        run(settings)
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": []}, "models: the list is empty"),
        ({"models": ["a", "a"]}, "'a' is there twice"),
        ({"tasks": []}, "suite: name a suite, or tasks"),
        ({"limit": 0}, "limit: 0 must be at least 1"),
        ({"sweet": "quickstart"}, "sweet: this key is not known here"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(models, data, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        recipe(models, data, tmp_path / "out", "base", **keys)


def test_missing_things_are_named(models, data, tmp_path):
    with pytest.raises(UserError, match="no-model is not a folder here"):
        input_files(recipe(models, data, tmp_path / "out", "no-model"))
    with pytest.raises(UserError, match=r"no task 'wrods'\. Did you mean 'words'"):
        input_files(recipe(models, data, tmp_path / "out", "base", tasks=["wrods"]))
    (data / "words.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"words.jsonl, line 1: the key 'answer' is missing"):
        run(recipe(models, data, tmp_path / "out", "base"))


def test_a_stop_signal_keeps_finished_tasks(models, data, tmp_path, monkeypatch):
    settings = recipe(models, data, tmp_path / "out", "base")
    kept: list[str] = []
    update = Progress.update

    def update_and_be_told_to_stop(self, done, **shown):
        kept[:] = sorted(path.stem for path in (tmp_path / "out" / "samples").rglob("*.json"))
        if len(kept) == 3:
            signal.raise_signal(signal.SIGTERM)
        update(self, done, **shown)

    monkeypatch.setattr(Progress, "update", update_and_be_told_to_stop)
    with pytest.raises(Stopped, match="what was computed is kept") as stopped:
        run(settings)
    assert stopped.value.signal_number == signal.SIGTERM
    assert kept == ["choices", "requests", "words"]
    monkeypatch.undo()
    assert run(settings).is_finished


# ---------------------------------------------------------------- what a model is given


def subject(models, name):
    return load_subject(str(models / name), batch_tokens=512, batch_size=8)


def test_context_and_continuation_are_split_as_in_lm_eval(models):
    from lm_eval.models.huggingface import HFLM  # slow to import
    from transformers import AutoModelForCausalLM

    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(models / "base"),
        tokenizer=load_chat_tokenizer(models / "base"),
        device="cpu",
    )
    pairs = [
        ("Question: What is the colour of Mila?\nAnswer:", " green"),
        ("The colour is ", "dark blue"),  # the blank moves to the continuation
        ("What is", " the colour of Oren?"),
    ]
    ours = encode_pairs(subject(models, "base"), pairs)
    assert [tuple(map(list, request)) for request in ours] == [
        theirs._encode_pair(*pair) for pair in pairs
    ]


def test_a_boundary_inside_a_token_loses_no_character(models):
    base = subject(models, "base")
    ((context, continuation),) = encode_pairs(base, [("What is the col", "our of Oren?")])
    assert base.tokenizer.decode(context) == "What is the col"
    assert base.tokenizer.decode(continuation) == "our of Oren?"


def test_a_continuation_without_context_follows_the_end_of_text(models):
    ((context, continuation),) = encode_pairs(subject(models, "base"), [("", "green")])
    assert context == [0]
    assert len(continuation) > 0


def test_control_tokens_in_a_question_are_ordinary_text(models):
    text = "Say <|endoftext|> and <|assistant|>."
    base = subject(models, "base")
    (ids,) = base.encode([text])
    assert not set(ids) & set(range(14))  # the special tokens
    question = Question("0", ({"role": "user", "content": text},), ("x",))
    task = Task("t", "exact_match", "f")
    for name in ("base", "chat"):
        (row,) = ask(subject(models, name), task, [question], max_new_tokens=2)
        assert text in row["prompt"]


def test_earlier_turns_stand_before_a_plain_question(models):
    question = Question(
        "0",
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "1+2?"},
        ),
        ("3",),
    )
    (row,) = ask(subject(models, "base"), Task("t", "exact_match", "f"), [question])
    assert row["prompt"] == "Be brief.\n\nQuestion: 1+1?\nAnswer: 2\n\nQuestion: 1+2?\nAnswer:"


def test_blocks_of_a_document_add_up_to_the_whole(models, monkeypatch):
    from olmo_base.scorer import rolling_logprob

    base = subject(models, "base")
    text = "".join(PLAIN) * 3 + "naïve café ☕"
    monkeypatch.setattr("eval.asking.BLOCK_CHARACTERS", 50)
    rows = ask(base, Task("t", "perplexity", "f"), [Document("7", text)])
    assert [row["doc_id"] for row in rows][:2] == ["7:0", "7:1"]
    assert sum(row["num_bytes"] for row in rows) == len(text.encode())
    assert sum(row["num_words"] for row in rows) == len(text.split())
    (ids,) = base.encode([text])
    whole = rolling_logprob(base.model, ids, prefix_id=0)
    assert sum(row["num_tokens"] for row in rows) == len(ids)
    assert math.isclose(sum(row["logprob"] for row in rows), whole.logprob, rel_tol=1e-6)


def test_any_hugging_face_model_can_be_asked(models, data, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=0,
        bos_token_id=None,
    )
    shutil.copytree(models / "tokenizer", tmp_path / "llama")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    folder = run(recipe(tmp_path, data, tmp_path / "out", "llama")).path
    bits = scores(folder)["llama"]["text bits_per_byte"]
    assert bits == pytest.approx(samples_bits(folder), rel=1e-6)
    assert {row["correct"] for row in samples(folder, "llama", "words")} == {False}


def samples_bits(folder: Path) -> float:
    (row,) = samples(folder, "llama", "text")
    return -row["logprob"] / math.log(2) / row["num_bytes"]


def test_a_choice_reports_the_log_likelihood_of_every_option(models):
    choice = Choice("0", "?", ("Question: ?\nAnswer:",) * 2, (" red", " green"), gold=0)
    (row,) = ask(subject(models, "base"), Task("t", "multiple_choice", "f"), [choice])
    assert [option["text"] for option in row["options"]] == [" red", " green"]
    assert all(option["logprob"] < 0 for option in row["options"])
    assert all(option["logprob_alone"] is None for option in row["options"])


def test_an_encoder_exists_exactly_where_there_is_a_template(models):
    assert subject(models, "base").encoder is None
    assert subject(models, "chat").encoder is not None
    assert load_chat_encoder(models / "chat").end_of_turn_ids == {0}
