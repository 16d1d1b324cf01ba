"""Bundle: a folder with manifest.json, ONNX graphs, safetensors tables; written atomically, verified when opened, never pickle.

manifest.json                     what is here, what it was measured for, and a SHA-256 of every other file and of itself
<precision>.<emission>.onnx       one graph per precision and emission; weights are external
weights.safetensors               every distinct tensor of all graphs, once
quantization.safetensors          codes and scales of the quantized layers (the torch backend simulates from them)
tables.safetensors                per precision and emission: gain, offset, var and the sums they came from
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from .conditioning import ModelInfo
from .errors import BundleError, PTQDError
from .noise import Correction, NoiseStats
from .plan import Plan
from .precision import Precision
from .quant import Emission
from .schedule import NoiseSchedule

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "sha256"
"""First key of the manifest: the SHA-256 of its bytes, taken with zeros in its own place."""
TABLES = "tables.safetensors"
QUANTIZATION = "quantization.safetensors"
WEIGHTS = "weights.safetensors"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A graph of the bundle. `lowering` says what the backend really computes with; `time_ms` is one measured evaluation, or None."""

    precision: Precision
    emission: Emission
    backends: tuple[str, ...]
    file: str
    lowering: str
    runtime: str
    ops: Mapping[str, int]
    time_ms: float | None


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know; see `Bundle.manifest`.

    Attributes:
        model: name, shapes, conditioning inputs, hash of the weights.
        schedule: the steps that the tables were measured for.
        solver, guidance_scale, recalibrate_variance: the rest of the key of validity.
        plan, plan_info: precision per step; rule, costs and Pareto front for people and plots.
        artifacts: one per precision and emission.
        correction: mode and, per graph, which steps kept it and why.
        parity: figures of the parity gate.
        bops: bit operations of one evaluation per precision.
        provenance: versions, recipe, seed.
        files: {path: {"sha256", "size"}} of every other file.
    """

    model: ModelInfo
    schedule: NoiseSchedule
    solver: str
    guidance_scale: float
    recalibrate_variance: bool
    plan: Plan
    plan_info: Mapping[str, Any]
    artifacts: tuple[Artifact, ...]
    correction: Mapping[str, Any]
    parity: Mapping[str, Any]
    bops: Mapping[Precision, int]
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def artifact(self, precision: Precision, backend: str) -> Artifact:
        """The graph that `backend` runs at `precision`.

        Raises:
            BundleError: the bundle holds none.
        """
        for artifact in self.artifacts:
            if artifact.precision == precision and backend in artifact.backends:
                return artifact
        raise BundleError(
            f"the bundle has no {precision} engine for backend {backend!r}: it holds {', '.join(self.backends)}; rebuild with --backend {backend}"
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that some graph of the bundle is for, in order."""
        return tuple(dict.fromkeys(name for artifact in self.artifacts for name in artifact.backends))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "sampler": {"solver": self.solver, "guidance_scale": self.guidance_scale, "recalibrate_variance": self.recalibrate_variance},
            "schedule": self.schedule.to_dict(),
            "plan": {"steps": [str(p) for p in self.plan.steps], **self.plan_info},
            "artifacts": [
                {
                    "precision": str(a.precision),
                    "emission": str(a.emission),
                    "backends": list(a.backends),
                    "file": a.file,
                    "lowering": a.lowering,
                    "runtime": a.runtime,
                    "ops": dict(a.ops),
                    "time_ms": a.time_ms,
                }
                for a in self.artifacts
            ],
            "correction": dict(self.correction),
            "parity": dict(self.parity),
            "bops": {str(p): v for p, v in self.bops.items()},
            "provenance": dict(self.provenance),
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        plan = dict(data["plan"])
        return cls(
            model=ModelInfo.from_dict(data["model"]),
            schedule=NoiseSchedule.from_dict(data["schedule"]),
            solver=str(data["sampler"]["solver"]),
            guidance_scale=float(data["sampler"]["guidance_scale"]),
            recalibrate_variance=bool(data["sampler"]["recalibrate_variance"]),
            plan=Plan(tuple(Precision.parse(p) for p in plan.pop("steps"))),
            plan_info=plan,
            artifacts=tuple(
                Artifact(
                    Precision.parse(a["precision"]), Emission(a["emission"]), tuple(a["backends"]), str(a["file"]),
                    str(a["lowering"]), str(a["runtime"]), dict(a["ops"]), None if a["time_ms"] is None else float(a["time_ms"]),
                )
                for a in data["artifacts"]
            ),
            correction=dict(data["correction"]),
            parity=dict(data["parity"]),
            bops={Precision.parse(p): int(v) for p, v in data["bops"].items()},
            provenance=dict(data["provenance"]),
            files={str(name): dict(entry) for name, entry in data["files"].items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    tables: Mapping[str, npt.NDArray[np.float64]]

    def file(self, name: str) -> Path:
        return self.path / name

    def correction(self, precision: Precision, emission: Emission) -> Correction:
        """The tables folded into a graph; the identity for fp32."""
        if precision.is_float:
            return Correction.identity(len(self.manifest.schedule), self.manifest.model.channels)
        return Correction(*(self._table(precision, emission, name) for name in ("gain", "offset", "var")))

    def stats(self, precision: Precision, emission: Emission) -> NoiseStats:
        """The sums that the correction was fitted on."""
        return NoiseStats(*(self._table(precision, emission, name) for name in ("count", "e", "d", "ee", "ed", "dd")))

    def _table(self, precision: Precision, emission: Emission, name: str) -> npt.NDArray[np.float64]:
        key = f"{precision}.{emission}.{name}"
        if key not in self.tables:
            raise BundleError(f"{self.path / TABLES} has no table {key}: rebuild the bundle")
        n, channels = len(self.manifest.schedule), self.manifest.model.channels
        table, expected = self.tables[key], (n,) if name in ("var", "count") else (n, channels)
        if table.shape != expected:
            raise BundleError(f"{self.path / TABLES} has a table {key} of shape {table.shape}, expected {expected}: rebuild the bundle")
        return table

    def sigmas(self, backend: str, plan: Plan | None = None) -> npt.NDArray[np.float64]:
        """sigma' per step, (T,), under a plan and the graphs that `backend` runs; the original sigma where recalibration is off."""
        schedule = self.manifest.schedule
        if not self.manifest.recalibrate_variance:
            return schedule.sigmas
        var = np.zeros(len(schedule))
        for precision, steps in (plan or self.manifest.plan).runs():
            emission = self.manifest.artifact(precision, backend).emission
            var[steps.start : steps.stop] = self.correction(precision, emission).var[steps.start : steps.stop]
        return schedule.recalibrated_sigmas(var)

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Bundle:
        """Read a bundle and check it: format, paths, sizes and (unless `verify` is off) the SHA-256 of every file, the manifest
        among them, and that graphs take their weights from files of the bundle alone.

        Raises:
            BundleError: one line saying what is wrong.
        """
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; make one with `ptqd-export build`")
        try:
            content = manifest_path.read_bytes()
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{manifest_path} is not valid JSON ({error}): rebuild the bundle") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{manifest_path} has no format_version: rebuild the bundle")
        if version > FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}, this ptqd-export reads up to {FORMAT_VERSION}: upgrade ptqd-export")
        try:
            manifest = Manifest.from_dict(data)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, PTQDError) as error:
            raise BundleError(f"{manifest_path} is damaged ({type(error).__name__}: {error}): rebuild the bundle") from error
        _check_consistent(path, manifest)
        for name, entry in manifest.files.items():
            _check_file(path, name, entry, verify)
        if verify:
            # After the other checks, which can say more about a manifest that was edited by hand.
            if data.get(SEAL) != _seal(content, str(data.get(SEAL))):
                raise BundleError(f"{manifest_path} does not match its own SHA-256: it was changed or damaged; copy the bundle again or rebuild it")
            for name in dict.fromkeys(artifact.file for artifact in manifest.artifacts):
                _check_graph(path / name, manifest.files)
        try:
            tables = load_safetensors(path.joinpath(TABLES).read_bytes())
        except SafetensorError as error:
            raise BundleError(f"{path / TABLES} is damaged ({error}): rebuild the bundle") from error
        return cls(path, manifest, {k: v.astype(np.float64) for k, v in tables.items()})


