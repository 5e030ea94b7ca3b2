"""A model that can be asked: text -> token ids -> log-probabilities and answers, each only once.

What was computed before comes from the cache, what is left is dealt out to the processes of the
launch, and everything is kept as soon as it is known.
"""

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from eval.cache import RequestCache, request_key
from eval.ranks import gathered, num_ranks, rank, share
from olmo_base.model.generate import Generator, Sampling, load_generator
from olmo_base.reading import context_length
from olmo_base.run.artefact import resolve_model
from olmo_base.run.errors import UserError
from olmo_base.scored_rows import Request
from olmo_base.scorer import Score, continuation_logprobs, document_score, rolling_windows
from open_instruct.encode import ChatEncoder, load_chat_encoder, load_chat_tokenizer

OnProgress = Callable[[float], None]  # told how many questions of the task are done
Keep = Callable[[dict[int, Any]], None]  # told values as soon as they are known, by their number
WINDOW_WITHOUT_LIMIT = 2048  # for architectures that could read on for ever; as in lm-eval
MIN_COMMON = 200  # characters that texts begin with, from which on they are tokenised once
MIN_ALIKE = 4  # texts
# No beginning or end is added, control tokens are spelt out, and texts may be of any length.
AS_TEXT: dict[str, Any] = {
    "add_special_tokens": False,
    "split_special_tokens": True,
    "verbose": False,
}


