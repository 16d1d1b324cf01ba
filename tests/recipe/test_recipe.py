"""Recipe: defaults, reading, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptqd_export.errors import RecipeError
from ptqd_export.recipe import RECIPE_FILE, Recipe, check


def _nested(path: str, value: Any) -> dict[str, Any]:
    *sections, key = path.split(".")
    data: dict[str, Any] = {key: value}
    for section in reversed(sections):
        data = {section: data}
    return data


def test_defaults_are_valid_and_json_ready() -> None:
    recipe = Recipe.from_dict({})
    check(recipe)
    data = json.loads(json.dumps(recipe.to_dict()))
    assert "folder" not in data
    assert Recipe.from_dict(data) == recipe
    assert [str(p) for p in recipe.precisions] == list(recipe.quantization.precisions)


def test_toml_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(
        """
        backends = ["ort-cpu", "tensorrt-rtx"]
        [model]
        source = "net.py:build"
        sample_shape = [3, 8, 8]
        [[model.inputs]]
        name = "class_labels"
        num_classes = 11
        null_class = 10
        [sampler]
        eta = 1
        """
    )
    recipe = Recipe.load(tmp_path)
    assert recipe == Recipe.load(tmp_path / RECIPE_FILE)
    assert recipe.sampler.eta == 1.0 and isinstance(recipe.sampler.eta, float)
    assert recipe.model.sample_shape == (3, 8, 8) and recipe.model.inputs[0].null_class == 10
    assert recipe.path("x/y") == (tmp_path / "x/y").resolve()
    assert recipe.backends == ("ort-cpu", "tensorrt-rtx")


def test_bare_model_folder(tmp_path: Path) -> None:
    recipe = Recipe.load(tmp_path)
    assert recipe.path(recipe.model.source) == tmp_path.resolve()
    assert recipe.sampler == Recipe().sampler


@pytest.mark.parametrize("content", [None, b"[model", b"\xff\xfe\x00", b"x = 1\nx = 2"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "r.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml (does not exist|is not valid TOML)") as caught:
        Recipe.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("samplr", "did you mean 'sampler'"),
        ("sampler.n_step", "did you mean 'n_steps'"),
        ("quantization.precision", "did you mean 'precisions'"),
        ("plan.zzz", "expected one of rule, objective"),
        ("folder", "unknown key 'folder'"),
    ],
)
def test_unknown_key(path: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        Recipe.from_dict(_nested(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sampler", 3, "expected a table"),
        ("sampler.n_steps", 2.5, "expected int"),
        ("sampler.n_steps", True, "expected int"),
        ("sampler.n_steps", "20", "expected int"),
        ("sampler.eta", "0", "expected float"),
        ("sampler.eta", False, "expected float"),
        ("sampler.solver", "flow", "expected one of ddim, ddpm"),
        ("calibration.activation_range", "max", "expected one of minmax"),
        ("quantization.precisions", "w8a8", "expected an array"),
        ("quantization.precisions", [8], "expected str"),
        ("quantization.gate", 1, "expected bool"),
        ("quantization.rounding", "adaptive", "expected one of gptq, gptq-sequential, adaround, nearest"),
        ("quantization.edge_layers", "w4a4", "expected one of float, w8a8"),
        ("model.inputs", [{"dtype": "int64"}], "name"),
        ("model.inputs", [{"name": "y", "dtype": "int32"}], r"inputs\[0\].dtype: got 'int32'"),
        ("model.sample_shape", [3, "8"], r"sample_shape\[1\]: expected int"),
        ("model.null_class", 1.0, "expected int"),
    ],
)
def test_wrong_type(path: str, value: Any, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        Recipe.from_dict(_nested(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sampler.n_steps", 0),
        ("sampler.eta", -0.01),
        ("sampler.eta", 1.01),
        ("sampler.eta", float("nan")),
        ("sampler.guidance_rescale", 1.5),
        ("sampler.guidance_scale", -1.0),
        ("sampler.guidance_scale", float("inf")),
        ("sampler.guidance_scale", float("nan")),
        ("sampler.guidance_scale", 1000.5),
        ("calibration.size", 1),
        ("calibration.held_out", 1),
        ("calibration.batch_size", 0),
        ("calibration.seed", -1),
        ("calibration.percentile", 50.0),
        ("calibration.percentile", 100.1),
        ("quantization.precisions", []),
        ("quantization.precisions", ["w8a8", "w8a8"]),
        ("quantization.precisions", ["w16a16"]),
        ("quantization.precisions", ["w4a16+"]),
        ("quantization.precisions", ["w8a8-fp8+"]),
        ("quantization.iterations", 0),
        ("quantization.precisions", ["w4a4+", "w4a4+"]),
        ("quantization.smoothing", -0.1),
        ("quantization.smoothing", 1.1),
        ("quantization.smoothing", float("nan")),
        ("quantization.layer_budget", 0.99),
        ("quantization.layer_budget", 16.1),
        ("quantization.layer_budget", float("nan")),
        ("quantization.layer_bits", ["w4a8"]),
        ("quantization.layer_bits", ["=w4a8"]),
        ("quantization.layer_bits", ["*.conv2=w4a8", "*.conv1="]),
        ("quantization.layer_bits", ["*.conv2=w4a4+"]),
        ("quantization.layer_bits", ["*.conv2=w4a16"]),
        ("quantization.layer_bits", ["*.conv2=fp32"]),
        ("quantization.layer_bits", ["*.conv2=w8a8-fp8"]),
        ("quantization.layer_bits", ["*.\x1b[2J=fp16"]),
        ("quantization.smoothing", 2),
        ("quantization.layer_budget", 0.9),
        ("quantization.layer_budget", 17),
        ("quantization.layer_bits", ["*.conv2"]),
        ("quantization.layer_bits", ["*.conv2="]),
        ("plan.budget", 0.0),
        ("plan.budget", 1.5),
        ("plan.batch_size", 0),
        ("plan.rule", "fixed"),
        ("calibration.seed", 2**63),
        ("model.name", "a\x1b[2J"),
        ("model.sample_shape", [3, 8]),
        ("model.sample_shape", [3, 8, 0]),
        ("tensorrt.batch_sizes", [1, 8]),
        ("tensorrt.batch_sizes", [2, 8, 32]),
        ("tensorrt.batch_sizes", [1, 32, 8]),
        ("tensorrt.compute_capabilities", ["8"]),
        ("tensorrt.compute_capabilities", ["8.9\n"]),
        ("tensorrt.optimization_level", 6),
        ("tensorrt.optimization_level", -1),
        ("tensorrt.workspace_mib", 0),
        ("backends", []),
        ("backends", ["ort-gpu"]),
        ("backends", ["torch"]),
    ],
)
def test_out_of_range(path: str, value: Any) -> None:
    key = path.rpartition(".")[2].removesuffix("s")
    with pytest.raises(RecipeError, match=f"{key}|precision") as caught:
        Recipe.from_dict(_nested(path, value))
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_layers_of_a_mixed_precision() -> None:
    """Globs with "=" in them are whole; budget and bits stand in the digest of their section."""
    quantization = {
        "precisions": ["w4a4", "w4a4+"],
        "layer_bits": ["*.conv2=w4a8", "a=b=w8a8"],
        "layer_budget": 1,
    }
    recipe = Recipe.from_dict({"quantization": quantization})
    assert [p.mixed for p in recipe.precisions] == [False, True]
    assert recipe.quantization.layer_bits == ("*.conv2=w4a8", "a=b=w8a8")
    assert recipe.quantization.layer_budget == 1.0
    for change in ({"layer_budget": 1.5}, {"layer_bits": ("*.conv2=w8a8",)}):
        assert recipe.override(quantization=change).digest("quantization") != recipe.digest("quantization")


def test_codes_of_fp8_are_not_optimised() -> None:
    quantization = {"rounding": "adaround", "precisions": ["w4a8", "w8a8-fp8"]}
    with pytest.raises(RecipeError, match="adaround, which chooses integers: leave w8a8-fp8 out") as caught:
        Recipe.from_dict({"quantization": quantization})
    assert "\n" not in str(caught.value)
    Recipe.from_dict({"quantization": {**quantization, "precisions": ["fp32", "w8a8", "w4a16"]}})


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[sampler]\neta = " + "1" * 400, r"recipe\.sampler\.eta: expected a finite number"),
        ("[sampler]\nn_steps = " + "1" * 5000, "is not valid TOML"),
        ("[plan]\nsteps = " + "[" * 3000 + "]" * 3000, "is not valid TOML"),
        ("[sampler]\nsolver = 0x" + "f" * 5000, r"recipe\.sampler\.solver: got a int, expected one of"),
    ],
    ids=["a float beyond all", "more digits than are read", "a deep nesting", "more digits than are written"],
)
def test_extreme_values_are_refused_in_a_line(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / RECIPE_FILE).write_text(toml)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(tmp_path)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_engine_batches_must_hold_the_timed_ones() -> None:
    data = {"plan": {"batch_size": 33}, "backends": ["tensorrt-rtx"]}
    with pytest.raises(RecipeError, match=r"plan\.batch_size is 33, but engines are built for at most 32"):
        Recipe.from_dict(data)
    assert Recipe.from_dict({**data, "backends": ["ort-cpu"]}).plan.batch_size == 33
    assert Recipe.from_dict({**data, "tensorrt": {"batch_sizes": [1, 8, 33]}}).tensorrt.settings(2).rows == (
        2,
        16,
        66,
    )


def test_override() -> None:
    recipe = Recipe().override(sampler={"eta": 1.0, "solver": "ddpm"}, backends=("ort-cuda",))
    assert recipe.sampler.eta == 1.0 and recipe.backends == ("ort-cuda",) and Recipe().sampler.eta == 0.0
    with pytest.raises(RecipeError, match="eta"):
        Recipe().override(sampler={"eta": 2.0})


def test_digest_follows_the_named_sections() -> None:
    a, b = Recipe(), Recipe().override(plan={"budget": 0.5})
    assert a.digest() != b.digest()
    assert a.digest("model", "sampler") == b.digest("model", "sampler")
    assert a.digest("plan") != b.digest("plan")
