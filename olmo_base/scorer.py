"""Log-likelihood of given text under any causal model: ours or Hugging Face's.

Requests (context ids, continuation ids) -> rows that share what they can -> batches of like length
-> logits at continuation positions only -> scores in the order asked.

The options of a question stand side by side behind one copy of their context, each blind to the
others (a tree, not a text), and what many questions begin with is run once. Models that cannot
read trees (flash attention) read each option as a text of its own that goes on from the kept
beginning; those that cannot do that either (recurrence) read whole texts.

N scored positions of a batch, M tokens asked for, V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from olmo_base.reading import (
    NOTHING,
    Prefix,
    context_length,
    logits_of,
    row_outputs,
    run_prefix,
    sharing,
    text_config,
)
from olmo_base.scored_rows import MIN_SHARED, Request, Row, batches, by_prefix, fit, shared_rows

# Logits of one batch, in numbers: 2**24 are 64 MiB in fp32. A single longer row is let through.
# A GPU wants long batches.
MAX_LOGITS = 2**24
MAX_LOGITS_GPU = 2**28
# Logits that are summed at once. On a CPU 2**19 are 2 MiB, which stay in its caches; fewer than
# MIN_BLOCK columns make slow products.
BLOCK_LOGITS = 2**19
BLOCK_LOGITS_GPU = 2**26
MIN_BLOCK = 1024


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    ``logprob`` is the sum over its tokens, in nats; ``is_greedy`` says whether each of its tokens
    was the likeliest. ``num_cut`` counts context tokens left out because the model's context is
    too short for them.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    token_logprobs: tuple[float, ...] = field(repr=False, default=())
    num_cut: int = 0


# ---------------------------------------------------------------- the scores


@torch.inference_mode()
def continuation_logprobs(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 8192,
    pad_id: int = 0,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_scored: Callable[[dict[int, Score]], None] | None = None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context, in the order asked.

    ``requests`` are (context ids, continuation ids), neither empty. ``batch_tokens`` bounds the
    padded tokens of a batch; neither it nor the order changes a score beyond rounding (1e-5 in
    fp32). ``max_length`` is what the model can read (its own length if None); longer contexts
    lose their beginning, and ``Score.num_cut`` says how much. ``on_progress`` is told the number
    of requests done, ``on_scored`` the scores of each batch by the number of their request.
    Errors: ValueError for an empty side or a continuation that cannot fit.
    """
    limit = max_length or context_length(model)
    fitted = [fit(request, limit, number) for number, request in enumerate(requests)]
    kept = [request for request, _ in fitted]
    most = MAX_LOGITS_GPU if next(model.parameters()).is_cuda else MAX_LOGITS
    max_scored = most // int(text_config(model).vocab_size)
    was_training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    can_share = len(kept) > 1 and any(len(context) >= MIN_SHARED for context, _ in kept)
    may = sharing(model) if can_share else NOTHING
    for beginning, rows in by_prefix(shared_rows(kept, may.trees), may.prefixes):
        prefix = run_prefix(model, beginning, for_trees=may.trees) if beginning else None
        for batch in batches(rows, len(beginning), batch_tokens, max_scored):
            found = {
                number: Score(
                    logprob=sum(logprobs),
                    num_tokens=len(logprobs),
                    is_greedy=is_greedy,
                    token_logprobs=tuple(logprobs),
                    num_cut=fitted[number][1],
                )
                for number, logprobs, is_greedy in _read_batch(model, batch, kept, pad_id, prefix)
            }
            scores |= found
            if on_scored is not None:
                on_scored(found)
            if on_progress is not None:
                on_progress(len(scores))
    model.train(was_training)
    return [scores[number] for number in range(len(requests))]


def _read_batch(
    model: nn.Module,
    batch: Sequence[Row],
    requests: Sequence[Request],
    pad_id: int,
    prefix: Prefix | None,
) -> list[tuple[int, list[float], bool]]:
    """Run one batch; for each of its requests the number, token log-probabilities, greediness."""
    outputs_N, place_BT = row_outputs(model, batch, pad_id, prefix)
    skipped = 0 if prefix is None else prefix.length
    readings = [(b, number, at) for b, row in enumerate(batch) for number, at in row.readings]
    # A position may serve several requests: M tokens asked for, at n_M among the N positions.
    rows_M = torch.tensor([b for b, _, at in readings for _ in at])
    positions_M = torch.tensor([place - skipped for _, _, at in readings for place in at])
    n_M = place_BT[rows_M, positions_M].to(outputs_N.device)
    targets = [token for _, number, _ in readings for token in requests[number][1]]
    targets_M = torch.tensor(targets, device=outputs_N.device)
    found_M = _target_logprobs(model, outputs_N, n_M, targets_M)
    logprobs_M, is_likeliest_M = (part.tolist() for part in found_M)
    found = []
    first = 0
    for _, number, at in readings:
        last = first + len(at)
        found.append((number, logprobs_M[first:last], all(is_likeliest_M[first:last])))
        first = last
    return found


