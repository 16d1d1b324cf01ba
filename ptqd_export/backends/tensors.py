"""What an engine is given: found by name, checked against what its graph takes; and when it is too much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.engine import TensorSpec
from ..errors import BackendUnavailable, GraphError


def find(path: Path, spec: TensorSpec, values: Mapping[str, Any], what: str) -> Any:
    """The input or buffer of this name.

    Raises:
        GraphError: there is none.
    """
    value = values.get(spec.name)
    if value is None:
        raise GraphError(f"{path} needs the {what} {spec.name!r}: got {', '.join(values) or 'none'}")
    return value


def check(path: Path, spec: TensorSpec, dtype: str, got: tuple[int, ...]) -> None:
    """Compare numpy's name of a dtype, and a shape, with what the graph in `path` takes.

    Raises:
        GraphError: they differ.
    """
    fits = len(got) == len(spec.shape) and all(
        want in (None, d) for want, d in zip(spec.shape, got, strict=True)
    )
    if dtype != spec.dtype or not fits:
        shape = "(" + ", ".join("any" if d is None else str(d) for d in spec.shape) + ")"
        raise GraphError(f"{path} takes {spec.name!r} as {spec.dtype} {shape}: got {dtype} {got}")


def out_of_memory(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> BackendUnavailable:
    """For an engine whose memory ran out on inputs of these shapes; on none while it was loaded."""
    got = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "loading"
    return BackendUnavailable(
        f"memory ran out in {path} on {got}: lower the batch size, or end other programs that hold it"
    )
