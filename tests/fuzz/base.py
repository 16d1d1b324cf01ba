"""A right bundle, and drafts of wrong ones: what is changed is written anew and hashed, the rest is
linked."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from safetensors.numpy import load, save

MANIFEST, SEAL = "manifest.json", "sha256"
WEIGHTS, TABLES, QUANTIZATION = "weights.safetensors", "tables.safetensors", "quantization.safetensors"
ZEROS = b"0" * 64
GIB = 1 << 30
SHA_OF_ZEROS = {
    GIB: "49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14",
    6 * GIB: "5c32c2b28999325bc5ad39d6530bcb46fbdf1f86375a991b7269764c50b0d109",
}
"""SHA-256 of files of so many zero bytes, which would take seconds to hash."""
PIECE = 1 << 22


class NotApplicable(Exception):
    """A mutation finds nothing to change in this draft."""


@dataclass(frozen=True)
class Sparse:
    """A file of `head` and zeros up to `size`, which takes no space; `sha256` where it is known, or is to be
    wrong."""

    size: int
    head: bytes = b""
    sha256: str = ""

    def digest(self) -> str:
        if self.sha256 or (not self.head and SHA_OF_ZEROS.get(self.size)):
            return self.sha256 or SHA_OF_ZEROS[self.size]
        found, zeros, left = hashlib.sha256(self.head), bytes(PIECE), self.size - len(self.head)
        while left > 0:
            found.update(zeros[:left])
            left -= PIECE
        return found.hexdigest()


@dataclass(frozen=True)
class Link:
    """A symbolic link; `claim` is the content that the manifest promises behind it."""

    target: str
    claim: bytes = b""


@dataclass(frozen=True)
class Special:
    """A FIFO, a socket, a device or a folder in the place of a file, or nothing at all."""

    kind: str
    claim: bytes = b""


Content = bytes | Sparse | Link | Special


@dataclass
class Base:
    """A right bundle in a folder of our own."""

    folder: Path
    manifest: dict[str, Any]
    sizes: dict[str, int]

    @classmethod
    def copied(cls, bundle: Path, folder: Path, slim: bool = False) -> Base:
        """A copy in `folder`; with `slim` of a few graphs alone, so that a case costs less."""
        folder.mkdir(parents=True)
        if slim:
            _slim(bundle, folder)
        else:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
        manifest = json.loads((folder / MANIFEST).read_text())
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        return cls(folder, manifest, {f.relative_to(folder).as_posix(): f.stat().st_size for f in files})

    @cached_property
    def graphs(self) -> list[str]:
        """Names of the network's graphs, each once, and of the parts'."""
        parts = [name for name in self.sizes if name.endswith("/model.onnx")]
        return list(dict.fromkeys(graph["file"] for graph in self.manifest["graphs"])) + parts

    @cached_property
    def _contents(self) -> dict[str, bytes]:
        return {}

    def read(self, name: str) -> bytes:
        if name not in self._contents:
            self._contents[name] = (self.folder / name).read_bytes()
        return self._contents[name]

    @cached_property
    def layers(self) -> dict[str, list[int]]:
        """Shapes of the quantized layers' weights, as the model would say."""
        found: dict[str, list[int]] = {}
        for name in self.graphs:
            for tensor in onnx.load(self.folder / name, load_external_data=False).graph.initializer:
                layer, is_codes, _ = tensor.name.partition(".weight.codes")
                if is_codes:  # linear layers lie transposed
                    dims = list(tensor.dims)
                    found[layer] = dims if len(dims) == 4 else dims[::-1]
        return found


