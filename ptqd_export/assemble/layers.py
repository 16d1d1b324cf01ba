"""The quantized layers of every precision; those of mixed precisions by measured sensitivity."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from ..calibrate import (
    Network,
    Observed,
    Trajectories,
    given_layers,
    layer_precisions,
    quantize,
    refine,
    sensitivity,
    steps_and_weights,
)
from ..core.bits import LayerSensitivity, assign, to_measure
from ..core.precision import Precision
from ..core.quant import Geometry, QuantizedNetwork
from ..core.sampling import Sampling
from ..errors import ModelError, PTQDError
from ..files import digest, write_file
from ..recipe import Recipe
from ..typed import brief, read_typed, to_plain


def quantize_all(
    recipe: Recipe,
    network: Network,
    seen: Observed,
    sampling: Sampling,
    trajectories: Trajectories,
    exported: Mapping[str, Geometry | None],
    work: Path,
    key: str,
    say: Callable[[str], None],
) -> tuple[dict[Precision, QuantizedNetwork], dict[Precision, LayerSensitivity]]:
    """The network at each precision, and the sensitivities that mixed ones were chosen by.

    Args:
        exported: layers of the exported graph, in their geometry there; the others stay float.
        work: folder of intermediate results, from which those of a stopped build are reused.
        key: key of everything before quantization that decides them.
    Raises:
        ModelError: nothing is left to quantize.
    """
    spec = recipe.quantization
    for glob in (*spec.skip, *(text.rpartition("=")[0] for text in spec.layer_bits)):
        if not any(fnmatch.fnmatchcase(name, glob) for name in seen.layers):
            say(f"{brief(glob)} of quantization.skip or layer_bits matches none of {len(seen.layers)} layers")
    quantized: dict[Precision, QuantizedNetwork] = {}
    found: dict[Precision, LayerSensitivity] = {}
    for precision in recipe.precisions:
        assigned = {}
        given = layer_precisions(network, seen, precision, recipe)
        if not precision.is_float and not any(used and name in exported for name, used in given.items()):
            raise ModelError(
                f"{network.info.name} has no layer left to quantize at {precision}: the exported graph holds "
                "none of them as itself, such as convs that were folded into the BatchNorm behind them; fold "
                "these in the model, or ask for fp32 or fp16"
            )
        if precision.mixed:
            measured = (*map(str, to_measure(precision)), *map(str, steps_and_weights(sampling)))
            name = digest(key, recipe.digest("quantization"), str(precision), *measured)[:16]
            file = work / f"layer-sensitivity-{name}.json"
            known = _load(file)
            if known is None:
                notes = file.with_suffix(".part")
                known = sensitivity(network, seen, sampling, trajectories, precision, recipe, exported, notes)
                write_file(file, json.dumps(to_plain(known)).encode())
                notes.unlink()
            else:
                say(f"{precision}: the noise of single layers is taken up from a stopped build")
            found[precision] = known
            # Edges that have 8 bits, whatever the rest gets, are none of the choice.
            own = known.only([name for name in known.layers if given[name] == precision.base])
            by_hand = given_layers(recipe, own.layers)
            assigned = assign(own, precision.levels, precision.base, spec.layer_budget, by_hand)
            counts = sorted(Counter(assigned.values()).items())
            given_bits = (f"{count} {'float' if level.is_float else level}" for level, count in counts)
            say(f"{precision}: of {len(assigned)} layers {', '.join(given_bits)}")
        start = quantize(network, seen, precision, recipe, assigned).exported(exported)
        quantized[precision] = refine(network, sampling, start, trajectories, recipe, work / "codes", key)
    return quantized, found


def _load(file: Path) -> LayerSensitivity | None:
    try:
        known: LayerSensitivity = read_typed(LayerSensitivity, json.loads(file.read_bytes()), "sensitivity")
    except (OSError, ValueError, PTQDError):
        return None
    return known
