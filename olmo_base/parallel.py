"""The ranks of a pretraining run: who has which data, weights and positions, and how they agree.

A rank's number counts, slowest first: copies of the weights, shards of a copy, parts of a row
(context), parts of a layer (tensor). Ranks that differ in the last two read the same sequences.
"""

# B sequences, T positions, N = B * T, D width, V vocabulary

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from olmo_base.corpus.batches import Batch
from olmo_base.divided import copy_part, local_tensor, whole_tensor
from olmo_base.losses import next_token_loss
from olmo_base.model.context import SplitContext
from olmo_base.model.feed_forward import Embedding, Linear, RMSNorm
from olmo_base.model.transformer import EndsInit, ModelConfig, Transformer
from olmo_base.run.errors import UserError
from olmo_base.run.launch import pick_device
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.watch import Watch

AS_USUAL = EndsInit()


@dataclass(frozen=True)
class ParallelConfig:
    """How several ranks share a run; one process by itself reads none of it but checks all."""

    data_parallel: Literal["ddp", "fsdp", "hsdp"] = setting(
        "ddp",
        changes_result=False,
        help="ddp: whole weights on each rank; fsdp: sharded over all; hsdp: sharded copies",
    )
    data_parallel_shards: int = setting(
        0, low=0, changes_result=False, help="hsdp: ranks that share a copy; 0: those of a node"
    )
    tensor_parallel: int = setting(1, low=1, changes_result=False, help="ranks per layer")
    context_parallel: int = setting(1, low=1, changes_result=False, help="ranks per row")
    hang_seconds: float = setting(
        900.0, above=0, changes_result=False, help="a rank without progress for so long ends a run"
    )

    def __post_init__(self) -> None:
        if self.data_parallel_shards and self.data_parallel != "hsdp":
            raise RecipeError(
                "data_parallel_shards",
                f"{self.data_parallel_shards}, but data_parallel is {self.data_parallel}; only "
                "hsdp has copies of so many shards.",
            )
        if self.data_parallel == "ddp" and self.tensor_parallel > 1:
            raise RecipeError(
                "data_parallel",
                f"ddp keeps layers whole, and tensor_parallel is {self.tensor_parallel}; say fsdp "
                "or hsdp.",
            )


