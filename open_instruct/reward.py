"""Reward modelling: pairs teach a model to give the better answer the higher number.

pairs -> ids of both answers -> optimizer steps -> one number at each answer's last token -> the
Bradley-Terry loss between the two -> a sequence-classification folder with one label.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    adapter_base,
    atomic_folder,
    move_into,
    resolve_model,
)
from olmo_base.run.errors import UserError
from olmo_base.run.metrics import LogConfig
from olmo_base.run.recipe import setting
from olmo_base.run.resume import CheckpointConfig
from open_instruct.batches import Batch, Examples
from open_instruct.causal_lm import ModelConfig, check_lengths, load_config
from open_instruct.encode import ChatEncoder, encode_pairs
from open_instruct.examples import DataConfig, Source, SourceUse, read_pairs
from open_instruct.logprobs import Wrapped, padding_mask
from open_instruct.loop import HeldOut, SummedLoss, TrainConfig
from open_instruct.losses import bradley_terry_loss, centering_loss
from open_instruct.tuning import (
    input_files,
    load_for_plan,
    open_run,
    plan_figures,
    steps_for,
    train_and_finish,
)

__all__ = ["RewardRecipe", "input_files", "plan", "run"]

# R rows, D hidden width; P pairs of a set, B of a micro-batch, 2 = (chosen, rejected)


@dataclass(frozen=True)
class RewardOptim(OptimConfig):
    """A reward model wants smaller steps than fine-tuning (Tülu 3, arXiv:2411.15124)."""

    learning_rate: float = setting(3e-6, above=0)


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """The keys of ``stage: reward``. Rows may carry a ``margin``: by how much, at least."""

    stage: Literal["reward"] = "reward"
    model: ModelConfig
    chat_template: str | None = None  # null: the template that the model carries
    data: DataConfig
    center_rewards_coefficient: float | None = setting(
        None, above=0, help="keep rewards around 0 (arXiv:2312.09244)"
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: RewardOptim = field(default_factory=RewardOptim)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig


# ---------------------------------------------------------------- data and loss


def pair_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: RewardRecipe,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> tuple[Examples, Tensor]:
    """The tokenised pairs, chosen first, and their margins (P,). Errors: UserError if none."""
    pairs = read_pairs(
        sources,
        seed=recipe.run.seed,
        on_bad_row=recipe.data.on_bad_row,
        counts=counts,
        uses=uses,
        with_margin=True,
    )
    encoded = encode_pairs(pairs, encoder, recipe.data, counts)
    if not encoded:
        raise UserError(
            f"No pair is left of {', '.join(source.path for source in sources)}; "
            f"dropped: {dict(counts.dropped)}."
        )
    examples = Examples([(pair.chosen, pair.rejected) for pair in encoded])
    return examples, torch.tensor([pair.margin for pair in encoded])


def reward_loss(margins_P: Tensor, center_rewards_coefficient: float | None) -> SummedLoss:
    """The loop's summed loss, for the pairs that these margins are of."""

    def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        rewards_B2 = model(batch)[: batch.num_sequences].view(-1, 2)
        loss = bradley_terry_loss(rewards_B2, margins_P[batch.examples])
        if center_rewards_coefficient is not None:
            loss = loss + center_rewards_coefficient * centering_loss(rewards_B2)
        rewards_B2 = rewards_B2.detach()
        gap_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        return {
            "loss": loss,
            "accuracy": (gap_B > 0).sum() + 0.5 * (gap_B == 0).sum(),
            "reward_margin": gap_B.sum(),
            "reward_chosen": rewards_B2[:, 0].sum(),
            "reward_rejected": rewards_B2[:, 1].sum(),
        }

    return summed_loss


# ---------------------------------------------------------------- the model


class RowRewards(Wrapped):
    """A sequence classifier whose forward pass is micro-batch -> one number a row.

    The number at the row's last token, found by its length: transformers looks for the last token
    that is no padding. Checked against transformers on rows without padding.
    """

    way = "the last token"

    def __init__(
        self,
        model: nn.Module,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        tolerance: float = 1e-3,
    ) -> None:
        """Errors: UserError if a row's number depends on the rows beside it."""
        super().__init__()
        self.model = model
        self._precision = precision
        self._needs_mask = self._find_mask(tolerance)

    def forward(self, batch: Batch) -> Tensor:
        """(R,) float32; padding rows of an empty batch have a number too."""
        with self._precision():
            return self._rewards(batch, self._needs_mask)

    def _rewards(self, batch: Batch, needs_mask: bool) -> Tensor:
        body: Any = self.model.base_model
        hidden = body(
            input_ids=batch.ids_RT,
            attention_mask=padding_mask(batch) if needs_mask else None,
            use_cache=False,
        ).last_hidden_state
        rows_R = torch.arange(len(batch.ids_RT), device=hidden.device)
        last_RD = hidden[rows_R, batch.lengths_R - 1]
        score: Any = self.model.score
        rewards_R: Tensor = score(last_RD)[:, 0].float()
        return rewards_R

    @torch.no_grad()
    def _find_mask(self, tolerance: float) -> bool:
        model: Any = self.model
        device = next(model.parameters()).device
        config = model.config.get_text_config()
        ids_T = (torch.arange(9, device=device) * 7919 + 3) % config.vocab_size
        ids_T = torch.where(ids_T == config.pad_token_id, (ids_T + 1) % config.vocab_size, ids_T)
        probe = Batch(
            ids_RT=torch.stack([ids_T, ids_T.flip(0)]),
            lengths_R=torch.tensor([9, 5], device=device),
            label_positions_L=torch.zeros(0, dtype=torch.int64, device=device),
            label_ids_L=torch.zeros(0, dtype=torch.int64, device=device),
            label_sequences_L=torch.zeros(0, dtype=torch.int64, device=device),
            examples=torch.tensor([0, 1], device=device),
            num_sequences=2,
        )
        was_training = model.training
        model.eval()
        try:
            with self._precision():
                rows = [ids_T, ids_T.flip(0)[:5]]
                alone = [model(input_ids=row[None], use_cache=False).logits[0, 0] for row in rows]
                expected_R = torch.stack(alone).float()
                for needs_mask in (False, True):
                    found_R = self._rewards(probe, needs_mask)
                    if torch.allclose(found_R, expected_R, rtol=0, atol=tolerance):
                        return needs_mask
        finally:
            model.train(was_training)
        raise UserError(
            f"{type(model).__name__} gives other rewards for a row beside a longer one than for "
            "the row alone, with and without an attention mask, so it cannot be trained in batches."
        )


