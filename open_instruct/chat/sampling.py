"""How the tokens of an answer are drawn: logits -> bias and penalties -> chance -> ids.

R rows of a step, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olmo_base.run.errors import UserError
from open_instruct.chat.token_text import Token

MAX_TOP_LOGPROBS = 20  # as OpenAI's API
CHANCES_AT_ONCE = 32


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Errors: UserError naming the value and what it may be.

    Applied in this order: ``logit_bias`` and the two penalties (on what was generated so far),
    temperature (0 takes the likeliest and ignores the rest), ``top_k`` (0 keeps all), ``top_p``,
    ``min_p`` (a token stays if it has this share of the likeliest one's probability).
    ``logprobs`` are the model's own, before all of these; None leaves them out.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: a new one each time
    logprobs: int | None = None  # how many alternatives to each token

    def __post_init__(self) -> None:
        allowed = (
            ("max_tokens", 1, None),
            ("temperature", 0, 100),
            ("top_k", 0, None),
            ("min_p", 0, 1),
            ("frequency_penalty", -2, 2),
            ("presence_penalty", -2, 2),
            ("logprobs", 0, MAX_TOP_LOGPROBS),
            ("seed", -(2**63), 2**63 - 1),
        )
        for name, low, high in allowed:
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UserError(f"{name} is {value}; it must be {wanted}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which would end every answer at once.")

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty is added to the model's own."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)


# ---------------------------------------------------------------- choosing the next tokens


def choose(logits_RV: Tensor, samplings: Sequence[Sampling], uniform_R: Sequence[float]) -> Tensor:
    """The next id of each row, R. ``uniform_R`` in [0, 1) decides where it is drawn by chance.

    Every operation works on a row by itself, so that a row's choice depends on nothing else.
    """
    greedy: list[int] = []
    plain: list[int] = []
    cut: list[int] = []
    for row, sampling in enumerate(samplings):
        if sampling.temperature == 0:
            greedy.append(row)
        else:
            is_plain = sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
            (plain if is_plain else cut).append(row)
    ids_R = torch.empty(len(samplings), dtype=torch.long, device=logits_RV.device)
    uniform = torch.tensor(uniform_R, device=logits_RV.device)

    def of(rows: list[int], name: str) -> Tensor:
        values = [getattr(samplings[row], name) for row in rows]
        return torch.tensor(values, device=logits_RV.device)[:, None]

    def scaled(rows: list[int]) -> Tensor:
        chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
        return chosen_RV.float() / of(rows, "temperature")

    if greedy:
        ids_R[greedy] = logits_RV[greedy].argmax(-1)
    if plain:
        ids_R[plain] = _inverse_cdf(scaled(plain).softmax(-1), uniform[plain])
    if cut:
        values_RV, order_RV = scaled(cut).sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(values_RV.shape[1], device=values_RV.device)
        top_k_R1 = of(cut, "top_k")
        values_RV = values_RV.masked_fill((top_k_R1 > 0) & (rank_V >= top_k_R1), -torch.inf)
        p_RV = values_RV.softmax(-1)
        top_p_R1 = of(cut, "top_p")
        p_RV = p_RV.masked_fill(
            (top_p_R1 < 1) & (p_RV.cumsum(-1) - p_RV >= top_p_R1)
            | (p_RV < of(cut, "min_p") * p_RV[:, :1]),
            0.0,
        )
        places_R = _inverse_cdf(p_RV, uniform[cut])
        ids_R[cut] = order_RV.gather(-1, places_R[:, None]).squeeze(-1)
    return ids_R


def _inverse_cdf(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The index whose stretch of the cumulated weights holds ``uniform_R``; never a weight of 0."""
    cumulated_RV = weights_RV.cumsum(-1)
    total_R1 = cumulated_RV[:, -1:].contiguous()
    found_R1 = torch.searchsorted(cumulated_RV, uniform_R[:, None] * total_R1, right=True)
    last_R1 = torch.searchsorted(cumulated_RV, total_R1)  # rounding can reach the total
    return found_R1.minimum(last_R1).squeeze(-1)


def penalise(logits_V: Tensor, sampling: Sampling, counts: Counter[int]) -> None:
    """Bias and penalties, in place: logit - frequency_penalty * count - presence_penalty."""
    for id_, bias in sampling.logit_bias:
        logits_V[id_] += bias
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = torch.tensor(list(counts), device=logits_V.device)
        number = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[ids] -= sampling.frequency_penalty * number + sampling.presence_penalty


def chances(seed: int, index: int) -> Iterator[float]:
    """Of answer ``index``, one for each token, as olmo_base's Generator draws them."""
    random = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    while True:
        yield from torch.rand(CHANCES_AT_ONCE, generator=random).tolist()


# ---------------------------------------------------------------- log-probabilities


class Details:
    """Log-probabilities of those rows of a step that asked for them."""

    def __init__(self, logits_RV: Tensor, samplings: Sequence[Sampling]) -> None:
        rows = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        self.places = {row: place for place, row in enumerate(rows)}
        self.numbers = {row: samplings[row].logprobs or 0 for row in rows}
        if rows:
            self.logprobs_RV = logits_RV[rows].float().log_softmax(-1)
            most = max(self.numbers.values())
            self.top_Rk, self.ids_Rk = self.logprobs_RV.topk(max(most, 1), -1)

    def token(self, row: int, id_: int) -> Token:
        """The chosen token of a row."""
        if row not in self.places:
            return Token(id_)
        place, number = self.places[row], self.numbers[row]
        ids = self.ids_Rk[place, :number].tolist()
        logprobs = self.top_Rk[place, :number].tolist()
        logprob = self.logprobs_RV[place, id_].item()
        return Token(id_, logprob, tuple(zip(ids, logprobs, strict=True)))