@dataclass
class Draft:
    """A hostile bundle in the making.

    Attributes:
        data: the manifest, plain.
        contents: of the files that differ from the base; names may be any text.
        entries: what the manifest says of a file, where it is not the truth.
        raw: changes of the manifest's bytes, before they are sealed.
        unsealed: no seal is put in: the manifest has none, or the mutation is about it.
        canary: folder, beside the bundle, of files that nobody may open, but for `may_open`.
        refuse: a program that accepts this lets something in.
        notes: what was done.
    """

    base: Base
    rng: random.Random
    canary: Path
    data: Any = None
    contents: dict[str, Content] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)
    manifest_as: Content | None = None
    unsealed: bool = False
    may_open: set[str] = field(default_factory=set)
    refuse: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.data is None:
            self.data = copy.deepcopy(self.base.manifest)

    @property
    def names(self) -> list[str]:
        """Every file of the base but the manifest."""
        return [name for name in self.base.sizes if name != MANIFEST]

    def read(self, name: str) -> bytes:
        content = self.contents.get(name)
        if content is None and name in self.base.sizes:
            return self.base.read(name)
        if not isinstance(content, bytes):
            raise NotApplicable(f"{name} is no plain file by now")
        return content

    def model(self, name: str) -> onnx.ModelProto:
        content = self.read(name)
        try:
            model = onnx.load_model_from_string(content)
        except DecodeError as error:
            raise NotApplicable(f"{name} is no graph by now") from error
        if name in self.contents and model.SerializeToString() != content:
            raise NotApplicable(f"{name} has bytes that would be lost if it were written again")
        return model

    def put_model(self, name: str, model: onnx.ModelProto) -> None:
        self.contents[name] = model.SerializeToString()

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, wherever the manifest says it."""
        self.contents[new] = self.contents.pop(old, None) or self.read(old)
        self.contents[old] = Special("missing")
        self.unlisted.add(old)
        for entry in (*self.data["graphs"], *self.data["artifacts"], self.data["update"]):
            if entry["file"] == old:
                entry["file"] = new

    def write(self, folder: Path) -> None:
        """Put the bundle down, sealed."""
        folder.mkdir()
        files: dict[str, Any] = {}
        before = self.data.get("files") if isinstance(self.data, dict) else None
        for name in self.base.sizes.keys() - self.contents.keys() - {MANIFEST}:
            (folder / name).parent.mkdir(exist_ok=True)
            os.link(self.base.folder / name, folder / name)
        for name, content in self.contents.items():
            place(folder, name, content)
            if name not in self.unlisted and content != Special("missing"):
                files[name] = entry_of(content)
        if isinstance(before, dict):
            for name in self.unlisted:
                before.pop(name, None)
            right = self.base.manifest["files"]
            # What another mutation made of an entry stands.
            before |= {n: e for n, e in files.items() if n not in right or before.get(n) == right[n]}
            before |= self.entries
        if self.manifest_as is not None:
            place(folder, MANIFEST, self.manifest_as)
        else:
            folder.joinpath(MANIFEST).write_bytes(self.sealed())

    def sealed(self) -> bytes:
        """The manifest's bytes, with their own hash in them."""
        if isinstance(self.data, dict) and not self.unsealed and SEAL in self.data:
            self.data[SEAL] = ZEROS.decode()
        try:
            content = json.dumps(self.data, indent=1).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError, TypeError) as error:
            raise NotApplicable(str(error)) from error
        for change in self.raw:
            content = change(content)
        if not self.unsealed:
            content = content.replace(ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)
        return content


def entry_of(content: Content) -> dict[str, Any]:
    """What a manifest says of a file."""
    if isinstance(content, Sparse):
        return {"sha256": content.digest(), "size": content.size}
    data = content if isinstance(content, bytes) else content.claim
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def place(folder: Path, name: str, content: Content) -> None:
    """Put a file down, inside `folder` alone; a name that no file can have, or that leads out, is left to the
    manifest."""
    path = Path(os.path.normpath(folder / name)) if "\0" not in name else folder
    if folder not in path.parents:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, Special):
            _place_special(path, content.kind)
        else:
            with path.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.head)
                if isinstance(content, Sparse):
                    file.truncate(content.size)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and not error.filename:  # a full disk, not a name that cannot be
            raise


