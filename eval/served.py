"""A model that somebody else runs, named as lm-eval names it: BACKEND:key=value,key=value.

Its weights cannot be seen, so what it said is kept in the evaluation's own folder only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.cache import RequestCache
from eval.ranks import num_ranks
from eval.tasks import Task
from olmo_base.run.errors import UserError

CHAT_BACKENDS = ("local-chat-completions", "openai-chat-completions")
BACKENDS = ("local-completions", "openai-completions", *CHAT_BACKENDS, "vllm", "hf")
SECRETS = {"auth_token", "header"}  # an evaluation's folder and report hold the model's name


def is_served(model: str) -> bool:
    """Whether the name is one of a model that lm-eval reaches by one of its backends."""
    return model.partition(":")[0] in BACKENDS and ":" in model


def served_arguments(model: str) -> dict[str, str]:
    """What stands behind the colon. Errors: UserError."""
    backend, _, arguments = model.partition(":")
    pairs = [item.partition("=") for item in arguments.split(",") if item]
    if not pairs or not all(key and equals and value for key, equals, value in pairs):
        raise UserError(
            f"{model} must be {backend}:key=value,key=value, with the arguments of lm-eval's "
            f"{backend}, such as base_url=http://127.0.0.1:8000/v1/completions,model=NAME."
        )
    found = {key: value for key, _, value in pairs}
    if secrets := sorted(SECRETS & found.keys()):
        raise UserError(
            f"{backend}: {secrets[0]} would be written into the report. Put the key into "
            "OPENAI_API_KEY."
        )
    if found.get("trust_remote_code", "false").lower() not in ("false", "0"):
        raise UserError(f"{backend}: trust_remote_code runs code of others; it stays off here.")
    if not {"model", "pretrained"} & found.keys():
        raise UserError(f"{model} does not say which model: add model=NAME.")
    return found


def served_name(model: str) -> str:
    """The model's name at its server."""
    found = served_arguments(model)
    return found.get("model") or found["pretrained"]


def refuse_unanswerable(model: str, tasks: Sequence[Task], is_chat: bool) -> None:
    """Errors: UserError for what a backend of lm-eval cannot be asked."""
    backend = model.partition(":")[0]
    if num_ranks() > 1:
        raise UserError(
            f"{backend} is asked by one process, and there are {num_ranks()}, each of which would "
            "ask everything. Start open-instruct eval without a launcher."
        )
    ours = [task.name for task in tasks if task.kind != "lm_eval"]
    if ours:
        raise UserError(
            f"{backend} is asked lm-eval's tasks only, and {', '.join(ours[:5])} "
            f"{'is' if len(ours) == 1 else 'are'} ours. Name tasks of lm-eval with --tasks and "
            "--include-path, or give the model's folder."
        )
    if backend not in CHAT_BACKENDS:
        return
    if not is_chat:
        raise UserError(
            f"{backend} takes dialogues only. Add apply_chat_template (--apply-chat-template), or "
            "use a backend of completions."
        )
    scored = [task.name for task in tasks if not task.about.endswith(" generate_until.")]
    if scored:
        raise UserError(
            f"{backend} gives answers and no likelihood of given words, which {', '.join(scored)} "
            "asks for. Use local-completions with an endpoint that has echo and logprobs, or give "
            "the model's folder."
        )


@dataclass
class Served:
    """The model as an evaluation holds it."""

    model: str
    cache: RequestCache
    spent: Counter[str] = field(default_factory=Counter)  # requests computed and reused

    @property
    def backend(self) -> str:
        """lm-eval's name for the way to reach it."""
        return self.model.partition(":")[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """For lm-eval."""
        return dict(served_arguments(self.model))
