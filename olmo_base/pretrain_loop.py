"""The pretraining loop: gradients summed over micro-batches and divided once, rows, checkpoints."""

# B sequences of a micro-batch, T positions, D width

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from olmo_base.corpus.batches import Batch, TokenSequences, micro_batches
from olmo_base.losses import next_token_loss
from olmo_base.model.transformer import Transformer, flops_per_token
from olmo_base.optim import (
    StepGuard,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from olmo_base.pretrain_recipe import (
    Corpus,
    PretrainRecipe,
    epoch_at,
    num_steps,
    read_in_step,
)
from olmo_base.run.artefact import RunFolder
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.launch import StopFlag, stop_signals
from olmo_base.run.metrics import MetricsLog, Progress
from olmo_base.run.resume import (
    latest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)

# Dense bf16 peak in FLOP/s, found by the first part of a name that matches.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


# ---------------------------------------------------------------- loss


def summed_loss(model: Transformer, batch: Batch, *, z_loss: float) -> tuple[Tensor, Tensor]:
    """What to minimise and the cross-entropy alone, in nats, summed over a micro-batch."""
    hidden_BTD = model(batch.ids_BT, document_ids_BT=batch.document_ids_BT)
    return next_token_loss(
        hidden_BTD.flatten(0, 1), model.output_weight, batch.labels_BT.flatten(), z_loss=z_loss
    )


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    sequences: TokenSequences,
    *,
    batch_size: int,
    max_tokens: int,
    mask: bool,
    bf16: bool,
) -> dict[str, float]:
    """The loss on the first ``max_tokens`` held-out tokens, as a row of metrics.jsonl.

    ``eval_loss`` is in nats per token, ends of documents included. ``eval_bits_per_byte`` spreads
    it over the bytes of the documents' text, so that tokenizers can be compared.
    """
    num_sequences = min(len(sequences), max(1, max_tokens // sequences.max_length))
    device = model.device
    total = torch.zeros((), dtype=widest(device), device=device)
    for first in range(0, num_sequences, batch_size):
        indices = range(first, min(first + batch_size, num_sequences))
        batch = sequences.batch(indices, mask=mask).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total += summed_loss(model, batch, z_loss=0.0)[1]
    loss = float(total) / (num_sequences * sequences.max_length)
    tokens_per_byte = sequences.num_tokens / sequences.num_bytes
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) * tokens_per_byte}


def widest(device: torch.device) -> torch.dtype:
    """What to add up many numbers in."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no fp64


# ---------------------------------------------------------------- where a run stands


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds beside weights and optimizer."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # asked for so far
    left_out: int = 0  # sequences with repeated n-grams
    seconds: float = 0.0  # in steps, not in evaluations and checkpoints
    row_tokens: int = 0  # since the last row of metrics.jsonl, as the next two
    row_seconds: float = 0.0
    row_loss: float = 0.0  # summed


def refuse_many_skipped(
    guard: StepGuard, folder: RunFolder, recipe: PretrainRecipe, corpus: Corpus, step: int
) -> None:
    """Errors: UserError if too many steps in a row were left out, up to ``step`` at the latest.

    Reading the guard waits for the device.
    """
    if guard.longest <= recipe.optim.max_skipped_steps:
        return
    saved = sorted(path.name for path in folder.checkpoints.glob("step_*"))
    kept = f"The last checkpoint is kept: {saved[-1]}. " if saved else ""
    places = [str(place) for _, found in read_in_step(recipe, corpus, step) for place in found]
    raise UserError(
        f"{guard.longest} steps in a row were left out: loss or gradient was no finite number"
        f"{' or far above the usual' if guard.sigma else ''}. Step {step} read "
        f"{'; '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''} "
        f"(all: open-instruct data inspect {folder.path} --step {step}). {kept}"
        "Look at that text, lower learning_rate or lengthen the warmup, and train into a new "
        "output_dir; "
        f"{folder.path / 'metrics.jsonl'} shows where it began."
    )


def resume(
    folder: RunFolder, model: Transformer, optimizer: torch.optim.Optimizer, guard: StepGuard
) -> Position:
    """Put weights, optimizer, guard and generators where the latest checkpoint left them."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return Position()
    weights, state = checkpoint.load()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    guard.load_state_dict(state["guard"])
    restore_random_state(state["random"])
    folder.log(f"going on from {checkpoint.path}, after step {checkpoint.step}")
    return Position(**state["position"])


# ---------------------------------------------------------------- the loop


