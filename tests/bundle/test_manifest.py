"""Manifests that come from anywhere: whatever they hold, one line says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import seal

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.bundle import MANIFEST
from ptqd_export.bundle.manifest import Choice, Manifest
from ptqd_export.errors import BundleError

FILE = {"sha256": "0" * 64, "size": 1}
Change = Callable[[dict[str, Any]], object]


def test_a_sealed_manifest_opens(bundle: Path) -> None:
    """The helper of the next tests is not what their manifests are refused for."""
    seal(bundle, lambda m: m["sampling"]["model"].update(name="another"))
    assert Bundle.open(bundle).manifest.sampling.model.name == "another"


def model(**changes: object) -> Change:
    return lambda m: m["sampling"]["model"].update(changes)


def labels(**changes: object) -> Change:
    return lambda m: m["sampling"]["model"]["inputs"][0].update(changes)


def tensor(**changes: object) -> Change:
    return lambda m: m["sampling"]["model"]["inputs"].append({"dtype": "float32", **changes})


def schedule(**changes: object) -> Change:
    return lambda m: m["sampling"]["schedule"].update(changes)


def steps(*first: object) -> Change:
    """Other timesteps in the place of the first ones."""
    return lambda m: m["sampling"]["schedule"]["timesteps"].__setitem__(slice(0, len(first)), first)


def build(**changes: object) -> Change:
    return lambda m: m["artifacts"][1]["build"].update(changes)


def built_plan(**changes: object) -> Change:
    return lambda m: m["artifacts"][1]["build"]["plan"].update(changes)


def entry(where: str, **changes: object) -> Change:
    """Of a table, or of the first row of one."""
    return lambda m: (m[where][0] if isinstance(m[where], list) else m[where]).update(changes)


def sensitivity(**changes: object) -> Change:
    return lambda m: m["choice"]["sensitivity"].update(changes)


def figures(**changes: object) -> Change:
    return lambda m: m["parity"]["w8a8.ort-cpu"].update(changes)


def gate(**changes: object) -> Change:
    return lambda m: m["correction"]["steps"]["w8a8.ort-cpu"].update(changes)


def layers(**by_bits: object) -> Change:
    return lambda m: m["layers"].update(w8a8=by_bits)


TABLE = {
    "layers": ["conv"],
    "macs": [9],
    "steps": [0, 9],
    "weights": [1.0, 0.5],
    "noise": {p: [[0.1, 0.2]] for p in ("w4a4", "w4a8", "w8a8")},
}


def mixed(changes: object = None) -> Change:
    """w4a4+ in the place of w8a8, as far as the manifest goes."""

    def change(m: dict[str, Any]) -> None:
        text = json.dumps({name: value for name, value in m.items() if name != "files"})
        m.update(json.loads(text.replace('"w8a8', '"w4a4+')))
        m["layers"] = {"w4a4+": {"w4a4": ["conv"], "float": []}}
        m["layer_sensitivity"] = {"w4a4+": TABLE | dict(changes or {})}  # type: ignore[call-overload]

    return change


def floating(layers: list[str], left: str = "float") -> Change:
    """w8a8+ in the place of w8a8, with a layer left float."""

    def change(m: dict[str, Any]) -> None:
        mixed()(m)
        m.update(json.loads(json.dumps(m).replace('"w4a4+', '"w8a8+')))
        m["layers"] = {"w8a8+": {"w8a8": [], left: ["conv"]}}
        m["layer_sensitivity"] = {"w8a8+": TABLE | {"layers": layers, "noise": {"w8a8": [[0.1, 0.2]]}}}

    return change


def test_a_mixed_precision_with_float_layers_is_read(bundle: Path) -> None:
    seal(bundle, floating(["conv"]))
    with pytest.raises(BundleError, match=r"names 'w8a8\+\.ort-cpu\.onnx' but has no hash"):
        Bundle.open(bundle)


def test_a_mixed_precision_is_read(bundle: Path) -> None:
    seal(bundle, mixed())
    with pytest.raises(BundleError, match=r"names 'w4a4\+\.ort-cpu\.onnx' but has no hash"):
        Bundle.open(bundle)
    data = json.loads((bundle / MANIFEST).read_text())
    manifest = Manifest.from_dict(data)
    (found,) = manifest.layer_sensitivity.values()
    assert found.layers == ("conv",) and found.total(manifest.plan.steps[0].base) == (0.2,)
    assert json.loads(json.dumps(manifest.to_dict())) | {"sha256": data["sha256"]} == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"a\x00b": FILE}), r"control characters in 'a\\x00b'"),
        (lambda m: m["files"].update({"a\ud800b": FILE}), r"control characters in 'a\\ud800b'"),
        (lambda m: m["files"].update({"a" * 900: FILE}), "which no bundle holds"),
        (lambda m: m["files"].update(x=3), r"files\.x: expected a table, got 3"),
        (model(name="a\n\x1b[2Jb"), "control characters"),
        (model(sample_shape=[1, 4]), "sample_shape: expected an array of 3, got 2"),
        (model(sample_shape=[1, 0, 4]), r"sample_shape is \[1, 0, 4\]: expected \[channels, height, width\]"),
        (model(sample_shape=[1, 1 << 15, 1 << 14]), "at most 16777216 elements"),
        (model(sample_shape="144"), "expected an array, got '144'"),
        (model(inputs={}), "model.inputs: expected an array"),
        (labels(num_classes="x"), "num_classes: expected int, got 'x'"),
        (labels(num_classes=10**10), "num_classes is 10000000000: give 1 to 1000000"),
        (labels(num_classes=0), "num_classes is 0: give 1 to 1000000"),
        (labels(null_class=4), "null_class is 4: give one of at least two ids below num_classes .4."),
        (labels(null_class=None), "has no null class"),  # guidance 2 has nothing to fall back to
        (labels(dtype="float32"), "is float32 and has num_classes: only int64 class labels have classes"),
        (labels(name="sample"), "two inputs are called 'sample'"),
        (labels(colour="red"), "unknown key 'colour'"),
        (tensor(name="t", shape=[1 << 29]), "at most 4194304 elements"),
        (tensor(name="\u202e", shape=[1]), "holds characters that cannot be printed"),
        (
            lambda m: steps(*[[t] for t in m["sampling"]["schedule"]["timesteps"]])(m),
            "expected float, got .900",
        ),
        (steps(-1), r"a timestep outside \[0, 100000\]"),
        (steps(2**70), r"a timestep outside \[0, 100000\]"),
        (schedule(alphas_cumprod=[[0.5] * 10]), r"alphas_cumprod\[0\]: expected float"),
        (schedule(alphas_cumprod=[float("nan")] * 10), "a number is nan"),
        (schedule(alphas_cumprod=[0.5] * 9), "has 10 timesteps, 9, 10 and 10 alphas_cumprod"),
        (schedule(alphas_cumprod=[1.0] * 10), r"has alphas_cumprod outside"),
        (schedule(alphas_cumprod_prev=[0.0] * 10), r"has alphas_cumprod_prev outside"),
        (
            schedule(timesteps=[], alphas_cumprod=[], alphas_cumprod_from=[], alphas_cumprod_prev=[]),
            "has 0 timesteps",
        ),
        (schedule(eta=1.5), r"has eta 1.5, outside \[0, 1\]"),
        (schedule(eta=10**400), "schedule.eta: expected a finite number"),
        (schedule(clip_sample=-1), "has clip_sample -1"),
        (schedule(threshold=[0.5, 0.5]), "has threshold"),
        (schedule(start=0.0), "has start 0.0"),
        (schedule(n_steps=0), "has n_steps 0"),
        (schedule(prediction_type="flow"), "prediction_type: got 'flow'"),
        (entry("sampling", guidance_scale=float("inf")), "a number is inf"),
        (schedule(solver="flow"), "solver: got 'flow'"),
        *(
            (lambda m, key=field.name: m["choice"].pop(key), f"choice: '{field.name}' is missing")
            for field in fields(Choice)
        ),
        (entry("choice", bops_fp32=0), "bit operations 10 of 0"),
        (entry("choice", bops_fp32=10**400), r"bit operations 10 of 1000+\.\.\."),
        (entry("choice", bops="many"), "choice.bops: expected int, got 'many'"),
        (entry("choice", front=[{"cost": 1.0}]), r"choice.front\[0\]: '(error|plan)' is missing"),
        (entry("choice", compared=[{"plan": "w8a8*10"}]), r"choice.compared\[0\]: '.*' is missing"),
        (entry("choice", sensitivity=3), "choice.sensitivity: expected a table, got 3"),
        (sensitivity(groups=[9, 0, 1]), "expected at least one step in each"),
        (sensitivity(groups=[]), "expected at least one step in each"),
        (sensitivity(paired={"w8a8": [0.5, 0.1]}), "expected 1 errors of 0 or more per precision"),
        (sensitivity(paired={"w8a8": [-0.5]}), "expected 1 errors of 0 or more per precision"),
        (entry("choice", timed_on="vulkan"), "backend 'vulkan'"),
        (entry("choice", rule="best"), "choice.rule: got 'best'"),
        (lambda m: m.update(plan=[3] * 10), r"plan.*\[3, 3"),
        (lambda m: m.update(plan="w8a8*x"), r"plan step 'w8a8\*x'"),
        (lambda m: m.update(plan="w8a8*" + "9" * 30), "plan"),
        (entry("graphs", emission="cuda"), "emission: got 'cuda', expected one of portable"),
        (entry("graphs", digest=3), "digest: expected str"),
        (entry("graphs", ops={"Conv": 3}), "unknown key 'ops'"),
        (entry("graphs", precision=None), "precision None is not known|precision: expected"),
        (entry("graphs", quantized={"conv": "int4"}), "quantized.conv: got 'int4'"),
        (entry("graphs", file="../x"), "names '../x' but has no hash"),
        (entry("update", file="../x"), "names '../x' but has no hash"),
        (lambda m: m.pop("update"), "manifest: 'update' is missing"),
        (entry("artifacts", backend="vulkan"), "backend 'vulkan'"),
        (entry("artifacts", backend="torch"), "backend 'torch' is not known"),
        (entry("artifacts", backend=["ort-cpu"]), r"backend: expected str, got \['ort-cpu'\]"),
        (entry("artifacts", time_ms="fast"), "time_ms: expected float"),
        (lambda m: m["artifacts"][1].update(build=None), "of tensorrt-rtx has no build"),
        (lambda m: m["artifacts"][0].update(build=m["artifacts"][1]["build"]), "of ort-cpu has a build"),
        (entry("update_engines", build=None), "update_engines.0..build: expected a table, got None"),
        (entry("update_engines", file="x"), "names 'x' but has no hash"),
        (build(key="../../x"), r"key '\.\./\.\./x'"),
        (build(targets="8.9"), "targets: expected an array"),
        (build(settings={}), "settings: 'rows' is missing"),
        (build(settings={"rows": [1, 2]}), "settings.rows: expected an array of 3, got 2"),
        (build(settings={"rows": [3, 2, 1]}), r"rows \(3, 2, 1\): expected fewest, usual and most"),
        (lambda m: m["artifacts"][1]["build"]["plan"].pop("kernels"), "plan: 'kernels' is missing"),
        (built_plan(fell_back={"conv": 1}), "plan.fell_back.conv: expected str"),
        (lambda m: m.pop("engine_settings"), "manifest: 'engine_settings' is missing"),
        (entry("engine_settings", compute_capabilities=["\u202e"]), r"compute capability '\\u202e'"),
        (entry("engine_settings", compute_capabilities=["nine"]), "compute capability 'nine': expected"),
        (entry("engine_settings", rows=[]), "engine_settings.rows: expected an array of 3, got 0"),
        (lambda m: m.update(artifacts=[]), "no artifact that a backend runs"),
        (lambda m: m.update(correction=[]), "correction: expected a table"),
        (entry("correction", mode="best"), "correction.mode: got 'best'"),
        (
            lambda m: m["correction"]["steps"].clear(),
            "the gate's records are of nothing: expected w8a8.ort-cpu",
        ),
        (gate(kept=["both"]), "has 1 steps of 10"),
        (gate(kept=["all"] * 10), "kept.*got 'all'"),
        (gate(z_k=[1.0] * 11), "has 11 steps of 10"),
        (gate(z_bias=[None] * 10), r"z_bias\[0\]: expected float, got None"),
        (gate(limit="high"), "limit: expected float, got 'high'"),
        (lambda m: m.update(provenance="me"), "provenance: expected a table"),
        (lambda m: m.update(parity={"w8a8": {}}), "parity.w8a8: '.*' is missing"),
        (figures(layers={"layers": 3}), "layers: 'outputs' is missing"),
        (figures(noise={"limit_z": 5.0, "largest_z": {}}), "noise: 'mse_ratio' is missing"),
        (
            lambda m: m.update(parity={"w8a8": {"largest_relative_error": "small"}}),
            "expected float, got 'small'",
        ),
        (lambda m: m.update(bops={"w8a8": None}), "bops.w8a8: expected int"),
        (lambda m: m.update(bops={"int8": 3}), "precision 'int8' is not known"),
        (lambda m: m.update(half_bops={"w4a8": 3}), "expected 1 to [0-9]+, of the same precisions"),
        (lambda m: m.update(half_bops={"w8a8": 0}), "expected 1 to [0-9]+, of the same precisions"),
        (lambda m: m.update(layers={}), "bits of layers are of nothing: expected w8a8"),
        (lambda m: m["layers"].update(w4a8={}), "bits of layers are of w4a8, w8a8: expected w8a8"),
        (lambda m: m.update(layer_sensitivity={"w4a4+": TABLE}), r"of w4a4\+: expected nothing"),
        (layers(w9a9=["conv"]), "bits 'w9a9' of layers"),
        (layers(w8a8=["conv"], float=["conv"]), "a layer is named twice at w8a8"),
        (layers(w8a8=[f"conv{i}" for i in range(10_001)]), "10001 layers at w8a8: expected at most 10000"),
        (layers(w8a8=["\u202e"]), r"a layer's name, '\\u202e', holds characters"),
        (layers(w8a8=["x" * 1001]), "a text of 1001 characters"),
        (layers(w8a8="conv"), r"layers\.w8a8\.w8a8: expected an array, got 'conv'"),
        (floating(["other"]), r"a sensitivity of 'other', which is not quantized at w8a8\+"),
        (mixed({"layers": ["other"]}), r"a sensitivity of 'other', which is not quantized at w4a4\+"),
        (
            mixed({"noise": {"w4a8": [[0.1, 0.2]]}}),
            "of other precisions than w3a4, w3a5, w4a4, w3a6, w4a5, w3a8, w4a6, w4a8, w8a8",
        ),
        (
            mixed({"noise": {"w4a4": [[0.1, 0.2]], "w3a3": [[0.1, 0.2]]}}),
            "of other precisions than w3a4, w3a5",
        ),
        (mixed({"macs": [9, 9]}), "rows differ in length"),
        (mixed({"macs": [-9]}), "numbers below 0"),
        (mixed({"weights": [-1.0, 0.5]}), "numbers below 0"),
        (mixed({"steps": [0, 10]}), r"sensitivities at steps .0, 10.: expected some of 10"),
        (mixed({"steps": [3, 3]}), r"sensitivities at steps .3, 3."),
        (
            mixed({"layers": [], "macs": [], "noise": {p: [] for p in ("w4a4", "w4a8", "w8a8")}}),
            "without layers or steps",
        ),
        (lambda m: m.update(files=[]), "files: expected a table"),
        (entry("artifacts", file="x" * 10**6), "a text of 1000000 characters"),
        (entry("artifacts", file="x" * 1000), "names 'x{99}... but has no hash"),
        (lambda m: m.update(colour="red"), "unknown key 'colour'"),
    ],
)
def test_a_hostile_manifest_is_one_line(bundle: Path, change: Change, message: str) -> None:
    """With a right seal: the seal is no secret."""
    seal(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 800
    line.encode()


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
def test_nothing_defaults_silently(bundle: Path, name: str) -> None:
    seal(bundle, lambda m: m.pop(name))
    with pytest.raises(
        BundleError, match=f"manifest.json is damaged .manifest: '{name}' is missing.: rebuild"
    ):
        Bundle.open(bundle)


def test_a_manifest_of_any_depth_is_one_line(bundle: Path) -> None:
    """Whether the parser or a check of the package runs into the limit."""
    refused = 0
    for depth in (10, *range(800, 1100, 5), 100_000):
        seal(bundle, lambda m: m["provenance"]["recipe"].update(nested="here"))
        text = (bundle / MANIFEST).read_text()
        (bundle / MANIFEST).write_text(text.replace('"here"', "[" * depth + "]" * depth))
        with pytest.raises(BundleError, match=r"SHA-256|nested more than|not valid JSON") as caught:
            Bundle.open(bundle)
        refused += "SHA-256" not in str(caught.value)
        (bundle / MANIFEST).write_text(text)
    assert refused > 1


def test_any_flipped_byte_of_the_manifest(spoilt: Path) -> None:
    """A digit of the schedule that turned into another is still JSON: the manifest holds its own hash."""
    file = spoilt / MANIFEST
    sound = file.read_bytes()
    digit = sound.index(b"0.", sound.index(b"alphas_cumprod")) + 3
    for position in (digit, *range(7, len(sound), len(sound) // 150)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with pytest.raises(BundleError) as caught:
            Bundle.open(spoilt)
        assert "\n" not in str(caught.value)
        if position == digit:
            assert "does not match its own SHA-256" in str(caught.value)


def test_manifests_that_were_edited(spoilt: Path, refused: Callable[..., str]) -> None:
    files = json.loads((spoilt / MANIFEST).read_text())["files"]
    (spoilt.parent / "secret").write_text("secret")
    other = {"sha256": "0" * 64, "size": 6}
    for changes, message in (
        ({"format_version": 6}, "has format version 6, this ptqd-export reads 5: upgrade ptqd-export"),
        ({"format_version": 3}, "has format version 3, this ptqd-export reads 5: rebuild the bundle"),
        ({"format_version": None}, "has no format_version"),
        (
            {"files": {**files, "../secret": other}},
            "names a file '../secret', which no bundle holds: do not trust it",
        ),
        ({"files": {**files, "/etc/hostname": other}}, "names a file '/etc/hostname', which no bundle holds"),
        ({"sampling": {}}, "is damaged (manifest.sampling: 'model' is missing"),
        ({"recalibrate_variance": False}, "does not match its own SHA-256"),
    ):
        sound = (spoilt / MANIFEST).read_bytes()
        (spoilt / MANIFEST).write_text(json.dumps(json.loads(sound) | changes))
        assert message in refused("inspect", spoilt)
        (spoilt / MANIFEST).write_bytes(sound)
    (spoilt / MANIFEST).write_text("[" * 100_000)
    assert "is not valid JSON" in refused("inspect", spoilt)
    (spoilt / MANIFEST).write_text('{"format_version": ' + "9" * 5000 + "}")
    assert "is not valid JSON" in refused("inspect", spoilt)
