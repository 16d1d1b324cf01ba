"""The arrays of a bundle beside its graphs, written and read here alone.

tables.safetensors, keys "<precision>.<emission whose numerics>.<name>":
    gain, offset, var                float64, `Correction`
    count, e, d, ee, ed, dd          float64, `NoiseStats` that the correction was fitted on
    probe, probe_noise               float32 (2, C, H, W) and float64 (1,), `Probe`
and beside them "null.<input>", float32: the empty prompt's embedding at an input that text is made for, which
stands for no condition there (unless zeros do: `Pipeline.force_zeros`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save

from ..core.backend import Emission
from ..core.noise import Correction, NoiseStats
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..errors import BundleError
from ..typed import brief

TABLES = "tables.safetensors"
QUANTIZATION = "quantization.safetensors"

NULL = "null."
LARGEST = 1e30
"""Of all numbers in tables: sums over a run's elements are far below, and products of two do not overflow."""
SMALLEST = 1e-100
"""Of all numbers in tables but 0: products of two float32 are above, and no ratio overflows."""
Arrays = Mapping[str, npt.NDArray[Any]]
F64 = npt.NDArray[np.float64]
Key = tuple[Precision, Emission]
"""Of tables: a precision, and the emission whose numerics they hold for."""
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What reading a file of another form than was meant may end in; UnicodeError and OverflowError are among
them."""


@dataclass(frozen=True)
class Probe:
    """What a graph predicts at step 0 for fixed inputs (`runtime.probe`), where the bundle was built.

    Attributes:
        epsilon: (2, C, H, W).
        allowed: RMS by which right executions may differ from it.
    """

    epsilon: npt.NDArray[np.floating]
    allowed: float


@dataclass(frozen=True)
class Tables:
    """The tables of an opened bundle.

    Attributes:
        file: for messages.
        sampling: what they hold for; gives their shapes.
        arrays: float64, by the keys above.
    """

    file: Path
    sampling: Sampling
    arrays: Mapping[str, F64]

    @classmethod
    def parse(
        cls,
        data: bytes,
        file: Path,
        sampling: Sampling,
        precisions: Iterable[Precision],
        texts: Iterable[str] = (),
    ) -> Tables:
        """From the content of `file`.

        Args:
            precisions: that the bundle holds.
            texts: inputs that text is made for.
        Raises:
            BundleError: not safetensors, a table that is missing, unknown or of another type or shape, or a
                value that is not finite, too large or too small.
        """
        _check_header(data, file, table_layout(sampling, precisions, texts))
        arrays = {name: array.astype(np.float64) for name, array in parse_arrays(data, file).items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise BundleError(
                    f"{file} is damaged (table {brief(name)} holds NaN or infinite values): "
                    "rebuild the bundle"
                )
            sizes = np.abs(array[array != 0])
            if sizes.max(initial=0) > LARGEST or sizes.min(initial=1) < SMALLEST:
                raise BundleError(
                    f"{file} is damaged (table {brief(name)} holds values above {LARGEST:g} or below "
                    f"{SMALLEST:g}): rebuild the bundle"
                )
        return cls(file, sampling, arrays)

    def correction(self, precision: Precision, emission: Emission) -> Correction:
        """The correction that is folded into a graph; the identity for float precisions.

        Raises:
            BundleError: there is none, or of another shape.
        """
        if precision.is_float:
            return Correction.identity(len(self.sampling), self.sampling.model.channels)
        return Correction(*self._all(Correction, precision, emission))

    def stats(self, precision: Precision, emission: Emission) -> NoiseStats:
        """The sums that the correction was fitted on.

        Raises:
            BundleError: there are none, or of another shape.
        """
        return NoiseStats(*self._all(NoiseStats, precision, emission))

    def probe(self, precision: Precision, emission: Emission) -> Probe:
        """What a graph computed where it was built.

        Raises:
            BundleError: there is none, or of another shape.
        """
        allowed = self._array(precision, emission, "probe_noise")
        return Probe(self._array(precision, emission, "probe"), float(allowed[0]))

    @property
    def null(self) -> dict[str, npt.NDArray[np.float32]]:
        """The empty prompt's embedding, by input that text is made for."""
        return {
            name.removeprefix(NULL): array.astype(np.float32)
            for name, array in self.arrays.items()
            if name.startswith(NULL)
        }

    def _all(self, kind: type, precision: Precision, emission: Emission) -> list[F64]:
        return [self._array(precision, emission, field.name) for field in fields(kind)]

    def _array(self, precision: Precision, emission: Emission, name: str) -> F64:
        key = _key(precision, emission, name)
        if key not in self.arrays:
            raise BundleError(
                f"{self.file} has no table {key}: rebuild the bundle with --precision {precision}"
            )
        return self.arrays[key]


