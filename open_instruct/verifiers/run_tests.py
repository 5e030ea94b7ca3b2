"""Runs inside the sandbox: the answer, then the tests; says on its standard output how it went.

It is given as source text to a bare Python and imports nothing of ours. The token that makes a
verdict believable is read before the answer runs and written only after the tests have ended. Code
in the same process can always lie to it in the end; these are the ways that are easy, closed:
leaving early, replacing builtins or what the tests import, objects that equal everything.
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types

ANSWER_FILE = "<answer>"
MAX_DETAIL = 500
OF_PYTHON = (types.WrapperDescriptorType, types.MethodDescriptorType)  # written in C
FUNCTION = types.FunctionType
CONTAINERS = (list, tuple, set, frozenset)


class EqualToEverything(Exception):
    """The answer returned an object that decides itself what it equals."""


def judges_itself(value, depth=0):
    """Whether a value, or one inside it, is of a class whose ``==`` the answer wrote."""
    for owner in type.mro(type(value)):
        compare = type.__getattribute__(owner, "__dict__").get("__eq__")
        if compare is None or isinstance(compare, OF_PYTHON):
            continue
        if not isinstance(compare, FUNCTION):
            return True
        if compare.__code__.co_filename == ANSWER_FILE:
            return True
    if depth == 4:
        return False
    if isinstance(value, dict):
        value = [*dict.keys(value), *dict.values(value)]
    if isinstance(value, CONTAINERS):
        return any(judges_itself(item, depth + 1) for item in list(value)[:1000])
    return False


def equal(left, right):
    """What ``==`` in the tests does."""
    if judges_itself(left) or judges_itself(right):
        raise EqualToEverything("the answer returned an object with its own ==")
    return left == right


class WatchedComparisons(ast.NodeTransformer):
    """Every plain ``a == b`` of the tests becomes a call of ``equal``."""

    def visit_Compare(self, node):
        """See NodeTransformer."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        name = ast.Name(id="__equal__", ctx=ast.Load())
        return ast.copy_location(
            ast.Call(func=name, args=[node.left, node.comparators[0]], keywords=[]), node
        )


def prepare(tests):
    """The tests as code, and the contents of the modules they import."""
    tree = ast.parse(tests)
    named = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named.append(node.module)
    contents = []
    for name in named:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # the tests will say so themselves
        contents.append((name, module, dict(vars(module))))
    tree = ast.fix_missing_locations(WatchedComparisons().visit(tree))
    return compile(tree, "<tests>", "exec"), contents


def restore(space, content):
    """Make a namespace what it was."""
    space.update(content)
    for name in [*space]:
        if name not in content:
            del space[name]


def judge(answer, tests, names):
    """Run the answer and the tests; returns what is wrong, or None."""
    run, modules = exec, sys.modules
    clean_builtins = dict(vars(builtins))
    module = types.ModuleType("answer")
    # The answer finds itself under __main__, not this file.
    modules["answer"] = modules["__main__"] = module
    try:
        test_code, contents = prepare(tests)
        run(compile(answer, ANSWER_FILE, "exec"), vars(module))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no way out either
        return describe(error)
    restore(vars(builtins), clean_builtins)
    for name, imported, content in contents:
        modules[name] = imported
        restore(vars(imported), content)
    given = {
        name: value
        for name, value in dict(vars(module)).items()
        if name in names or (name not in clean_builtins and not name.startswith("__"))
    }
    space = {"__name__": "tests", "__builtins__": clean_builtins, "__equal__": equal}
    sys.settrace(None)
    sys.setprofile(None)
    try:
        run(test_code, given | space)
    except BaseException as error:
        return describe(error)
    return None


def describe(error):
    """The kind of an error and its message; of an answer's own class, the kind alone."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL]
    except BaseException:
        return "an error that cannot be shown"


def main():
    """Standard input: {token, answer, tests, names}. Standard output: token, verdict, problem."""
    with open(0, encoding="utf-8", closefd=False) as file:
        given = json.load(file)
    report = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    write, leave = os.write, os._exit  # as they are before the answer runs
    problem = judge(given["answer"], given["tests"], given["names"])
    # Only methods of str from here on: json, for one, the answer can have changed inside.
    said = " passed " if problem is None else " failed " + problem
    write(report, (given["token"] + said).encode("ascii", "backslashreplace"))
    leave(0)


main()
