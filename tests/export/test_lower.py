"""lower: the same numbers by other operators, for the CPU kernels of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional as F
from toy import INFO, calibrated, emitted, feeds_of, forward, layers_of, run, session

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.export import (
    export_fp,
    float_convs,
    layer_sites,
    lint,
    lower,
    op_counts,
    quantized_nodes,
    save,
)


def test_lowered_equals(base: ir.Model) -> None:
    graph = lower(base, Emission.ORT_CPU, FP32)
    ops = [n.op_type for n in graph.graph]
    assert ops.count("InstanceNormalization") == 1 and "GroupNormalization" not in ops
    assert ops.count("MultiHeadAttention") == 1 and "Softmax" not in ops
    lint(graph, Emission.ORT_CPU)
    for n in (1, 3):
        np.testing.assert_allclose(
            run(graph, feeds_of(n))["output"], run(base, feeds_of(n))["output"], atol=1e-5
        )
    assert [n.op_type for n in lower(base, Emission.PORTABLE, FP32).graph] == [n.op_type for n in base.graph]


def test_masked_attention_is_left_alone() -> None:
    class Causal(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            b, c, h, w = sample.shape
            x = sample.flatten(2).view(b, h * w, 1, c).transpose(1, 2)
            out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return out.transpose(1, 2).reshape(b, c, h, w)

    model = export_fp(Causal(), ModelInfo("causal", (2, 4, 4), (), ""))
    assert [n.op_type for n in lower(model, Emission.ORT_CPU, FP32).graph].count("Softmax") == 1


def test_a_diffusers_unet(tmp_path: Path) -> None:
    """Every layer is found under its path, every conv is fused, attention too; both batch sizes."""
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()

    class Tensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> torch.Tensor:

            return self.unet(sample, timestep, class_labels=class_labels).sample

    module = Tensor().eval()
    model = export_fp(module, INFO)
    network = calibrated(module, Precision(4, 4))
    for n in (1, 3):
        np.testing.assert_allclose(
            run(lower(model, Emission.ORT_CPU, FP32), feeds_of(n))["output"],
            forward(module, feeds_of(n)),
            atol=1e-5,
        )
    for emission in Emission:
        graph = emitted(model, network, emission)
        assert set(layer_sites(graph)) == set(layers_of(module)) == set(quantized_nodes(graph))
        lint(graph, emission)
    save({"q": graph}, tmp_path, WEIGHTS)
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    assert emission is Emission.ORT_CPU
    assert ops["QLinearConv"] == sum(
        layer.kind == "conv" for layer in network.layers.values()
    ) and not float_convs(tmp_path / "optimised.onnx")
    assert ops["MultiHeadAttention"] == 4 and ops["MatMul"] == ops["Gemm"] == 0
    assert ops["MatMulIntegerToFloat"] == sum(layer.kind == "linear" for layer in network.layers.values())
