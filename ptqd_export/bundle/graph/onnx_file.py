"""What an ONNX file says, as far as this package writes such files: whatever else the format knows
(subgraphs, functions, sparse and quantized annotations, training, sequences, strings) is refused.

The tables hold the field numbers of onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ..protobuf import Kind, Malformed, Message, Reader

INT, SMALL, FLOAT, BYTES, INTS, FLOATS, MANY = Kind
MODEL = Message(
    "the model", ir_version=(1, INT), producer_name=(2, BYTES), graph=(7, BYTES), opset_import=(8, MANY)
)
OPSET_ID = Message("an opset import", domain=(1, BYTES), version=(2, INT))
GRAPH = Message(
    "the graph",
    node=(1, MANY),
    name=(2, BYTES),
    initializer=(5, MANY),
    input=(11, MANY),
    output=(12, MANY),
    value_info=(13, MANY),
)
NODE = Message(
    "a node",
    input=(1, MANY),
    output=(2, MANY),
    name=(3, BYTES),
    op_type=(4, BYTES),
    attribute=(5, MANY),
    domain=(7, BYTES),
    metadata_props=(9, MANY),
)
ATTRIBUTE = Message(
    "an attribute",
    name=(1, BYTES),
    f=(2, FLOAT),
    i=(3, INT),
    s=(4, BYTES),
    t=(5, BYTES),
    floats=(7, FLOATS),
    ints=(8, INTS),
    type=(20, SMALL),
)
TENSOR = Message(
    "a tensor",
    dims=(1, INTS),
    data_type=(2, SMALL),
    name=(8, BYTES),
    raw_data=(9, BYTES),
    external_data=(13, MANY),
    data_location=(14, SMALL),
)
ENTRY = Message("a pair of texts", key=(1, BYTES), value=(2, BYTES))
VALUE = Message("a value", name=(1, BYTES), type=(2, BYTES))
TYPE = Message("a type", tensor_type=(1, BYTES))
TENSOR_TYPE = Message("a tensor type", elem_type=(1, SMALL), shape=(2, BYTES))
SHAPE = Message("a shape", dim=(1, MANY))
DIM = Message("a dimension", dim_value=(1, INT), dim_param=(2, BYTES))

FIELD_OF = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}
"""Field by type of an attribute."""
BITS = {
    1: 32,  # FLOAT
    2: 8,  # UINT8
    3: 8,  # INT8
    4: 16,  # UINT16
    5: 16,  # INT16
    6: 32,  # INT32
    7: 64,  # INT64
    9: 8,  # BOOL
    10: 16,  # FLOAT16
    11: 64,  # DOUBLE
    12: 32,  # UINT32
    13: 64,  # UINT64
    16: 16,  # BFLOAT16
    17: 8,  # FLOAT8E4M3FN
    21: 4,  # UINT4
    22: 4,  # INT4
}
"""Of an element, by data type: all but text, complex numbers and what no backend computes with."""
FLOAT32, UINT8, INT8, INT64 = 1, 2, 3, 7
INPUT_TAG, OUTPUT_TAG, NODE_NAME_TAG = 1 << 3 | 2, 2 << 3 | 2, 3 << 3 | 2
NAME_TAG = 1 << 3 | 2
MAX_TEXT = 1024
MAX_RANK = 8
MAX_FIELDS = 1 << 19
"""Of a file; what repeats counts once."""
MAX_NODES = 30_000
MAX_NODE_BYTES = 1 << 17
EXTERNAL = 1
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
OWN = "ptqd."
"""How the keys of this package's notes on nodes begin."""

Dims = tuple[int | str | None, ...]
T = TypeVar("T")


class External(NamedTuple):
    """Where the bytes of a tensor lie outside the file."""

    location: str
    offset: int
    length: int


class Tensor(NamedTuple):
    name: str
    dtype: int
    dims: tuple[int, ...]
    data: bytes | External

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | Tensor


class Value(NamedTuple):
    """What a graph says of a value; a dimension is a number, a symbol or unknown."""

    name: str
    dtype: int
    dims: Dims


