"""Measures of the code's readability: `python tests/house_report.py [--where] [path ...]`.

Prints one line per measure with its target, and with --where the places that miss it. Paths limit the report to these
files or folders. tests/project/test_house_rules.py holds the project to the targets.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "adapter_files",
    "common",
    "data",
    "lora_algos",
    "models",
    "objectives",
    "tools",
    "training",
)
GENERIC_NAMES = frozenset(
    """
    found given there here one both wanted own known told said places made mine kept others other rest every whole part
    parts asked place kind what which more much many few most least near far late early pending beside inside
    """.split()  # noqa: SIM905
)
BANNED_OPENINGS = frozenset("What Whatever Whether Those Of How Where Which That".split())  # noqa: SIM905
BANNED_WORDS = (
    "faults?", "told", "asked", "heeds?", "heeded", "beside", "be had", "anew", "of its own", "of their own",
    "is said", "are said", "in place of", "but for", "goes on", "go on", "went on", "stands? for", "reckon\\w*",
    "kin", "by itself", "there is none", "there are none", "as it is", "of which", "whatever", "wants?", "wanted",
    "no such", "a word to", "kept apart", "behind them",
)  # fmt: skip
ALLOWED_PHRASES = ("no such option", "no such argument", "no such file", "ou want", "page fault")
MAX_GENERIC_SHARE, MAX_NODES_PER_LINE, MAX_FILE_LINES = 0.01, 9.0, 400
MAX_FUNCTION_LINES, MAX_SENTENCE_WORDS, MAX_ATTRIBUTES = 60, 22, 15


@dataclass
class SourceFile:
    """A Python file with its syntax tree."""

    path: Path
    text: str = field(init=False)
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(PROJECT))

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]

    def bound_names(self) -> Iterator[tuple[str, int]]:
        """Yield names of local variables and parameters, with their line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id, node.lineno
            elif isinstance(node, ast.arg):
                yield node.arg, node.lineno

    def generic_names(self) -> list[tuple[str, int]]:
        return [(name, line) for name, line in self.bound_names() if name in GENERIC_NAMES]

    def nodes_per_line(self) -> float:
        """Return the median of AST nodes per line over the functions of at least five lines."""
        densities = []
        for function in self.functions:
            lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
            if lines >= 5:
                densities.append(sum(1 for _ in ast.walk(function)) / lines)
        return statistics.median(densities) if densities else 0.0

    def docstrings(self) -> Iterator[tuple[str, int]]:
        """Yield docstrings, those of attributes included, with their first line."""
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield node.value.value, node.lineno

    def comments(self) -> Iterator[tuple[str, int]]:
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.string.lstrip("# "), token.start[0]

    def strings(self) -> Iterator[tuple[str, int]]:
        """Yield all texts: docstrings, messages and other literals."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value, node.lineno

    def odd_openings(self) -> list[tuple[str, int]]:
        texts = [*self.docstrings(), *self.comments()]
        return [
            (text, line)
            for text, line in texts
            if text.split() and text.split()[0].rstrip(",:") in BANNED_OPENINGS
        ]

    def banned_words(self) -> list[tuple[str, int]]:
        matches = []
        for text, line in [*self.strings(), *self.comments()]:
            if " " in text:
                matches += [(word, line) for word in banned_words_in(text)]
        return matches

    def long_sentences(self) -> list[tuple[str, int]]:
        """Return sentences of docstrings with more than MAX_SENTENCE_WORDS words."""
        sentences = []
        for text, line in self.docstrings():
            prose = re.sub(r"\n\s*\n|\n\s{4,}\S.*", ". ", text)
            for sentence in re.split(r"[.:;]\s", prose.replace("\n", " ")):
                if len(sentence.split()) > MAX_SENTENCE_WORDS:
                    sentences.append((" ".join(sentence.split()[:6]), line))
        return sentences

    def nested_expressions(self) -> list[tuple[str, int]]:
        """Return conditional expressions in comprehensions or conditional expressions, and nested comprehensions."""
        comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        places = []
        for node in ast.walk(self.tree):
            if not isinstance(node, (*comprehensions, ast.IfExp)):
                continue
            for inner in ast.walk(node):
                if inner is node:
                    continue
                if isinstance(inner, ast.IfExp):
                    places.append(("conditional expression inside", inner.lineno))
                elif isinstance(inner, comprehensions) and not isinstance(node, ast.IfExp):
                    places.append(("nested comprehension", inner.lineno))
        return places


def banned_words_in(text: str) -> list[str]:
    """Return the banned words and phrases in a text."""
    for phrase in ALLOWED_PHRASES:
        text = text.replace(phrase, "")
    pattern = re.compile(rf"\b({'|'.join(BANNED_WORDS)})\b", re.IGNORECASE)
    return [match[0] for match in pattern.finditer(text)]


def source_files(paths: list[str]) -> list[SourceFile]:
    """Return the product's files, or those among them that are below the paths."""
    command = ["git", "ls-files", "-c", "-o", "--exclude-standard", "*.py"]
    names = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, check=True
    ).stdout.split()
    product = [name for name in names if name.split("/")[0] in PACKAGES or name == "train_lora.py"]
    if paths:
        product = [name for name in product if name.startswith(tuple(paths))]
    return [
        SourceFile(PROJECT / name) for name in sorted(set(product)) if (PROJECT / name).exists()
    ]


