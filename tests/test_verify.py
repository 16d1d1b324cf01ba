"""Layers as graphs of their own, and backends against ONNX Runtime's CPU provider: right ones pass, wrong ones are named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import PRECISIONS, Built, Invoke
from onnx import numpy_helper
from test_export import INFO, Toy, calibrated, feeds_of

from ptqd_export import backends, verify
from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.engine import Engine, Feeds
from ptqd_export.errors import ParityError
from ptqd_export.export import cut_layers, export_fp, lower, quantize, save
from ptqd_export.manifest import Artifact, EngineBuild
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission, LayerQuant
from ptqd_export.sampler import condition_rows

pytest.importorskip("polygraphy")

W8A8, W4A4, FP8, W4A16 = Precision(8, 8), Precision(4, 4), Precision(8, 8, "fp8"), Precision(4, 16)
FP32, FP16 = Precision(32, 32), Precision(16, 16)


# --- layers


@pytest.fixture(scope="module")
def toy() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy().eval()


@pytest.fixture(scope="module")
def base(toy: torch.nn.Module) -> ir.Model:
    return export_fp(toy, INFO)


def step_of(layer: LayerQuant, numerics: Emission) -> np.ndarray:
    """One quantization step of a layer's output, from what was calibrated."""
    if numerics is Emission.ORT_CPU and layer.output_scale is not None:
        return np.full(len(layer.weight_scale), layer.output_scale)
    if layer.weight_only:
        return layer.weight_scale
    largest = np.abs(layer.weight_values().reshape(len(layer.weight), -1)).max(1)
    return largest * layer.weight_scale * layer.input_scale * (32 if layer.number == "fp8" else 1)


@pytest.mark.parametrize("emission", Emission, ids=str)
@pytest.mark.parametrize("precision", [W8A8, W4A4, FP8, W4A16], ids=str)
def test_layers_compute_what_they_do_in_the_whole_graph(
    toy: torch.nn.Module, base: ir.Model, precision: Precision, emission: Emission, tmp_path: Path
) -> None:
    """Both run node by node: equal to the last bit, but in float16, where ONNX Runtime leaves out roundings between operators that are no
    outputs. Steps are products of three float32 numbers: 2**-22 of them.
    """
    network = calibrated(toy, precision)
    save({"graph": lower(quantize(base, network, emission), emission, precision)}, tmp_path)
    (tmp_path / "parts").mkdir()
    whole, layers = cut_layers(tmp_path / "graph.onnx", tmp_path / "parts")
    assert sorted(layers) == sorted(network.layers)
    feeds = feeds_of(3)
    with OrtEngine(tmp_path / "graph.onnx", optimise=False) as engine, OrtEngine(whole, optimise=False) as exposed:
        values, expected = exposed(feeds), engine(feeds)
    if emission is not Emission.HALF:
        np.testing.assert_array_equal(values["output"], expected["output"])
    assert set(values) == {"output", *(layer.source for layer in layers.values() if layer.source in values)}
    names = dict.fromkeys(layer.target for layer in layers.values())
    model = onnx.load(whole)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    onnx.save(model, tmp_path / "all.onnx")
    with OrtEngine(tmp_path / "all.onnx", optimise=False) as engine:
        targets = engine(feeds)
    for path, layer in layers.items():
        with OrtEngine(layer.file, optimise=False) as engine:
            assert (engine.inputs, engine.outputs) == ((layer.source,), (layer.target,))
            got = engine({layer.source: {**feeds, **values}[layer.source]})[layer.target]
        wanted = targets[layer.target].astype(np.float64)
        rms = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
        assert rms <= (6 * 2**-11 if emission is Emission.HALF else 0), path
        assert layer.step.ndim == got.ndim
        np.testing.assert_allclose(layer.step.ravel(), step_of(network.layers[path], emission.numerics(precision)), rtol=2**-22)
        assert layer.step.shape[1 if network.layers[path].kind == "conv" else -1] == len(network.layers[path].weight)


