"""The average of several models: of the last checkpoints of a run, or of runs that differ in order.

Annealing the same model on the same mix in several orders and averaging the weights is how the
OLMo-2 models end (arXiv:2501.00656, section 4.5; "model soups", arXiv:2203.05482).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmo_base.model.hf_weights import WEIGHTS_INDEX, weight_files
from olmo_base.run.artefact import atomic_folder, model_files, resolve_model, sha256_file
from olmo_base.run.errors import UserError

UNLIKE = {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}  # may differ


def average_models(names: Sequence[str], out: str | Path) -> Path:
    """Write the mean of the models' weights as a new model folder ``out``.

    Summed in fp32 and stored as the first model's weights are; one file of weights is held at a
    time. Everything else is the first model's. Errors: UserError for fewer than two models, models
    of different shapes or tokenizers, damaged files, or an ``out`` that is not empty.
    """
    if len(names) < 2:
        raise UserError("An average needs at least two models.")
    folders, target = [resolve_model(name) for name in names], Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} exists already. Name a new folder.")
    for other in folders[1:]:
        _refuse_unlike(folders[0], other)
    first, places = folders[0], [_places(folder) for folder in folders]
    for folder, found in zip(folders[1:], places[1:], strict=True):
        if found.keys() != places[0].keys():
            name = sorted(found.keys() ^ places[0].keys())[0]
            raise UserError(f"{folder} and {first} hold different weights: {name} is in one only.")
    with atomic_folder(target) as temporary:
        for path in model_files(str(first)):
            if path.suffix != ".safetensors":
                shutil.copyfile(path, temporary / path.name)
        if (first / WEIGHTS_INDEX).is_file():
            shutil.copyfile(first / WEIGHTS_INDEX, temporary / WEIGHTS_INDEX)
        for file in weight_files(first):
            here = [name for name, place in places[0].items() if place == file]
            means = {name: _mean([found[name] for found in places], name) for name in here}
            save_file(means, temporary / file.name, metadata={"format": "pt"})
        listed = "\n".join(f"- {name}" for name in names)
        card = f"# The average of {len(names)} models\n\nThe mean of the weights of\n\n{listed}\n"
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


def _refuse_unlike(first: Path, other: Path) -> None:
    configs = [
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (first, other)
    ]
    for key in sorted(configs[0].keys() | configs[1].keys()):
        found = [config.get(key) for config in configs]
        if key not in UNLIKE and found[0] != found[1]:
            raise UserError(
                f"{first} and {other} are different models: {key} is {found[0]} and {found[1]}."
            )
    tokenizers = [folder / "tokenizer.json" for folder in (first, other)]
    if all(path.is_file() for path in tokenizers):
        one, two = map(sha256_file, tokenizers)
        if one != two:
            raise UserError(f"{tokenizers[0]} and {tokenizers[1]} are different tokenizers.")


def _places(folder: Path) -> dict[str, Path]:
    """Name of each weight -> the file that holds it."""
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}). Copy or download it again.") from None
    return found


def _mean(files: Sequence[Path], name: str) -> Tensor:
    total: Tensor | None = None
    dtype = torch.float32
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if total is None:
            dtype, total = tensor.dtype, tensor.float()
        elif tensor.shape != total.shape:
            raise UserError(f"{file}: {name} has the shape {tuple(tensor.shape)}, not the first's.")
        else:
            total += tensor.float()
    assert total is not None
    return (total / len(files)).to(dtype)