def table_layout(
    sampling: Sampling, precisions: Iterable[Precision], texts: Iterable[str] = ()
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{key: (safetensors type, shape)} of every table that a bundle has."""
    steps, channels = len(sampling), sampling.model.channels
    shapes = {spec.name: spec.shape for spec in sampling.model.inputs}
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{NULL}{name}": ("F32", shapes[name]) for name in texts
    }
    for precision in precisions:
        for emission in dict.fromkeys(emission.numerics(precision) for emission in Emission):
            layout[_key(precision, emission, "probe")] = "F32", (2, *sampling.model.sample_shape)
            layout[_key(precision, emission, "probe_noise")] = "F64", (1,)
            for field in () if precision.is_float else (*fields(Correction), *fields(NoiseStats)):
                per_step = field.name in ("var", "count")
                layout[_key(precision, emission, field.name)] = (
                    "F64",
                    (steps,) if per_step else (steps, channels),
                )
    return layout


def layout_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Most bytes that a file of these tables has."""
    arrays = sum(math.prod(shape) * (4 if kind == "F32" else 8) for kind, shape in layout.values())
    return arrays + HEADER_BYTES * (len(layout) + 1)


HEADER_BYTES = 256
"""Most bytes that one table takes in the header."""


def _check_header(data: bytes, file: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except MALFORMED as error:
        raise BundleError(f"{file} is damaged ({type(error).__name__}): rebuild the bundle") from error
    for name in layout:
        if name not in found:
            raise BundleError(f"{file} has no table {brief(name)}: rebuild the bundle")
    for name in found:
        if name not in layout:
            raise BundleError(f"{file} has an unknown table {brief(name)}: rebuild the bundle")
    for name, expected in layout.items():
        if found[name] != expected:
            raise BundleError(
                f"{file} has a table {name} of type and shape {brief(found[name])}, expected {expected}: "
                "rebuild the bundle"
            )


def _key(precision: Precision, emission: Emission, name: str) -> str:
    return f"{precision}.{emission.numerics(precision)}.{name}"


def parse_arrays(data: bytes, file: Path) -> Arrays:
    """The arrays of a safetensors file, from its content.

    Raises:
        BundleError: it is none.
    """
    try:
        return parse_safetensors(data)
    except (SafetensorError, *MALFORMED) as error:
        raise BundleError(
            f"{file} is damaged ({type(error).__name__}: {brief(str(error))}): rebuild the bundle"
        ) from error


def write_tables(
    folder: Path,
    corrections: Mapping[Key, tuple[Correction, NoiseStats]],
    probes: Mapping[Key, Probe],
    null: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    """Write the tables of a bundle into its folder.

    Args:
        null: the empty prompt's embedding, by input that text is made for.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        f"{NULL}{name}": np.ascontiguousarray(value, np.float32) for name, value in (null or {}).items()
    }
    for (precision, emission), probe in probes.items():
        arrays[_key(precision, emission, "probe")] = np.ascontiguousarray(probe.epsilon, np.float32)
        arrays[_key(precision, emission, "probe_noise")] = np.array([probe.allowed])
    for (precision, emission), values in corrections.items():
        for value in values:
            for field in fields(value):
                arrays[_key(precision, emission, field.name)] = np.ascontiguousarray(
                    getattr(value, field.name)
                )
    folder.joinpath(TABLES).write_bytes(save(arrays))
