"""What each rewrite of the ORT CPU graph brings, and what was tried besides; where a call's time goes.

    python benchmarks/graph_rewrites.py [--models reference unet cifar condition] [--batch 1 4] [--write]

Graphs of one network, quantized once and written in several ways, are timed in turn; times are relative to
the graph as it is built. The rows below the first undo a rewrite, or do one that is not done. Weights have 7
bits by default, since those of 8 take slower kernels on processors without VNNI. The second table is of ONNX
Runtime's profiler, which adds a little to every node. To see whether it works: `--models unet --batch 1
--rounds 5`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
from architectures import REFERENCE, recipe_of
from onnx_ir.convenience import get_const_tensor
from report import count_threads, machine, table, write_section

from ptqd_export.backends import OrtEngine, set_threads
from ptqd_export.backends.ort_profile import operator_seconds
from ptqd_export.calibrate import collect, observe, open_model, quantize
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import EPSILON, Array, Feeds
from ptqd_export.core.figures import relative_rms
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.timing import feeds_to_time, time_rounds
from ptqd_export.export import export_fp, fold, insert_qdq, lower, save
from ptqd_export.export.dialect import ATTENTION
from ptqd_export.export.graph import Builder, producer, prune, take_over, with_outputs

ORT = Emission.ORT_CPU
FULL, BUILT = "fp32, as exported", "as built"
MOST_OFF = 0.3
FEWEST_SHARE = 0.02
"""Of a kind of operator that gets a column."""
Graphs = Mapping[str, Callable[[], ir.Model]]


@dataclass(frozen=True)
class Written:
    """A network to be written as graphs.

    Attributes:
        base: its export in full precision.
        nets: its quantized forms, by how they were quantized.
    """

    base: ir.Model
    sampling: Sampling
    nets: Mapping[str, QuantizedNetwork]

    def graph(self, base: ir.Model | None = None, net: str = "", emission: Emission = ORT) -> ir.Model:
        """The graph that a build writes, from another export, network or emission of quantization."""
        quantized = self.nets[net]
        inserted = insert_qdq(self.base if base is None else base, quantized, emission)
        return self.finished(lower(inserted, ORT, quantized.precision))

    def finished(self, model: ir.Model) -> ir.Model:
        n, channels = len(self.sampling), self.sampling.model.channels
        return fold(model, self.sampling.schedule, Correction.identity(n, channels))


def write_network(key: str, precision: Precision) -> Written:
    """Quantize a network, with a minimal calibration."""
    with tempfile.TemporaryDirectory() as tmp:
        recipe = recipe_of(key, Path(tmp), precisions=(str(precision),), rounding="nearest")
        network = open_model(recipe)
        sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
        paths = collect(network, sampling, recipe, Path(tmp) / "paths")
        nets = {}
        for name, keys in {
            "": {},
            "tensor": {"conv_outputs": "tensor"},
            "rough": {"smoothing": 0.0},
        }.items():
            own = recipe.override(quantization=keys)
            nets[name] = quantize(network, observe(network, sampling, own, paths), precision, own)
        base = export_fp(network.module, network.info, sampling.schedule.timesteps.dtype.name)
        return Written(base, sampling, nets)


def graphs_of(written: Written, feeds: Feeds) -> Graphs:
    """{row: how its graph is made}, the one that is built first."""

    def full() -> ir.Model:
        return written.finished(written.base.clone())

    def unfused_attention() -> ir.Model:
        base = written.base.clone()
        for node in base.graph:
            node.metadata_props.pop(ATTENTION, None)
        return written.graph(base)

    def group_norm_as_exported() -> ir.Model:
        with mock.patch("ptqd_export.export.lower._group_norm"):
            return written.graph()

    return {
        BUILT: written.graph,
        FULL: full,
        "attention as exported, unfused": unfused_attention,
        "GroupNorm as exported": group_norm_as_exported,
        "GroupNorm's factors by Mul and Add": lambda: affine_apart(written.graph()),
        "conv outputs in float": lambda: written.graph(emission=Emission.PORTABLE),
        "conv outputs with one scale": lambda: written.graph(net="tensor"),
        "inputs not smoothed": lambda: written.graph(net="rough"),
        "time embeddings from a table": lambda: without_time(written.graph(), feeds),
        "projections of one value at once": lambda: projected_at_once(written.graph()),
    }


def affine_apart(model: ir.Model) -> ir.Model:
    """BatchNormalization of mean 0 and variance 1 as Mul and Add."""
    build = Builder(model.graph)
    for node in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        old, x = node.outputs[0], node.inputs[0]
        assert x is not None and old.shape is not None
        value, shape = x, (-1, *[1] * (len(old.shape) - 2))
        for op, factor in zip(("Mul", "Add"), node.inputs[1:3], strict=True):
            tensor = get_const_tensor(factor)
            assert tensor is not None
            const = build.const(f"{old.name}.{op}", tensor.numpy().reshape(shape))
            value = build.node(node, op, [value, const], f"{old.name}.{op}", ir.DataType.FLOAT, old.shape)
        take_over(old, value)
    return prune(model)


def without_time(model: ir.Model, feeds: Feeds) -> ir.Model:
    """Constants for all that depends on the timestep alone: what a table would leave, without its look-up."""
    known = {value for value in model.graph.inputs if value.name == "timestep"}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        of_time = any(value in known for value in inputs)
        if of_time and all(value in known or value.is_initializer() for value in inputs):
            known.update(node.outputs)
    inside = {value.producer() for value in known} - {None}
    border = [
        value
        for value in known
        if value.producer() in inside and any(use not in inside for use, _ in value.uses())
    ]
    with tempfile.TemporaryDirectory() as tmp:
        save({"border": with_outputs(model, [str(value.name) for value in border])}, Path(tmp), None)
        with OrtEngine(Path(tmp) / "border.onnx", optimise=False) as engine:
            found = engine({name: feeds[name] for name in engine.inputs})
    build = Builder(model.graph)
    for value in border:
        value.replace_all_uses_with(build.const(f"{value.name}.at_once", found[str(value.name)]))
    return prune(model)


def projected_at_once(model: ir.Model) -> ir.Model:
    """One MatMul, and a Split, for those of one value with constant weights: projections of a time embedding,
    or of a value onto queries, keys and values."""
    build = Builder(model.graph)
    layers = [node for node in model.graph if node.op_type == "MatMul" and _weight(node) is not None]
    layers.sort(key=lambda node: str(node.inputs[0] and node.inputs[0].name))
    for _, group in groupby(layers, key=lambda node: node.inputs[0]):
        nodes = list(group)
        if len(nodes) < 2:
            continue
        first = min(nodes, key=lambda node: list(model.graph).index(node))
        parts: list[list[Any]] = [[], []]
        for node in nodes:
            dequantized = _weight(node)
            assert dequantized is not None
            for place in (0, 1):
                tensor = get_const_tensor(dequantized.inputs[place])
                assert tensor is not None
                parts[place].append(tensor.numpy())
        codes, scales = np.concatenate(parts[0], 1), np.concatenate(parts[1])
        name = f"{first.outputs[0].name}.all"
        held = [build.const(f"{name}.codes", codes), build.const(f"{name}.scale", scales)]
        weight = build.node(
            first,
            "DequantizeLinear",
            held,
            f"{name}.weight",
            ir.DataType.FLOAT,
            ir.Shape(codes.shape),
            {"axis": 1},
        )
        product = build.node(first, "MatMul", [first.inputs[0], weight], name, ir.DataType.FLOAT, None)
        sizes = build.const(f"{name}.sizes", np.array([part.shape[1] for part in parts[0]], np.int64))
        split = ir.node("Split", [product, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{name}.split")
        for i, (node, value) in enumerate(zip(nodes, split.outputs, strict=True)):
            value.name, value.dtype, value.shape = f"{name}.{i}", ir.DataType.FLOAT, node.outputs[0].shape
        model.graph.insert_before(first, split)
        for node, value in zip(nodes, split.outputs, strict=True):
            take_over(node.outputs[0], value)
    return prune(model)


def _weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a MatMul's constant weights."""
    held = producer(node.inputs[1], "DequantizeLinear")
    return (
        held if held is not None and held.inputs[0] is not None and held.inputs[0].is_initializer() else None
    )


