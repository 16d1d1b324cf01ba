"""Which files an ONNX graph reads its weights from: protobuf's wire format, read here because a runtime has no onnx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

ONNX_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "tensor": {13: "external"},
}
"""onnx.proto: the numbers of the fields that lead to a tensor's external data, by message; "external" has key = 1 and value = 2."""


def external_files(data: memoryview, message: str) -> Iterator[str]:
    """Locations of external data in a serialized ONNX message (protobuf's wire format, read here because `run` has no onnx).

    Raises:
        IndexError, ValueError: not protobuf.
    """
    if message == "external":
        fields = [(number, bytes(value).decode()) for number, value in _fields(data)]
        if (1, "location") in fields:
            yield from (value for number, value in fields if number == 2)
        return
    inside = ONNX_MESSAGES[message]
    for number, value in _fields(data):
        if number in inside:
            yield from external_files(value, inside[number])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, payload) of the length-delimited fields of a protobuf message; numbers are skipped."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):  # ten bytes at most
            byte = data[at]
            at, value = at + 1, value | (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number of more than ten bytes")

    while at < len(data):
        tag = varint() & 0xFFFFFFFF  # as protobuf itself reads it
        kind = tag & 7
        if kind == 0:
            varint()
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            end = varint() + at
            if end > len(data):
                raise ValueError("it is cut off")
            yield tag >> 3, data[at:end]
            at = end
        else:
            raise ValueError(f"wire type {kind}")
