"""The door of the base stages: ``python -m olmo_base RECIPE [key=value ...]``.

Stages: tokenizer, tokenize, pretrain. Nothing heavy is imported before the arguments are
understood.
"""

import importlib
import os
import signal
import sys
from typing import Any

from olmo_base.run.errors import Stopped, UserError, machine_error

USAGE = """\
usage: python -m olmo_base RECIPE [key=value ...] [--dry-run]

Run one base stage from its recipe, a YAML file that says 'stage: tokenizer', 'stage: tokenize' or
'stage: pretrain'. A run that was stopped goes on where it was; a finished one is not done again.

  key=value    use this value instead of the recipe's, as in max_steps=100
  --dry-run    check the recipe and its data, print what a run would do, and touch nothing
  -h, --help   this text
"""

STAGES = {  # stage -> module, recipe class; imported only when a recipe asks for it
    "tokenizer": ("olmo_base.tokenizer", "TokenizerRecipe"),
    "tokenize": ("olmo_base.corpus.tokenize", "TokenizeRecipe"),
    "pretrain": ("olmo_base.pretrain", "PretrainRecipe"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe named by the arguments; the process's exit code.

    0: done, or stopped by SIGTERM or SIGUSR1 with all work saved. 2: a mistake of the user's, told
    in one message. 130: stopped by Ctrl-C.
    """
    words = sys.argv[1:] if arguments is None else arguments
    is_first = os.environ.get("RANK", "0") == "0"  # of several ranks, one tells
    if not words or "-h" in words or "--help" in words:
        print(USAGE, end="", file=sys.stderr if not words else sys.stdout)
        return 0 if words else 2
    try:
        return _run(words)
    except UserError as error:
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        name = signal.Signals(stopped.signal_number).name
        if is_first:
            print(f"stopped by {name}{stopped.where}. Run it again to go on.", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        problem = machine_error(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2


def _rank_prefix() -> str:
    from olmo_base.run.launch import rank_prefix

    return rank_prefix()


def _run(words: list[str]) -> int:
    flags = {word for word in words if word.startswith("-") and "=" not in word}
    unknown = sorted(flags - {"--dry-run"})
    if unknown:
        raise UserError(f"The flag {unknown[0]} is not known here. Known: --dry-run, --help.")
    path, *overrides = [word for word in words if word not in flags] or [""]
    if not path or "=" in path:
        raise UserError("Name a recipe first: python -m olmo_base RECIPE [key=value ...].")

    from olmo_base.run.recipe import load_recipe, read_stage, recipe_to_yaml

    name = read_stage(path, overrides)
    if name not in STAGES:
        raise UserError(
            f"{path}: the stage {name!r} is not one of {', '.join(STAGES)}. "
            "Other stages are run by: open-instruct run RECIPE."
        )
    module_name, class_name = STAGES[name]
    module: Any = importlib.import_module(module_name)
    recipe = load_recipe(getattr(module, class_name), path, overrides)
    if "--dry-run" in flags:
        print(recipe_to_yaml(recipe), end="")
        print("---")
        module.input_files(recipe)
        for key, value in module.plan(recipe).items():
            shown = f"{value:,}" if isinstance(value, int | float) else value
            print(f"{key}: {shown}")
        return 0
    folder = module.run(recipe)
    if folder.is_main:
        print(folder.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
