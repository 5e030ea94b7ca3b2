"""One model asked one task: questions in, rows of samples/<model>/<task>.jsonl out.

Every kind of question has a function here. Only they know what a model is given, token by token.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from eval.answers import is_correct
from eval.questions import BLOCK_CHARACTERS, Choice, Document, Item, Question
from eval.scores import is_right
from eval.tasks import PASS_AT, Task
from olmo_base.model.generate import Generator, load_generator
from olmo_base.run.artefact import resolve_model
from olmo_base.run.errors import UserError
from olmo_base.scorer import Request, Score, context_length, continuation_logprobs, rolling_logprobs
from open_instruct.encode import ChatEncoder, load_chat_encoder, load_chat_tokenizer
from open_instruct.examples import Message
from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.code import pass_at_k
from open_instruct.verifiers.verdict import Verdict

OnProgress = Callable[[float], None]  # told how many questions of the task are done
WINDOW_WITHOUT_LIMIT = 2048  # for architectures that could read on for ever; as in lm-eval
# No beginning or end is added, control tokens are spelt out, and texts may be of any length.
AS_TEXT: dict[str, Any] = {
    "add_special_tokens": False,
    "split_special_tokens": True,
    "verbose": False,
}
FIRST_ROUND = 64  # tokens, before an answer is looked at for texts that end it
MAX_ROUNDS = 64  # more than any length needs, as rounds double
EXCERPT = 200  # characters of a block of text kept in its sample


@dataclass
class Subject:
    """A model that can be asked: weights, tokenizer, and its chat template if it has one."""

    generator: Generator
    tokenizer: PreTrainedTokenizerFast
    encoder: ChatEncoder | None
    window: int  # tokens that a log-likelihood may look at
    batch_tokens: int
    batch_size: int

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

        In those that a chat template has written (``is_templated``) it is the token.
        """
        found = self.tokenizer(list(texts), **AS_TEXT | {"split_special_tokens": not is_templated})
        return [list(ids) for ids in found.input_ids]

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
    return Subject(
        generator=generator,
        tokenizer=tokenizer,
        encoder=encoder,
        window=context_length(generator.model) or WINDOW_WITHOUT_LIMIT,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
    )


def ask(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda done: None,
) -> list[dict[str, Any]]:
    """The sample rows of a task, in the order of its questions.

    ``max_new_tokens`` replaces the task's own limit; ``seed`` decides answers that are drawn by
    chance. Rows of questions that do not fit the model's context carry ``not_fitting``.
    """
    if task.kind in ("exact_match", "verified"):
        questions = [item for item in items if isinstance(item, Question)]
        limit = max_new_tokens or task.max_new_tokens
        if task.kind == "verified":
            return _solve(subject, task, questions, limit, seed, on_progress)
        return _answer(subject, task, questions, limit, on_progress)
    if task.kind == "perplexity":
        documents = [item for item in items if isinstance(item, Document)]
        return _predict(subject, documents, on_progress)
    choices = [item for item in items if isinstance(item, Choice)]
    return _choose(subject, task, choices, on_progress)


def _cluster(item: Question | Choice) -> dict[str, str]:
    """The key of a sample that names what its question shares with others, if anything."""
    return {} if item.cluster is None else {"cluster": item.cluster}


# ---------------------------------------------------------------- answers in words


def plain_prompt(task: Task, question: Question) -> str:
    """The question as a base model reads it; earlier turns stand before it as examples do."""
    parts: list[str] = []
    for turn in question.messages:
        if turn["role"] == "assistant":
            parts[-1] += f" {turn['content']}"
        elif turn["role"] == "system":
            parts.append(turn["content"])
        else:
            parts.append(task.plain_prompt.replace("{prompt}", turn["content"]))
    return "\n\n".join(parts)


