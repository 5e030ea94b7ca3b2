"""From what is on disk to report.html, report.md, report.json and plots/."""

import json
from collections.abc import Sequence
from pathlib import Path

from eval.report.gather import EVALUATION, gather
from eval.report.markdown import markdown, print_summary
from eval.report.page import html_page
from eval.report.plots import has_pillow, write_plots
from olmo_base.run.artefact import atomic_write


def write_report(
    runs: Sequence[str | Path], output_dir: str | Path | None = None, *, show: bool = False
) -> Path:
    """Build the report of evaluation folders and training runs; returns the path of report.html.

    Models of several evaluations stand side by side; training runs add their curves. Without
    ``output_dir`` it is written into the first evaluation's folder, or, if there is none, into the
    last run's. ``show`` prints the score table and the path. Errors: UserError, DataError.
    """
    folders = [Path(run) for run in runs]
    report = gather(folders)
    if output_dir is None:
        evaluations = [folder for folder in folders if (folder / EVALUATION).is_file()]
        output_dir = evaluations[0] if evaluations else folders[-1]
    target = Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report.as_dict(), indent=2, allow_nan=False)
    atomic_write(target / "report.json", content + "\n")
    atomic_write(target / "report.md", markdown(report))
    write_plots(report, target)
    atomic_write(target / "report.html", html_page(report, has_png=has_pillow()))
    if show:
        if report.models:
            print_summary(report)
        print(target / "report.html")
    return target / "report.html"
