"""Full-precision trajectories: x_t and the guided epsilon of every step, from the model's own sampler, streamed to disk.

One safetensors file per batch: x, e float32 (T, B, C, H, W) and the batch's conditions. A file is written step by step under
another name and moved into place when it is whole, so a rerun takes up at the first batch that is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..conditioning import ModelInfo
from ..engine import Array
from ..errors import ModelError, RecipeError
from ..progress import progress
from ..recipe import InputSpec, Recipe
from ..sampler import F64, NoiseSource, sample
from ..schedule import NoiseSchedule
from .engine import TorchEngine
from .memory import check_memory
from .models import Network, one_line

F32 = npt.NDArray[np.float32]
CONDITION = "condition."
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
CONDITION_STREAM = 1 << 48
"""Sample indices stay below it: drawn conditions use noise streams of their own."""
CALIBRATION_STREAM = 1 << 62
"""Added to the index of a trajectory's noise: no sample that a user draws, whatever the seed, is one that was calibrated on."""


class Batch(NamedTuple):
    """indices of the samples; x, e float32 (T, B, C, H, W), memory-mapped; conditions: feeds (B, ...)."""

    indices: range
    x: F32
    e: F32
    conditions: dict[str, Array]


@dataclass(frozen=True)
class Trajectories:
    """A read-only view of collected trajectories; iterating yields Batch after Batch.

    Attributes:
        files: one file per batch, in order of the samples.
        calibration, held_out: sample indices of the two sets; a batch lies in one of them.
    """

    files: tuple[Path, ...]
    calibration: range
    held_out: range

    @property
    def n(self) -> int:
        return len(self.calibration) + len(self.held_out)

    def __iter__(self) -> Iterator[Batch]:
        for file in self.files:
            tensors, metadata = _open_chunk(file)
            start, stop = (int(v) for v in metadata["samples"].split(":"))
            conditions: dict[str, Array] = {
                name.removeprefix(CONDITION): np.array(value) for name, value in tensors.items() if name.startswith(CONDITION)
            }
            yield Batch(range(start, stop), tensors["x"], tensors["e"], conditions)

    def first(self, n: int) -> Batch:
        """The first n trajectories (all if there are fewer) as one batch."""
        found: list[Batch] = []
        for batch in self:
            found.append(batch)
            if batch.indices.stop >= n:
                break
        x, e = (np.concatenate(parts, axis=1)[:, :n] for parts in zip(*((b.x, b.e) for b in found), strict=True))
        conditions = {name: np.concatenate([b.conditions[name] for b in found])[:n] for name in found[0].conditions}
        return Batch(range(x.shape[1]), x, e, conditions)


def collect(network: Network, schedule: NoiseSchedule, recipe: Recipe, folder: Path) -> Trajectories:
    """Sample calibration.size + calibration.held_out trajectories with the full-precision network, guidance on.

    Sample i of calibration.seed gets class i modulo the number of classes; a float condition comes from row i of its InputSpec.values
    (wrapping round), or is standard normal.

    Args:
        folder: where the batches are kept; whole batches of the same model, schedule, guidance and seed are taken over.
    Raises:
        ModelError: NaN or infinite values in a trajectory.
        RecipeError: the batch does not fit into memory, or an InputSpec.values file is unfit.
        OSError: the folder cannot be written.
    """
    spec, scale = recipe.calibration, recipe.sampler.guidance_scale
    network.info.check_guidance(scale)
    calibration, held_out = range(spec.size), range(spec.size, spec.size + spec.held_out)
    batches = [
        range(start, min(start + spec.batch_size, part.stop))
        for part in (calibration, held_out)
        for start in range(part.start, part.stop, spec.batch_size)
    ]
    check_memory(network, max(map(len, batches)), scale)
    folder.mkdir(parents=True, exist_ok=True)
    sources = {s.name: _open_values(s, recipe) for s in network.info.inputs if s.values is not None}
    key = _key(network.info, schedule, recipe)
    files = {b: folder / f"{b.start:06d}-{b.stop:06d}.safetensors" for b in batches}
    todo = [b for b in batches if not _is_whole(files[b], key)]
    with TorchEngine(network, schedule) as engine, progress(len(todo) * len(schedule), "full-precision trajectories", "step") as bar:
        for indices in todo:
            conditions = _conditions(network.info, indices, spec.seed, sources)
            shape = (len(schedule), len(indices), *network.info.sample_shape)
            with _writing_chunk(files[indices], shape, conditions, {"key": key, "samples": f"{indices.start}:{indices.stop}"}) as chunk:

                def on_step(step: int, x: F64, e: F64, chunk: _ChunkWriter = chunk, indices: range = indices) -> None:
                    if not (np.isfinite(x).all() and np.isfinite(e).all()):
                        raise ModelError(
                            f"{network.info.name} runs into NaN or infinite values at step {step} (timestep {schedule.timesteps[step]}) of samples "
                            f"{indices.start} to {indices.stop - 1}: check its weights, scheduler config and guidance_scale"
                        )
                    chunk.write(step, x, e)
                    bar.update()

                with np.errstate(invalid="ignore", over="ignore"):  # on_step says it in a sentence
                    streams = [CALIBRATION_STREAM + i for i in indices]
                    sample(lambda step: engine, schedule, network.info, conditions, streams, seed=spec.seed, guidance_scale=scale, on_step=on_step)
    return Trajectories(tuple(files.values()), calibration, held_out)


