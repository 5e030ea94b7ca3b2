"""A Report -> report.html: one page that needs nothing but itself.

The template engine escapes whatever is shown. The page may run one script, its own, which is known
by its hash, and no network.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import yaml

from eval.report.answers import pack_of, sample_cards
from eval.report.gather import Report, evaluation_time
from eval.report.origins import (
    answers_while_trained,
    inputs,
    model_facts,
    settings,
    stage_facts,
    stage_panels,
    versions,
)
from eval.report.problems import problems
from eval.report.tables import (
    COMPARISON_HEAD,
    COST_HEAD,
    comparison_rows,
    cost_rows,
    headlines,
    measure_rows,
    overlap_rows,
    score_rows,
    title_of,
)
from eval.report.words import NUM_COLORS, clipped, duration_text, value_text, visible

HERE = Path(__file__).parent


def environment() -> jinja2.Environment:
    """The template engine, which escapes by itself and knows every name it is asked for."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_page(report: Report, *, has_png: bool = False) -> str:
    """The report as one self-contained page; it says whether PNG plots lie beside it."""
    rows = score_rows(report)
    script = (HERE / "browse.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    page: str = (
        environment()
        .get_template("page.html.jinja")
        .render(
            title=title_of(report),
            css="".join(
                (HERE / name).read_text(encoding="utf-8") for name in ("charts.css", "page.css")
            ),
            script=script,
            script_hash=base64.b64encode(digest).decode(),
            started=evaluation_time(report),
            duration=duration_text(report.seconds) if report.models else None,
            num_questions=sum(
                max((len(m.tasks[name].rows) for m in report.models if name in m.tasks), default=0)
                for name, task in report.tasks.items()
                if not task.predicts_text and task.kind != "best_of"
            ),
            models=[
                {"name": visible(model.name), "color": index % NUM_COLORS}
                for index, model in enumerate(report.models)
            ],
            headlines=headlines(report, rows),
            problems=problems(report),
            rows=rows,
            num_comparisons=len(report.comparisons),
            comparison_head=COMPARISON_HEAD,
            group_comparisons=[
                [visible(row.subject), *row.cells()]
                for row in comparison_rows(report)
                if row.is_group
            ],
            panels=stage_panels(report.stages),
            learning=answers_while_trained(report.stages),
            tasks=[_section(report, name) for name in report.tasks],
            task_names=list(report.tasks),
            packs=[pack for name in report.tasks if (pack := pack_of(report, name)) is not None],
            overlaps=overlap_rows(report),
            overlap_sources=[
                f"{visible(str(source['path']))} ({source['texts']:,} texts, "
                f"{source['characters']:,} characters)"
                for contamination in report.contamination
                for source in contamination.sources
            ],
            costs=cost_rows(report),
            cost_head=COST_HEAD,
            model_facts=model_facts(report),
            stage_facts=stage_facts(report),
            documents=[
                {
                    "name": visible(stage.name),
                    "recipe": visible(yaml.safe_dump(stage.recipe, sort_keys=False, width=90)),
                    "inputs": inputs(stage),
                }
                for stage in [*report.stages, *report.evaluations]
            ],
            versions=versions(report),
            has_png=has_png,
        )
    )
    return page


def _section(report: Report, name: str) -> dict[str, Any]:
    """All that is told of one task."""
    task = report.tasks[name]
    asked = [model for model in report.models if name in model.tasks]
    forms = [
        f"{visible(model.name)}: {visible(model.tasks[name].record['form'])}"
        for model in asked
        if "form" in model.tasks[name].record
    ]
    level = report.chance.get(name)
    return {
        "name": visible(name),
        "about": visible(task.about),
        "metric": visible(task.main_metric),
        "chance": "" if level is None else value_text(level, is_share=True),
        "forms": forms,
        "measures": measure_rows(report, name),
        "comparisons": [row.cells() for row in comparison_rows(report, name)],
        "cards": sample_cards(report, name),
        "settings": visible(yaml.safe_dump(settings(task), sort_keys=False, width=90)),
        "prompts": [
            (visible(model.name), clipped(prompt, 20_000))
            for model in asked
            if (prompt := next(filter(None, (row["prompt"] for row in model.tasks[name].rows)), ""))
        ],
    }
