"""Tasks and suites, as the YAML files of this folder (and of --include-path) define them.

A file may hold ``tasks`` (name -> what to ask and how to judge it) and ``suites`` (name -> groups
of tasks; the report averages each group). Task files of lm-eval in --include-path are known too.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from eval.answers import ANSWER_RULES
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import Given, RecipeError, build_recipe, read_yaml, setting
from open_instruct.verifiers import VERIFIERS

Kind = Literal[
    "exact_match",
    "verified",
    "judged",
    "multiple_choice",
    "requests",
    "perplexity",
    "lm_eval",
    "best_of",
]

# What each kind measures, the one shown in tables first; the kind "verified" measures what its
# verifier does, and a task of lm-eval what its own file says. "best_of" is never asked: it is a
# suite's name for the better of several tasks that put the same questions.
# Accuracies differ in how an option's log-likelihood is normalised: not at all, by its tokens,
# characters or bytes (its leading blank counts, as in OLMES, arXiv:2406.08446), or by its
# log-likelihood without the question.
METRICS: dict[str, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "multiple_choice": (
        "acc",
        "acc_per_token",
        "acc_per_char",
        "acc_per_byte",
        "bits_per_byte",
        "acc_macro",
        "acc_per_char_macro",
        "mc2",
    ),
    "requests": (
        "acc",
        "acc_per_token",
        "acc_per_char",
        "acc_per_byte",
        "acc_uncond",
        "bits_per_byte",
    ),
    "perplexity": ("bits_per_byte", "nats_per_token", "word_perplexity"),
}
# What another model judges: an answer against the reference answer, or an answer by itself.
RUBRICS: dict[str, tuple[str, ...]] = {
    "better": ("lc_win_rate", "win_rate"),
    "harmless": ("harmless",),
}
NEEDS_JUDGE = (
    "another model judges its answers, and none is configured; give one with judge "
    "(--judge URL#MODEL)."
)
MACRO = "_macro"  # acc_macro: the mean over the categories of questions, each counting the same
PASS_AT = "pass_at_"  # pass_at_10 needs 10 samples of each question
VERIFIED_KEYS = (
    "verifier chat_prompt examples_file num_examples examples_by_category stop num_samples "
    "temperature"
).split()
CHAT_KEYS = "apply_chat_template fewshot_as_multiturn system_prompt".split()
CHOICE_KEYS = ["form", "instruction", *CHAT_KEYS]
JUDGED_KEYS = "chat_prompt stop".split()  # which judged tasks read as verified ones do
IN_WORDS = {"exact_match", "verified", "judged"}  # kinds that a model answers in words
SHOW_EXAMPLES = {"verified", "multiple_choice"}
# Of text that is predicted; lm-eval measures further surprises and distances of its own.
TEXT_METRICS = {"bits_per_byte", "nats_per_token", "word_perplexity", "byte_perplexity"}
LOWER_IS_BETTER = TEXT_METRICS | {"perplexity", "brier_score", "ter"}
# lm-eval's files describe one task, or one group of them, at their top level.
LM_EVAL_FILE = re.compile(
    r"^(task|group|tag|include|class|dataset_path|output_type|doc_to_text)\s*:", re.MULTILINE
)
OUR_FILE = re.compile(r"^(tasks|suites)\s*:", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """One set of questions and how answers to it are judged."""

    name: str
    kind: Kind
    file: str  # in data_dir, or an absolute path
    about: str = ""  # a sentence for the report
    # Where its files come from if data_dir lacks them: "name config split" on the hub
    hub: str | None = field(default=None, compare=False)
    hub_examples: str | None = field(default=None, compare=False)
    metric: str | None = None  # the one that counts; the kind's first if not said
    # exact_match
    plain_prompt: str = "Question: {prompt}\nAnswer:"  # for models without a chat template
    answer_rule: str = setting("as_words", choices=ANSWER_RULES)
    max_new_tokens: int = setting(32, low=1)
    # requests: questions about one passage, which stands before "Question:", count as related
    cluster_by: Literal["passage"] | None = None
    # multiple_choice
    form: Literal["text", "letters"] = "text"  # what is scored: the options, or A, B, C ...
    instruction: str | None = None  # before all else; {category} stands for the question's own
    # multiple_choice, named as in lm-eval: the question as a user's turn and the options as answers
    # to it; the examples as earlier turns, or with the question in one; what stands before all
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_prompt: str | None = None
    # verified and multiple_choice: what is solved before each question; of a choice's own category
    examples_file: str | None = None
    num_examples: int = setting(0, low=0)  # the first ones of that file
    examples_by_category: bool = False  # of verified problems too
    # verified: the data file is read, and answers are judged, by open_instruct.verifiers
    verifier: str | None = None
    chat_prompt: str | None = None  # for models with a chat template; the question itself if null
    stop: tuple[str, ...] = ()  # ends an answer of a model without a chat template
    num_samples: int = setting(1, low=1)  # answers to each question, to be averaged
    temperature: float = setting(0.0, low=0)
    # judged: what the judge decides
    rubric: str = setting("better", choices=RUBRICS)
    # lm_eval: filled in from lm-eval's own task file, which is ``file``; best_of: from its suite
    measures: tuple[str, ...] = ()
    definition: str | None = None  # digest of all its settings

    def __post_init__(self) -> None:
        self._check_verified()
        if (self.kind in ("lm_eval", "best_of")) != bool(self.measures):
            raise RecipeError(
                "kind",
                "a task of lm-eval has a file of its own: put that into the folder of "
                "--include-path and name its task. The best of several is named in a suite.",
            )
        if self.metric is not None and self.metric not in self.metrics:
            raise RecipeError(
                "metric",
                f"{self.metric!r} is not measured by tasks of kind {self.kind}: "
                f"{', '.join(self.metrics)}.",
            )
        for key, place in (("hub", self.hub), ("hub_examples", self.hub_examples)):
            if place is not None and len(place.split()) != 3:
                raise RecipeError(key, f"{place!r} must be a name, a config (or -) and a split.")
        for key, prompt in (("plain_prompt", self.plain_prompt), ("chat_prompt", self.chat_prompt)):
            if prompt is not None and "{prompt}" not in prompt:
                raise RecipeError(key, "must contain {prompt}, where the question goes.")

    def _check_verified(self) -> None:
        """The keys of verified tasks and of choices, which no other kind reads."""
        unread = set() if self.kind == "verified" else {*VERIFIED_KEYS}
        if self.kind != "multiple_choice":
            unread |= {*CHOICE_KEYS}
        self._check_chat()
        if self.kind != "requests":
            unread.add("cluster_by")
        if self.kind == "judged":
            unread -= {*JUDGED_KEYS}
        else:
            unread.add("rubric")
        if self.kind in SHOW_EXAMPLES:
            unread -= {"examples_file", "num_examples"}
            self._check_examples()
        for item in dataclasses.fields(self):
            if item.name in unread and getattr(self, item.name) != item.default:
                raise RecipeError(item.name, f"tasks of kind {self.kind} do not read it.")
        if self.kind != "verified":
            return
        if self.answer_rule != "as_words":
            raise RecipeError("answer_rule", "the verifier decides what is right.")
        if self.verifier not in VERIFIERS:
            raise RecipeError(
                "verifier", f"{self.verifier!r} must be one of {', '.join(VERIFIERS)}."
            )
        if self.num_samples > 1 and self.temperature == 0.0:
            raise RecipeError("temperature", "0 makes all samples of a question the same.")

    def _check_chat(self) -> None:
        if self.system_prompt is not None and not self.apply_chat_template:
            raise RecipeError("system_prompt", "is read with apply_chat_template only.")
        if self.fewshot_as_multiturn and not (self.apply_chat_template and self.num_examples):
            raise RecipeError("fewshot_as_multiturn", "needs apply_chat_template and num_examples.")

    def _check_examples(self) -> None:
        if (self.examples_file is None) != (self.num_examples == 0):
            raise RecipeError("num_examples", "goes together with examples_file.")
        if self.examples_file == self.file:
            raise RecipeError(
                "examples_file", "is the file of the questions, whose answers would be shown."
            )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Task":
        """A task as an evaluation's folder keeps it."""
        lists = {key: tuple(content.get(key, ())) for key in ("stop", "measures")}
        return cls(**(content | lists))

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured, the one shown in tables first unless ``metric`` says another."""
        if self.measures:
            return self.measures
        if self.kind == "judged":
            return RUBRICS[self.rubric]
        if self.kind != "verified":
            return METRICS[self.kind]
        assert self.verifier is not None
        names = VERIFIERS[self.verifier].metrics
        return tuple(
            name
            for name in names
            if not name.startswith(PASS_AT) or int(name[len(PASS_AT) :]) <= self.num_samples
        )

    @property
    def main_metric(self) -> str:
        """The metric that tables, charts and comparisons show."""
        return self.metric or self.metrics[0]

    @property
    def judging_metric(self) -> str:
        """The metric that says whether one answer is right, also where tables show another."""
        accuracies = [name for name in self.metrics if name not in LOWER_IS_BETTER]
        if self.main_metric in LOWER_IS_BETTER and accuracies:
            return accuracies[0]
        return self.main_metric

    @property
    def predicts_text(self) -> bool:
        """Whether whole texts are predicted, and no question is asked."""
        is_theirs = self.kind == "lm_eval" and self.measures[0] in TEXT_METRICS
        return self.kind == "perplexity" or is_theirs


@dataclass(frozen=True)
class Suite:
    """Tasks in groups. A group's score is the mean of its tasks' main metrics."""

    name: str
    groups: dict[str, tuple[str, ...]]
    about: str = ""
    data_dir: str | None = None  # where its files are, if the evaluation does not say
    # A name for tasks that put the same questions in several ways; the best of them counts.
    best_of: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups.values()):
            raise RecipeError("groups", "needs at least one group, each with at least one task.")
        for name, members in self.best_of.items():
            if len(members) < 2:
                raise RecipeError("best_of", f"{name} needs at least two tasks.")
            if not any(name in group for group in self.groups.values()):
                raise RecipeError("best_of", f"{name} is in no group.")


@dataclass
class Catalogue:
    """Every task and suite that can be asked for, by name."""

    tasks: dict[str, Task] = field(default_factory=dict)
    suites: dict[str, Suite] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)  # "tasks recall" -> its file
    lm_eval_folder: Path | None = None  # where lm-eval's own task files are, if there are any


def load_catalogue(include_path: str | None = None) -> Catalogue:
    """Read the task files that come with the code, then those of ``include_path``.

    A name of the second replaces one of the first. Of lm-eval's task files, which may lie in
    folders inside, only their being there is noted. Errors: UserError naming the file and key.
    """
    catalogue = Catalogue()
    folders = [Path(__file__).parent]
    if include_path is not None:
        folders.append(Path(include_path))
        if not folders[-1].is_dir():
            raise UserError(f"include_path {include_path} is not a folder of task files (YAML).")
        if not any(folders[-1].rglob("*.yaml")):
            raise UserError(f"include_path {include_path} holds no task file (*.yaml).")
        if any(map(_is_of_lm_eval, folders[-1].rglob("*.yaml"))):
            catalogue.lm_eval_folder = folders[-1]
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if not _is_of_lm_eval(path):
                _read_task_file(path, catalogue)
    return catalogue


def _is_of_lm_eval(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")  # they hold tags of their own
    return LM_EVAL_FILE.search(text) is not None and OUR_FILE.search(text) is None


def _read_task_file(path: Path, catalogue: Catalogue) -> None:
    content, _ = read_yaml(path)
    sections = {"tasks": (Task, catalogue.tasks), "suites": (Suite, catalogue.suites)}
    if not isinstance(content, dict) or not content.keys() <= sections.keys():
        found = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise UserError(
            f"{path}: a task file holds the keys tasks and suites, each a map of names; "
            f"this one holds {found}."
        )
    for section, entries in content.items():
        entry_class, known = sections[section]
        if not isinstance(entries, dict):
            raise UserError(f"{path}: {section} must be a map of names to their settings.")
        for name, settings in entries.items():
            known[str(name)] = _build_entry(entry_class, path, str(name), settings)  # type: ignore[index]
            catalogue.sources[f"{section} {name}"] = path


def _build_entry(entry_class: type[Any], path: Path, name: str, settings: Any) -> Any:
    place = f"{path}, {entry_class.__name__.lower()} {name}"
    if not isinstance(settings, dict):
        raise UserError(f"{place}: must be a map of settings, found {settings!r}.")
    keys = {str(key): Given(value, place) for key, value in settings.items()}
    return build_recipe(entry_class, {"name": Given(name, place), **keys}, source=place)


@dataclass(frozen=True)
class Selection:
    """What one evaluation asks: its tasks in order, and the groups its summary averages."""

    tasks: tuple[Task, ...]
    groups: dict[str, tuple[str, ...]]
    suite: str | None
    data_dir: str | None  # the suite's own
    sources: tuple[Path, ...]  # the files that define them
    best_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # tasks left out, and why

    def without(self, skipped: dict[str, str]) -> "Selection":
        """The same without some tasks, in groups and in the best of several too."""
        tasks = tuple(task for task in self.tasks if task.name not in skipped)
        best_of = {name: of for name, of in self.best_of.items() if not {*of} & {*skipped}}
        known = {*best_of, *(task.name for task in tasks)}
        groups = {
            group: tuple(
                name
                for member in members
                for name in ([member] if member in known else self.best_of.get(member, ()))
                if name in known
            )
            for group, members in self.groups.items()
        }
        kept = {group: members for group, members in groups.items() if members}
        return dataclasses.replace(
            self, tasks=tasks, groups=kept, best_of=best_of, skipped=self.skipped | skipped
        )

    def as_dict(self) -> dict[str, Any]:
        """For the evaluation's folder."""
        return {
            "suite": self.suite,
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "groups": {group: list(members) for group, members in self.groups.items()},
            "best_of": {name: list(members) for name, members in self.best_of.items()},
            "skipped": self.skipped,
        }


