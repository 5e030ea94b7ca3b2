"""Model and micro-batch become log-probabilities, with the language-model head only at labels.

Hidden states of every position -> those that predict a label -> head -> log-softmax in float32.
A head over V ids costs more than a small model's whole body, and prompts and padding need none.
"""

# R rows, T positions, D hidden width, V vocabulary, L label tokens (laid end to end)

import contextlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import Olmo2ForCausalLM, Olmo3ForCausalLM, OlmoForCausalLM

from olmo_base.model.context import SplitContext
from olmo_base.model.hf_weights import hf_name, model_config_of
from olmo_base.model.packing import Branches, filled
from olmo_base.model.products import linear
from olmo_base.model.transformer import Transformer
from olmo_base.model.varlen import Kernel
from olmo_base.run.errors import UserError
from open_instruct.batches import Batch, Examples, pack
from open_instruct.control_tokens import Encoded
from open_instruct.packed_attention import (
    NAME,
    call_instead,
    reach_of,
    rows_end_to_end,
    why_not_rows,
)

# Above this many logits at once (256 MB in float32) the head works through the labels in pieces,
# whose logits are computed again in the backward pass instead of being kept.
MAX_LOGITS = 2**26
LOGITS_IN_CACHE = 2**17  # 512 KiB


def id_logprobs(logits_LV: Tensor, ids_L: Tensor) -> Tensor:
    """Log-probability, in nats, of each id: (L,)."""
    # bf16 keeps 2-3 digits; a difference of log-probabilities needs more.
    return -F.cross_entropy(logits_LV.float(), ids_L, reduction="none")