def _place_special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            path.symlink_to("/dev/zero")


def _slim(bundle: Path, folder: Path) -> None:
    """The precisions of the plan, with the graphs of ONNX Runtime's CPU provider and a portable one, and with
    the weights that they take."""
    m = json.loads((bundle / MANIFEST).read_text())
    kept = list(dict.fromkeys(run.partition("*")[0] for run in m["plan"].split()))
    portable = kept[-1]
    m["graphs"] = [
        graph
        for graph in m["graphs"]
        if graph["precision"] in kept
        and (
            graph["emission"] == "ort-cpu"
            or (graph["precision"], graph["emission"]) == (portable, "portable")
        )
    ]
    m["artifacts"] = [a for a in m["artifacts"] if a["precision"] in kept and a["backend"] == "ort-cpu"]
    m["update_engines"] = []
    names = {graph["precision"] + "." + graph["emission"] for graph in m["graphs"]}
    m["parity"] = {name: figures for name, figures in m["parity"].items() if name in names}
    for table in (
        m["bops"],
        m["half_bops"],
        m["layers"],
        m["layer_sensitivity"],
        m["choice"]["seconds_per_evaluation"],
        m["choice"]["seconds_error"],
        m["choice"]["snr_q"],
        m["choice"]["error"],
        *(m["choice"]["sensitivity"][of] for of in ("paired", "distribution")),
    ):
        for precision in table.keys() - set(kept):
            del table[precision]
    for name in ("front", "compared"):
        m["choice"][name] = [
            point
            for point in m["choice"][name]
            if {run.partition("*")[0] for run in point["plan"].split()} <= set(kept)
        ]
    steps = m["correction"]["steps"]
    m["correction"]["steps"] = {name: on for name, on in steps.items() if name.partition(".")[0] in kept}
    graphs = {g["file"] for g in m["graphs"]} | {m["update"]["file"]}
    contents = _repack(bundle, sorted(graphs))
    arrays = load((bundle / TABLES).read_bytes())
    contents[TABLES] = save({k: a for k, a in arrays.items() if k.partition(".")[0] in (*kept, "null")})
    arrays = load((bundle / QUANTIZATION).read_bytes())
    places = json.loads(arrays.pop("codes").tobytes())
    text = json.dumps({p: of for p, of in places.items() if p in kept}).encode()
    contents[QUANTIZATION] = save(
        {k: a for k, a in arrays.items() if k.partition("/")[0] in kept}
        | {"codes": np.frombuffer(text, np.uint8)}
    )
    contents |= {name: (bundle / name).read_bytes() for name in m["files"] if "/" in name}
    m["files"] = {name: entry_of(content) for name, content in contents.items()}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    text = json.dumps(m | {SEAL: ZEROS.decode()}, indent=1).encode()
    (folder / MANIFEST).write_bytes(text.replace(ZEROS, hashlib.sha256(text).hexdigest().encode(), 1))


def _repack(bundle: Path, graphs: list[str]) -> dict[str, bytes]:
    """The graphs, and a weights file of what they take."""
    models = {name: onnx.load(bundle / name, load_external_data=False) for name in graphs}
    data = (bundle / WEIGHTS).read_bytes()
    old, start = header_of(data)
    names = {start + entry["data_offsets"][0]: name for name, entry in old.items()}
    stored = [t for m in models.values() for t in m.graph.initializer if t.external_data]
    places = [next(entry for entry in tensor.external_data if entry.key == "offset") for tensor in stored]
    taken = [names[int(place.value)] for place in places]
    arrays = load(data)
    weights = save({name: arrays[name] for name in sorted(set(taken))})
    new, start = header_of(weights)
    for place, name in zip(places, taken, strict=True):
        place.value = str(start + new[name]["data_offsets"][0])
    packed = {name: model.SerializeToString(deterministic=True) for name, model in models.items()}
    return packed | {WEIGHTS: weights}


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    """Of a safetensors file, and where its tensors begin."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return header, end