def test_the_folder_of_the_graph_is_left_alone(rgb: Built, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in rgb.path.iterdir()}
    cut_layers(rgb.path / "w8a8.half.onnx", tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in rgb.path.iterdir()} == before


# --- a backend's layers


Open = Callable[[Path], Engine]


def changed(layer: str, constant: str, change: Callable[[np.ndarray], np.ndarray]) -> Open:
    """Opens a layer's graph, of one layer with a constant changed: what a wrong kernel would compute."""

    def opened(file: Path) -> Engine:
        if not file.stem.endswith(f"-{layer}"):
            return OrtEngine(file)
        model = onnx.load(file)
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(constant)]
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
        onnx.save(model, file.with_name("changed.onnx"))
        return OrtEngine(file.with_name("changed.onnx"))

    return opened


@pytest.fixture(scope="module")
def feeds(rgb: Built) -> Mapping[int, Feeds]:
    return verify.sampled_feeds(rgb.bundle)


def check(rgb: Built, feeds: Mapping[int, Feeds], graph: str, opened: Open) -> Mapping[str, Any]:
    emission = Emission(graph.split(".")[1])
    return verify.compare_layers("here", rgb.path / f"{graph}.onnx", opened, emission, list(feeds.values()))


def test_feeds_are_of_the_sampler(rgb: Built, feeds: Mapping[int, Feeds]) -> None:
    """First, middle and last of four steps; noise at first, less of it later."""
    assert list(feeds) == [0, 2, 3]
    assert [int(f["timestep"][0]) for f in feeds.values()] == [int(rgb.bundle.manifest.schedule.timesteps[i]) for i in feeds]
    assert all(f["sample"].shape == (2, 3, 16, 16) and f["sample"].dtype == np.float32 for f in feeds.values())
    assert not np.array_equal(feeds[0]["sample"], feeds[2]["sample"])


@pytest.mark.parametrize("graph", ["w8a8.ort-cpu", "w4a4.ort-cpu", "w8a8.half", "w8a8.portable"])
def test_right_layers_pass(rgb: Built, feeds: Mapping[int, Feeds], graph: str) -> None:
    found = check(rgb, feeds, graph, OrtEngine)
    assert len(found) > 20
    assert sum(f.apart for f in found.values()) / sum(f.size for f in found.values()) < 1e-3


@pytest.mark.parametrize("graph", ["w8a8.ort-cpu", "w8a8.half"])
@pytest.mark.parametrize("layer", ["down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.0.attentions.0.to_k"])
def test_a_wrong_scale_of_one_channel_is_named(rgb: Built, feeds: Mapping[int, Feeds], graph: str, layer: str) -> None:
    """A tenth more on one of 8 or 16 channels: 29 to 32 dB of the layer, and more than a share of 1e-3."""

    def tenth(scale: np.ndarray) -> np.ndarray:
        scale.reshape(-1)[0] *= np.float32(1.1)
        return scale

    opened = changed(layer, ".weight.scale", tenth)
    with pytest.raises(ParityError, match=rf"here: layer {layer} differs from {graph}\.onnx as it is written: \d+\.\d dB .* do not run it here"):
        check(rgb, feeds, graph, opened)


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
    """The output of a layer moved by one of its quantization steps, in a share that may be, and in one that may not; or by two steps."""
    path = "mid_block.resnets.0.conv1"
    step = float(cut_layers(rgb.path / "w8a8.ort-cpu.onnx", tmp_path)[1][path].step.max())

    def moved(every: int, steps: int) -> Mapping[str, Any]:
        return check(rgb, feeds, "w8a8.ort-cpu", lambda file: Moved(file, every, steps * step) if file.stem.endswith(path) else OrtEngine(file))

    found = moved(2000, 1)[path]
    assert 0 < found.apart <= 1e-3 * found.size and found.snr < verify.FLOAT_SNR
    with pytest.raises(ParityError, match=r"layer mid_block\.resnets\.0\.conv1 differs .* by up to 1\.0 quantization steps"):
        moved(500, 1)
    with pytest.raises(ParityError, match=r"by up to 2\.0 quantization steps"):
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
            np.testing.assert_allclose(verify.network_limits(bundle, m.graph(precision, emission)), expected)
    graph = m.graph(FP32, Emission.HALF)
    assert verify.network_limits(bundle, graph) == pytest.approx([80] * 4)
    for precision, emission, limit in ((FP16, Emission.HALF, 40), (FP16, Emission.ORT_CPU, 80), (W4A16, Emission.HALF, 40)):
        assert verify.network_limits(bundle, replace(graph, precision=precision, emission=emission)) == pytest.approx([limit] * 4)


