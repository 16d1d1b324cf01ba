"""Real TensorRT-RTX builds, which need no GPU: what they make, what they say, and how they fail."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Built
from onnx import TensorProto, helper, numpy_helper

from ptqd_export.backends import trt
from ptqd_export.backends.trt import plan as plan_module
from ptqd_export.core.backend import TENSORRT, Emission
from ptqd_export.core.engine_build import EngineBuild, EngineSettings, PlanReport
from ptqd_export.core.precision import Precision
from ptqd_export.errors import BackendUnavailable, GraphError, RecipeError
from ptqd_export.typed import read_typed, to_plain

from .shared import E4M3, KEY, SETTINGS, Build, conv_graph, crashing_graph, one_line, save


def test_build(build: Build, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    made = build(
        conv_graph(tmp_path / "g.onnx"), advance=lambda fraction, phase: told.append((fraction, phase))
    )
    assert (tmp_path / "e.engine").stat().st_size > 1000
    assert (made.key, made.targets, made.settings) == (KEY, ("8.9",), SETTINGS)
    assert 0 < made.seconds < 60 and made.peak_bytes > 1 << 20
    plan = made.plan
    assert (plan.meant, plan.taken, plan.fell_back) == (1, 1, {})
    assert plan.types["correlation"] == 2 and 2 <= plan.kernels <= sum(plan.types.values())
    assert (made.variant, made.notes) == ("", ())
    # Codes of a 3x3 convolution of 16 channels, and the float weights of a 1x1 one.
    assert made.weight_bytes is not None and 16 * 16 * (9 + 4) <= made.weight_bytes < 10_000
    assert made.scratch_bytes is not None and made.scratch_bytes >= 4 * 16 * 8 * 8, (
        "codes of the largest batch"
    )
    assert read_typed(EngineBuild, to_plain(made), "build") == made
    fractions = [fraction for fraction, _ in told]
    assert len(fractions) > 3 and fractions == sorted(fractions) and fractions[0] >= 0
    assert 0.5 < fractions[-1] <= 1
    assert "Layers:" in (tmp_path / "e.log").read_text()


def test_float_layers_are_told_by_name(build: Build, tmp_path: Path) -> None:
    """A scale per channel drops its conv to float; a float conv and an unknown node are in float too."""
    graph = conv_graph(tmp_path / "g.onnx", input_scale=np.linspace(0.1, 0.2, 16))
    made = build(graph, quantized={"conv_a": "int8", "conv_b": "int8", "none": "int8"})
    plan = made.plan
    assert (plan.meant, plan.taken) == (3, 0)
    assert plan.fell_back == {"conv_a": "float32", "conv_b": "float32", "none": "not found"}
    (note,) = made.notes
    assert note.startswith("NOTHING RUNS IN 8 BITS") and "conv_a (float32)" in note and "\n" not in note


def test_int8_is_not_fp8(build: Build, tmp_path: Path) -> None:
    made = build(conv_graph(tmp_path / "g.onnx"), quantized={"conv_a": "fp8"})
    assert made.plan.fell_back == {"conv_a": "int8"}


def test_fp8_chooses_its_targets(build: Build, tmp_path: Path) -> None:
    graph = conv_graph(tmp_path / "g.onnx", code=E4M3)
    made = build(graph, EngineSettings((1, 2, 4)), {"conv_a": "fp8"})
    assert made.targets[0] == "8.9" and "7.5" not in made.targets
    assert made.plan.fell_back == {}
    turing = EngineSettings((1, 2, 4), ("7.5",))
    with pytest.raises(RecipeError, match=r"holds 7\.5: .* computes in FP8 for 8\.9") as caught:
        build(graph, turing, {"conv_a": "fp8"})
    one_line(caught)
    # What the library says to it.
    with pytest.raises(GraphError, match=r"cannot build .*g\.onnx: .*[hH][wW]-specific datatypes"):
        build(graph, turing, {})


def test_targets_are_those_that_were_built(build: Build, tmp_path: Path) -> None:
    """The default leaves 7.5 out and does not claim it; named, it is built, in a larger file."""
    graph, engine = conv_graph(tmp_path / "g.onnx"), tmp_path / "e.engine"
    default = EngineSettings((1, 2, 4))
    made = build(graph, default)
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(made.targets) and "7.5" not in made.targets
    with_turing = build(graph, default.for_gpu("7.5"))
    assert with_turing.targets == ("7.5",) and engine.stat().st_size > 1000


def test_a_log_of_unknown_wording(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is as good as any; only what runs in 8 bits is not told."""
    monkeypatch.setattr(plan_module, "_LAYER", re.compile("another version's wording"))
    made = build(conv_graph(tmp_path / "g.onnx"))
    assert (tmp_path / "e.engine").stat().st_size > 1000
    assert made.plan == PlanReport(1, 0, {"conv_a": "not known"}, 0, {}) and made.notes == ()


