"""How a model came to be, read from its folder and from those it started from."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olmo_base.run.artefact import read_manifest
from olmo_base.run.errors import DataError, UserError


@dataclass(frozen=True)
class Stage:
    """One training run: its folder's manifest, resolved recipe and logged steps."""

    name: str
    kind: str  # pretrain, sft, dpo
    path: Path
    manifest: dict[str, Any]
    recipe: dict[str, Any]
    rows: Sequence[dict[str, Any]]  # metrics.jsonl
    answers: Sequence[dict[str, Any]] = ()  # samples.jsonl: to held-out prompts, step after step

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever a row holds a number under this key."""
        return [
            (float(row["step"]), float(row[key]))
            for row in self.rows
            if isinstance(row.get(key), int | float) and "step" in row
        ]


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, from its configuration and the headers of its weight files."""

    architecture: str
    num_parameters: int
    num_bytes: int
    num_layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    context_length: int | None


def read_stage(folder: Path) -> Stage | None:
    """The run in a folder; None if the folder holds no run. Errors: DataError for broken files."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    recipe: Any = {}
    recipe_path = folder / "recipe.yaml"
    if recipe_path.is_file():
        try:
            recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(recipe_path, None, f"broken YAML ({error}).") from None
    return Stage(
        name=folder.resolve().name,
        kind=str(manifest.get("stage", "?")),
        path=folder,
        manifest=manifest,
        recipe=recipe if isinstance(recipe, dict) else {},
        rows=_rows(folder / "metrics.jsonl"),
        answers=_rows(folder / "samples.jsonl"),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                continue  # the half line of a killed process
            raise DataError(path, number, f"broken JSON ({error}).") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def life_of(model_folder: Path) -> list[Stage]:
    """The runs that made a model, the oldest first; empty if its folder does not tell."""
    stages: list[Stage] = []
    folder: Path | None = model_folder
    seen: set[Path] = set()
    while folder is not None and folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        stage = read_stage(folder)
        if stage is None:
            break
        stages.insert(0, stage)
        parent = stage.recipe.get("model_name_or_path")
        folder = Path(parent) if isinstance(parent, str) else None
    return stages


def model_facts(folder: Path) -> ModelFacts | None:
    """Sizes of the model in a folder; None if it holds no safetensors model."""
    weights = sorted(folder.glob("*.safetensors"))
    config_path = folder / "config.json"
    if not weights or not config_path.is_file():
        return None
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path}: broken JSON ({error}).") from None
    return ModelFacts(
        architecture=", ".join(config.get("architectures") or [config.get("model_type", "?")]),
        num_parameters=sum(_count_parameters(path) for path in weights),
        num_bytes=sum(path.stat().st_size for path in weights),
        num_layers=config.get("num_hidden_layers"),
        hidden_size=config.get("hidden_size"),
        vocab_size=config.get("vocab_size"),
        context_length=config.get("max_position_embeddings"),
    )


def _count_parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header: 8 bytes of length, then JSON of shapes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise DataError(path, None, "the file is damaged.", "Run the stage again.")
        header = json.loads(file.read(size))
    return sum(
        math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
    )
