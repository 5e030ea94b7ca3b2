"""The command line ``open-instruct``: arguments in, one message and an exit code out.

Exit codes: 0 done, or stopped by SIGTERM or SIGUSR1 with all work saved, as schedulers expect (a
manifest says whether its run is finished); 2 something the user can mend; 130 stopped by Ctrl-C;
143 by SIGTERM where there was nothing to save. A traceback (exit code 1) is a bug of ours.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from olmo_base.run.errors import Stopped, UserError, machine_error
from open_instruct import __version__

# Everything heavier than click is imported inside the verb that needs it: `--help` and a mistyped
# verb are answered before torch would have been found on disk.

GO_ON = "The same command goes on from there."


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start here: open-instruct run recipes/quickstart/pipeline.yaml",
)
@click.version_option(__version__, prog_name="open-instruct")
def cli() -> None:
    """Open language models from text to chat: train, tune, evaluate, talk."""


# ---------------------------------------------------------------- run


@cli.command()
@click.argument("recipe")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved recipe, examples, tokens, steps and memory; touch nothing.",
)
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    help="With --dry-run: plan for so many GPUs, and say what each of them holds.",
)
@click.option(
    "--accelerate-config",
    metavar="FILE",
    help="With --dry-run: plan for tuning that is launched with this file of accelerate.",
)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    num_processes: int | None,
    accelerate_config: str | None,
) -> None:
    """Run one stage, or a pipeline of stages.

    RECIPE is a YAML file, or the name of one that comes with open-instruct, such as
    recipes/quickstart/pipeline.yaml. KEY=VALUE changes a key of it (max_steps=100), a variable
    (root=/somewhere), or, in a pipeline, a key of one stage (sft.learning_rate=1e-4).

    An interrupted run goes on when the same command is given again.
    """
    from olmo_base.run.recipe import read_stage
    from open_instruct import pipeline

    signal.signal(signal.SIGTERM, _stop_now)  # training loops replace it by one that saves first
    if not dry_run and (num_processes or accelerate_config):
        raise UserError(
            "--num-processes and --accelerate-config say what a plan is made for; add --dry-run. "
            "To run in many processes: accelerate launch -m open_instruct run RECIPE."
        )
    path = pipeline.find_recipe(recipe)
    if read_stage(path) == "pipeline":
        if num_processes or accelerate_config:
            raise UserError(f"{path} is a pipeline; plan one of its stages for many processes.")
        _run_pipeline(path, overrides, dry_run)
    elif dry_run:
        _plan_stage(path, overrides, num_processes, accelerate_config)
    else:
        _run_stage(path, overrides)


def _plan_stage(
    path: Path, overrides: Sequence[str], num_processes: int | None, accelerate_config: str | None
) -> None:
    from olmo_base.run.launch import is_main_process
    from open_instruct import pipeline
    from open_instruct.planned_launch import planned_launch

    stage, resolved = pipeline.load_stage_recipe(path, overrides)
    launch = planned_launch(num_processes, accelerate_config)
    figures = pipeline.plan_stage(stage, resolved, launch)
    if is_main_process():
        click.echo(_described(resolved, figures))


def _run_stage(path: Path, overrides: Sequence[str]) -> None:
    from olmo_base.run.artefact import read_manifest
    from open_instruct import pipeline

    stage, resolved = pipeline.load_stage_recipe(path, overrides)
    before = read_manifest(resolved.run.output_dir)
    folder = stage.run(resolved)
    was_finished = before is not None and before.get("status") == "finished"
    done = "was finished before; nothing was done" if was_finished else "is finished"
    if folder.is_main:
        click.echo(f"{folder.path} {done}", err=True)


class Terminated(BaseException):
    """SIGTERM outside a loop. Like KeyboardInterrupt it passes every ``except Exception``."""


def _stop_now(signal_number: int, frame: FrameType | None) -> None:
    raise Terminated


def _run_pipeline(path: Path, overrides: Sequence[str], dry_run: bool) -> None:
    from open_instruct import pipeline

    recipe, steps = pipeline.load_pipeline(path, overrides)
    if dry_run:
        for planned in pipeline.plan(steps):
            click.echo(f"# {planned.step.name}: {planned.what}")
            click.echo(_described(planned.step.recipe, planned.figures or {}) + "\n---")
        return
    pipeline.run(steps)
    if recipe.ask is not None:
        model = pipeline.last_model(steps)
        if model is None:
            raise UserError(f"{path}: 'ask' needs a stage that makes a model.")
        _ask(model, recipe.ask)


def _described(recipe: Any, figures: dict[str, object]) -> str:
    """A resolved recipe as YAML, and what a run of it would cost as comments below."""
    from olmo_base.run.recipe import recipe_to_yaml

    width = max((len(key) for key in figures), default=0)
    lines = [f"# {key:<{width}}  {_readable(key, value)}" for key, value in figures.items()]
    return "\n".join([recipe_to_yaml(recipe).rstrip(), *lines])


def _readable(key: str, value: object) -> str:
    """A planned figure for people: 1,234,567; 1.50 GiB for keys that end in _bytes."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float) and key.endswith("_bytes"):
        size = float(value)
        for unit in ("B", "KiB", "MiB"):
            if size < 1024:
                return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
            size /= 1024
        return f"{size:.2f} GiB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        if not value:
            return "none"
        return ", ".join(f"{name}: {_readable(str(name), item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_readable(key, item) for item in value)
    return str(value)


def _ask(model: Path, question: str) -> None:
    from open_instruct.chat.terminal import chat as talk

    click.echo(f"\nQuestion to {model}: {question}\nAnswer:")
    talk(str(model), prompt=question, temperature=0.0)


# ---------------------------------------------------------------- chat


@cli.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="Ask one question, print the answer, leave.")
@click.option("--compare", metavar="OTHER", help="Ask this model too, and show both answers.")
@click.option(
    "--url",
    metavar="URL",
    help="Talk with a running server, such as http://127.0.0.1:8000; MODEL is a name there.",
)
@click.option(
    "--adapter",
    metavar="DIR",
    help="Put this adapter on MODEL; without MODEL on the base that it names.",
)
@click.option("--load-in-4bit", is_flag=True, help="Keep the weights in 4 bits (bitsandbytes).")
@click.option("--system", metavar="TEXT", help="A system prompt, before the first turn.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.7,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw only from the likeliest tokens that hold this share of probability.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def chat(
    model: str | None,
    prompt: str | None,
    compare: str | None,
    url: str | None,
    adapter: str | None,
    load_in_4bit: bool,
    system: str | None,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Talk with a model in the terminal.

    MODEL is the output_dir of an sft or dpo run, or a Hugging Face model folder. With piped
    standard input each line is one turn, and only answers go to standard output. The key of a
    server that asks for one is read from OPEN_INSTRUCT_API_KEY.
    """
    from open_instruct.chat.terminal import chat as talk

    talk(
        model,
        prompt=prompt,
        compare=compare,
        url=url,
        adapter=adapter,
        load_in_4bit=load_in_4bit,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


# ---------------------------------------------------------------- serve


@cli.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="Asked of every client; else OPEN_INSTRUCT_API_KEY. Beyond this machine one is made.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="A web page elsewhere that may ask, such as http://localhost:3000.",
)
@click.option(
    "--votes",
    metavar="FILE",
    default="preferences.jsonl",
    show_default=True,
    help="Where the chat page's votes go, as pairs that the dpo stage reads.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Answers that may wait; more are refused with 429.",
)
@click.option(
    "--backend",
    type=click.Choice(["own", "vllm"]),
    default="own",
    show_default=True,
    help="vllm hands over to vLLM's own server, which must be installed; it has no page.",
)
def serve(models: tuple[str, ...], votes: str, backend: str, **options: Any) -> None:
    """Serve models to OpenAI clients, with a chat page at /.

    MODEL is a run's output_dir or a Hugging Face model folder; clients name it as it is given here.
    Adapters given beside their base, or several of one base, share it in memory.
    """
    if backend == "vllm":
        _serve_by_vllm(models, **options)
        return
    # Threads of a product that wait for each other spin, and take the cores that the server's other
    # threads and its clients need. Read when torch is loaded, so it is said before.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        import starlette  # noqa: F401 - the extra is either there or not
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs {error.name}, which is not installed. "
            "Install the extra: pip install 'open-instruct[serve]'"
        ) from None
    gc.disable()  # imports make no garbage: looking for it is a sixth of a start's work
    from open_instruct.chat.guard import Settings
    from open_instruct.chat.server import serve as run_server

    gc.freeze()  # modules stay: they are not looked through while clients wait either
    gc.enable()
    run_server(models, Settings(votes=Path(votes), **options))


def _serve_by_vllm(models: Sequence[str], max_waiting: int, **options: Any) -> None:
    from open_instruct.chat.vllm import hand_over

    context = click.get_current_context()
    for name in ("votes", "max_waiting"):
        if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} means nothing to vLLM. Leave it out, or --backend vllm.")
    hand_over(models, **options)


# ---------------------------------------------------------------- eval and report


@cli.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--suite", help="A named set of tasks, such as quickstart.")
@click.option("--tasks", metavar="A,B", help="Single tasks, by name.")
@click.option("--output-dir", required=True, help="The report's folder.")
@click.option("--data-dir", help="Where tasks find their files.")
@click.option("--include-path", metavar="DIR", help="A folder of further tasks (YAML).")
@click.option("--skip-missing", is_flag=True, help="Leave tasks out whose files are not there.")
@click.option("--cache-dir", metavar="DIR", help="Requests computed before, of any evaluation.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task, not all.")
@click.option("--samples-only-failures", is_flag=True, help="Keep no text of right answers.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--apply-chat-template", is_flag=True, help="Put lm-eval's tasks as dialogues.")
@click.option("--system-prompt", help="What lm-eval's dialogues begin with.")
@click.option("--judge", metavar="URL#MODEL", help="An OpenAI-compatible API that judges answers.")
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True)
@click.option(
    "--contamination",
    metavar="PATH",
    multiple=True,
    help="Training files or token shards to look for the questions in; may be given again.",
)
@click.option("--baseline", metavar="FILE", help="report.json of an earlier evaluation.")
@click.option(
    "--fail-if-worse",
    metavar="X",
    type=click.FloatRange(min=0),
    help="Exit with 1 if a score is significantly, and by X (0.02: two points), below it.",
)
def evaluate(
    models: tuple[str, ...],
    tasks: str | None,
    baseline: str | None,
    fail_if_worse: float | None,
    **options: Any,
) -> int:
    """Evaluate models and write a report of one, or of several side by side.

    MODEL is a run's output_dir or a Hugging Face model folder; others are compared with the first.
    lm-eval's tasks also reach a served one: local-completions:base_url=URL,model=NAME (or
    local-chat-completions, vllm), with lm-eval's arguments.
    """
    from eval.gate import open_baseline, passes
    from eval.harness import evaluate as run_evaluation

    signal.signal(signal.SIGTERM, _stop_now)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    before = open_baseline(baseline, fail_if_worse)  # a mistake here is found before the work
    folder = run_evaluation(models, tasks=names, **options)
    if before is None or not folder.is_main:
        return 0
    return 0 if passes(before, folder.path, fail_if_worse) else 1


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--output-dir", help="Write it here; else into the first evaluation's folder.")
def report(runs: tuple[str, ...], output_dir: str | None) -> None:
    """Write the report again from what is on disk.

    RUN is an evaluation's folder, or a training run whose curves are to be shown.
    """
    from eval.report import write_report

    write_report(runs, output_dir, show=True)


# ---------------------------------------------------------------- convert


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--to",
    type=click.Choice(["hf", "olmo", "olmo_core", "gguf"]),
    help="The layout of DST: Hugging Face, the first OLMo trainer, OLMo-core, or llama.cpp's GGUF.",
)
@click.option("--tokenizer", metavar="DIR", help="A folder with a tokenizer to copy along.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What DST keeps its weights in; else what SRC does.",
)
def convert(
    source: str, target: str, to: str | None, tokenizer: str | None, dtype: str | None
) -> None:
    """Convert a model between Hugging Face and the OLMo trainers.

    SRC is a folder: of a Hugging Face OLMo 1, 2 or 3, of a checkpoint of the OLMo trainer
    (config.yaml), or of one of OLMo-core (model_and_optim). A checkpoint becomes a Hugging Face
    folder, and such a folder a checkpoint of the trainer that made its generation. DST is compared
    with transformers, layer by layer, and written only if it agrees.

    A Hugging Face folder of any model becomes DST.gguf by llama.cpp's own converter, which is
    looked for in the folder LLAMA_CPP and on the PATH.
    """
    if to == "gguf" or (to is None and target.endswith(".gguf")):
        from open_instruct.gguf import convert_to_gguf

        if tokenizer is not None:
            raise UserError("--tokenizer: a GGUF takes the tokenizer of SRC. Copy it there first.")
        click.echo(f"{convert_to_gguf(source, target, dtype)} is written", err=True)
        return
    from olmo_base.model.convert import DTYPES
    from olmo_base.model.convert import convert as convert_model

    signal.signal(signal.SIGTERM, _stop_now)
    done = convert_model(
        source,
        target,
        to=to,
        tokenizer_files=tokenizer,
        dtype=None if dtype is None else DTYPES[dtype],
    )
    for note in done.notes:
        click.echo(f"Note: {note}.", err=True)
    click.echo(
        f"{target}: {done.layout_from} to {done.layout_to}; hidden states and logits are those of "
        f"transformers to {done.difference:.0e} of their size.",
        err=True,
    )


# ---------------------------------------------------------------- data


@cli.group()
def data() -> None:
    """Look at training data, or make some."""


@data.command()
@click.argument("recipe")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "-n",
    "num_examples",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How many examples to show.",
)
@click.option("--tokens", is_flag=True, help="One line for each token.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write it as a page, too.")
@click.option("--step", type=click.IntRange(min=1), help="Of a pretrain run: what this step read.")
def inspect(
    recipe: str,
    overrides: tuple[str, ...],
    num_examples: int,
    tokens: bool,
    html: str | None,
    step: int | None,
) -> None:
    """Show what the model will see of an sft, dpo or reward RECIPE.

    Examples as text, with what is learnt marked; lengths; rows cut or dropped, with the reason.
    With --step, RECIPE is a pretrain run's folder or recipe, and the documents of that step are
    listed with file and line.
    """
    if step is not None:
        _list_documents(recipe, overrides, step)
        return
    from open_instruct import pipeline
    from open_instruct.inspect import inspect_recipe

    path = pipeline.find_recipe(recipe)
    _, resolved = pipeline.load_stage_recipe(path, overrides)
    if resolved.stage not in ("sft", "dpo", "reward"):
        raise UserError(
            f"{path}: data inspect shows sft, dpo and reward recipes, not {resolved.stage}."
        )
    inspect_recipe(resolved, num_shown=num_examples, by_token=tokens, html=html)


def _list_documents(recipe: str, overrides: Sequence[str], step: int) -> None:
    from olmo_base.pretrain_recipe import PretrainRecipe, num_steps, open_corpus, read_in_step
    from open_instruct import pipeline

    kept = Path(recipe) / "recipe.yaml"
    path = kept if kept.is_file() else pipeline.find_recipe(recipe)
    _, resolved = pipeline.load_stage_recipe(path, overrides)
    if not isinstance(resolved, PretrainRecipe):
        raise UserError(f"{path}: --step is for pretrain recipes, not {resolved.stage}.")
    corpus = open_corpus(resolved, verify=False)
    last = num_steps(resolved, len(corpus.train))
    if step > last:
        raise UserError(f"{path}: the run has {last:,} steps; there is no step {step:,}.")
    for index, places in read_in_step(resolved, corpus, step):
        click.echo(f"sequence {index}")
        for place in places:
            click.echo(f"  {place}")


@data.command()
@click.argument("recipe")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Count documents and tokens; touch nothing.")
def tokenize(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Turn the documents of a tokenize RECIPE into token shards.

    The same as `open-instruct run`; num_proc=8 uses eight processes. A killed run goes on after
    its finished shards.
    """
    from olmo_base.run.recipe import read_stage
    from open_instruct import pipeline

    signal.signal(signal.SIGTERM, _stop_now)
    path = pipeline.find_recipe(recipe)
    if (stage := read_stage(path)) != "tokenize":
        raise UserError(
            f"{path} says 'stage: {stage}'; data tokenize needs 'stage: tokenize'. "
            f"For this one: open-instruct run {path}"
        )
    if dry_run:
        _plan_stage(path, overrides, None, None)
    else:
        _run_stage(path, overrides)


