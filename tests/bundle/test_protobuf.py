"""The wire format: what is read, and that nothing is which a real parser could take for something else."""

from __future__ import annotations

import struct
import time

import onnx
import pytest
from graph_edits import field, number

from ptqd_export.bundle.graph.onnx_file import NODE, TENSOR, External, read_graph
from ptqd_export.bundle.protobuf import Kind, Malformed, Message, Reader, varint

SAMPLE = Message(
    "a sample",
    i=(1, Kind.INT),
    small=(2, Kind.SMALL),
    f=(3, Kind.FLOAT),
    text=(4, Kind.BYTES),
    ints=(5, Kind.INTS),
    floats=(6, Kind.FLOATS),
    many=(20, Kind.MANY),
)


def read(data: bytes, fields: int = 100) -> dict[str, object]:
    return Reader(fields).read(SAMPLE, data)


def test_every_kind_is_read() -> None:
    data = (
        field(1, 0, -5)
        + field(2, 0, 7)
        + field(3, 5, struct.pack("<f", 0.5))
        + field(4, 2, b"x" * 300)
        + field(20, 2, b"a")
        + field(20, 2, b"")
    )
    wanted = {"i": -5, "small": 7, "f": 0.5, "text": b"x" * 300, "many": [b"a", b""]}
    assert read(data) == wanted
    assert read(b"") == {}


def test_numbers_may_be_packed_or_not_or_both() -> None:
    """As any parser takes them: in the order of the file."""
    packed = field(5, 2, number(1) + number(-2) + number(2**40))
    assert read(packed + field(5, 0, 3)) == {"ints": [1, -2, 2**40, 3]}
    assert read(field(5, 2, b"")) == {"ints": []}
    floats = field(6, 2, struct.pack("<2f", 1.0, 2.0)) + field(6, 5, struct.pack("<f", 3.0))
    assert read(floats) == {"floats": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (field(7, 0, 1), "a field 7 of wire type 0"),
        (field(1, 2, b"x"), "a field 1 of wire type 2"),
        (field(4, 0, 1), "a field 4 of wire type 0"),
        (field(1, 1, b"x" * 8), "a field 1 of wire type 1"),
        (number(1 << 3 | 3) + number(1 << 3 | 4), "a field 1 of wire type 3"),
        (number(1 << 3 | 4), "a field 1 of wire type 4"),
        (number(1 << 3 | 6), "a tag that is none"),
        (b"\x00\x00", "a tag that is none"),
        (number((1 << 32) + (1 << 3)) + b"\x05", "a tag that is none"),
        (field(1, 0, 5) + field(1, 0, 6), "its i twice"),
        (field(4, 2, b"a") + field(4, 2, b"b"), "its text twice"),
        (field(3, 5, b"abcd") * 2, "its f twice"),
        (field(2, 0, -1), "small that leaves its type"),
        (field(2, 0, 1 << 31), "small that leaves its type"),
        (field(2, 0, (1 << 32) + 5), "small that leaves its type"),
        (b"\x08\x85\x00", "more bytes than it needs"),
        (b"\x88\x00\x05", "more bytes than it needs"),
        (b"\x22\x81\x00x", "more bytes than it needs"),
        (b"\x2a\x02\x81\x00", "more bytes than it needs"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "more than 64 bits"),
        (b"\x08", "cut off"),
        (b"\x08\x80", "cut off"),
        (b"\x22\x05abcd", "cut off"),
        (b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01a", "cut off"),
        (b"\x1dabc", "cut off"),
        (b"\x32\x03abc", "a row of numbers of a wrong length"),
        (field(1, 0, 1) + b"\xa2", "cut off"),
    ],
)
def test_what_parsers_could_take_in_two_ways_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message) as caught:
        read(data)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_the_number_of_fields_is_bounded() -> None:
    reader = Reader(10)
    assert reader.read(SAMPLE, field(20, 2, b"a") * 6) and reader.left == 4
    with pytest.raises(Malformed, match="more fields"):
        reader.read(SAMPLE, field(20, 2, b"a") * 5)
    assert Reader(5).read(SAMPLE, field(20, 2, b"a") * 5)
    with pytest.raises(Malformed, match="more numbers"):
        Reader(10).read(SAMPLE, field(5, 2, b"\x01" * 6) * 2)


