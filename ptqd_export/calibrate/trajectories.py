"""Full-precision trajectories: x_t and the guided epsilon of every step, streamed to disk.

They come from the model's own sampler. Each batch is one safetensors file: x, e float32 (T, B, C, H, W) and
the conditions. A file is written step by step under another name and moved into place when it is complete, so
a rerun continues at the first missing batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.engine import Array, Engine
from ..core.model import InputSpec, ModelInfo
from ..core.pool import Results
from ..core.sampling import F64, NoiseSource, Sampling
from ..errors import ModelError, RecipeError
from ..files import digest, sha256_file, writing_file
from ..progress import progress
from ..recipe import Recipe
from ..typed import to_plain
from .memory import check_memory
from .network import Network, one_line
from .torch_engine import TorchEngine

F32 = npt.NDArray[np.float32]
Traced = Callable[[Sampling, int, Iterator[tuple[range, Mapping[str, Array]]]], Results]
CONDITION = "condition."
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
CONDITION_STREAM = 1 << 48
"""First noise stream of drawn conditions: sample indices stay below it, so streams are never shared."""
CALIBRATION_STREAM = 1 << 62
"""Added to the index of a trajectory's noise.

So no sample that a user draws, whatever the seed, is one that was calibrated on.
"""


class Batch(NamedTuple):
    """One batch of trajectories.

    Attributes:
        indices: sample indices.
        x, e: x_t and the guided epsilon, float32 (T, B, C, H, W), memory-mapped.
        conditions: feeds (B, ...).
    """

    indices: range
    x: F32
    e: F32
    conditions: dict[str, Array]


@dataclass(frozen=True)
class Trajectories:
    """A read-only view of collected trajectories; iteration yields one Batch after another.

    Attributes:
        files: one file per batch, in sample order.
        calibration, held_out: sample indices of the two sets; a batch belongs to one of them.
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
                name.removeprefix(CONDITION): np.array(value)
                for name, value in tensors.items()
                if name.startswith(CONDITION)
            }
            yield Batch(range(start, stop), tensors["x"], tensors["e"], conditions)

    def first(self, n: int) -> Batch:
        """The first n trajectories as one batch; all of them if there are fewer."""
        found: list[Batch] = []
        for batch in self:
            found.append(batch)
            if batch.indices.stop >= n:
                break
        x, e = (
            np.concatenate(parts, axis=1)[:, :n] for parts in zip(*((b.x, b.e) for b in found), strict=True)
        )
        conditions = {
            name: np.concatenate([b.conditions[name] for b in found])[:n] for name in found[0].conditions
        }
        return Batch(range(x.shape[1]), x, e, conditions)


def collect(
    network: Network,
    sampling: Sampling,
    recipe: Recipe,
    folder: Path,
    prompted: Mapping[str, Array] | None = None,
    traced: Traced | None = None,
) -> Trajectories:
    """Sample calibration.size + calibration.held_out trajectories in full precision, with guidance.

    Sample i of calibration.seed gets class i modulo the number of classes; a float condition is row i of its
    InputSpec.values (modulo the number of rows), its default, or standard normal noise.

    Args:
        folder: where the batches are kept; complete batches of the same model, schedule, guidance and seed
            are reused.
        prompted: conditions (P, *shape) of prompts, which take the place of values.
        traced: has others sample the batches that are missing (`pooled.Workers.trajectories`).
    Raises:
        ModelError: a trajectory holds NaN or infinite values.
        RecipeError: the batch does not fit into memory, or an InputSpec.values file is not usable.
        OSError: the folder cannot be written.
    """
    spec, schedule = recipe.calibration, sampling.schedule
    calibration, held_out = range(spec.size), range(spec.size, spec.size + spec.held_out)
    batches = [
        range(start, min(start + spec.batch_size, part.stop))
        for part in (calibration, held_out)
        for start in range(part.start, part.stop, spec.batch_size)
    ]
    check_memory(network, max(map(len, batches)), sampling.branches)
    folder.mkdir(parents=True, exist_ok=True)
    sources = {s.name: _open_values(s, recipe) for s in network.info.inputs if s.values is not None}
    sources |= prompted or {}
    key = _key(sampling, recipe, prompted or {})
    files = {b: folder / f"{b.start:06d}-{b.stop:06d}.safetensors" for b in batches}
    todo = [b for b in batches if not _is_whole(files[b], key)]
    given = ((b, _conditions(network.info, b, spec.seed, sources)) for b in todo)
    with progress(len(todo) * len(schedule), "full-precision trajectories", "step") as bar:
        if traced is not None:
            with contextlib.closing(traced(sampling, spec.seed, given)) as found:
                for (indices, own), (x, e) in found:
                    with _writing(files[indices], key, x.shape, indices, own) as chunk:
                        for step in range(len(schedule)):
                            chunk.write(step, x[step], e[step])
                    bar.update(len(schedule))
        else:
            with TorchEngine(network.module, sampling) as engine:
                for indices, own in given:
                    shape = (len(schedule), len(indices), *network.info.sample_shape)
                    with _writing(files[indices], key, shape, indices, own) as chunk:

                        def on_step(step: int, x: F64, e: F64, chunk: _ChunkWriter = chunk) -> None:
                            chunk.write(step, x, e)
                            bar.update()

                        trace(engine, sampling, indices, own, spec.seed, on_step)
    return Trajectories(tuple(files.values()), calibration, held_out)