@data.command()
@click.option("--output-dir", required=True, help="The folder to write to.")
@click.option("--seed", type=int, help="Another seed is another world.")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def tinyworld(output_dir: str, seed: int | None, overrides: tuple[str, ...]) -> None:
    """Write the quickstart's small invented world as JSON lines.

    Texts to pretrain on, dialogues, preference pairs and evaluation tasks. KEY=VALUE changes a key
    of the stage (num_documents=1000).
    """
    given = {"stage": "tinyworld", "output_dir": output_dir, "seed": seed}
    _run_from_keys(given, overrides, "open-instruct data tinyworld")


def _run_from_keys(given: dict[str, Any], overrides: Sequence[str], source: str) -> Any:
    """Run the stage whose keys were given as options; None stands for an option left out."""
    from olmo_base.run.recipe import Given, build_recipe, parse_override
    from open_instruct import pipeline

    signal.signal(signal.SIGTERM, _stop_now)
    keys = {key: Given(value, source) for key, value in given.items() if value is not None}
    for text in overrides:
        key, value = parse_override(text)
        keys[key] = Given(value, f"override {text!r}")
    stage = pipeline.find_stage(str(given["stage"]), source)
    return stage.run(build_recipe(stage.recipe_class, keys, source=source))


# ---------------------------------------------------------------- merge


