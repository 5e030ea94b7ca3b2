"""One model asked one task: questions in, rows of samples/<model>/<task>.jsonl out.

Every kind of question has a function here. Only they know what a model is given, token by token.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from eval.answers import is_correct
from eval.items import BLOCK_CHARACTERS, Choice, Document, Item, Question
from eval.judge import Judge, ask_judged
from eval.scores import is_right
from eval.solving import named, plain_prompt, question_row, solve
from eval.subject import AS_TEXT, OnProgress, Subject, encode_pairs
from eval.tasks import IN_WORDS, Task
from olmo_base.scored_rows import Request
from olmo_base.scorer import Score

EXCERPT = 200  # characters of a block of text kept in its sample


def ask(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    on_progress: OnProgress = lambda done: None,
) -> list[dict[str, Any]]:
    """The sample rows of a task, in the order of its questions.

    ``max_new_tokens`` replaces the task's own limit; ``seed`` decides answers that are drawn by
    chance. Rows of questions that do not fit the model's context carry ``not_fitting``.
    """
    if task.kind in IN_WORDS:
        questions = [item for item in items if isinstance(item, Question)]
        limit = max_new_tokens or task.max_new_tokens
        if task.kind == "verified":
            return solve(subject, task, questions, limit, seed, on_progress)
        if task.kind == "judged":
            assert judge is not None
            return ask_judged(subject, task, questions, judge, limit, seed, on_progress)
        return _answer(subject, task, questions, limit, on_progress)
    if task.kind == "perplexity":
        documents = [item for item in items if isinstance(item, Document)]
        return _predict(subject, documents, on_progress)
    choices = [item for item in items if isinstance(item, Choice)]
    return _choose(subject, task, choices, on_progress)


# ---------------------------------------------------------------- answers in words


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
    found = subject.answers(
        [prompts[n] for n in fitting],
        max_new_tokens=max_new_tokens,
        stop_token_ids=sorted(stops),
        on_progress=lambda done: on_progress(done + len(questions) - len(fitting)),
    )
    answers = dict(zip(fitting, found, strict=True))
    rows = []
    for number, item in enumerate(questions):
        row = question_row(subject, item, prompts[number])
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


# ---------------------------------------------------------------- the likeliest option


def _option_requests(
    subject: Subject, choices: Sequence[Choice]
) -> tuple[list[Request], list[str]]:
    """What is asked, and the prompt of each choice, for people.

    The options of each choice, and after them those without the question where there are some.
    """
    pairs: list[tuple[str, str]] = []
    for item in choices:
        pairs += zip(item.contexts, item.options, strict=True)
        if item.unconditional_contexts is not None:
            pairs += zip(item.unconditional_contexts, item.options, strict=True)
    if not any(item.messages for item in choices):
        return encode_pairs(subject, pairs), [item.contexts[item.gold] for item in choices]
    assert subject.encoder is not None  # the harness has asked for it
    options = iter(subject.encode([option for _, option in pairs]))
    requests: list[Request] = []
    prompts = []
    for item in choices:
        context = subject.encoder.encode_prompt(item.messages)
        prompts.append(subject.decode(context))
        requests += [(context, next(options)) for _ in item.options]
    return requests, prompts


def _choose(
    subject: Subject, task: Task, choices: Sequence[Choice], on_progress: OnProgress
) -> list[dict[str, Any]]:
    requests, prompts = _option_requests(subject, choices)
    fits = [len(continuation) <= subject.window for _, continuation in requests]
    per_question = len(choices) / max(1, sum(fits))
    found = iter(
        subject.logprobs(
            [request for request, is_fitting in zip(requests, fits, strict=True) if is_fitting],
            on_progress=lambda done: on_progress(done * per_question),
        )
    )
    scores = iter([next(found) if is_fitting else None for is_fitting in fits])
    metric = task.judging_metric
    rows = []
    for item, prompt in zip(choices, prompts, strict=True):
        given: list[Score | None] = [next(scores) for _ in item.options]
        alone: list[Score | None] = [None] * len(item.options)
        if item.unconditional_contexts is not None:
            alone = [next(scores) for _ in item.options]
        row: dict[str, Any] = {
            **named(item),
            "question": item.question,
            "prompt": prompt,
            "target": item.options[item.gold],
            "gold": item.gold,
            **({"golds": list(item.golds)} if item.golds else {}),
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
    scores = subject.document_logprobs(encoded.input_ids, on_progress=on_progress)
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
