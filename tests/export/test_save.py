"""Graphs on disk: every weight once, the same bytes for the same module, and digests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import toy as toy_module
from safetensors.numpy import load_file
from torch import nn
from toy import FLOAT32, INFO, PRECISIONS, calibrated, copy_of, emitted, feeds_of, graph_of, run, write_all

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.errors import GraphError
from ptqd_export.export import export_fp, lint, save

FP8, W4A16 = Precision(8, 8, "fp8"), Precision(4, 16)


def test_weights_are_shared_and_stored_once(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    models = {"fp32": base}
    for precision in PRECISIONS[1:]:
        network = calibrated(toy, precision)
        models |= {f"{precision}.{e}": emitted(base, network, e) for e in FLOAT32}
    save(models, tmp_path, WEIGHTS)
    tensors = load_file(tmp_path / WEIGHTS)
    contents = [(a.dtype.name, a.shape, a.tobytes()) for a in tensors.values()]
    assert len(contents) == len(set(contents)) and all(a.nbytes > 256 for a in tensors.values())
    codes = [name for name, a in tensors.items() if a.dtype == np.int8 and name.startswith("grouped.weight")]
    assert len(codes) == 1  # w4a8 and w4a4, both emissions
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "fp32.onnx").stat().st_mode
    assert any(name.startswith("grouped.weight") and a.dtype == np.float32 for name, a in tensors.items())
    for key, model in models.items():
        path = tmp_path / f"{key}.onnx"
        lint(path, Emission.ORT_CPU)
        for initializer in onnx.load(path, load_external_data=False).graph.initializer:
            assert (initializer.data_location == onnx.TensorProto.EXTERNAL) == (
                int(np.prod(initializer.dims)) * itemsize(initializer) > 256
            )
        np.testing.assert_array_equal(run(path, feeds_of(2))["output"], run(model, feeds_of(2))["output"])


def itemsize(initializer: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).itemsize)


HASH_SEED_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {support!r})
import torch
from toy import write_all, Toy
torch.set_num_threads(1)
torch.manual_seed(0)
write_all(Toy().eval(), Path({folder!r}))
"""


def test_same_module_same_bytes(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    """Twice in this process, and in one with another hash seed."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    write_all(toy, folders[0], base)
    write_all(copy_of(toy), folders[1])
    script = HASH_SEED_SCRIPT.format(support=str(Path(toy_module.__file__).parent), folder=str(folders[2]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for file in sorted(folders[0].iterdir()):
        assert {(folder / file.name).read_bytes() for folder in folders} == {file.read_bytes()}, file.name


class Wide(nn.Module):
    """One conv of 720 weights between two small ones: enough to lie outside the ONNX file in INT4 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.wide, self.outlet = (
            nn.Conv2d(2, 2, 1),
            nn.Conv2d(2, 40, 3, padding=1),
            nn.Conv2d(40, 2, 1),
        )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:

        return self.outlet(torch.relu(self.wide(torch.relu(self.inlet(sample)))))


def test_tensors_of_fp8_and_int4_are_stored_as_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Wide().eval()
    base = export_fp(module, INFO)
    models = {str(p): graph_of(module, base, p, Emission.PORTABLE) for p in (FP8, W4A16)}
    save(models, tmp_path, WEIGHTS)
    tensors = [a for name, a in load_file(tmp_path / WEIGHTS).items() if name.startswith("wide.weight.codes")]
    four, eight = (calibrated(module, p).layers["wide"].weight for p in (W4A16, FP8))
    nibbles = four.reshape(-1).astype(np.uint8) & 15
    assert [a.dtype for a in tensors] == [np.uint8, np.uint8]
    assert {a.tobytes() for a in tensors} == {
        ((nibbles[1::2] << 4) | nibbles[::2]).tobytes(),
        eight.tobytes(),
    }
    for key, model in models.items():
        loaded = onnx.load(tmp_path / f"{key}.onnx")
        kinds = {i.name: onnx.numpy_helper.to_array(i) for i in loaded.graph.initializer}
        wanted, dtype = (
            (four, ml_dtypes.int4)
            if key == "w4a16"
            else (eight.view(ml_dtypes.float8_e4m3fn), ml_dtypes.float8_e4m3fn)
        )
        assert kinds["wide.weight.codes"].dtype == dtype
        np.testing.assert_array_equal(
            kinds["wide.weight.codes"].astype(np.float32), wanted.astype(np.float32)
        )
        got, exact = (
            run(m, feeds_of(2), optimise=False)["output"] for m in (tmp_path / f"{key}.onnx", model)
        )
        np.testing.assert_array_equal(got, exact)


def test_a_digest_is_of_the_graph_and_its_weights_alone(
    toy: nn.Module, base: ir.Model, tmp_path: Path
) -> None:
    models = {str(p): graph_of(toy, base, p, Emission.HALF) for p in (Precision(8, 8), FP8, W4A16)}
    folders = [tmp_path / name for name in ("alone", "beside", "within")]
    for folder in folders:
        folder.mkdir()
    alone = save({"w8a8": models["w8a8"]}, folders[0], WEIGHTS)
    beside = save({"base": base, **models, "again": models["w8a8"].clone()}, folders[1], WEIGHTS)
    within = save(models, folders[2], None)
    assert alone["w8a8"] == beside["w8a8"] == beside["again"] == within["w8a8"]
    assert (folders[0] / "w8a8.onnx").read_bytes() != (folders[1] / "w8a8.onnx").read_bytes()
    assert (
        beside == {**within, "base": beside["base"], "again": beside["w8a8"]}
        and len(set(beside.values())) == 4
    )
    assert not (folders[2] / WEIGHTS).exists()
    np.testing.assert_array_equal(
        *(
            run(folder / "w8a8.onnx", feeds_of(1), optimise=False)["output"]
            for folder in (folders[1], folders[2])
        )
    )


@pytest.mark.parametrize("change", ["value", "name", "attribute", "small"])
def test_a_digest_sees_every_change(base: ir.Model, tmp_path: Path, change: str) -> None:
    other = base.clone()
    node = next(n for n in other.graph if n.op_type == "GroupNormalization")
    weight = other.graph.initializers["conv_in.weight"] if change in ("value", "name") else node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if change == "name":
        weight.name = "renamed"
    elif change == "attribute":
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    else:
        array = weight.const_value.numpy().copy()
        array.reshape(-1)[-1] += 1e-3
        weight.const_value = ir.tensor(array, name=weight.name)
    digests = save({"a": base, "b": other}, tmp_path, WEIGHTS)
    assert digests["a"] != digests["b"]


def test_what_cannot_be_saved_is_told(base: ir.Model, tmp_path: Path) -> None:
    empty = base.clone()
    empty.graph.initializers["conv_in.weight"].const_value = None
    with pytest.raises(GraphError, match=r"initializer 'conv_in\.weight' has no data"):
        save({"a": empty}, tmp_path, WEIGHTS)
    with pytest.raises(GraphError, match=r"weights\.safetensors cannot be written"):
        save({"a": base}, tmp_path / "gone", WEIGHTS)
    assert not list(tmp_path.iterdir())