@dataclass
class Subject:
    """A model that can be asked: weights, tokenizer, and its chat template if it has one."""

    generator: Generator
    tokenizer: PreTrainedTokenizerFast
    encoder: ChatEncoder | None
    window: int  # tokens that a log-likelihood may look at
    batch_tokens: int
    batch_size: int
    cache: RequestCache | None = None
    # How much work its questions were: requests computed and found in the cache, and tokens.
    spent: Counter[str] = field(default_factory=Counter)

    @property
    def model(self) -> Any:
        """The native Transformer or the Hugging Face model inside."""
        return self.generator.model

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What this tokenizer puts before every text: the beginning-of-text token, or nothing."""
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        return [bos] if adds_bos else []

    @property
    def start_id(self) -> int:
        """What stands before a text that has nothing before it."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise UserError(
            "The tokenizer names neither a beginning-of-text nor an end-of-text token, so a text "
            "without context cannot be scored. Add eos_token to its tokenizer_config.json."
        )

    def encode(self, texts: Sequence[str], *, is_templated: bool = False) -> list[list[int]]:
        """Ids of plain texts, in which a control token that is spelt out is ordinary characters.

        In those that a chat template has written (``is_templated``) it is the token. What many
        texts begin with (examples) is read once.
        """
        alike: dict[str, list[int]] = {}
        for number, text in enumerate(texts):
            alike.setdefault(text[:MIN_COMMON], []).append(number)
        beginnings: dict[int, tuple[list[int], int]] = {}  # ids, and the characters they stand for
        for members in alike.values():
            common = _common_beginning([texts[number] for number in members])
            if len(members) >= MIN_ALIKE and len(common) >= MIN_COMMON:
                cut = self._safe_cut(common)
                (ids,) = self._encode([common[:cut]], is_templated)
                beginnings |= dict.fromkeys(members, (ids, cut))
        rests = [text[beginnings.get(n, ([], 0))[1] :] for n, text in enumerate(texts)]
        found = self._encode(rests, is_templated)
        return [beginnings[n][0] + ids if n in beginnings else ids for n, ids in enumerate(found)]

    @functools.cached_property
    def cuts_words(self) -> bool:
        """Whether the tokenizer is byte-level BPE that adds nothing to a text."""
        backend = self.tokenizer.backend_tokenizer
        # What each part says of itself: the whole would be read with its vocabulary.
        normalizer, before = (
            {} if part is None else json.loads(part.__getstate__())
            for part in (backend.normalizer, backend.pre_tokenizer)
        )
        steps = before.get("pretokenizers", [before])
        return (
            isinstance(backend.model, BPE)
            and normalizer in ({}, {"type": "NFC"})
            and {step.get("type") for step in steps} <= {"ByteLevel", "Split", "Digits"}
            and steps[-1].get("type") == "ByteLevel"
            and not steps[-1].get("add_prefix_space")
        )

    def _encode(self, texts: list[str], is_templated: bool) -> list[list[int]]:
        found = self.tokenizer(texts, **AS_TEXT | {"split_special_tokens": not is_templated})
        return [list(ids) for ids in found.input_ids]

    def _safe_cut(self, text: str) -> int:
        """Where a text can be cut, whatever follows it, and its parts tokenised apart; 0: nowhere.

        Byte-level BPE first cuts a text into words, each of which is a text to itself. Its rules
        look no further than one character behind a word, so all but the last words stand.
        """
        backend = self.tokenizer.backend_tokenizer
        if not self.cuts_words or not unicodedata.is_normalized("NFC", text):
            return 0
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        reach = max(map(len, added), default=0)
        words = backend.pre_tokenizer.pre_tokenize_str(text)
        for _, (start, _) in reversed(words[:-3]):
            around = text[max(0, start - reach + 1) : start + reach - 1]
            is_clear = not any(token in around for token in added if len(token) > 1)
            is_plain = text[start].isascii() and not text[start - 1].isspace()
            if start > 0 and start + reach <= len(text) and is_clear and is_plain:
                return int(start)
        return 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids as exactly the characters they stand for."""
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def as_prompt(self, ids: list[int]) -> list[int]:
        """The ids of a text as a model reads it: begun as this tokenizer begins every text."""
        return ids if self.prefix_ids == ids[:1] else self.prefix_ids + ids

    # ------------------------------------------------------------ what the model says

    def logprobs(
        self,
        requests: Sequence[Request],
        *,
        has_tokens: bool = False,
        on_progress: OnProgress = lambda done: None,
    ) -> list[Score]:
        """The log-likelihood of each continuation after its context; see continuation_logprobs.

        That of each of its tokens only with ``has_tokens``.
        """
        settings = {"window": self.window, "has_tokens": has_tokens}
        keys = [request_key("logprob", request, settings) for request in requests]
        self.spent["prompt_tokens"] += sum(len(context) for context, _ in requests)
        self.spent["answer_tokens"] += sum(len(continuation) for _, continuation in requests)

        def compute(numbers: Sequence[int], keep: Keep) -> None:
            def keep_scores(found: dict[int, Score]) -> None:
                left_out = {} if has_tokens else {"token_logprobs": ()}
                keep({numbers[n]: vars(score) | left_out for n, score in found.items()})

            continuation_logprobs(
                self.model,
                [requests[n] for n in numbers],
                batch_tokens=self.batch_tokens,
                pad_id=self.start_id,
                max_length=self.window,
                on_scored=keep_scores,
            )

        lengths = [len(context) + len(continuation) for context, continuation in requests]
        values = self._through_cache(keys, lengths, compute, on_progress)
        return [
            Score(**value | {"token_logprobs": tuple(value["token_logprobs"])}) for value in values
        ]

    def document_logprobs(
        self, documents: Sequence[Sequence[int]], *, on_progress: OnProgress = lambda done: None
    ) -> list[Score]:
        """The log-likelihood of whole documents, none of them empty; see rolling_windows."""
        windows = [
            rolling_windows(ids, prefix_id=self.start_id, max_length=self.window)
            for ids in documents
        ]
        flat = [window for parts in windows for window in parts]
        per_document = len(documents) / max(1, len(flat))
        found = iter(
            self.logprobs(
                flat, has_tokens=True, on_progress=lambda done: on_progress(done * per_document)
            )
        )
        return [document_score([next(found) for _ in parts]) for parts in windows]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        places: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        on_progress: OnProgress = lambda done: None,
    ) -> list[list[int]]:
        """The answer to each prompt as ids; see Generator.generate. Greedy without ``sampling``.

        What is drawn for an answer depends on its prompt, the seed and its place (its number among
        the prompts, if not said), whatever else is asked.
        """
        drawn = sampling is not None and sampling.temperature > 0
        places = range(len(prompts)) if places is None else places
        settings = {
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": sorted(stop_token_ids),
            "stop_strings": list(stop_strings),
            "sampling": asdict(sampling) if drawn and sampling is not None else None,
        }
        keys = [
            request_key("answer", [prompt], settings | ({"place": place} if drawn else {}))
            for prompt, place in zip(prompts, places, strict=True)
        ]

        def compute(numbers: Sequence[int], keep: Keep) -> None:
            self.generator.generate(
                [prompts[n] for n in numbers],
                max_new_tokens=max_new_tokens,
                stop_token_ids=stop_token_ids,
                stop_strings=stop_strings,
                places=[places[n] for n in numbers],
                max_rows=self.batch_size,
                on_answer=lambda index, ids: keep({numbers[index]: ids}),
                **(asdict(sampling) if sampling is not None else {}),
            )

        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        found = self._through_cache(keys, lengths, compute, on_progress)
        self.spent["prompt_tokens"] += sum(map(len, prompts))
        self.spent["answer_tokens"] += sum(map(len, found))
        return found

    def _through_cache(
        self,
        keys: Sequence[str],
        weights: Sequence[int],
        compute: Callable[[Sequence[int], Keep], None],
        on_progress: OnProgress,
    ) -> list[Any]:
        """The value of each key. ``compute`` is given the numbers of those that nobody knows yet.

        ``weights`` says how long each takes, so that the processes have equal shares.
        """
        first: dict[str, int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        known = {} if self.cache is None else {k: self.cache[k] for k in first if k in self.cache}
        # Each process reads the cache when it starts, so they may know different things.
        unknown = gathered({first[key]: True for key in first if key not in known})
        missing = sorted(unknown)
        mine = [missing[n] for n in share([weights[n] for n in missing], rank(), num_ranks())]
        values: dict[int, Any] = {}

        def keep(found: dict[int, Any]) -> None:
            values.update(found)
            if self.cache is not None:
                self.cache.add({keys[number]: value for number, value in found.items()})
            done = len(first) - len(missing) + len(values) / max(1, len(mine)) * len(missing)
            on_progress(done * len(keys) / len(first))

        if mine:
            compute(mine, keep)
        by_key = known | {keys[number]: value for number, value in gathered(values).items()}
        self.spent["computed"] += len(missing)
        self.spent["reused"] += len(first) - len(missing)
        on_progress(len(keys))
        return [by_key[key] for key in keys]


def _common_beginning(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)  # all others lie between them
    length = next(
        (place for place, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least)
    )
    return least[:length]


def load_encoders(model: str) -> tuple[PreTrainedTokenizerFast, ChatEncoder | None]:
    """A model folder's tokenizer, and its chat template if it has one. Errors: UserError."""
    folder = resolve_model(model)
    tokenizer = load_chat_tokenizer(folder)
    return tokenizer, load_chat_encoder(folder) if tokenizer.chat_template else None


