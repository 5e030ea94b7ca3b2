"""``batching: auto`` where a model can do both: the first batches are computed both ways and timed.

Which way is faster is a matter of lengths and of the machine; which bits come out hangs on it. So
the choice is written into the run's folder before the first step, and a run that goes on keeps it.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from olmo_base.run.artefact import RunFolder, atomic_write
from olmo_base.run.heap import keep_freed_memory
from open_instruct.batches import Steps
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import Workers

CHOICE = "batching.json"
LEAST_STEPS = 100  # of a run that gains more by the better way than it costs to find it
NUM_STEPS, NUM_ROUNDS = 2, 2  # that are computed both ways, and how often
WORTH = 1.05  # times as fast must padded rows be: end to end they take less memory


def settle_batching(
    folder: RunFolder,
    workers: Workers,
    packed: LabelLogprobs,
    padded: Callable[[], LabelLogprobs | None],
    steps_of: Callable[[bool], Steps],
    keeps_all: Callable[[LabelLogprobs, Steps], bool],
) -> LabelLogprobs:
    """The one of the two to train with. ``padded`` makes the other one; None where it cannot.

    ``steps_of`` are the run's steps for a model that packs, or does not. ``keeps_all``: whether
    memory allows layers to keep what they compute, without which nothing is measured. Weights,
    gradients and random generators are left as they were. All ranks must ask.
    """
    path = folder.path / CHOICE
    kept = _read(folder)
    if kept is not None:
        folder.log(f"batching: {kept}, as when the run began ({path.name})")
        other = padded() if kept == "grouped" else None
        return packed if other is None else other
    has_begun = folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())
    steps = {"packed": steps_of(True), "grouped": steps_of(False)}
    if has_begun or steps["packed"].total < LEAST_STEPS or not keeps_all(packed, steps["packed"]):
        return packed
    other = padded()
    if other is None or not keeps_all(other, steps["grouped"]):
        return packed
    if workers.device.type == "cpu":
        keep_freed_memory()  # as the loop does
    models = {"packed": packed, "grouped": other}
    rates = dict.fromkeys(models, 0.0)
    with torch.random.fork_rng(enabled=True):
        for _ in range(NUM_ROUNDS):
            for name, model in models.items():
                rates[name] = max(rates[name], _rate(workers, model, steps[name]))
    is_grouped = workers.any_rank(workers.rank == 0 and rates["grouped"] > WORTH * rates["packed"])
    chosen = "grouped" if is_grouped else "packed"
    if workers.rank == 0:
        content = {"run": folder.identity, "batching": chosen, "tokens_per_second": rates}
        atomic_write(path, json.dumps(content, indent=2) + "\n")
    workers.wait()
    words = " and ".join(f"{rate:,.0f} tokens/s {name}" for name, rate in rates.items())
    folder.log(f"batching: {chosen}; the first {NUM_STEPS} steps took {words}")
    return models[chosen]


def _read(folder: RunFolder) -> str | None:
    """What this very run chose before; None if it has not."""
    try:
        content: Any = json.loads((folder.path / CHOICE).read_text(encoding="utf-8"))
        chosen = content["batching"] if content["run"] == folder.identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if chosen in ("packed", "grouped") else None


def _rate(workers: Workers, model: LabelLogprobs, steps: Steps) -> float:
    """Tokens of this rank a second, forward and backward."""
    was_training = model.training
    model.train()
    count = range(min(NUM_STEPS, steps.total))
    batches = [batch for step in count for batch in steps.micro_batches(step, workers.data_rank)]
    _wait(workers.device)
    started = time.perf_counter()
    for batch in batches:
        model(batch.to(workers.device)).sum().backward()
    _wait(workers.device)
    seconds = time.perf_counter() - started
    model.zero_grad()
    model.train(was_training)
    return sum(int(batch.lengths_R.sum()) for batch in batches) / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
