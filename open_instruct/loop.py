"""The one post-training loop. Accelerate lives here and nowhere else.

A stage gives the loop a model that turns micro-batches into label log-probabilities, its steps
(``batches.py``), and a function that sums its loss over a micro-batch. The loop divides that sum
once, by everything counted over the step's micro-batches and ranks: how a step is cut changes
nothing but rounding. Between two log steps nothing waits for the device.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from olmo_base.divided import copy_part
from olmo_base.model.context import SplitContext
from olmo_base.model.varlen import rows_kernel
from olmo_base.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from olmo_base.run.artefact import RunFolder, atomic_folder
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.heap import keep_freed_memory
from olmo_base.run.launch import Launch, stop_signals
from olmo_base.run.metrics import LogConfig, MetricsLog, Progress
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import CheckpointConfig, latest_checkpoint, save_checkpoint
from open_instruct.batches import (
    MICRO_BATCH_COST,
    Batch,
    Examples,
    Steps,
    evaluation_batches,
)
from open_instruct.logprobs import LabelLogprobs, Wrapped
from open_instruct.sample_log import SampleLog
from open_instruct.sharding import (
    gathered,
    gathered_state,
    make_whole,
    part_held,
    refuse_other_settings,
    release,
    restore_state,
    shard,
)
from open_instruct.zero import ZeroEngine, refuse_other_zero

# (model, micro-batch) -> sums over its terms: "loss", which is minimised, and any others to show.
SummedLoss = Callable[[nn.Module, Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class MeasuredLoss:
    """A loss that needs a mean over the whole step before its first gradient (KTO's z_0).

    ``measure`` sums something over a micro-batch of ``examples``, which has one example for each of
    the stage's, by the same number. ``given`` is the loss once the mean is known.
    """

    examples: Examples
    measure: Callable[[nn.Module, Batch], Tensor]
    given: Callable[[Tensor], SummedLoss]


Loss = SummedLoss | MeasuredLoss


Batching = Literal["auto", "packed", "grouped"]


@dataclass(frozen=True)
class TrainConfig:
    """How examples become optimizer steps.

    One step sees ``global_batch_size`` examples, or batch size x accumulation x ranks.
    """

    per_device_train_batch_size: int = setting(8, low=1)
    gradient_accumulation_steps: int = setting(1, low=1)
    global_batch_size: int = setting(
        0, low=0, help="examples of a step, all ranks together; 0: what each has, times the ranks"
    )
    num_train_epochs: float = setting(1.0, above=0)
    max_steps: int = setting(-1, low=-1, help="above 0: instead of num_train_epochs")
    per_device_eval_batch_size: int = setting(32, low=1, changes_result=False)
    eval_steps: int = setting(
        0, low=0, changes_result=False, help="0: held-out examples at the start and the end only"
    )
    context_parallel: int = setting(
        1, low=1, changes_result=False, help="processes that share a dialogue, each a part of it"
    )
    bf16: bool | Literal["auto"] = setting("auto", help="auto: on GPUs that compute in it")
    batching: Batching = setting(
        "auto",
        help="packed: rows end to end without padding; grouped: rows of similar length, padded; "
        "auto: packed where the model can",
    )
    early_stopping_patience: int | None = setting(
        None, low=1, help="evaluations without a lower held-out loss after which training ends"
    )
    early_stopping_threshold: float = setting(
        0.0, low=0, help="by how much the loss must be lower to count"
    )
    load_best_model_at_end: bool = setting(
        False, help="the weights of the lowest held-out loss are the result, not the last"
    )

    def __post_init__(self) -> None:
        if self.global_batch_size and self.gradient_accumulation_steps > 1:
            raise RecipeError(
                "gradient_accumulation_steps",
                f"{self.gradient_accumulation_steps}, but it follows from global_batch_size "
                f"{self.global_batch_size}; keep one of them.",
            )
        if self.looks_for_best and not self.eval_steps:
            key = "load_best_model_at_end"
            raise RecipeError(
                key if self.load_best_model_at_end else "early_stopping_patience",
                "needs the held-out loss while training goes on. Set eval_steps.",
            )
        if self.early_stopping_threshold and not self.looks_for_best:
            raise RecipeError(
                "early_stopping_threshold",
                f"{self.early_stopping_threshold}, but nothing looks for the lowest loss. Set "
                "early_stopping_patience or load_best_model_at_end, or remove it.",
            )

    def examples_per_step(self, num_ranks: int) -> int:
        """How many all ranks that read different examples take together."""
        per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.global_batch_size or per_rank * num_ranks

    @property
    def looks_for_best(self) -> bool:
        """Whether the held-out loss decides the result."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None


NEVER = 2.0**40  # a cost that no saved padding makes good

# ---------------------------------------------------------------- the processes of a run

TRAINED_WITH = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def asked_sharding() -> FullyShardedDataParallelPlugin | None:
    """How ``accelerate launch`` was told to divide weights by FSDP2; None if it was not.

    Errors: UserError for settings that would not be followed.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    refuse_other_settings(plugin)
    return plugin


def asks_for_zero() -> bool:
    """Whether ``accelerate launch`` was told to divide weights by DeepSpeed's ZeRO-3.

    Errors: UserError for settings that would not be followed, or if DeepSpeed is missing.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return False
    refuse_other_zero(DeepSpeedPlugin())
    return True


class Workers:
    """This process among the others of the run: one alone, or one per rank under accelerate."""

    def __init__(self, bf16: bool | Literal["auto"] = "auto", *, context_parallel: int = 1) -> None:
        """Errors: UserError for a kind of parallelism that this loop does not train with."""
        self._uses_zero = asks_for_zero()
        self._zero: ZeroEngine | None = None
        self._sharding = asked_sharding()
        # Precision is ours to choose (below), whatever `accelerate config` says.
        self._accelerator = Accelerator(mixed_precision="no", fsdp_plugin=self._sharding)
        kind = self._accelerator.distributed_type
        if kind not in TRAINED_WITH:
            raise UserError(
                f"accelerate was configured for {kind.value}, and this loop trains with plain data "
                "parallelism, FSDP2 or ZeRO-3. Launch it with a file of recipes/accelerate, or "
                "torchrun."
            )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.num_ranks: int = self._accelerator.num_processes
        is_fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16: bool = is_fast if bf16 == "auto" else bf16
        if self.num_ranks % context_parallel:
            raise UserError(
                f"context_parallel {context_parallel} does not divide the {self.num_ranks} "
                f"process(es) of this run. Start a multiple of {context_parallel}, as with "
                f"accelerate launch --num_processes {context_parallel}."
            )
        # Those that read different dialogues, and which of them this one is.
        self.num_data: int = self.num_ranks // context_parallel
        self.data_rank: int = self.rank // context_parallel
        self.context: SplitContext | None = None
        if context_parallel > 1:
            shape = (self.num_data, context_parallel)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "context"))
            self.context = SplitContext(mesh.get_group("context"))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank goes through the block before the others enter it."""
        with self._accelerator.main_process_first():
            yield

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The context that a forward pass computes in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def place(
        self,
        model: PreTrainedModel,
        batching: Batching = "auto",
        longest: int | None = None,
        attention: str = "auto",
    ) -> LabelLogprobs:
        """The model on this rank's device, computing label log-probabilities.

        ``longest`` is the longest row that it will read; a model with windows packs if it knows.
        ``attention`` is the recipe's ``attn_implementation``. Errors: UserError if it is no causal
        language model, or cannot do what ``batching`` or ``attention`` says.
        """
        kernel = rows_kernel(attention, self.device, bf16=self.bf16)
        is_quantised = getattr(model, "is_quantized", False)
        if not is_quantised:  # such a model was loaded onto the device
            model.to(self.device)  # type: ignore[arg-type]
        # nats, where logits spread over 20
        tolerance = 1.0 if self.bf16 or is_quantised else 1e-3
        must_pad = self.context is not None or self.divides_by_zero
        placed = LabelLogprobs(
            model,
            self.precision,
            tolerance,
            packs=batching != "grouped" and not must_pad,
            longest=longest,
            # DeepSpeed gathers the weights of modules that are called, each with its own.
            is_native=not self.divides_by_zero,
            kernel=kernel,
        )
        if placed.wrong_kernel is not None and attention != "auto":
            raise UserError(
                f"attn_implementation: {attention}, but over rows end to end it does not compute "
                f"what {type(model).__name__} does. Set attn_implementation: auto, or batching: "
                "grouped."
            )
        if must_pad:
            placed.why_padded = "ZeRO-3" if self.divides_by_zero else "context_parallel"
        if batching == "packed" and not placed.packs:
            raise UserError(
                f"batching: packed, but {type(model).__name__} must pad: {placed.why_padded}. "
                "Set batching: auto, which groups rows by length where it must."
            )
        if self.context is not None:
            placed.share_rows(self.context)
        return placed

    @property
    def divides(self) -> bool:
        """Whether weights are divided over ranks (FSDP2, ZeRO-3), and not copied to each."""
        return (self._sharding is not None or self._uses_zero) and self.num_ranks > 1

    @property
    def launch(self) -> Launch:
        """How many processes there are, and how they share weights."""
        return Launch(
            self.num_ranks,
            device="cuda" if self.device.type == "cuda" else "cpu",
            divides=self.divides,
            releases=self._sharding is None or bool(self._sharding.reshard_after_forward),
        )

    @property
    def kind(self) -> str:
        """How weights are divided."""
        return "ZeRO-3" if self._uses_zero else "FSDP2"

    @property
    def divides_by_zero(self) -> bool:
        """Whether by DeepSpeed, which knows no layers but those that transformers calls."""
        return self._uses_zero and self.divides

    def share(self, model: Wrapped, optim: OptimConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The same model, its gradients averaged over the ranks, and what steps it.

        With FSDP2 and ZeRO-3 divided in place. accelerate's own FSDP2 runs on GPUs alone and knows
        no layer but transformers'.
        """
        if self.divides_by_zero:
            self._zero = ZeroEngine(model, optim, self.num_ranks)
            return self._zero.engine, self._zero.optimizer
        shared: nn.Module = model
        if self._sharding is not None and self.divides:
            releases = bool(self._sharding.reshard_after_forward)
            shard(model, self.device, self.num_ranks, releases=releases)
        elif not self._uses_zero and self._sharding is None:
            shared = self._accelerator.prepare_model(model)
        return shared, build_optimizer(model.model, optim)

    def meeting(self, model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Ranks exchange gradients in the last micro-batch of a step, and not before.

        With FSDP2 and ZeRO-3 in each: gradients that are not exchanged yet would be kept whole.
        """
        if self._zero is not None:
            self._zero.meet(is_last=is_last)
            return contextlib.nullcontext()
        if is_last or self._sharding is not None:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(model)

    def unite(self, model: Wrapped) -> None:
        """After the last step: the model whole on the first rank, to be written. All must ask."""
        make_whole(model, keeps=self.rank == 0)

    def backward(self, loss: Tensor) -> None:
        """Add to the step's gradients."""
        if self._zero is not None:
            self._zero.backward(loss)
        else:
            loss.backward()

    def step(
        self, model: Wrapped, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> Tensor:
        """Clip the gradients, step and forget them; their norm before clipping."""
        if self._zero is not None:
            return self._zero.step()
        norm = clip_gradients(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """``optimizer.state_dict()`` of one process, on the first rank. All must ask."""
        if self._zero is not None:
            return self._zero.state(keeps=self.rank == 0)
        return gathered_state(optimizer, keeps=self.rank == 0)

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put the state of one process into an optimizer, each rank taking its parts."""
        if self._zero is not None:
            self._zero.restore(state)
        else:
            restore_state(optimizer, state)

    def put(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Put a whole weight into ``parameter``, or this rank's part of it."""
        if self._zero is not None:
            self._zero.put(parameter, whole)
        else:
            copy_part(parameter, whole)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank."""
        if self.num_ranks == 1:
            return values
        summed: Tensor = self._accelerator.reduce(values, "sum")
        return summed

    def any_rank(self, is_true: bool) -> bool:
        """Whether it is true on any rank. All ranks must ask at the same point."""
        if self.num_ranks == 1:
            return is_true
        flag = torch.tensor(float(is_true), device=self.device)
        return bool(self.sum_over_ranks(flag) > 0)

    def wait(self) -> None:
        """Until every rank is here."""
        self._accelerator.wait_for_everyone()

    def cost_of_cut(self, *, packs: bool) -> float:
        """What one more micro-batch costs on this device, in padded positions.

        A model that ``packs`` has none to save.
        """
        if packs:
            return NEVER
        return MICRO_BATCH_COST["cpu" if self.device.type == "cpu" else "cuda"]


def steps_of(
    examples: Examples,
    terms_per_example: np.ndarray,
    config: TrainConfig,
    *,
    seed: int,
    num_ranks: int = 1,
    cost_of_cut: float = MICRO_BATCH_COST["cpu"],
    pad_id: int = 0,
) -> Steps:
    """The optimizer steps that a recipe asks for."""
    return Steps(
        examples,
        terms_per_example=terms_per_example,
        examples_per_step=config.examples_per_step(num_ranks),
        max_micro_batch=config.per_device_train_batch_size,
        num_ranks=num_ranks,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=seed,
        cost_of_cut=cost_of_cut,
        pad_id=pad_id,
    )


# ---------------------------------------------------------------- sums over many micro-batches


class Totals:
    """Sums that grow on the device; reading them is what waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_terms = 0

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's sums."""
        for name, value in sums.items():
            value = value.detach() if value.device.type == "mps" else value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over_ranks(self, workers: Workers) -> dict[str, float]:
        """The sums over all ranks, as numbers."""
        names = sorted(self.sums)
        if not names:
            return {}
        stacked = workers.sum_over_ranks(torch.stack([self.sums[name] for name in names]))
        return dict(zip(names, stacked.tolist(), strict=True))


@dataclass(frozen=True)
class HeldOut:
    """Examples that are only ever evaluated on."""

    examples: Examples
    num_terms: int
    loss: Loss


@torch.no_grad()
def settle(
    loss: Loss, model: nn.Module, batches: Sequence[Batch], num_terms: int, workers: Workers
) -> SummedLoss:
    """The loss with its mean measured over ``batches`` and over those of all other ranks.

    Measured without dropout, so that it does not depend on how a step is cut.
    """
    if not isinstance(loss, MeasuredLoss):
        return loss
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=workers.device)
    for batch in batches:
        measured = loss.examples.batch(batch.examples.tolist())
        total += loss.measure(model, measured.to(workers.device))
    model.train(was_training)
    return loss.given(workers.sum_over_ranks(total) / num_terms)


@torch.no_grad()
def evaluate(
    model: Wrapped, held_out: HeldOut, workers: Workers, batch_size: int
) -> dict[str, float]:
    """Every sum of the stage per term over the whole set, by the names ``eval_loss``, ..."""
    totals = Totals()
    was_training = model.training
    model.eval()
    batches = evaluation_batches(
        held_out.examples,
        max_examples=batch_size,
        num_ranks=workers.num_data,
        rank=workers.data_rank,
    )
    summed_loss = settle(held_out.loss, model, batches, held_out.num_terms, workers)
    for batch in batches:
        totals.add(summed_loss(model, batch.to(workers.device)))
    release(model)
    model.train(was_training)
    sums = totals.over_ranks(workers)
    return {f"eval_{name}": value / held_out.num_terms for name, value in sums.items()}


# ---------------------------------------------------------------- stopping and going on


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds beside weights and optimizer."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # of all ranks, without padding
    seconds: float = 0.0  # in steps, not in evaluations and checkpoints
    loss: float = math.nan  # as last read
    row_terms: int = 0  # since the last row of metrics.jsonl, as the next two
    row_tokens: int = 0
    row_seconds: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)  # the latest
    eval_steps: int = 0  # of the recipe, where the held-out loss decides the result
    best_loss: float = math.inf  # of all evaluations so far
    best_step: int = 0
    best_evaluation: dict[str, float] = field(default_factory=dict)
    num_not_better: int = 0  # evaluations since then
    is_over: bool = False  # stopped early


def save(
    folder: RunFolder,
    workers: Workers,
    model: Wrapped,
    optimizer: torch.optim.Optimizer,
    at: Position,
    row_sums: dict[str, float],
    config: CheckpointConfig,
) -> None:
    """Write a checkpoint on the first rank; every rank goes on when it is complete.

    Of the weights only those that are trained: under an adapter the others stay as they came. Tied
    weights are one parameter and are kept once. Divided ones are gathered, so that a run may go on
    with other ranks. No random generator is kept: each step seeds its own.
    """
    weights = whole_weights(model, workers)
    moments = workers.whole_state(optimizer)
    if workers.rank == 0:
        state = {"position": asdict(at), "row_sums": row_sums, "optimizer": moments}
        save_checkpoint(folder, at.step, weights=weights, state=state, config=config)
    workers.wait()


def whole_weights(model: Wrapped, workers: Workers) -> dict[str, Tensor]:
    """Name -> weight, of those that the optimizer changes; on the first rank. All must ask."""
    return {
        name: gathered(parameter, keeps=workers.rank == 0)
        for name, parameter in trained_parameters(model).items()
    }


def trained_parameters(model: Wrapped) -> dict[str, nn.Parameter]:
    """Name -> parameter, or this rank's part of it, of those that the optimizer changes."""
    named = model.model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def resume(
    folder: RunFolder, workers: Workers, model: Wrapped, optimizer: torch.optim.Optimizer
) -> tuple[Position, Totals]:
    """Put weights and optimizer to where the latest checkpoint left them, and say where that is."""
    checkpoint = latest_checkpoint(folder)
    row = Totals()
    if checkpoint is None:
        return Position(), row
    weights, state = checkpoint.load()
    parameters = trained_parameters(model)
    assert weights.keys() == parameters.keys(), f"{checkpoint.path} is of another model"
    for name, parameter in parameters.items():
        workers.put(parameter, weights[name])
    workers.restore(optimizer, state["optimizer"])
    is_keeper = workers.rank == 0  # the sums were of all ranks, so one takes them over
    row.add(
        {
            name: torch.tensor(value * is_keeper, device=workers.device)
            for name, value in state["row_sums"].items()
        }
    )
    at = Position(**state["position"])
    folder.log(f"going on from {checkpoint.path}, after step {at.step}")
    return at, row


# ---------------------------------------------------------------- the lowest held-out loss

BEST = "best"  # beside the numbered checkpoints, and not counted among them


def note_evaluation(
    folder: RunFolder, workers: Workers, model: Wrapped, at: Position, config: TrainConfig
) -> None:
    """Keep the weights of the lowest held-out loss so far, and end where nothing gets better.

    Weights of a later step than ``at`` may lie there after a kill; the steps that led to them are
    done again and come to the same.
    """
    if not config.looks_for_best:
        return
    loss = at.evaluation["eval_loss"]
    if loss < at.best_loss - config.early_stopping_threshold:
        at.best_loss, at.best_step, at.num_not_better = loss, at.step, 0
        at.best_evaluation = dict(at.evaluation)
        if config.load_best_model_at_end:
            weights = whole_weights(model, workers).items()
            if workers.rank == 0:
                separate = {name: weight.detach().clone() for name, weight in weights}
                with atomic_folder(folder.checkpoints / BEST) as temporary:
                    save_file(separate, temporary / "model.safetensors", {"step": str(at.step)})
        workers.wait()
        return
    at.num_not_better += 1
    patience = config.early_stopping_patience
    if patience is not None and at.num_not_better >= patience:
        at.is_over = True
        folder.log(
            f"stopped after step {at.step}: the held-out loss was lowest after step "
            f"{at.best_step} ({at.best_loss:.4g}), {at.num_not_better} evaluations ago"
        )


def take_best(folder: RunFolder, workers: Workers, model: Wrapped, at: Position) -> None:
    """Put the weights of the lowest held-out loss back into the model."""
    with safe_open(folder.checkpoints / BEST / "model.safetensors", framework="pt") as file:
        kept_step = int((file.metadata() or {})["step"])
        assert kept_step == at.best_step, f"weights of step {kept_step}, not {at.best_step}"
        for name, parameter in trained_parameters(model).items():
            workers.put(parameter, file.get_tensor(name))
    at.evaluation = dict(at.best_evaluation)
    folder.log(f"the weights after step {at.best_step} are kept (eval_loss {at.best_loss:.4g})")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generator of dropout as a pure function of the three.

    A resumed run draws what the run that never stopped would have drawn, on every rank.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def refuse_nonsense(grad_norm: float, at: Position, folder: RunFolder) -> None:
    """Errors: UserError once loss or gradient is infinite or not a number."""
    if math.isfinite(at.loss) and math.isfinite(grad_norm):
        return
    what = f"The gradient is {grad_norm}" if math.isfinite(at.loss) else f"The loss is {at.loss}"
    raise UserError(
        f"{what} at step {at.step}, so the weights are of no more use. Lower learning_rate "
        f"(or max_grad_norm) and train into a new output_dir; {folder.path}/metrics.jsonl shows "
        "where it began to grow."
    )


def peak_memory(device: torch.device) -> dict[str, int]:
    """For the metrics of a GPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}


# ---------------------------------------------------------------- the loop


def add_gradients(
    workers: Workers,
    model: nn.Module,
    batches: Sequence[Batch],
    num_terms: int,
    summed_loss: SummedLoss,
    totals: Totals,
) -> None:
    """One step's gradients from this rank's micro-batches.

    ``num_terms`` is what was counted over the micro-batches of all ranks.
    """
    for number, batch in enumerate(batches, start=1):
        with workers.meeting(model, is_last=number == len(batches)):
            sums = summed_loss(model, batch.to(workers.device))
            # DDP, FSDP2 and ZeRO-3 average over ranks; the loss is a sum over them.
            workers.backward(sums["loss"] * (workers.num_ranks / num_terms))
        totals.add(sums)


def train(
    folder: RunFolder,
    workers: Workers,
    model: Wrapped,
    steps: Steps,
    loss: Loss,
    held_out: HeldOut | None,
    *,
    seed: int,
    config: TrainConfig,
    optim: OptimConfig,
    checkpoints: CheckpointConfig,
    log: LogConfig,
    samples: SampleLog | None = None,
) -> dict[str, float]:
    """Train ``model`` in place over all steps, going on from the latest checkpoint if there is one.

    Returns the figures of the end. Errors: Stopped after SIGINT or SIGTERM, with a checkpoint
    written; UserError when the loss is no longer a number.
    """
    if workers.device.type == "cpu":
        keep_freed_memory()
    shared, optimizer = workers.share(model, optim)
    if workers.divides:
        here, everywhere = part_held(model)
        folder.log(
            f"weights are divided over {workers.num_ranks} processes ({workers.kind}): {here:,} of "
            f"{everywhere:,} parameters on the first"
        )
    at, row = resume(folder, workers, model, optimizer)
    if config.looks_for_best and at.step > 0 and at.eval_steps != config.eval_steps:
        raise UserError(
            f"eval_steps is {config.eval_steps} and was {at.eval_steps} when {folder.path} was "
            "stopped; it decides where the lowest held-out loss is looked for. Put it back, or "
            "choose another output_dir."
        )
    at.eval_steps = config.eval_steps
    metrics = MetricsLog(folder, at.step, log)
    if samples is not None:
        samples.go_on_after(at.step)
    model.train()

    def write_evaluation() -> None:
        if held_out is not None:
            at.evaluation = evaluate(model, held_out, workers, config.per_device_eval_batch_size)
            metrics.write(at.step, epoch=steps.epoch(at.step), **at.evaluation)
            progress.update(at.step, **at.evaluation)
            note_evaluation(folder, workers, model, at, config)
            if samples is not None:
                samples.write(at.step)

    title = f"{folder.recipe.stage} {folder.path.name}"
    with (
        metrics,
        Progress(folder, title, steps.total, at.step) as progress,
        stop_signals() as stop,
    ):
        if at.step == 0:
            write_evaluation()
        while at.step < steps.total and not at.is_over:
            started = time.perf_counter()
            learning_rate = learning_rate_at(at.step, steps.total, optim)
            set_learning_rate(optimizer, learning_rate)
            seed_step(seed, at.step, workers.rank)
            num_terms, num_tokens = steps.num_terms(at.step), steps.num_tokens(at.step)
            batches = steps.micro_batches(at.step, workers.data_rank)
            summed_loss = settle(loss, model, batches, num_terms, workers)
            add_gradients(workers, shared, batches, num_terms, summed_loss, row)
            gradient_norm = workers.step(model, optimizer, optim.max_grad_norm)

            at.step += 1
            at.tokens += num_tokens
            at.row_tokens += num_tokens
            at.row_terms += num_terms
            is_last = at.step == steps.total
            is_row = is_last or at.step % log.logging_steps == 0
            is_evaluated = is_last or (config.eval_steps and at.step % config.eval_steps == 0)
            # Ranks agree on a stop where they meet anyway; asking in each step would slow it down.
            is_agreed = workers.num_ranks == 1 or is_row
            must_stop = is_agreed and workers.any_rank(stop.requested)
            is_saved = must_stop or (at.step % checkpoints.save_steps == 0 and not is_last)
            row_sums: dict[str, float] = {}
            if is_row or is_evaluated or is_saved:
                row_sums = row.over_ranks(workers)  # waits for the device
                at.loss = row_sums["loss"] / at.row_terms
                refuse_nonsense(float(gradient_norm), at, folder)
            at.seconds += time.perf_counter() - started
            at.row_seconds += time.perf_counter() - started

            progress.update(at.step)
            if is_row:
                shown = {
                    "loss": at.loss,
                    "learning_rate": learning_rate,
                    "tokens_per_second": at.row_tokens / at.row_seconds,
                }
                metrics.write(
                    at.step,
                    epoch=steps.epoch(at.step),
                    **({name: value / at.row_terms for name, value in row_sums.items()} | shown),
                    grad_norm=float(gradient_norm),
                    tokens=at.tokens,
                    seconds=at.seconds,
                    **peak_memory(workers.device),
                )
                progress.update(at.step, **shown)
                row, row_sums = Totals(), {}
                at.row_terms, at.row_tokens, at.row_seconds = 0, 0, 0.0
            if is_evaluated:
                write_evaluation()
            if is_saved:
                save(folder, workers, model, optimizer, at, row_sums, checkpoints)
                metrics.note_saved()
            if must_stop:
                raise Stopped(stop.signal_number, f"after step {at.step} of {steps.total}")
    if config.load_best_model_at_end:
        take_best(folder, workers, model, at)
    best = {"best_step": at.best_step} if config.looks_for_best else {}
    return {"steps": at.step, "tokens": at.tokens, "loss": at.loss, **at.evaluation, **best}