def test_products_merged_into_one(build: Build, tmp_path: Path) -> None:
    """Three products of one quantized input become one layer of the plan; each node is found in it."""
    codes = np.random.default_rng(0).integers(-100, 100, (3, 16, 16)).astype(np.int8)
    constants = [
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
    ]
    for i, name in enumerate("abc"):
        constants.append(numpy_helper.from_array(codes[i], f"codes_{name}"))
        weights = [f"codes_{name}", "scale", "zero"]
        nodes.append(helper.make_node("DequantizeLinear", weights, [f"w_{name}"], f"weights_{name}"))
        nodes.append(helper.make_node("MatMul", ["d", f"w_{name}"], [f"out_{name}"], f"product_{name}"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 8, 16])
        for name in ("sample", "out_a", "out_b", "out_c")
    ]
    path = save(tmp_path / "g.onnx", helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    plan = build(path, quantized={f"product_{name}": "int8" for name in "abc"}).plan
    assert (plan.taken, plan.fell_back, plan.types["gemm"]) == (3, {}, 1)


def test_an_exported_network(build: Build, rgb: Built) -> None:
    """Every quantized layer of a graph is found in its plan in 8 bits; none in the float graph's."""
    graph = rgb.bundle.manifest.graph(Precision(8, 8), Emission.HALF)
    path, quantized = rgb.path / graph.file, dict(graph.quantized)
    assert len(quantized) > 10
    plan = build(path, quantized=quantized).plan
    assert plan.taken == plan.meant == len(quantized), plan.fell_back
    float_plan = build(rgb.path / "fp32.portable.onnx", quantized=quantized).plan
    assert float_plan.taken == 0 and set(float_plan.fell_back) == set(quantized)


def test_settings_reach_the_builder(build: Build, tmp_path: Path) -> None:
    graph = conv_graph(tmp_path / "g.onnx")
    wanted = r"tensorrt\.compute_capabilities holds 9\.0: .* knows 7\.5, .*8\.9"
    with pytest.raises(RecipeError, match=wanted) as caught:
        build(graph, EngineSettings((1, 2, 4), ("9.0",)))
    one_line(caught)
    assert build(graph, EngineSettings((1, 2, 4), ("8.6", "12.0"), 0, 4096)).targets == ("8.6", "12.0")
    log = (tmp_path / "e.log").read_text()
    assert "MinShape: [1,16,8,8], OptShape: [2,16,8,8], MaxShape: [4,16,8,8]" in log
    with pytest.raises(GraphError, match=r"raise tensorrt\.workspace_mib; the log is .*e\.log"):
        build(graph, EngineSettings((1, 2, 4), ("8.9",), None, 1))


def test_not_installed_in_the_builder(tmp_path: Path) -> None:
    """Full TensorRT is asked for by its name, in the builder's process."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    graph, engine, log = conv_graph(tmp_path / "g.onnx"), tmp_path / "e.engine", tmp_path / "e.log"
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[tensorrt\]'"):
        trt.build(TENSORRT, graph, engine, SETTINGS, key=KEY, quantized={}, log=log)


# Variants


def test_variants_are_not_looked_at_where_the_graph_will_do(build: Build, tmp_path: Path) -> None:
    def variants() -> Iterator[Path]:
        raise AssertionError("made for nothing")
        yield

    assert build(conv_graph(tmp_path / "g.onnx"), variants=variants()).variant == ""


@pytest.mark.parametrize("fault", ["refused", "crashed", "in float"])
def test_a_variant_where_the_graph_does_not_do(build: Build, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "g.onnx"
    if fault == "refused":
        conv_graph(path, op="NoSuchOp")
    elif fault == "crashed":
        crashing_graph(path)
    else:
        conv_graph(path, input_scale=np.linspace(0.1, 0.2, 16))
    worse, better = conv_graph(tmp_path / "worse.onnx", op="NoSuchOp"), conv_graph(tmp_path / "better.onnx")
    made = build(path, variants=(worse, better, tmp_path / "none.onnx"))
    assert (made.variant, made.plan.taken) == ("better", 1)
    (note,) = made.notes
    assert "variant better" in note and ("refused" in note) == (fault != "in float")
    logs = {p.name for p in tmp_path.glob("*.log")}
    assert logs == {"e.log", "e.worse.log", "e.better.log"}


def test_the_graph_itself_where_no_variant_is_better(build: Build, tmp_path: Path) -> None:
    """All of it in float: the engine is right, and its notes are loud."""
    path = conv_graph(tmp_path / "g.onnx", input_scale=np.linspace(0.1, 0.2, 16))
    same, refused = tmp_path / "same.onnx", conv_graph(tmp_path / "refused.onnx", op="NoSuchOp")
    same.write_bytes(path.read_bytes())
    made = build(path, variants=(same, refused))
    assert made.variant == "" and made.plan.is_float
    (note,) = made.notes
    assert note.startswith("NOTHING RUNS IN 8 BITS") and "2 variants" in note


def test_no_variant_builds(build: Build, tmp_path: Path) -> None:
    """What is said is said of the graph itself."""
    path, other = conv_graph(tmp_path / "g.onnx", op="NoSuchOp"), conv_graph(tmp_path / "v.onnx", op="Other")
    with pytest.raises(GraphError, match=r"cannot read .*g\.onnx: node 'conv_a' \(NoSuchOp\)"):
        build(path, variants=(other,))
    assert not (tmp_path / "e.engine").exists()