class _OwnIdLogprobs(torch.autograd.Function):
    """``id_logprobs`` in the memory of the logits, which are lost.

    Of p, the softmax, and y, the label's one-hot row, the gradient of log p(y) is y - p. Rows are
    taken in pieces that stay in cache, so that a pass over logits is not a pass over memory.
    """

    @staticmethod
    def forward(ctx: Any, logits_LV: Tensor, ids_L: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_L = logits_LV.new_empty(len(ids_L))
        totals_L1 = logits_LV.new_empty(len(ids_L), 1)
        for here in _pieces_in_cache(logits_LV):
            piece_CV = logits_LV[here]
            piece_CV -= piece_CV.amax(-1, keepdim=True)
            chosen_C1 = piece_CV.gather(1, ids_L[here, None])
            totals_L1[here] = piece_CV.exp_().sum(-1, keepdim=True)
            logprobs_L[here] = (chosen_C1 - totals_L1[here].log()).squeeze(1)
        ctx.mark_dirty(logits_LV)
        ctx.save_for_backward(logits_LV, totals_L1, ids_L)
        ctx.set_materialize_grads(False)
        return logprobs_L, logits_LV

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        exps_LV, totals_L1, ids_L = ctx.saved_tensors
        if grads[0] is None:
            return None, None
        grad_L1 = grads[0][:, None]
        for here in _pieces_in_cache(exps_LV):
            exps_LV[here] *= -grad_L1[here] / totals_L1[here]
            exps_LV[here].scatter_add_(1, ids_L[here, None], grad_L1[here])
        return exps_LV, None


def _pieces_in_cache(logits_LV: Tensor) -> list[slice]:
    rows = len(logits_LV)
    if logits_LV.device.type == "cpu":
        rows = max(1, LOGITS_IN_CACHE // logits_LV.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits_LV), max(1, rows))]


def mean_logprob(logits_LV: Tensor) -> Tensor:
    """The mean log-probability over the vocabulary: (L,)."""
    logits_LV = logits_LV.float()
    return logits_LV.mean(-1) - logits_LV.logsumexp(-1)


def log_sum_squares(logits_LV: Tensor) -> Tensor:
    """The log of the sum over the vocabulary of squared probabilities: (L,)."""
    logits_LV = logits_LV.float()
    return (2 * logits_LV).logsumexp(-1) - 2 * logits_LV.logsumexp(-1)


# What some losses need of the whole distribution at a label, by name.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_logprob": mean_logprob,
    "log_sum_squares": log_sum_squares,
}


def label_scores(logits_LV: Tensor, ids_L: Tensor, statistic: str | None) -> Tensor:
    """``id_logprobs``, (L,); with one of ``STATISTICS`` a second column beside it, (L, 2)."""
    logprobs_L = id_logprobs(logits_LV, ids_L)
    if statistic is None:
        return logprobs_L
    return torch.stack([logprobs_L, STATISTICS[statistic](logits_LV)], dim=1)


def vocabulary_size(head: nn.Module) -> int:
    """How many ids the head scores."""
    assert isinstance(head.weight, Tensor)
    return head.weight.shape[0]


def head_logprobs(
    hidden_LD: Tensor,
    ids_L: Tensor,
    head: nn.Module,
    max_logits: int,
    statistic: str | None = None,
) -> Tensor:
    """``label_scores`` of each id under ``head``, never keeping more than ``max_logits`` logits."""

    def piece(hidden: Tensor, ids: Tensor) -> Tensor:
        logits_LV = _scored(hidden, head)
        if statistic is not None:
            return label_scores(logits_LV, ids, statistic)
        # Nobody else reads them, and a linear map's backward pass does not either.
        logprobs_L, _ = _OwnIdLogprobs.apply(logits_LV.float(), ids)
        return logprobs_L

    rows = max(1, max_logits // vocabulary_size(head))
    if len(ids_L) <= rows:
        return piece(hidden_LD, ids_L)
    pieces = [
        checkpoint(piece, hidden, ids, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in zip(hidden_LD.split(rows), ids_L.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def _scored(hidden_LD: Tensor, head: nn.Module) -> Tensor:
    """The logits, by the faster product where the head is a plain one."""
    if type(head) is nn.Linear and head.bias is None and not head._forward_hooks:
        return linear(hidden_LD, head.weight)
    logits_LV: Tensor = head(hidden_LD)
    return logits_LV


# ---------------------------------------------------------------- ways to the logits of labels


def model_inputs(batch: Batch, mask: Tensor | None) -> dict[str, Any]:
    """What every way hands to the model. ``mask``: of padding, (R, T), or of all, (R, 1, T, T)."""
    inputs = {"input_ids": batch.ids_RT, "attention_mask": mask, "use_cache": False}
    positions_RT = batch.position_ids()
    return inputs if positions_RT is None else {**inputs, "position_ids": positions_RT}


def hidden_then_head(
    model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
) -> Tensor:
    """The body's hidden states, then the head at the labels. Right for models that do just that."""
    body = model.get_decoder()  # type: ignore[operator]
    hidden = body(**model_inputs(batch, mask)).last_hidden_state
    hidden_LD = hidden.flatten(0, 1).index_select(0, batch.label_positions_L)
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head_logprobs(hidden_LD, batch.label_ids_L, head, MAX_LOGITS, statistic)


def model_at_labels(
    model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
) -> Tensor:
    """The model's own logits, asked for at the labels only. Costs a host synchronisation."""
    is_wanted = torch.zeros_like(batch.ids_RT, dtype=torch.bool).flatten()
    is_wanted[batch.label_positions_L] = True
    logits_LV = model(
        **model_inputs(batch, mask), logits_to_keep=is_wanted.view_as(batch.ids_RT)
    ).logits
    if batch.branches_R2 is not None:  # where the answers part, one position predicts two labels
        places = is_wanted.cumsum(0) - 1
        logits_LV = logits_LV.index_select(0, places[batch.label_positions_L])
    return label_scores(logits_LV, batch.label_ids_L, statistic)


def packed_then_head(
    model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
) -> Tensor:
    """As ``hidden_then_head``, over rows laid end to end; for models that took ``attend_rows``."""
    body = model.get_decoder()  # type: ignore[operator]
    hidden_ND = body(**rows_end_to_end(model, batch)).last_hidden_state[0]
    hidden_LD = hidden_ND.index_select(0, batch.packed_positions())
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head_logprobs(hidden_LD, batch.label_ids_L, head, MAX_LOGITS, statistic)


def packed_at_labels(
    model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
) -> Tensor:
    """As ``model_at_labels``, over rows laid end to end; asks for places and waits for nothing."""
    inputs = rows_end_to_end(model, batch)
    logits_LV = model(**inputs, logits_to_keep=batch.packed_positions()).logits[0]
    return label_scores(logits_LV, batch.label_ids_L, statistic)


def model_everywhere(
    model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
) -> Tensor:
    """The model's own logits at every position, then those of the labels. The most memory."""
    logits = model(**model_inputs(batch, mask)).logits
    logits_LV = logits.flatten(0, 1).index_select(0, batch.label_positions_L)
    return label_scores(logits_LV, batch.label_ids_L, statistic)


class NativeThenHead:
    """The body of an OLMo as ``olmo_base`` computes it, then the head at the labels.

    Its weights are those of the transformers model, so that whatever trains, keeps or writes the
    latter knows nothing of it. It needs no mask from outside. ``packs``: rows are laid end to end,
    so that only attention computes padding.
    """

    def __init__(self, native: Transformer, *, packs: bool) -> None:
        self.native = native
        self._packs = packs
        self.context: SplitContext | None = None  # the rows are cut over ranks

    def __call__(
        self, model: nn.Module, batch: Batch, mask: Tensor | None, statistic: str | None = None
    ) -> Tensor:
        """As the other ways."""
        body = model.get_decoder()  # type: ignore[operator]
        self.native.gradient_checkpointing = model.training and body.gradient_checkpointing
        ids_L = batch.label_ids_L
        if self.context is not None:
            hidden_LD, ids_L = self._part_of_rows(batch, self.context)
        elif self._packs:
            assert batch.packing is not None
            positions_L, ids_L = filled(batch.packed_positions()), filled(ids_L)
            hidden_LD = self.native.packed(batch.ids_RT, batch.packing, positions_L)
        else:
            positions_RT, may_attend_RTT = batch.position_ids(), batch.may_attend()
            branches = None
            if positions_RT is not None and may_attend_RTT is not None:
                branches = Branches(positions_RT, may_attend_RTT)
            hidden = self.native(batch.ids_RT, branches=branches)
            hidden_LD = hidden.flatten(0, 1).index_select(0, batch.label_positions_L)
        head = model.get_output_embeddings()  # type: ignore[operator]
        scores_L = head_logprobs(hidden_LD, ids_L, head, MAX_LOGITS, statistic)
        return scores_L[: len(batch.label_ids_L)]

    def _part_of_rows(self, batch: Batch, context: SplitContext) -> tuple[Tensor, Tensor]:
        """Hidden states at the labels that are predicted on this rank, and the ids of those."""
        assert batch.branches_R2 is None
        num_columns = batch.ids_RT.shape[1]
        ids_RT = F.pad(batch.ids_RT, (0, context.padded(num_columns) - num_columns))
        here_P = context.positions(ids_RT.shape[1], ids_RT.device)
        hidden_RPD = self.native(ids_RT[:, here_P], context=context)
        place_T = torch.full_like(ids_RT[0], -1)
        place_T[here_P] = torch.arange(len(here_P), device=place_T.device)
        rows_L = batch.label_positions_L // num_columns
        places_L = place_T[batch.label_positions_L % num_columns]
        is_here_L = places_L >= 0  # choosing by it waits for a GPU
        positions_L = (rows_L * len(here_P) + places_L)[is_here_L]
        hidden_LD = hidden_RPD.flatten(0, 1).index_select(0, positions_L)
        return hidden_LD, batch.label_ids_L[is_here_L]


def native_over(model: Any) -> Transformer | None:
    """Our model over the weights of a transformers OLMo; None for any other model.

    None also under adapters and quantisation, and where a recipe asks for another attention. The
    embedding is transformers' module itself: noise is added there, and padding has no gradient.
    """
    if type(model) not in (OlmoForCausalLM, Olmo2ForCausalLM, Olmo3ForCausalLM):
        return None
    config = model.config
    if (
        getattr(model, "is_quantized", False)
        or config._attn_implementation != "sdpa"
        or config.attention_dropout
    ):
        return None
    try:
        shape = model_config_of(config.to_dict(), "the model's configuration")
    except UserError:
        return None  # something that we do not build
    with torch.device("meta"):
        native = Transformer(shape)
    anything: Any = native
    anything.embed_tokens = model.get_input_embeddings()
    for name, _ in list(native.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(native.get_submodule(module), leaf, model.get_parameter(hf_name(name)))
    return native


Way = Callable[[nn.Module, Batch, Tensor | None, str | None], Tensor]
NATIVE = "the native OLMo, head at the labels"
PACKED = "the native OLMo without padding, head at the labels"
PACKED_HEAD = "head at the labels, without padding"
PACKED_LABELS = "the model's own logits at the labels, without padding"
HEAD_AT_LABELS = "head at the labels"
AT_LABELS = "the model's own logits at the labels"
EVERYWHERE = "the model's own logits at every position"
PACKING_WAYS = (PACKED, PACKED_HEAD, PACKED_LABELS)
WAYS_OF_ROWS: dict[str, Way] = {PACKED_HEAD: packed_then_head, PACKED_LABELS: packed_at_labels}
WAYS: dict[str, Way] = {
    HEAD_AT_LABELS: hidden_then_head,
    AT_LABELS: model_at_labels,
    EVERYWHERE: model_everywhere,
}


# ---------------------------------------------------------------- the module the loop trains


class Wrapped(nn.Module):
    """What the loop trains: a Hugging Face model behind a forward pass that takes a ``Batch``."""

    model: nn.Module

    @property
    def native(self) -> Transformer | None:
        """What computes the layers in place of ``model``, over the same weights; None: itself."""
        return None


class LabelLogprobs(Wrapped):
    """A causal language model whose forward pass is micro-batch -> log-probability of each label.

    A module, so that whatever wraps a model for many ranks wraps this and sees every forward pass.
    ``way`` and ``needs_mask`` were checked against the model's plain forward pass on a probe, and
    so is ``pair_mask`` before rows hold pairs (``share_prompts``).
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        tolerance: float = 1e-3,
        *,
        packs: bool = True,
        longest: int | None = None,
        is_native: bool = True,
        kernel: Kernel | None = None,
    ) -> None:
        """Errors: UserError if no way reproduces the model's own logits.

        ``precision`` opens the context the model computes in (autocast); ``tolerance`` is what its
        rounding may change a log-probability by, in nats, where logits spread over 20. ``packs``:
        leave padding out where the model can. ``longest`` is the longest row that it will read.
        ``is_native``: compute an OLMo's layers by ours. ``kernel``: what attends to rows end to
        end, if it gives what the model's own attention does.
        """
        super().__init__()
        self.model = model
        self._precision = precision
        native = native_over(model) if is_native else None
        self.ways: dict[str, Way] = dict(WAYS)
        self.why_padded: str | None = None if packs else "batching: grouped"
        if native is not None:
            self.ways = {NATIVE: NativeThenHead(native, packs=False), **WAYS}
            if packs:
                self.ways = {PACKED: NativeThenHead(native, packs=True), **self.ways}
        elif packs:
            self.why_padded = why_not_rows(model, longest)
        before = None
        if packs and native is None and self.why_padded is None:
            self.ways = {**WAYS_OF_ROWS, **WAYS}
            before = call_instead(model, NAME)
        self.kernel = kernel if packs else None
        self.wrong_kernel: Kernel | None = None
        self.way, self.needs_mask = find_way(model, precision, tolerance, self.ways, self.kernel)
        if self.kernel is not None and not self.packs:  # or the model cannot, whatever attends
            self.wrong_kernel, self.kernel = self.kernel, None
            self.way, self.needs_mask = find_way(model, precision, tolerance, self.ways, None)
            if not self.packs:
                self.wrong_kernel = None
        if packs and self.why_padded is None and not self.packs:
            self.why_padded = "rows end to end change what the model computes"
        if before is not None and not self.packs:
            call_instead(model, before)
        self.pair_mask: str | None = None

    @property
    def native(self) -> Transformer | None:
        """The OLMo of ``olmo_base``, where its way was found right."""
        way = self.ways[self.way]
        return way.native if isinstance(way, NativeThenHead) else None

    @property
    def packs(self) -> bool:
        """Whether rows are computed without padding, so that unlike lengths cost nothing."""
        return self.way in PACKING_WAYS

    def forward(self, batch: Batch, statistic: str | None = None) -> Tensor:
        """(L,) float32, in the order of ``batch.label_ids_L``.

        With one of ``STATISTICS``: (L, 2), the statistic beside each log-probability.
        """
        mask = padding_mask(batch) if self.needs_mask else None
        batch = attended_by(self.kernel, batch)
        if batch.branches_R2 is not None:
            assert self.pair_mask is not None, "share_prompts was not asked"
            mask = PAIR_MASKS[self.pair_mask](batch)
        with self._precision():
            return self.ways[self.way](self.model, batch, mask, statistic)

    def share_rows(self, context: SplitContext) -> None:
        """Compute a part of every row from now on, and the log-probabilities of its labels only.

        Errors: UserError for a model whose layers are not ours.
        """
        way = self.ways[self.way]
        if not isinstance(way, NativeThenHead):
            raise not_to_be_cut(type(self.model).__name__, self.way)
        way.context = context

    def share_prompts(self, pairs: Examples) -> str | None:
        """Take rows that hold pairs from now on. If it cannot: why, in words.

        Checked on made-up pairs, and on the one of ``pairs`` whose row is the longest.
        """
        found = find_pair_mask(self, pairs)
        self.pair_mask = found if found in PAIR_MASKS else None
        return None if self.pair_mask else found


def not_to_be_cut(model_name: str, way: str) -> UserError:
    """What to tell of a model whose rows no rank can compute a part of."""
    return UserError(
        f"context_parallel cuts a dialogue over processes, and {model_name} is computed by {way}, "
        "which reads it whole. Only an OLMo can be cut, trained without an adapter, with "
        "attn_implementation: sdpa, and not by DeepSpeed. Leave context_parallel out."
    )


def attended_by(kernel: Kernel | None, batch: Batch) -> Batch:
    """The same rows, attended to by ``kernel`` where they lie end to end."""
    if kernel is None or batch.packing is None:
        return batch
    return replace(batch, packing=batch.packing.attended_by(kernel))


def padding_mask(batch: Batch) -> Tensor:
    """1 at tokens, 0 at padding: (R, T), as Hugging Face models take it."""
    positions_T = torch.arange(batch.ids_RT.shape[1], device=batch.ids_RT.device)
    return (positions_T < batch.lengths_R[:, None]).long()


@torch.no_grad()
def find_way(
    model: nn.Module,
    precision: Callable[[], AbstractContextManager[object]],
    tolerance: float,
    ways: dict[str, Way],
    kernel: Kernel | None,
) -> tuple[str, bool]:
    """The cheapest way that equals the model's own logits, and whether it needs a padding mask.

    Models that scale or cap their logits after the head, or whose padding reaches the tokens, are
    found out here on two short rows, whatever their architecture is called.
    """
    probe = attended_by(kernel, _probe(model))
    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as undo:
        undo.callback(model.train, was_training)
        undo.enter_context(precision())
        undo.callback(_amplify_head(model, probe).remove)
        rows = [row[:n] for row, n in zip(probe.ids_RT, probe.lengths_R.tolist(), strict=True)]
        alone = [_plain_logprobs(model, row) for row in rows]
        beginning = _plain_logprobs(model, rows[0][:-3])
        if not torch.allclose(beginning, alone[0][:-3], rtol=0, atol=tolerance):
            raise UserError(
                f"{type(model).__name__} looks at the tokens that it should predict. "
                "Only causal language models can be trained here."
            )
        expected = torch.cat(alone)
        for needs_mask in (False, True):
            mask_RT = padding_mask(probe) if needs_mask else None
            for name, way in ways.items():
                try:
                    found = way(model, probe, mask_RT, None)
                    is_right = torch.allclose(found, expected, rtol=0, atol=tolerance)
                    if is_right and name in PACKING_WAYS:
                        is_right = _keeps_rows_apart(model, way, probe, found)
                except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
                    continue  # a model without that door; the next way asks less of it
                if is_right:
                    return name, needs_mask
    raise UserError(
        f"{type(model).__name__} gives other log-probabilities for a row beside a longer one than "
        "for the row alone, with and without an attention mask, so it cannot be trained in batches."
    )


def _keeps_rows_apart(model: nn.Module, way: Way, probe: Batch, found_L: Tensor) -> bool:
    """Whether either row of the probe can be another one and the other's numbers stay.

    Closer than ``tolerance``: what one row lets through to the other is no matter of rounding.
    """
    vocab_size = vocabulary_size(model.get_output_embeddings())  # type: ignore[operator]
    for changed in (0, 1):
        ids_RT = probe.ids_RT.clone()
        ids_RT[changed] = (ids_RT[changed] + vocab_size // 2) % vocab_size
        others_L = probe.label_sequences_L != changed
        again_L = way(model, replace(probe, ids_RT=ids_RT), None, None)
        if not torch.allclose(again_L[others_L], found_L[others_L], rtol=0, atol=LEAK):
            return False
    return True


LEAK = 1e-4  # nats, where logits spread over 20


def _probe(model: nn.Module) -> Batch:
    """Rows of 9 and 5 tokens spread over the vocabulary, padded with a token that would be seen."""
    vocab_size = vocabulary_size(model.get_output_embeddings())  # type: ignore[operator]
    device = next(model.parameters()).device
    ids_RT = (torch.arange(18, device=device).view(2, 9) * 7919 + 3) % vocab_size
    lengths = [9, 5]
    places = [(row, column) for row in (0, 1) for column in range(1, lengths[row])]
    rows_L = torch.tensor([row for row, _ in places], device=device)
    columns_L = torch.tensor([column for _, column in places], device=device)
    return Batch(
        ids_RT=ids_RT,
        lengths_R=torch.tensor(lengths, device=device),
        label_positions_L=rows_L * 9 + columns_L - 1,
        label_ids_L=ids_RT[rows_L, columns_L],
        label_sequences_L=rows_L,
        examples=torch.tensor([0, 1], device=device),
        num_sequences=2,
        packing=pack(np.array(lengths)).to(device),
    )


def _amplify_head(model: nn.Module, probe: Batch) -> RemovableHandle:
    """Give the head's output a spread of some 20 nats for as long as the hook is there.

    A young model's logits are so small that a cap at 30 leaves them as they are; it would bite
    only after some training, unseen.
    """
    spread = model(input_ids=probe.ids_RT, use_cache=False).logits.float().std()
    factor = float(20.0 / spread.clamp(min=1e-6))
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle: RemovableHandle = head.register_forward_hook(lambda _, __, logits: logits * factor)
    return handle


def _plain_logprobs(model: nn.Module, ids_T: Tensor) -> Tensor:
    """One row by itself through the model's own forward pass: what every way has to equal."""
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
    return id_logprobs(logits_TV, ids_T[1:])


# ---------------------------------------------------------------- two answers behind one prompt


def boolean_mask(batch: Batch) -> Tensor:
    """True where a position may be attended to: (R, 1, T, T)."""
    may_attend_RTT = batch.may_attend()
    assert may_attend_RTT is not None
    return may_attend_RTT[:, None]


def additive_mask(batch: Batch) -> Tensor:
    """What is added to attention's scores, for kernels that do not take True and False."""
    may_attend_R1TT = boolean_mask(batch)
    lowest = torch.finfo(torch.float32).min
    zeros_R1TT = torch.zeros_like(may_attend_R1TT, dtype=torch.float32)
    return zeros_R1TT.masked_fill(~may_attend_R1TT, lowest)


PAIR_MASKS: dict[str, Callable[[Batch], Tensor]] = {
    "boolean": boolean_mask,
    "additive": additive_mask,
}
SHARING_TOLERANCE = 1e-3  # nats, where logits spread over 20: it is checked in the weights' float32


@torch.no_grad()
def find_pair_mask(logprobs: LabelLogprobs, pairs: Examples) -> str:
    """The mask, of ``PAIR_MASKS``, with which two answers share a prompt; or why none does."""
    model: Any = logprobs.model
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        return f"{name} takes no position ids"
    shared = pairs.sharing_prompts()
    longest = int(shared.positions_N.max())
    reach = reach_of(model.config.get_text_config())
    is_windowed = logprobs.way in (NATIVE, PACKED)  # as if the two were apart
    if reach is not None and longest > reach and not is_windowed:
        return f"its attention reaches back {reach:,} tokens, and the longest pair has {longest:,}"
    farthest = [int(shared.positions_N.argmax())]
    made_up = _pair_probe(model)
    was_training = model.training
    model.eval()
    try:
        for mask_name, make_mask in PAIR_MASKS.items():
            if (
                _agree(logprobs, made_up, [0, 1], make_mask)
                # A model in which the answers would not see each other anyway shows nothing.
                and not _agree(logprobs, made_up, [0, 1], make_mask, is_blind=True)
                and _agree(logprobs, pairs, farthest, make_mask)
            ):
                return mask_name
    finally:
        model.train(was_training)
    return f"{name} gives other log-probabilities for two answers behind one prompt"


def _agree(
    logprobs: LabelLogprobs,
    pairs: Examples,
    numbers: list[int],
    make_mask: Callable[[Batch], Tensor],
    is_blind: bool = False,
) -> bool:
    """Whether pairs in shared rows have the log-probabilities that they have in rows of their own.

    ``is_blind``: as if nobody had said where the answers begin.
    """
    model, way = logprobs.model, logprobs.ways[logprobs.way]
    device = next(model.parameters()).device
    apart = pairs.batch(numbers).to(device)
    shared = pairs.sharing_prompts().batch(numbers).to(device)
    if is_blind:
        assert shared.branches_R2 is not None
        nowhere_R2 = torch.full_like(shared.branches_R2, shared.ids_RT.shape[1])
        plain = pack(shared.lengths_R.cpu().numpy()).to(device)
        shared = replace(shared, branches_R2=nowhere_R2, packing=plain)
    handle = _amplify_head(model, apart)
    try:
        apart_L = way(model, apart, padding_mask(apart) if logprobs.needs_mask else None, None)
        shared_L = way(model, shared, make_mask(shared), None)
    except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
        return False  # a model or a kernel that takes no such mask
    finally:
        handle.remove()
    return torch.allclose(shared_L, apart_L, rtol=0, atol=SHARING_TOLERANCE)


def _pair_probe(model: nn.Module) -> Examples:
    """Pairs with 6 and 3 tokens in common, of unlike lengths, so that one row is padded."""
    vocab_size = vocabulary_size(model.get_output_embeddings())  # type: ignore[operator]

    def answered(common: int, length: int, seed: int) -> Encoded:
        prompt = [(place * 7919 + 3) % vocab_size for place in range(common)]
        answer = [(place * 104729 + seed) % vocab_size for place in range(length)]
        return Encoded(prompt + answer, [place >= common for place in range(common + length)])

    return Examples(
        [
            (answered(6, 4, 1), answered(6, 7, 2)),
            (answered(3, 9, 4), answered(3, 2, 5)),
        ]
    )
