"""lm-eval's own models (servers, vLLM) as those that its tasks are asked of here.

requests -> cache -> lm-eval's backend, in parts, each kept as soon as it is there.
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.models import api_models
from lm_eval.models.utils import normalize_gen_kwargs

from eval.cache import request_key
from eval.served import Served
from olmo_base.model.generate import before_stop
from olmo_base.run.errors import UserError
from olmo_base.scorer import Score

PART = 64  # requests between two savings
NO_TEXT = "\0no text\0"  # what lm-eval is to put where a server says null; an empty answer is one


class ServedModel(LM):
    """A backend of lm-eval, of which nothing is asked twice.

    Errors: UserError where the backend fails, with what its server said.
    """

    def __init__(
        self,
        served: Served,
        *,
        max_new_tokens: int | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """``on_progress`` is told the share of the requests done."""
        super().__init__()
        self.served = served
        self.max_new_tokens = max_new_tokens
        self.on_progress = on_progress
        self.scores: dict[tuple[Any, ...], Score] = {}
        self.cut_prompts: set[str] = set()  # a server does not tell
        api_models.LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER = NO_TEXT
        self.lm = self._call(
            lambda: get_model(served.backend).create_from_arg_string(
                served.model.partition(":")[2], {"batch_size": 1}
            )
        )

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return call()
        except UserError:
            raise
        except Exception as error:  # a server, a library and a user's arguments may all fail
            response = getattr(error, "response", None)
            words = " ".join(str(getattr(response, "text", "") or error).split())[:400]
            raise UserError(
                f"lm-eval's {self.served.backend} failed ({type(error).__name__}: {words}). "
                "What was answered before is kept; give the same command again to go on. Tasks "
                "that score given words need echo and logprobs of an endpoint."
            ) from error

    def _through_cache(
        self,
        kind: str,
        requests: Sequence[Instance],
        ask: Callable[[list[Instance]], Sequence[Any]],
    ) -> list[Any]:
        keys = [request_key(kind, [], {"request": request.args}) for request in requests]
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        cache = self.served.cache
        missing = sorted(number for key, number in first.items() if key not in cache)
        for start in range(0, len(missing), PART):
            part = missing[start : start + PART]
            asked = [requests[number] for number in part]
            found = self._call(functools.partial(ask, asked))
            cache.add({keys[n]: value for n, value in zip(part, found, strict=True)})
            self.on_progress((len(first) - len(missing) + start + len(part)) / len(first))
        self.served.spent["computed"] += len(missing)
        self.served.spent["reused"] += len(first) - len(missing)
        return [cache[key] for key in keys]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See lm_eval.api.model.LM."""
        found = self._through_cache("likelihood", requests, self.lm.loglikelihood)
        for request, (logprob, is_greedy) in zip(requests, found, strict=True):
            self.scores[request.args] = Score(logprob, 0, is_greedy)
        return [(logprob, is_greedy) for logprob, is_greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See lm_eval.api.model.LM."""
        found = self._through_cache("rolling", requests, self.lm.loglikelihood_rolling)
        for request, logprob in zip(requests, found, strict=True):
            self.scores[request.args] = Score(logprob, 0, True)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See lm_eval.api.model.LM. Some servers know four stop words; all are looked for here."""
        limited = []
        for request in requests:
            text, settings = request.args
            changed = copy.copy(request)
            limit = {} if self.max_new_tokens is None else {"max_gen_toks": self.max_new_tokens}
            changed.arguments = (text, settings | limit)
            limited.append(changed)
        found = self._through_cache("answer", limited, self._answers)
        answers = []
        for request, answer in zip(limited, found, strict=True):
            stops = [stop for stop in normalize_gen_kwargs(request.args[1])["until"] if stop]
            answers.append(before_stop(answer, stops))
        return answers

    def _answers(self, requests: list[Instance]) -> list[str]:
        found: list[str] = self.lm.generate_until(requests)
        if any(answer == NO_TEXT for answer in found):
            raise UserError(
                f"{self.served.model} gave no text for a request. It may have thought for longer "
                "than the answer's limit: set max_new_tokens higher."
            )
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Any:
        """See lm_eval.api.model.LM."""
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """See lm_eval.api.model.LM."""
        return str(self.lm.tokenizer_name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """See lm_eval.api.model.LM."""
        found: str | None = self.lm.chat_template(chat_template)
        return found
