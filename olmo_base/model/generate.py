"""Answers from a model, token by token: ours with its own cache, any other through transformers.

A folder -> a Generator -> rows of a batch, decoded together -> ids. Prompts and answers are lists
of token ids; the words are the caller's business (``Generator.tokenizer``).

B rows still being decoded, T positions, V vocabulary.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_base.model.decode import (
    Decoder,
    LaidOutDecoder,
    LaidOutWeights,
    NativeDecoder,
    TransformersDecoder,
    identity_of,
    is_fast_alone,
)
from olmo_base.model.hf_weights import is_native, load_native
from olmo_base.model.transformer import Transformer
from olmo_base.run.artefact import (
    adapter_base,
    adapter_vocabulary,
    refuse_changed_base,
    resolve_model,
)
from olmo_base.run.errors import UserError
from olmo_base.run.launch import pick_device

MAX_ROWS = 64  # prompts decoded together; more wins little on a CPU and costs cache
# Numbers that a step's logits hold on a CPU: 8 MiB, 41 rows of OLMo's vocabulary.
MAX_STEP_LOGITS = 2**21
PREFILL_TOKENS = 1024  # of prompts read at once on a CPU, which gains nothing from more
MIN_PREFIX = 32  # tokens that all prompts begin with, from which on they are run once
MIN_PREFIX_ROWS = 4
GROUP = 128  # logits of which the largest is found at once


# ---------------------------------------------------------------- choosing the next token


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest and ignores the rest.

    Applied in transformers' order: temperature, then ``top_k`` (0 keeps all), then ``top_p`` (the
    fewest tokens that together have at least this probability), then ``min_p`` (those that have at
    least this part of the likeliest one's probability).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (no limit) or more.")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}; it must be between 0 (no limit) and 1.")


def next_ids(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """The next id of each row; ``uniform_B`` in [0, 1) decides it where it is drawn by chance."""
    if sampling.temperature == 0.0:
        return likeliest(logits_BV)
    assert uniform_B is not None
    scaled_BV = logits_BV.float() / sampling.temperature
    vocab_size = scaled_BV.shape[-1]
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return _inverse_cdf(scaled_BV.softmax(-1), uniform_B)
    # The k likeliest, likeliest first
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    values_Bk, ids_Bk = scaled_BV.topk(top_k, dim=-1)
    probabilities_Bk = values_Bk.softmax(-1)
    if sampling.top_p < 1.0:
        before_Bk = probabilities_Bk.cumsum(-1) - probabilities_Bk
        probabilities_Bk = probabilities_Bk.masked_fill(before_Bk >= sampling.top_p, 0.0)
    if sampling.min_p > 0.0:
        least_B1 = sampling.min_p * probabilities_Bk[:, :1]
        probabilities_Bk = probabilities_Bk.masked_fill(probabilities_Bk < least_B1, 0.0)
    return ids_Bk.gather(-1, _inverse_cdf(probabilities_Bk, uniform_B)[:, None]).squeeze(-1)


def likeliest(logits_BV: Tensor) -> Tensor:
    """``argmax`` of each row, the first of equals.

    On a CPU argmax looks at one number after the other, a maximum at sixteen: of groups of
    numbers first the maxima, then the place in the best group, takes a tenth of its time.
    """
    size = logits_BV.shape[-1]
    whole = size - size % GROUP
    if logits_BV.device.type != "cpu" or whole < GROUP**2:
        return logits_BV.argmax(-1)
    groups_BGg = logits_BV[:, :whole].unflatten(-1, (-1, GROUP))
    best_B = groups_BGg.amax(-1).argmax(-1)
    best_Bg = groups_BGg[torch.arange(len(best_B)), best_B]
    found_B = best_B * GROUP + best_Bg.argmax(-1)
    if whole == size:
        return found_B
    rest_B, place_B = logits_BV[:, whole:].max(-1)
    return torch.where(rest_B > best_Bg.amax(-1), whole + place_B, found_B)


def _inverse_cdf(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The index whose stretch of the cumulated weights holds ``uniform_B``; never one of weight 0.

    Unlike torch.multinomial this gives a row the same draw whoever shares the batch with it.
    """
    cumulated_BV = weights_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulated_BV[:, -1:]
    # Rounding can bring the target up to the total: then it is the last index of any weight.
    last_B = (cumulated_BV < cumulated_BV[:, -1:]).sum(-1)
    return torch.searchsorted(cumulated_BV, target_B1, right=True).squeeze(-1).minimum(last_B)