def select(
    suite: str | None, tasks: Iterable[str] = (), include_path: str | None = None
) -> Selection:
    """The tasks of a suite, or the named tasks, or the suite's tasks narrowed to the named ones.

    Errors: UserError for an unknown name, with the nearest known one.
    """
    catalogue = load_catalogue(include_path)
    names = list(tasks)
    if suite is None and not names:
        raise UserError(
            f"Say what to ask: a suite ({', '.join(sorted(catalogue.suites))}) or tasks by name."
        )
    groups: dict[str, tuple[str, ...]] = {}
    data_dir: str | None = None
    best_of: dict[str, tuple[str, ...]] = {}
    if suite is None:
        members = _add_lm_eval_tasks(catalogue, names)
        groups = {name: of_name for name, of_name in members.items() if len(of_name) > 1}
        names = [member for name in names for member in members.get(name, (name,))]
    else:
        found: Suite = _look_up("suite", suite, catalogue.suites)
        data_dir, best_of = found.data_dir, found.best_of
        in_groups = [name for group in found.groups.values() for name in group]
        members = best_of | _add_lm_eval_tasks(
            catalogue, [member for name in in_groups for member in best_of.get(name, (name,))]
        )
        of_suite = list(dict.fromkeys(_expanded(in_groups, members)))
        for name in names:
            _look_up(f"task of suite {suite}", name, dict.fromkeys([*of_suite, *members]))
        names = _expanded(names, members)
        names = [name for name in of_suite if not names or name in names]
        best_of = {name: kept for name, kept in best_of.items() if {*kept} <= {*names}}
        known = {*names, *best_of}
        for group, of_group in found.groups.items():
            # The best of several stands for them where all of them are asked.
            whole = {name: tasks for name, tasks in members.items() if name not in best_of}
            if kept_names := [name for name in _expanded(of_group, whole) if name in known]:
                groups[group] = tuple(kept_names)
    chosen = tuple(_look_up("task", name, catalogue.tasks) for name in dict.fromkeys(names))
    _check_groups(groups, chosen, best_of)
    keys = [f"suites {suite}"] if suite is not None else []
    keys += [f"tasks {task.name}" for task in chosen]
    sources = tuple(dict.fromkeys(catalogue.sources[key] for key in keys))
    return Selection(chosen, groups, suite, data_dir, sources, best_of)


