"""Recipes: one YAML file, with ``key=value`` overrides, becomes one frozen dataclass.

YAML text -> nodes that know their line -> flat keys -> variables filled in -> typed values -> the
recipe. Whatever does not fit (an unknown key, a wrong type, a value out of range) is refused with
the key, the value, what is allowed, and the line of the file.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from olmo_base.run.errors import UserError

Recipe = TypeVar("Recipe")
Place = str  # "recipe.yaml, line 3" or "override 'seed=x'": where a value came from


class RecipeError(UserError):
    """A key of a recipe holds something that cannot be used.

    Raise it in ``__post_init__`` for rules between keys; the loader adds file and line.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


# ---------------------------------------------------------------- declaring what a key may hold


@dataclass(frozen=True)
class Allowed:
    """The range of one key: low <= value <= high, above < value < below, or one of choices."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with ``value``, in words; None if nothing is."""
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                return "must be a finite number"
            bounds = (
                (self.low is not None and value < self.low, f"at least {self.low}"),
                (self.high is not None and value > self.high, f"at most {self.high}"),
                (self.above is not None and value <= self.above, f"above {self.above}"),
                (self.below is not None and value >= self.below, f"below {self.below}"),
            )
            needed = [
                words
                for limit, words in zip(
                    (self.low, self.high, self.above, self.below),
                    (bound[1] for bound in bounds),
                    strict=True,
                )
                if limit is not None
            ]
            if any(is_broken for is_broken, _ in bounds):
                return f"must be {' and '.join(needed)}"
        return None


def setting(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] | None = None,
    changes_result: bool = True,
    help: str = "",
) -> Any:
    """A dataclass field with the values it may hold: a key of a recipe.

    Without ``default`` the recipe must say it. ``load_recipe`` checks the range.
    ``changes_result=False`` marks keys (a folder's name, how often to log) that two runs may
    differ in and still be the same run.
    """
    allowed = Allowed(low, high, above, below, None if choices is None else tuple(choices))
    metadata = {"allowed": allowed, "changes_result": changes_result, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------- from file to flat keys


@dataclass(frozen=True)
class Given:
    """A value as the user gave it, with its place for messages."""

    value: Any
    place: Place


class _LineLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key said twice instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise UserError(
                    f"{self.name}, line {line}: the key {key!r} is said a second time "
                    f"(first in line {seen[key]}). Keep one of them."
                )
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> tuple[Any, dict[str, int]]:
    """The content of a YAML file, and the line of each of its top-level keys.

    Errors: UserError for a missing or empty file, bytes that are not UTF-8, or broken YAML.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Give the path of a recipe (YAML).") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Give the path of one recipe (YAML).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8."
        ) from None
    loader = _LineLoader(text)
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path} is empty. A recipe needs at least the key 'stage'.")
        content = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: broken YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: broken YAML: {error}.") from None
    finally:
        loader.dispose()
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return content, lines


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` with the value read as YAML, so that ``max_steps=10`` is a number."""
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("--").replace("-", "_")
    if not equals or not key:
        raise UserError(f"The override {text!r} is not of the form key=value, as in max_steps=100.")
    try:
        return key, yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError:
        return key, value


def read_keys(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Given]:
    """The flat keys of a recipe file with the overrides laid over them."""
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a recipe is a map of keys to values (key: value), "
            f"this file holds a {type(content).__name__}."
        )
    keys = {
        str(key): Given(value, f"{path}, line {lines.get(str(key), 1)}")
        for key, value in content.items()
    }
    for text in overrides:
        key, value = parse_override(text)
        keys[key] = Given(value, f"override {text!r}")
    return keys


def read_stage(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The value of ``stage:``, read without loading any stage's code."""
    keys = read_keys(path, overrides)
    if "stage" not in keys:
        raise UserError(
            f"{path} does not say its stage. Add a line such as 'stage: sft' "
            "(tokenizer, tokenize, pretrain, sft, dpo, eval, pipeline)."
        )
    return str(keys["stage"].value)


# ---------------------------------------------------------------- variables

VARIABLE = re.compile(r"\$\{(\w+)\}")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a recipe's value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def fill_variables(value: Any, variables: Mapping[str, str], place: str) -> Any:
    """``value`` with every ``${name}`` in its texts replaced. Errors: UserError if one is unset."""
    if isinstance(value, str):

        def filled(match: re.Match[str]) -> str:
            if match[1] not in variables:
                known = ", ".join(variables) or "none"
                raise UserError(
                    f"{place}: the variable {match[0]} is not set (set here: {known}). "
                    f"Give it as {match[1]}=VALUE, or under 'vars:' in the recipe."
                )
            return variables[match[1]]

        return VARIABLE.sub(filled, value)
    if isinstance(value, list):
        return [fill_variables(item, variables, place) for item in value]
    if isinstance(value, Mapping):
        return {key: fill_variables(item, variables, place) for key, item in value.items()}
    return value


def take_variables(keys: dict[str, Given]) -> dict[str, str]:
    """Takes ``vars:`` out of a recipe's keys: name -> text. Errors: UserError if it is no map."""
    given = keys.pop("vars", Given({}, ""))
    if not isinstance(given.value, dict):
        raise UserError(f"{given.place}: vars: must be a map of names to text.")
    for name in given.value:
        if not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"{given.place}: vars: {name!r} must be letters, digits and '_'.")
    return {str(name): str(value) for name, value in given.value.items()}


