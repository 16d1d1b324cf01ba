"""Conditions from a dataset: Parquet files with a row per sample, read where a shard is sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.engine import Array
from ..core.model import ModelInfo
from ..errors import RecipeError
from ..files import digest, sha256_file
from ..typed import brief
from .formats import PROMPT, pyarrow


@dataclass(frozen=True)
class Part:
    """A row group of a file, and the index of its first row in the dataset."""

    file: Path
    group: int
    start: int
    rows: int


@dataclass(frozen=True)
class Conditions:
    """A dataset of conditions: sample i has row i, in the order of the files' names.

    Attributes:
        parts: all row groups.
        columns: those that are read: inputs of the model by name, or "prompt".
        sha256: of the files.
    """

    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @classmethod
    def open(cls, path: Path, model: ModelInfo, text: bool) -> Conditions:
        """A Parquet file, or a folder of them.

        Args:
            text: the bundle takes prompts.
        Raises:
            BackendUnavailable: pyarrow is not installed.
            RecipeError: there are none, they cannot be read, or have no column that the model takes.
        """
        _, pq = pyarrow("a dataset of conditions")
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise RecipeError(f"{path} holds no *.parquet: give a Parquet file, or a folder of them")
        names = {spec.name for spec in model.inputs} | ({PROMPT} if text else set())
        parts: list[Part] = []
        columns: tuple[str, ...] = ()
        start = 0
        for file in files:
            try:
                found = pq.ParquetFile(file)
                has = found.schema_arrow.names
                sizes = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
                found.close()
            except (OSError, ValueError) as error:
                raise RecipeError(f"{file} cannot be read as Parquet ({brief(str(error))})") from error
            used = tuple(sorted(names & set(has)))
            if not used or (parts and used != columns):
                raise RecipeError(
                    f"{file} has the columns {brief(', '.join(has))}: expected "
                    + (", ".join(columns) or f"some of {', '.join(sorted(names)) or 'none'}")
                )
            columns = used
            for group, rows in enumerate(sizes):
                parts.append(Part(file.resolve(), group, start, rows))
                start += rows
        sha256 = digest(*(sha256_file(file) for file in files))
        return cls(tuple(parts), columns, sha256)

    def read(self, rows: range, model: ModelInfo) -> tuple[Mapping[str, list[Any]], dict[str, Array]]:
        """Rows as lists (classes, prompts), and as arrays (len(rows), *shape) (tensors), by column.

        Raises:
            RecipeError: a value is missing or of another kind or shape, or the files have changed.
        """
        _, pq = pyarrow("a dataset of conditions")
        found: dict[str, list[Any]] = {name: [] for name in self.columns}
        for part in self.parts:
            first, last = max(rows.start, part.start), min(rows.stop, part.start + part.rows)
            if first < last:
                try:
                    with pq.ParquetFile(part.file) as file:
                        group = file.read_row_group(part.group, columns=list(self.columns))
                    group = group.slice(first - part.start, last - first)
                    for name, values in found.items():  # the files may have other types of numbers
                        values += group[name].to_pylist()
                except (OSError, ValueError, KeyError) as error:
                    raise RecipeError(f"{part.file} cannot be read ({brief(str(error))})") from error
        if {len(values) for values in found.values()} != {len(rows)}:
            raise RecipeError(f"{self.parts[0].file.parent} has other rows than when the run began")
        shapes = {spec.name: spec.shape for spec in model.inputs if spec.num_classes is None}
        lists: dict[str, list[Any]] = {}
        tensors: dict[str, Array] = {}
        for name, values in found.items():
            bad = next((i for i, value in enumerate(values) if not _fits(value, name, shapes)), None)
            if bad is not None:
                raise RecipeError(
                    f"row {rows.start + bad} of the conditions has {name} {brief(values[bad])}: expected "
                    + _wanted(name, shapes)
                )
            if name in shapes:
                tensors[name] = np.array(values, np.float32).reshape(len(rows), *shapes[name])
            else:
                lists[name] = values
        return lists, tensors


def _fits(value: Any, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if name == PROMPT:
        return isinstance(value, str)
    if name not in shapes:
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        array = np.array(value, np.float32)
    except (TypeError, ValueError):
        return False
    return array.size == math.prod(shapes[name]) and bool(np.isfinite(array).all())


def _wanted(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name == PROMPT:
        return "a text"
    return f"{math.prod(shapes[name])} finite numbers" if name in shapes else "a class number"
