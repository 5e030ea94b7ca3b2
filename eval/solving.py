"""Answers in words: the prompts that ask for them, and those that a verifier judges."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from eval.items import Choice, Question
from eval.ranks import is_first
from eval.subject import OnProgress, Subject
from eval.tasks import PASS_AT, Task
from olmo_base.model.generate import Sampling, before_stop
from open_instruct.examples import Message
from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.code import pass_at_k
from open_instruct.verifiers.verdict import Verdict


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


def chat_turns(task: Task, question: Question) -> list[Message]:
    """The question and the examples before it, each of the user's turns put as the task says."""
    form = task.chat_prompt or "{prompt}"
    return [
        {"role": turn["role"], "content": form.replace("{prompt}", turn["content"])}
        if turn["role"] == "user"
        else turn
        for turn in question.messages
    ]


@dataclass(frozen=True)
class Written:
    """One answer."""

    text: str
    num_tokens: int
    is_cut: bool  # it would have gone on


def named(item: Question | Choice) -> dict[str, Any]:
    """The keys of a sample that say which question it is, and what that shares with others."""
    cluster = {} if item.cluster is None else {"cluster": item.cluster}
    return {"doc_id": item.doc_id, "category": item.category, **cluster}


def question_row(subject: Subject, item: Question, prompt: list[int]) -> dict[str, Any]:
    """The sample of a question that is answered in words, before its answer."""
    return {
        **named(item),
        "question": item.messages[-1]["content"],
        "prompt": subject.decode(prompt),
        "target": list(item.targets),
    }


def write_answers(
    subject: Subject,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
    seed: int,
    on_progress: OnProgress,
) -> tuple[list[list[int]], dict[int, list[Written]]]:
    """The prompt of each question as ids, and by their numbers the answers to those that fit."""
    encoder = subject.encoder
    if encoder is not None:
        dialogues = [chat_turns(task, item) for item in questions]
        prompts = [encoder.encode_prompt(messages) for messages in dialogues]
        stop_ids = set(encoder.end_of_turn_ids)
    else:
        plain = [plain_prompt(task, item) for item in questions]
        prompts = [subject.prefix_ids + ids for ids in subject.encode(plain)]
        stop_ids = set()
    stops = task.stop if encoder is None else ()  # a chat model ends its turn itself
    fitting = [n for n, ids in enumerate(prompts) if len(ids) < subject.generator.max_length]
    copies = [(n, copy) for n in fitting for copy in range(task.num_samples)]
    found = subject.answers(
        [prompts[n] for n, _ in copies],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(task.temperature, seed=seed),
        # By the question's number in its file, so that a limit does not change what is drawn.
        places=[int(questions[n].doc_id) * task.num_samples + copy for n, copy in copies],
        stop_token_ids=sorted(stop_ids),
        stop_strings=stops,
        on_progress=lambda done: on_progress(done / task.num_samples),
    )
    answers: dict[int, list[Written]] = {}
    for (n, _), ids in zip(copies, found, strict=True):
        room = min(max_new_tokens, subject.generator.max_length - len(prompts[n]))
        text = subject.decode(ids, skip_special_tokens=True)
        kept = before_stop(text, stops)
        is_cut = len(ids) >= room and kept == text
        answers.setdefault(n, []).append(Written(kept, len(ids), is_cut))
    return prompts, answers


def solve(
    subject: Subject,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
    seed: int,
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    """The sample rows of a verified task."""
    assert task.verifier is not None
    judge = VERIFIERS[task.verifier].judge
    prompts, answers = write_answers(subject, task, questions, max_new_tokens, seed, on_progress)
    if not is_first():  # programs are tried once; the first process keeps the rows
        return []
    judged = _judged(judge, questions, answers, lambda: on_progress(len(questions)))
    rows = []
    for number, item in enumerate(questions):
        row = question_row(subject, item, prompts[number])
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
    answers: dict[int, list[Written]],
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


def _mean_score(metric: str, verdicts: Sequence[Verdict]) -> float:
    """Over the answers to one question; pass@k over all choices of k of them."""
    if metric.startswith(PASS_AT):
        num_passed = sum(verdict.scores["pass_at_1"] == 1.0 for verdict in verdicts)
        return pass_at_k(len(verdicts), num_passed, int(metric[len(PASS_AT) :]))
    return sum(verdict.scores[metric] for verdict in verdicts) / len(verdicts)
