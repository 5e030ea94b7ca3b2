"""Inspecting a recipe shows its examples, lengths and drops before anything is trained."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import DataError, UserError
from open_instruct.causal_lm import ModelConfig
from open_instruct.examples import DataConfig, Source
from open_instruct.inspect import inspect_recipe
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import PreferenceRecipe
from open_instruct.sft import SftRecipe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, chat_tokenizer) -> Path:
    """What inspecting needs of a model: its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def shown(recipe: SftRecipe | PreferenceRecipe, colours: bool = False, **keys) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=100, force_terminal=colours, color_system="standard" if colours else None
    )
    try:
        inspect_recipe(recipe, console=console, **keys)
    except UserError as error:
        return file.getvalue() + f"ERROR {error}"
    return file.getvalue()


def sft_recipe(model_folder: Path, path: str, **keys) -> SftRecipe:
    return SftRecipe(
        model=ModelConfig(model_name_or_path=str(model_folder)),
        chat_template="tulu",
        data=DataConfig(dataset_mixer=(Source(path),), **keys),
        run=RunConfig(output_dir="unused"),
    )


def rows(*answers: str) -> list[dict]:
    return [{"prompt": f"q{n}", "completion": answer} for n, answer in enumerate(answers)]


def test_a_dialogue_is_shown_with_what_is_learnt(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", rows("four"))
    text = shown(sft_recipe(model_folder, path))
    assert f"{path}, line 1" in text.replace("\n", "")
    assert "<|user|>\nq0\n<|assistant|>\n⟦four<|endoftext|>⟧\n" in text
    assert "prompt/completion   all rows          1      1" in text
    assert "none dropped" in text
    coloured = shown(sft_recipe(model_folder, path), colours=True)
    assert "\x1b[1;32mfour\x1b[0m\x1b[1;4;32m<|endoftext|>" in coloured


def test_tokens_can_be_shown_one_a_line_with_their_ids(tmp_path, model_folder, chat_tokenizer):
    path = write(tmp_path / "rows.jsonl", rows("!"))
    lines = shown(sft_recipe(model_folder, path), by_token=True).splitlines()
    eos, user = (chat_tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("endoftext", "user"))
    assert f"{eos:>8}  learnt  '<|endoftext|>'" in lines
    assert f"{user:>8}          '<|user|>'" in lines


def test_lengths_totals_and_drops_are_counted(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", [*rows("é" * 5, "é" * 5, "é" * 45), {"prompt": "q"}])
    keys = {"on_bad_row": "drop", "on_too_long": "drop", "max_too_long_fraction": 0.5}
    text = shown(sft_recipe(model_folder, path, max_length=24, **keys), num_shown=0)
    # each 7 before the answer, 10 or 90 bytes of answer, and the end token
    assert "134 tokens, 113 of them learnt (84.3%)" in text
    assert "2 examples used, 0 of them truncated" in text
    assert "1 dropped: longer than max_length" in text
    assert "1 dropped: missing key" in text
    assert "← max_length 24" in text


def test_an_error_about_length_comes_after_the_lengths(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", rows("é" * 5, "é" * 45))
    text = shown(sft_recipe(model_folder, path, max_length=24))
    assert text.index("tokens per example") < text.index("ERROR")
    assert "line 2" in text[text.index("ERROR") :]


def test_a_bad_row_is_an_error_of_the_door(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": ""}])
    with pytest.raises(DataError, match="line 1: 'completion' is empty"):
        inspect_recipe(sft_recipe(model_folder, path), console=Console(file=io.StringIO()))


def test_data_cannot_write_escape_sequences_to_the_terminal(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", rows("a\x1b[31mred\x07[bold]b[/bold] \u202e"))
    text = shown(sft_recipe(model_folder, path))
    assert "a<U+001B>[31mred<U+0007>[bold]b[/bold] <U+202E>" in text
    assert "\x1b" not in text


def test_pairs_are_shown_as_a_prompt_and_two_answers(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    recipe = PreferenceRecipe(
        model=ModelConfig(model_name_or_path=str(model_folder)),
        chat_template="zephyr",
        data=DataConfig(dataset_mixer=(Source(path),)),
        run=RunConfig(output_dir="unused"),
    )
    lines = shown(recipe).splitlines()
    prompt = lines.index("<|user|>")
    assert lines[prompt : prompt + 3] == ["<|user|>", "q<|endoftext|>", "<|assistant|>"]
    assert "⟦yes<|endoftext|>⟧" in lines
    assert "⟦no<|endoftext|>⟧" in lines


def test_rated_answers_are_shown_with_their_rating(tmp_path, model_folder):
    rated = [{"prompt": "q", "completion": f"a{n}", "label": n == 1} for n in range(2)]
    recipe = PreferenceRecipe(
        model=ModelConfig(model_name_or_path=str(model_folder)),
        chat_template="tulu",
        data=DataConfig(dataset_mixer=(Source(write(tmp_path / "rated.jsonl", rated)),)),
        loss=LossConfig(loss_type="kto"),
        run=RunConfig(output_dir="unused"),
    )
    text = shown(recipe)
    assert "a good answer: " in text and "a bad answer: " in text
    assert "⟦a1<|endoftext|>⟧" in text and "2 examples used" in text
