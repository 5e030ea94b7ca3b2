"""Log-likelihood of given text under any causal model: ours or Hugging Face's.

Requests (context ids, continuation ids) -> rows that share what they can -> batches of like length
-> logits at continuation positions only -> scores in the order asked.

B rows, T positions, N scored positions of a batch, V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from olmo_base.model.transformer import Transformer

# Logits of one batch, in numbers; 2**26 are 256 MiB in fp32. A single longer row is let through.
MAX_LOGITS = 2**26

Request = tuple[Sequence[int], Sequence[int]]


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


# ---------------------------------------------------------------- one interface over both models


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config if isinstance(model, Transformer) else config.get_text_config()


def context_length(model: nn.Module) -> int | None:
    """How many positions the model can read; None where its configuration does not say."""
    config = _text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None


def logits_at(model: nn.Module, ids_BT: Tensor, is_scored_BT: Tensor) -> Tensor:
    """Logits_NV, in fp32, at the positions marked in ``is_scored_BT``, row after row.

    Rows are padded on the right: a causal model cannot see what stands behind a position, so no
    mask is needed. The head runs on the N positions only.
    """
    if isinstance(model, Transformer):
        return model.logits(model(ids_BT)[is_scored_BT]).float()
    hugging_face: Any = model
    head: nn.Module = hugging_face.get_output_embeddings()

    def keep_scored(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][is_scored_BT][None], *arguments[1:])

    # Narrowing the head's input, rather than calling the head ourselves, keeps whatever a model
    # does to its logits afterwards (Gemma's cap, Granite's and Cohere's scale).
    hook = head.register_forward_pre_hook(keep_scored)
    try:
        logits_NV: Tensor = hugging_face(input_ids=ids_BT, use_cache=False).logits[0]
        return logits_NV.float()
    finally:
        hook.remove()


# ---------------------------------------------------------------- from requests to rows


@dataclass
class _Row:
    """Ids to run once, and the requests that are read off them: (request, first position)."""

    ids: tuple[int, ...]
    readings: list[tuple[int, int]]

    def num_scored(self, requests: Sequence[Request]) -> int:
        return sum(len(requests[request][1]) for request, _ in self.readings)


def _fit(request: Request, max_length: int | None, number: int) -> tuple[Request, int]:
    """The request with its context cut on the left to what the model can read."""
    context, continuation = request
    if not context or not continuation:
        empty = "context" if not context else "continuation"
        raise ValueError(
            f"request {number} has an empty {empty}: scoring needs at least one token of each "
            "(put the end-of-text token before a text that has no context)"
        )
    if max_length is None:
        return request, 0
    room = max_length + 1 - len(continuation)  # the last token is predicted, never read
    if room < 1:
        raise ValueError(
            f"request {number} has a continuation of {len(continuation)} tokens and the model "
            f"reads {max_length}: score it with rolling_logprobs"
        )
    num_cut = max(0, len(context) - room)
    return (context[num_cut:], continuation), num_cut


def _shared_rows(requests: Sequence[Request]) -> list[_Row]:
    """Rows such that each request is read off one of them, longest first.

    A request needs the logits of context + continuation[:-1]. Equal inputs run once (one-token
    options such as A, B, C, D), and so do inputs that are the beginning of another one.
    """
    inputs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        ids = (*context, *continuation[:-1])
        inputs.setdefault(ids, []).append((number, len(context) - 1))
    rows: list[_Row] = []
    for ids in sorted(inputs, reverse=True):  # an input's extensions come right before it
        if rows and rows[-1].ids[: len(ids)] == ids:
            rows[-1].readings += inputs[ids]
        else:
            rows.append(_Row(ids, inputs[ids]))
    return sorted(rows, key=lambda row: (-len(row.ids), row.ids))


def _batches(
    rows: Sequence[_Row], requests: Sequence[Request], batch_tokens: int, vocab_size: int
) -> Iterator[list[_Row]]:
    """Consecutive rows within the budget of padded tokens and of logits."""
    batch: list[_Row] = []
    num_scored = 0
    for row in rows:
        more = row.num_scored(requests)
        is_full = batch and (
            len(batch[0].ids) * (len(batch) + 1) > batch_tokens
            or (num_scored + more) * vocab_size > MAX_LOGITS
        )
        if is_full:
            yield batch
            batch, num_scored = [], 0
        batch.append(row)
        num_scored += more
    if batch:
        yield batch


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
) -> list[Score]:
    """The log-likelihood of each continuation after its context, in the order asked.

    ``requests`` are (context ids, continuation ids), neither empty. ``batch_tokens`` bounds the
    padded tokens of a batch; neither it nor the order changes a score beyond rounding (1e-5 in
    fp32). ``max_length`` is what the model can read (its own length if None); longer contexts
    lose their beginning, and ``Score.num_cut`` says how much. ``on_progress`` is told the number
    of requests done. Errors: ValueError for an empty side or a continuation that cannot fit.
    """
    limit = max_length or context_length(model)
    fitted = [_fit(request, limit, number) for number, request in enumerate(requests)]
    kept = [request for request, _ in fitted]
    vocab_size = int(_text_config(model).vocab_size)
    was_training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    for batch in _batches(_shared_rows(kept), kept, batch_tokens, vocab_size):
        for number, logprobs, is_greedy in _read_batch(model, batch, kept, pad_id):
            scores[number] = Score(
                logprob=sum(logprobs),
                num_tokens=len(logprobs),
                is_greedy=is_greedy,
                token_logprobs=tuple(logprobs),
                num_cut=fitted[number][1],
            )
        if on_progress is not None:
            on_progress(len(scores))
    model.train(was_training)
    return [scores[number] for number in range(len(requests))]


def _read_batch(
    model: nn.Module, batch: Sequence[_Row], requests: Sequence[Request], pad_id: int
) -> list[tuple[int, list[float], bool]]:
    """Run one batch; for each of its requests the number, token log-probabilities, greediness."""
    device = next(model.parameters()).device
    ids_BT = torch.full((len(batch), len(batch[0].ids)), pad_id)
    is_scored_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    readings = []  # (row, first position, request)
    for b, row in enumerate(batch):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        for number, start in row.readings:
            is_scored_BT[b, start : start + len(requests[number][1])] = True
            readings.append((b, start, number))
    logits_NV = logits_at(model, ids_BT.to(device), is_scored_BT.to(device))
    # A position may serve several requests: M tokens asked for, at n_M among the N positions.
    place_BT = is_scored_BT.flatten().cumsum(0).view(is_scored_BT.shape) - 1
    n_M = torch.cat([place_BT[b, t : t + len(requests[r][1])] for b, t, r in readings]).to(device)
    targets_M = torch.tensor([token for _, _, r in readings for token in requests[r][1]]).to(device)
    logprobs_M = (logits_NV[n_M, targets_M] - logits_NV.logsumexp(-1)[n_M]).tolist()
    is_likeliest_M = (logits_NV.argmax(-1)[n_M] == targets_M).tolist()
    found = []
    first = 0
    for _, _, number in readings:
        last = first + len(requests[number][1])
        found.append((number, logprobs_M[first:last], all(is_likeliest_M[first:last])))
        first = last
    return found


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
    documents_scores = []
    for parts in windows:
        found = [next(scores) for _ in parts]
        documents_scores.append(
            Score(
                logprob=sum(score.logprob for score in found),
                num_tokens=sum(score.num_tokens for score in found),
                is_greedy=all(score.is_greedy for score in found),
                token_logprobs=tuple(item for score in found for item in score.token_logprobs),
            )
        )
    return documents_scores


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
