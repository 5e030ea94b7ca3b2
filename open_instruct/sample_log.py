"""What the model says while it is trained: answers to a few held-out prompts, in samples.jsonl.

The first ids of held-out examples, up to the first that is learnt -> greedy answers at every
evaluation -> one row each. Nothing is drawn at random, so that training goes on as if nobody had
asked.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from olmo_base.model.generate import Generator
from olmo_base.run.artefact import RunFolder, atomic_write
from olmo_base.run.recipe import setting
from open_instruct.batches import Examples
from open_instruct.encode import ChatEncoder

SAMPLES = "samples.jsonl"
UNLIMITED = 2**20  # positions of a model that does not say how many it knows


@dataclass(frozen=True)
class SampleLogConfig:
    """How many held-out prompts are answered at each evaluation."""

    num_eval_samples: int = setting(
        0, low=0, changes_result=False, help="held-out prompts answered at every evaluation"
    )
    eval_sample_max_new_tokens: int = setting(128, low=1, changes_result=False)


@dataclass(frozen=True)
class ShownPrompt:
    """A held-out prompt and the answer that its example gives."""

    ids: list[int]
    target: list[int]


def first_prompts(examples: Examples, number: int) -> list[ShownPrompt]:
    """The prompts of the first examples; of a pair with the chosen answer."""
    shown = []
    for place in range(min(number, len(examples))):
        ids, is_learnt = examples.sequence(place)
        start = is_learnt.index(True)
        end = next((at for at in range(start, len(ids)) if not is_learnt[at]), len(ids))
        shown.append(ShownPrompt(ids[:start], ids[start:end]))
    return shown


class SampleLog:
    """Appends rows to samples.jsonl. After a resume, rows the lost steps had written are gone."""

    def __init__(
        self,
        folder: RunFolder,
        language_model: Any,
        encoder: ChatEncoder,
        prompts: list[ShownPrompt],
        config: SampleLogConfig,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._path = folder.path / SAMPLES
        self._is_main = folder.is_main
        self._model = language_model
        self._tokenizer = encoder.tokenizer
        self._stop_ids = frozenset(encoder.end_of_turn_ids)
        self._config = config
        self._precision = precision
        shape = language_model.config.get_text_config()
        self._room = getattr(shape, "max_position_embeddings", None) or UNLIMITED
        self._prompts = [item for item in prompts if len(item.ids) < self._room]

    def go_on_after(self, step: int) -> None:
        """Keep the rows up to ``step``; those of later steps are written again."""
        if self._is_main and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step > 0]
            atomic_write(self._path, "".join(kept))

    def write(self, step: int) -> None:
        """Answer every prompt with the weights as they are."""
        if not self._is_main or not self._prompts:
            return
        # Of an adapter the model that it stands on, whose layers hold the adapter's.
        is_adapted = hasattr(self._model, "get_base_model")
        model = self._model.get_base_model() if is_adapted else self._model
        was_training = model.training
        model.eval()
        limit = self._config.eval_sample_max_new_tokens
        generator = Generator(model, eos_token_ids=self._stop_ids, max_length=self._room)
        with self._precision():
            answers = generator.generate([item.ids for item in self._prompts], max_new_tokens=limit)
        model.train(was_training)
        with open(self._path, "a", encoding="utf-8") as file:
            for item, ids in zip(self._prompts, answers, strict=True):
                is_cut = len(ids) >= min(limit, self._room - len(item.ids))
                row = {
                    "step": step,
                    "prompt": self._tokenizer.decode(item.ids),
                    "answer": self._tokenizer.decode(ids, skip_special_tokens=True),
                    "target": self._tokenizer.decode(item.target, skip_special_tokens=True),
                    "num_tokens": len(ids),
                    "finish_reason": "length" if is_cut else "stop",
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
