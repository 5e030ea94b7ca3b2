"""What a server has done so far, in Prometheus' text format."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from open_instruct.chat.served import Served

if TYPE_CHECKING:
    from open_instruct.chat.app import Server


def metrics_text(server: "Server") -> str:
    """What has happened so far, by model."""
    lines: list[str] = []

    def family(name: str, kind: str, meaning: str, samples: dict[str, float]) -> None:
        lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"])
        lines.extend(f"{sample} {value}" for sample, value in samples.items())

    def by_model(name: str, kind: str, meaning: str, read: Callable[[Served], float]) -> None:
        samples = {
            f'{name}{{model="{_label(served.name)}"}}': read(served)
            for served in server.models.values()
        }
        family(name, kind, meaning, samples)

    prefix = "open_instruct_"
    name = prefix + "responses_total"
    family(
        name,
        "counter",
        "Responses by path and status.",
        {
            f'{name}{{path="{_label(path)}",status="{status}"}}': number
            for (path, status), number in sorted(server.responses.items())
        },
    )
    by_model(prefix + "answers_running", "gauge", "Answers that are being written.",
             lambda served: served.engine.num_running)  # fmt: skip
    by_model(prefix + "answers_waiting", "gauge", "Answers that wait for a row.",
             lambda served: served.engine.num_waiting)  # fmt: skip
    by_model(prefix + "prompt_tokens_total", "counter", "Tokens of prompts.",
             lambda served: served.engine.figures.prompt_tokens)  # fmt: skip
    by_model(prefix + "prompt_tokens_reused_total", "counter", "Of these, found in the cache.",
             lambda served: served.engine.batch.num_reused)  # fmt: skip
    by_model(prefix + "generated_tokens_total", "counter", "Tokens of answers.",
             lambda served: served.engine.figures.generated_tokens)  # fmt: skip
    by_model(prefix + "rows_together", "gauge", "Answers that one call of the model goes on with.",
             lambda served: served.engine.batch.stable_sizes[-1])  # fmt: skip
    by_model(prefix + "steps_total", "counter", "Steps of the batch.",
             lambda served: served.engine.figures.steps)  # fmt: skip
    name = prefix + "answers_total"
    family(
        name,
        "counter",
        "Answers that ended, by reason.",
        {
            f'{name}{{model="{_label(served.name)}",reason="{reason}"}}': number
            for served in server.models.values()
            for reason, number in sorted(served.engine.figures.finished.items())
        },
    )
    name = prefix + "first_token_seconds"
    samples: dict[str, float] = {}
    for served in server.models.values():
        label = f'{{model="{_label(served.name)}"}}'
        samples[f"{name}_sum{label}"] = served.first_token_seconds
        samples[f"{name}_count{label}"] = served.num_first_tokens
    family(name, "summary", "From a checked request to its first text.", samples)
    return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