def _answer(
    subject: Subject,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    if subject.encoder is not None:
        prompts = [subject.encoder.encode_prompt(item.messages) for item in questions]
        stops = set(subject.encoder.end_of_turn_ids)
    else:
        plain = [plain_prompt(task, item) for item in questions]
        prompts = [subject.prefix_ids + ids for ids in subject.encode(plain)]
        stops = _newline_ids(subject.tokenizer)  # a base model's answer is one line
    fitting = [n for n, ids in enumerate(prompts) if len(ids) < subject.generator.max_length]
    fitting.sort(key=lambda n: (-len(prompts[n]), n))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(fitting), subject.batch_size):
        batch = fitting[start : start + subject.batch_size]
        found = subject.generator.generate(
            [prompts[n] for n in batch], max_new_tokens=max_new_tokens, stop_token_ids=stops
        )
        answers |= dict(zip(batch, found, strict=True))
        on_progress(len(answers) + len(questions) - len(fitting))
    rows = []
    for number, item in enumerate(questions):
        row: dict[str, Any] = {
            "doc_id": item.doc_id,
            "category": item.category,
            **_cluster(item),
            "question": item.messages[-1]["content"],
            "prompt": subject.decode(prompts[number]),
            "target": list(item.targets),
        }
        if number not in answers:
            rows.append(row | {"answer": None, "correct": False, "not_fitting": True})
            continue
        ids = answers[number]
        answer = subject.decode(ids, skip_special_tokens=True)
        is_cut = len(ids) == max_new_tokens or (
            len(prompts[number]) + len(ids) == subject.generator.max_length
        )
        if subject.encoder is None:
            line, line_break, _ = answer.partition("\n")
            answer, is_cut = line, is_cut and not line_break
        rows.append(
            row
            | {
                "answer": answer,
                "correct": is_correct(answer, list(item.targets), task.answer_rule),
                "num_answer_tokens": len(ids),
                "is_cut": is_cut,
            }
        )
    return rows


def _newline_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Every token that begins with a line break, and so ends the answer before it."""
    singles = [[token_id] for token_id in range(len(tokenizer))]
    texts = tokenizer.backend_tokenizer.decode_batch(singles, skip_special_tokens=False)
    return {n for n, text in enumerate(texts) if text.lstrip(" \t").startswith("\n")}


# ---------------------------------------------------------------- answers that are verified


def _solve(
    subject: Subject,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
    seed: int,
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    assert task.verifier is not None
    judge = VERIFIERS[task.verifier].judge
    encoder = subject.encoder
    if encoder is not None:
        dialogues = [_chat_turns(task, item) for item in questions]
        prompts = [encoder.encode_prompt(messages) for messages in dialogues]
        stop_ids = set(encoder.end_of_turn_ids)
    else:
        plain = [plain_prompt(task, item) for item in questions]
        prompts = [subject.prefix_ids + ids for ids in subject.encode(plain)]
        stop_ids = set()
    stop_texts = task.stop if encoder is None else ()  # a chat model ends its turn itself
    writer = _Writer(subject, max_new_tokens, task.temperature, stop_ids, stop_texts)
    fitting = [n for n, ids in enumerate(prompts) if len(ids) < subject.generator.max_length]
    answers: dict[int, list[Written]] = {}
    if task.temperature == 0.0:
        fitting.sort(key=lambda n: (-len(prompts[n]), n))
        for start in range(0, len(fitting), subject.batch_size):
            batch = fitting[start : start + subject.batch_size]
            found = writer.write([prompts[n] for n in batch], seed)
            answers |= {n: [written] for n, written in zip(batch, found, strict=True)}
            on_progress(len(answers))
    else:
        for n in fitting:  # one by one: what is drawn depends on the place in a batch
            answers[n] = writer.write([prompts[n]] * task.num_samples, seed + n * MAX_ROUNDS)
            on_progress(len(answers))
    judged = _judged(judge, questions, answers, lambda: on_progress(len(questions)))
    rows = []
    for number, item in enumerate(questions):
        row: dict[str, Any] = {
            "doc_id": item.doc_id,
            "category": item.category,
            "question": item.messages[-1]["content"],
            "prompt": subject.decode(prompts[number]),
            "target": list(item.targets),
        }
        written, verdicts = answers.get(number, []), judged[number]
        scores = {
            metric: _mean_score(metric, verdicts) if written else 0.0 for metric in task.metrics
        }
        row |= {
            "answer": written[0].text if written else None,
            "found": verdicts[0].found,
            "scores": scores,
            "num_parts": verdicts[0].num_parts,
            "correct": scores[task.main_metric] == 1.0,
            "num_answer_tokens": sum(one.num_tokens for one in written),
            "is_cut": any(one.is_cut for one in written),
        }
        if len(written) > 1:
            row["answers"] = [one.text for one in written]
        rows.append(row if written else row | {"not_fitting": True})
    return rows


def _judged(
    judge: Callable[[str, Any], Verdict],
    questions: Sequence[Question],
    answers: dict[int, list["Written"]],
    check_for_stop: Callable[[], None],
) -> list[list[Verdict]]:
    """Verdicts on the answers to each question; on nothing where there is none.

    Several at once, as programs under test take seconds of their own.
    """
    pairs = [
        (number, one.text, item.truth)
        for number, item in enumerate(questions)
        for one in answers.get(number) or [Written("", 0, False)]
    ]
    verdicts: list[list[Verdict]] = [[] for _ in questions]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            waiting = [(number, pool.submit(judge, text, truth)) for number, text, truth in pairs]
            for number, future in waiting:
                verdicts[number].append(future.result())
                check_for_stop()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return verdicts


def _chat_turns(task: Task, question: Question) -> list[Message]:
    """The question and the examples before it, each of the user's turns put as the task says."""
    form = task.chat_prompt or "{prompt}"
    return [
        {"role": turn["role"], "content": form.replace("{prompt}", turn["content"])}
        if turn["role"] == "user"
        else turn
        for turn in question.messages
    ]


