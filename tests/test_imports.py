"""The direction of imports: eval -> open_instruct -> olmo_base, and nothing imports a door."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("olmo_base", "open_instruct", "eval")
DOORS = {"olmo_base.__main__", "open_instruct.__main__", "open_instruct.pipeline"}
LEAVES = {"olmo_base.model.rope", "open_instruct.losses", "eval.statistics"}
MAY_IMPORT = {
    "olmo_base": {"olmo_base"},
    "open_instruct": {"olmo_base", "open_instruct"},
    "eval": {"olmo_base", "open_instruct", "eval"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(nodes: list[ast.AST]) -> set[str]:
    """Dotted names that the import statements name; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


SOURCES = {
    module_name(file): ast.parse(file.read_text(encoding="utf-8"))
    for package in OURS
    for file in sorted((ROOT / package).rglob("*.py"))
}
IMPORTS = {name: imported_names(list(ast.walk(tree))) for name, tree in SOURCES.items()}


def of_ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in OURS}


def test_every_package_has_modules():
    assert {name.split(".")[0] for name in SOURCES} == set(OURS)


def test_packages_import_only_upstream():
    for module, names in IMPORTS.items():
        if module in DOORS and module.startswith("open_instruct."):
            continue  # these doors know every stage
        packages = {name.split(".")[0] for name in of_ours(names)}
        assert packages <= MAY_IMPORT[module.split(".")[0]], module


def test_nothing_but_a_door_imports_a_door():
    for module, names in IMPORTS.items():
        if module not in DOORS:
            assert not names & DOORS, module


def test_leaves_import_nothing_of_ours():
    for leaf in LEAVES:
        assert of_ours(IMPORTS[leaf]) <= {
            "olmo_base.run.errors",
            "olmo_base.run.errors.UserError",
        }, leaf


def test_accelerate_is_imported_by_the_loop_alone():
    users = {
        module
        for module, names in IMPORTS.items()
        if any(name.split(".")[0] == "accelerate" for name in names)
    }
    assert users == {"open_instruct.loop"}


def test_nothing_hides_the_builtin_eval():
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert "eval" not in [alias.name for alias in node.names], module


def test_importing_all_of_olmo_base_imports_neither_transformers_nor_torchs_compiler():
    modules = [name for name in SOURCES if name.startswith("olmo_base")]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
