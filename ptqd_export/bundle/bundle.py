"""Bundle: a folder with manifest.json, ONNX graphs, safetensors tables; verified when it is opened, never
pickle.

manifest.json                     what is here, what it was measured for, and a SHA-256 of every other file
                                  and of itself
<precision>.<emission>.onnx       one graph per precision and emission (equal ones once); weights are external
update.onnx                       the sampler's step, for backends that keep the state on a device
<precision>.<backend>.engine      finished engines, for backends that build them
weights.safetensors               every distinct tensor of all graphs, once
quantization.safetensors          scales and grids of the quantized layers, and which tensors of
                                  weights.safetensors are their codes (the torch backend simulates from them)
tables.safetensors                per precision and numerics: gain, offset, var, the sums they came from, and
                                  the probe
vae_decoder/, text_encoder/, ...  the parts around the network (`pipeline`)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import files
from ..core.backend import BACKENDS, ENGINE_BACKENDS, Emission
from ..core.noise import Correction, NoiseStats
from ..core.plan import Plan
from ..core.precision import Precision
from ..errors import BundleError, PTQDError
from ..typed import brief
from .graph_check import Expected, check_graph
from .manifest import FORMAT_VERSION, Manifest
from .pipeline import graph_file
from .reading import COPY_AGAIN, MAX_BYTES, MIB, FileEntry, Reader, check_name, read_small
from .tables import MALFORMED, QUANTIZATION, TABLES, Probe, Tables, layout_bytes, table_layout

MANIFEST = "manifest.json"
SEAL = "sha256"
"""First key of the manifest: the SHA-256 of its bytes, taken with zeros in its own place."""
WEIGHTS = "weights.safetensors"
GRAPH, ENGINE = ".onnx", ".engine"
MAX_ENGINE_GROWTH, SLACK = 8, 64 * MIB
"""A finished engine may hold the weights this many times over, and this much besides."""
LAYER_BYTES = 256 << 10
"""Most bytes that scales and grids of a quantized layer take, on average: those of 16,384 channels."""


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened, verified bundle.

    Attributes:
        path: its folder.
        manifest: what it holds.
        tables: corrections, statistics and probes.
        seal: SHA-256 of the manifest, which holds the SHA-256 of everything else: the bundle's own.
        reader: of its files.
        live_bytes: of the values that a network needs at one time, for one sample in all branches, float32.
    """

    path: Path
    manifest: Manifest
    tables: Tables
    seal: str
    reader: Reader
    live_bytes: int

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest.sampling.model.name}, {self.manifest.plan})"

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what a run yields: of the samples, or of what the decoder makes of them."""
        m = self.manifest
        return (
            m.sampling.model.sample_shape if m.pipeline.decoder is None else m.pipeline.decoder.picture_shape
        )

    def file(self, name: str) -> Path:
        return self.path / name

    def correction(self, precision: Precision, emission: Emission) -> Correction:
        """See `Tables.correction`."""
        return self.tables.correction(precision, emission)

    def stats(self, precision: Precision, emission: Emission) -> NoiseStats:
        """See `Tables.stats`."""
        return self.tables.stats(precision, emission)

    def probe(self, precision: Precision, emission: Emission) -> Probe:
        """See `Tables.probe`."""
        return self.tables.probe(precision, emission)

    def sigmas(self, backend: str, plan: Plan | None = None) -> npt.NDArray[np.float64]:
        """sigma' per step, (T,), under a plan and the graphs that `backend` runs; sigma where recalibration
        is off.

        Args:
            plan: over this bundle's precisions; None is the bundle's own.
        """
        m, emission = self.manifest, BACKENDS[backend].emission
        plan = plan or m.plan
        var = {precision: self.correction(precision, emission).var for precision in plan.precisions}
        return plan.sigmas(m.sampling.schedule, var, m.recalibrate_variance)

    def read(self, name: str) -> bytes:
        """The content of a file, hashed again.

        Raises:
            BundleError: it is not what it was when the bundle was opened.
        """
        return self.reader.read(name)

    def check_unchanged(self) -> None:
        """The files are still those that were verified: a runtime has opened some of them by their names
        since.

        Raises:
            BundleError: another bundle has taken their place, or one of them was changed.
        """
        self.reader.check_unchanged()

    @classmethod
    def open(cls, path: Path | str, without: str | None = None) -> Bundle:
        """Read a bundle and check all of it: format, names, sizes, every graph, and the SHA-256 of every
        file.

        What can be compared without reading the large files is compared first.

        Args:
            without: a backend whose finished engines are not looked at, because they are to be built anew.
        Raises:
            BundleError: one line saying what is wrong.
        """
        path = Path(path)
        content, data = _read_manifest(path)
        try:
            return cls._read(path, content, data, without)
        except BundleError as error:
            same = False
            with contextlib.suppress(OSError, BundleError):
                same = read_small(path / MANIFEST, MAX_BYTES["json"]) == content
            if same:
                raise
            raise BundleError(
                f"{path} was replaced while it was being read: run the command again"
            ) from error

    @classmethod
    def _read(cls, path: Path, content: bytes, data: dict[str, Any], without: str | None) -> Bundle:
        """The rest of `open`, for a manifest of our format."""
        try:
            manifest = Manifest.from_dict(data)
            _check_files(manifest)
        except (*MALFORMED, PTQDError) as error:
            raise BundleError(
                f"{path / MANIFEST} is damaged ({_reason(error)}): rebuild the bundle"
            ) from error
        reader = Reader(path, manifest.files)
        skipped = {engine.file for engine in manifest.engines if engine.backend == without}
        live = _check_graphs(manifest, reader)
        tables = Tables.parse(
            reader.read(TABLES),
            path / TABLES,
            manifest.sampling,
            manifest.bops,
            manifest.pipeline.text_inputs,
        )
        if not manifest.pipeline.force_zeros:
            manifest = replace(manifest, sampling=manifest.sampling.without(tables.null))
        for name in manifest.files.keys() - {*_graph_files(manifest), TABLES} - skipped:
            reader.check(name)
        # After the other checks, which can say more about a manifest that was edited by hand.
        seal = str(data.get(SEAL))
        if seal != _seal(content, seal):
            raise BundleError(
                f"{path / MANIFEST} does not match its own SHA-256: it was changed or damaged; {COPY_AGAIN}"
            )
        return cls(path, manifest, tables, seal, reader, 4 * live * manifest.sampling.branches)


def _read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; make one with `ptqd-export build`")
    try:
        content = read_small(file, MAX_BYTES["json"])
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON ({brief(str(error))}): rebuild the bundle") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read ({error.strerror})") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{file} has no format_version: rebuild the bundle")
    if version != FORMAT_VERSION:
        advice = "rebuild the bundle" if version < FORMAT_VERSION else "upgrade ptqd-export"
        raise BundleError(
            f"{path} has format version {version}, this ptqd-export reads {FORMAT_VERSION}: {advice}"
        )
    return content, data


def _reason(error: Exception) -> str:
    """An error as part of a line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return text if isinstance(error, PTQDError) else f"{type(error).__name__}: {text}"


