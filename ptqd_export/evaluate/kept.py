"""Samples of an evaluation on disk: drawn once, kept by batch, taken up after a stop.

Each candidate has a folder, named by a key of everything that decides its samples; a file holds one batch,
float32, named by its range of indices. More samples later are added to those that are there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS, TORCH
from ..core.engine import Array
from ..core.pool import Pool
from ..errors import PTQDError
from ..files import digest, writing_file
from ..runtime import Prompted, draw
from ..typed import to_plain
from .candidates import Candidate

F32 = npt.NDArray[np.float32]
BATCH = re.compile(r"([0-9]{6,})-([0-9]{6,})\.npy")


@dataclass(frozen=True)
class Setting:
    """How samples are drawn.

    Attributes:
        bundle: an opened bundle.
        backend: that runs it.
        seed: of the noise; sample i gets class i modulo the number of classes.
        num_samples: indices 0 to num_samples - 1.
        tensors: float conditions, one row per sample.
        work: folder of the samples.
        prompted: prompts, in turn, and their conditions.
        batch_size: samples at a time.
        workers, device: as for `run`.
        pool: samples in place of `workers`.
    """

    bundle: Bundle
    backend: str
    seed: int
    num_samples: int
    work: Path
    batch_size: int
    tensors: Mapping[str, Array] = field(default_factory=dict)
    workers: int = 1
    device: int = 0
    prompted: Prompted | None = None
    pool: Pool | None = None

    def conditions(self, indices: range) -> dict[str, Array]:
        """Feeds of the conditioning inputs for samples."""
        tensors: dict[str, Array] = {n: v[indices.start : indices.stop] for n, v in self.tensors.items()}
        if self.prompted is not None:
            tensors |= self.prompted.of(indices)
        model = self.bundle.manifest.sampling.model
        return model.conditions(model.labels_in_turn(indices), len(indices), tensors)

    def key(self, *more: str) -> str:
        """Hash of what decides samples, besides their number."""
        conditions = [
            part
            for name, value in sorted(self.tensors.items())
            for part in (name, value.dtype.str, str(value.shape[1:]), value.tobytes())
        ]
        if self.prompted is not None:
            for table in (self.prompted.conditions, self.prompted.null):
                conditions += [part for n, v in sorted(table.items()) for part in (n, v.tobytes())]
        libraries = ("ptqd-export", "numpy", *BACKENDS[self.backend].distributions)
        return digest(self.backend, str(self.seed), *map(_version, libraries), *conditions, *more)[:20]


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


def missing_steps(setting: Setting, candidate: Candidate) -> int:
    """Sample steps that are still to be done for a candidate."""
    _, there = _read(setting, candidate)
    return int((~there).sum()) * len(setting.bundle.manifest.sampling)


def draw_kept(setting: Setting, candidate: Candidate, advance: Callable[[int], None]) -> F32:
    """The samples of a candidate, float32 (N, C, H, W), not clamped; those that are kept are not drawn again.

    Raises:
        PTQDError: as `run`, or the folder cannot be written.
    """
    x, there = _read(setting, candidate)
    folder = _folder(setting, candidate)
    drawing = draw(
        setting.bundle,
        # Of a pool's size nothing depends: batches of another size have other last bits.
        _batches(there, setting.batch_size, 1 if setting.pool else setting.workers),
        seed=setting.seed,
        workers=setting.workers,
        backend=setting.backend,
        plan=candidate.plan,
        tensors=setting.tensors,
        prompted=setting.prompted,
        device=setting.device,
        replaced=candidate.replaced(setting.bundle, setting.backend),
        pool=setting.pool,
        advance=advance,
    )
    with contextlib.closing(drawing) as drawn:
        for indices, samples in drawn:
            x[indices.start : indices.stop] = samples
            store(folder / f"{indices.start:06d}-{indices.stop:06d}.npy", x[indices.start : indices.stop])
    return x


def store(path: Path, array: npt.NDArray[np.floating]) -> None:
    """Write an array as .npy, whole or not at all.

    Raises:
        PTQDError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        raise PTQDError(
            f"cannot write {path}: {error.strerror}: free some space or choose another --out; the same "
            "command takes up what is finished"
        ) from error


def load(path: Path, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.floating] | None:
    """The array in a file, or None where there is no such array of this shape and type."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    right = isinstance(array, np.ndarray) and array.shape == shape and array.dtype == np.dtype(dtype)
    return array if right and np.isfinite(array).all() else None


def _folder(setting: Setting, candidate: Candidate) -> Path:
    return setting.work / setting.key(candidate.name, *_deciding(setting, candidate))


def _deciding(setting: Setting, candidate: Candidate) -> list[str]:
    """What decides a candidate's samples in its bundle: another bundle may hold the same engines."""
    bundle, backend, m = setting.bundle, setting.backend, setting.bundle.manifest
    held = [bundle.seal]  # of a simulation, all of the bundle
    if backend != TORCH:
        files = [m.artifact(precision, backend).file for precision in candidate.plan.precisions]
        graphs = {graph.file: graph.digest for graph in m.graphs}
        held = [graphs.get(file, m.files[file].sha256) for file in files]
    emission = BACKENDS[backend].emission
    own = [
        array.tobytes()
        for precision in candidate.plan.precisions
        if not precision.is_float
        for array in vars(bundle.correction(precision, emission)).values()
    ]
    sigmas = bundle.sigmas(backend, candidate.plan).tobytes()
    plain = json.dumps([to_plain(m.sampling), to_plain(m.pipeline)])
    return [plain, *held, digest(sigmas, *own)]


def _read(setting: Setting, candidate: Candidate) -> tuple[F32, npt.NDArray[np.bool_]]:
    """The samples that are kept, in their places, and which those are."""
    n, shape = setting.num_samples, setting.bundle.picture_shape
    x, there = np.zeros((n, *shape), np.float32), np.zeros(n, np.bool_)
    folder = _folder(setting, candidate)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = BATCH.fullmatch(file.name)
        start, stop = (int(match[1]), int(match[2])) if match else (0, 0)
        if start >= min(stop, n):
            continue
        samples = load(file, (stop - start, *shape), "float32")
        if samples is not None:
            end = min(stop, n)
            x[start:end], there[start:end] = samples[: end - start], True
    return x, there


def _batches(there: npt.NDArray[np.bool_], size: int, workers: int) -> list[range]:
    """What is missing, in batches of consecutive indices; so many that every worker gets one."""
    missing = np.flatnonzero(~there)
    size = max(1, min(size, -(-len(missing) // workers)))
    batches: list[range] = []
    for i in map(int, missing):
        if batches and batches[-1].stop == i and len(batches[-1]) < size:
            batches[-1] = range(batches[-1].start, i + 1)
        else:
            batches.append(range(i, i + 1))
    return batches