class Node(NamedTuple):
    """`attributes`: by name, each as (field that holds it, value)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    op: str
    domain: str
    attributes: Mapping[str, tuple[str, Attribute]]


class OnnxGraph(NamedTuple):
    ir_version: int
    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    infos: Mapping[str, tuple[int, Dims]]


def read_graph(data: bytes, max_inline: int) -> OnnxGraph:
    """Read a serialized model.

    Args:
        max_inline: largest tensor, in bytes, that may stand inside the file.
    Raises:
        Malformed: not one that this package could have written.
    """
    try:
        return _Reading(max_inline).model(data)
    except UnicodeDecodeError:
        raise Malformed("it has a text that is not UTF-8") from None


class _Reading:
    """Equal bytes mean equal things: small messages, most of a graph, repeat, and are read once."""

    def __init__(self, max_inline: int) -> None:
        self.reader, self.max_inline = Reader(MAX_FIELDS), max_inline
        self.tails: dict[bytes, tuple[str, str, Mapping[str, tuple[str, Attribute]]]] = {}
        self.attributes: dict[bytes, tuple[str, tuple[str, Attribute]]] = {}
        self.dims: dict[bytes, int | str | None] = {}
        self.entries: dict[bytes, tuple[str, str]] = {}

    def model(self, data: bytes) -> OnnxGraph:
        found = self.reader.read(MODEL, data)
        opsets: dict[str, int] = {}
        for entry in found.get("opset_import", ()):
            opset = self.reader.read(OPSET_ID, entry)
            _add(opsets, _text(opset.get("domain", b"")), opset.get("version", 0), "opset import")
        _text(found.get("producer_name", b""))
        graph = self.reader.read(GRAPH, _needed(found, "graph", MODEL))
        if len(graph.get("node", ())) > MAX_NODES:
            raise Malformed(f"it has {len(graph['node'])} operators, expected {MAX_NODES} at most")
        _text(graph.get("name", b""))
        initializers: dict[str, Tensor] = {}
        for content in graph.get("initializer", ()):
            tensor = self.tensor(content)
            _add(initializers, tensor.name, tensor, "initializer")
        read = OnnxGraph(
            found.get("ir_version", 0),
            opsets,
            tuple(map(self.node, graph.get("node", ()))),
            initializers,
            tuple(map(self.value, graph.get("input", ()))),
            tuple(map(self.value, graph.get("output", ()))),
            self.infos(graph.get("value_info", ())),
        )
        # Names are checked all at once, which is far cheaper.
        ends = (name for node in read.nodes for name in (*node.inputs, *node.outputs, node.name))
        _check_texts([*ends, *initializers, *read.infos, *(v.name for v in (*read.inputs, *read.outputs))])
        return read

    def entry(self, content: bytes) -> tuple[str, str]:
        known = self.entries.get(content)
        if known is None:
            found = self.reader.read(ENTRY, content)
            known = _text(_needed(found, "key", ENTRY)), _text(_needed(found, "value", ENTRY))
            self.entries[content] = known
        return known

    def node(self, content: bytes) -> Node:
        # A node begins with its inputs, outputs and name, mostly short; what follows repeats, node by node.
        if len(content) > MAX_NODE_BYTES:
            raise Malformed(f"a node has {len(content)} bytes, expected {MAX_NODE_BYTES} at most")
        inputs, outputs, names, at = list[str](), list[str](), list[str](), 0
        try:
            while content[at] == INPUT_TAG and (size := content[at + 1]) < 128:
                start, at = at + 2, at + 2 + size
                inputs.append(content[start:at].decode())
            while content[at] == OUTPUT_TAG and (size := content[at + 1]) < 128:
                start, at = at + 2, at + 2 + size
                outputs.append(content[start:at].decode())
            if content[at] == NODE_NAME_TAG and (size := content[at + 1]) < 128:
                start, at = at + 2, at + 2 + size
                names.append(content[start:at].decode())
        except IndexError:
            raise Malformed("a node is cut off") from None
        self.reader.spend(len(inputs) + len(outputs))
        tail = content[at:]
        known = self.tails.get(tail)
        if known is None:
            found = self.reader.read(NODE, tail)
            known = self.tail(found)
            inputs += [item.decode() for item in found.get("input", ())]
            outputs += [item.decode() for item in found.get("output", ())]
            names += [item.decode() for item in [found.get("name")] if item is not None]
            if len(names) > 1:
                raise Malformed("a node has its name twice, which parsers merge as they like")
            if not found.keys() & {"input", "output", "name"}:
                self.tails[tail] = known
        return Node(tuple(inputs), tuple(outputs), names[0] if names else "", *known)

    def tail(self, found: Mapping[str, Any]) -> tuple[str, str, Mapping[str, tuple[str, Attribute]]]:
        attributes: dict[str, tuple[str, Attribute]] = {}
        for item in found.get("attribute", ()):
            known = self.attributes.get(item)
            if known is None:
                self.attributes[item] = known = self.attribute(item)
            _add(attributes, *known, "attribute")
        notes: dict[str, str] = {}
        for item in found.get("metadata_props", ()):
            key, note = self.entry(item)
            if not key.startswith(OWN):
                raise Malformed("a node has a note that is not of this package")
            _add(notes, key, note, "note")
        op, domain = _needed(found, "op_type", NODE), found.get("domain", b"")
        return _text(op), _text(domain), attributes

    def attribute(self, content: bytes) -> tuple[str, tuple[str, Attribute]]:
        found = self.reader.read(ATTRIBUTE, content)
        name, field = _text(_needed(found, "name", ATTRIBUTE)), FIELD_OF.get(found.get("type", 0))
        if field is None:
            raise Malformed("an attribute is no number, text or tensor: expected no graphs, types or others")
        empty: list[Any] | None = [] if field in ("ints", "floats") else None
        value: Any = found.get(field, empty)
        if found.keys() - {"name", "type", field} or value is None:
            raise Malformed("an attribute does not hold what its type says")
        if field == "s":
            value = _text(value)
        elif field == "t":
            value = self.tensor(value)
        elif field in ("ints", "floats"):
            value = tuple(value)
        return name, (field, value)

    def tensor(self, content: bytes) -> Tensor:
        found = self.reader.read(TENSOR, content)
        name, dims = found.get("name", b"").decode(), tuple(found.get("dims", ()))
        dtype, raw, entries = found.get("data_type", 0), found.get("raw_data"), found.get("external_data")
        if dtype not in BITS:
            raise Malformed("a tensor has a data type that no graph of this package has")
        if len(dims) > MAX_RANK or any(dim < 0 for dim in dims):
            raise Malformed(f"a tensor has a shape that is none, or of more than {MAX_RANK} dimensions")
        if (found.get("data_location", 0) == EXTERNAL) != (entries is not None) or (
            (raw is None) == (entries is None)
        ):
            raise Malformed("a tensor has no bytes, or more than one place for them")
        data: Any = raw if entries is None else self.external(entries)
        length, expected = data.length if raw is None else len(raw), tensor_bytes(dtype, dims)
        if length != expected:
            raise Malformed(f"a tensor has {length} bytes, expected {expected} by its shape and type")
        if raw is not None and len(raw) > self.max_inline:
            raise Malformed(
                f"a tensor of {len(raw)} bytes stands inside the file, expected {self.max_inline} at most"
            )
        return Tensor(name, dtype, dims, data)

    def external(self, entries: list[bytes]) -> External:
        found: dict[str, str] = {}
        for item in entries:
            key, value = self.entry(item)
            _add(found, key, value, "key of external data")
        if found.keys() - EXTERNAL_KEYS or EXTERNAL_KEYS - {"checksum"} - found.keys():
            raise Malformed("external data has other keys than location, offset and length")
        return External(found["location"], _decimal(found["offset"]), _decimal(found["length"]))

    def value(self, content: bytes) -> Value:
        found = self.reader.read(VALUE, content)
        return Value(_needed(found, "name", VALUE).decode(), *self.type(_needed(found, "type", VALUE)))

    def infos(self, contents: Iterable[bytes]) -> dict[str, tuple[int, Dims]]:
        """Types and shapes by name."""
        # The largest part of a file: a short name, then a type that others have too.
        found: dict[str, tuple[int, Dims]] = {}
        kinds: dict[bytes, tuple[int, Dims]] = {}
        for content in contents:
            end = 0
            if len(content) > 2 and content[0] == NAME_TAG and content[1] < 128:
                end = 2 + content[1]
            kind = kinds.get(content[end:]) if end else None
            if kind is not None:
                name = content[2:end].decode()
            else:
                value = self.value(content)
                name, kind = value.name, (value.dtype, value.dims)
                if end:
                    kinds[content[end:]] = kind
            if name in found:
                raise Malformed("it has a value_info twice")
            found[name] = kind
        return found

    def type(self, content: bytes) -> tuple[int, Dims]:
        read = self.reader.read
        found = read(TENSOR_TYPE, _needed(read(TYPE, content), "tensor_type", TYPE))
        dims = tuple(map(self.dim, read(SHAPE, _needed(found, "shape", TENSOR_TYPE)).get("dim", ())))
        dtype = _needed(found, "elem_type", TENSOR_TYPE)
        if dtype not in BITS or len(dims) > MAX_RANK:
            raise Malformed("a value has a type or a number of dimensions that no graph of this package has")
        return dtype, dims

    def dim(self, content: bytes) -> int | str | None:
        if content in self.dims:
            return self.dims[content]
        found = self.reader.read(DIM, content)
        if len(found) > 1 or found.get("dim_value", 0) < 0:
            raise Malformed("a dimension is negative, or a number and a symbol at once")
        symbol = found.get("dim_param")
        known = found.get("dim_value") if symbol is None else _text(symbol) or None
        self.dims[content] = known
        return known


def _text(content: bytes) -> str:
    text = content.decode()
    if len(text) > MAX_TEXT or not text.isprintable():
        _check_texts([text])
    return text


def _check_texts(texts: Sequence[str]) -> None:
    if max(map(len, texts), default=0) > MAX_TEXT:
        raise Malformed(f"it has a text of more than {MAX_TEXT} characters")
    if not "".join(texts).isprintable():  # other programs, a runtime first of all, print names as they are
        raise Malformed("it has a text with characters that cannot be printed")


def tensor_bytes(dtype: int, dims: tuple[int, ...]) -> int:
    """Of a stored tensor: two 4-bit elements share a byte."""
    return (math.prod(dims) * BITS[dtype] + 7) // 8


def _needed(found: Mapping[str, Any], field: str, message: Message) -> Any:
    if field not in found:
        raise Malformed(f"{message.name} has no {field}")
    return found[field]


def _add(known: dict[str, T], name: str, value: T, what: str) -> None:
    if name in known:
        raise Malformed(f"it has an {what} twice")
    known[name] = value


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or (text[0] == "0" and text != "0"):
        raise Malformed("an offset or a length is not a plain number")
    return int(text)