def trace(
    engine: Engine,
    sampling: Sampling,
    indices: range,
    conditions: Mapping[str, Array],
    seed: int,
    on_step: Callable[[int, F64, F64], None],
) -> None:
    """Sample a batch of calibration's trajectories; `on_step` gets each step's number, x_t and epsilon.

    Raises:
        ModelError: x_t or epsilon holds NaN or infinite values.
    """

    def check(step: int, x: F64, e: F64) -> None:
        if not (np.isfinite(x).all() and np.isfinite(e).all()):
            raise ModelError(
                f"{sampling.model.name} runs into NaN or infinite values at step {step} (timestep "
                f"{sampling.schedule.timesteps[step]}) of samples "
                f"{indices.start} to {indices.stop - 1}: check its weights, scheduler config and "
                "guidance_scale"
            )
        on_step(step, x, e)

    with np.errstate(invalid="ignore", over="ignore"):  # `check` raises instead of this warning
        streams = [CALIBRATION_STREAM + i for i in indices]
        sampling.sample(lambda step: engine, dict(conditions), streams, seed=seed, on_step=check)


def _key(sampling: Sampling, recipe: Recipe, prompted: Mapping[str, Array]) -> str:
    given = {spec.name: recipe.path(spec.values) for spec in sampling.model.inputs if spec.values is not None}
    parts = [
        to_plain(sampling),
        recipe.calibration.seed,
        {name: sha256_file(file) for name, file in given.items()},
        {name: digest(value.tobytes()) for name, value in prompted.items()},
        {name: digest(value.tobytes()) for name, value in sampling.model.null.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _conditions(info: ModelInfo, indices: range, seed: int, sources: Mapping[str, Array]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for i, spec in enumerate(s for s in info.inputs if s.num_classes is None):
        if spec.name in sources:
            rows = np.asarray(indices) % len(sources[spec.name])
            tensors[spec.name] = np.asarray(sources[spec.name][rows], np.float32)
        elif not spec.default:
            stream = [CONDITION_STREAM * (i + 1) + index for index in indices]
            tensors[spec.name] = NoiseSource(seed, stream, spec.shape).draw().astype(np.float32)
    # Classes go in turn over all samples, not within a batch.
    return info.conditions(info.labels_in_turn(indices), len(indices), tensors)


def _open_values(spec: InputSpec, recipe: Recipe) -> Array:
    file = recipe.path(spec.values or "")
    try:
        values: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RecipeError(
            f"values of input {spec.name!r} cannot be read: {one_line(error)}: give a .npy file"
        ) from error
    if (
        values.ndim != 1 + len(spec.shape)
        or values.shape[1:] != spec.shape
        or not len(values)
        or values.dtype.kind != "f"
    ):
        raise RecipeError(
            f"{file} holds {values.dtype} {values.shape}: input {spec.name!r} needs floats of shape (N, "
            f"{', '.join(map(str, spec.shape))})"
        )
    if not np.isfinite(values).all():
        raise RecipeError(f"{file} holds NaN or infinite values: input {spec.name!r} needs finite ones")
    return values


@contextlib.contextmanager
def _writing(
    file: Path, key: str, shape: tuple[int, ...], indices: range, conditions: Mapping[str, Array]
) -> Iterator[_ChunkWriter]:
    with writing_file(file) as target:
        about = {"key": key, "samples": f"{indices.start}:{indices.stop}"}
        yield _ChunkWriter(target, shape, conditions, about)


class _ChunkWriter:
    """A safetensors file whose tensors x and e are written step by step."""

    def __init__(
        self,
        file: BinaryIO,
        shape: Sequence[int],
        conditions: Mapping[str, Array],
        metadata: Mapping[str, str],
    ) -> None:
        self._file = file
        self._step_bytes = int(np.prod(shape[1:])) * 4
        size = shape[0] * self._step_bytes
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        header["x"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
        header["e"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [size, 2 * size]}
        end = 2 * size
        codes = {dtype: code for code, dtype in DTYPES.items()}
        for name, value in conditions.items():
            header[CONDITION + name] = {
                "dtype": codes[value.dtype],
                "shape": list(value.shape),
                "data_offsets": [end, end + value.nbytes],
            }
            end += value.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._x, self._e = 8 + len(text), 8 + len(text) + size
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(2 * size, os.SEEK_CUR)
        for value in conditions.values():
            file.write(np.ascontiguousarray(value).tobytes())

    def write(self, step: int, x: npt.NDArray[np.floating], e: npt.NDArray[np.floating]) -> None:
        for start, value in ((self._x, x), (self._e, e)):
            self._file.seek(start + step * self._step_bytes)
            self._file.write(np.ascontiguousarray(value, np.float32).tobytes())


def _open_chunk(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Memory-mapped tensors and metadata of a chunk.

    Raises:
        ValueError, KeyError, OSError: the chunk is incomplete.
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
        tensors[name] = np.memmap(
            path, dtype, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        )
    return tensors, metadata


def _is_whole(path: Path, key: str) -> bool:
    try:
        tensors, metadata = _open_chunk(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return metadata.get("key") == key and {"x", "e"} <= tensors.keys()
