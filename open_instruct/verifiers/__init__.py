"""(answer, truth) -> scores, one file per kind of answer; evaluation and training share them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from open_instruct.verifiers import code, gsm8k, ifeval, math_answer, short_answer
from open_instruct.verifiers.verdict import Problem, Verdict


def _nothing_needed() -> None:
    """Most verifiers need nothing but Python."""


@dataclass(frozen=True)
class Verifier:
    """How one kind of answer is judged."""

    judge: Callable[[str, Any], Verdict]  # answer, truth
    read_problem: Callable[[Mapping[str, Any]], Problem]  # a row of its data set; or BadProblem
    metrics: tuple[str, ...]  # the one that counts first
    check_ready: Callable[[], None] = _nothing_needed  # UserError where it cannot work


VERIFIERS = {
    "gsm8k": Verifier(gsm8k.judge, gsm8k.read_problem, gsm8k.METRICS),
    "math": Verifier(math_answer.judge, math_answer.read_problem, math_answer.METRICS),
    "ifeval": Verifier(ifeval.judge, ifeval.read_problem, ifeval.METRICS, ifeval.check_ready),
    "short_answer": Verifier(short_answer.judge, short_answer.read_problem, short_answer.METRICS),
    "code": Verifier(code.judge, code.read_problem, code.METRICS, code.check_ready),
}