def test_varints_as_protobuf_writes_them() -> None:
    for value in (0, 1, 127, 128, 300, 2**32, 2**63 - 1, 2**64 - 1):
        data = number(value)
        assert varint(b"x" + data + b"y", 1) == (value, 1 + len(data))


def test_nodes_and_tensors_of_the_real_library() -> None:
    """Fields in any order are the same message."""
    node = onnx.helper.make_node("Add", ["a", ""], ["c"], name="n", axis=1)
    parts = [
        field(1, 2, b"a"), field(1, 2, b""), field(2, 2, b"c"), field(3, 2, b"n"), field(4, 2, b"Add"),
        field(5, 2, node.attribute[0].SerializeToString()),
    ]  # fmt: skip
    for order in (parts, parts[::-1], [parts[4], *parts[:4], parts[5]]):
        data = b"".join(order)
        parsed = onnx.NodeProto.FromString(data)
        found = Reader(50).read(NODE, data)
        assert [x.decode() for x in found["input"]] == list(parsed.input)
        assert found["op_type"].decode() == parsed.op_type
    tensor = onnx.TensorProto(dims=[2, 3], data_type=1, name="w", raw_data=bytes(24))
    assert Reader(50).read(TENSOR, tensor.SerializeToString())["dims"] == [2, 3]


def test_nodes_in_any_order_are_read_alike() -> None:
    """The short cut for nodes as they are usually written is a short cut only."""
    graph = onnx.parser.parse_graph("g (float[N] x) => (float[N] y) { y = Softmax<axis = 0>(x) }")
    graph.node[0].ClearField("domain")
    model = onnx.helper.make_model(graph, producer_name="p")
    plain = model.SerializeToString()
    node = graph.node[0].SerializeToString()
    attribute, op = field(5, 2, graph.node[0].attribute[0].SerializeToString()), field(4, 2, b"Softmax")
    for other in (attribute + op + field(1, 2, b"x") + field(2, 2, b"y"), op + node.replace(op, b"")):
        again = onnx.ModelProto.FromString(plain)
        again.graph.node[0].CopyFrom(onnx.NodeProto.FromString(other))
        rest = again.graph
        del rest.node[:]
        content = rest.SerializeToString() + field(1, 2, other)
        again.ClearField("graph")
        data = again.SerializeToString() + field(7, 2, content)
        assert onnx.ModelProto.FromString(data).graph.node[0] == graph.node[0]
        assert read_graph(data, 256).nodes == read_graph(plain, 256).nodes
    twice = field(3, 2, b"n") + op + field(3, 2, b"m")
    with pytest.raises(Malformed, match="its name twice"):
        read_graph(field(7, 2, field(1, 2, twice)), 256)


def test_external_data_is_read_as_the_library_reads_it() -> None:
    tensor = onnx.TensorProto(dims=[4], data_type=1, name="w", data_location=1)
    for key, value in (("location", "file"), ("offset", "8"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    graph = onnx.GraphProto(initializer=[tensor])
    read_back = read_graph(onnx.ModelProto(graph=graph).SerializeToString(), 256)
    assert read_back.initializers["w"].data == External("file", 8, 16)


def test_large_payloads_cost_no_time() -> None:
    """32 MiB inside one tensor: a slice, not a walk."""
    tensor = onnx.TensorProto(dims=[1 << 25], data_type=3, name="w", raw_data=bytes(1 << 25))
    data = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString()
    start = time.process_time()
    assert read_graph(data, 1 << 25).initializers["w"].size == 1 << 25
    assert time.process_time() - start < 0.5