# ---------------------------------------------------------------- where an answer ends


class StopRule:
    """The ids and the strings that end an answer.

    Strings are looked for in what a reader sees, not inside the names of special tokens; the whole
    name of one stands for that token.
    """

    def __init__(
        self, token_ids: frozenset[int], strings: tuple[str, ...], tokenizer: Any = None
    ) -> None:
        """``tokenizer`` is needed for strings only. Errors: UserError for an empty string."""
        if "" in strings:
            raise UserError("A stop string is empty; every answer would end at once. Remove it.")
        self.token_ids = token_ids
        self.strings = strings
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items() if strings else ()
        self._special = {id_: item.content for id_, item in added if item.special}
        # A token has a byte at least; a few more, for the first may be cut inside a character.
        self._num_kept = 4 + max((len(string.encode()) for string in strings), default=0)

    def is_complete(self, tail: list[int], token: int) -> bool:
        """Whether ``token`` completes a stop string; ``tail`` is what the answer ended with.

        The token is added to the tail.
        """
        if not self.strings:
            return False
        if token in self._special:
            return self._special[token] in self.strings
        tail.append(token)
        del tail[: -self._num_kept]
        text = self._text(tail)
        return any(string in text for string in self.strings)

    def _text(self, ids: list[int]) -> str:
        # Once a token: transformers' wrapper takes four times as long as what it wraps.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return str(backend.decode(ids, skip_special_tokens=True))
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def before_stop(text: str, stop_strings: Iterable[str]) -> str:
    """What stands before the first of the stop strings; the whole text if it holds none."""
    starts = [start for string in stop_strings if (start := text.find(string)) >= 0]
    return text[: min(starts, default=len(text))]


# ---------------------------------------------------------------- the generator


