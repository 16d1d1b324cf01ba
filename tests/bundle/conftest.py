"""A small bundle, made by hand: a graph of one embedding, the sampler's update, tables of one precision, and
engines that nobody opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from ptqd_export.bundle import Manifest, write_manifest
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.bundle.manifest import (
    Artifact,
    Choice,
    CorrectionRecord,
    FrontRecord,
    GateRecord,
    Graph,
    Machine,
    PlanRecord,
    Provenance,
    UpdateEngine,
    UpdateGraph,
)
from ptqd_export.bundle.pipeline import Pipeline
from ptqd_export.bundle.tables import QUANTIZATION, Probe, write_tables
from ptqd_export.core.backend import ORT_CPU, TENSORRT_RTX, Emission
from ptqd_export.core.engine_build import EngineBuild, EngineSettings, PlanReport
from ptqd_export.core.figures import FloatFigures, LayerFigures, NoiseFigures, QuantizedFigures
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import Precision
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.sensitivity import Sensitivity
from ptqd_export.export import export_fp, fold, sampler_update, save
from ptqd_export.files import replacing

W8A8 = Precision(8, 8)
Write = Callable[..., Path]
NOISE = NoiseFigures({"k": 1.0}, None, (1.0,), (None,))


@pytest.fixture(scope="session")
def network() -> ir.Model:
    """A network that a bundle of `class_info` may hold, before anything is folded into it."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Embedding(4, 100)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> torch.Tensor:
            return sample + self.classes(class_labels).mean(1)[:, None, None, None]

    torch.manual_seed(0)
    info = ModelInfo("toy", (1, 4, 4), (InputSpec("class_labels", num_classes=4, null_class=3),), "0" * 64)
    return export_fp(Net().eval(), info)


@pytest.fixture
def write(tmp_path: Path, schedule: NoiseSchedule, class_info: ModelInfo, network: ir.Model) -> Write:
    """Writes tmp_path/bundle, whose graphs are by the producer `marker`."""

    def call(marker: str = "graph") -> Path:
        sampling = Sampling(class_info, schedule, 2.0)
        t, c = len(schedule), class_info.channels
        with replacing(tmp_path / "bundle") as tmp:
            identity = Correction.identity(t, c)
            graph = fold(network, schedule, identity)
            graph.producer_name = marker
            save({"w8a8.ort-cpu": graph}, tmp, WEIGHTS)
            save({"update": sampler_update(sampling)}, tmp, None)
            save_file({"s": np.arange(4.0)}, tmp / QUANTIZATION)
            table, row = np.full((t, c), 0.5), np.full(t, 1e-3)
            keys = [(W8A8, emission) for emission in (Emission.PORTABLE, Emission.ORT_CPU)]
            tables = Correction(table, table, row), NoiseStats(row, table, table, table, table, table)
            probe = Probe(np.zeros((2, *class_info.sample_shape)), 1.0)
            write_tables(tmp, dict.fromkeys(keys, tables), dict.fromkeys(keys, probe))
            for name in ("w8a8.tensorrt-rtx.engine", "update.tensorrt-rtx.engine"):
                (tmp / name).write_bytes(b"not opened")
            write_manifest(tmp, _manifest(sampling))
        return tmp_path / "bundle"

    return call


def _manifest(sampling: Sampling) -> Manifest:
    t = len(sampling)
    settings = EngineSettings((1, 8, 32), ("8.9",))
    plan = PlanReport(1, 1, {}, 9, {"Conv": 9})
    build = EngineBuild("1" * 64, ("8.9",), settings, 1.5, 10**9, plan)
    choice = Choice(
        rule="fixed",
        objective="paired",
        cost="bops",
        budget=40.0,
        timed_on=ORT_CPU,
        bops=10,
        bops_fp32=40,
        seconds_per_evaluation={W8A8: 1e-3},
        seconds_error={W8A8: 1e-5},
        snr_q={W8A8: (None,) * t},
        error={W8A8: (0.0,) * t},
        sensitivity=Sensitivity((t,), 4, 4 * t, {W8A8: (0.5,)}, {W8A8: (0.1,)}),
        front=(FrontRecord(10.0, 0.5, f"w8a8*{t}"),),
        compared=(PlanRecord("chosen", f"w8a8*{t}", 10.0, 0.5, 0.4, 0.1),),
        notes=("a note",),
    )
    return Manifest(
        sampling=sampling,
        recalibrate_variance=True,
        plan=Plan((W8A8,) * t),
        choice=choice,
        graphs=(Graph(W8A8, Emission.ORT_CPU, "w8a8.ort-cpu.onnx", "0" * 64, {"conv": "int8"}),),
        update=UpdateGraph("update.onnx", "2" * 64),
        artifacts=(
            Artifact(W8A8, ORT_CPU, "w8a8.ort-cpu.onnx", "test", "none", 1.5),
            Artifact(W8A8, TENSORRT_RTX, "w8a8.tensorrt-rtx.engine", "test", "none", None, build),
        ),
        update_engines=(UpdateEngine(TENSORRT_RTX, "update.tensorrt-rtx.engine", "none", build),),
        engine_settings=settings,
        correction=CorrectionRecord(
            "ptqd",
            False,
            {
                f"w8a8.{emission}": GateRecord(("both",) * t, (9.0,) * t, (4.0,) * t, 3.5)
                for emission in (Emission.PORTABLE, Emission.ORT_CPU)
            },
        ),
        parity={
            "fp32.ort-cpu": FloatFigures(1e-7),
            "w8a8.ort-cpu": QuantizedFigures(1e-7, LayerFigures(3, 100, 0.0, 0.0), NOISE),
        },
        bops={W8A8: 10},
        half_bops={W8A8: 8},
        layers={W8A8: {"w8a8": ("conv",), "float": ("time",)}},
        layer_sensitivity={},
        provenance=Provenance({}, 0, {}, Machine("x86_64", 2), 1.0),
        files={},
        pipeline=Pipeline(),
    )


@pytest.fixture
def bundle(write: Write) -> Path:
    return write()