def train(
    folder: RunFolder, recipe: PretrainRecipe, corpus: Corpus, model: Transformer, *, bf16: bool
) -> dict[str, float]:
    """Train ``model`` in place to the end, going on from the latest checkpoint if there is one.

    Returns the figures of the end. Errors: Stopped after SIGINT, SIGTERM or SIGUSR1, with a
    checkpoint written; UserError when too many steps in a row are no good.
    """
    device = model.device
    optimizer = build_optimizer(model, recipe.optim, bf16=bf16)
    guard = StepGuard(device, recipe.optim.skip_spike_sigma)
    at = resume(folder, model, optimizer, guard)
    metrics = MetricsLog(folder, resume_step=at.step)
    total_steps = num_steps(recipe, len(corpus.train))
    row_loss = torch.tensor(at.row_loss, dtype=widest(device), device=device)
    shown: dict[str, float] = {}

    def evaluate() -> None:
        if corpus.held_out is None:
            return
        row = held_out_loss(
            model,
            corpus.held_out,
            batch_size=recipe.per_device_eval_batch_size,
            max_tokens=recipe.max_eval_tokens,
            mask=recipe.mask_documents,
            bf16=bf16,
        )
        metrics.write(at.step, epoch=epoch_at(recipe, corpus, at.step), tokens=at.tokens, **row)
        shown.update(row)
        progress.update(at.step, **shown)

    with stop_signals() as stop, Progress(folder, "pretrain", total_steps, at.step) as progress:
        if at.step == 0:
            evaluate()
        while at.step < total_steps:
            started = time.perf_counter()
            learning_rate = learning_rate_at(at.step, total_steps, recipe.optim)
            set_learning_rate(optimizer, learning_rate)
            batches = batches_of_step(recipe, corpus, at.step)
            at.left_out += recipe.sequences_per_step - sum(len(batch.ids_BT) for batch in batches)
            step_loss = add_gradients(model, batches, z_loss=recipe.z_loss, bf16=bf16)
            grad_norm = clip_gradients(model.parameters(), recipe.optim.max_grad_norm)
            num_tokens = sum(batch.num_labels for batch in batches)
            guard.watch(optimizer, step_loss / max(1, num_tokens), grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            at.step += 1
            at.tokens += num_tokens
            at.row_tokens += num_tokens
            row_loss += step_loss

            is_last = at.step == total_steps
            is_row = is_last or at.step % recipe.log.logging_steps == 0
            is_evaluated = is_last or (recipe.eval_steps and at.step % recipe.eval_steps == 0)
            is_saved = stop.requested or at.step % recipe.checkpoints.save_steps == 0
            if is_row or is_evaluated or is_saved:
                refuse_many_skipped(guard, folder, recipe, corpus, at.step)  # waits for the device
            at.seconds += time.perf_counter() - started
            at.row_seconds += time.perf_counter() - started
            if is_row:
                shown |= {
                    "loss": float(row_loss) / max(1, at.row_tokens),
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_second": at.row_tokens / at.row_seconds,
                }
                metrics.write(
                    at.step,
                    epoch=epoch_at(recipe, corpus, at.step),
                    tokens=at.tokens,
                    seconds=round(at.seconds, 3),
                    **({"sequences_left_out": at.left_out} if recipe.max_ngram_repeats else {}),
                    **({"skipped_steps": guard.num_skipped} if guard.num_skipped else {}),
                    **{key: shown[key] for key in shown if not key.startswith("eval_")},
                    **_gpu_figures(model, shown["tokens_per_second"], recipe.max_length),
                )
                row_loss.zero_()
                at.row_tokens, at.row_seconds = 0, 0.0
            progress.update(at.step, **shown)
            if is_evaluated:
                evaluate()
            if is_saved and not is_last:  # after the rows: those of a checkpoint's step are kept
                at.row_loss = float(row_loss)
                save(folder, recipe, model, optimizer, guard, at)
                _stop_if_asked(stop, at)
    return {
        **shown,
        "tokens": at.tokens,
        "train_seconds": round(at.seconds, 3),
        "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
        "skipped_steps": guard.num_skipped,
        "sequences_left_out": at.left_out,
    }


def batches_of_step(recipe: PretrainRecipe, corpus: Corpus, step: int) -> list[Batch]:
    """The micro-batches of step 0, 1, …"""
    return micro_batches(
        corpus.train,
        step,
        micro_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        seed=recipe.run.seed,
        mask=recipe.mask_documents,
        max_ngram_repeats=recipe.max_ngram_repeats,
    )


def add_gradients(
    model: Transformer, batches: Sequence[Batch], *, z_loss: float, bf16: bool
) -> Tensor:
    """Add one step's gradients; returns the cross-entropy summed over its tokens, on the device.

    The sum is divided once, by the tokens of all micro-batches, so that how they are cut changes
    nothing but rounding.
    """
    device = model.device
    num_labels = max(1, sum(batch.num_labels for batch in batches))
    step_loss = torch.zeros((), device=device)
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, cross_entropy = summed_loss(model, batch.to(device), z_loss=z_loss)
        (loss / num_labels).backward()
        step_loss += cross_entropy
    return step_loss


def save(
    folder: RunFolder,
    recipe: PretrainRecipe,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    at: Position,
) -> None:
    """Write a checkpoint of this step."""
    state = {
        "position": asdict(at),
        "optimizer": optimizer.state_dict(),
        "guard": guard.state_dict(),
        "random": random_state(),
    }
    keep = recipe.checkpoints.save_total_limit
    save_checkpoint(folder, at.step, weights=model.state_dict(), state=state, keep=keep)


def _stop_if_asked(stop: StopFlag, at: Position) -> None:
    if stop.requested:
        raise Stopped(stop.signal_number, f" after step {at.step}, which is saved")


def _gpu_figures(model: Transformer, tokens_per_second: float, max_length: int) -> dict[str, float]:
    """``peak_memory_bytes``, and ``mfu`` where the chip's peak is known; nothing on a CPU."""
    if model.device.type != "cuda":
        return {}
    figures: dict[str, float] = {"peak_memory_bytes": torch.cuda.max_memory_allocated(model.device)}
    name = torch.cuda.get_device_name(model.device)
    peak = next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
    if peak is not None:
        figures["mfu"] = tokens_per_second * flops_per_token(model.config, max_length) / peak
    return figures
