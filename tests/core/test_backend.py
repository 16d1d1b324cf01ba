"""The table of backends: names, what each runs, and what it makes of a precision."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import ptqd_export
from ptqd_export.core.backend import (
    BACKENDS,
    ENGINE_BACKENDS,
    FLOAT_ERROR,
    OPENVINO,
    OPENVINO_FP32,
    ORT_CPU,
    ORT_CUDA,
    RUNNABLE,
    TENSORRT,
    TENSORRT_RTX,
    TORCH,
    Emission,
    backend,
    install_hint,
)
from ptqd_export.core.precision import Precision
from ptqd_export.errors import BackendUnavailable, RecipeError

PACKAGE = Path(ptqd_export.__file__).parent


def test_which_numerics_hold_for_an_emission() -> None:
    own = {
        (str(p), e)
        for p in map(Precision.parse, ("w8a8", "w4a4", "w8a8-fp8", "w4a16", "fp16", "fp32"))
        for e in Emission
        if e.numerics(p) is e
    }
    assert own == {(p, Emission.PORTABLE) for p in ("w8a8", "w4a4", "w8a8-fp8", "w4a16", "fp16", "fp32")} | {
        ("w8a8", Emission.ORT_CPU),
        ("w4a4", Emission.ORT_CPU),
    }
    assert all(e.numerics(Precision(8, 8, "fp8")) is Emission.PORTABLE for e in Emission)
    assert Emission.HALF.numerics(Precision(8, 8)) is Emission.PORTABLE
    assert {backend.emission for backend in BACKENDS.values()} <= set(Emission)


def test_the_table() -> None:
    """Best first: the order in which a run tries them."""
    assert list(BACKENDS) == [
        "tensorrt", "tensorrt-rtx", "ort-cuda", "openvino", "openvino-fp32", "ort-cpu", "torch",
    ]  # fmt: skip
    assert all(name == entry.name for name, entry in BACKENDS.items())
    assert tuple(BACKENDS) == (*RUNNABLE, TORCH)
    assert RUNNABLE == (TENSORRT, TENSORRT_RTX, ORT_CUDA, OPENVINO, OPENVINO_FP32, ORT_CPU)
    assert ENGINE_BACKENDS == (TENSORRT, TENSORRT_RTX)
    assert {name for name, entry in BACKENDS.items() if entry.on_device} == {*ENGINE_BACKENDS, ORT_CUDA}
    assert {name for name, entry in BACKENDS.items() if entry.emission is Emission.HALF} == {
        *ENGINE_BACKENDS,
        ORT_CUDA,
    }
    assert {entry.emission for entry in (backend(OPENVINO), backend(OPENVINO_FP32))} == {Emission.PORTABLE}
    assert {entry.floats for entry in BACKENDS.values()} <= set(FLOAT_ERROR)
    assert backend(ORT_CUDA).state == "float32 on the device" and not backend(ORT_CUDA).eight_bit
    assert backend(ORT_CPU).state == backend(TORCH).state == "float64 on the host"


def test_extras_are_those_of_the_package() -> None:
    pyproject = PACKAGE.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    for entry in BACKENDS.values():
        needed = {re.split(r"[\[>=]", line)[0] for line in extras[entry.extra]}
        assert entry.distributions[0] in needed, entry.name
    assert "torch" not in {re.split(r"[\[>=]", line)[0] for line in extras[BACKENDS[ORT_CPU].extra]}


def _texts(source: str) -> set[str]:
    """Every text of a file that is not a docstring or a lone string."""
    tree = ast.parse(source)
    lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in lone)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_names_stand_as_text_in_the_table_alone() -> None:
    """But those that are names of modules too."""
    names = set(BACKENDS) - {TENSORRT, TORCH, OPENVINO}
    assert _texts('"""ort-cpu"""\nx = "ort-cuda"  # ort-cpu') == {"ort-cuda"}
    found = {
        str(file.relative_to(PACKAGE)): sorted(names & _texts(file.read_text("utf-8")))
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    assert {file: texts for file, texts in found.items() if texts} == {
        "core/backend.py": sorted(names),
    }


@pytest.mark.parametrize("name", ["", "ort", "ORT-CPU", "tensorrt ", "\x1b[31m" + "x" * 1000])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="expected one of tensorrt, tensorrt-rtx, ort-cuda") as caught:
        backend(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_what_is_not_installed_is_said_with_its_extra() -> None:
    error = backend(TENSORRT_RTX).missing(ImportError("No module named 'tensorrt_rtx'"))
    assert isinstance(error, BackendUnavailable)
    assert str(error) == (
        "backend tensorrt-rtx is not installed (No module named 'tensorrt_rtx'): "
        "in a checkout of ptqd-export: pip install '.[tensorrt-rtx]'"
    )
    assert install_hint("gpu") == "in a checkout of ptqd-export: pip install '.[gpu]'"


WIDE_KERNEL = "S8 x S8 at layer inputs, bfloat16 in between"
HALF_KERNEL = "S8 x S8 at layer inputs, float16 in between"
CPU_KERNEL = "QLinearConv: U8 activations (zero_point 128) x S8 weights, conv outputs in 8 bits"
NO_KERNEL = "codes dequantized, then float16: this provider has no 8-bit kernels"


@pytest.mark.parametrize(
    ("precision", "cpu", "rtx", "cuda", "openvino"),
    [
        ("fp32", "float32", "float32", "float32", "float32"),
        ("fp16", "float32", "float16", "float16", "float32"),
        (
            "w8a8",
            f"{CPU_KERNEL}; full 8-bit range",
            f"{HALF_KERNEL}; full 8-bit range",
            NO_KERNEL,
            f"{WIDE_KERNEL}; full 8-bit range",
        ),
        (
            "w4a8",
            f"{CPU_KERNEL}; 4-bit weights on a grid inside INT8",
            f"{HALF_KERNEL}; 4-bit weights on a grid inside INT8",
            NO_KERNEL,
            f"{WIDE_KERNEL}; 4-bit weights on a grid inside INT8",
        ),
        (
            "w4a5",
            f"{CPU_KERNEL}; 4-bit weights on a grid inside INT8, 5-bit activations on a grid inside INT8",
            f"{HALF_KERNEL}; 4-bit weights on a grid inside INT8, 5-bit activations on a grid inside INT8",
            NO_KERNEL,
            f"{WIDE_KERNEL}; 4-bit weights on a grid inside INT8, 5-bit activations on a grid inside INT8",
        ),
        (
            "w4a16",
            "float32; weights stored as packed INT4",
            "float16; weights stored as packed INT4",
            "float16; weights stored as packed INT4",
            "bfloat16; weights stored as packed INT4",
        ),
        (
            "w8a16",
            "float32; weights stored as INT8",
            "float16; weights stored as INT8",
            "float16; weights stored as INT8",
            "bfloat16; weights stored as INT8",
        ),
        (
            "w8a8-fp8",
            "E4M3 emulated in float32",
            "E4M3 x E4M3 at layer inputs, float16 in between",
            NO_KERNEL,
            "E4M3 emulated in bfloat16",
        ),
    ],
)
def test_lowering_says_what_is_computed(precision: str, cpu: str, rtx: str, cuda: str, openvino: str) -> None:
    texts = {name: entry.lowering(Precision.parse(precision)) for name, entry in BACKENDS.items()}
    assert texts[ORT_CPU] == texts[TORCH] == cpu
    assert texts[TENSORRT] == texts[TENSORRT_RTX] == rtx
    assert texts[ORT_CUDA] == cuda
    assert texts[OPENVINO] == openvino
    assert texts[OPENVINO_FP32] == openvino.replace("bfloat16", "float32")
