"""The rules of the house: who may import whom, how long things may be, and what they may not be called."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "plait"
FILES = sorted(SRC.rglob("*.py"))

# room -> rooms that it may import; the whole of the law
LAW: dict[str, set[str]] = {
    "config": set(),
    "report": set(),
    "kernels": set(),
    "text": set(),
    "ops": {"kernels"},
    "data": {"text"},
    "precision": {"ops", "config"},
    "model": {"precision", "ops", "config"},
    "formats": {"model", "precision", "ops"},
    "dist": {"model", "ops"},
    "engine": {"formats", "dist", "model", "ops", "text"},
    "train": {"formats", "dist", "data", "model", "report"},
    "serve": {"engine", "text"},
    "curate": {"engine", "report"},
    "evals": {"engine", "model", "data", "config", "report"},
    "tune": {"train", "engine", "data"},
    "compress": {"train", "formats", "data", "model", "precision", "ops", "config", "report"},
}
# who stands above the law; `plait` itself is the file of lazy public names
FREE = {"cli", "__main__", "plait"}
# these rooms may be entered only from within a function, so that importing an op never compiles a kernel
ONLY_INSIDE_FUNCTIONS = {"kernels"}
# module -> where alone it may be imported (paths below src/plait); nowhere for what reads code from files
ONLY_UNDER: dict[str, tuple[str, ...]] = {
    "triton": ("kernels/triton/",),
    "ctypes": ("kernels/native/",),
    "torch.distributed": ("dist/", "train/loop.py"),
    "numpy": ("data/", "curate/", "formats/"),
    "pickle": (),
}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base", "types"}
WARN_LINES, STOP_LINES, STOP_FUNCTION_LINES, DEEPEST = 400, 700, 80, 2


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "plait"


def module_of(path: Path) -> str:
    return ".".join(("plait", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(tree: ast.AST, package: str, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each imported module of a tree, and whether the import stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from plait.ops import ssd` may mean the file ssd or a name in the package
            yield from ((child if (child := f"{origin}.{n.name}") in MODULES else origin, inside) for n in node.names)
            if origin == "torch":
                yield from ((f"torch.{name.name}", inside) for name in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", inside
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports_of(node, package, inside or function)


def faults_of(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return how the imports of one file break the law."""
    room = room_of(module)
    path = module.removeprefix("plait.").replace(".", "/") + ("/" if is_package else ".py")
    faults = []
    for target, inside in imports_of(ast.parse(source), module if is_package else module.rpartition(".")[0]):
        for guarded, places in ONLY_UNDER.items():
            if (target == guarded or target.startswith(guarded + ".")) and not path.startswith(places or ("-",)):
                faults.append(f"{path} imports {target}: only under {', '.join(places) or 'no roof'}")
        theirs = room_of(target)
        if target.partition(".")[0] != "plait" or theirs == room or room in FREE:
            continue
        if theirs not in LAW.get(room, set()):
            faults.append(f"{path} imports {target}: {room} may import {', '.join(sorted(LAW[room])) or 'nothing'}")
        elif theirs in ONLY_INSIDE_FUNCTIONS and not inside:
            faults.append(f"{path} imports {target} at its top: only inside functions")
    return faults


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """Return one circle of the graph as a path that ends where it began, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(arrows.get(node, ())):
                if found := walk(target, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring: explaining is free."""
    text = function.body[0] if ast.get_docstring(function) else None
    whole = (function.end_lineno or 0) - function.lineno + 1
    return whole - ((text.end_lineno or 0) - text.lineno + 1 if text else 0)


