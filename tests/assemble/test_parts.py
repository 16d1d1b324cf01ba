"""Export of the parts around the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from text_models import save_text_pipeline

from ptqd_export.assemble.parts import emit_parts
from ptqd_export.backends import OrtEngine
from ptqd_export.calibrate import Parts, open_parts, open_source
from ptqd_export.errors import ParityError
from ptqd_export.recipe import Recipe

IDENTITY = """
<ir_version: 10, opset_import: ["" : 21]>
agraph (int64[batch, {tokens}] input_ids) => (float[batch, {tokens}, {width}] last_hidden_state)
{{
    codes = Cast <to = 1> (input_ids)
    axis = Constant <value_ints = [2]> ()
    column = Unsqueeze (codes, axis)
    times = Constant <value_ints = [1, 1, {width}]> ()
    last_hidden_state = Tile (column, times)
}}
"""
"""Ids in place of states."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Text encoder and decoder with weights of eight bits."""
    pytest.importorskip("transformers")
    folder = save_text_pipeline(tmp_path_factory.mktemp("models") / "sd")
    recipe = Recipe.from_dict({"model": {"source": "."}, "pipeline": {"weights": "w8a16"}}, folder)
    return open_parts(recipe, open_source(recipe))


def test_parts_of_eight_bits(parts: Parts, tmp_path: Path) -> None:
    """The graphs hold the codes, and compute what the modules with rounded weights compute."""
    said: list[str] = []
    pipeline = emit_parts(parts, tmp_path, said.append)
    assert [str(part.precision) for part in pipeline.parts] == ["w8a16", "w8a16"]
    assert len(said) == 2 and pipeline.latent
    assert parts.decoder is not None
    for name, part in (("text_encoder", parts.texts[0]), ("vae_decoder", parts.decoder)):
        graph = ir.load(tmp_path / name / "model.onnx").graph
        codes = [v for v in graph.initializers.values() if v.dtype is ir.DataType.INT8]
        # The encoder half of the autoencoder is no part of the graph.
        mine = [n for n in part.layers if not n.startswith(("encoder.down", "encoder.mid", "encoder.conv"))]
        assert len(codes) == len([n for n in mine if n != "quant_conv"])
    (text,) = parts.texts
    ids, _ = text.tokenizer(["a dog and a cat"])
    with OrtEngine(tmp_path / "text_encoder" / "model.onnx") as engine:
        got = engine({"input_ids": ids})["last_hidden_state"]
    assert np.abs(got - text.compute(ids)[0]).max() < 1e-4
    assert (tmp_path / "tokenizer" / "merges.txt").read_bytes() == text.files["merges.txt"]


def test_a_wrong_export_is_found(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = parts.texts
    graph = ir.from_onnx_text(IDENTITY.format(tokens=text.tokenizer.tokens, width=text.width))
    monkeypatch.setattr("ptqd_export.assemble.parts.export_part", lambda *about: graph)
    text = replace(text, layers={})
    with pytest.raises(ParityError, match="graph of text_encoder differs from its module by"):
        emit_parts(Parts(texts=(text,)), tmp_path, lambda line: None)
