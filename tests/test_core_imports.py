"""A folder is a dependency boundary: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ptqd_export

PACKAGE = Path(ptqd_export.__file__).parent
HEAVY = {
    "torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt",
    "tensorrt_rtx", "cuda", "polygraphy", "scipy", "matplotlib",
}  # fmt: skip
ALLOWED = {
    "calibrate": {"torch", "diffusers"},
    "export": {"onnx", "onnx_ir", "onnxscript"},
    "backends": {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "polygraphy"},
    "evaluate": {"scipy", "matplotlib"},
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MODULES = [".".join(("ptqd_export", *f.with_suffix("").parts)).removesuffix(".__init__") for f in FILES if len(f.parts) == 1 and f.stem != "__main__"]


@pytest.mark.parametrize("module", MODULES)
def test_core_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    """The surface; a change here is a change for users."""
    assert ptqd_export.__all__ == [
        "BackendUnavailable", "Bundle", "BundleError", "Correction", "Engine", "FakeEngine", "GraphError", "Manifest", "ModelError",
        "NoiseSchedule", "NoiseStats", "PTQDError", "ParityError", "Plan", "Precision", "Recipe", "RecipeError", "Runtime", "build", "rebuild",
        "run", "sample",
    ]  # fmt: skip
    assert all(hasattr(ptqd_export, name) for name in ptqd_export.__all__)


def _imported(tree: ast.AST, parts: tuple[str, ...]) -> set[str]:
    """Absolute names of the imports of the file at `parts`, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("ptqd_export", *parts[:-1])[: len(parts) + 1 - node.level] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=str)
def test_layers(file: Path) -> None:
    folder = file.parts[0] if len(file.parts) > 1 else ""
    names = _imported(ast.parse((PACKAGE / file).read_text("utf-8")), file.parts)
    allowed = ALLOWED.get(folder, set()) | ({"torch"} if file == Path("export/from_torch.py") else set())
    assert {name.partition(".")[0] for name in names} & HEAVY <= allowed
    for other in {"calibrate", "export", "backends"} - {folder}:
        if folder in {"calibrate", "export", "backends"}:
            assert not [name for name in names if f"{name}.".startswith(f"ptqd_export.{other}.")]


def test_layer_check_resolves_relative_imports() -> None:
    tree = ast.parse("from ..export import save\nfrom . import base\nfrom .ort import OrtEngine\nimport torch.nn")
    assert _imported(tree, ("backends", "x.py")) == {
        "ptqd_export.export.save",
        "ptqd_export.backends.base",
        "ptqd_export.backends.ort.OrtEngine",
        "torch.nn",
    }
    assert _imported(ast.parse("from .noise import Mode"), ("plan.py",)) == {"ptqd_export.noise.Mode"}