def _key(info: ModelInfo, schedule: NoiseSchedule, recipe: Recipe) -> str:
    values = {s.name: hashlib.sha256(recipe.path(s.values).read_bytes()).hexdigest() for s in info.inputs if s.values is not None}
    parts = [info.to_dict(), schedule.to_dict(), recipe.sampler.guidance_scale, recipe.calibration.seed, values]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _conditions(info: ModelInfo, indices: range, seed: int, sources: Mapping[str, Array]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for i, spec in enumerate(s for s in info.inputs if s.num_classes is None):
        if spec.name in sources:
            rows = np.asarray(indices) % len(sources[spec.name])
            tensors[spec.name] = np.asarray(sources[spec.name][rows], np.float32)
        else:
            stream = [CONDITION_STREAM * (i + 1) + index for index in indices]
            tensors[spec.name] = NoiseSource(seed, stream, spec.shape).draw().astype(np.float32)
    # Classes in turn over all samples, whatever the batch.
    labels = [info.labels[index % len(info.labels)] for index in indices] if info.labels else None
    return info.conditions(labels, len(indices), tensors)


def _open_values(spec: InputSpec, recipe: Recipe) -> Array:
    file = recipe.path(spec.values or "")
    try:
        values: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RecipeError(f"values of input {spec.name!r} cannot be read: {one_line(error)}: give a .npy file") from error
    if values.ndim != 1 + len(spec.shape) or values.shape[1:] != spec.shape or not len(values) or values.dtype.kind != "f":
        raise RecipeError(
            f"{file} holds {values.dtype} {values.shape}: input {spec.name!r} needs floats of shape (N, {', '.join(map(str, spec.shape))})"
        )
    if not np.isfinite(values).all():
        raise RecipeError(f"{file} holds NaN or infinite values: input {spec.name!r} needs finite ones")
    return values


class _ChunkWriter:
    """A safetensors file whose tensors x and e are filled in step by step."""

    def __init__(self, file: IO[bytes], shape: Sequence[int], conditions: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._step_bytes = int(np.prod(shape[1:])) * 4
        size = shape[0] * self._step_bytes
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        header["x"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
        header["e"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [size, 2 * size]}
        end = 2 * size
        codes = {dtype: code for code, dtype in DTYPES.items()}
        for name, value in conditions.items():
            header[CONDITION + name] = {"dtype": codes[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
            end += value.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._x, self._e = 8 + len(text), 8 + len(text) + size
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(2 * size, os.SEEK_CUR)
        for value in conditions.values():
            file.write(np.ascontiguousarray(value).tobytes())

    def write(self, step: int, x: F64, e: F64) -> None:
        for start, value in ((self._x, x), (self._e, e)):
            self._file.seek(start + step * self._step_bytes)
            self._file.write(np.ascontiguousarray(value, np.float32).tobytes())


@contextlib.contextmanager
def _writing_chunk(path: Path, shape: Sequence[int], conditions: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[_ChunkWriter]:
    tmp = path.with_suffix(".tmp")
    try:
        with tmp.open("wb") as file:
            yield _ChunkWriter(file, shape, conditions, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _open_chunk(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Memory-mapped tensors and metadata of a chunk.

    Raises:
        ValueError, KeyError, OSError: not a whole chunk.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 0 < length < path.stat().st_size else {}
    metadata = header.pop("__metadata__")
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if path.stat().st_size != end:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: expected {end}")
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        dtype: np.dtype[Any] = DTYPES[entry["dtype"]]
        tensors[name] = np.memmap(path, dtype, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return tensors, metadata


def _is_whole(path: Path, key: str) -> bool:
    try:
        tensors, metadata = _open_chunk(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return metadata.get("key") == key and {"x", "e"} <= tensors.keys()