@cli.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.argument("out")
@click.option("--average", is_flag=True, help="Write the mean of the models' weights.")
def merge(models: tuple[str, ...], out: str, average: bool) -> None:
    """Write the whole model that an adapter makes of its base, or the average of several models.

    MODEL is the output_dir of a run with use_peft, or a folder in peft's format; with --average,
    the folders of two or more models of one shape. OUT is a new folder.
    """
    if average:
        from olmo_base.model.average import average_models

        click.echo(f"{average_models(models, out)} is written", err=True)
        return
    if len(models) > 1:
        raise UserError("Several models are merged with --average; without it, name one adapter.")
    from olmo_base.run.artefact import adapter_base, resolve_model
    from open_instruct.adapters import is_reward_adapter

    folder = resolve_model(models[0])
    if adapter_base(folder) is not None and is_reward_adapter(folder):
        from open_instruct.reward import merge_reward_adapter as merge_adapter
    else:
        from open_instruct.causal_lm import merge_adapter
    click.echo(f"{merge_adapter(models[0], out)} is written", err=True)


# ---------------------------------------------------------------- push


@cli.command()
@click.argument("model", metavar="RUN")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="For everyone to see; private without it.")
def push(model: str, name: str, public: bool) -> None:
    """Upload a finished run to the Hugging Face hub: model, card and figures, no checkpoints."""
    from open_instruct.publish import push as upload

    click.echo(upload(model, name, is_private=not public))


