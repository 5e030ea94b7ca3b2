"""What the starting weights think of every answer: computed once, and kept with what decides it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from olmo_base.run.artefact import RunFolder, atomic_write, describe_inputs, model_files
from olmo_base.run.metrics import Progress
from open_instruct.batches import Batch, Examples, evaluation_batches
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import Workers
from open_instruct.tuning import AdaptableRecipe

# P pairs (or rated answers) of a set, B of a micro-batch, W answers of each (2, or 1 if rated)

# In a folder of its own: vLLM reads every *.safetensors file beside config.json as weights.
REFERENCE_FILE = "reference/logprobs.safetensors"


def answer_logprobs(model: nn.Module, batch: Batch, width: int = 2) -> Tensor:
    """Log-probability of each answer, summed over its tokens: (B, W)."""
    return batch.sums_over_sequences(model(batch)).view(-1, width)


def reference_key(recipe: AdaptableRecipe, workers: Workers, sets: dict[str, Examples]) -> str:
    """What decides the reference log-probabilities: the weights, every id and every label.

    Weights by their content: the files of the model and, of an adapter, of its base.

    Tokenizer, template, data and settings all end in the ids, so a change of any is seen there.
    """
    files = describe_inputs(model_files(recipe.model.model_name_or_path)).values()
    bits = (recipe.adapter.load_in_4bit, recipe.adapter.load_in_8bit)
    content = {
        "model": sorted(str(item["sha256"]) for item in files),
        "quantised": [*bits, recipe.adapter.given] if any(bits) else None,
        "attention": recipe.model.attn_implementation,
        "bf16": workers.bf16,
        "shared": [examples.shares_prompts for examples in sets.values()],
        "examples": {name: examples.fingerprint() for name, examples in sets.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_reference(path: Path, key: str) -> dict[str, Tensor] | None:
    """The log-probabilities kept in a file, if they are the ones of this key."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def compute_reference(
    model: LabelLogprobs,
    examples: Examples,
    workers: Workers,
    batch_size: int,
    update: Callable[[int], None],
) -> Tensor:
    """Log-probability of every answer under the model as it is: (P, W), on every rank.

    Batches are those of the held-out evaluation, so that an unchanged policy gives the same
    numbers to the last bit.
    """
    reference_PW = torch.zeros(len(examples), examples.width, device=workers.device)
    model.eval()
    done = 0
    for batch in evaluation_batches(
        examples, max_examples=batch_size, num_ranks=workers.num_ranks, rank=workers.rank
    ):
        batch = batch.to(workers.device)
        reference_PW[batch.examples] = answer_logprobs(model, batch, examples.width)
        done += len(batch.examples) * workers.num_ranks
        update(min(done, len(examples)))
    return workers.sum_over_ranks(reference_PW)


def reference_logprobs(
    folder: RunFolder,
    recipe: AdaptableRecipe,
    workers: Workers,
    model: LabelLogprobs,
    sets: dict[str, Examples],
) -> dict[str, Tensor]:
    """Each set's reference log-probabilities: those kept in the run's folder, or computed now.

    ``model`` must hold the starting weights: this comes before the loop loads a checkpoint. Those
    of a new adapter are the model without it; those of an earlier one are what it was then.
    """
    path = folder.path / REFERENCE_FILE
    key = reference_key(recipe, workers, sets)
    kept = read_reference(path, key)
    if kept is None:
        kept = {}
        for name, examples in sets.items():
            with Progress(folder, f"reference, {name}", len(examples), unit="examples") as progress:
                kept[name] = compute_reference(
                    model,
                    examples,
                    workers,
                    recipe.train.per_device_eval_batch_size,
                    progress.update,
                )
        if workers.rank == 0:
            on_cpu = {name: values.cpu().contiguous() for name, values in kept.items()}
            atomic_write(path, save(on_cpu, metadata={"key": key}))
    else:
        folder.log(f"reference log-probabilities read from {path}")
    workers.wait()
    return {name: values.to(workers.device) for name, values in kept.items()}