def load_subject(
    model: str, *, batch_tokens: int, batch_size: int, dtype: torch.dtype | None = None
) -> Subject:
    """Load a model folder. Errors: UserError, among them for a folder without tokenizer."""
    tokenizer, encoder = load_encoders(model)
    generator = load_generator(model, dtype=dtype)
    generator.tokenizer = tokenizer  # its own would be loaded a second time
    return Subject(
        generator=generator,
        tokenizer=tokenizer,
        encoder=encoder,
        window=context_length(generator.model) or WINDOW_WITHOUT_LIMIT,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
    )


def encode_pairs(
    subject: Subject, pairs: Sequence[tuple[str, str]], *, is_templated: bool = False
) -> list[Request]:
    """(context, continuation) texts as ids, split the way lm-eval splits them.

    Both are tokenised as one text; blanks at the end of a context belong to the continuation.
    Where a token would span the boundary, each side is tokenised by itself. (There lm-eval loses
    the characters in between.)
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encode = functools.partial(subject.encode, is_templated=is_templated)
    ids_of = dict(zip(contexts, encode(contexts), strict=True))
    wholes = encode([context + continuation for context, continuation in moved])
    requests: list[Request] = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        before = ids_of[context]
        after = whole[len(before) :]
        if whole[: len(before)] != before or not after:
            (after,) = encode([continuation])
        requests.append((subject.as_prompt(before) or [subject.start_id], after))
    return requests