# ---------------------------------------------------------------- errors out


def _rank_prefix() -> str:
    from olmo_base.run.launch import rank_prefix

    return rank_prefix()


def _complain(message: str) -> None:
    click.secho(message, fg="red" if sys.stderr.isatty() else None, err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command; its errors are already on standard error."""
    try:
        result = cli.main(args=arguments, prog_name="open-instruct", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoSuchOption as error:
        error.show()
        if not error.possibilities and error.ctx is not None and error.ctx.command is run:
            key = error.option_name.lstrip("-").replace("-", "_")
            click.echo(f"A key of the recipe is written without dashes: {key}=VALUE.", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _complain("Interrupted.")
        return 128 + signal.SIGINT
    except Terminated:
        _complain(f"Stopped. {GO_ON}")
        return 128 + signal.SIGTERM
    except Stopped as error:
        where = f": {error.where}" if error.where else ""
        if os.environ.get("RANK", "0") == "0":  # of several ranks, one tells
            _complain(f"Stopped{where}. {GO_ON}")
        return error.exit_code
    except UserError as error:
        _complain(_rank_prefix() + str(error))
        return 2
    except Exception as error:
        problem = machine_error(error)
        if problem is None:
            raise
        _complain(f"{problem} Make room or change the permission, then give the command again.")
        return 2


if __name__ == "__main__":
    sys.exit(main())