def _expanded(names: Iterable[str], members: dict[str, tuple[str, ...]]) -> list[str]:
    return [member for name in names for member in members.get(name, (name,))]


def _add_lm_eval_tasks(catalogue: Catalogue, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Add the tasks that only lm-eval's files define; the names of those that each name stands for.

    A name of lm-eval may be a task, a group or a tag.
    """
    missing = [name for name in dict.fromkeys(names) if name not in catalogue.tasks]
    if not missing or catalogue.lm_eval_folder is None:
        return {}
    read_tasks = lm_engine().read_tasks
    members = {}
    for name, tasks in read_tasks(catalogue.lm_eval_folder, missing, catalogue.tasks).items():
        members[name] = tuple(task.name for task in tasks)
        for task in tasks:
            catalogue.tasks[task.name] = task
            catalogue.sources[f"tasks {task.name}"] = Path(task.file)
    return members


def lm_engine() -> ModuleType:
    """The module that runs lm-eval's tasks. Errors: UserError where lm-eval is not installed."""
    try:
        from eval import lm_engine  # importing lm-eval takes seconds, and it is an optional part
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            "The task is one of lm-eval's, and lm-eval is not installed. "
            "Install it: pip install 'open-instruct[eval]'."
        ) from None
    return lm_engine


def _look_up(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(f"There is no {what} {name!r}. {hint}Known: {', '.join(sorted(known))}.")
    return known[name]


def best_of_task(name: str, members: Sequence[Task]) -> Task:
    """What a report knows the best of several tasks as."""
    about = (
        f"The better of {' and '.join(task.name for task in members)}, for each model by itself."
    )
    is_macro = all(task.main_metric.endswith(MACRO) for task in members)
    measure = f"acc_best{MACRO}" if is_macro else "acc_best"
    return Task(name, "best_of", file="", about=about, measures=(measure,))


def _check_groups(
    groups: dict[str, tuple[str, ...]],
    tasks: tuple[Task, ...],
    best_of: dict[str, tuple[str, ...]],
) -> None:
    by_name = {task.name: task for task in tasks}
    for name, members in best_of.items():
        if name in by_name:
            raise UserError(f"{name} is the name of a task, and of the best of {members}.")
        for member in members:
            if by_name[member].main_metric in LOWER_IS_BETTER:
                raise UserError(f"The best of {members} cannot be told by a perplexity ({member}).")
        by_name[name] = best_of_task(name, [by_name[member] for member in members])
    for group, members in groups.items():
        directions = {by_name[name].main_metric in LOWER_IS_BETTER for name in members}
        if len(directions) > 1:
            raise UserError(
                f"The group {group!r} averages accuracies with perplexities "
                f"({', '.join(members)}). Put them into groups of their own."
            )