def load_reward_model(
    config: ModelConfig, encoder: ChatEncoder, seed: int
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in float32 with one scalar head, and the precision its files are in.

    The head is new, drawn by ``seed``, unless the folder is a reward model already. Errors:
    UserError for an adapter, an incomplete folder, or a tokenizer whose padding ends turns.
    """
    folder = resolve_model(config.model_name_or_path)
    if adapter_base(folder) is not None:
        raise UserError(
            f"{folder} is an adapter, and a reward model is trained on a whole model. Merge it "
            f"first: open-instruct merge {folder} OUT."
        )
    pad_id = encoder.tokenizer.pad_token_id
    if pad_id is None or pad_id in encoder.end_of_turn_ids:
        raise UserError(
            f"The tokenizer of {folder} has no padding token, or one that ends turns too. Whoever "
            "opens a reward model finds the last token by the padding behind it: give the "
            "tokenizer a pad_token of its own."
        )
    stored_dtype = getattr(load_config(config), "dtype", None) or torch.float32
    load: Any = AutoModelForSequenceClassification.from_pretrained
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of what is new or missing we speak ourselves
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, report = load(
                folder,
                num_labels=1,
                dtype=torch.float32,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"The model in {folder} cannot score sequences: {first_line}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{type(model).__name__} has no head of the name score to be trained.")
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("score."))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, the first being "
            f"{missing[0]}; they would start random. Give a complete model folder."
        )
    model.config.get_text_config().pad_token_id = pad_id
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, stored_dtype


def save_reward_model(
    folder: RunFolder, model: PreTrainedModel, encoder: ChatEncoder, dtype: torch.dtype
) -> None:
    """Write weights, config, tokenizer and template into the run's folder."""
    with atomic_folder(folder.path / "model.tmp") as temporary:
        model.to(dtype)  # type: ignore[arg-type]
        model.config.use_cache = True
        model.save_pretrained(temporary)
        encoder.tokenizer.chat_template = encoder.template
        encoder.tokenizer.save_pretrained(temporary)
    move_into(folder.path / "model.tmp", folder.path)
    (folder.path / "model.tmp").rmdir()


# ---------------------------------------------------------------- plan and run


def plan(recipe: RewardRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    (examples, _), counts = load_for_plan(recipe, pair_examples)
    return plan_figures(recipe, examples, np.ones(len(examples)), counts)


def run(recipe: RewardRecipe) -> RunFolder:
    """Train and write the model folder; goes on where an earlier run of it was stopped.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    opened = open_run(recipe, pair_examples)
    if isinstance(opened, RunFolder):
        return opened
    workers, folder, encoder = opened.workers, opened.folder, opened.encoder
    examples, margins_P = opened.train
    held_out = None
    if opened.held_out is not None:
        pairs, held_out_margins_P = opened.held_out
        loss = reward_loss(held_out_margins_P.to(workers.device), None)
        held_out = HeldOut(pairs, len(pairs), loss)

    model, stored_dtype = load_reward_model(recipe.model, encoder, recipe.run.seed)
    longest = int(examples.lengths_NW.max())
    check_lengths(longest, model.config, recipe.model.model_name_or_path)
    model.to(workers.device)  # type: ignore[arg-type]
    rewards = RowRewards(model, workers.precision, 1.0 if workers.bf16 else 1e-3)
    steps = steps_for(recipe, workers, examples, np.ones(len(examples)))
    folder.log(
        f"{len(examples):,} pairs, {examples.num_tokens:,} tokens; {steps.total:,} steps of "
        f"{steps.per_step} pairs; rewards from {rewards.way}"
    )
    train_and_finish(
        recipe,
        workers,
        folder,
        rewards,
        lambda: save_reward_model(folder, model, encoder, stored_dtype),
        steps,
        reward_loss(margins_P.to(workers.device), recipe.center_rewards_coefficient),
        held_out,
    )
    return folder
