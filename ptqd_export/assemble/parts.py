"""The parts around the network in a bundle: export text encoders and the decoder, and check them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..backends.ort import OrtEngine
from ..bundle.bundle import WEIGHTS
from ..bundle.pipeline import (
    INPUT_IDS,
    LATENT,
    MODEL,
    Decoder,
    Pipeline,
    TextEncoder,
    graph_file,
)
from ..calibrate import DecoderPart, Parts, TextPart
from ..core.backend import Emission
from ..core.figures import relative_rms
from ..core.precision import FP32, Precision
from ..core.quant import QuantizedNetwork
from ..errors import ParityError
from ..export import export_part, exported_layers, insert_qdq, lint, save

W8A16 = Precision(8, 16)
TOLERANCE = 1e-3
"""Largest RMS difference between a part's graph and its module, as a share of the RMS of what it yields."""
Array = npt.NDArray[np.generic]


def emit_parts(parts: Parts, folder: Path, say: Callable[[str], None]) -> Pipeline:
    """Write every part, its graph, weights and tokenizer, each into a folder of its own.

    Raises:
        GraphError: a part cannot be exported.
        ParityError: a graph does not compute what its module computes.
    """
    encoders = tuple(_encoder(part, folder, say) for part in parts.texts)
    decoder = None if parts.decoder is None else _decoder(parts.decoder, folder, say)
    return Pipeline(parts.latent, decoder, encoders, parts.force_zeros)


def _encoder(part: TextPart, folder: Path, say: Callable[[str], None]) -> TextEncoder:
    ids, _ = part.tokenizer(["", "a photo of a cat"])
    digest = _write(part, folder / part.folder, (INPUT_IDS, ids))
    record = TextEncoder(
        input=part.input,
        folder=part.folder,
        tokenizer=part.tokenizer_folder,
        digest=digest,
        precision=_precision(part),
        tokens=part.tokenizer.tokens,
        width=part.width,
        vocabulary=len(part.tokenizer.vocabulary),
        hidden_layer=part.hidden_layer,
        final_norm=part.final_norm,
        special=part.tokenizer.special,
        pooled=part.pooled,
    )
    place = folder / part.tokenizer_folder
    place.mkdir()
    for name, content in part.files.items():
        (place / name).write_bytes(content)
    _check(part, folder / graph_file(record), (INPUT_IDS, ids), say)
    return record


def _decoder(part: DecoderPart, folder: Path, say: Callable[[str], None]) -> Decoder:
    latents = np.random.default_rng(0).standard_normal((2, *part.latent_shape)).astype(np.float32)
    record = Decoder(
        kind=part.kind,
        digest=_write(part, folder / part.folder, (LATENT, latents)),
        precision=_precision(part),
        latent_shape=part.latent_shape,
        picture_shape=part.picture_shape,
        scaling_factor=part.scaling_factor,
        shift_factor=part.shift_factor,
        image_range=part.image_range,
    )
    _check(part, folder / graph_file(record), (LATENT, latents), say)
    return record


def _precision(part: TextPart | DecoderPart) -> Precision:
    return W8A16 if part.layers else FP32


def _write(part: TextPart | DecoderPart, folder: Path, feed: tuple[str, Array]) -> str:
    """Write a part's graph; returns its digest."""
    folder.mkdir()
    model = export_part(part.module, folder.name, feed, part.outputs)
    if part.layers:
        network = QuantizedNetwork(W8A16, part.layers).exported(exported_layers(model))
        # As ONNX Runtime's CPU kernels want it: its optimiser makes other numbers of dequantized weights.
        model = insert_qdq(model, network, Emission.ORT_CPU)
    name = MODEL.removesuffix(".onnx")
    digest = save({name: model}, folder, WEIGHTS)[name]
    lint(folder / MODEL, Emission.PORTABLE)
    return digest


def _check(
    part: TextPart | DecoderPart, file: Path, feed: tuple[str, Array], say: Callable[[str], None]
) -> None:
    """The graph computes what the module computes.

    Raises:
        ParityError: it does not; says by how much.
    """
    with OrtEngine(file) as engine:
        got = engine({feed[0]: feed[1]})
    expected = zip(part.outputs, part.compute(feed[1]), strict=True)
    off = max(relative_rms(got[name], value) for name, value in expected)
    if not off <= TOLERANCE:
        raise ParityError(
            f"the graph of {file.parent.name} differs from its module by {off:.2g} of what it yields, "
            f"expected {TOLERANCE:g} at most: its export is wrong; please report it"
        )
    say(f"{file.parent.name}: {_precision(part)}, {off:.2g} off its module")
