"""What docs/data_formats.md says is so: its rows load, and real files give the figures it lists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, reward, sft
from open_instruct.encode import template_names
from open_instruct.examples import Source, SourceUse, read_dialogues, read_pairs, read_rated
from tests.open_instruct.rows import write
from tests.open_instruct.tiny import tiny_olmo2, write_recipe

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "data_formats.md").read_text(encoding="utf-8")
SHARED = ROOT.parent / "shared" / "data"
READERS = {"dialogue": read_dialogues, "pair": read_pairs, "rated": read_rated}
FENCES = re.findall(r"```jsonl (\w+)\n(.*?)```", DOC, re.DOTALL)
FIGURES = {
    cells[0]: cells[1:]
    for line in DOC.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 8
    and cells[0].startswith(("dialogues/", "preferences/"))
}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_row_that_is_shown_loads_as_what_it_is_shown_for(tmp_path):
    assert {kind for kind, _ in FENCES} == set(READERS)
    rows = [(kind, json.loads(line)) for kind, text in FENCES for line in text.splitlines()]
    assert len(rows) >= 18
    for kind, row in rows:
        source = Source(write(tmp_path / "row.jsonl", row))
        reader: Any = READERS[kind]
        assert len(reader([source], seed=0, on_bad_row="error", counts=ExampleCounts())) == 1, row


def test_every_template_is_listed():
    assert all(f"| `{name}` |" in DOC for name in template_names())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny model for each template, with OLMo's tokenizer."""
    file = SHARED / "tokenizers" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
    if not file.is_file():
        pytest.skip("the data for development is not here")
    folder = tmp_path_factory.mktemp("models")
    for template in ("olmo", "chatml"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|padding|>"
        )
        if template == "chatml":
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tiny_olmo2(vocab_size=50_304, max_position_embeddings=4096).save_pretrained(
            folder / template
        )
        tokenizer.save_pretrained(folder / template)
    return folder


def stages_of(name: str) -> list[tuple[Any, type, dict[str, Any]]]:
    if name.startswith("dialogues/"):
        return [(sft, sft.SftRecipe, {"stage": "sft"})]
    if "kto" in name:
        keys = {"stage": "dpo", "loss_type": "kto"}
        return [(preference, preference.PreferenceRecipe, keys)]
    return [
        (preference, preference.PreferenceRecipe, {"stage": "dpo"}),
        (reward, reward.RewardRecipe, {"stage": "reward"}),
    ]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_real_files_load_as_they_are_through_a_recipe(name, models, tmp_path):
    # Of some files every row is tokenised: the figures of all would take too long.
    template, rows, used = FIGURES[name][1], number(FIGURES[name][2]), number(FIGURES[name][3])
    is_whole = rows <= 500 and name.startswith("dialogues")
    for module, recipe_class, keys in stages_of(name):
        recipe: Any = load_recipe(
            recipe_class,
            write_recipe(
                tmp_path / "recipe.yaml",
                **keys,
                model_name_or_path=str(models / template),
                chat_template=template,
                dataset_mixer=[
                    {"path": str(SHARED / name)} | ({} if is_whole else {"samples": 40})
                ],
                max_length=2048,
                on_bad_row="drop",
                on_too_long="drop",
                max_too_long_fraction=1.0,
                output_dir=str(tmp_path / "run"),
            ),
        )
        figures = module.plan(recipe)
        examples = figures["examples"]
        if not is_whole:
            assert examples["used"] + examples["dropped"].get("longer than max_length", 0) == 40
            continue
        assert examples["used"] == used
        assert examples["used"] + sum(examples["dropped"].values()) == rows
        assert figures["tokens"] == number(FIGURES[name][4])
        assert figures["label_tokens"] == number(FIGURES[name][5])


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_rows_and_bad_rows_of_real_files_are_those_that_are_listed(name):
    if not SHARED.is_dir():
        pytest.skip("the data for development is not here")
    form, _, rows, _, _, _, dropped = FIGURES[name]
    counts, uses = ExampleCounts(), list[SourceUse]()
    kind = "rated" if "kto" in name else "pair" if name.startswith("pref") else "dialogue"
    reader: Any = READERS[kind]
    source = Source(str(SHARED / name))
    found = reader([source], seed=0, on_bad_row="drop", counts=counts, uses=uses)
    assert uses[0].formats == (form,)
    assert len(found) + sum(counts.dropped.values()) == number(rows)
    listed = [item.strip().split(" ", 1) for item in dropped.split(",") if item.strip()]
    assert counts.dropped == {
        reason: int(count) for count, reason in listed if reason != "longer than max_length"
    }


def test_every_dialogue_and_preference_file_is_listed():
    if not SHARED.is_dir():
        pytest.skip("the data for development is not here")
    folders = ("dialogues", "preferences")
    found = {f"{folder}/{file.name}" for folder in folders for file in (SHARED / folder).iterdir()}
    assert found == set(FIGURES)
