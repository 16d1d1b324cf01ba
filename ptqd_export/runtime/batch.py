"""How many samples are drawn at a time: as many as make a run fast, and as fit into memory."""

from __future__ import annotations

from .. import backends
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..core.backend import BACKENDS
from ..core.backend import backend as known
from ..core.memory import total_bytes
from ..errors import BundleError

ON_DEVICE, ON_HOST = 16, 4
"""Samples of a batch on a GPU, and on few threads, which are as fast with more and take more memory."""
SHARE = 0.5
"""Of the machine's memory that the values of all workers' batches may take; the rest is for weights."""
LIVE = 2.0
"""Memory that a runtime takes per byte of values that a graph needs at one time: 0.1 to 1.8 were measured, of
OpenVINO and ONNX Runtime, on networks of 1 to 70 MB per sample."""


def usual_batch(bundle: Bundle, backend: str, workers: int = 1) -> int:
    """Samples per batch where nobody says how many: the same on one machine at all times.

    On the CPU one for each thread, ON_HOST at least and ON_DEVICE at most, as far as they fit into SHARE of
    the memory; on a GPU ON_DEVICE, as far as the engines take them.

    Args:
        backend: that will run it.
        workers: processes that share the memory, with one thread each if there are several.
    Raises:
        RecipeError: there is no such backend.
        BundleError: the bundle has no engines for it.
    """
    if known(backend).on_device:
        return min(ON_DEVICE, most_samples(bundle.manifest, backend) or ON_DEVICE)
    threads = backends.threads() if workers == 1 else 1
    fitting = SHARE * total_bytes() / (workers * LIVE * max(1, bundle.live_bytes))
    return max(1, min(ON_DEVICE, max(ON_HOST, threads), int(fitting)))


def most_samples(manifest: Manifest, backend: str) -> int | None:
    """Most samples per batch that a backend's finished engines take; None where it runs the graphs."""
    if backend not in BACKENDS or not BACKENDS[backend].builds_engines:
        return None
    return manifest.update_engine(backend).build.settings.rows[2] // manifest.sampling.branches


def check_batch(manifest: Manifest, backend: str, batch_size: int) -> None:
    """Check that a backend's finished engines take batches of this size.

    Raises:
        BundleError: the batch is larger than they take.
    """
    most = most_samples(manifest, backend)
    if most is not None and batch_size > most:
        raise BundleError(
            f"{batch_size} samples per batch were asked for, but the {backend} engines take at most {most}: "
            "lower --batch-size, or rebuild with larger tensorrt.batch_sizes"
        )
