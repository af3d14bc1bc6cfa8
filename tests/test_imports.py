"""Who may import whom, and what no file of ours may hold. Oracle: the source itself, parsed; the table is that of
docs/design.md."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lowbit"
FILES = sorted(PACKAGE.rglob("*.py"))
BASE = {"errors", "optional"}
LOWER = BASE | {"numerics", "tensors", "kernels", "observe", "algorithms", "nn", "report"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "optional": {"errors"},
    "memory": set(),
    "numerics": {"errors"},
    "report": {"errors"},
    "wording": {"errors", "numerics", "report"},
    "tensors": {"errors", "numerics"},
    "kernels": BASE | {"numerics", "tensors"},
    "observe": BASE | {"numerics"},
    "algorithms": BASE | {"numerics", "tensors", "observe"},
    "nn": BASE | {"numerics", "tensors", "kernels"},
    "model": LOWER | {"memory"},
    "train": LOWER | {"model"},
    "io": (LOWER | {"model", "train", "wording"}) - {"algorithms"},
}
"""Room -> the rooms of ours that it may import; a room that is not listed (judge, verbs, cli) may import anything."""

FOREIGN: dict[str, set[str]] = {
    "errors": set(),
    "optional": set(),
    "report": set(),
    "wording": set(),
    "memory": {"torch"},
    "numerics": {"torch"},
    "tensors": {"torch"},
    "kernels": {"torch", "triton", "filelock"},
    "observe": {"torch", "safetensors"},
    "algorithms": {"torch"},
    "nn": {"torch"},
}
"""Room -> the packages beside the standard library that it may import; a room that is not listed may import any."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """ "lowbit.kernels.cuda.compiler" -> "kernels"; the package itself is "lowbit"."""
    return module.split(".")[1] if module.startswith("lowbit.") else "lowbit"


MODULES = {module_name(path): path for path in FILES}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that a file imports; "from a import b" gives a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in MODULES or base == "torch" else base), node.lineno


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


IMPORTS = {module: list(imported(parsed(path))) for module, path in MODULES.items()}


def test_the_rooms_are_all_there() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert {"numerics", "tensors", "kernels", "observe", "algorithms", "nn", "model", "io", "cli", "verbs"} <= rooms
    assert len(FILES) > 50


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, names in IMPORTS.items()
        if room_of(module) == room
        for name, line in names
        if name.split(".")[0] == "lowbit" and room_of(name) not in ALLOWED[room] | {room}
    ]
    assert wrong == []


@pytest.mark.parametrize("room", FOREIGN)
def test_a_low_room_imports_torch_at_most(room: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, names in IMPORTS.items()
        if room_of(module) == room
        for name, line in names
        if name.split(".")[0] not in {"lowbit", *sys.stdlib_module_names, *FOREIGN[room]}
    ]
    assert wrong == []


def test_nobody_but_the_command_imports_the_command() -> None:
    users = {module for module, names in IMPORTS.items() if any(room_of(name) == "cli" for name, _ in names)}
    assert {room_of(module) for module in users} == {"cli", "__main__"}


def test_nn_sees_kernels_through_their_ops_only() -> None:
    seen = {name for module, names in IMPORTS.items() if room_of(module) == "nn" for name, _ in names}
    assert {name for name in seen if room_of(name) == "kernels"} == {"lowbit.kernels.ops"}


def test_algorithms_know_no_modules_and_no_files() -> None:
    seen = {name for module, names in IMPORTS.items() if room_of(module) == "algorithms" for name, _ in names}
    assert not [name for name in seen if name.startswith("torch.nn") and name != "torch.nn.functional"]
    assert not seen & {"pathlib", "io", "os", "json"}


def test_triton_stays_in_its_room() -> None:
    users = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == "triton" for name, _ in names)}
    assert all(module.startswith("lowbit.kernels.triton") for module in users)


def test_rooms_form_no_circle() -> None:
    below: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        mine = {room_of(name) for name, _ in names if name.split(".")[0] == "lowbit"}
        below.setdefault(room_of(module), set()).update(mine - {room_of(module)})
    assert list(TopologicalSorter(below).static_order())  # CycleError names the circle


def test_modules_form_no_circle() -> None:
    below = {module: {name for name, _ in names if name in MODULES} for module, names in IMPORTS.items()}
    assert list(TopologicalSorter(below).static_order())


def test_imports_stand_at_the_top_absolute_and_without_a_star() -> None:
    wrong = []
    for path in FILES:
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or node.names[0].name == "*"):
                wrong.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Try | ast.If):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                wrong += [f"{path.name}:{n.lineno}" for n in inner]
    assert wrong == []


def called(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_optional_packages_are_imported_in_one_place() -> None:
    users = {
        module_name(path)
        for path in FILES
        for name, _ in called(parsed(path))
        if name.rpartition(".")[2] in ("import_module", "__import__")
    }
    assert users == {"lowbit.optional"}


def test_nothing_is_caught_blindly_and_no_environment_variable_is_read() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            blind = isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception")
            environment = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
            if blind or environment:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert wrong == []


WRITTEN = [*FILES, *(PACKAGE.rglob("*.html")), *PACKAGE.rglob("*.cu"), *PACKAGE.rglob("*.cuh")]
WRITTEN += [path for name in ("tests", "bench", "examples", "docs") for path in (ROOT / name).rglob("*")]
WRITTEN += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")]


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    machine = re.compile(r"(?<![\w.}])/(?:work|root|home|Users|mnt|workspace)/")
    wrong = []
    for path in WRITTEN:
        if path.is_file() and path.suffix in (
            ".py",
            ".md",
            ".json",
            ".html",
            ".toml",
            ".txt",
            ".cu",
            ".cuh",
            ".sh",
            "",
        ):
            text = path.read_text(encoding="utf-8")
            wrong += [f"{path.relative_to(ROOT)}: {found.group()}" for found in machine.finditer(text)]
    assert wrong == []