def test_another_network_is_refused(rgb: Built, feeds: Mapping[int, Feeds]) -> None:
    """fp32 and w4a4 are further apart than two executions of fp32, and of w8a8, may be."""
    bundle, m = rgb.bundle, rgb.bundle.manifest

    def run(precision: Precision, other: Precision) -> dict[int, float]:
        graph, file = m.graph(precision, Emission.ORT_CPU), bundle.file(m.graph(other, Emission.ORT_CPU).file)
        snr, limit = verify.compare_network("here", bundle, graph, lambda: OrtEngine(file), feeds)
        assert all(snr[i] >= limit[i] for i in feeds)
        return snr

    assert all(snr > 100 for snr in run(FP32, FP32).values())
    assert list(run(W8A8, W8A8)) == [0, 2, 3]
    for precision, file in ((FP32, "fp32"), (W8A8, "w8a8")):
        with pytest.raises(ParityError, match=rf"here: epsilon at step 0 is -?\d+\.\d dB from {file}\.ort-cpu\.onnx as it is written \(at least"):
            run(precision, W4A4)


def test_it_is_the_guided_epsilon_that_counts(guided: Built) -> None:
    """With guidance 2, an error of the conditional branch alone counts twice. Float rounding is 30 dB below it, which is 0.2 dB."""
    OFF = 3e-5
    bundle, m = guided.bundle, guided.bundle.manifest
    graph = m.graph(FP32, Emission.ORT_CPU)
    point = verify.sampled_feeds(bundle)[0]

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

    snr = verify.compare_network("here", bundle, graph, Off, {0: point})[0][0]
    rows = condition_rows(m.model, point, 2, 2.0)
    with OrtEngine(bundle.file(graph.file)) as engine:
        both = engine({**{name: np.concatenate([point[name]] * 2) for name in ("sample", "timestep")}, "step": point["step"], **rows})["epsilon"]
    null, conditional = both[:2].astype(np.float64), both[2:].astype(np.float64)
    power = np.square(null + 2 * (conditional - null)).mean() / np.square(2 * OFF * conditional).mean()
    assert snr == pytest.approx(10 * np.log10(power), abs=0.2)


# --- bundles


