"""The plan of the house: folders are floors, imports run down, and each fact has one place.

architecture in docs/design.md: errors, typed, files, progress < core < recipe, bundle < calibrate | export |
backends < runtime < parity < assemble | evaluate < the command line.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptqd_export
from ptqd_export.bundle import bundle, tables
from ptqd_export.core.backend import BACKENDS

PACKAGE = Path(ptqd_export.__file__).parent
ROOT = PACKAGE.parent
MAX_LINES, MAX_COLUMNS = 400, 110
FLOORS = {
    "errors": 0,
    "version": 0,
    "typed": 1,
    "files": 1,
    "progress": 1,
    "core": 2,
    "recipe": 3,
    "bundle": 3,
    "calibrate": 4,
    "export": 4,
    "backends": 4,
    "runtime": 5,
    "parity": 6,
    "assemble": 7,
    "evaluate": 7,
    "dropin": 7,
    "bench": 7,
    "farm": 7,
    "pictures": 7,
    "cli": 9,
    "__main__": 10,
}
"""Of folders and of the modules beside them; the package's own face, `ptqd_export/__init__.py`, stands at
8."""
FACE = 8
APART = (
    {"calibrate", "export", "backends"},
    {"assemble", "evaluate", "dropin", "bench", "pictures"},
    {"assemble", "evaluate", "dropin", "bench", "farm"},
)
"""Rooms of one floor that never import one another: they exchange values of the core."""
HEAVY = {
    "torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "onnxruntime", "openvino", "nncf",
    "tensorrt", "tensorrt_rtx", "cuda", "polygraphy", "scipy", "matplotlib", "skimage", "PIL",
    "cryptography", "transformers", "tokenizers", "ray", "pyarrow",
}  # fmt: skip
ALLOWED = {
    "calibrate": {"torch", "diffusers", "transformers"},
    "dropin": {"torch", "diffusers"},
    "export": {"onnx", "onnx_ir", "onnxscript", "ml_dtypes"},
    "backends": {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"},
    "parity": {"scipy", "polygraphy"},
    "evaluate": {"matplotlib", "scipy", "skimage"},
    "farm": {"ray", "pyarrow"},
    "assemble": {"onnx_ir"},
    "bench": {"onnxruntime", "openvino", "nncf", "matplotlib"},
    "bundle": {"cryptography", "tokenizers"},
    "pictures": {"PIL"},
}
"""Heavy libraries by room; where one imports them only inside functions, a deployment need not have them."""
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
TREES = {file: ast.parse((PACKAGE / file).read_text("utf-8")) for file in FILES}
EVERYWHERE = [
    path
    for folder in ("ptqd_export", "tests", "benchmarks", "calib", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not {"work", "out"} & set(path.relative_to(ROOT).parts)
]


def room(file: Path) -> str:
    """The folder, or the module, that a file belongs to; "" for the package's face."""
    return file.parts[0] if len(file.parts) > 1 else file.stem.removesuffix("__init__")


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """Absolute names that a file imports, wherever in it: "ptqd_export.core.plan.Plan", "torch"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ("ptqd_export", *file.parts[:-1])
            base = parts[: len(parts) + 1 - node.level] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def rooms_imported(tree: ast.AST, file: Path) -> set[str]:
    found = set()
    for name in imports(tree, file):
        first, *rest = name.split(".")
        if first == "ptqd_export":
            found.add(rest[0] if rest and rest[0] in FLOORS else "")
    return found - {room(file)}


def floor(name: str) -> int:
    return FLOORS[name] if name else FACE


def test_every_room_has_a_floor() -> None:
    assert {room(file) for file in FILES} - {""} == set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_down(file: Path) -> None:
    here = room(file)
    for other in rooms_imported(TREES[file], file):
        assert floor(other) <= floor(here), f"{file} imports {other or 'the face'}, which stands above it"
        for apart in APART:
            assert not {here, other} <= apart, f"{file} imports {other}: they exchange values of the core"
    heavy = {name.partition(".")[0] for name in imports(TREES[file], file)} & HEAVY
    allowed = ALLOWED.get(here, set()) | ({"torch"} if file == Path("export/from_torch.py") else set())
    assert heavy <= allowed, f"{file} imports {heavy - allowed}"


def test_the_reading_of_imports() -> None:
    """Relative and lazy ones; a wrong one would be found."""
    tree = ast.parse("from ..runtime import run\ndef f():\n    from . import ort\n    import torch.nn\n")
    file = Path("core/x.py")
    assert set(imports(tree, file)) == {"ptqd_export.runtime.run", "ptqd_export.core.ort", "torch.nn"}
    assert rooms_imported(tree, file) == {"runtime"} and floor("runtime") > floor("core")


def test_a_bare_import_loads_nothing_heavy() -> None:
    """The package, its core, and what a deployment imports to read a bundle."""
    modules = ("cli", "runtime", "parity.machines", "assemble.replan", "cli.plan")
    for module in ("ptqd_export", *(f"ptqd_export.{name}" for name in modules)):
        code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


def test_public_names() -> None:
    """The surface; a change here is a change for users."""
    names = """
    BackendUnavailable Bundle BundleError Correction Engine FakeEngine GraphError Manifest ModelError
    NoiseSchedule NoiseStats PTQDError ParityError Plan Precision Recipe RecipeError Runtime Sampling
    build rebuild run
    """
    assert ptqd_export.__all__ == names.split()
    assert all(hasattr(ptqd_export, name) for name in ptqd_export.__all__)


def literals(tree: ast.AST) -> Iterator[str]:
    """Strings of the code: docstrings and the texts of messages that hold more than the word are not among
    them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_backend_names_stand_in_one_place() -> None:
    # Some are also the names of modules, and of a section of the recipe.
    names = set(BACKENDS) - {"torch", "tensorrt", "openvino"}
    for file in FILES:
        if file != Path("core/backend.py"):
            assert not names & set(literals(TREES[file])), file
    assert names <= set(literals(TREES[Path("core/backend.py")]))


