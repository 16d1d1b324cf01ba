"""The torch backend's layers, back from a bundle's tables. Its engines: runtime tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cases import FP8, W4A8, W4A16, W8A8, Case, equal
from safetensors.numpy import load_file, save

from ptqd_export.bundle.tables import QUANTIZATION, read_layers, write_layers
from ptqd_export.calibrate import quantize
from ptqd_export.errors import BundleError


def test_a_bundle_s_tables_give_the_layers_back(case: Case, tmp_path: Path) -> None:
    recipe, network, _, _, observed = case
    of = recipe.override(calibration={"activation_range": "minmax"}, quantization={"edge_layers": "w8a8"})
    nets = {p: quantize(network, observed, p, of) for p in (W8A8, W4A8, FP8, W4A16)}
    write_layers(tmp_path, nets)
    file = tmp_path / QUANTIZATION

    def parameters(name: str) -> dict[str, np.ndarray]:
        found = network.module.get_submodule(name).named_parameters(recurse=False)
        return {key: value.detach().numpy() for key, value in found}

    for precision, net in nets.items():
        found = read_layers(file.read_bytes(), file, precision, parameters)
        assert set(found) == set(net.layers)
        for name, layer in net.layers.items():
            assert equal(dataclasses.replace(found[name], macs=layer.macs), layer)
            assert (found[name].number, found[name].weight_bits, found[name].activation_bits) == (
                layer.number,
                layer.weight_bits,
                layer.activation_bits,
            )
    tables = load_file(file)
    for key, value, error in (
        ("codes/fp8/conv_in", tables["codes/w8/conv_in"], "type int8"),
        ("codes/w8/conv_in", tables["codes/fp8/conv_in"], "type uint8"),
        ("codes/w8/conv_in", tables["codes/w8/conv_in"][:1], "shape"),
    ):
        data, precision = save({**tables, key: value}), FP8 if "fp8" in key else W8A8
        with pytest.raises(
            BundleError, match=f"does not hold the layers of this model .*layer conv_in has weights.*{error}"
        ):
            read_layers(data, file, precision, parameters)
