"""Mutated graph files: what passes, the real parser reads alike; what is refused, is refused soon."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from graph_edits import FILE, field, number
from onnx import ModelProto, NodeProto, TensorProto, helper
from toy import HALVED, emitted, schedule_of

from ptqd_export.bundle.graph.onnx_file import External, OnnxGraph, Tensor, Value, read_graph
from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import BundleError
from ptqd_export.export import export_fp, fold, save

CASES = 2500
INFO = ModelInfo("small", (2, 8, 8), (), "0" * 64)
Small = tuple[bytes, Expected]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet, self.clock = nn.Conv2d(2, 16, 3, padding=1), nn.Linear(1, 16)
            self.norm, self.outlet = nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            h = self.inlet(sample) + self.clock(timestep[:, None] / 1000)[:, :, None, None]
            return self.outlet(nn.functional.silu(self.norm(h)).flatten(2).reshape(h.shape))

    torch.manual_seed(0)
    folder, p = tmp_path_factory.mktemp("small"), Precision(16, 16)
    graph = emitted(export_fp(Net(), INFO), QuantizedNetwork(p, {}), Emission.HALF)
    save({"g": fold(graph, schedule_of(), HALVED)}, folder, FILE)
    size = (folder / FILE).stat().st_size
    expected = Expected(Sampling(INFO, schedule_of()), Emission.HALF, FILE, size)
    return Path(folder, "g.onnx").read_bytes(), expected


# --- what the real parser reads


def tensor_of(tensor: Any) -> Tensor:
    if tensor.data_location == TensorProto.EXTERNAL:
        entries = {e.key: e.value for e in tensor.external_data}
        assert len(entries) == len(tensor.external_data)
        data: Any = External(entries["location"], int(entries["offset"]), int(entries["length"]))
    else:
        data = tensor.raw_data
    return Tensor(tensor.name, tensor.data_type, tuple(tensor.dims), data)


def value_of(value: Any) -> Value:
    kind = value.type.tensor_type
    dims = (
        d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param or None for d in kind.shape.dim
    )
    return Value(value.name, kind.elem_type, tuple(dims))


def attribute_of(attribute: Any) -> Any:
    names = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}
    name = names[attribute.type]
    value = getattr(attribute, name)
    if name == "t":
        return name, tensor_of(value)
    return name, value.decode() if name == "s" else tuple(value) if name in ("floats", "ints") else value


def as_parsed(data: bytes) -> OnnxGraph:
    """The file as onnx reads it; nothing in it may be left over."""
    model = onnx.load_model_from_string(data)
    assert len(model.SerializeToString()) <= len(data)
    assert not model.functions and not model.training_info and not model.graph.sparse_initializer
    graph = model.graph
    nodes = []
    for node in graph.node:
        attributes = {a.name: attribute_of(a) for a in node.attribute}
        assert len(attributes) == len(node.attribute)
        parts = tuple(node.input), tuple(node.output), node.name, node.op_type, node.domain
        nodes.append((*parts, attributes))
    return OnnxGraph(
        model.ir_version,
        {o.domain: o.version for o in model.opset_import},
        tuple(nodes),  # type: ignore[arg-type]
        {t.name: tensor_of(t) for t in graph.initializer},
        tuple(map(value_of, graph.input)),
        tuple(map(value_of, graph.output)),
        {v.name: value_of(v)[1:] for v in graph.value_info},
    )


def passes(data: bytes, expected: Expected) -> bool:
    """Whether a file passes; if so, the real parser has read the same."""
    try:
        check_graph(data, "mutant", expected)
    except BundleError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return False
    assert as_parsed(data) == read_graph(data, 256)
    return True


def test_the_right_graph_is_read_alike(small: Small) -> None:
    data, expected = small
    assert passes(data, expected)
    graph = as_parsed(data)
    assert any(isinstance(t.data, External) for t in graph.initializers.values())


# --- mutations


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, put in, left out, or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, n = rng.randrange(len(out)), rng.choice((1, 1, 2, 8))
        action = rng.randrange(4)
        if action == 0:
            out[i] ^= 1 << rng.randrange(8)
        elif action == 1:
            out[i:i] = rng.randbytes(n)
        elif action == 2:
            del out[i : i + n]
        else:
            j = rng.randrange(len(out))
            out[i : i + n] = out[j : j + n]
    return bytes(out)


def children(message: Any) -> list[Any]:
    rows = [(value, d.is_repeated) for d, value in message.ListFields() if d.message_type is not None]
    return [item for value, repeated in rows for item in (value if repeated else [value])]


def somewhere(model: Any, rng: random.Random) -> Any:
    """A message of the model, at any depth."""
    message = model.graph if rng.random() < 0.95 else model
    while (inside := children(message)) and rng.random() < 0.75:
        message = rng.choice(inside)
    return message


TEXTS = [
    "",
    "sample",
    "step",
    "epsilon",
    "a\x1b[2J",
    "/etc/passwd",
    FILE,
    "location",
    "Loop",
    "Relu",
    "0",
    "-1",
]
NUMBERS = [0, 1, -1, 2, 7, 16, 127, 128, 2**31 - 1, 2**31, 2**62, -(2**63)]


def edited(data: bytes, rng: random.Random) -> bytes:
    """A message of the graph with another value, an element more or less, or elements in another order."""
    model = ModelProto.FromString(data)
    message = somewhere(model, rng)
    fields = message.DESCRIPTOR.fields
    one = rng.choice(fields if rng.random() < 0.3 else [d for d, _ in message.ListFields()] or fields)
    try:
        if one.message_type is not None and not one.is_repeated:
            getattr(message, one.name).SetInParent()
        elif one.message_type is not None:
            row = getattr(message, one.name)
            action = rng.randrange(3) if len(row) else 3
            if action == 0:
                del row[rng.randrange(len(row))]
            elif action == 1:
                row.add().CopyFrom(rng.choice(row))
            elif action == 2:
                row.reverse()
            else:
                row.add()
        else:
            kinds: dict[Any, Callable[[], Any]] = {
                one.CPPTYPE_STRING: lambda: rng.choice(TEXTS),
                one.CPPTYPE_FLOAT: rng.random,
            }
            value = kinds.get(one.cpp_type, lambda: rng.choice(NUMBERS))()
            value = value.encode() if one.type == one.TYPE_BYTES else value
            if one.is_repeated:
                getattr(message, one.name).append(value)
            elif rng.random() < 0.2:
                message.ClearField(one.name)
            else:
                setattr(message, one.name, value)
    except (ValueError, TypeError, AttributeError):
        return data  # a value that the library itself does not take
    return model.SerializeToString()


def parts_of(message: Any) -> list[bytes]:
    """Its fields, each as protobuf encodes it; repeated numbers in one."""
    parts = []
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            items = value if descriptor.is_repeated else [value]
            parts += [field(descriptor.number, 2, item.SerializeToString()) for item in items]
        else:
            plain = list(value) if descriptor.is_repeated else value
            parts.append(type(message)(**{descriptor.name: plain}).SerializeToString())
    return parts


def recoded(data: bytes, rng: random.Random) -> bytes:
    """One message, at any depth, encoded as no encoder does."""
    return encoded(ModelProto.FromString(data), rng)


def encoded(message: Any, rng: random.Random) -> bytes:
    inside = [d for d, _ in message.ListFields() if d.message_type is not None]
    if inside and rng.random() < 0.8:
        chosen = rng.choice(inside)
        copy = type(message)()
        copy.CopyFrom(message)
        value = getattr(copy, chosen.name)
        i = rng.randrange(len(value)) if chosen.is_repeated else 0
        below = field(chosen.number, 2, encoded(value[i] if chosen.is_repeated else value, rng))
        if chosen.is_repeated:
            del value[i]
        else:
            copy.ClearField(chosen.name)
        return copy.SerializeToString() + below
    parts, other = parts_of(message) or [b""], rng.randrange(1, 26)
    odd = (
        rng.choice(parts),
        rng.choice(parts) + rng.choice(parts),
        field(other, 2, rng.choice(parts)),
        field(other, 0, rng.choice(NUMBERS)),
        number(other << 3 | 3) + number(other << 3 | 4),
        number(other << 3) + b"\x81\x00",
        field(other, 5, b"abcd"),
        b"",
    )
    parts.insert(rng.randrange(len(parts) + 1), rng.choice(odd))
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return b"".join(parts)


@pytest.mark.parametrize("mutate", [flipped, edited, recoded])
def test_mutants_are_refused_or_read_alike(
    small: Small, mutate: Callable[[bytes, random.Random], bytes]
) -> None:
    data, expected = small
    passed = changed = 0
    for seed in range(CASES):
        mutant = mutate(data, random.Random(seed))
        changed += mutant != data
        passed += passes(mutant, expected)
    assert changed > CASES / 2
    assert CASES / 200 < passed < CASES / 2, passed  # both are tried


# --- time and memory


def bomb_of_nodes() -> bytes:
    return field(7, 2, field(1, 2, b"") * (1 << 23))


def bomb_of_numbers() -> bytes:
    return field(7, 2, field(5, 2, field(1, 2, b"\x01" * (1 << 24))))


def bomb_of_text() -> bytes:
    return field(7, 2, field(2, 2, b"a" * (1 << 24)))


def bomb_of_operators() -> bytes:
    node = NodeProto(op_type="Relu", input=["sample"]).SerializeToString()
    return field(7, 2, b"".join(field(1, 2, node + field(2, 2, b"%d" % i)) for i in range(200_000)))


def bomb_of_inputs() -> bytes:
    node = b"".join(field(1, 2, b"%06x" % i) for i in range(1 << 20))
    return field(7, 2, field(1, 2, node + field(4, 2, b"Sum")))


BOMBS = [bomb_of_nodes, bomb_of_inputs, bomb_of_numbers, bomb_of_text, bomb_of_operators]


@pytest.mark.parametrize("bomb", BOMBS)
def test_large_files_are_refused_soon(small: Small, bomb: Callable[[], bytes]) -> None:
    data = bomb()
    assert len(data) < 1 << 25
    start = time.process_time()
    assert not passes(data, small[1])
    assert time.process_time() - start < 5  # 1 s and less on an idle machine


@pytest.mark.parametrize("bomb", BOMBS[1:])
def test_memory_is_bounded(small: Small, bomb: Callable[[], bytes]) -> None:
    data = bomb()
    tracemalloc.start()
    try:
        assert not passes(data, small[1])
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("op", ["Mul", "Concat", "Add"])
def test_integers_that_grow_from_node_to_node(small: Small, op: str) -> None:
    """Numbers that double their digits, or their count, 10,000 times."""
    data, expected = small
    model = ModelProto.FromString(data)
    model.graph.initializer.add(name="n0", data_type=7, dims=[1], raw_data=(3).to_bytes(8, "little"))
    more = {"axis": 0} if op == "Concat" else {}
    nodes = [helper.make_node(op, [f"n{i}"] * 2, [f"n{i + 1}"], **more) for i in range(10_000)]
    model.graph.node.extend(nodes)
    start = time.process_time()
    assert passes(model.SerializeToString(), expected) == (op != "Concat")
    assert time.process_time() - start < 8
    model.graph.node.append(helper.make_node("ConstantOfShape", ["n10000"], ["new"]))
    assert not passes(model.SerializeToString(), expected)


def test_speed_on_a_typical_file(small: Small) -> None:
    """200 blocks like those of a quantized UNet."""
    data, expected = small
    model = ModelProto.FromString(data)
    nodes, infos = list(model.graph.node), list(model.graph.value_info)
    for i in range(200):
        for node in nodes[:6]:
            copy = model.graph.node.add()
            copy.CopyFrom(node)
            copy.output[0] = f"{node.output[0]}.block.{i}"
        for info in infos[:6]:
            if any(info.name == node.output[0] for node in nodes[:6]):
                model.graph.value_info.add().CopyFrom(info)
                model.graph.value_info[-1].name = f"{info.name}.block.{i}"
    data = model.SerializeToString()
    assert len(data) > 1 << 17
    best = min(timed(lambda: check_graph(data, "g", expected)) for _ in range(3))
    assert best / len(data) * 2**20 < 0.5


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
