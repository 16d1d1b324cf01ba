"""Safetensors files: tables, quantization, weights. Headers that lie, values that are none, sparse files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..base import GIB, QUANTIZATION, TABLES, WEIGHTS, Draft, NotApplicable, Sparse
from . import mutation

FILES = (TABLES, TABLES, TABLES, QUANTIZATION, WEIGHTS)
Header = dict[str, Any]


def choose(draft: Draft) -> str:
    name = draft.rng.choice(FILES)
    # What only the torch backend reads as safetensors may hold anything, as long as its hash is right.
    draft.refuse |= name == TABLES
    return name


def split(data: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header | bytes, body: bytes) -> bytes:
    text = (
        header
        if isinstance(header, bytes)
        else json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    )
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def some(draft: Draft, header: Header) -> str:
    return draft.rng.choice([key for key in header if key != "__metadata__"])


@mutation("arrays/length", weight=1.5)
def length(draft: Draft) -> object:
    """The header's length is absurd."""
    name = choose(draft)
    data = draft.read(name)
    value = draft.rng.choice(
        [0, 1, 7, 8, len(data), len(data) - 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000]
    )
    draft.contents[name] = value.to_bytes(8, "little") + data[8:]
    return name, value


@mutation("arrays/cut")
def cut(draft: Draft) -> object:
    name = choose(draft)
    data = draft.read(name)
    at = draft.rng.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1])
    draft.contents[name] = data[:at]
    return name, at


@mutation("arrays/tail")
def tail(draft: Draft) -> object:
    name = choose(draft)
    draft.contents[name] = draft.read(name) + draft.rng.choice([b"\0", bytes(8), bytes(100_000), b"secret"])
    return name


@mutation("arrays/header", weight=2)
def other_header(draft: Draft) -> object:
    """The header is no table of tensors."""
    name = choose(draft)
    _, body = split(draft.read(name))
    text = draft.rng.choice(
        [b"", b"{", b"[]", b"null", b"{}", b'{"a":1}', b'{"a":{}}', b'"' + b"x" * 1000 + b'"', b"\xff\xfe",
        b"{" * 1000, b"[" * 200_000,
         b'{"a":' * 100_000, b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"\x1b[31m":1}', bytes(64),
         b"1e999", b"NaN",
         b'{"__metadata__":null}', b'{"__metadata__":{"a":1}}',
         b'{"__metadata__":{"a":"' + b"y" * 1_000_000 + b'"}}']
    )  # fmt: skip
    draft.contents[name] = join(text, body)
    return name, text[:40]


@mutation("arrays/huge-header")
def huge_header(draft: Draft) -> object:
    """A header of megabytes: of spaces, of tensors without elements, of one name."""
    name = choose(draft)
    header, body = split(draft.read(name))
    kind = draft.rng.choice(["spaces", "tensors", "name", "metadata"])
    if kind == "spaces":
        text = json.dumps(header).encode() + b" " * draft.rng.choice(
            [1 << 20, 60 << 20, 99_000_000, 110 << 20]
        )
    else:
        if kind == "tensors":
            one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            header |= {f"x{i}": one for i in range(draft.rng.choice([1000, 100_000]))}
        elif kind == "name":
            key = some(draft, header)
            header[draft.rng.choice(["A", "\x1b[31m"]) * 500_000] = header.pop(key)
        else:
            header["__metadata__"] = {f"k{i}": "\x1b[31m" for i in range(50_000)}
        text = json.dumps(header).encode()
    draft.refuse = draft.refuse and kind not in ("spaces", "metadata")
    draft.contents[name] = join(text, body)
    return name, kind


@mutation("arrays/offsets", weight=2)
def offsets(draft: Draft) -> object:
    """Tensors that overlap, lie outside of the file, or leave holes."""
    name = choose(draft)
    header, body = split(draft.read(name))
    key = some(draft, header)
    start, end = header[key]["data_offsets"]
    header[key]["data_offsets"] = draft.rng.choice(
        [[0, end - start], [start, len(body) + 8], [end, start], [-8, end], [start, 2**63], [2**63, 2**64],
        [start + 1, end + 1],
         [start], [], None, "0", [start, end, end], [float(start), end], [len(body), 2 * len(body)], [2**64,
         2**64 + 4], [0, 10**30]]
    )  # fmt: skip
    if header[key]["data_offsets"] == [start, end]:
        raise NotApplicable("the same")
    draft.contents[name] = join(header, body)
    return name, key, str(header[key]["data_offsets"])