def _graph_files(manifest: Manifest) -> list[str]:
    """Every file that a runtime reads as an ONNX graph."""
    parts = map(graph_file, manifest.pipeline.parts)
    return list(dict.fromkeys((*(graph.file for graph in manifest.graphs), manifest.update.file, *parts)))


def _check_files(manifest: Manifest) -> None:
    """Names that a bundle may hold, each with a hash and a size that its kind may have.

    Raises:
        BundleError: naming the file.
    """
    loaded = [artifact.file for artifact in manifest.artifacts if artifact.backend not in ENGINE_BACKENDS]
    engines = [engine.file for engine in manifest.engines]
    parts = [f"{part.folder}/{WEIGHTS}" for part in manifest.pipeline.parts]
    everything = (*_graph_files(manifest), *loaded, *engines, *parts, *manifest.pipeline.files)
    for needed in (TABLES, QUANTIZATION, WEIGHTS, *everything):
        if needed not in manifest.files:
            raise BundleError(f"it names {brief(needed)} but has no hash of it")
    for name in loaded:
        if name not in _graph_files(manifest):
            raise BundleError(f"a backend is to load {brief(name)}, which is not one of its graphs")
    for kind, names in ((GRAPH, _graph_files(manifest)), (ENGINE, engines)):
        for name in names:
            if not name.endswith(kind):
                raise BundleError(f"it names {brief(name)}, expected a file *{kind}")
    folded = [name.casefold() for name in (MANIFEST, *manifest.files)]
    if len(set(folded)) < len(folded):
        raise BundleError("it names two files alike but for the case of letters")
    for name, entry in manifest.files.items():
        check_name(name)
        most = MAX_BYTES[name.rpartition(".")[2]]
        if name.endswith(ENGINE):
            most = min(most, MAX_ENGINE_GROWTH * manifest.files[WEIGHTS].size + SLACK)
        elif name == QUANTIZATION:
            # Its codes lie in the weights file; what is left are vectors of a few bytes per channel.
            layers = sum(len(n) for of in manifest.layers.values() for b, n in of.items() if b != "float")
            most = min(manifest.files[WEIGHTS].size + SLACK, (layers + 1) * LAYER_BYTES)
        elif name == TABLES:
            layout = table_layout(manifest.sampling, manifest.bops, manifest.pipeline.text_inputs)
            most = min(4 * SLACK, layout_bytes(layout))
        if not 0 <= entry.size <= most:
            raise BundleError(f"{brief(name)} has {entry.size} bytes: expected at most {most}")


