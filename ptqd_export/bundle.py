"""Bundle: a folder with manifest.json, ONNX graphs, safetensors tables; written atomically, verified when opened, never pickle.

manifest.json                     what is here, what it was measured for, and a SHA-256 of every other file and of itself
<precision>.<emission>.onnx       one graph per precision and emission; weights are external
weights.safetensors               every distinct tensor of all graphs, once
quantization.safetensors          codes and scales of the quantized layers (the torch backend simulates from them)
tables.safetensors                per precision and emission: gain, offset, var and the sums they came from; what each ort-cpu graph computed here
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

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
from .recipe import _read
from .schedule import PREDICTION_TYPES, NoiseSchedule

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "sha256"
"""First key of the manifest: the SHA-256 of its bytes, taken with zeros in its own place."""
TABLES = "tables.safetensors"
QUANTIZATION = "quantization.safetensors"
WEIGHTS = "weights.safetensors"
SUFFIXES = (".json", ".onnx", ".safetensors")
"""Of all files that a bundle may hold."""


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
        """From parsed JSON, which may come from anywhere: every value that the package uses is checked.

        Raises:
            PTQDError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError: not a manifest; the text says why.
        """
        _check_plain(data)
        plan, sampler = dict(data["plan"]), data["sampler"]
        model = ModelInfo.from_dict(data["model"])
        guidance_scale = _read(float, sampler["guidance_scale"], "guidance_scale")
        model.check_guidance(guidance_scale)
        solver = _read(Literal["ddim", "ddpm"], sampler["solver"], "solver")
        artifacts = tuple(_artifact(a) for a in _read(list, data["artifacts"], "artifacts"))
        _need(any(a.backends for a in artifacts), "no graph that a backend runs")
        steps = _read(tuple[str, ...], plan.pop("steps"), "plan.steps")
        _check_plan_info(plan)
        parity = _read(dict, data["parity"], "parity")
        for name, figures in parity.items():
            _check_figures(name, figures)
        return cls(
            model=model,
            schedule=_schedule(data["schedule"]),
            solver=solver,
            guidance_scale=guidance_scale,
            recalibrate_variance=_read(bool, sampler["recalibrate_variance"], "recalibrate_variance"),
            plan=Plan(tuple(Precision.parse(p) for p in steps)),
            plan_info=plan,
            artifacts=artifacts,
            correction=_read(dict, data["correction"], "correction"),
            parity=parity,
            bops={Precision.parse(p): _read(int, v, "bops") for p, v in data["bops"].items()},
            provenance=_read(dict, data["provenance"], "provenance"),
            files={name: _read(dict, entry, "files") for name, entry in data["files"].items()},
        )


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_plain(value: Any) -> None:
    """No text that a terminal or a file system could not take, and no number that JSON does not have, anywhere in `value`."""
    if isinstance(value, str):
        _need(all(unicodedata.category(c) not in ("Cc", "Cs") for c in value), f"control characters in {value[:100]!a}")
    elif isinstance(value, float):
        _need(math.isfinite(value), f"a number is {value}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)


def _artifact(data: Mapping[str, Any]) -> Artifact:
    backends, ops = _read(tuple[str, ...], data["backends"], "backends"), _read(dict, data["ops"], "ops")
    file, lowering, runtime = (_read(str, data[name], name) for name in ("file", "lowering", "runtime"))
    time_ms = _read(float | None, data["time_ms"], "time_ms")
    return Artifact(Precision.parse(data["precision"]), Emission(data["emission"]), backends, file, lowering, runtime, ops, time_ms)


def _schedule(data: Mapping[str, Any]) -> NoiseSchedule:
    for name, kind in (("timesteps", tuple[int, ...]), ("alphas_cumprod", tuple[float, ...]), ("alphas_cumprod_prev", tuple[float, ...])):
        _read(kind, data[name], name)
    _read(bool, data["rederive_epsilon"], "rederive_epsilon")
    eta, clip = _read(float, data["eta"], "eta"), _read(float | None, data["clip_sample"], "clip_sample")
    schedule = NoiseSchedule.from_dict(data)
    t, a, p = schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    _need(1 <= len(t) == len(a) == len(p), f"the schedule has {len(t)} timesteps, {len(a)} alphas_cumprod and {len(p)} alphas_cumprod_prev")
    _need(bool((t >= 0).all()), "a timestep is negative")
    _need(bool(((a > 0) & (a < 1)).all()), "alphas_cumprod leaves (0, 1)")
    _need(bool(((p > 0) & (p <= 1)).all()), "alphas_cumprod_prev leaves (0, 1]")
    _need(0 <= eta <= 1, f"eta {eta} leaves [0, 1]")
    _need(clip is None or clip > 0, f"clip_sample is {clip}")
    _need(schedule.prediction_type in PREDICTION_TYPES, f"prediction_type {schedule.prediction_type!r}")
    return schedule


def _check_plan_info(info: Mapping[str, Any]) -> None:
    """What `inspect` prints and plots."""
    for name in ("rule", "objective", "cost"):
        _read(str, info[name], f"plan.{name}")
    bops, full = (_read(float, info[name], f"plan.{name}") for name in ("bops", "bops_fp32"))
    _need(bops >= 0 and full > 0, f"bit operations {bops} of {full}")
    for point in _read(list, info["front"], "plan.front"):
        for name, kind in (("cost", float), ("error", float), ("plan", str)):
            _read(kind, point[name], f"plan.front.{name}")


def _check_figures(name: str, figures: Mapping[str, Any]) -> None:
    """What `inspect` prints of the parity gate."""
    where = f"parity.{name}"
    if "largest_relative_error" in _read(dict, figures, where):
        _read(float, figures["largest_relative_error"], where)
        return
    _read(int, figures["layers"]["layers"], where)
    _read(float, figures["layers"]["share_apart"], where)
    largest = _read(dict, figures["noise"]["largest_z"], where)
    _need(bool(largest), f"{where} has no statistics")
    for value in largest.values():
        _read(float, value, where)


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
        n, channels = len(self.manifest.schedule), self.manifest.model.channels
        return self._array(f"{precision}.{emission}.{name}", (n,) if name in ("var", "count") else (n, channels))

    def probe(self, precision: Precision, emission: Emission) -> tuple[npt.NDArray[np.float64], float]:
        """What a graph computed where it was built (`runtime.probe`), (2, C, H, W), and the RMS by which right executions may differ from it."""
        head = f"{precision}.{emission}"
        return self._array(f"{head}.probe", (2, *self.manifest.model.sample_shape)), float(self._array(f"{head}.probe_noise", (1,))[0])

    def _array(self, key: str, expected: tuple[int, ...]) -> npt.NDArray[np.float64]:
        if key not in self.tables:
            raise BundleError(f"{self.path / TABLES} has no table {key}: rebuild the bundle")
        table = self.tables[key]
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
        except OSError as error:
            raise BundleError(f"{manifest_path} cannot be read ({error.strerror})") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{manifest_path} has no format_version: rebuild the bundle")
        if version > FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}, this ptqd-export reads up to {FORMAT_VERSION}: upgrade ptqd-export")
        try:
            manifest = Manifest.from_dict(data)
        except (*MALFORMED, PTQDError) as error:
            raise BundleError(f"{manifest_path} is damaged ({_brief(error)}): rebuild the bundle") from error
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
            tables = {k: v.astype(np.float64) for k, v in load_safetensors(path.joinpath(TABLES).read_bytes()).items()}
        except (SafetensorError, *MALFORMED) as error:
            raise BundleError(f"{path / TABLES} is damaged ({_brief(error)}): rebuild the bundle") from error
        for name, table in tables.items():
            if not np.isfinite(table).all():
                raise BundleError(f"{path / TABLES} is damaged (table {name!a} holds NaN or infinite values): rebuild the bundle")
        return cls(path, manifest, tables)


MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What reading a file of another shape than was meant may end in; UnicodeError and OverflowError are among them."""