def is_table(node: ast.stmt) -> bool:
    """Tell whether a statement of a package's __init__ is an import or a literal table."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    logic = (ast.Call, ast.Lambda, ast.BinOp, ast.IfExp, ast.ListComp, ast.SetComp, ast.GeneratorExp)
    return not any(isinstance(inner, logic) for inner in ast.walk(node.value))


def test_every_room_has_its_line_in_the_law() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= LAW.keys() | FREE


@pytest.mark.parametrize("module", MODULES)
def test_imports_obey_the_law(module: str) -> None:
    path = MODULES[module]
    assert not faults_of(module, path.read_text(), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plait.text.bpe", "from plait.data.loader import Batch"),
        ("plait.ops.norm", "import plait.model.config"),
        ("plait.ops.norm", "from plait.kernels.triton import norm"),
        ("plait.model.cache", "def f():\n    from plait.cli.launch import arg"),
        ("plait.train.step", "from ..engine import pool"),
        ("plait.ops.norm", "import triton.language as tl"),
        ("plait.model.hybrid", "import numpy as np"),
        ("plait.model.hybrid", "import torch\ntorch.distributed.barrier()"),
        ("plait.train.step", "from torch import distributed"),
        ("plait.formats.native", "import pickle"),
    ],
)
def test_a_breach_of_the_law_is_seen(module: str, source: str) -> None:
    assert len(faults_of(module, source)) == 1


def test_what_the_law_allows_passes() -> None:
    assert not faults_of("plait.ops.norm", "def f():\n    from plait.kernels.triton.norm import g")
    assert not faults_of("plait.train.loop", "import torch.distributed as dist")
    assert not faults_of("plait.data.shards", "import numpy as np\nfrom plait.text.tokenizer import Tokenizer")
    assert not faults_of("plait.model.hybrid", "from .layer import LayerSpec")


def test_no_files_import_each_other_in_a_circle() -> None:
    arrows = {}
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        # an import inside a function is a call, made when both files are whole: a class method that offers its presets
        targets = {target for target, inside in imports_of(ast.parse(path.read_text()), package) if not inside}
        # the top file only lends names to users; its arrows point down by nature
        arrows[module] = {target for target in targets if target in MODULES and target != module} - {"plait"}
    circle = circle_in(arrows)
    assert not circle, " -> ".join(circle)


def test_a_circle_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    source = MODULES[module].read_text()
    n_lines = source.count("\n")
    assert n_lines <= STOP_LINES, f"{module} has {n_lines} lines; split it by concept"
    if n_lines > WARN_LINES:
        warnings.warn(f"{module} has {n_lines} lines; more than {WARN_LINES} begs for a split by concept", stacklevel=1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert function_lines(node) <= STOP_FUNCTION_LINES, f"{module}.{node.name} is too long"


def test_the_length_of_a_function_leaves_out_its_docstring() -> None:
    function = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n').body[0]
    assert isinstance(function, ast.FunctionDef)
    assert function_lines(function) == 2


@pytest.mark.parametrize("module", MODULES)
def test_names_say_something_and_folders_stay_flat(module: str) -> None:
    path = MODULES[module].relative_to(SRC)
    assert not FORBIDDEN_NAMES & set(module.split(".")), f"{path}: name it for what it does"
    assert "_part" not in path.stem
    assert len(path.parts) - 1 <= DEEPEST, f"{path} lies too deep"


@pytest.mark.parametrize("module", MODULES)
def test_every_file_begins_with_a_sentence_for_newcomers(module: str) -> None:
    first = (ast.get_docstring(ast.parse(MODULES[module].read_text())) or "").partition("\n")[0]
    assert first, f"{module} has no docstring"
    assert first[0].isupper() or not first[0].isalpha(), f"{module}: {first!r}"


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if path.name == "__init__.py" and m != "plait"])
def test_packages_hold_a_sentence_and_a_table_at_most(module: str) -> None:
    statements = ast.parse(MODULES[module].read_text()).body[1:]
    assert all(map(is_table, statements)), f"{module} holds logic; give it a file with a name"


def test_logic_in_a_package_file_is_seen() -> None:
    assert not any(map(is_table, ast.parse("def f(): ...\nx = f()\nfor i in x: ...\ny = [a for a in x]").body))
    assert all(map(is_table, ast.parse("from a import b\nT: dict[str, B] = {'b': b.X}\n__all__ = ['b']").body))


def test_every_verb_names_a_file_that_exists() -> None:
    from plait.cli import VERBS

    assert not [verb for verb, (module, _) in VERBS.items() if module not in MODULES]


def test_every_public_name_points_to_a_file_that_exists() -> None:
    import plait

    assert not [name for name, (module, _) in plait._LAZY.items() if module not in MODULES]
    assert set(plait._LAZY) == set(plait.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_file_loads_code_from_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            pytest.fail(f"{path.name}:{node.lineno} uses torch.load; weights and states are kept in safetensors")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            pytest.fail(f"{path.name}:{node.lineno} trusts code that comes with a checkpoint")
