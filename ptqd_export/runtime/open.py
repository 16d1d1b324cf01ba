"""Load a bundle's files for a backend."""

from __future__ import annotations

from ..backends import open_engine
from ..backends.trt import kernel_cache
from ..bundle.bundle import Bundle
from ..bundle.manifest import Artifact, UpdateEngine
from ..core.engine import Device, DeviceEngine
from ..files import cache_folder


def open_artifact(
    bundle: Bundle,
    artifact: Artifact | UpdateEngine,
    device: Device | None,
    index: int = 0,
    *,
    resident: bool = True,
) -> DeviceEngine:
    """Load a graph or a finished engine on a device of its backend, or on one that such engines share.

    Args:
        index: of the device's GPU.
        resident: the engine's weights stay in the GPU's memory between runs.
    Raises:
        BackendUnavailable, BundleError, GraphError: it does not run here; for a finished engine, the message
            says whether --rebuild helps.
    """
    file, build = bundle.file(artifact.file), artifact.build
    if build is None:
        return open_engine(artifact.backend, file, device)
    built = f"{artifact.runtime} for {', '.join(build.targets)}"
    cache = kernel_cache(artifact.backend, build.key, cache_folder(), index)
    return open_engine(artifact.backend, file, device, built=built, cache=cache, resident=resident)


def open_update(bundle: Bundle, backend: str, device: Device, index: int = 0) -> DeviceEngine:
    """Load the sampler's update: a finished engine, or the graph itself on backends that load graphs.

    Raises:
        BackendUnavailable, BundleError, GraphError: as `open_artifact`.
    """
    m = bundle.manifest
    if any(engine.backend == backend for engine in m.update_engines):
        return open_artifact(bundle, m.update_engine(backend), device, index)
    return open_engine(backend, bundle.file(m.update.file), device)