class Ranks:
    """This process among those of the run; alone, every sum over ranks is the number itself."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        """Errors: UserError if so many ranks cannot be divided as asked."""
        self.config, self.device = config, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        copies, shards = divided(config, self.num_ranks, of_node)
        self.num_data = copies * shards
        self._numbers = torch.arange(self.num_ranks)
        self._together = config.tensor_parallel * config.context_parallel
        self.data_rank = self.rank // self._together
        self.context: SplitContext | None = None
        self.watch: Watch | None = None
        if self.num_ranks == 1:
            return
        # Context ranks hold the same weights, so they share in their shards.
        num_parts, T = config.context_parallel, config.tensor_parallel
        self.weights_mesh = DeviceMesh(
            device.type,
            self._numbers.view(copies, shards * num_parts, T),
            mesh_dim_names=("copies", "shards", "tensor"),
        )
        if num_parts > 1:
            rows = DeviceMesh(
                device.type,
                self._numbers.view(self.num_data, num_parts, T),
                mesh_dim_names=("data", "context", "tensor"),
            )
            self.context = SplitContext(rows.get_group("context"))

    def __str__(self) -> str:
        if self.num_ranks == 1:
            return str(self.device)
        ways = {
            "copies": self.weights_mesh.size(0) if self.config.data_parallel == "hsdp" else 1,
            "tensor": self.config.tensor_parallel,
            "context": self.config.context_parallel,
        }
        words = [f"{name} x {number}" for name, number in ways.items() if number > 1]
        how = ", ".join([self.config.data_parallel, *words])
        return f"{self.num_ranks} ranks of {self.device.type} ({how})"

    @property
    def num_weights_ranks(self) -> int:
        """Ranks that gradients are averaged over."""
        return self.num_data * self.config.context_parallel

    @property
    def reads_first(self) -> bool:
        """Whether this rank counts its sequences: of those that read the same ones, one does."""
        return self.rank % self._together == 0

    def at(self, step: int, *, waits: bool = False) -> None:
        """Tell the watch how far this rank is."""
        if self.watch is not None:
            self.watch.at(step, waits=waits)

    def still_moves(self) -> None:
        """Tell the watch that this rank does not hang."""
        if self.watch is not None:
            self.watch.still_moves()

    def gathered(self, values: Sequence[float]) -> Tensor:
        """Every rank's numbers, one row each; the device is not waited for."""
        row = torch.tensor([list(values)], dtype=torch.float64)
        if self.num_ranks == 1:
            return row
        rows = [torch.empty_like(row) for _ in range(self.num_ranks)]
        try:
            dist.all_gather(rows, row)
        except RuntimeError as error:
            if "onnection" not in str(error):
                raise
            raise UserError("Another rank has ended; what it said is the reason.") from None
        return torch.cat(rows)

    def total(self, value: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank."""
        if self.num_ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every rank is here."""
        self.gathered([0.0])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank goes through the block before the others enter it."""
        if self.rank != 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()


@contextlib.contextmanager
def started_ranks(config: ParallelConfig) -> Iterator[Ranks]:
    """The ranks that torchrun or accelerate started (RANK, WORLD_SIZE), or this process alone."""
    device = pick_device()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(config, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Numbers that steer the loop travel between CPUs: the GPU is not waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watch speaks first: it can name the rank that hangs.
    limit = timedelta(seconds=2 * config.hang_seconds + 60)
    dist.init_process_group(backend, timeout=limit)
    try:
        yield Ranks(config, device)
    finally:
        dist.destroy_process_group()


def divided(config: ParallelConfig, num_ranks: int, of_node: int) -> tuple[int, int]:
    """Copies of the weights, and shards of each; ``of_node`` ranks share a machine.

    Errors: UserError if so many ranks cannot be divided as asked.
    """
    together = config.tensor_parallel * config.context_parallel
    if num_ranks % together:
        raise UserError(
            f"tensor_parallel {config.tensor_parallel} x context_parallel "
            f"{config.context_parallel} does not divide the {num_ranks} ranks. Start a multiple of "
            f"{together}."
        )
    num_data = num_ranks // together
    if config.data_parallel != "hsdp":
        return 1, num_data
    shards = config.data_parallel_shards or max(1, of_node // together)
    if num_data % shards:
        raise UserError(
            f"data_parallel_shards {shards} does not divide the {num_data} ranks that read "
            "different sequences. Choose a divisor."
        )
    return num_data // shards, shards


def refuse_uneven_shape(config: ParallelConfig, model: ModelConfig, max_length: int) -> None:
    """Errors: UserError if layers or rows cannot be cut into as many equal parts."""
    parts = config.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(model, name) % parts:
            raise UserError(
                f"tensor_parallel {parts} does not divide {name} {getattr(model, name)}. Choose a "
                "divisor."
            )
    pieces = 2 * config.context_parallel
    if config.context_parallel > 1 and max_length % pieces:
        raise UserError(
            f"context_parallel {config.context_parallel} cuts rows into {pieces} equal pieces; "
            f"max_length {max_length} is no multiple of that."
        )


# ---------------------------------------------------------------- the model over ranks


class ModelWithLoss(nn.Module):
    """The model and its loss in one forward pass, so that sharded weights are there for both."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        self._context = ranks.context
        has_parts = ranks.config.tensor_parallel > 1
        self._group = ranks.weights_mesh.get_group("tensor") if has_parts else None

    def forward(self, batch: Batch, z_loss: float) -> tuple[Tensor, Tensor]:
        """What to minimise and the cross-entropy alone, summed over this rank's part of a batch."""
        ids_BT, labels_BT = batch.ids_BT, batch.labels_BT
        if self._context is not None:
            here_P = self._context.positions(ids_BT.shape[1], ids_BT.device)
            ids_BT, labels_BT = ids_BT[:, here_P], labels_BT[:, here_P]
        hidden_ND = self.model(
            ids_BT, document_ids_BT=batch.document_ids_BT, context=self._context
        ).flatten(0, 1)
        labels_N, head_VD = labels_BT.flatten(), self.model.output_weight
        if self._group is not None:  # each rank of a layer asks for its part of the positions
            first = len(labels_N) * self._group.rank() // self._group.size()
            last = len(labels_N) * (self._group.rank() + 1) // self._group.size()
            hidden_ND = _Copied.apply(hidden_ND, self._group)[first:last]
            head_VD = _Copied.apply(head_VD, self._group)
            labels_N = labels_N[first:last]
        return next_token_loss(hidden_ND, head_VD, labels_N, z_loss=z_loss)


class _Copied(torch.autograd.Function):
    """A tensor that all ranks of a group have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def shared_model(
    config: ModelConfig,
    ranks: Ranks,
    weights: Mapping[str, Tensor] | None,
    *,
    change: Callable[[Transformer], Transformer] | None = None,
    bf16: bool = False,
    ends: EndsInit = AS_USUAL,
) -> tuple[Transformer, nn.Module]:
    """The model over the ranks, and what computes its loss.

    ``weights`` are whole; without them each is drawn whole, one after the other, exactly as a
    single process would, and this rank's part is kept. ``change`` is made before it is divided.
    ``bf16``: sharded layers are gathered in it, as their matrix products compute anyway; the parts
    that the optimizer steps stay in fp32, and so do embedding, head and the residual stream.
    ``ends``: what embedding and head are drawn with.
    """
    parallel = ranks.config
    with torch.device("meta"):
        model = Transformer(config, ends)
    drawn = {
        f"{name}.weight": (module.weight.shape, module.init_std)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding)
    }
    if change is not None:
        model = change(model)
    if parallel.tensor_parallel > 1:
        _split_layers(model, ranks.weights_mesh["tensor"])
    with_loss: nn.Module = ModelWithLoss(model, ranks)
    is_sharded = parallel.data_parallel != "ddp" and ranks.num_weights_ranks > 1
    if is_sharded:
        is_hybrid = parallel.data_parallel == "hsdp"
        mesh = ranks.weights_mesh[("copies", "shards") if is_hybrid else ("shards",)]
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(with_loss, mesh=mesh)
    model.to_empty(device=ranks.device)
    _fill(model, weights, drawn)
    if not is_sharded and ranks.num_weights_ranks > 1:
        with_loss = DistributedDataParallel(
            with_loss,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            process_group=ranks.weights_mesh.get_group("shards"),
            gradient_as_bucket_view=True,
        )
    return model, with_loss


def meet_at(with_loss: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
    """Whole gradients are exchanged in a step's last micro-batch only; shards each time."""
    if isinstance(with_loss, DistributedDataParallel) and not is_last:
        return with_loss.no_sync()
    if isinstance(with_loss, FSDPModule):
        with_loss.set_requires_all_reduce(is_last)
    return contextlib.nullcontext()


def whole_model(model: Transformer) -> Transformer:
    """A copy that is not divided, on the CPU; all ranks must ask, and the first one has it."""
    with torch.device("meta"):
        whole = Transformer(model.config)
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole_tensor(parameter.detach())
        weights[name] = tensor.cpu() if dist.get_rank() == 0 else tensor.new_empty(0)
    if dist.get_rank() == 0:
        whole.load_state_dict(weights, assign=True)
    return whole


@torch.no_grad()
def _fill(
    model: Transformer,
    weights: Mapping[str, Tensor] | None,
    drawn: Mapping[str, tuple[torch.Size, float]],
) -> None:
    for name, parameter in model.named_parameters():
        if weights is not None:
            whole = weights[name]
        elif name in drawn:
            (rows, columns), std = drawn[name]
            whole = Linear(columns, rows, std).weight
        else:  # of a norm
            whole = torch.ones(parameter.shape)
        copy_part(parameter, whole)


# ---------------------------------------------------------------- layers over ranks


def _split_layers(model: Transformer, mesh: DeviceMesh) -> None:
    """Heads and the feed-forward's channels are divided; what leaves a block is summed.

    Megatron's division (arXiv:1909.08053, section 3). Embedding, head and the residual stream's
    norms stay whole; of the head's work each rank does a part of the positions.
    """
    everyone = PrepareModuleInput(
        input_layouts=(Replicate(), None, None, None, None),
        desired_input_layouts=(Replicate(), None, None, None, None),
    )
    plan: dict[str, ParallelStyle] = {
        "attention": everyone,
        "attention.o_proj": RowwiseParallel(),
        "feed_forward": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.down_proj": RowwiseParallel(),
    }
    plan |= {f"attention.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"feed_forward.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    for layer in model.layers:
        attention: Any = layer.attention
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name)
            if isinstance(norm, RMSNorm):
                setattr(attention, name, SplitRMSNorm(norm, mesh))
        parallelize_module(layer, mesh, plan)


class SplitRMSNorm(nn.Module):
    """The RMSNorm of vectors whose channels are divided over ranks: exact, over the full width."""

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        divided = distribute_tensor(norm.weight, mesh, [Shard(0)], src_data_rank=None)
        self.weight = nn.Parameter(divided)
        self.eps = norm.eps
        self._width = norm.weight.shape[0]
        self._group = mesh.get_group()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``, this rank's channels."""
        return _SplitRMSNorm.apply(x, local_tensor(self.weight), self.eps, self._width, self._group)


class _SplitRMSNorm(torch.autograd.Function):
    """As feed_forward._RMSNorm, the two sums over channels taken over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int, group: dist.ProcessGroup
    ) -> Tensor:
        x32 = x.float()
        squares = x32.square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=group)
        inverse_rms = squares.div_(width).add_(eps).rsqrt_()
        normed = x32 * inverse_rms
        ctx.save_for_backward(normed, inverse_rms, weight)
        ctx.dtype, ctx.width, ctx.group = x.dtype, width, group
        return (normed * weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        normed, inverse_rms, weight = ctx.saved_tensors
        grad = grads[0].float()
        grad_normed = grad * normed
        grad_weight = grad_normed.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (grad_normed * weight.float()).sum(-1, keepdim=True)
        dist.all_reduce(mean, group=ctx.group)
        mean.div_(ctx.width)
        grad_x = (grad * weight.float() - normed * mean) * inverse_rms
        return grad_x.to(ctx.dtype), grad_weight, None, None, None