def _check_graphs(manifest: Manifest, reader: Reader) -> int:
    """Every graph computes on what the manifest says, and takes its weights from the bundle's own file, all
    of it.

    Returns:
        elements of the values that any network needs at one time, per row of its batch.
    Raises:
        BundleError: naming the graph.
    """
    weights = manifest.files[WEIGHTS].size
    used = live = 0
    emissions: dict[str, Emission | None] = {manifest.update.file: None}
    for graph in manifest.graphs:
        if graph.file in emissions and emissions[graph.file] is None:
            raise BundleError(
                f"{reader.root / MANIFEST} is damaged: {brief(graph.file)} is named as two things"
            )
        emissions.setdefault(graph.file, graph.emission)
    for name, emission in emissions.items():
        expected = Expected(manifest.sampling, emission, WEIGHTS, weights)
        needs = check_graph(reader.read(name), str(reader.root / name), expected)
        used, live = max(used, needs.weights_end), max(live, needs.live)
    _check_used(reader.root / WEIGHTS, weights, used)
    for part in manifest.pipeline.parts:
        name = graph_file(part)
        if name in emissions:
            raise BundleError(f"{reader.root / MANIFEST} is damaged: {brief(name)} is named as two things")
        weights = manifest.files[f"{part.folder}/{WEIGHTS}"].size
        expected = Expected(manifest.sampling, Emission.PORTABLE, WEIGHTS, weights, part.tensors)
        needs = check_graph(reader.read(name), str(reader.root / name), expected)
        _check_used(reader.root / part.folder / WEIGHTS, weights, needs.weights_end)
    return live


def _check_used(file: Path, size: int, used: int) -> None:
    if used != size:
        raise BundleError(f"{file} has {size} bytes, of which the graphs take {used}: rebuild the bundle")


def _seal(content: bytes, seal: str) -> str:
    """SHA-256 of a manifest's bytes, zeros in the place of `seal`."""
    return hashlib.sha256(content.replace(seal.encode(), b"0" * 64, 1)).hexdigest()


def check_target(path: Path) -> Path:
    """Refuse, before any work, a target that cannot or must not be written; see `files.check_target`.

    Returns:
        the target, absolute and without links.
    Raises:
        RecipeError: a file, the current folder or one above it, a folder that is not a bundle, or no
            permission.
    """

    return files.check_target(path, "a bundle", in_the_way)


def in_the_way(inside: list[Path]) -> str | None:
    """Says what of a folder's content is not a bundle's; None where all of it is."""
    advice = "give an empty or new folder, or an older bundle to replace"
    held = _listed(inside[0].parent)
    if held is None:
        return advice
    other = next((file.name for file in inside if file.name not in {MANIFEST, *held}), None)
    return None if other is None else f"{brief(other)} is not of the bundle that stands there; {advice}"


def _listed(path: Path) -> set[str] | None:
    """The files, and folders of files, that a bundle of any of our formats at `path` lists; None where there
    is none."""
    try:
        data = json.loads(read_small(path / MANIFEST, MAX_BYTES["json"]))
        version, listed = data["format_version"], data["files"]
        ours = isinstance(version, int) and 1 <= version <= FORMAT_VERSION and isinstance(data[SEAL], str)
        return {str(name).partition("/")[0] for name in listed} if ours else None
    except (OSError, BundleError, *MALFORMED):
        return None


def model_of(path: Path) -> str | None:
    """Name of the model that a bundle at `path` was built from, whatever its format; None where there is no
    bundle."""
    try:
        data = json.loads(read_small(path / MANIFEST, MAX_BYTES["json"]))
        model = (data.get("sampling") or data)["model"]
        return str(model["name"])
    except (OSError, BundleError, *MALFORMED):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file of `folder` and write manifest.json, with a hash of its own, last."""
    entries = {
        file.relative_to(folder).as_posix(): FileEntry(files.sha256_file(file), file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    data = {SEAL: "0" * 64, **replace(manifest, files=entries).to_dict()}
    content = json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"
    sealed = content.replace(b"0" * 64, _seal(content, "0" * 64).encode(), 1)
    folder.joinpath(MANIFEST).write_bytes(sealed)
