"""The rules of the house that a machine can check: which way imports point, what is registered, how long things are."""

import ast
import re
from pathlib import Path

import pytest
from helpers.project import PROJECT

from lora_algos import ALGORITHMS, get_algorithm
from models import FAMILIES

# package -> packages of ours it may import
MAY_IMPORT = {
    "common": set(),
    "lora_algos": {"common"},
    "objectives": {"common"},
    "models": {"objectives", "common"},
    "data": {"models", "objectives", "common"},
    "adapter_files": {"models", "lora_algos", "common"},
    "training": {"adapter_files", "data", "models", "objectives", "lora_algos", "common"},
    "tools": {"training", "adapter_files", "data", "models", "objectives", "lora_algos", "common"},
}
FOLDERS = (*MAY_IMPORT, "benchmarks", "examples", "docs")
SOURCES = [
    *sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")),
    PROJECT / "train_lora.py",
]
TESTS = sorted((PROJECT / "tests").rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(PROJECT).parts[0]


def relative(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("path", [p for p in SOURCES if package_of(p) in MAY_IMPORT], ids=relative)
def test_imports_point_one_way(path):
    package = package_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        ours = {name.split(".")[0] for name in names} & {*MAY_IMPORT, "train_lora"}
        assert ours <= MAY_IMPORT[package] | {package}, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path):
    limit = 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_sources_are_ascii_without_leftovers(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text.replace("(TODO|FIXME|XXX|HACK)", ""))
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"bare except, line {node.lineno}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_constructors_take_no_kwargs(path):
    assert [f.name for f in functions(path) if f.name == "__init__" and f.args.kwarg] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_family_files_name_a_family(path):
    if path.parent.name == "families" or path.name == "__init__.py":
        return
    text = path.read_text(encoding="utf-8")
    assert not [name for name in FAMILIES if f'"{name}"' in text], (
        "a family is named outside its own file"
    )


def test_every_algorithm_is_one_file_under_its_name():
    for name, module in ALGORITHMS.items():
        assert get_algorithm(name).name == name
        assert (PROJECT / (module.replace(".", "/") + ".py")).is_file()


def test_every_family_is_one_file_and_a_recipe():
    recipes = [p.read_text(encoding="utf-8") for p in (PROJECT / "recipes").glob("*.yaml")]
    for name, module in FAMILIES.items():
        assert (PROJECT / (module.replace(".", "/") + ".py")).is_file()
        assert name == "sd15" or any(f"family: {name}" in recipe for recipe in recipes)


def test_no_root_folder_shadows_a_library():
    libraries = {
        "datasets",
        "accelerate",
        "peft",
        "diffusers",
        "torch",
        "transformers",
        "safetensors",
        "wandb",
    }
    assert not libraries & {path.name for path in PROJECT.iterdir()}


def test_public_functions_say_what_they_are_for():
    missing = []  # but of the one class that a file is about, and says so at its top
    about_one = {
        PROJECT / (module.replace(".", "/") + ".py")
        for module in (*FAMILIES.values(), ALGORITHMS["LoRA"])
    }
    for path in SOURCES:
        if package_of(path) not in MAY_IMPORT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{relative(path)}: no docstring"
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        undocumented = [f"{relative(path)}: {n.name}" for n in classes if not ast.get_docstring(n)]
        missing += undocumented[1:] if path in about_one else undocumented
    assert not missing