def read_filled_keys(
    path: str | Path,
    overrides: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    changes: Mapping[str, Given] | None = None,
) -> tuple[dict[str, Given], dict[str, str]]:
    """The keys of a recipe file with its ``vars:`` filled in, and those variables.

    ``variables`` and ``changes`` are what a pipeline sets in it; ``overrides`` win over both. An
    override that names a variable, one of ``vars:`` or one that the recipe uses, sets it.
    Errors: UserError.
    """
    keys = read_keys(path)
    values = take_variables(keys) | dict(variables or {})
    keys |= changes or {}
    names = values.keys() | {
        name
        for given in keys.values()
        for text in texts_in(given.value)
        for name in VARIABLE.findall(text)
    }
    for text in overrides:
        key, value = parse_override(text)
        if key.removeprefix("vars.") in names:
            values[key.removeprefix("vars.")] = text.partition("=")[2]
        else:
            keys[key] = Given(value, f"override {text!r}")
    filled = {
        key: Given(fill_variables(given.value, values, given.place), given.place)
        for key, given in keys.items()
    }
    return filled, values


# ---------------------------------------------------------------- from flat keys to the dataclass


def _is_group(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) and isinstance(annotation, type)


def _type_hints(recipe_class: type) -> dict[str, Any]:
    return typing.get_type_hints(recipe_class)


