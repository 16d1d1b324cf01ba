"""export_fp: the graph against the module, what is kept of the exporter, and what cannot be exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import INFO, copy_of, feeds_of, forward, layers_of, run

from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.quant import Geometry
from ptqd_export.errors import GraphError
from ptqd_export.export import export_fp, exported_layers, lint
from ptqd_export.export.dialect import LAYER


@pytest.mark.parametrize("n", [1, 3])
def test_export_equals_torch_at_any_batch(toy: nn.Module, base: ir.Model, n: int) -> None:
    assert [v.name for v in base.graph.inputs] == ["sample", "timestep", "class_labels"]
    np.testing.assert_allclose(run(base, feeds_of(n))["output"], forward(toy, feeds_of(n)), atol=2e-6)
    lint(base, Emission.PORTABLE)


def test_every_layer_is_noted_and_nothing_else_of_the_exporter_is_kept(
    toy: nn.Module, base: ir.Model
) -> None:
    nodes = [
        (node.metadata_props[LAYER], node.op_type) for node in base.graph if LAYER in node.metadata_props
    ]
    assert {path for path, op in nodes if op != "Add"} == set(layers_of(toy)) == set(exported_layers(base))
    assert [path for path, op in nodes if op == "Conv"].count("twice") == 2
    text = ir.to_proto(base).SerializeToString()
    assert b"pkg.torch" not in text and b"stack_trace" not in text and str(Path.cwd()).encode() not in text
    assert b"module." not in text
    assert all(
        not isinstance(v.shape[0], int) and str(v.shape[0]) == "batch"
        for v in (*base.graph.inputs, *base.graph.outputs)
        if v.shape
    )


def test_export_is_silent_and_copies_no_weights(toy: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    """A large model's are gigabytes; what the exporter computed of them is its own."""
    module = copy_of(toy)
    model = export_fp(module, INFO)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    values = {str(v.name): v.const_value for v in model.graph.initializers.values()}
    shared = {
        name for name in weights.keys() & values.keys() if np.shares_memory(values[name], weights[name])
    }
    assert shared == weights.keys() & values.keys() and len(shared) > len(weights) / 2


class Frozen(nn.Module):
    """Its forward turns the batch size into a Python number."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * float(len(sample)) if sample.shape[0] == 2 else sample


class Failing(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample.reshape(3, 5, 7)


class TwoOutputs(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sample * 2, sample * 3


class First(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample[:1] * 2


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Frozen(), "conflicts"),
        (Failing(), "is invalid for input of size"),
        (TwoOutputs(), "returns one tensor"),
        (First(), "became static"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(module: nn.Module, says: str) -> None:
    with pytest.raises(GraphError, match=f"toy.*{says}|{says}.*toy") as error:
        export_fp(module, ModelInfo("toy", (2, 8, 8), (), ""))
    assert "\n" not in str(error.value)


def test_a_folded_normalisation_hides_its_layer() -> None:
    """The exporter folds BatchNorm into the conv before it: the module's own weight is not in the graph, so
    it must not be quantized with it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(sample))

    module = Normed().eval()
    module.norm.running_var.fill_(4.0)
    model = export_fp(module, ModelInfo("normed", (2, 8, 8), (), ""))
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert LAYER not in model.graph[0].metadata_props and exported_layers(model) == {}


class Padded(nn.Module):
    """Convs with padding of their own, by a rule, and in front of them; one is called again without it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(2, 2, 3, stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2)
        self.rule = nn.Conv2d(2, 2, (3, 2), padding="same")
        self.outside = nn.Conv2d(2, 2, 3)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.outside(F.pad(self.rule(sample), (0, 1, 2, 3)))
        return sample + self.own(h).mean((2, 3), True) + self.outside(h).mean((2, 3), True)


def test_the_geometry_of_convs_is_the_graphs() -> None:
    """Padding in front of a conv is a part of it there; of two calls, the first counts."""
    module = Padded().eval()
    found = exported_layers(export_fp(module, ModelInfo("padded", (2, 8, 8), (), "")))
    assert found == {
        "own": Geometry((1, 2), (1, 0, 1, 0), (1, 2), 2),
        "rule": Geometry((1, 1), (1, 0, 1, 1), (1, 1), 1),
        "outside": Geometry((1, 1), (2, 0, 3, 1), (1, 1), 1),
    }
    assert {name: geometry_of(module.get_submodule(name)) for name in found} == {
        **found, "outside": Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)
    }  # fmt: skip
    assert geometry_of(nn.Linear(2, 2)) is None


def test_importing_export_leaves_torch_alone() -> None:
    script = (
        "import sys, ptqd_export.export; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
