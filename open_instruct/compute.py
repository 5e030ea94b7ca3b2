"""How the layers of a tuned model compute: compiled, and by liger's kernels."""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from olmo_base.compute import compile_layers_for_rows, refuse_no_compiler
from olmo_base.run.errors import UserError
from open_instruct.adapters import AdapterConfig, is_adapted
from open_instruct.batches import Batch
from open_instruct.causal_lm import ModelConfig
from open_instruct.logprobs import Wrapped, native_over
from open_instruct.loop import Workers
from open_instruct.packed_attention import leave_uncompiled
from open_instruct.sharding import layers_of

# Of liger's kernels those for layers. The head and the loss are ours, at the labels only.
LIGER_PARTS = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu")


# ---------------------------------------------------------------- compiled


def refuse_uncompilable(config: ModelConfig, adapter: AdapterConfig, workers: Workers) -> None:
    """Errors: UserError for ``torch_compile`` beside something that does not go with it."""
    if not config.torch_compile:
        return
    beside = {
        "load_in_4bit": adapter.load_in_4bit,
        "load_in_8bit": adapter.load_in_8bit,
        "context_parallel": workers.context is not None,
        f"weights divided by {workers.kind}": workers.divides,
    }
    for name, is_there in beside.items():
        if is_there:
            raise UserError(f"torch_compile does not go with {name}; leave one of them out.")
    refuse_no_compiler(workers.device)


def compile_layers(
    model: Wrapped, batches: Sequence[Batch], device: torch.device, *, backend: str = "inductor"
) -> None:
    """Let torch compile each layer of ``model``, in place, for rows of any length.

    What is compiled depends on the first sizes that it is given. Those of ``batches``, the run's
    first, are: so a run that goes on compiles what it compiled before. Weights, gradients and
    random generators are left as they were. ``backend`` is torch's, which makes the code.
    """
    if model.native is not None:
        compile_layers_for_rows(model.native, backend=backend)
    else:
        leave_uncompiled()
        for layer in layers_of(model.model):
            layer.compile(dynamic=True, backend=backend)
    was_training = model.training
    model.train()
    with torch.random.fork_rng(enabled=True):
        for batch in batches:
            model(batch.to(device)).sum().backward()
    model.zero_grad()
    model.train(was_training)


@contextlib.contextmanager
def uncompiled(
    precision: Callable[[], contextlib.AbstractContextManager[object]],
) -> Iterator[None]:
    """In ``precision``, with layers as they were written: for decoding, which grows by a token."""
    with torch.compiler.set_stance("force_eager"), precision():
        yield


# ---------------------------------------------------------------- liger's kernels


def take_liger_kernels(model: Any, asked: bool | str, workers: Workers) -> str | None:
    """Let transformers' layers compute by liger's kernels, if asked to; which, in words.

    Errors: UserError if they are insisted on and cannot be had.
    """
    if asked is False:
        return None
    reason = why_no_liger(model, workers)
    if reason is not None:
        if asked is True:
            raise UserError(f"liger_kernel: true, but {reason}. Set liger_kernel: auto or false.")
        return None
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    whole = model.get_base_model() if is_adapted(model) else model
    known = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[whole.config.model_type]).parameters
    taken = [part for part in LIGER_PARTS if part in known]
    _apply_liger_kernel_to_instance(
        model=whole,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        **{part: True for part in taken},
    )
    return ", ".join(taken)


def why_no_liger(model: Any, workers: Workers) -> str | None:
    """Why liger's kernels are not for this model here, in words."""
    if workers.device.type != "cuda":
        return f"its kernels are for CUDA GPUs, and this is {workers.device.type}"
    if native_over(model) is not None and not workers.divides_by_zero:
        return "an OLMo that is trained whole is computed by layers of our own"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package is not installed (pip install 'open-instruct[liger]')"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    whole = model.get_base_model() if is_adapted(model) else model
    if whole.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for a model of type {whole.config.model_type}"
    return None