class Generator:
    """One interface over the native model and any causal language model of transformers.

    An answer holds neither the prompt nor the token that ended it. It ends at a token of
    ``eos_token_ids`` or ``stop_token_ids``, after ``max_new_tokens``, or where prompt and answer
    together reach ``max_length``, whichever comes first. It also ends with the token that completes
    one of ``stop_strings``; that token belongs to the answer, since the string may begin in the
    middle of a token: ``before_stop`` cuts the text.

    Greedy answers do not depend on which prompts share a batch (but for the rounding of a tie), and
    sampled ones only on the prompt, the seed and the prompt's place in ``prompts``.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Iterable[int],
        max_length: int,
        source: str | Path | None = None,
    ) -> None:
        """``model``: a Transformer or a transformers model; ``source``: where its tokenizer is."""
        self.model = model
        self.eos_token_ids = set(eos_token_ids)
        self.max_length = max_length
        self.source = None if source is None else str(source)
        self.is_native = isinstance(model, Transformer)
        config = model.config if self.is_native else model.config.get_text_config(decoder=True)
        self.vocab_size: int = config.vocab_size
        # Recurrent models let padding in: their prompts are read together if of equal length.
        self.can_pad = self.is_native or (
            "position_ids" in inspect.signature(model.forward).parameters
        )
        pad_id = getattr(config, "pad_token_id", None)  # a transformers config may lack it
        self._laid_out_identity: tuple[tuple[int, int], ...] = ()
        self._laid_out_weights: dict[bool, LaidOutWeights] = {}  # by whether they are for one row
        self.pad_id: int = min(self.eos_token_ids, default=0) if pad_id is None else pad_id

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a transformers PreTrainedTokenizerFast.

        Errors: UserError if the model has none.
        """
        if self.source is None:
            raise UserError("This model was given without a folder, so it has no tokenizer.")
        from transformers import AutoTokenizer  # heavy; callers that bring ids do not need it

        if Path(self.source).is_dir() and not _has_tokenizer(Path(self.source)):
            raise UserError(
                f"{self.source} has no tokenizer (tokenizer.json). "
                "Copy the tokenizer files of the model it came from."
            )
        return AutoTokenizer.from_pretrained(self.source)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
        places: Sequence[int] | None = None,
        max_rows: int = MAX_ROWS,
        on_answer: Callable[[int, list[int]], None] = lambda index, ids: None,
    ) -> list[list[int]]:
        """An answer for each prompt, in their order.

        The longest prompts come first; when half of the ``max_rows`` rows have ended, others take
        their places. ``places`` replaces the prompts' own (0, 1, …) in what decides a sampled
        answer. ``on_answer`` is told each answer, and its prompt's index, as it ends.

        Errors: UserError for an empty or too long prompt, an unknown id, or a value out of range.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, min_p)
        self._check(prompts, max_new_tokens)
        stop = self._stop_rule(stop_token_ids, stop_strings)
        answers: list[list[int]] = [[] for _ in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        queue = {index: prompts[index] for index in longest_first}
        decoded = self._decode(queue, max_new_tokens, sampling, stop, places, max_rows)
        for index, token in decoded:
            if token is None:
                on_answer(index, answers[index])
            else:
                answers[index].append(token)
        return answers

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> Iterator[int]:
        """The answer that ``generate`` gives to this prompt alone, each id as soon as it is known.

        Bad values are refused when it is called, not at the first id. Errors: as ``generate``.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, min_p)
        self._check([prompt], max_new_tokens)
        stop = self._stop_rule(stop_token_ids, stop_strings)
        decoded = self._decode({0: prompt}, max_new_tokens, sampling, stop)
        return (token for _, token in decoded if token is not None)

    def _stop_rule(self, token_ids: Iterable[int], strings: Sequence[str]) -> StopRule:
        tokenizer = self.tokenizer if strings else None
        return StopRule(frozenset(self.eos_token_ids | set(token_ids)), tuple(strings), tokenizer)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        for number, prompt in enumerate(prompts, start=1):
            which = f"Prompt {number} of {len(prompts)}" if len(prompts) > 1 else "The prompt"
            if len(prompt) == 0:
                raise UserError(f"{which} is empty; a model goes on from at least one token.")
            if len(prompt) >= self.max_length:
                raise UserError(
                    f"{which} has {len(prompt)} tokens; this model can hold {self.max_length}, the "
                    "answer included. Shorten the prompt."
                )
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                wrong = next(id_ for id_ in prompt if not 0 <= id_ < self.vocab_size)
                raise UserError(
                    f"{which} holds the id {wrong}; the model's vocabulary has {self.vocab_size}. "
                    "Use the tokenizer that the model was made with."
                )

    @torch.inference_mode()
    def _decode(
        self,
        prompts: dict[int, Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: StopRule,
        places: Sequence[int] | None = None,
        max_rows: int = 1,
    ) -> Iterator[tuple[int, int | None]]:
        """(key of the prompt, its next id or None at its end), step by step for all rows."""
        tails: dict[int, list[int]] = {key: [] for key in prompts}
        limits = {
            key: min(max_new_tokens, self.max_length - len(prompt))
            for key, prompt in prompts.items()
        }
        uniforms = {
            key: _uniforms(limit, sampling.seed, key if places is None else places[key])
            for key, limit in limits.items()
            if sampling.temperature > 0.0
        }
        steps = dict.fromkeys(prompts, 0)
        if self.model.device.type == "cpu":
            max_rows = min(max_rows, max(1, MAX_STEP_LOGITS // self.vocab_size))
        prefix = self._run_prefix(list(prompts.values()))
        waiting, keys = list(prompts), list[int]()
        decoder: Decoder | None = None
        logits: list[Tensor] = []  # after the last token of each row, as they were made
        while waiting or keys:
            room = max_rows - len(keys)
            if decoder is not None and keys and (2 * len(keys) > max_rows or not decoder.can_join):
                room = 0
            while waiting and room > 0:
                num_rows = min(max_rows, len(keys) + len(waiting))
                entering = self._entering(waiting[:room], prompts, prefix)
                waiting = waiting[len(entering) :]
                new = self._new_decoder([prompts[key] for key in entering], prefix, num_rows)
                new_BV = new.prefill()
                if not new_BV.isfinite().all():
                    raise UserError(
                        "The model's logits are not finite numbers: its weights are damaged, or "
                        "its training diverged. Use an earlier checkpoint."
                    )
                if decoder is None or not keys:
                    decoder, logits = new, [new_BV]
                else:
                    decoder.join(new)
                    logits.append(new_BV)
                del new, new_BV
                keys += entering
                room = room - len(entering) if decoder.can_join else 0
            chances: Sequence[Tensor | None] = [None] * len(logits)
            if uniforms:
                drawn_B = torch.tensor([uniforms[key][steps[key]] for key in keys])
                chances = drawn_B.to(logits[0].device).split([len(part_BV) for part_BV in logits])
            pairs = zip(logits, chances, strict=True)
            ids_B = torch.cat([next_ids(part_BV, sampling, part_B) for part_BV, part_B in pairs])
            del pairs
            logits = []  # their memory is the next step's
            kept = []
            for row, (key, token) in enumerate(zip(keys, ids_B.tolist(), strict=True)):
                steps[key] += 1
                if token not in stop.token_ids:
                    yield key, token
                    if steps[key] < limits[key] and not stop.is_complete(tails[key], token):
                        kept.append(row)
                        continue
                yield key, None
            rows = _fill_holes(kept)
            assert decoder is not None
            if kept and len(kept) < len(keys):
                decoder.keep_rows(rows)
            keys = [keys[row] for row in rows]
            if kept:
                logits = [decoder.step(ids_B[rows])]

    def _entering(
        self, waiting: list[int], prompts: dict[int, Sequence[int]], prefix: Decoder | None
    ) -> list[int]:
        """Those of the waiting, longest first, whose prompts are read at once."""
        if not self.can_pad:
            length = len(prompts[waiting[0]])
            return [key for key in waiting if len(prompts[key]) == length]
        may_join = prefix is not None or (self.is_native and set(self.model.windows) == {None})
        if self.model.device.type != "cpu" or not may_join:
            return waiting
        num_shared = 0 if prefix is None else prefix.prompt_ids_BT.shape[1]
        width = len(prompts[waiting[0]]) - num_shared
        return waiting[: max(1, PREFILL_TOKENS // width)]

    def _new_decoder(
        self, prompts: Sequence[Sequence[int]], prefix: Any = None, num_rows: int = 1
    ) -> Decoder:
        """``num_rows``: how many rows there will be with those that join it."""
        if not isinstance(self.model, Transformer):
            return TransformersDecoder(self.model, prompts, self.pad_id, prefix)
        if is_fast_alone(self.model):
            return LaidOutDecoder(self.model, prompts, self._laid_out(num_rows), prefix)
        return NativeDecoder(self.model, prompts, prefix)

    def _run_prefix(self, prompts: Sequence[Sequence[int]]) -> Decoder | None:
        """What all prompts begin with, read once; None where that is little or cannot be shared."""
        if len(prompts) < MIN_PREFIX_ROWS:
            return None
        least, most = min(map(list, prompts)), max(map(list, prompts))
        length = min(map(len, prompts)) - 1  # of each prompt something is left to read
        while least[:length] != most[:length]:
            length -= 1
        if length < MIN_PREFIX:
            return None
        prefix: Decoder
        if isinstance(self.model, Transformer):
            prefix = NativeDecoder(self.model, [least[:length]])
        else:
            prefix = TransformersDecoder(self.model, [least[:length]], self.pad_id)
        prefix.prefill()
        return prefix if prefix.can_join else None

    def _laid_out(self, num_rows: int) -> LaidOutWeights:
        """The weights laid out for one row or for several; anew where they were changed."""
        identity, is_one = identity_of(self.model), num_rows == 1
        if self._laid_out_identity != identity:
            self._laid_out_identity, self._laid_out_weights = identity, {}
        if is_one not in self._laid_out_weights:
            self._laid_out_weights[is_one] = LaidOutWeights(self.model, num_rows)
        return self._laid_out_weights[is_one]


def _uniforms(number: int, seed: int, index: int) -> list[float]:
    """The chances of one row: they depend on the seed and its place only."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    return torch.rand(number, generator=generator).tolist()


def _fill_holes(kept: list[int]) -> list[int]:
    """The kept rows, moved as little as possible: the last ones take the places of those gone."""
    size = len(kept)
    staying = {row for row in kept if row < size}
    moving = [row for row in kept if row >= size]
    return [row if row in staying else moving.pop() for row in range(size)]


# ---------------------------------------------------------------- from a folder


def load_generator(
    folder_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Generator:
    """A generator for a model folder or hub name: native for OLMo-1 to 3, transformers' otherwise.

    An adapter is put on its base and merged into it, in memory.

    ``device`` None takes a GPU if there is one; ``dtype`` None keeps what the weights are saved in;
    ``trust_remote_code`` runs Python code that the folder brings.
    Errors: UserError if it is no model, no causal language model, or lacks weights.
    """
    folder = resolve_model(str(folder_or_name))
    target = pick_device() if device is None else torch.device(device)
    eos_token_ids = end_token_ids(folder)
    model: Any
    base = adapter_base(folder)
    if base is not None:
        model = _load_adapter(folder, base, target, dtype, trust_remote_code)
        max_length = context_length(model.config.get_text_config(decoder=True))
    elif is_native(folder):
        model = load_native(folder, device=target, dtype=dtype)
        max_length = model.config.max_position_embeddings
    else:
        model = _load_with_transformers(folder, target, dtype, trust_remote_code)
        max_length = context_length(model.config.get_text_config(decoder=True))
    return Generator(model, eos_token_ids=eos_token_ids, max_length=max_length, source=folder)


def end_token_ids(folder: Path) -> set[int]:
    """The tokens at which a model folder says that generation ends."""
    config = _read_if_there(folder / "config.json")
    generation = _read_if_there(folder / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return {eos} if isinstance(eos, int) else set(eos or ())


def _load_with_transformers(
    folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM  # heavy, and only for other architectures
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand in the middle of a chat or a report
    load: Any = AutoModelForCausalLM.from_pretrained  # its type does not know of the report
    try:
        model, report = load(
            folder,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{folder} cannot be opened as a causal language model: {first_line}"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, the first being "
            f"{missing[0]}; they would be random. Copy or download the folder again."
        )
    return model.to(device).eval()


def _load_adapter(
    folder: Path, base: str, device: torch.device, dtype: torch.dtype | None, trust: bool
) -> Any:
    refuse_changed_base(folder, base)
    model = _load_with_transformers(resolve_model(base), device, dtype, trust)
    if adapter_vocabulary(folder) > model.get_input_embeddings().num_embeddings:
        # The adapter brings the new rows.
        model.resize_token_embeddings(adapter_vocabulary(folder), mean_resizing=False)
    try:
        # transformers' own way starts DoRA's magnitudes anew (5.23)
        from peft import PeftModel
    except ImportError:
        raise UserError(
            f"{folder} is an adapter. Adapters need the package peft: "
            "pip install 'open-instruct[adapters]'."
        ) from None
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"The adapter in {folder} cannot be put on {base}: {first_line}") from None
    return adapted.merge_and_unload(safe_merge=True).eval()


def context_length(config: Any) -> int:
    """Positions a transformers model can hold; architectures without a limit get a large one."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        limit = getattr(config, name, None)  # each architecture has its own word for it
        if isinstance(limit, int) and limit > 0:
            return limit
    return 2**20


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in names)


def _read_if_there(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    return content if isinstance(content, dict) else {}
