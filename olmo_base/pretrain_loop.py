"""The pretraining loop: gradients summed over micro-batches and divided once, rows, checkpoints."""

# B sequences of a micro-batch, T positions, D width

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from olmo_base.corpus.batches import Batch, TokenSequences, micro_batches
from olmo_base.losses import next_token_loss
from olmo_base.model.transformer import Transformer, flops_per_token
from olmo_base.olmes_requests import RequestFile, load_requests, score_requests
from olmo_base.optim import (
    StepGuard,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from olmo_base.parallel import Ranks, meet_at
from olmo_base.pretrain_checkpoints import Keeper
from olmo_base.pretrain_recipe import (
    Corpus,
    PretrainRecipe,
    epoch_at,
    num_steps,
    read_in_step,
)
from olmo_base.run.artefact import RunFolder
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.heap import keep_freed_memory
from olmo_base.run.launch import StopFlag, stop_signals
from olmo_base.run.metrics import MetricsLog, Progress
from olmo_base.run.peaks import peak_flops
from olmo_base.run.watch import watched
from olmo_base.tokenizer import load_tokenizer

# ---------------------------------------------------------------- loss


def summed_loss(model: nn.Module, batch: Batch, *, z_loss: float) -> tuple[Tensor, Tensor]:
    """What to minimise and the cross-entropy alone, in nats, summed over a micro-batch.

    Of several ranks' model (parallel.py) over this rank's part.
    """
    if not isinstance(model, Transformer):
        found: tuple[Tensor, Tensor] = model(batch, z_loss)
        return found
    hidden_BTD = model(batch.ids_BT, document_ids_BT=batch.document_ids_BT)
    return next_token_loss(
        hidden_BTD.flatten(0, 1), model.output_weight, batch.labels_BT.flatten(), z_loss=z_loss
    )


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    sequences: TokenSequences,
    ranks: Ranks,
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
    total = torch.zeros((), dtype=widest(ranks.device), device=ranks.device)
    for first in range(0, num_sequences, batch_size * ranks.num_data):
        start = first + batch_size * ranks.data_rank
        indices = range(start, min(start + batch_size, num_sequences))
        batch = sequences.batch(indices, mask=mask).to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            total += summed_loss(model, batch, z_loss=0.0)[1]
        ranks.still_moves()
    loss = float(ranks.total(total)) / (num_sequences * sequences.max_length)
    tokens_per_byte = sequences.num_tokens / sequences.num_bytes
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) * tokens_per_byte}


def refuse_divided_questions(recipe: PretrainRecipe, ranks: Ranks) -> None:
    """Errors: UserError if questions are asked of a model that no rank has whole."""
    parallel = recipe.parallel
    is_whole = parallel.data_parallel == "ddp" and parallel.context_parallel == 1
    if recipe.eval_requests and ranks.num_ranks > 1 and not is_whole:
        raise UserError(
            "eval_requests needs the whole model on each rank: say data_parallel: ddp without "
            "context_parallel, or leave it out and run 'open-instruct eval' on the result."
        )