def _check_consistent(path: Path, manifest: Manifest) -> None:
    n = len(manifest.schedule)
    if not len(manifest.plan) == n == len(manifest.schedule.alphas_cumprod) == len(manifest.schedule.alphas_cumprod_prev):
        raise BundleError(f"{path / MANIFEST} is damaged: {len(manifest.plan)} plan steps for {n} timesteps; rebuild the bundle")
    for needed in (TABLES, QUANTIZATION, WEIGHTS, *(a.file for a in manifest.artifacts)):
        if needed not in manifest.files:
            raise BundleError(f"{path / MANIFEST} is damaged: it names {needed} but has no hash of it; rebuild the bundle")


def _check_file(root: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(f"{root / MANIFEST} names {name!r}, which leaves the bundle: do not trust it")
    file = root / name
    if file.is_symlink() or root.resolve() not in file.resolve().parents:
        raise BundleError(f"{file} is a link, which may leave the bundle: copy the file itself")
    if not file.is_file():
        raise BundleError(f"{file} is missing: copy the bundle again or rebuild it")
    size = file.stat().st_size
    if size != entry.get("size"):
        raise BundleError(f"{file} has {size} bytes, the manifest says {entry.get('size')}: copy the bundle again or rebuild it")
    if verify and sha256_file(file) != entry.get("sha256"):
        raise BundleError(f"{file} does not match its SHA-256 in the manifest: it was changed or damaged; copy the bundle again or rebuild it")


def _seal(content: bytes, seal: str) -> str:
    """SHA-256 of a manifest's bytes, zeros in the place of `seal`."""
    return hashlib.sha256(content.replace(seal.encode(), b"0" * 64, 1)).hexdigest()


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


def _check_graph(file: Path, known: Mapping[str, object]) -> None:
    """A graph may read files of the bundle and nothing else: a runtime would open any path that its tensors name."""
    try:
        for name in _external_files(memoryview(file.read_bytes()), "model"):
            if name not in known:
                raise BundleError(f"{file} takes weights from {name!r}, which is not a file of the bundle: do not trust it")
    except (IndexError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not an ONNX graph ({error}): rebuild the bundle") from error


def _external_files(data: memoryview, message: str) -> Iterator[str]:
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
            yield from _external_files(value, inside[number])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, payload) of the length-delimited fields of a protobuf message; numbers are skipped."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

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


def check_target(path: Path) -> None:
    """Refuse, before any work, a target that cannot or must not be written. Leaves nothing behind.

    Raises:
        BundleError: a file, a folder that is not a bundle, or no permission.
    """
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path} is a file: give a folder for the bundle")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is a folder with other things in it: give an empty or new folder, or an older bundle to replace")
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    try:
        probe = parent / f".{path.name}.probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise BundleError(f"cannot write to {parent}: {error.strerror}; give a folder you may write to") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """`folder`, made if need be, for this process alone; the lock goes with the process, however it ends.

    Raises:
        BundleError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"{folder} is in use by another build: wait until that one has ended, or give another --out") from error
        if not folder.exists() or not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise BundleError(f"{folder} was removed by another build, which has just ended: run the command again")
        yield folder
    finally:
        os.close(lock)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to fill; on success it becomes `path` in one step, replacing an older bundle; on failure it is removed.

    A kill leaves the old bundle, or none; the temporary folders of writers that are gone are removed by the next one.
    """
    path = path.resolve()
    for stale in path.parent.glob(f".{path.name}.tmp-*"):
        with contextlib.suppress(BundleError, OSError), exclusive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    with exclusive(path.parent / f".{path.name}.tmp-{os.getpid()}") as tmp:
        try:
            yield tmp
            for file in tmp.rglob("*"):
                _fsync(file)
            _fsync(tmp)
            if path.exists():
                _exchange(tmp, path)
            else:
                os.rename(tmp, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file of `folder` and write manifest.json, with a hash of its own, last."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_file(file), "size": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    data = {SEAL: "0" * 64, **manifest.to_dict(), "files": files}
    content = json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"
    folder.joinpath(MANIFEST).write_bytes(content.replace(b"0" * 64, _seal(content, "0" * 64).encode(), 1))


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step (Linux renameat2); where that is not to be had, in two renames."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        renameat2 = None
    if renameat2 is not None and renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
        return
    old = b.with_name(f".{b.name}.tmp-old-{os.getpid()}")
    os.rename(b, old)
    os.rename(a, b)
    shutil.rmtree(old, ignore_errors=True)
