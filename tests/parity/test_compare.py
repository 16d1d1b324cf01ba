"""Backends beside ONNX Runtime's CPU provider, layer by layer and as a whole: right ones pass, wrong ones are
named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Built
from onnx.numpy_helper import from_array, to_array
from wrong_layers import Open, changed

from ptqd_export import backends
from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.bundle.manifest import Artifact
from ptqd_export.core.backend import BACKENDS, ORT_CPU, ORT_CUDA, Emission
from ptqd_export.core.engine import Feeds
from ptqd_export.core.engine_build import EngineBuild, PlanReport
from ptqd_export.core.precision import Precision
from ptqd_export.errors import ParityError
from ptqd_export.export import cut_layers
from ptqd_export.parity import compare
from ptqd_export.parity.compare import (
    LayerDifference,
    compare_backends,
    compare_layers,
    compare_network,
    layer_feeds,
    layer_rounding,
    network_limits,
    parsers,
    sampled_feeds,
)
from ptqd_export.parity.judgement import FLOAT_TOLERANCE, Apart, float_tolerance
from ptqd_export.parity.machines import backend_states
from ptqd_export.runtime import open as opening

pytest.importorskip("polygraphy")

W8A8, W4A4, W4A16 = Precision(8, 8), Precision(4, 4), Precision(4, 16)
FP32, FP16 = Precision(32, 32), Precision(16, 16)


# --- a backend's layers


@pytest.fixture(scope="module")
def feeds(rgb: Built) -> Mapping[int, Feeds]:
    return sampled_feeds(rgb.bundle)


def check(rgb: Built, feeds: Mapping[int, Feeds], graph: str, opened: Open) -> Mapping[str, LayerDifference]:
    half = Emission(graph.split(".")[1]) is Emission.HALF
    rounding = layer_rounding(BACKENDS[ORT_CUDA if half else ORT_CPU])
    own = layer_feeds(rgb.bundle.manifest.sampling, feeds)
    return compare_layers("here", rgb.path / f"{graph}.onnx", opened, rounding, own)


def test_feeds_are_of_the_sampler(rgb: Built, feeds: Mapping[int, Feeds]) -> None:
    """First, middle and last of four steps; noise at first, less of it later."""
    assert list(feeds) == [0, 2, 3]
    assert [int(f["step"][0]) for f in feeds.values()] == [0, 2, 3]
    sampling = rgb.bundle.manifest.sampling
    assert [int(f["timestep"][0]) for f in layer_feeds(sampling, feeds)] == [
        int(sampling.schedule.timesteps[i]) for i in feeds
    ]
    assert all(
        f["sample"].shape == (2, 3, 16, 16) and f["sample"].dtype == np.float32 for f in feeds.values()
    )
    assert not np.array_equal(feeds[0]["sample"], feeds[2]["sample"])


@pytest.mark.parametrize("graph", ["w8a8.ort-cpu", "w4a4.ort-cpu", "w8a8.half", "w8a8.portable"])
def test_right_layers_pass(rgb: Built, feeds: Mapping[int, Feeds], graph: str) -> None:
    found = check(rgb, feeds, graph, OrtEngine)
    assert len(found) > 20
    assert sum((f.apart for f in found.values()), Apart()).share < 1e-3


@pytest.mark.parametrize("graph", ["w8a8.ort-cpu", "w8a8.half"])
@pytest.mark.parametrize(
    "layer", ["down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.0.attentions.0.to_k"]
)
def test_a_wrong_scale_of_one_channel_is_named(
    rgb: Built, feeds: Mapping[int, Feeds], graph: str, layer: str
) -> None:
    """A tenth more on one of 8 or 16 channels: 29 to 32 dB of the layer, and more than a share of 1e-3."""

    def tenth(scale: np.ndarray) -> np.ndarray:
        scale.reshape(-1)[0] *= np.float32(1.1)
        return scale

    opened = changed(layer, ".weight.scale", tenth)
    line = (
        rf"here: layer {layer} differs from {graph}\.onnx as it is written: \d+\.\d dB .* do not run it here"
    )
    with pytest.raises(ParityError, match=line):
        check(rgb, feeds, graph, opened)


def cancelling(path: Path, by: float) -> onnx.ModelProto:
    """A half graph whose convs add `by` with their bias and take it away with their shift."""
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convs = {
        node.output[0]: node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3
    }
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[0] in convs and node.input[1].endswith(".shift.half"):
            for name, more in ((convs[node.input[0]].input[2], by), (node.input[1], -by)):
                moved = to_array(constants[name]) + np.float16(more)
                constants[name].CopyFrom(from_array(moved, name))
    return model


class BiasLast:
    """An engine of one conv that rounds to float16 its products, what the bias makes of them, and what the
    shift makes of that, as cuDNN and CUDA kernels do one after the other."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(file)
        (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
        constants = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
        self.terms = [constants[conv.input.pop()].reshape(-1, 1, 1)] if len(conv.input) == 3 else []
        self.terms += [constants[node.input[1]] for node in model.graph.node if node.op_type == "Add"]
        (output,) = model.graph.output
        self.outputs = (output.name,)
        output.name = conv.output[0]
        nodes = [node for node in model.graph.node if node.op_type != "Add"]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, file.with_suffix(".products.onnx"))
        self.engine = OrtEngine(file.with_suffix(".products.onnx"))
        self.inputs = self.engine.inputs

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        ((_, value),) = self.engine(feeds).items()
        for term in self.terms:
            value = value + term
            assert value.dtype == np.float16
        return {self.outputs[0]: value}

    def close(self) -> None:
        self.engine.close()