def _mean_score(metric: str, verdicts: Sequence[Verdict]) -> float:
    """Over the answers to one question; pass@k over all choices of k of them."""
    if metric.startswith(PASS_AT):
        num_passed = sum(verdict.scores["pass_at_1"] == 1.0 for verdict in verdicts)
        return pass_at_k(len(verdicts), num_passed, int(metric[len(PASS_AT) :]))
    return sum(verdict.scores[metric] for verdict in verdicts) / len(verdicts)


@dataclass(frozen=True)
class Written:
    """One answer."""

    text: str
    num_tokens: int
    is_cut: bool  # it would have gone on


@dataclass(frozen=True)
class _Writer:
    """Writes answers that end at a token, at a text, or at the limit."""

    subject: Subject
    max_new_tokens: int
    temperature: float
    stop_ids: set[int]
    stop_texts: tuple[str, ...]

    def write(self, prompts: Sequence[list[int]], seed: int) -> list[Written]:
        """The answers to prompts that are read together.

        A text to stop at may span tokens, so answers are written in rounds, each as long as all
        before it; only those that have not come to such a text go on.
        """
        generator = self.subject.generator
        answers: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        size = FIRST_ROUND if self.stop_texts else self.max_new_tokens
        for round_number in range(MAX_ROUNDS):
            # All that go on have written the same number of tokens.
            asked = min(size, self.max_new_tokens - len(answers[going[0]]))
            found = generator.generate(
                [prompts[n] + answers[n] for n in going],
                max_new_tokens=asked,
                temperature=self.temperature,
                seed=seed + round_number,
                stop_token_ids=self.stop_ids,
            )
            for n, ids in zip(going, found, strict=True):
                answers[n] += ids
            going = [
                n
                for n, ids in zip(going, found, strict=True)
                if len(ids) == asked and not self._is_full(prompts[n], answers[n])
                if self._end(self._text(answers[n])) is None
            ]
            if not going:
                break
            size = len(answers[going[0]])
        return [self._written(*pair) for pair in zip(prompts, answers, strict=True)]

    def _written(self, prompt: list[int], ids: list[int]) -> Written:
        text = self._text(ids)
        end = self._end(text)
        return Written(text[:end], len(ids), end is None and self._is_full(prompt, ids))

    def _is_full(self, prompt: list[int], ids: list[int]) -> bool:
        room = self.subject.generator.max_length - len(prompt)
        return len(ids) >= min(self.max_new_tokens, room)

    def _text(self, ids: list[int]) -> str:
        return self.subject.decode(ids, skip_special_tokens=True)

    def _end(self, text: str) -> int | None:
        """Where the first text to stop at begins."""
        places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        return min(places, default=None)