def flat_fields(recipe_class: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every key a recipe knows, groups laid flat: key -> (field, its type)."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    hints = _type_hints(recipe_class)
    for item in dataclasses.fields(recipe_class):
        hint = hints[item.name]
        inner = flat_fields(hint) if _is_group(hint) else {item.name: (item, hint)}
        for key, value in inner.items():
            assert key not in found, f"{recipe_class.__name__} declares the key {key} twice"
            found[key] = value
    return found


def _words(annotation: Any) -> str:
    """A type, in words for a message."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    if annotation in names:
        return names[annotation]
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(annotation))
    if origin is tuple:
        return f"a list, each item {_words(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"a map of text to {_words(typing.get_args(annotation)[1])}"
    if _is_group(annotation):
        return "a map with the keys " + ", ".join(
            item.name for item in dataclasses.fields(annotation)
        )
    return str(annotation)


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known word, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


class _Misfit(Exception):
    """A value that does not fit its type; caught by the loader, which knows key and place."""


def _convert(value: Any, annotation: Any) -> Any:
    """``value`` as the annotated type. Never guesses: '3' is not a number, 1 is not true."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        parts = typing.get_args(annotation)
        if value is None and type(None) in parts:
            return None
        misfits = []
        for part in parts:
            if part is type(None):
                continue
            try:
                return _convert(value, part)
            except _Misfit as misfit:
                misfits.append(misfit)
        raise misfits[0] if len(misfits) == 1 else _Misfit(f"must be {_words(annotation)}")
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in annotation.__args__):
            return value
        hint = nearest(str(value), map(str, annotation.__args__))
        raise _Misfit(f"must be {_words(annotation)}.{hint}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Misfit(f"must be {_words(annotation)}")
        item_type = typing.get_args(annotation)[0]
        items = []
        for number, item in enumerate(value, start=1):
            try:
                items.append(_convert(item, item_type))
            except _Misfit as misfit:
                raise _Misfit(f"item {number} ({item!r}): {misfit}") from None
        return tuple(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _Misfit(f"must be {_words(annotation)}")
        return {
            str(key): _convert(item, typing.get_args(annotation)[1]) for key, item in value.items()
        }
    if _is_group(annotation):
        if not isinstance(value, Mapping):
            raise _Misfit(f"must be {_words(annotation)}")
        given = {str(key): Given(item, "") for key, item in value.items()}
        try:
            return _build(annotation, given)
        except RecipeError as error:
            raise _Misfit(str(error)) from None
    if annotation is bool:
        fits = isinstance(value, bool)
    elif annotation is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.0e6 steps
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif annotation is float:
        if isinstance(value, str):
            try:
                value = float(value)  # YAML 1.1 reads 2e-5, without a dot, as text
            except ValueError:
                raise _Misfit(f"must be {_words(annotation)}") from None
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif annotation is str:
        fits = isinstance(value, str)
    else:
        raise AssertionError(f"recipes do not know the type {annotation}")
    if not fits:
        raise _Misfit(f"must be {_words(annotation)}")
    return value


def _locate(error: RecipeError, given: Mapping[str, Given]) -> RecipeError:
    """The same error, with the file and line (or the override) of its key."""
    place = given[error.key].place if error.key in given else ""
    if not place:
        return error
    located = RecipeError(error.key, error.problem)
    located.args = (f"{place}: {error.key}: {error.problem}",)
    return located


def _build(recipe_class: type, given: Mapping[str, Given]) -> Any:
    """The dataclass from its flat keys. Raises RecipeError with the place where it is known."""
    known = flat_fields(recipe_class)
    for key in given:
        if key not in known:
            hint = nearest(key, known) or " Known keys: " + ", ".join(sorted(known)) + "."
            raise _locate(RecipeError(key, f"this key is not known here.{hint}"), given)
    values: dict[str, Any] = {}
    for key, (item, hint) in known.items():
        if key not in given:
            continue
        try:
            value = _convert(given[key].value, hint)
        except _Misfit as misfit:
            said = f"{given[key].value!r} {misfit}"
            error = RecipeError(key, said if said.endswith((".", "?")) else f"{said}.")
            raise _locate(error, given) from None
        allowed: Allowed | None = item.metadata.get("allowed")
        problem = allowed.problem(value) if allowed and value is not None else None
        if problem:
            raise _locate(RecipeError(key, f"{value!r} {problem}."), given)
        values[key] = value
    return _construct(recipe_class, values, given)


def _construct(recipe_class: type, values: dict[str, Any], given: Mapping[str, Given]) -> Any:
    hints = _type_hints(recipe_class)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(recipe_class):
        if _is_group(hints[item.name]):
            arguments[item.name] = _construct(hints[item.name], values, given)
        elif item.name in values:
            arguments[item.name] = values[item.name]
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(
                item.name, f"this key is missing; it must be {_words(hints[item.name])}."
            )
    try:
        return recipe_class(**arguments)
    except RecipeError as error:
        raise _locate(error, given) from None


def load_recipe(
    recipe_class: type[Recipe], path: str | Path, overrides: Sequence[str] = ()
) -> Recipe:
    """Read a recipe file, lay ``key=value`` overrides over it, and check every key.

    Errors: UserError naming file, line, key, value and what is allowed.
    """
    keys, _ = read_filled_keys(path, overrides)
    return build_recipe(recipe_class, keys, source=str(path))


def build_recipe(recipe_class: type[Recipe], keys: Mapping[str, Given], source: str) -> Recipe:
    """The recipe from keys that were already read; ``source`` names them in messages."""
    try:
        return typing.cast(Recipe, _build(recipe_class, keys))
    except RecipeError as error:
        text = str(error)
        named = source in text or text.startswith("override ")
        raise UserError(text if named else f"{source}: {text}") from None


# ---------------------------------------------------------------- and back


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """The flat keys of a recipe as plain YAML values, in the order they are declared."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            full = {item.name: plain(getattr(value, item.name)) for item in _fields(value)}
            defaults = {item.name: item.default for item in _fields(value)}
            return {key: item for key, item in full.items() if item != defaults[key]}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    flat: dict[str, Any] = {}
    hints = _type_hints(type(recipe))
    for item in _fields(recipe):
        value = getattr(recipe, item.name)
        if _is_group(hints[item.name]):
            flat.update(recipe_to_dict(value))
        else:
            flat[item.name] = plain(value)
    return flat


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def deciding_keys(recipe: Any) -> dict[str, Any]:
    """The keys that decide the result of a run, without those marked ``changes_result=False``."""
    known = flat_fields(type(recipe))
    return {
        key: value
        for key, value in recipe_to_dict(recipe).items()
        if known[key][0].metadata.get("changes_result", True)
    }


def recipe_to_yaml(recipe: Any) -> str:
    """The resolved recipe as YAML that ``load_recipe`` reads back to an equal recipe."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True, width=100)
