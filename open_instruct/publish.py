"""A finished run for others: its model card, and a repository on the Hugging Face hub if asked for.

manifest, metrics, recipe, what was read of each source -> README.md; the folder -> the hub.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olmo_base.run.artefact import ADAPTER_CONFIG, RunFolder, atomic_write, read_manifest
from olmo_base.run.errors import UserError
from olmo_base.run.launch import versions
from olmo_base.run.recipe import RecipeError, recipe_to_yaml, setting
from open_instruct.examples import SourceUse

CARD = "README.md"
CURVE_ROWS = 12  # of the loss, spread over the run
# What is of use to the run and not to others. Data may be private: the reference's ids and answered
# held-out prompts are not it. Manifest and log name files of this machine; card and recipe say what
# was read in the words of the recipe.
NOT_PUBLISHED = [
    *("checkpoints/*", "reference/*", "tensorboard/*"),
    *(".lock", ".*", "*.tmp/*"),
    *("manifest.json", "train.log", "samples.jsonl"),
]


@dataclass(frozen=True)
class HubConfig:
    """Whether the finished model is uploaded, and where to. Named as transformers does."""

    push_to_hub: bool = setting(False, changes_result=False)
    hub_model_id: str | None = setting(
        None, changes_result=False, help="owner/name of the repository"
    )
    hub_private_repo: bool = setting(True, changes_result=False)

    def __post_init__(self) -> None:
        if self.push_to_hub and self.hub_model_id is None:
            raise RecipeError("hub_model_id", "push_to_hub needs it: owner/name of a repository.")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise RecipeError(
                "hub_model_id", "set, but push_to_hub is not true. Set it, or remove the key."
            )


# ---------------------------------------------------------------- the model card


def write_model_card(folder: RunFolder, uses: Sequence[SourceUse], results: dict[str, Any]) -> None:
    """Write README.md: data, figures, curves and recipe of a run that has ended."""
    atomic_write(folder.path / CARD, model_card(folder, uses, results))


def model_card(run: RunFolder, uses: Sequence[SourceUse], results: dict[str, Any]) -> str:
    """The card's text; its head is what the hub reads."""
    folder, recipe = run.path, run.recipe
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    is_reward = recipe.stage == "reward"
    base = recipe.model.model_name_or_path
    head = {
        "base_model": base,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "tags": ["open-instruct", str(recipe.stage)],
    }
    kind = "An adapter on" if is_adapter else "A reward model of" if is_reward else "Tuned from"
    held_out = {key: value for key, value in results.items() if key.startswith("eval_")}
    trained = {key: value for key, value in results.items() if key not in held_out}
    dropped = ", ".join(f"{why}: {number:,}" for why, number in run.counts.dropped.items())
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {folder.name}",
        f"{kind} `{base}`, made by the stage `{recipe.stage}` of open-instruct.",
        "## Data",
        _table(
            ("source", "format", "asked for", "usable rows", "used"),
            [
                (use.path, ", ".join(use.formats), use.asked, f"{use.available:,}", f"{use.used:,}")
                for use in uses
            ],
        ),
        f"Left out, by reason: {dropped or 'nothing'}.",
        "## Training",
        _table(("figure", "value"), [(key, _shown(value)) for key, value in trained.items()]),
        *curves(folder),
        "## Evaluation",
        _table(("held out", "value"), [(key, _shown(value)) for key, value in held_out.items()])
        if held_out
        else "No examples were held out.",
        "Tasks: `open-instruct eval MODEL --suite S --output-dir R`.",
        "## Recipe",
        f"```yaml\n{recipe_to_yaml(recipe).rstrip()}\n```",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def curves(folder: Path) -> list[str]:
    """The picture of the curves where there is one, and some rows of metrics.jsonl."""
    picture = ["![Curves of the run](curves.png)"] if (folder / "curves.png").is_file() else []
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [row for row in map(json.loads, lines) if "loss" in row or "eval_loss" in row]
    if not rows:
        return picture
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:  # a step may have a row of training and one of the held-out examples
        by_step.setdefault(row["step"], {}).update(row)
    steps = sorted(by_step)
    every = max(1, -(-len(steps) // CURVE_ROWS))
    shown = sorted({*steps[::every], steps[-1]})
    keys = [
        key
        for key in ("loss", "eval_loss", "eval_accuracy", "learning_rate")
        if key in {name for row in rows for name in row}
    ]
    table = _table(
        ("step", *keys),
        [(f"{step:,}", *(_shown(by_step[step].get(key)) for key in keys)) for step in shown],
    )
    return [*picture, table]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- the hub


def push(folder: str | Path, name: str, *, is_private: bool = True) -> str:
    """Upload a finished run's folder to the repository ``name``; its address.

    Errors: UserError if the run is not finished, or the hub cannot be reached or refuses.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is not None and manifest.get("status") != "finished":
        raise UserError(f"{path} is not finished. Run its recipe again, then push it.")
    if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise UserError(f"{path} holds no model. Give the output_dir of a finished run.")
    if name.count("/") != 1:
        raise UserError(f"{name!r} is not the name of a repository. Needed: owner/name.")
    from huggingface_hub import HfApi  # heavy, and only for those who ask
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(name, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=path, ignore_patterns=NOT_PUBLISHED)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"{path} could not be uploaded to {name}: {first_line} Log in (hf auth login) and "
            f"check the network, then: open-instruct push {path} {name}"
        ) from None
    return str(address)


def push_if_asked(folder: Path, config: HubConfig) -> str | None:
    """Upload where the recipe says so; the address, or None. Errors: as ``push``."""
    if not config.push_to_hub:
        return None
    assert config.hub_model_id is not None
    return push(folder, config.hub_model_id, is_private=config.hub_private_repo)
