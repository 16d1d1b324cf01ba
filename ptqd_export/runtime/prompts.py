"""Prompts to conditions: tokenizer and text encoder of a bundle, each text once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backends import open_engine
from ..bundle.bundle import Bundle
from ..bundle.pipeline import INPUT_IDS, TextEncoder, graph_file
from ..bundle.tokenizer import MERGES, VOCABULARY, Tokenizer, check_prompt
from ..core.backend import ORT_CPU
from ..core.engine import Array
from ..core.figures import relative_rms
from ..errors import ParityError, RecipeError
from ..typed import brief

AT_ONCE = 16
"""Texts per call of an encoder."""
MAX_PROMPTS = 100_000
TOLERANCE = 1e-3
"""RMS by which the empty prompt's states may differ from the bundle's, as a share of their RMS."""
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompted:
    """Prompts and their conditions.

    Attributes:
        prompts: sample i gets prompt i modulo their number.
        negative: what stands for no condition; None is the empty prompt, or nothing where the bundle says so
            (`Pipeline.force_zeros`).
        conditions: (P, *shape) by input, a row per prompt.
        null: (shape) by input, of `negative`; empty without one.
        notes: what a user should know, such as a prompt that was cut.
    """

    prompts: tuple[str, ...]
    negative: str | None
    conditions: Mapping[str, F32]
    null: Mapping[str, F32]
    notes: tuple[str, ...]

    def of(self, indices: Sequence[int]) -> dict[str, Array]:
        """Conditions of samples, (N, *shape) by input."""
        rows = [i % len(self.prompts) for i in indices]
        return {name: values[rows] for name, values in self.conditions.items()}


def encode_prompts(bundle: Bundle, prompts: Sequence[str], negative: str | None = None) -> Prompted:
    """Encode every text once, on the CPU.

    The encoders are checked on the empty prompt, whose states the bundle holds.

    Raises:
        RecipeError: the bundle takes no text, there is no prompt, one is not UTF-8 or too long to be one, or
            a negative one has nothing to act on.
        BackendUnavailable: tokenizers or onnxruntime is not installed.
        BundleError: the tokenizer is none.
        ParityError: the encoders compute something else here than where the bundle was built.
    """
    m = bundle.manifest
    model = m.sampling.model
    if not m.pipeline.encoders:
        instead = ": give --class-labels" if model.labels else ""
        advice = (
            "leave prompts out"
            if not any(s.num_classes is None for s in model.inputs)
            else (
                "give its conditions by --condition, or rebuild from a folder with text_encoder and tokenizer"
            )
        )
        raise RecipeError(
            f"a prompt was given, but {brief(model.name)} takes no text{instead or f': {advice}'}"
        )
    if isinstance(prompts, str):
        raise RecipeError("prompts are a text: give a list of texts")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RecipeError(f"{len(prompts)} prompts were given: expected 1 to {MAX_PROMPTS}")
    texts = [*prompts, *(() if negative is None else (negative,))]
    for text in texts:
        check_prompt(text)
    if negative is not None and m.sampling.guidance_scale == 1.0:
        raise RecipeError(
            "a negative prompt was given, but the bundle was measured without guidance, in which it would "
            "act: leave it out, or rebuild with --guidance-scale"
        )
    distinct = list(dict.fromkeys(["", *texts]))
    states: dict[str, list[F32]] = {}
    notes: list[str] = []
    for encoder in m.pipeline.encoders:
        found, cut = _encode(bundle, encoder, distinct)
        for name, value in found.items():
            states.setdefault(name, []).append(value)
        notes += [_note(text, n, encoder) for text, n in zip(distinct, cut, strict=True) if n]
    bundle.check_unchanged()
    tables = {name: np.concatenate(parts, axis=-1) for name, parts in states.items()}
    _check(bundle.tables.null, {name: table[0] for name, table in tables.items()})
    place = {text: i for i, text in enumerate(distinct)}
    rows = [place[text] for text in prompts]
    return Prompted(
        tuple(prompts),
        negative,
        {name: table[rows] for name, table in tables.items()},
        {} if negative is None else {name: table[place[negative]] for name, table in tables.items()},
        tuple(dict.fromkeys(notes)),
    )


def _encode(
    bundle: Bundle, encoder: TextEncoder, texts: Sequence[str]
) -> tuple[dict[str, F32], tuple[int, ...]]:
    """Conditions (N, *shape) by the network's input, and how many tokens of each text were cut off."""
    folder = encoder.tokenizer
    tokenizer = Tokenizer.parse(
        bundle.read(f"{folder}/{VOCABULARY}"),
        bundle.read(f"{folder}/{MERGES}"),
        encoder.special,
        encoder.tokens,
        str(bundle.file(folder)),
    )
    ids, cut = tokenizer(texts)
    with contextlib.closing(open_engine(ORT_CPU, bundle.file(graph_file(encoder)))) as engine:
        parts = [engine({INPUT_IDS: ids[i : i + AT_ONCE]}) for i in range(0, len(ids), AT_ONCE)]
    made = {
        name: np.concatenate([part[output] for part in parts]).astype(np.float32, copy=False)
        for name, output in encoder.made.items()
    }
    return made, cut


def _note(text: str, cut: int, encoder: TextEncoder) -> str:
    return (
        f"the prompt {brief(text)} has {encoder.tokens - 2 + cut} tokens, of which the first "
        f"{encoder.tokens - 2} count"
    )


def _check(expected: Mapping[str, Array], got: Mapping[str, F32]) -> None:
    for name, value in got.items():
        off = relative_rms(value, expected[name])
        if not off <= TOLERANCE:
            raise ParityError(
                "the text encoder computes something else here than where the bundle was built (off by "
                f"{off:.2g}, allowed {TOLERANCE:g}): this processor, or the version of onnxruntime or "
                "tokenizers, differs: rebuild the bundle on this machine"
            )
