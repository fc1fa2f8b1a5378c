"""The rules of the house, held by reading the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "replay", "rollout", "trainer")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120
TORCH_FREE = (
    "kernels/spec.py", "replay/binary.py", "replay/errors.py", "replay/families.py", "replay/record.py",
    "replay/record_file.py", "replay/spec.py", "replay/validation.py", "replay/vllm.py", "replay/wire.py",
)  # fmt: skip
ENGINE = ("embedded", "slot_cache")  # the parts of the rollout floor that are an engine, and so may import torch
SHAPE = re.compile(r"\[[A-Z0-9.][^\]]*\]|0-d|scalar")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions, but not for type checking only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Public functions and methods of a file, nested ones left out."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for node in body:
            if isinstance(node, Function):
                yield f"{prefix}{node.name}", node
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body, "")


def is_kernel(node: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_floors_stand() -> None:
    assert {path.parent.name for path in FILES} >= set(FLOORS)
    for floor in FLOORS:
        link = ROOT / "src" / "pacenote" / floor
        assert link.is_symlink()
        assert link.readlink().as_posix() == f"../../{floor}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_floors_import_only_leftwards(path: Path) -> None:
    above = FLOORS[FLOORS.index(path.relative_to(ROOT).parts[0]) + 1 :]
    wrong = {module for module in imports(path) for floor in above if module.startswith(f"pacenote.{floor}")}
    assert not wrong, f"{name(path)} imports from a floor above it: {sorted(wrong)}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_no_bare_imports(path: Path) -> None:
    assert not {module for module in imports(path) if module.split(".")[0] in FLOORS}


def test_one_init() -> None:
    assert [
        name(path) for path in ROOT.rglob("__init__.py") if not {".venv", ".venv-sglang", "build"} & {*path.parts}
    ] == ["src/pacenote/__init__.py"]


def test_no_utils() -> None:
    assert not [name(path) for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_torch_stays_where_it_belongs(path: Path) -> None:
    rollout = name(path).startswith("rollout/") and not path.stem.startswith(ENGINE)
    if rollout or name(path) in TORCH_FREE:
        assert not {module for module in imports(path) if module.split(".")[0] in {"torch", "triton"}}


@pytest.mark.parametrize(
    "module", ["pacenote", "pacenote.replay.record", "pacenote.replay.wire", "pacenote.rollout.server"]
)
def test_torch_is_not_pulled_in(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=name)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name(path)} has no docstring"
    missing = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    missing += [
        label
        for label, node in functions(path)
        if not any(part.startswith("_") for part in label.split("."))  # what __init__ takes stands at the class
        and not ast.get_docstring(node)
    ]
    assert not missing, f"{name(path)}: without a docstring: {missing}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_tensors_have_shapes(path: Path) -> None:
    """A public function that takes or gives arrays says their shapes."""
    silent = []
    for label, node in functions(path):
        if any(part.startswith("_") for part in label.split(".")) or is_kernel(node):
            continue
        annotations = [ast.unparse(a.annotation) for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
        annotations.append(ast.unparse(node.returns) if node.returns else "")
        arrays = any(re.search(r"\b(Tensor|NDArray|ndarray)\b", text) for text in annotations)
        if arrays and not SHAPE.search(ast.get_docstring(node) or ""):
            silent.append(label)
    assert not silent, f"{name(path)}: arrays without a shape in the docstring: {silent}"


def test_sizes_are_reported() -> None:
    """Sizes are guides: what is over them is warned about, not refused."""
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            warnings.warn(f"{name(path)} has {lines} lines; the guide is {FILE_LINES}", stacklevel=1)
        for label, node in functions(path):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            guide = KERNEL_LINES if is_kernel(node) else FUNCTION_LINES
            if length > guide:
                warnings.warn(f"{name(path)}: {label} has {length} lines; the guide is {guide}", stacklevel=1)


def test_front_door_opens() -> None:
    import pacenote

    for public in pacenote.__all__:
        assert getattr(pacenote, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pacenote.nothing  # type: ignore[attr-defined]
