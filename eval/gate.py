"""Is a model worse than it was? A new evaluation against the samples of an earlier one.

Question by question, task by task; what is called worse is so significantly, after Holm's
correction for the number of comparisons, and by at least a margin.
"""

from dataclasses import dataclass
from pathlib import Path

from eval.report.gather import EVALUATION, ModelResult, Report, gather
from eval.report.words import difference_text, visible
from eval.scores import compare
from eval.statistics import CONFIDENCE, Difference, holm
from eval.tasks import LOWER_IS_BETTER
from olmo_base.run.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """One model on one task, against the earlier evaluation."""

    model: str
    against: str
    task: str
    metric: str
    difference: Difference
    p_corrected: float | None

    def is_worse(self, margin: float) -> bool:
        """Whether it lost at least the margin, and not by chance."""
        lost = self.difference.value if self.metric in LOWER_IS_BETTER else -self.difference.value
        is_significant = self.p_corrected is not None and self.p_corrected < 1 - CONFIDENCE
        return is_significant and lost > 0 and lost >= margin


def open_baseline(path: str | None, fail_if_worse: float | None) -> Report | None:
    """The evaluation whose report.json is given, with the samples beside it; None without one.

    Errors: UserError for a file that is none, and for a margin with nothing to compare with.
    """
    if path is None:
        if fail_if_worse is not None:
            raise UserError("--fail-if-worse compares with --baseline: give its report.json.")
        return None
    file = Path(path)
    folder = file if file.is_dir() else file.parent
    if not file.exists():
        raise UserError(f"{path} does not exist. Give the report.json of an evaluation.")
    if not (folder / EVALUATION).is_file():
        raise UserError(
            f"{folder} holds no evaluation ({EVALUATION} and samples), which is needed to compare "
            "question by question. Give the report.json in an evaluation's own folder."
        )
    return gather([folder])


def compare_with(before: Report, after: Report) -> list[Verdict]:
    """Every model of ``after`` against its namesake, or against the only model of ``before``.

    Errors: UserError if there is none, or if no task, or another question, was asked.
    """
    found: list[tuple[ModelResult, ModelResult, str, str, Difference]] = []
    for model in after.models:
        against = _counterpart(before, model)
        for name, result in model.tasks.items():
            if name not in against.tasks or after.tasks[name].kind == "best_of":
                continue  # of the best of several, each is compared
            if before.tasks[name] != after.tasks[name]:
                raise UserError(
                    f"The task {name} is defined in another way than in the baseline. Evaluate "
                    "the baseline again."
                )
            earlier, metric = against.tasks[name].rows, after.tasks[name].main_metric
            targets = {row["doc_id"]: row["target"] for row in earlier}
            for row in result.rows:
                if targets.get(row["doc_id"], row["target"]) != row["target"]:
                    raise UserError(
                        f"Question {row['doc_id']} of {name} is another than in the baseline. "
                        "Evaluate the baseline again on the same data."
                    )
            difference = compare(earlier, result.rows, metric)
            if difference is not None:
                found.append((model, against, name, metric, difference))
    if not found:
        raise UserError(
            f"The baseline was asked {', '.join(before.tasks) or 'nothing'}, and no question of "
            f"{', '.join(after.tasks)}. Compare evaluations of the same tasks."
        )
    corrected = holm(difference.p_value for *_, difference in found)
    return [
        Verdict(model.name, against.name, name, metric, difference, p_corrected)
        for (model, against, name, metric, difference), p_corrected in zip(
            found, corrected, strict=True
        )
    ]


def _counterpart(before: Report, model: ModelResult) -> ModelResult:
    for other in before.models:
        if other.name == model.name:
            return other
    if len(before.models) == 1:
        return before.models[0]
    raise UserError(
        f"The baseline holds several models ({', '.join(item.name for item in before.models)}), "
        f"none of them called {model.name}. Give an evaluation of one model."
    )


def passes(before: Report, folder: Path, fail_if_worse: float | None) -> bool:
    """Print the comparison with the baseline; whether nothing is worse by the margin.

    Without a margin it is only shown. Errors: as ``compare_with``.
    """
    after = gather([folder])
    verdicts = compare_with(before, after)
    asked = {(verdict.model, verdict.task) for verdict in verdicts}
    num_worse = 0
    print("\nAgainst the baseline, on the same questions:")
    for verdict in verdicts:
        difference, is_share = verdict.difference, verdict.metric not in LOWER_IS_BETTER
        is_worse = fail_if_worse is not None and verdict.is_worse(fail_if_worse)
        num_worse += is_worse
        number = difference.wins + difference.losses + difference.ties
        p_value = "" if verdict.p_corrected is None else f", corrected p {verdict.p_corrected:.2g}"
        print(
            f"  {visible(verdict.model)}, {visible(verdict.task)}: "
            f"{difference_text(difference.value, is_share)} {verdict.metric} "
            f"on {number:,} questions{p_value}{'  WORSE' if is_worse else ''}"
        )
    for model in after.models:
        for name in after.tasks:
            is_asked = after.tasks[name].kind != "best_of"
            if is_asked and (model.name, name) not in asked:
                print(f"  {visible(model.name)}, {visible(name)}: not in the baseline")
    if num_worse:
        print(f"{num_worse} of {len(verdicts)} scores are significantly worse.")
    return num_worse == 0
