"""Reward modelling: pairs teach a model to give the better answer the higher number.

pairs -> ids of both answers -> optimizer steps -> one number at each answer's last token -> the
Bradley-Terry loss between the two -> a sequence-classification folder with one label.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    atomic_folder,
    move_into,
    resolve_model,
)
from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch
from olmo_base.run.metrics import LogConfig
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import CheckpointConfig
from open_instruct.adapters import (
    HEAD,
    AdapterConfig,
    add_adapter,
    add_token_rows,
    is_adapted,
    is_reward_adapter,
    keep_gradients,
    merged,
    open_adapter,
    quantisation,
    save_adapter,
)
from open_instruct.batches import Batch, Examples
from open_instruct.causal_lm import (
    ModelConfig,
    check_lengths,
    load_config,
    new_folder,
    whole_model_folder,
)
from open_instruct.compute import refuse_uncompilable
from open_instruct.encode import (
    ChatEncoder,
    add_new_tokens,
    load_chat_encoder,
    load_chat_tokenizer,
)
from open_instruct.examples import DataConfig, Source
from open_instruct.logprobs import Wrapped, padding_mask
from open_instruct.loop import HeldOut, SummedLoss, TrainConfig
from open_instruct.losses import bradley_terry_loss, centering_loss
from open_instruct.memory import REWARDS
from open_instruct.publish import HubConfig
from open_instruct.sample_log import SampleLogConfig
from open_instruct.tokenised import DataReport, tokenised_pairs
from open_instruct.tuning import (
    about_adapter,
    input_files,
    load_for_plan,
    note_liger_kernels,
    open_run,
    plan_figures,
    plan_from_afar,
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    chat_template: str | None = None  # null: the template that the model carries
    data: DataConfig
    center_rewards_coefficient: float | None = setting(
        None, above=0, help="keep rewards around 0 (arXiv:2312.09244)"
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: RewardOptim = field(default_factory=RewardOptim)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    shown: SampleLogConfig = field(default_factory=SampleLogConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        if self.train.batching == "packed":
            raise RecipeError(
                "batching", "packed, but a reward model's rows are grouped by length. Remove it."
            )
        if self.shown.num_eval_samples:
            raise RecipeError(
                "num_eval_samples",
                f"{self.shown.num_eval_samples}, but a reward model writes nothing. Remove it.",
            )


# ---------------------------------------------------------------- data and loss


def pair_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: RewardRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> tuple[Examples, Tensor]:
    """The tokenised pairs, chosen first, and their margins (P,). Errors: UserError if none."""
    encoded = tokenised_pairs(sources, encoder, recipe, counts, report, with_margin=True)
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

    way = REWARDS

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
        model: Any = self.model
        whole = model.get_base_model() if is_adapted(model) else model
        body = whole.base_model
        hidden = body(
            input_ids=batch.ids_RT,
            attention_mask=padding_mask(batch) if needs_mask else None,
            use_cache=False,
        ).last_hidden_state
        rows_R = torch.arange(len(batch.ids_RT), device=hidden.device)
        last_RD = hidden[rows_R, batch.lengths_R - 1]
        rewards_R: Tensor = whole.score(last_RD).float().mean(1)  # of one: FSDP2 warns of a view
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


class LoadedReward(NamedTuple):
    """A reward model that is to be trained or asked."""

    model: Any  # of transformers, or of peft
    stored_dtype: torch.dtype  # the precision its files are in
    has_new_head: bool


def load_reward_model(
    config: ModelConfig,
    encoder: ChatEncoder,
    seed: int,
    adapter: AdapterConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> LoadedReward:
    """The model in float32 with one scalar head.

    The head is new, drawn by ``seed``, unless the folder is a reward model already, whole or an
    adapter. With ``use_peft`` an adapter and the head are trained. Only a quantised base goes to
    ``device`` at once, and computes in ``compute_dtype``. Errors: UserError for an adapter that is
    no reward model's, an incomplete folder, or a tokenizer whose padding ends turns.
    """
    adapter = adapter or AdapterConfig()
    given = resolve_model(config.model_name_or_path)
    folder = whole_model_folder(config.model_name_or_path)
    if folder != given and (adapter.use_peft or not is_reward_adapter(given)):
        raise UserError(
            f"{given} is an adapter, and a reward model is trained on a whole model. Merge it "
            f"first: open-instruct merge {given} OUT."
        )
    pad_id = encoder.tokenizer.pad_token_id
    if pad_id is None or pad_id in encoder.end_of_turn_ids:
        raise UserError(
            f"The tokenizer of {given} has no padding token, or one that ends turns too. Whoever "
            "opens a reward model finds the last token by the padding behind it: give the "
            "tokenizer a pad_token of its own."
        )
    stored_dtype = getattr(load_config(config), "dtype", None) or torch.float32
    bits = quantisation(adapter, compute_dtype, skipped=[HEAD])
    model, has_new_head = _load_classifier(
        folder,
        config,
        seed,
        {} if bits is None else {"quantization_config": bits, "device_map": {"": device}},
    )
    model.config.get_text_config().pad_token_id = pad_id
    if folder != given:
        model = merged(open_adapter(model, given, is_trainable=False))
        has_new_head = False
    new_ids = add_new_tokens(load_chat_tokenizer(given), config.additional_special_tokens)
    if new_ids:
        add_token_rows(model, new_ids)
    if adapter.use_peft:
        name = config.model_name_or_path
        base = str(Path(name).resolve()) if Path(name).is_dir() else name
        model = add_adapter(model, adapter, base, seed, task="SEQ_CLS", new_ids=new_ids)
    return LoadedReward(model, stored_dtype, has_new_head)


def _load_classifier(
    folder: Path, config: ModelConfig, seed: int, placed: dict[str, Any]
) -> tuple[Any, bool]:
    """A sequence classifier with one label, and whether its head is new."""
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
                attn_implementation=config.layers_attention,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **placed,
            )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"The model in {folder} cannot score sequences: {first_line}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UserError(f"{type(model).__name__} has no head of the name score to be trained.")
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(f"{HEAD}."))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, the first being "
            f"{missing[0]}; they would start random. Give a complete model folder."
        )
    keep_gradients(model)
    return model, f"{HEAD}.weight" in report["missing_keys"]


def save_reward_model(folder: Path, model: Any, encoder: ChatEncoder, dtype: torch.dtype) -> None:
    """Write weights, config, tokenizer and template into ``folder``; of an adapter its own files.

    Changes the model's precision.
    """
    if is_adapted(model):
        save_adapter(model, folder)
    else:
        model.to(dtype)
        model.config.use_cache = True
        model.save_pretrained(folder)
    encoder.tokenizer.chat_template = encoder.template
    encoder.tokenizer.save_pretrained(folder)


def merge_reward_adapter(adapter: str, out: str) -> Path:
    """Write the reward model that an adapter makes of its base into the new folder ``out``.

    Errors: UserError if ``out`` is not empty.
    """
    target = new_folder(out)
    encoder = load_chat_encoder(adapter)
    loaded = load_reward_model(ModelConfig(adapter), encoder, seed=0)
    with atomic_folder(target) as temporary:
        save_reward_model(temporary, loaded.model, encoder, loaded.stored_dtype)
    return target


# ---------------------------------------------------------------- plan and run


def plan(recipe: RewardRecipe, launch: Launch | None = None) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    figures = plan_from_afar(recipe, 2, way=REWARDS, launch=launch)
    if figures is not None:
        return figures
    (examples, _), counts = load_for_plan(recipe, pair_examples)
    terms = np.ones(len(examples))
    return plan_figures(recipe, examples, terms, counts, REWARDS, launch=launch)


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

    refuse_uncompilable(recipe.model, recipe.adapter, workers)
    loaded = load_reward_model(
        recipe.model,
        encoder,
        recipe.run.seed,
        recipe.adapter,
        device=workers.device,
        compute_dtype=torch.bfloat16 if workers.bf16 else torch.float32,
    )
    longest = int(examples.lengths_NW.max())
    check_lengths(longest, loaded.model.config, recipe.model.model_name_or_path)
    if is_adapted(loaded.model):
        folder.log(about_adapter(loaded.model))
    note_liger_kernels(loaded.model, recipe, workers, folder)
    if not recipe.adapter.is_quantised:  # such a model was loaded onto the device
        loaded.model.to(workers.device)
    tolerance = 1.0 if workers.bf16 or recipe.adapter.is_quantised else 1e-3
    rewards = RowRewards(loaded.model, workers.precision, tolerance)
    steps = steps_for(recipe, workers, examples, np.ones(len(examples)))
    folder.log(
        f"{len(examples):,} pairs, {examples.num_tokens:,} tokens; {steps.total:,} steps of "
        f"{steps.per_step} pairs; rewards from {rewards.way}"
    )

    def save() -> None:
        with atomic_folder(folder.path / "model.tmp") as temporary:
            save_reward_model(temporary, loaded.model, encoder, loaded.stored_dtype)
        move_into(folder.path / "model.tmp", folder.path)
        (folder.path / "model.tmp").rmdir()

    train_and_finish(
        recipe,
        workers,
        folder,
        rewards,
        save,
        steps,
        reward_loss(margins_P.to(workers.device), recipe.center_rewards_coefficient),
        held_out,
        uses=opened.uses,
    )
    return folder
