"""AdamW and Muon: which parameters decay, how large the gradient may be, the rate of each step.

Used by every training stage. Steps are counted from 0: step ``k`` is the one after ``k`` updates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from olmo_base.divided import local_tensor, part_of, whole_tensor
from olmo_base.run.recipe import RecipeError, setting

Schedule = Literal["constant", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer's keys of a recipe, with the values usual for tuning a pretrained model."""

    optim: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = setting(2e-5, above=0)  # the peak
    lr_scheduler_type: Schedule = "linear"
    warmup_ratio: float = setting(0.0, low=0, below=1)  # of all steps, or
    warmup_steps: int = setting(0, low=0)  # a number of them
    warmup_start_ratio: float = setting(0.0, low=0, high=1)  # it begins at this part of the peak
    min_lr_ratio: float = setting(0.0, low=0, high=1)  # the schedule's end, as part of the peak
    decay_ratio: float = setting(
        0.2, above=0, high=1
    )  # warmup_stable_decay: this part of all steps
    embedding_lr_ratio: float = setting(1.0, above=0, help="its learning rate, by the others'")
    weight_decay: float = setting(0.0, low=0)
    decay_norms: bool = False  # norms and biases
    decay_embeddings: bool = False
    adam_beta1: float = setting(0.9, low=0, below=1)
    adam_beta2: float = setting(0.999, low=0, below=1)
    adam_epsilon: float = setting(1e-8, above=0)
    muon_momentum: float = setting(0.95, low=0, below=1)  # of the matrices, with optim: muon
    max_grad_norm: float = setting(1.0, low=0)  # 0 never clips

    def __post_init__(self) -> None:
        if self.warmup_ratio > 0 and self.warmup_steps > 0:
            raise RecipeError(
                "warmup_steps",
                f"{self.warmup_steps}, but warmup_ratio is {self.warmup_ratio}; keep one of them.",
            )
        if self.optim != "muon" and self.muon_momentum != OptimConfig.muon_momentum:
            raise RecipeError(
                "muon_momentum", f"{self.muon_momentum}, but optim is {self.optim}, which has none."
            )
        has_decay = self.lr_scheduler_type == "warmup_stable_decay"
        if not has_decay and self.decay_ratio != OptimConfig.decay_ratio:
            raise RecipeError(
                "decay_ratio",
                f"{self.decay_ratio}, but only lr_scheduler_type warmup_stable_decay has one.",
            )


# ---------------------------------------------------------------- learning rate

INVERSE_SQRT_STEPS = 10_000  # the time scale without a warmup, as in transformers


def num_warmup_steps(total_steps: int, config: OptimConfig) -> int:
    """Steps of warmup; a ratio is rounded up."""
    return config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)


def learning_rate_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0 <= ``step`` < ``total_steps``; it depends on nothing else.

    The warmup is linear and reaches the peak in its last step, so that no step is made with a rate
    of zero. The decay starts from the peak and would reach ``min_lr_ratio`` at ``total_steps``;
    ``warmup_stable_decay`` keeps the peak until the last ``decay_ratio`` of all steps and then
    falls in a line (arXiv:2404.06395, section 4). ``inverse_sqrt`` falls as the square root of the
    steps done, without an end (arXiv:1706.03762, section 5.3).
    """
    num_warmup = num_warmup_steps(total_steps, config)
    if step < num_warmup:
        start = config.warmup_start_ratio
        return config.learning_rate * (start + (1.0 - start) * (step + 1) / num_warmup)
    part = _part_of_peak(step - num_warmup, total_steps - num_warmup, num_warmup, config)
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * part)


def _part_of_peak(step: int, num_steps: int, num_warmup: int, config: OptimConfig) -> float:
    """How far above the schedule's end, from 1 to 0, after ``step`` steps since the warmup."""
    left = 1.0 - min(1.0, step / max(1, num_steps))
    match config.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * left))
        case "warmup_stable_decay":
            num_decay = math.ceil((num_warmup + num_steps) * config.decay_ratio)
            return min(1.0, (num_steps - step) / num_decay)
        case "inverse_sqrt":
            scale = num_warmup or INVERSE_SQRT_STEPS
            return math.sqrt(scale / (scale + step))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this rate in the next step; for embeddings, the configured multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