def _target_logprobs(
    model: nn.Module, outputs_N: Tensor, n_M: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at its position, and whether it is the likeliest there.

    The vocabulary is gone through in blocks of w ids, C in all, so that logits stay in the
    processor's caches: they are read four times. Of equal logits the first is the likeliest.
    """
    vocab_size = int(text_config(model).vocab_size)
    most = BLOCK_LOGITS_GPU if outputs_N.is_cuda else BLOCK_LOGITS
    width = max(MIN_BLOCK, most // len(outputs_N))
    order_M = targets_M.argsort()
    starts_C = torch.arange(0, vocab_size, width, device=targets_M.device)
    begins = [*torch.searchsorted(targets_M[order_M], starts_C).tolist(), len(targets_M)]
    target_M = torch.empty(len(targets_M), device=outputs_N.device)
    is_first_M = torch.zeros(len(targets_M), dtype=torch.bool, device=outputs_N.device)
    largest, sums = [], []
    for block, first in enumerate(range(0, vocab_size, width)):
        logits_Nw = logits_of(model, outputs_N, first, min(first + width, vocab_size))
        largest_N = logits_Nw.amax(-1)
        asked_m = order_M[begins[block] : begins[block + 1]]  # whose target is in this block
        if len(asked_m):
            logits_mw, place_m = logits_Nw[n_M[asked_m]], targets_M[asked_m] - first
            target_M[asked_m] = logits_mw.gather(-1, place_m[:, None]).squeeze(-1)
            is_first_M[asked_m] = logits_mw.argmax(-1) == place_m
        sums.append(logits_Nw.sub_(largest_N[:, None]).exp_().sum(-1))
        largest.append(largest_N)
    largest_NC, sums_NC = torch.stack(largest, -1), torch.stack(sums, -1)
    largest_N = largest_NC.amax(-1)
    rest_N = sums_NC.mul_((largest_NC - largest_N[:, None]).exp_()).sum(-1).log()
    is_in_best_M = largest_NC.argmax(-1)[n_M] == targets_M // width
    return target_M - largest_N[n_M] - rest_N[n_M], is_first_M & is_in_best_M


def rolling_windows(ids: Sequence[int], *, prefix_id: int, max_length: int) -> list[Request]:
    """Cut a document into requests that predict each of its tokens exactly once.

    Windows do not overlap: each is read after one token of context (``prefix_id`` for the first),
    and only the last, shorter one is filled up with earlier text. These are lm-eval's windows
    with a context length of 1, so that perplexities can be compared.
    """
    windows: list[Request] = []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        if start == 0:
            context: Sequence[int] = [prefix_id]
        else:
            context = ids[end - max_length - 1 : start]
        windows.append((context, ids[start:end]))
    return windows


def rolling_logprobs(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    prefix_id: int,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    pad_id: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The log-likelihood of whole documents of any length, from disjoint windows.

    ``on_progress`` is told the number of windows done. Errors: ValueError for an empty document,
    or a model that does not say its length where ``max_length`` is None.
    """
    limit = max_length or context_length(model)
    if limit is None:
        raise ValueError("the model's configuration names no context length: give max_length")
    windows = [rolling_windows(ids, prefix_id=prefix_id, max_length=limit) for ids in documents]
    if not all(windows):
        raise ValueError(f"document {windows.index([])} is empty")
    scores = iter(
        continuation_logprobs(
            model,
            [window for parts in windows for window in parts],
            batch_tokens=batch_tokens,
            pad_id=pad_id,
            max_length=limit,
            on_progress=on_progress,
        )
    )
    return [document_score([next(scores) for _ in parts]) for parts in windows]


def document_score(windows: Sequence[Score]) -> Score:
    """The score of a document from those of its windows."""
    return Score(
        logprob=sum(score.logprob for score in windows),
        num_tokens=sum(score.num_tokens for score in windows),
        is_greedy=all(score.is_greedy for score in windows),
        token_logprobs=tuple(item for score in windows for item in score.token_logprobs),
    )


def rolling_logprob(
    model: nn.Module,
    ids: Sequence[int],
    *,
    prefix_id: int,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    pad_id: int = 0,
) -> Score:
    """``rolling_logprobs`` of one document."""
    (score,) = rolling_logprobs(
        model,
        [ids],
        prefix_id=prefix_id,
        max_length=max_length,
        batch_tokens=batch_tokens,
        pad_id=pad_id,
    )
    return score