@mutation("arrays/shape", weight=2)
def shape(draft: Draft) -> object:
    name = choose(draft)
    header, body = split(draft.read(name))
    key = some(draft, header)
    old = header[key]["shape"]
    header[key]["shape"] = draft.rng.choice(
        [[], [0], [2**28], [2**31, 2**31], [2**62, 4], [2**32, 2**32], [-1], [-4, -4], [1] * 100,
        [1] * 100_000, None, 4, "4", [4.0],
         old[::-1], [1, *old], [*old, 1], [2**64], [0, 2**63], [10**30], [True]]
    )  # fmt: skip
    if header[key]["shape"] == old:
        raise NotApplicable("the same")
    draft.contents[name] = join(header, body)
    return name, key, str(header[key]["shape"])[:40]


@mutation("arrays/dtype", weight=2)
def dtype(draft: Draft) -> object:
    name = choose(draft)
    header, body = split(draft.read(name))
    key = some(draft, header)
    old = header[key]["dtype"]
    new = draft.rng.choice(
        [
            "F64",
            "F32",
            "I64",
            "U64",
            "BOOL",
            "F8_E4M3",
            "BF16",
            "C64",
            "F4",
            "",
            None,
            "\x1b[31m",
            "O",
            "F16",
            "U8",
            1,
        ]
    )
    if old == new:
        raise NotApplicable("the same")
    header[key]["dtype"] = new
    if isinstance(new, str) and draft.rng.random() < 0.5:  # with a shape that fits
        wide = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(new, 1)
        start, end = header[key]["data_offsets"]
        header[key]["shape"] = [(end - start) // wide]
    draft.contents[name] = join(header, body)
    return name, key, new


@mutation("arrays/keys", weight=2)
def keys(draft: Draft) -> object:
    """A table is missing, has another name, or is there twice."""
    name = choose(draft)
    header, body = split(draft.read(name))
    key, kind = (
        some(draft, header),
        draft.rng.choice(["missing", "renamed", "twice", "extra", "swapped", "field"]),
    )
    if kind == "twice":
        draft.refuse = False  # the same, said again
        text = json.dumps(header).encode()
        again = json.dumps(key).encode() + b":" + json.dumps(header[key]).encode()
        draft.contents[name] = join(text[:-1] + b"," + again + b"}", body)
        return name, key, kind
    if kind == "missing":
        del header[key]
    elif kind == "renamed":
        new = draft.rng.choice(
            ["x", "", "\x1b[31m", "\ud800", "a" * 100_000, key.upper(), "w2a2.portable.gain", "__class__"]
        )
        header[new] = header.pop(key)
    elif kind == "extra":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif kind == "field":
        header[key]["more"] = 1
        draft.refuse = False  # safetensors overlooks it
    else:
        other = some(draft, header)
        if header[other]["shape"] == header[key]["shape"] or other == key:
            raise NotApplicable("alike")
        header[key], header[other] = header[other], header[key]
    draft.contents[name] = join(header, body)
    return name, key, kind


WIDE = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I8": np.int8, "U8": np.uint8}


@mutation("arrays/values", weight=4)
def values(draft: Draft) -> object:
    """Numbers that are none, or absurd, in a table or in the weights."""
    name = draft.rng.choice(FILES)
    header, body = split(draft.read(name))
    keys = [key for key in header if key != "__metadata__" and header[key]["dtype"] in ("F64", "F32")]
    if not keys:
        raise NotApplicable("no floats")
    key = draft.rng.choice(keys)
    start, end = header[key]["data_offsets"]
    array = np.frombuffer(body[start:end], WIDE[header[key]["dtype"]]).copy()
    value = draft.rng.choice([np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0, -1.0, 1e-320, 1e30, 2.0])
    if not array.size or not np.isfinite(array).all():
        raise NotApplicable("empty, or spoilt already")
    with np.errstate(over="ignore"):
        if draft.rng.random() < 0.5:
            array[:] = value
        else:
            array[draft.rng.randrange(array.size)] = value
    draft.refuse |= name == TABLES and not np.isfinite(array).all()
    draft.contents[name] = join(header, body[:start] + array.tobytes() + body[end:])
    return name, key, value


@mutation("arrays/references", weight=2)
def references(draft: Draft) -> object:
    """Weight codes lie in no tensor, in one of another layer or type, in a layout that is none; or the table
    of where they lie is none."""
    rng = draft.rng
    header, body = split(draft.read(QUANTIZATION))
    start, end = header["codes"]["data_offsets"]
    try:
        table = json.loads(body[start:end])
        precision = rng.choice(sorted(table))
        layer = rng.choice(sorted(table[precision]))
        tensor, layout = table[precision][layer]
    except (ValueError, TypeError, LookupError) as error:
        raise NotApplicable("no table of codes") from error
    stored = [key for key in split(draft.read(WEIGHTS))[0] if key != "__metadata__"]
    place = rng.choice(
        [[rng.choice(stored), layout], ["nothing", layout], ["\x1b[31m" * 50, layout], [tensor, "rows"],
         [tensor, "columns"], [tensor, "packed rows"], [tensor, "packed columns"], [tensor, "\x1b[31m"],
         [tensor], [tensor, layout, layout], [None, layout], [tensor, {}], {}, "ab", None, 1e300, 10**400,
         "every", "missing", "unknown", "text"]
    )  # fmt: skip
    if place == "every":  # one tensor for all
        table[precision] = {key: [tensor, layout] for key in table[precision]}
    elif place == "missing":
        del table[precision][layer]
    elif place == "unknown":
        table[precision]["x" * 10_000] = table[precision].pop(layer)
    else:
        table[precision][layer] = place
    text = json.dumps(table).encode()
    if place == "text":
        text = rng.choice([b"", b"\xff", b"{", b"[" * 200_000, b"null", b"{}", b"[[],", b"[{},", b" "])
        text *= rng.choice([1, (8 << 20) // max(1, len(text))])
    header["codes"] |= {"shape": [len(text)], "data_offsets": [len(body), len(body) + len(text)]}
    # What is left over has a name of its own: safetensors wants no holes.
    header["old"] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    draft.contents[QUANTIZATION] = join(header, body + text)
    return precision, layer, str(place)[:60]


@mutation("arrays/bits")
def bits(draft: Draft) -> object:
    """Some bytes of the file turned."""
    name = draft.rng.choice(FILES)
    data = bytearray(draft.read(name))
    head = draft.rng.random() < 0.5
    for _ in range(draft.rng.choice([1, 3, 50])):
        data[draft.rng.randrange(min(len(data), 4000) if head else len(data))] = draft.rng.randrange(256)
    draft.contents[name] = bytes(data)
    return name, head


@mutation("arrays/sparse", refuse=True, weight=0.6)
def sparse(draft: Draft) -> object:
    """A file of gigabytes that takes no space: zeros alone, or the right content with zeros behind it."""
    rng = draft.rng
    name = rng.choice([TABLES, QUANTIZATION, WEIGHTS, *draft.base.graphs, draft.data["update"]["file"]])
    size, head = rng.choice(
        [
            (6 * GIB, False),
            (GIB, False),
            (1 << 40, True),
            (1 << 36, True),
            (300 << 20, True),
            (1 << 50, False),
        ]
    )
    # Where hashing would take seconds the hash is wrong: who gets as far as to find that has read too much.
    known = "" if size <= 6 * GIB and (not head or size <= 1 << 29) else "0" * 64
    draft.contents[name] = Sparse(min(size, 1 << 43), draft.read(name) if head else b"", known)
    return name, size, head


@mutation("arrays/empty")
def empty(draft: Draft) -> object:
    name = choose(draft)
    draft.contents[name] = draft.rng.choice(
        [b"", bytes(8), bytes(1000), b"\x80\x04\x95.", b"PK\x03\x04", b"\x7fELF" + bytes(100)]
    )
    return name