# ---------------------------------------------------------------- the likeliest option


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


def _choose(
    subject: Subject, task: Task, choices: Sequence[Choice], on_progress: OnProgress
) -> list[dict[str, Any]]:
    pairs: list[tuple[str, str]] = []
    for item in choices:
        pairs += zip(item.contexts, item.options, strict=True)
        if item.unconditional_contexts is not None:
            pairs += zip(item.unconditional_contexts, item.options, strict=True)
    requests = encode_pairs(subject, pairs)
    fits = [len(continuation) <= subject.window for _, continuation in requests]
    per_question = len(choices) / max(1, sum(fits))
    found = iter(
        continuation_logprobs(
            subject.model,
            [request for request, is_fitting in zip(requests, fits, strict=True) if is_fitting],
            batch_tokens=subject.batch_tokens,
            pad_id=subject.start_id,
            max_length=subject.window,
            on_progress=lambda done: on_progress(done * per_question),
        )
    )
    scores = iter([next(found) if is_fitting else None for is_fitting in fits])
    metric = task.judging_metric
    rows = []
    for item in choices:
        given: list[Score | None] = [next(scores) for _ in item.options]
        alone: list[Score | None] = [None] * len(item.options)
        if item.unconditional_contexts is not None:
            alone = [next(scores) for _ in item.options]
        row: dict[str, Any] = {
            "doc_id": item.doc_id,
            "category": item.category,
            **_cluster(item),
            "question": item.question,
            "prompt": item.contexts[item.gold],
            "target": item.options[item.gold],
            "gold": item.gold,
            "options": [
                {
                    "text": text,
                    "logprob": None if score is None else score.logprob,
                    "logprob_alone": None if by_itself is None else by_itself.logprob,
                    "num_tokens": 0 if score is None else score.num_tokens,
                }
                for text, score, by_itself in zip(item.options, given, alone, strict=True)
            ],
        }
        if None in given:
            row["not_fitting"] = True
        row["context_cut"] = any(score is not None and score.num_cut > 0 for score in given)
        rows.append(row | {"correct": is_right(row, metric)})
    return rows


# ---------------------------------------------------------------- text predicted


def _predict(
    subject: Subject, documents: Sequence[Document], on_progress: OnProgress
) -> list[dict[str, Any]]:
    encoded = subject.tokenizer(
        [document.text for document in documents],
        return_offsets_mapping=True,
        **AS_TEXT,
    )
    num_windows = sum(-(-len(ids) // subject.window) for ids in encoded.input_ids)
    scores = rolling_logprobs(
        subject.model,
        encoded.input_ids,
        prefix_id=subject.start_id,
        max_length=subject.window,
        batch_tokens=subject.batch_tokens,
        pad_id=subject.start_id,
        on_progress=lambda done: on_progress(done * len(documents) / num_windows),
    )
    rows = []
    for document, score, offsets in zip(documents, scores, encoded["offset_mapping"], strict=True):
        text = document.text
        num_blocks = -(-len(text) // BLOCK_CHARACTERS)
        logprobs, num_tokens, num_words = ([0.0] * num_blocks, [0] * num_blocks, [0] * num_blocks)
        for logprob, (start, _) in zip(score.token_logprobs, offsets, strict=True):
            block = min(start, len(text) - 1) // BLOCK_CHARACTERS
            logprobs[block] += logprob
            num_tokens[block] += 1
        for word in re.finditer(r"\S+", text):
            num_words[word.start() // BLOCK_CHARACTERS] += 1
        for block in range(num_blocks):
            piece = text[block * BLOCK_CHARACTERS : (block + 1) * BLOCK_CHARACTERS]
            rows.append(
                {
                    "doc_id": f"{document.doc_id}:{block}",
                    "prompt": "",
                    "target": piece[:EXCERPT],
                    "logprob": logprobs[block],
                    "num_tokens": num_tokens[block],
                    "num_bytes": len(piece.encode()),
                    "num_words": num_words[block],
                    "correct": None,
                }
            )
    return rows
