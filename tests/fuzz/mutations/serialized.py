"""Graphs, by their bytes: cut, spliced or spoilt protobuf, other formats, files of two formats at once."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from ..base import Draft
from . import mutation
from .graphs import pick


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def choose(draft: Draft) -> tuple[str, bytes]:
    update = draft.base.manifest["update"]["file"]
    name = update if draft.rng.random() < 0.2 else draft.rng.choice(draft.base.graphs)
    return name, draft.read(name)


@mutation("bytes/turned", weight=3)
def turned(draft: Draft) -> object:
    name, data = choose(draft)
    out = bytearray(data)
    count = draft.rng.choice([1, 1, 4, 64])
    for _ in range(count):
        out[draft.rng.randrange(len(out))] ^= 1 << draft.rng.randrange(8)
    draft.contents[name] = bytes(out)
    return name, count


@mutation("bytes/spliced", weight=2)
def spliced(draft: Draft) -> object:
    """A piece is missing, doubled, or from elsewhere in the file."""
    name, data = choose(draft)
    a, b = sorted(draft.rng.randrange(len(data)) for _ in range(2))
    c = draft.rng.randrange(len(data))
    kind = draft.rng.choice(["cut", "missing", "twice", "moved", "zeros", "ones"])
    draft.contents[name] = {
        "cut": data[:a],
        "missing": data[:a] + data[b:],
        "twice": data[:b] + data[a:],
        "moved": data[:c] + data[a:b] + data[c:],
        "zeros": data[:a] + bytes(b - a) + data[b:],
        "ones": data[:a] + b"\xff" * (b - a) + data[b:],
    }[kind]
    return name, kind, a, b


@mutation("bytes/appended", refuse=True, weight=3)
def appended(draft: Draft) -> object:
    """Fields behind the model, which parsers merge, overlook or choke on."""
    name, data = choose(draft)
    rng = draft.rng
    more = {
        "second graph": field(7, b""),
        "whole twice": data,
        "unknown": field(999, b"x" * 100),
        "group": b"\x3b" + b"\x3c",
        "open group": b"\x3b" * 100_000,
        "no tag": b"\0\0",
        "wire 6": b"\x3e\1",
        "long": b"\x3a" + b"\xff" * 9 + b"\x01",
        "over": b"\x3a\x80\x80\x80\x80\x10",
        "overlong": b"\x3a\x80\x00",
        "truncated": b"\x3a\x7f",
        "high tag": b"\xba\x80\x80\x80\x80\x01\x00",
        "deep": functools.reduce(
            lambda inner, _: field(7, field(1, field(5, field(6, inner)))), range(60), b""
        ),
        "many": b"\x3a\x00" * 600_000,
        "many opsets": field(8, b"\x10\x01") * 300_000,
        "zeros": bytes(1 << 20),
    }
    kind = rng.choice(sorted(more))
    draft.contents[name] = more[kind] + data if rng.random() < 0.3 else data + more[kind]
    return name, kind


@mutation("bytes/deep", refuse=True)
def deep(draft: Draft) -> object:
    """Subgraphs in subgraphs."""
    name, _ = pick(draft)
    levels = draft.rng.choice([5, 30, 100, 1000, 5000])
    inner = b""
    for _ in range(levels):
        # graph.node.attribute.g
        inner = field(
            1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05")
        )
    draft.contents[name] = b"\x08\x0a" + field(7, inner) + field(8, b"\x10\x15")
    return name, levels


CONVERT = """
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
options.optimized_model_filepath = sys.argv[2]
options.add_session_config_entry("session.save_model_format", "ORT")
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
_lock = threading.Lock()


def ort_format(model: bytes) -> bytes:
    """A model in ONNX Runtime's own format."""
    with _lock:
        return _converted(model)


@functools.cache
def _converted(model: bytes) -> bytes:
    # In a program of its own: one that has opened a bundle shares its threads among all sessions.
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "a.ort"
        source.write_bytes(model)
        subprocess.run([sys.executable, "-c", CONVERT, source, target], check=True, capture_output=True)
        return target.read_bytes()


def _update(draft: Draft) -> bytes:
    """The sampler's graph, by whatever name the manifest knows it meanwhile."""
    return draft.base.read(draft.base.manifest["update"]["file"])


@mutation("bytes/ort-format", refuse=True, weight=2)
def other_format(draft: Draft) -> object:
    """ONNX Runtime's own format by the name of an ONNX file."""
    update = draft.data["update"]["file"]
    name = draft.rng.choice([*draft.base.graphs, update])
    data = ort_format(_update(draft))
    if draft.rng.random() < 0.5:
        out = bytearray(data)
        for _ in range(draft.rng.choice([1, 20])):
            out[draft.rng.randrange(len(out))] ^= 1 << draft.rng.randrange(8)
        out[4:8] = b"ORTM"
        data = bytes(out)
    draft.contents[name] = data
    return name


@mutation("bytes/polyglot", refuse=True, weight=3)
def polyglot(draft: Draft) -> object:
    """Protobuf whose bytes 4 to 8 are those by which ONNX Runtime knows its own format."""
    name, data = choose(draft)
    rng = draft.rng
    tail = rng.choice([b"", bytes(24), ort_format(_update(draft))[8:]])
    content = rng.choice([b"\0\0", b"xx", b"\xff\xff"]) + b"ORTM" + tail
    # producer_name, doc_string or a field that nobody knows
    number = rng.choice([2, 6, 15])
    head = varint(len(content))
    content = content[len(head) - 1 :]
    head = bytes([number << 3 | 2]) + varint(len(content))
    whole = head + content
    assert whole[4:8] == b"ORTM", whole[:12]
    draft.contents[name] = whole + data
    return name, number, len(tail)


@mutation("bytes/not-a-graph", refuse=True)
def not_a_graph(draft: Draft) -> object:
    name, _ = choose(draft)
    content = draft.rng.choice(
        [b"", b"\0", bytes(100), b"{}", b"ORTM" * 9, b"\x7fELF" + bytes(60), b"PK\x03\x04" + bytes(60),
        b"\x80\x04\x95.", b"x" * 5000,
         b"\x08\x0a", b"\x3a\x00", draft.base.read("tables.safetensors"), b"#!/bin/sh\nid\n"]
    )  # fmt: skip
    draft.contents[name] = content
    return name, content[:8]