def test_names_of_bundle_files_stand_in_one_place() -> None:
    names = {bundle.MANIFEST, bundle.WEIGHTS, tables.TABLES, tables.QUANTIZATION}
    keys = re.compile(r"^(probe_noise|weight_scale|input_scale|output_scale)$")
    for file in FILES:
        if room(file) != "bundle":
            found = set(literals(TREES[file]))
            assert not names & found, file
            assert not [text for text in found if keys.match(text)], file


def test_public_functions_are_used() -> None:
    """Each is called somewhere else than where it is defined, or is public by an `__all__`; tests do not
    count."""
    words: dict[Path, set[str]] = {}
    sources = {file: (PACKAGE / file).read_text("utf-8") for file in FILES}
    for script in (*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "calib").rglob("*.py"))):
        sources[script] = script.read_text("utf-8")
    for file, text in sources.items():
        words[file] = set(re.findall(r"\w+", text))
    unused = []
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                elsewhere = any(node.name in words[other] for other in sources if other != file)
                inside = len(re.findall(rf"\b{node.name}\b", sources[file])) > 1
                if not elsewhere and not inside:
                    unused.append(f"{file}: {node.name}")
    assert unused == []


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_narrow(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines), default=0) <= MAX_COLUMNS


def test_tests_mirror_the_package() -> None:
    """Every folder of tests is one of the package, or holds what tests share."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    mine = {file.parent for file in FILES}
    assert folders <= {*mine, Path("."), Path("fuzz")}
    for name in (
        "core",
        "bundle",
        "calibrate",
        "export",
        "backends",
        "backends/trt",
        "runtime",
        "parity",
        "assemble",
    ):
        assert Path(name) in folders, f"no tests of {name}"