def _brief(error: Exception) -> str:
    """An error as part of a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '...'}"


def _check_consistent(path: Path, manifest: Manifest) -> None:
    n = len(manifest.schedule)
    if len(manifest.plan) != n:
        raise BundleError(f"{path / MANIFEST} is damaged: {len(manifest.plan)} plan steps for {n} timesteps; rebuild the bundle")
    for needed in (TABLES, QUANTIZATION, WEIGHTS, *(a.file for a in manifest.artifacts)):
        if needed not in manifest.files:
            raise BundleError(f"{path / MANIFEST} is damaged: it names {needed[:100]} but has no hash of it; rebuild the bundle")


def _check_file(root: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(f"{root / MANIFEST} names {name!r}, which leaves the bundle: do not trust it")
    try:
        _check_content(root, root / name, entry, verify)
    except (OSError, *MALFORMED) as error:
        raise BundleError(f"{root / MANIFEST} names {name[:100]!a}, which cannot be read ({_brief(error)}): rebuild the bundle") from error


def _check_content(root: Path, file: Path, entry: Mapping[str, Any], verify: bool) -> None:
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


def check_target(path: Path) -> Path:
    """Refuse, before any work, a target that cannot or must not be written. Leaves nothing behind.

    Returns:
        the target, absolute and without links.
    Raises:
        BundleError: a file, the current folder or one above it, a folder that is not a bundle, or no permission.
    """
    try:
        path, here = path.resolve(), Path.cwd()
        if path == here or path in here.parents:
            raise BundleError(f"{path} is the current folder or one above it, which a bundle would replace: give a folder of its own")
        if path.exists() and not path.is_dir():
            raise BundleError(f"{path} is a file: give a folder for the bundle")
        if path.is_dir():
            inside = list(path.iterdir())
            # The suffixes: many a folder that is no bundle has a manifest.json.
            if inside and not ((path / MANIFEST).is_file() and all(file.suffix in SUFFIXES for file in inside)):
                raise BundleError(f"{path} is a folder with other things in it: give an empty or new folder, or an older bundle to replace")
        parent = next(folder for folder in path.parents if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(f"cannot write to {str(path)[:200]!a} ({_brief(error)}); give another folder") from error
    try:
        probe = parent / f".{path.name}.probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise BundleError(f"cannot write to {parent}: {error.strerror}; give a folder you may write to") from error
    return path


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