# ---------------------------------------------------------------- parameters


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters that decay, and those that do not.

    Matrices decay. Norms and biases (fewer than two dimensions) and embeddings decay only if the
    configuration says so. An embedding that is also the output head is an embedding. With Muon the
    matrices between embedding and head are a group of their own, marked ``"muon": True``, and with
    an ``embedding_lr_ratio`` so are the embeddings, with an ``"lr_ratio"``.
    Parameters that are divided over different ranks never share a group: fused kernels take one
    kind at a time.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = _output_head(model)
    groups: dict[tuple[bool, bool, int, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = id(parameter) in embeddings
        if is_embedding:
            decays = config.decay_embeddings
        elif parameter.ndim < 2:
            decays = config.decay_norms
        else:
            decays = True
        is_inner = parameter.ndim == 2 and not is_embedding and parameter is not head
        ranks = parameter.device_mesh.ndim if isinstance(parameter, DTensor) else 0
        ratio = config.embedding_lr_ratio if is_embedding else 1.0
        kind = (is_inner and config.optim == "muon", decays, ranks, ratio)
        groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": groups[has_muon, decays, ranks, ratio],
            "weight_decay": config.weight_decay if decays else 0.0,
            **({"muon": has_muon} if config.optim == "muon" else {}),
            **({"lr_ratio": ratio} if config.embedding_lr_ratio != 1.0 else {}),
        }
        for has_muon, decays, ranks, ratio in sorted(groups, reverse=True)
    ]


def _output_head(model: nn.Module) -> nn.Parameter | None:
    """The weight that turns the last hidden state into logits, in a Hugging Face model or ours."""
    find = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))
    head = find()
    return None if head is None else head.weight


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, bf16: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's trainable parameters.

    AdamW (arXiv:1711.05101) is the fused kernel: on 2 CPU cores a step over 3.4 M parameters takes
    2 ms, 8 ms with ``foreach``. ``bf16`` lets Muon compute its directions in that precision.
    """
    groups = parameter_groups(model, config)
    if config.optim == "muon":
        return Muon(groups, config, bf16=bf16)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would begin with, to be filled."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            if group.get("muon", False):
                optimizer.state[parameter]["momentum"] = torch.zeros_like(parameter)
            else:
                optimizer.state[parameter] = start_of_adamw(parameter)


def start_of_adamw(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter before its first step."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings, output head, norms and biases.

    The step of a matrix is its gradient's momentum made orthogonal: all singular values become
    about 1, so that rare directions are learnt as fast as frequent ones (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). It is scaled by ``0.2 sqrt(max(rows, columns))``, to
    the size of AdamW's step, and decays in the same way, so that one learning rate serves both
    (arXiv:2502.16982, section 2.2). A matrix that is divided over ranks is gathered first: every
    rank makes all of it orthogonal and keeps its part, so that the step is that of one process.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, *, bf16: bool) -> None:
        super().__init__(groups, {"lr": config.learning_rate, "muon": False})
        self.config = config
        self.found_inf: Tensor | None = None  # above 0: leave everything as it is
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            with_gradient = [one for one in group["params"] if one.grad is not None]
            if group["muon"]:
                self._step_muon(with_gradient, group)
            else:
                self._step_adamw(with_gradient, group)

    def _step_muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum = self.config.muon_momentum
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - momentum)
            direction = whole_tensor(gradient.lerp(state["momentum"], momentum))  # Nesterov's
            rows, columns = sorted(parameter.shape)
            wide = direction if parameter.shape[0] == rows else direction.T
            alike.setdefault((rows, columns), []).append((parameter, wide))
        for (_, columns), members in alike.items():
            steps = orthogonalized(torch.stack([wide for _, wide in members]), self.dtype)
            rate = group["lr"] * 0.2 * math.sqrt(columns)
            for (parameter, wide), step in zip(members, steps, strict=True):
                local = local_tensor(parameter)
                local.mul_(1 - group["lr"] * group["weight_decay"])
                turned = step if wide.shape == parameter.shape else step.T
                local.add_(part_of(turned, parameter), alpha=-rate)

    def _step_adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = start_of_adamw(parameter)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adamw(
            [local_tensor(parameter) for parameter in parameters],
            [local_tensor(gradient) for gradient in gradients],
            [local_tensor(state["exp_avg"]) for state in states],
            [local_tensor(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.config.adam_epsilon,
            maximize=False,
        )


NS_STEPS, NS_A, NS_B, NS_C = 5, 3.4445, -4.7750, 2.0315  # Jordan's


def orthogonalized(matrices_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest matrix with orthonormal rows to each of N matrices, R <= C, in one batch.

    Five Newton-Schulz steps with Jordan's coefficients: singular values above 1/500 of the
    matrix's norm end between 0.68 and 1.14, which serves as well as 1 and costs less.
    """
    norms_N11 = matrices_NRC.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    x_NRC = (matrices_NRC / norms_N11).to(dtype)
    rows, columns = x_NRC.shape[1:]
    if columns >= 2 * rows and dtype == torch.float32:
        return _orthogonalized_by_gram(x_NRC)
    for _ in range(NS_STEPS):
        gram_NRR = x_NRC @ x_NRC.mT
        inner_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=NS_B, alpha=NS_C)
        x_NRC = torch.baddbmm(x_NRC, inner_NRR, x_NRC, beta=NS_A)
    return x_NRC.to(matrices_NRC.dtype)