def evaluation(
    learner: nn.Module,
    model: Transformer,
    recipe: PretrainRecipe,
    corpus: Corpus,
    questions: Sequence[RequestFile],
    ranks: Ranks,
    *,
    bf16: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of all held-out text; and those of its sources and of the request files.

    ``learner`` is the model over several ranks, ``model`` this rank's own.
    """

    def figures(sequences: TokenSequences) -> dict[str, float]:
        return held_out_loss(
            learner,
            sequences,
            ranks,
            batch_size=recipe.per_device_eval_batch_size,
            max_tokens=recipe.max_eval_tokens,
            mask=recipe.mask_documents,
            bf16=bf16,
        )

    row = {} if corpus.held_out is None else figures(corpus.held_out)
    row_of_parts = {
        f"{key}/{name}": value
        for name, sequences in corpus.held_out_by_source.items()
        for key, value in figures(sequences).items()
    }
    return row, row_of_parts | score_requests(model, questions, bf16=bf16)


def widest(device: torch.device) -> torch.dtype:
    """What to add up many numbers in."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no fp64


# ---------------------------------------------------------------- where a run stands


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


# ---------------------------------------------------------------- the loop


def train(
    folder: RunFolder,
    recipe: PretrainRecipe,
    corpus: Corpus,
    model: Transformer,
    ranks: Ranks,
    *,
    with_loss: nn.Module | None = None,
    bf16: bool,
) -> dict[str, float]:
    """Train ``model`` in place to the end, going on from the latest checkpoint if there is one.

    ``with_loss`` is the model over several ranks. Returns the figures of the end. Errors: Stopped
    after SIGINT, SIGTERM or SIGUSR1 to any rank, with a checkpoint written; UserError when too many
    steps in a row are no good, or a checkpoint cannot be written.
    """
    device = ranks.device
    if device.type == "cpu":
        keep_freed_memory()
    learner = model if with_loss is None else with_loss
    optimizer = build_optimizer(model, recipe.optim, bf16=bf16)
    guard = StepGuard(device, recipe.optim.skip_spike_sigma)
    keeper = Keeper(folder, recipe, model, optimizer, guard, ranks)
    at = keeper.resume()
    metrics = MetricsLog(folder, at.step, recipe.log)
    total_steps = num_steps(recipe, len(corpus.train))
    row_loss = torch.tensor(at.row_loss, dtype=widest(device), device=device)
    shown: dict[str, float] = {}

    questions = load_requests(
        recipe.eval_requests, load_tokenizer(corpus.tokenizer), recipe.max_eval_requests
    )

    def evaluate() -> None:
        row, row_of_parts = evaluation(learner, model, recipe, corpus, questions, ranks, bf16=bf16)
        if not row and not row_of_parts:
            return
        metrics.write(
            at.step,
            epoch=epoch_at(recipe, corpus, at.step),
            tokens=at.tokens,
            **row,
            **row_of_parts,
        )
        shown.update(row)
        progress.update(at.step, **shown)

    with (
        metrics,
        stop_signals() as stop,
        watched(recipe.parallel.hang_seconds, f"pretrain {folder.path.name}") as ranks.watch,
        Progress(folder, "pretrain", total_steps, at.step) as progress,
    ):
        if at.step == 0:
            evaluate()
        while at.step < total_steps:
            started = time.perf_counter()
            ranks.at(at.step)
            learning_rate = learning_rate_at(at.step, total_steps, recipe.optim)
            set_learning_rate(optimizer, learning_rate)
            batches = batches_of_step(recipe, corpus, at.step, ranks)
            ranks.at(at.step, waits=True)
            agreed = agree(batches, stop, keeper, ranks)
            if agreed.has_failed:
                keeper.finish(has_failed=True)
            at.left_out += recipe.sizes.at(at.step) - agreed.num_sequences
            num_tokens = agreed.num_tokens
            length = recipe.warmup.length_at(at.step, recipe.max_length)
            batches = [batch.cut(length) for batch in batches]
            step_loss = add_gradients(
                learner,
                batches,
                z_loss=recipe.z_loss,
                bf16=bf16,
                num_tokens=num_tokens,
                ranks=ranks,
            )
            step_loss = ranks.total(step_loss)
            grad_norm = clip_gradients(model.parameters(), recipe.optim.max_grad_norm_at(at.step))
            guard.watch(optimizer, step_loss / max(1, num_tokens), grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            at.step += 1
            at.tokens += num_tokens
            at.row_tokens += num_tokens
            row_loss += step_loss

            signal_number = agreed.signal_number if ranks.num_ranks > 1 else stop.signal_number
            is_last = at.step == total_steps
            is_row = is_last or at.step % recipe.log.logging_steps == 0
            is_evaluated = is_last or (recipe.eval_steps and at.step % recipe.eval_steps == 0)
            is_saved = signal_number or at.step % recipe.checkpoints.save_steps == 0
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
                    **_device_figures(model, ranks, shown["tokens_per_second"], length, bf16=bf16),
                )
                row_loss.zero_()
                at.row_tokens, at.row_seconds = 0, 0.0
            progress.update(at.step, **shown)
            if is_evaluated:
                evaluate()
            if is_saved and not is_last:  # after the rows: those of a checkpoint's step are kept
                at.row_loss = float(row_loss)
                keeper.save(at)
                metrics.note_saved()
                if signal_number:
                    keeper.finish()
                    raise Stopped(signal_number, f" after step {at.step}, which is saved")
        keeper.finish()
    return {
        **shown,
        "tokens": at.tokens,
        "train_seconds": round(at.seconds, 3),
        "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
        "skipped_steps": guard.num_skipped,
        "sequences_left_out": at.left_out,
    }


def batches_of_step(recipe: PretrainRecipe, corpus: Corpus, step: int, ranks: Ranks) -> list[Batch]:
    """This rank's micro-batches of step 0, 1, …"""
    return micro_batches(
        corpus.train,
        recipe.places(step),
        micro_batch_size=recipe.per_device_train_batch_size,
        seed=recipe.run.seed,
        mask=recipe.mask_documents,
        max_ngram_repeats=recipe.max_ngram_repeats,
        rank=ranks.data_rank,
        num_ranks=ranks.num_data,
    )


class Agreed(NamedTuple):
    """What all ranks know of a step before they make it."""

    num_tokens: int  # asked for, counted once
    num_sequences: int
    signal_number: int  # some rank was asked to stop; 0: none
    has_failed: bool  # some rank could not write its part of a checkpoint


def agree(batches: Sequence[Batch], stop: StopFlag, keeper: Keeper, ranks: Ranks) -> Agreed:
    """Tell the other ranks of this step, and learn of theirs."""
    counts = ranks.reads_first  # of ranks that read the same sequences, one
    rows = ranks.gathered(
        [
            counts * sum(batch.num_labels for batch in batches),
            counts * sum(len(batch.ids_BT) for batch in batches),
            stop.signal_number,
            keeper.has_failed,
        ]
    )
    num_tokens, num_sequences = rows[:, :2].sum(0).tolist()
    signal_number, has_failed = rows[:, 2:].amax(0).tolist()
    return Agreed(int(num_tokens), int(num_sequences), int(signal_number), bool(has_failed))


def add_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    z_loss: float,
    bf16: bool,
    num_tokens: int | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Add one step's gradients; returns the cross-entropy summed over its tokens, on the device.

    The sum is divided once, by the tokens of all micro-batches (and ranks: then ``num_tokens``), so
    that how they are cut changes nothing but rounding.
    """
    device = next(model.parameters()).device
    if num_tokens is None:
        num_tokens = sum(batch.num_labels for batch in batches)
    # What averages gradients over ranks has to give their sum.
    scale = (1 if ranks is None else ranks.num_weights_ranks) / max(1, num_tokens)
    step_loss = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        with meet_at(model, is_last=number == len(batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, cross_entropy = summed_loss(model, batch.to(device), z_loss=z_loss)
            (loss * scale).backward()
        step_loss += cross_entropy
    return step_loss


def _device_figures(
    model: Transformer, ranks: Ranks, tokens_per_second: float, length: int, *, bf16: bool
) -> dict[str, float]:
    """``mfu`` where the device's peak is known, and ``peak_memory_bytes`` of the fullest GPU."""
    figures: dict[str, float] = {}
    if ranks.device.type == "cuda":
        most = ranks.gathered([torch.cuda.max_memory_allocated(ranks.device)]).max()
        figures["peak_memory_bytes"] = float(most)
    peak = peak_flops(ranks.device, bf16=bf16)
    if peak is not None:
        flops = tokens_per_second * flops_per_token(model.config, length)
        figures["mfu"] = flops / (peak * ranks.num_ranks)
    return figures
