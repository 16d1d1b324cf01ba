"""Bundles that were built, and then damaged or changed: every command says so in one line, and writes
nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Launch, reseal
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.bundle import MANIFEST, WEIGHTS
from ptqd_export.errors import BundleError


def test_a_flipped_byte_in_any_file(spoilt: Path, refused: Callable[..., str]) -> None:
    files = sorted(spoilt.iterdir())
    assert len(files) == 16
    for file in files:
        sound = file.read_bytes()
        for position in (0, len(sound) // 3, len(sound) // 2, len(sound) - 1):
            file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            for words in (
                ("inspect", spoilt),
                ("verify", spoilt),
                ("run", spoilt, "--out", spoilt.parent / "x", "--format", "npy"),
            ):
                line = refused(*words)
                assert file.name in line or (file.name == MANIFEST and str(spoilt) in line), line
        file.write_bytes(sound)
    Bundle.open(spoilt)
    assert not (spoilt.parent / "x").exists()


def test_a_file_that_is_gone_or_cut(spoilt: Path, refused: Callable[..., str]) -> None:
    os.truncate(spoilt / WEIGHTS, 100)
    assert "weights.safetensors has 100 bytes, the manifest says" in refused("verify", spoilt)
    (spoilt / WEIGHTS).unlink()
    assert "weights.safetensors is missing" in refused("verify", spoilt)
    (spoilt / MANIFEST).unlink()
    assert "is not a bundle: it has no manifest.json" in refused("verify", spoilt)


def _external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_initializer(graph: onnx.ModelProto, location: str) -> None:
    place = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    next(entry for entry in place.external_data if entry.key == "location").value = location


def _in_constant(graph: onnx.ModelProto, location: str) -> None:
    graph.graph.node.append(helper.make_node("Constant", [], ["unused"], value=_external(location)))


def _in_subgraph(graph: onnx.ModelProto, location: str) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["r"])], "b", [], [helper.make_tensor_value_info("r", 1, [2])]
    )
    branch.initializer.append(_external(location))
    graph.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=branch, else_branch=branch))


def _in_function(graph: onnx.ModelProto, location: str) -> None:
    node = helper.make_node("Constant", [], ["y"], value=_external(location))
    graph.functions.append(
        helper.make_function("custom", "f", [], ["y"], [node], [helper.make_opsetid("", 21)])
    )


@pytest.mark.parametrize(
    "location", ["../secret", "{parent}/secret", "a/../../secret", "*/_ORT_MEM_ADDR_/*", "w8a8.bin", ""]
)
@pytest.mark.parametrize("put", [_in_initializer, _in_constant, _in_subgraph, _in_function])
def test_a_graph_reads_nothing_outside_its_bundle(
    spoilt: Path, put: Callable[[onnx.ModelProto, str], None], location: str
) -> None:
    """The hashes match, so only the graph itself tells. (w8a8.bin: a file in the folder that has no hash.)"""
    (spoilt.parent / "secret").write_bytes(bytes(1 << 20))
    location = location.format(parent=spoilt.parent)
    graph = onnx.load(spoilt / "w8a8.ort-cpu.onnx", load_external_data=False)
    put(graph, location)
    (spoilt / "w8a8.ort-cpu.onnx").write_bytes(graph.SerializeToString())
    reseal(spoilt)
    (spoilt / "w8a8.bin").write_bytes(bytes(1 << 20))
    with pytest.raises(
        BundleError, match=r"w8a8.ort-cpu.onnx (takes weights|has a|is not an ONNX graph) .*do not"
    ) as caught:
        Bundle.open(spoilt)
    assert "\n" not in str(caught.value)


def test_a_hostile_graph_is_refused_unread(spoilt: Path, tmp_path: Path, launch: Launch) -> None:
    """The file it names is a pipe: whoever opened it to read would wait for ever."""
    os.mkfifo(spoilt.parent / "secret")
    graph = onnx.load(spoilt / "w4a4.ort-cpu.onnx", load_external_data=False)
    _in_initializer(graph, "../secret")
    (spoilt / "w4a4.ort-cpu.onnx").write_bytes(graph.SerializeToString())
    reseal(spoilt)
    for words in (
        ("run", spoilt, "--out", tmp_path / "x", "--format", "npy"),
        ("verify", spoilt),
        ("inspect", spoilt),
    ):
        process = launch(*words)
        printed, error = process.communicate(timeout=60)
        assert (process.returncode, printed) == (1, "")
        assert "takes weights from '../secret'" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_graphs_that_are_none(spoilt: Path, refused: Callable[..., str]) -> None:
    for content in (b"not a graph", b"\x3a\xff\xff\xff\xff\x7f", b"\x3a", b"\x0b\x0c", bytes(range(256))):
        (spoilt / "w8a8.ort-cpu.onnx").write_bytes(content)
        reseal(spoilt)
        assert "w8a8.ort-cpu.onnx is not an ONNX graph" in refused("inspect", spoilt)
    # An empty message: a graph to protobuf, none to a runtime.
    (spoilt / "w8a8.ort-cpu.onnx").write_bytes(b"")
    reseal(spoilt)
    for workers in ("1", "2"):
        words = ("run", spoilt, "--out", spoilt.parent / "x", "--format", "npy", "--batch-size", "4")
        assert "w8a8.ort-cpu.onnx is not an ONNX graph" in refused(*words, "--workers", workers)
    assert not (spoilt.parent / "x").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x08" + b"\x80" * 9 + b"\x01", "the model has no graph"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "a number of more than 64 bits"),
    ],
)
def test_a_graph_s_numbers_end_after_ten_bytes(bundle: Path, content: bytes, message: str) -> None:
    """A number without end would grow for as long as the file is."""
    (bundle / "w8a8.ort-cpu.onnx").write_bytes(content)
    reseal(bundle)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_nonsense_is_not_written(spoilt: Path, refused: Callable[..., str]) -> None:
    """A graph of infinite weights: no samples with NaN in them, and nothing in the folder."""
    weights = load_file(spoilt / WEIGHTS)
    for name, value in weights.items():
        if value.dtype == np.float32:
            weights[name] = np.full_like(value, 1e38)
    save_file(weights, spoilt / WEIGHTS)
    reseal(spoilt)
    line = refused("run", spoilt, "--out", spoilt.parent / "x", "--format", "npy", "--num-samples", "3")
    assert "returns NaN, infinite values" in line
    assert not (spoilt.parent / "x").exists()
    assert "returns NaN, infinite values" in refused("verify", spoilt)
