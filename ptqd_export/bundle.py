"""Bundle: a folder with manifest.json, ONNX graphs, safetensors tables; written atomically, verified when opened, never pickle.

manifest.json                     what is here, what it was measured for, and a SHA-256 of every other file and of itself
<precision>.<emission>.onnx       one graph per precision and emission (equal ones once); weights are external
update.onnx                       the sampler's step, for backends that keep the state on a device
<precision>.<backend>.engine      finished engines, for backends that build them
weights.safetensors               every distinct tensor of all graphs, once
quantization.safetensors          codes and scales of the quantized layers (the torch backend simulates from them)
tables.safetensors                per precision and numerics: gain, offset, var, the sums they came from, and what the graph computed here
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

from .errors import BundleError, PTQDError
from .external import external_files
from .manifest import FORMAT_VERSION, Manifest
from .noise import Correction, NoiseStats
from .plan import Plan
from .precision import Precision
from .quant import BACKENDS, BUILDERS, Emission

MANIFEST = "manifest.json"
SEAL = "sha256"
"""First key of the manifest: the SHA-256 of its bytes, taken with zeros in its own place."""
TABLES = "tables.safetensors"
QUANTIZATION = "quantization.safetensors"
WEIGHTS = "weights.safetensors"
SUFFIXES = (".json", ".onnx", ".safetensors", ".engine")
"""Of all files that a bundle may hold."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    tables: Mapping[str, npt.NDArray[np.float64]]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest.model.name}, {self.manifest.plan})"

    def file(self, name: str) -> Path:
        return self.path / name

    def correction(self, precision: Precision, emission: Emission) -> Correction:
        """The tables folded into a graph; the identity for float precisions."""
        if precision.is_float:
            return Correction.identity(len(self.manifest.schedule), self.manifest.model.channels)
        return Correction(*(self._table(precision, emission, name) for name in ("gain", "offset", "var")))

    def stats(self, precision: Precision, emission: Emission) -> NoiseStats:
        """The sums that the correction was fitted on."""
        return NoiseStats(*(self._table(precision, emission, name) for name in ("count", "e", "d", "ee", "ed", "dd")))

    def _table(self, precision: Precision, emission: Emission, name: str) -> npt.NDArray[np.float64]:
        n, channels = len(self.manifest.schedule), self.manifest.model.channels
        return self._array(f"{precision}.{emission.numerics(precision)}.{name}", (n,) if name in ("var", "count") else (n, channels))

    def probe(self, precision: Precision, emission: Emission) -> tuple[npt.NDArray[np.float64], float]:
        """What a graph computed where it was built (`runtime.probe`), (2, C, H, W), and the RMS by which right executions may differ from it."""
        head = f"{precision}.{emission.numerics(precision)}"
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
            var[steps.start : steps.stop] = self.correction(precision, BACKENDS[backend]).var[steps.start : steps.stop]
        return schedule.recalibrated_sigmas(var)

    @classmethod
    def open(cls, path: Path | str, verify: bool = True, without: str | None = None) -> Bundle:
        """Read a bundle and check it: format, paths, sizes and (unless `verify` is off) the SHA-256 of every file, the manifest
        among them, and that graphs take their weights from files of the bundle alone.

        Args:
            without: a backend whose finished engines are not looked at, because they are to be built anew.

        Raises:
            BundleError: one line saying what is wrong.
        """
        path = Path(path)
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
        if version < FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}, this ptqd-export reads {FORMAT_VERSION}: rebuild the bundle")
        if version > FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}, this ptqd-export reads {FORMAT_VERSION}: upgrade ptqd-export")
        try:
            manifest = Manifest.from_dict(data)
        except (*MALFORMED, PTQDError) as error:
            raise BundleError(f"{manifest_path} is damaged ({_brief(error)}): rebuild the bundle") from error
        _check_consistent(path, manifest)
        skipped = {a.file for a in manifest.artifacts if a.build is not None and a.backend == without}
        for name, entry in manifest.files.items():
            if name not in skipped:
                _check_file(path, name, entry, verify)
        if verify:
            # After the other checks, which can say more about a manifest that was edited by hand.
            if data.get(SEAL) != _seal(content, str(data.get(SEAL))):
                raise BundleError(f"{manifest_path} does not match its own SHA-256: it was changed or damaged; copy the bundle again or rebuild it")
            loaded = (a.file for a in manifest.artifacts if a.backend not in BUILDERS)
            for name in dict.fromkeys((*(graph.file for graph in manifest.graphs), *loaded)):
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
    for needed in (TABLES, QUANTIZATION, WEIGHTS, *(g.file for g in manifest.graphs), *(a.file for a in manifest.artifacts)):
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


def _check_graph(file: Path, known: Mapping[str, object]) -> None:
    """A graph may read files of the bundle and nothing else: a runtime would open any path that its tensors name."""
    try:
        for name in external_files(memoryview(file.read_bytes()), "model"):
            if name not in known:
                raise BundleError(f"{file} takes weights from {name!r}, which is not a file of the bundle: do not trust it")
    except (IndexError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not an ONNX graph ({error}): rebuild the bundle") from error


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
            if inside and not os.access(path, os.W_OK):
                raise BundleError(f"{path} is read-only: make it writable, or give another folder")
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
def working(out: Path, resume: bool = True) -> Iterator[Path]:
    """`<out>.work` for this process alone; it does not stay, nor do folders made for it, if there is nothing in it to take up.

    Raises:
        BundleError: another build works on the same target.
        PTQDError: in place of an OSError, which is a disk that is full or fails.
    """
    work = out.resolve().with_name(out.name + ".work")
    made = [folder for folder in work.parents if not folder.exists()]
    try:
        with exclusive(work):
            try:
                if not resume:
                    for old in work.iterdir():
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
                yield work
            finally:
                for folder in (*work.glob("*/"), work, *made):
                    with contextlib.suppress(OSError):  # what holds something stays
                        folder.rmdir()
    except OSError as error:
        raise PTQDError(
            f"cannot write {error.filename or out}: {error.strerror or error}: free some space or choose another --out; "
            "the same command takes up what is finished"
        ) from error


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
