"""Inspecting a recipe shows its examples, lengths and drops before anything is trained."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import DataError, UserError
from open_instruct.causal_lm import ModelConfig
from open_instruct.examples import DataConfig, Source
from open_instruct.inspect import inspect_recipe, packed_rows
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import PreferenceRecipe
from open_instruct.reward import RewardRecipe
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


def shown(
    recipe: SftRecipe | PreferenceRecipe | RewardRecipe, colours: bool = False, **keys
) -> str:
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
    assert "prompt/completion all rows 1 1" in " ".join(text.split())
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


def test_pairs_of_a_reward_recipe_are_shown_too(tmp_path, model_folder):
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no", "margin": "wide"}
    recipe = RewardRecipe(
        model=ModelConfig(model_name_or_path=str(model_folder)),
        chat_template="tulu",
        data=DataConfig(dataset_mixer=(Source(write(tmp_path / "rows.jsonl", [pair])),)),
        run=RunConfig(output_dir="unused"),
    )
    with pytest.raises(DataError, match="'margin' is 'wide'"):
        inspect_recipe(recipe, console=Console(file=io.StringIO()))
    write(tmp_path / "rows.jsonl", [{**pair, "margin": 2}])
    assert "⟦yes<|endoftext|>⟧" in shown(recipe)


def test_the_page_holds_everything_and_escapes_the_data(tmp_path, model_folder):
    answers = ["<script>alert(1)</script>", "fine", "&amp; <|user|>"]
    path = write(tmp_path / "rows.jsonl", [*rows(*answers), {"prompt": "q", "completion": ""}])
    recipe = sft_recipe(model_folder, path, on_bad_row="drop")
    shown(recipe, html=tmp_path / "page.html", num_shown=9)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (
        "<script" not in text and "src=" not in text and "http" not in text.replace("http-eq", "")
    )
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark><mark><u>&lt;|endoftext|&gt;" in text
    assert "<mark>&amp;amp; &lt;|user|&gt;</mark>" in text  # spelt by the data: no control token
    assert "1 dropped: empty content" in text
    assert "3 examples used" in text
    HTMLParser().feed(text)


def test_a_page_is_written_even_if_examples_are_too_long(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", rows("é" * 45))
    text = shown(sft_recipe(model_folder, path, max_length=24), html=tmp_path / "page.html")
    assert "ERROR" in text
    assert "are longer than max_length" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_sequences_are_packed_longest_first_into_the_fullest_row_they_fit():
    assert packed_rows([], 10) == 0
    assert packed_rows([10, 10], 10) == 2
    assert packed_rows([6, 4, 7, 3], 10) == 2
    assert packed_rows([5, 5, 5, 1], 10) == 2
    # 7 | 6 | 4 with 6 | 3 with 7 | 2 and 2 open a third row
    assert packed_rows([7, 6, 4, 3, 2, 2], 10) == 3


def test_repeated_rows_and_packing_are_said(tmp_path, model_folder):
    row = {"prompt": "q", "completion": "a"}
    text = shown(sft_recipe(model_folder, write(tmp_path / "rows.jsonl", [row, row]), max_length=9))
    assert "1 rows say the same as an earlier row" in text
    assert "packed into rows of 9: 2 rows" in text
