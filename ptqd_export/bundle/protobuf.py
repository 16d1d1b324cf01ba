"""Protobuf's wire format, read by hand, because a runtime has no onnx: strictly, so that nobody who reads the
same bytes can read anything else.

A message is a row of fields: a tag (field number << 3 | wire type), then a varint (wire type 0), eight bytes
(1), a length and as many bytes (2), or four bytes (5); all numbers are little-endian. Parsers differ, or
surprise, in what they do with a field that they do not know, a singular field that stands twice (scalars:
the last wins; messages: they are merged), groups (3, 4), numbers of more bytes than needed, and numbers that
leave their type. No exporter writes any of these, and all are refused.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

VARINT, BYTES, FOUR = 0, 2, 5
"""Wire types."""
MAX_FIELD = 2**29 - 1
LAST_BITS = 1
"""Of the tenth byte of a varint: 64 bits are nine times seven, and one more."""


class Malformed(ValueError):
    """Bytes that are not the message that they should be; the text says why, without any of them."""


class Kind(IntEnum):
    """What a field holds; of the repeated ones, numbers may be packed."""

    INT = 0
    """int64."""
    SMALL = 1
    """int32 or an enum, not negative."""
    FLOAT = 2
    BYTES = 3
    """Bytes, text or a message."""
    INTS = 4
    FLOATS = 5
    MANY = 6
    """Repeated bytes, texts or messages."""


WIRE = {Kind.INT: VARINT, Kind.SMALL: VARINT, Kind.INTS: VARINT, Kind.FLOAT: FOUR, Kind.FLOATS: FOUR}
_SMALL, _BYTES, _INTS, _FLOATS, _MANY = map(int, (Kind.SMALL, Kind.BYTES, Kind.INTS, Kind.FLOATS, Kind.MANY))


class Message:
    """The fields that a message may have: name = (number, kind)."""

    def __init__(self, name: str, /, **fields: tuple[int, Kind]) -> None:
        self.name = name
        self.by_tag: dict[int, tuple[str, int]] = {}
        for field, (number, kind) in fields.items():
            self.by_tag[number << 3 | WIRE.get(kind, BYTES)] = field, int(kind)
            if kind in (Kind.INTS, Kind.FLOATS):
                self.by_tag[number << 3 | BYTES] = field, int(kind)


class Reader:
    """Reads the messages of one file.

    Attributes:
        left: how many more fields may be read: they cost far more time and memory here than in the file.
        numbers_left: the same of numbers that are packed.
    """

    def __init__(self, fields: int) -> None:
        self.left = self.numbers_left = fields

    def spend(self, fields: int) -> None:
        """Count fields that were read elsewhere."""
        self.left -= fields
        if self.left < 0:
            raise Malformed("it has more fields than a graph of this package can have")

    def read(self, message: Message, data: bytes) -> dict[str, Any]:
        """The fields that `data` holds, by name: numbers, bytes, and lists of them.

        Raises:
            Malformed: anything else than fields of this message, each as it should be.
        """
        # One loop with no calls in the usual case: it decides how long a bundle takes to open.
        at, end, tag = 0, len(data), 0
        by_tag, found = message.by_tag, dict[str, Any]()
        try:
            for left in range(self.left, -1, -1):
                if at >= end:
                    self.left = left
                    break
                tag = data[at]
                at += 1
                if tag > 127:
                    tag, at = varint(data, at - 1)
                name, kind = by_tag[tag]
                if tag & 7 == BYTES:
                    size = data[at]
                    at += 1
                    if size > 127:
                        size, at = varint(data, at - 1)
                    start = at
                    at += size
                    if at > end:
                        raise Malformed(f"{message.name} is cut off")
                    value: Any = data[start:at]
                    if kind == _MANY:
                        if name in found:
                            found[name].append(value)
                        else:
                            found[name] = [value]
                        continue
                    if kind != _BYTES:
                        unpack = _packed_ints if kind == _INTS else _packed_floats
                        values = unpack(value, self.numbers_left)
                        self.numbers_left -= len(values)
                        found.setdefault(name, []).extend(values)
                        continue
                elif tag & 7 == VARINT:
                    value, at = varint(data, at)
                    if kind == _SMALL:
                        if value >= 1 << 31:
                            raise Malformed(f"{message.name} has a {name} that leaves its type")
                    elif value >= 1 << 63:
                        value -= 1 << 64
                    if kind == _INTS:
                        found.setdefault(name, []).append(value)
                        continue
                else:
                    (value,), at = struct.unpack_from("<f", data, at), at + 4
                    if kind == _FLOATS:
                        found.setdefault(name, []).append(value)
                        continue
                if name in found:
                    raise Malformed(f"{message.name} has its {name} twice, which parsers merge as they like")
                found[name] = value
            else:
                raise Malformed("it has more fields than a graph of this package can have")
        except KeyError:
            raise Malformed(f"{message.name} has {_what(tag)}, which no graph of this package has") from None
        except (IndexError, struct.error):
            raise Malformed(f"{message.name} is cut off") from None
        return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `at`.

    Raises:
        Malformed: of more bytes than needed, or of more than 64 bits.
        IndexError: cut off.
    """
    value = 0
    for shift in range(0, 70, 7):  # ten bytes at most
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise Malformed("it has a number of more bytes than it needs")
            if shift == 63 and byte > LAST_BITS:
                break
            return value, at
    raise Malformed("it has a number of more than 64 bits")


def _packed_ints(data: bytes, limit: int) -> list[int]:
    values: list[int] = []
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        values.append(value - (1 << 64) if value >= 1 << 63 else value)
        if len(values) > limit:
            raise Malformed("it has more numbers than a graph of this package can have")
    return values


def _packed_floats(data: bytes, limit: int) -> tuple[float, ...]:
    if len(data) % 4 or len(data) > 4 * limit:
        raise Malformed("it has a row of numbers of a wrong length")
    return struct.unpack(f"<{len(data) // 4}f", data)


def _what(tag: int) -> str:
    number, wire = tag >> 3, tag & 7
    if not 1 <= number <= MAX_FIELD or wire > FOUR:
        return "a tag that is none"
    return f"a field {number} of wire type {wire}"
