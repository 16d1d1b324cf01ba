"""The torch backend's layers, back from a bundle's tables. Its engines: runtime tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import stored
from cases import FP8, W4A8, W4A16, W8A8, Case, equal

from ptqd_export.bundle.layers import read_layers
from ptqd_export.calibrate import quantize


def test_a_bundle_s_tables_give_the_layers_back(case: Case, tmp_path: Path) -> None:
    recipe, network, _, _, observed = case
    of = recipe.override(calibration={"activation_range": "minmax"}, quantization={"edge_layers": "w8a8"})
    nets = {p: quantize(network, observed, p, of) for p in (W8A8, W4A8, FP8, W4A16)}
    reader = stored.write(tmp_path, nets)

    def parameters(name: str) -> dict[str, np.ndarray]:
        found = network.module.get_submodule(name).named_parameters(recurse=False)
        return {key: value.detach().numpy() for key, value in found}

    read = read_layers(reader, list(nets), parameters)
    for precision, net in nets.items():
        found = read[precision]
        assert set(found) == set(net.layers)
        for name, layer in net.layers.items():
            assert equal(dataclasses.replace(found[name], macs=layer.macs), layer)
            assert (found[name].number, found[name].weight_bits, found[name].activation_bits) == (
                layer.number,
                layer.weight_bits,
                layer.activation_bits,
            )