def bias_last(file: Path) -> Any:
    convs = [node for node in onnx.load(file, load_external_data=False).graph.node if node.op_type == "Conv"]
    return BiasLast(file) if convs else OrtEngine(file)


def test_products_may_be_rounded_before_the_bias_is_added(
    rgb: Built, feeds: Mapping[int, Feeds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 that is as right as one rounding at the end, however much of the products cancels."""
    path = tmp_path / "x.onnx"
    onnx.save(cancelling(rgb.path / "w8a8.half.onnx", 30.0), path)
    rounding = layer_rounding(BACKENDS[ORT_CUDA])
    own = layer_feeds(rgb.bundle.manifest.sampling, feeds)
    found = compare_layers("here", path, bias_last, rounding, own)
    assert sum((f.apart for f in found.values()), Apart()).share < 1e-3
    monkeypatch.setattr(compare, "float_tolerance", lambda *arguments: float_tolerance(*arguments[:3]))
    with pytest.raises(ParityError, match="differs from"):
        compare_layers("here", path, bias_last, rounding, own)


def test_saturated_products_are_named(rgb: Built, feeds: Mapping[int, Feeds]) -> None:
    """What U8 x S8 kernels do on processors without VNNI: large weights act smaller."""
    opened = changed("mid_block.resnets.0.conv1", ".weight.codes", lambda codes: np.clip(codes, -80, 80))
    with pytest.raises(ParityError, match=r"layer mid_block\.resnets\.0\.conv1 differs"):
        check(rgb, feeds, "w8a8.ort-cpu", opened)


class Moved:
    """An engine of one layer, with every `every`-th value of its output moved by `by`."""

    def __init__(self, file: Path, every: int, by: float) -> None:
        self.engine, self.every, self.by = OrtEngine(file), every, np.float32(by)
        self.inputs, self.outputs = self.engine.inputs, self.engine.outputs

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        ((name, value),) = self.engine(feeds).items()
        value = np.array(value)
        value.reshape(-1)[:: self.every] += self.by
        return {name: value}

    def close(self) -> None:
        self.engine.close()


def test_a_step_apart_passes_while_it_is_rare(rgb: Built, feeds: Mapping[int, Feeds], tmp_path: Path) -> None:
    """The output of a layer moved by one of its quantization steps, in a share that may be, and in one that
    may not; or by two steps."""
    path = "mid_block.resnets.0.conv1"
    step = float(cut_layers(rgb.path / "w8a8.ort-cpu.onnx", tmp_path)[1][path].step.max())

    def moved(every: int, steps: int) -> Mapping[str, LayerDifference]:
        return check(
            rgb,
            feeds,
            "w8a8.ort-cpu",
            lambda file: Moved(file, every, steps * step) if file.stem.endswith(path) else OrtEngine(file),
        )

    found = moved(2000, 1)[path]
    assert 0 < found.apart.apart <= 1e-3 * found.apart.size
    assert found.snr < -20 * np.log10(FLOAT_TOLERANCE)  # what float rounding leaves
    with pytest.raises(
        ParityError, match=r"layer mid_block\.resnets\.0\.conv1 differs .* by up to 1\.\d quantization steps"
    ):
        moved(500, 1)
    with pytest.raises(ParityError, match=r"by up to 2\.\d quantization steps"):
        moved(2000, 2)


# --- the whole network


def test_limits_of_the_network(rgb: Built) -> None:
    """6 dB below the SNR of the quantization noise; of floats, the parity gate's."""
    bundle, m = rgb.bundle, rgb.bundle.manifest
    for precision in (W8A8, W4A4):
        for emission, numerics in ((Emission.ORT_CPU, Emission.ORT_CPU), (Emission.HALF, Emission.PORTABLE)):
            stats = bundle.stats(precision, numerics)
            noise, signal = np.sqrt(stats.dd.sum(1)), np.sqrt(stats.ee.sum(1))
            expected = np.clip(20 * np.log10(signal / (2 * noise)), 0, 60)
            np.testing.assert_allclose(network_limits(bundle, m.graph(precision, emission)), expected)
    graph = m.graph(FP32, Emission.HALF)
    assert network_limits(bundle, graph) == pytest.approx([80] * 4)
    for precision, emission, limit in (
        (FP16, Emission.HALF, 40),
        (FP16, Emission.ORT_CPU, 80),
        (W4A16, Emission.HALF, 40),
    ):
        assert network_limits(
            bundle, replace(graph, precision=precision, emission=emission)
        ) == pytest.approx([limit] * 4)


def test_another_network_is_refused(rgb: Built, feeds: Mapping[int, Feeds]) -> None:
    """fp32 and w4a4 are further apart than two executions of fp32, and of w8a8, may be."""
    bundle, m = rgb.bundle, rgb.bundle.manifest

    def run(precision: Precision, other: Precision) -> dict[int, float]:
        graph, file = m.graph(precision, Emission.ORT_CPU), bundle.file(m.graph(other, Emission.ORT_CPU).file)
        snr, limit = compare_network("here", bundle, graph, lambda: OrtEngine(file), feeds)
        assert all(snr[i] >= limit[i] for i in feeds)
        return snr

    assert all(snr > 100 for snr in run(FP32, FP32).values())
    assert list(run(W8A8, W8A8)) == [0, 2, 3]
    for precision, file in ((FP32, "fp32"), (W8A8, "w8a8")):
        line = (
            rf"here: epsilon at step 0 is -?\d+\.\d dB from {file}\.ort-cpu\.onnx as it is written \(at least"
        )
        with pytest.raises(ParityError, match=line):
            run(precision, W4A4)


def test_it_is_the_guided_epsilon_that_counts(guided: Built) -> None:
    """With guidance 2, an error of the conditional branch alone counts twice. Float rounding is 30 dB below
    it, which is 0.2 dB."""
    OFF = 3e-5
    bundle, m = guided.bundle, guided.bundle.manifest
    graph = m.graph(FP32, Emission.ORT_CPU)
    point = sampled_feeds(bundle)[0]

    class Off:
        def __init__(self) -> None:
            self.engine = OrtEngine(bundle.file(graph.file))
            self.inputs, self.outputs = self.engine.inputs, self.engine.outputs

        def __call__(self, feeds: Feeds) -> dict[str, Any]:
            epsilon = self.engine(feeds)["epsilon"]
            assert len(epsilon) == 2  # a sample at a time, null and conditional
            epsilon[1:] *= np.float32(1 + OFF)
            return {"epsilon": epsilon}

        def close(self) -> None:
            self.engine.close()

    snr = compare_network("here", bundle, graph, Off, {0: point})[0][0]
    assert m.sampling.guidance_scale == 2.0
    with OrtEngine(bundle.file(graph.file)) as engine:
        both = engine(m.sampling.feeds(np.asarray(point["sample"]), 0, point))["epsilon"]
    null, conditional = both[:2].astype(np.float64), both[2:].astype(np.float64)
    power = np.square(null + 2 * (conditional - null)).mean() / np.square(2 * OFF * conditional).mean()
    assert snr == pytest.approx(10 * np.log10(power), abs=0.2)


# --- bundles


def test_finished_engines_are_compared_as_a_whole(guided: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stands in for an engine that needs a GPU."""
    bundle, m = guided.bundle, guided.bundle.manifest
    plan = PlanReport(0, 0, {}, 1, {})
    build = EngineBuild("0" * 64, ("8.9",), m.engine_settings, 1.0, 1, plan)
    engine = Artifact(W8A8, "tensorrt-rtx", m.graph(W8A8, Emission.HALF).file, "", "", None, build)
    engines = replace(bundle, manifest=replace(m, artifacts=(*m.artifacts, engine)))
    monkeypatch.setattr(
        backends,
        "available",
        lambda: dict.fromkeys(("tensorrt", "tensorrt-rtx"), "ok") | {"ort-cpu": "broken"},
    )
    states = backend_states(engines)
    assert states["tensorrt-rtx"] == "ok" and states["ort-cpu"] == "broken"
    assert (
        states["tensorrt"]
        == "the bundle has no engines for it: `ptqd-export run ... --backend tensorrt --rebuild` builds them"
    )
    monkeypatch.setattr(backends, "open_device", lambda name: OrtDevice())
    monkeypatch.setattr(opening, "kernel_cache", lambda *key: None)
    monkeypatch.setattr(opening, "open_engine", lambda name, path, *rest, **about: OrtEngine(path))
    (found,) = compare_backends(engines, states)
    assert (found.precision, found.emission, found.backend, found.layers, found.worst_layer) == (
        "w8a8",
        "half",
        "tensorrt-rtx",
        0,
        None,
    )
    assert list(found.network_snr) == [0, 1, 2]
    monkeypatch.setattr(
        opening,
        "open_engine",
        lambda name, path, *rest, **about: OrtEngine(
            path if name == "ort-cpu" else bundle.file("w4a4.half.onnx")
        ),
    )
    with pytest.raises(ParityError, match="tensorrt-rtx at w8a8: epsilon at step 0 is"):
        compare_backends(engines, states)


def test_parsers_are_those_installed(guided: Built) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = parsers(guided.bundle)["tensorrt-rtx"]
    assert len(found) == 5 and set(found.values()) == {"ok"}  # four precisions and the sampler's update