def measure(
    written: Written, batches: list[int], rounds: int
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Seconds of each round, by row and batch; and by kind of operator, as built, at the first batch."""
    seconds: dict[str, list[list[float]]] = {}
    shares: dict[str, float] = {}
    for batch in batches:
        feeds = feeds_to_time(written.sampling.conditional, batch)
        with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
            calls: dict[str, Callable[[], dict[str, Array]]] = {}
            built = None
            for i, (name, make) in enumerate(graphs_of(written, feeds).items()):
                save({str(i): make()}, Path(tmp), f"{i}.weights")
                engine = stack.enter_context(OrtEngine(Path(tmp) / f"{i}.onnx", exact=False))
                calls[name] = partial(engine, {key: feeds[key] for key in engine.inputs})
                found = calls[name]()[EPSILON]
                built = found if built is None else built
                off = relative_rms(found, built)
                if off > MOST_OFF:  # quantization alone makes less
                    sys.exit(f"{name}: differs from the graph that is built by {off:.0%} of its RMS")
            for name, taken in time_rounds(calls, rounds).items():
                seconds.setdefault(name, []).append(taken)
            shares = shares or operator_seconds(Path(tmp) / "0.onnx", feeds, rounds, exact=False)
    return seconds, shares


def slower(own: list[float], built: list[float]) -> str:
    """How much longer a call takes, by the median of the rounds' ratios, with two standard errors of it."""
    ratios = np.array(own) / np.array(built)
    median = float(np.median(ratios))
    deviation = 1.4826 * float(np.median(np.abs(ratios - median)))
    return f"{median - 1:+.1%} ± {2 * 1.2533 * deviation / math.sqrt(len(ratios)):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (REFERENCE, "unet", "cifar", "condition")
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", type=Precision.parse, default="w7a8")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    set_threads(args.threads)
    columns, times, profiles = [], [], {}
    for key in args.models:
        print(key, file=sys.stderr)
        found, profiles[key] = measure(write_network(key, args.precision), args.batch, args.rounds)
        columns += [f"{key}, batch {batch}" for batch in args.batch]
        times.append(found)
    rows = []
    for name in times[0]:
        cells = []
        for found in times:
            for own, built in zip(found[name], found[BUILT], strict=True):
                cells.append(f"{np.median(own) * 1e3:.1f} ms" if name == BUILT else slower(own, built))
        rows.append([name, *cells])
    kinds = dict.fromkeys(
        kind for of in profiles.values() for kind, s in of.items() if s >= FEWEST_SHARE * sum(of.values())
    )
    shares = [
        [key, *(f"{of.get(kind, 0) / sum(of.values()):.1%}" for kind in kinds)]
        for key, of in profiles.items()
    ]
    rounds = f"medians of {args.rounds} rounds in turn, ± two standard errors"
    how = f"{args.precision}, {count_threads(args.threads)}; {rounds}"
    text = (
        f"{table(['graph', *columns], rows)}\n\n{how}. {machine('onnxruntime')}.\n\nShares of a call's time "
        f"by ONNX Runtime's operators, batch {args.batch[0]}:\n\n{table(['graph as built', *kinds], shares)}"
    )
    print(text)
    if args.write:
        write_section("graph-rewrites", text)


if __name__ == "__main__":
    main()