def test_finished_engines_are_compared_as_a_whole(guided: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stands in for an engine that needs a GPU."""
    bundle, m = guided.bundle, guided.bundle.manifest
    build = EngineBuild("0" * 64, ("SM89",), {}, 1.0, 1, {})
    file = m.graph(W8A8, Emission.HALF).file
    engines = replace(bundle, manifest=replace(m, artifacts=(*m.artifacts, Artifact(W8A8, "tensorrt-rtx", file, "", "", None, build))))
    monkeypatch.setattr(backends, "available", lambda: dict.fromkeys(("tensorrt", "tensorrt-rtx"), "ok") | {"ort-cpu": "broken"})
    states = verify.backend_states(engines)
    assert states["tensorrt-rtx"] == "ok" and states["ort-cpu"] == "broken"
    assert states["tensorrt"] == "the bundle has no engines for it: `ptqd-export run ... --backend tensorrt --rebuild` builds them"
    monkeypatch.setattr(backends, "open_device", lambda name: OrtDevice())
    monkeypatch.setattr(backends, "open_engine", lambda name, path, *rest, **about: OrtEngine(path))
    (found,) = verify.compare_backends(engines, states)
    assert (found.precision, found.emission, found.backend, found.layers, found.worst_layer) == ("w8a8", "half", "tensorrt-rtx", 0, None)
    assert list(found.network_snr) == [0, 1, 2]
    monkeypatch.setattr(
        backends, "open_engine", lambda name, path, *rest, **about: OrtEngine(path if name == "ort-cpu" else bundle.file("w4a4.half.onnx"))
    )
    with pytest.raises(ParityError, match="tensorrt-rtx at w8a8: epsilon at step 0 is"):
        verify.compare_backends(engines, states)


def test_parsers_are_those_installed(guided: Built) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = verify.parsers(guided.bundle)["tensorrt-rtx"]
    assert len(found) == 5 and set(found.values()) == {"ok"}  # four precisions and the sampler's update


# --- the command


def test_verify_against(guided: Built, invoke: Invoke) -> None:
    result = invoke("verify", guided.path, "--against", "ort-cpu", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["ok"] and result.json["against"] == "ort-cpu" and result.json["backends"]["ort-cpu"] == "ok"
    assert "pip install" in result.json["backends"]["tensorrt"]
    mine = [c for c in result.json["compared"] if c["backend"] == "ort-cpu"]
    assert [c["precision"] for c in mine] == list(PRECISIONS)
    for c in mine:
        assert (c["layers"] > 10) == (c["worst_layer"] is not None) == (c["precision"] != "fp32")
        assert c["share_apart"] <= 1e-3 and list(c["network_snr"]) == ["0", "1", "2"]
        assert all(snr is None or snr >= c["network_limit"][step] for step, snr in c["network_snr"].items())


def test_verify_against_for_people(classes: Built, invoke: Invoke) -> None:
    out = invoke("verify", classes.path, "--against", "ort-cpu").out
    assert "files match their SHA-256" in out and "\nort-cpu: ok\n" in out
    assert "against ort-cpu running the graphs as they are written: worst layer and whole network in dB (and the least allowed):" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(PRECISIONS)]
    assert [row[:3] for row in rows] == [[p, "ort-cpu", "ort-cpu"] for p in PRECISIONS]
    assert len({len(line) for line in out.splitlines() if line.startswith(("fp32 ", "precision "))}) <= 2
    assert rows[0][3:5] == ["0", "-"] and int(rows[1][3]) > 5


def test_a_failure_is_one_line(classes: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = changed("down_blocks.0.resnets.0.conv1", ".weight.scale", lambda scale: scale * np.float32(1.05))
    monkeypatch.setattr(backends, "open_engine", lambda name, path, *rest, **about: opened(path))
    line = invoke("verify", classes.path, "--against", "ort-cpu").error
    assert line.startswith("Error: ort-cpu at w8a8: layer down_blocks.0.resnets.0.conv1 differs from w8a8.ort-cpu.onnx as it is written: ")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("polygraphy.comparator", "comparing backends needs polygraphy (import of polygraphy.comparator halted; None in sys.modules): "),
        ("ptqd_export.export", "comparing layers needs onnx (import of ptqd_export.export halted; None in sys.modules): "),
    ],
)
def test_what_is_missing_is_said(classes: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    extra = "verify" if "polygraphy" in missing else "build"
    assert invoke("verify", classes.path, "--against", "ort-cpu").error == f"Error: {message}pip install 'ptqd-export[{extra}]'\n"
    assert invoke("verify", classes.path).code == 0


def test_the_other_reference_is_refused(classes: Built, invoke: Invoke) -> None:
    assert "'ort-cuda' is not" in invoke("verify", classes.path, "--against", "ort-cuda").error
