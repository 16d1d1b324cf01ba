"""What a finished engine's plan runs in 8 bits, and the memory it takes, from what the library tells of it.

The builder's verbose log ends with the plan, a line per layer; where there is a GPU, the engine's inspector
tells the same as JSON. Wording that this file does not know holds no layers, and every node is NOT_KNOWN: no
reason to refuse an engine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...core.engine_build import NOT_FOUND, NOT_KNOWN, PlanReport

DTYPES = {
    "Float": "float32",
    "FP32": "float32",
    "Half": "float16",
    "FP16": "float16",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
}
"""Words of the plan for types; others are only put in lower case."""
NO_KERNEL = frozenset({"signal", "wait", "shape_call", "NoOp", "Constant"})
"""Layer types of a plan that launch no work."""
POINTWISE = NO_KERNEL | {"kgen", "Reformat", "PointWise", "PointWiseV2"}
"""Layer types that name a convolution or product in their metadata without computing it."""
MERGING = frozenset({"gemm", "correlation"})
"""Layer types of one product: where they name several nodes, these multiply the same input."""
OPAQUE = frozenset({"Myelin", "ForeignNode"})
"""Layer types of full TensorRT that hold whole subgraphs."""

_HEADER = re.compile(r"(?:[A-Z_]+ )?(?:Layers|Engine Layer Information):")
_LAYER = re.compile(r"(?:[A-Z_]+ )?Name: .*?, LayerType: (\w+), Inputs: (?=\[)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*(?:\[|\x1e|$))")
_DTYPE = re.compile(r"Datatype: (.*)", re.DOTALL)
_WORD = re.compile(r"\b(?:Float|Half|BFloat16|Int\d+|UInt8|Bool|FP\d+|BF16|E\dM\d)\b")
_MEMORY = re.compile(r"(?:[A-Z_]+ )?Total (Weights|Activation) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Layer:
    """A layer of a plan: its type, the type of its first input or "none", and the ONNX nodes in it."""

    kind: str
    input_dtype: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine takes on a GPU: its weights, and the scratch of a run. None: not told."""

    weights: int | None = None
    scratch: int | None = None

    def or_else(self, other: Memory) -> Memory:
        """This, and `other` where this does not tell."""
        return Memory(
            other.weights if self.weights is None else self.weights,
            other.scratch if self.scratch is None else self.scratch,
        )


def read_plan(lines: Iterable[str], quantized: Mapping[str, str]) -> PlanReport:
    """From the builder's verbose log; `quantized` says {node name: "int8" or "fp8"}."""
    layers: list[Layer] = []
    for line in lines:
        if _HEADER.fullmatch(line.rstrip()):
            layers = []  # of another plan, which was not the last
        elif layer := _read_line(line):
            layers.append(layer)
    return judge(layers, quantized)


def read_inspector(text: str, quantized: Mapping[str, str]) -> PlanReport:
    """From the JSON of an engine's inspector."""
    return judge([layer for item in _inspected(text) if (layer := _read_item(item))], quantized)


def read_memory(lines: Iterable[str]) -> Memory:
    """From the builder's verbose log: its last word on weights and activations."""
    told: dict[str, int] = {}
    for line in lines:
        if match := _MEMORY.match(line):
            told[match[1]] = int(match[2])
    return Memory(told.get("Weights"), told.get("Activation"))


def judge(layers: Sequence[Layer], quantized: Mapping[str, str]) -> PlanReport:
    """Which of the `quantized` nodes the layers run in 8 bits."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.kind not in POINTWISE:
            meant = quantized.keys() & set(layer.nodes)
            unclear = layer.kind in OPAQUE or (len(meant) > 1 and layer.kind not in MERGING)
            for node in meant:
                found.setdefault(node, []).append(NOT_KNOWN if unclear else layer.input_dtype)
    absent = NOT_FOUND if layers else NOT_KNOWN
    fell_back = {
        node: found.get(node, [absent])[0]
        for node, dtype in quantized.items()
        if dtype not in found.get(node, ())
    }
    types = Counter(layer.kind for layer in layers)
    kernels = sum(n for kind, n in types.items() if kind not in NO_KERNEL)
    return PlanReport(
        len(quantized), len(quantized) - len(fell_back), fell_back, kernels, dict(sorted(types.items()))
    )


def _read_line(line: str) -> Layer | None:
    match = _LAYER.match(line)
    if match is None:
        return None
    inputs = _bracketed(line, match.end())
    first = _bracketed(inputs, inputs.find("{")) if "{" in inputs else ""
    told = _DTYPE.search(first)
    return Layer(match[1], _dtype(told[1] if told else ""), _nodes(line.rpartition("Metadata: ")[2]))


def _inspected(text: str) -> list[object]:
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []
    return layers if isinstance(layers, list) else []


def _read_item(item: object) -> Layer | None:
    """None of what is no layer with its details: the inspector may give names alone."""
    if not isinstance(item, dict) or not isinstance(item.get("LayerType"), str):
        return None
    inputs = item.get("Inputs")
    first = inputs[0] if isinstance(inputs, list) and inputs else {}
    told = (
        [str(value) for name, value in first.items() if "atatype" in name] if isinstance(first, dict) else []
    )
    return Layer(item["LayerType"], _dtype(told[0] if told else ""), _nodes(str(item.get("Metadata", ""))))


def _dtype(text: str) -> str:
    word = _WORD.search(text)
    return DTYPES.get(word[0], word[0].lower()) if word else "none"


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(_NODE.findall(metadata.rstrip()))


def _bracketed(text: str, start: int) -> str:
    """From the bracket at `start` to the one that closes it."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "[{") - (text[at] in "]}")
        if depth == 0:
            return text[start : at + 1]
    return text[start:]