def import_circles(files: list[SourceFile]) -> list[list[str]]:
    """Return groups of files that import each other, directly or through others (Tarjan's algorithm)."""
    modules = {file.module: file.name for file in files}
    edges = {file.name: imported_files(file, modules) for file in files}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            position = stack.index(name)
            group = stack[position:]
            del stack[position:]
            if len(group) > 1:
                circles.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in edges:
        if name not in index:
            visit(name)
    return circles


def imported_files(file: SourceFile, modules: dict[str, str]) -> set[str]:
    """Return the files that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {modules[name] for name in names if name in modules} - {file.name}


def largest_class(files: list[SourceFile]) -> tuple[int, str]:
    """Return the largest number of attributes that a class sets on self, and the class."""
    counts = [(0, "")]
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef):
                names = {
                    target.attr
                    for target in ast.walk(node)
                    if isinstance(target, ast.Attribute)
                    and isinstance(target.ctx, ast.Store)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                }
                counts.append((len(names), f"{file.name}:{node.name}"))
    return max(counts)


def longest_functions(files: list[SourceFile]) -> list[tuple[int, str]]:
    lengths = [
        (function.end_lineno - function.lineno + 1, f"{file.name}:{function.name}")  # type: ignore[operator]
        for file in files
        for function in file.functions
    ]
    return sorted(lengths, reverse=True)


def main(arguments: list[str]) -> int:
    """Print the report; return 1 if a target is missed."""
    shows_places = "--where" in arguments
    files = source_files([argument for argument in arguments if not argument.startswith("--")])
    bound = sum(1 for file in files for _ in file.bound_names())
    generic = sum(len(file.generic_names()) for file in files)
    functions = [function for file in files for function in file.functions]
    densities = [file.nodes_per_line() for file in files]
    circles = import_circles(files)
    attributes, class_name = largest_class(files)
    longest = longest_functions(files)
    num_lines = [file.text.count("\n") for file in files]
    you = len(
        re.findall(r"\byour?\b", (PROJECT / "README.md").read_text(encoding="utf-8"), re.IGNORECASE)
    )
    measures = [
        ("files / lines / median / under 45", f"{len(files)} / {sum(num_lines)} / {statistics.median(num_lines):.0f} / "
         f"{sum(count < 45 for count in num_lines)}", "", True),
        ("longest file", str(max(num_lines)), str(MAX_FILE_LINES), max(num_lines) <= MAX_FILE_LINES),
        ("longest function", f"{longest[0][0]} ({longest[0][1]})", str(MAX_FUNCTION_LINES),
         longest[0][0] <= MAX_FUNCTION_LINES),
        ("import circles", str(len(circles)), "0", not circles),
        ("most attributes of a class", f"{attributes} ({class_name})", str(MAX_ATTRIBUTES),
         attributes <= MAX_ATTRIBUTES),
        ("generic names", f"{generic} of {bound} = {100 * generic / bound:.2f} %", "1 %",
         generic <= MAX_GENERIC_SHARE * bound),
        ("AST nodes per line, median of all files / of the densest", f"{statistics.median(densities):.1f} / "
         f"{max(densities):.1f}", "9", max(densities) <= MAX_NODES_PER_LINE),
        ("odd openings of docstrings and comments", str(sum(len(file.odd_openings()) for file in files)), "0",
         not any(file.odd_openings() for file in files)),
        ("banned words", str(sum(len(file.banned_words()) for file in files)), "0",
         not any(file.banned_words() for file in files)),
        ("nested conditionals and comprehensions", str(sum(len(file.nested_expressions()) for file in files)), "0",
         not any(file.nested_expressions() for file in files)),
        ("sentences over 22 words in docstrings", str(sum(len(file.long_sentences()) for file in files)), "", True),
        ("functions", str(len(functions)), "", True),
        ("'you' in README", str(you), "20", you >= 20),
    ]  # fmt: skip
    for name, value, target, is_met in measures:
        print(
            f"{'ok  ' if is_met else 'MISS'} {name}: {value}"
            + (f" (target {target})" if target else "")
        )
    if shows_places:
        print_places(files, circles)
    return int(not all(is_met for *_, is_met in measures))


def print_places(files: list[SourceFile], circles: list[list[str]]) -> None:
    """Print where the targets are missed."""
    for circle in circles:
        print(f"circle: {', '.join(circle)}")
    for file in files:
        if file.nodes_per_line() > MAX_NODES_PER_LINE:
            print(f"{file.name}: {file.nodes_per_line():.1f} nodes per line")
        measures = {
            "generic name": file.generic_names(), "opening": file.odd_openings(), "banned word": file.banned_words(),
            "": file.nested_expressions(), "long sentence": file.long_sentences(),
        }  # fmt: skip
        for measure, places in measures.items():
            for text, line in places:
                print(f"{file.name}:{line}: {measure} {text.strip().splitlines()[0][:70]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