def _orthogonalized_by_gram(x_NRC: Tensor) -> Tensor:
    """The same steps for wide matrices, on R x R ones: each multiplies from the left.

    A step maps X to PX, and so the Gram matrix G = XX' to PGP, where P = a + bG + cG^2. With
    C = 4R that is 25 products of R x R by R x R in place of 45. Rounding acts on the squares of
    the singular values: where the least are 1/500 of the norm it moves float32 results by 3e-5.
    """
    gram_NRR = x_NRC @ x_NRC.mT
    product_NRR = None
    for step in range(NS_STEPS):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=NS_B, alpha=NS_C)
        factor_NRR.diagonal(dim1=1, dim2=2).add_(NS_A)
        product_NRR = factor_NRR if product_NRR is None else factor_NRR @ product_NRR
        if step < NS_STEPS - 1:
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    assert product_NRR is not None
    return product_NRR @ x_NRC


def clip_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most ``max_grad_norm`` (0: never).

    Returns the norm before clipping, as a tensor on the device: reading it is what waits for it.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        norm = _norm_over_ranks(gradients)
        if max_grad_norm > 0:
            scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's, below
            torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
        return norm
    norm = torch.nn.utils.get_total_norm(gradients)
    # On a CPU the norm is there to be read: gradients that are short enough are left alone.
    if max_grad_norm > 0 and not (norm.device.type == "cpu" and norm <= max_grad_norm):
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_grad_norm, norm)
    return norm


def _norm_over_ranks(gradients: list[Tensor]) -> Tensor:
    """The norm of gradients of which some are divided over ranks, the same on every rank."""
    total = torch.zeros((), device=gradients[0].device)
    for gradient in gradients:
        num_parts = 1
        if isinstance(gradient, DTensor):
            for size, placement in zip(
                gradient.device_mesh.shape, gradient.placements, strict=True
            ):
                num_parts *= 1 if placement.is_replicate() else size
        # Each part is on so many ranks, which all add it.
        num_owners = dist.get_world_size() // num_parts
        total += local_tensor(gradient).float().square().sum() / num_owners
    dist.all_reduce(total)
    return total.sqrt()


# ---------------------------------------------------------------- steps better not made

SPIKE_WINDOW = 128  # steps that say what is usual


class StepGuard:
    """Leaves out steps whose loss or gradient is no number, or far above what is usual.

    The usual is mean and standard deviation of the last 128 steps (a step more than
    ``skip_spike_sigma`` deviations above the mean is a spike; before 64 steps none is), as in the
    SkipStep optimizers of OLMo-2 (arXiv:2501.00656, section 3.2). Weights, moments and step counts
    of the optimizer stay as they were. All of it is computed on the device: nothing waits.
    """

    def __init__(self, device: torch.device, sigma: float) -> None:
        self.sigma = sigma
        self._window = torch.full((2, SPIKE_WINDOW), math.nan, device=device)
        self._num_seen = torch.zeros((), dtype=torch.int64, device=device)
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def watch(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        """Tell the optimizer whether its next step is to be left out."""
        found_2 = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        is_bad = ~found_2.isfinite().all()
        if self.sigma > 0:
            known = self._window.isfinite()
            count = known.sum(1).clamp(min=2)
            mean_2 = self._window.nan_to_num(0.0).sum(1) / count
            squares_2 = ((self._window - mean_2[:, None]).nan_to_num(0.0) ** 2).sum(1)
            limit_2 = mean_2 + self.sigma * (squares_2 / (count - 1)).sqrt()
            is_known = self._num_seen >= SPIKE_WINDOW // 2
            is_bad |= is_known & (found_2 > limit_2).any()
            place = self._num_seen % SPIKE_WINDOW
            is_finite = found_2.isfinite().all()
            self._window[:, place] = torch.where(is_finite, found_2, self._window[:, place])
            self._num_seen += is_finite
        self._num_skipped += is_bad
        self._in_a_row = torch.where(is_bad, self._in_a_row + 1, 0)
        self._longest = torch.maximum(self._longest, self._in_a_row)
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    @property
    def num_skipped(self) -> int:
        """Steps left out so far. Reading it waits for the device."""
        return int(self._num_skipped)

    @property
    def longest(self) -> int:
        """The most steps left out one after the other. Reading it waits for the device."""
        return int(self._longest)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {name[1:]: value for name, value in vars(self).items() if name.startswith("_")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, f"_{name}", value.to(self._window.device))
