"""Rules of the house that a machine can check: imports, registries, sizes, names and language."""

import ast
import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import house_report
import pytest
from helpers.project import PROJECT
from house_report import SourceFile, import_circles, source_files

import tools
from adapter_files import FORMATS
from lora_algos import ALGORITHMS, get_algorithm
from models import FAMILIES
from objectives import DENSITIES, LOSSES, WEIGHTINGS
from training.cli import COMMAND_NAMES
from training.config import TrainConfig
from training.optim.registry import OPTIMIZERS

# package -> packages of the project that it may import
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
PRODUCT = source_files([])
OTHER_FOLDERS = ("benchmarks", "docs", "examples")
OTHERS = [
    SourceFile(path)
    for folder in OTHER_FOLDERS
    for path in sorted((PROJECT / folder).rglob("*.py"))
]
TESTS = sorted((PROJECT / "tests").rglob("*.py"))
MAX_LINE_LENGTH = 110
LIBRARIES = {
    "accelerate", "datasets", "diffusers", "peft", "safetensors", "torch", "transformers", "wandb",
}  # fmt: skip
REGISTRIES = {
    "algorithm": ALGORITHMS,
    "optimizer": OPTIMIZERS,
    "loss_function": LOSSES,
    "model.family": FAMILIES,
    "objective.timestep_sampling": DENSITIES,
    "objective.loss_weighting": WEIGHTINGS,
    "export.formats": FORMATS,
}
"""Options whose names come from a registry."""
GUIDES = ("CONTRIBUTING.md", "docs/extending.md")
MARKDOWN = [
    PROJECT / "README.md", PROJECT / "CHANGELOG.md", PROJECT / "CONTRIBUTING.md",
    *sorted((PROJECT / "docs").glob("*.md")),
]  # fmt: skip


def file_id(file: SourceFile) -> str:
    return file.name


each_product_file = pytest.mark.parametrize("file", PRODUCT, ids=file_id)
each_source = pytest.mark.parametrize("file", [*PRODUCT, *OTHERS], ids=file_id)


@each_product_file
def test_imports_point_one_way(file):
    package = file.name.split("/")[0]
    allowed = MAY_IMPORT.get(package)
    if allowed is None:  # train_lora.py
        return
    for node in ast.walk(file.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        imported = {name.split(".")[0] for name in names} & {*MAY_IMPORT, "train_lora"}
        assert imported <= allowed | {package}, f"line {node.lineno}"


def test_no_files_import_each_other():
    assert import_circles(PRODUCT) == []


@each_source
def test_files_and_functions_are_short(file):
    lines = file.text.splitlines()
    assert len(lines) <= house_report.MAX_FILE_LINES
    long_lines = [number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE_LENGTH]
    assert long_lines == []
    for function in file.functions:
        length = function.end_lineno - function.lineno + 1
        assert length <= house_report.MAX_FUNCTION_LINES, function.name


@each_product_file
def test_functions_are_not_dense(file):
    assert file.nodes_per_line() <= house_report.MAX_NODES_PER_LINE
    assert file.nested_expressions() == []


@each_product_file
def test_docstrings_and_messages_are_plain_english(file):
    assert file.odd_openings() == []
    assert file.banned_words() == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_pages_are_plain_english(path):
    assert house_report.banned_words_in(path.read_text(encoding="utf-8")) == []


def test_local_names_are_nouns_of_the_field():
    generic_names = [name for file in PRODUCT for name, _ in file.generic_names()]
    num_names = sum(1 for file in PRODUCT for _ in file.bound_names())
    assert len(generic_names) <= house_report.MAX_GENERIC_SHARE * num_names


def test_no_class_has_many_attributes():
    count, name = house_report.largest_class(PRODUCT)
    assert count <= house_report.MAX_ATTRIBUTES, name


@pytest.mark.parametrize("path", [*(PROJECT / f.name for f in (*PRODUCT, *OTHERS)), *TESTS],
                         ids=lambda path: str(path.relative_to(PROJECT)))  # fmt: skip
def test_sources_are_ascii_without_leftovers(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text.replace("(TODO|FIXME|XXX|HACK)", ""))
    for node in ast.walk(ast.parse(text)):
        is_bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not is_bare, f"bare except, line {node.lineno}"


@each_source
def test_constructors_take_no_kwargs(file):
    constructors = [function for function in file.functions if function.name == "__init__"]
    assert [function.lineno for function in constructors if function.args.kwarg] == []


@each_source
def test_only_a_familys_own_file_names_it(file):
    if Path(file.name).parent.name == "families" or file.name.endswith("__init__.py"):
        return
    if file.name.startswith("benchmarks"):  # measures models of some families
        return
    assert [name for name in FAMILIES if f'"{name}"' in file.text] == []


def test_every_algorithm_is_one_file_under_its_name():
    for name, module in ALGORITHMS.items():
        assert get_algorithm(name).name == name
        assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()


def test_every_family_is_one_file_and_a_recipe():
    recipes = [path.read_text(encoding="utf-8") for path in (PROJECT / "recipes").glob("*.yaml")]
    for name, module in FAMILIES.items():
        assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()
        assert name == "sd15" or any(f"family: {name}" in recipe for recipe in recipes)


@pytest.mark.parametrize("option", REGISTRIES)
def test_choices_come_from_their_registry(option):
    section: type = TrainConfig
    *path, name = option.split(".")
    for key in path:
        section = typing.get_type_hints(section)[key]
    assert is_dataclass(section)
    assert name in {item.name for item in fields(section)}
    choices = set(literal_choices(typing.get_type_hints(section)[name]))
    assert choices == set(REGISTRIES[option])


def literal_choices(hint: object) -> list[str]:
    """Return the strings of all Literals in a type."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    choices = []
    for argument in typing.get_args(hint):
        choices += literal_choices(argument)
    return choices


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_name_what_exists(guide):
    text = (PROJECT / guide).read_text(encoding="utf-8")
    names = re.findall(r"`([^`\s]+)`", text)
    paths = [name for name in names if re.fullmatch(r"[\w./-]+\.(py|yaml|md|toml)|[\w/-]+/", name)]
    classes = [
        name for name in names if re.fullmatch(r"[A-Z][a-z]+([A-Z][a-z]+)+|[A-Z][a-z]{3,}", name)
    ]
    assert paths
    assert [path for path in paths if not (PROJECT / path).exists()] == []
    defined = {
        node.name
        for file in PRODUCT
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert [name for name in classes if name not in defined] == []


def test_no_root_folder_shadows_a_library():
    assert not LIBRARIES & {path.name for path in PROJECT.iterdir()}


@each_product_file
def test_modules_and_classes_have_docstrings(file):
    assert ast.get_docstring(file.tree), "no docstring"
    classes = [node for node in file.tree.body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes if not ast.get_docstring(node)] == []


def test_the_usage_names_every_command():
    """training/cli.py cannot import tools, so it repeats the names."""
    assert COMMAND_NAMES == tools.COMMANDS
