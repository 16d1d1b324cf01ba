"""Runtime: draw samples from a bundle, switching engines across timesteps as its plan says.

Only the torch backend needs torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import backends
from ..bundle.bundle import Bundle
from ..core.backend import AUTOMATIC, BACKENDS, TORCH, backend
from ..core.closing import Closing
from ..core.engine import Array, Device, Engine
from ..core.plan import Plan
from ..core.precision import Precision
from ..errors import (
    BackendUnavailable,
    BundleError,
    GraphError,
    ModelError,
    ParityError,
    PTQDError,
    RecipeError,
)
from .decoder import PictureDecoder
from .device_loop import DeviceSampler, check_update
from .fastest import by_speed
from .open import open_artifact, open_update
from .probe import check_probe
from .replaced import Replaced, corrected

F64 = npt.NDArray[np.float64]


def check_settings(
    bundle: Bundle,
    *,
    n_steps: int | None = None,
    eta: float | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
) -> None:
    """Check that the settings a caller asks for are the bundle's: its tables are valid for no others.

    None asks for nothing.

    Raises:
        BundleError: another setting is asked for; the message says what the bundle holds and how to build
            another one.
    """
    asked = {"n_steps": n_steps, "eta": eta, "guidance_scale": guidance_scale, "solver": solver}
    s = bundle.manifest.sampling
    held = {
        "n_steps": s.schedule.n_steps,
        "eta": s.schedule.eta,
        "guidance_scale": s.guidance_scale,
        "solver": s.solver,
    }
    wrong = {name: value for name, value in asked.items() if value not in (None, held[name])}
    if wrong:
        wanted, measured = (", ".join(f"{name} {of[name]}" for name in wrong) for of in (wrong, held))
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wrong.items())
        raise BundleError(
            f"{wanted} was asked for, but {bundle.path} was measured for {measured}: "
            f"leave it out, or rebuild with `ptqd-export build ... {options}`"
        )


class Runtime(Closing):
    """All engines of a plan, loaded and ready to sample.

    On ORT CPU the engines share one thread pool; on a GPU the state stays there. A Runtime is a context
    manager, and belongs to the thread that opened it.

    Args:
        bundle: an opened bundle, or the folder of one.
        backend: one of `core.backend.BACKENDS`. None is the best that the bundle has engines for and that
            works here: its engines load, and compute what they computed where the bundle was built. On the
            CPU it is the fastest, as `fastest.by_speed` measures it once.
        plan: another plan over the bundle's precisions; None is the bundle's own.
        model: the recipe or model that the bundle was built from; only the torch backend needs it.
        device: index of the GPU; backends on the CPU ignore it.
        resident: the weights of all engines stay in the GPU's memory; else those of the engine in use alone,
            where the library can swap them (TensorRT-RTX).
        replaced: other corrections than the bundle's; the sampler's state is on the host then.
    Attributes:
        backend: the backend that is open.
        passed_over: {better backend: why it is not used}, where no backend was named.
        why: why this one of several on the CPU is used, where no backend was named: it is the fastest.
    Raises:
        BackendUnavailable, BundleError, GraphError: the bundle does not run here.
        ParityError: an engine computes something else here than where the bundle was built.
        RecipeError: there is no such backend, or the plan has other steps or precisions than the bundle.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        backend: str | None = None,
        plan: Plan | None = None,
        model: Path | str | None = None,
        device: int = 0,
        resident: bool = True,
        replaced: Replaced | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.plan = self.bundle.manifest.plan if plan is None else plan
        self.bundle.manifest.check_plan(self.plan)
        self.engines: dict[Precision, Engine] = {}
        self.passed_over: dict[str, str] = {}
        self.why = ""
        self._opened = contextlib.ExitStack()  # the device is closed after its engines
        self._on_device: DeviceSampler | None = None
        self._device, self._resident, self._replaced = device, resident, replaced
        self._in_use: Precision | None = None
        self._decoder: PictureDecoder | None = None
        self._model = None if model is None else Path(model)
        try:
            self.backend = self._open_best() if backend is None else self._open(backend)
        except BaseException:
            self.close()
            raise

    def _open_best(self) -> str:
        m = self.bundle.manifest
        names = [n for n in AUTOMATIC if n in m.backends or not BACKENDS[n].builds_engines]
        for name in names:
            if BACKENDS[name].on_device and self._works(name) and self._tried(name):
                return name
        on_host = [name for name in names if not BACKENDS[name].on_device and self._works(name)]
        if on_host:  # only what the bundle was built for is missed
            missed = {
                n: why for n, why in self.passed_over.items() if BACKENDS[n].on_device or n in m.backends
            }
            self.passed_over = missed
        if len(on_host) > 1:
            on_host, self.why = by_speed(self.bundle, self.plan, on_host)
        for name in on_host[:-1]:
            if self._tried(name):
                return name
        if on_host:
            return self._open(on_host[-1])
        reasons = "; ".join(f"{name}: {why}" for name, why in self.passed_over.items())
        raise BackendUnavailable(f"no backend works here: {reasons}")

    def _works(self, name: str) -> bool:
        try:
            backends.check(name)
        except BackendUnavailable as error:
            self.passed_over[name] = str(error)
            return False
        return True

    def _tried(self, name: str) -> bool:
        """Whether the backend could be opened."""
        try:
            self._open(name)
        except (BackendUnavailable, BundleError, GraphError, ParityError) as error:
            self.close()
            self.passed_over[name] = str(error)
            return False
        return True

    def _open(self, name: str) -> str:
        try:
            if name == TORCH:
                self._simulate()
            else:
                self._open_files(name, backend(name).on_device)
        except PTQDError:
            self.bundle.check_unchanged()  # files that are not the bundle's any more explain all else
            raise
        self.bundle.check_unchanged()
        if self._replaced is not None:
            for precision, correction in self._replaced.corrections.items():
                folded = self.bundle.correction(precision, BACKENDS[name].emission)
                self.engines[precision] = corrected(self.engines[precision], correction, folded)
        return name

    def _simulate(self) -> None:
        try:
            from ..calibrate.reference import simulated_engines
        except ImportError as error:
            raise BACKENDS[TORCH].missing(error) from error
        self.engines.update(simulated_engines(self.bundle, self.plan.precisions, self._model))

    def _open_files(self, name: str, on_device: bool) -> None:
        """Open the engines of a backend that runs files.

        On a backend with a device of its own, also open the sampler that keeps the state there.
        """
        m, emission = self.bundle.manifest, BACKENDS[name].emission
        device: Device | None = None
        if on_device:
            device = self._opened.enter_context(contextlib.closing(backends.open_device(name, self._device)))
        for precision in self.plan.precisions:
            engine = self._opened.enter_context(
                open_artifact(
                    self.bundle, m.artifact(precision, name), device, self._device, resident=self._resident
                )
            )
            self.engines[precision] = engine
            check_probe(self.bundle, precision, emission, engine)
        if device is not None and self._replaced is None:
            update = self._opened.enter_context(open_update(self.bundle, name, device, self._device))
            check_update(update, m.sampling)
            sigmas = self.bundle.sigmas(name, self.plan)
            self._on_device = DeviceSampler(device, update, m.sampling, sigmas)

    @property
    def capture_notes(self) -> dict[str, str]:
        """{precision: what became of its CUDA graphs}, where the backend has any."""
        notes = {str(p): getattr(engine, "capture_note", None) for p, engine in self.engines.items()}
        return {name: note for name, note in notes.items() if note is not None}

    def sample(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        tensors: Mapping[str, Array] | None = None,
        null: Mapping[str, Array] | None = None,
        advance: Callable[[int], None] = lambda step: None,
    ) -> F64:
        """Draw the samples `indices` of `seed` as one batch, float64 (N, C, H, W), not clamped.

        Args:
            labels: one class per index; without them, sample i gets class i modulo the number of classes.
            tensors: float conditions, one row per index.
            null: what stands for no condition in place of the bundle's own, (shape) by input: a negative
                prompt's.
            advance: called with each step.
        Raises:
            ModelError: a sample is not finite.
            RecipeError: the model does not take the labels or tensors, or the seed is out of range.
        """
        check_seed(seed)
        sampling = self.bundle.manifest.sampling.without(null or {})
        labels = sampling.model.labels_in_turn(indices) if labels is None else labels
        conditions = sampling.model.conditions(labels, len(indices), tensors)
        with np.errstate(over="ignore", invalid="ignore"):  # samples that are not finite are refused below
            if self._on_device is not None:
                at: Any = self.engine_at  # those of a device are all DeviceEngine
                x = self._on_device.sample(
                    at, conditions, indices, seed=seed, sampling=sampling, advance=advance
                )
            else:
                x = sampling.sample(
                    self.engine_at,
                    conditions,
                    indices,
                    seed=seed,
                    sigmas=self._sigmas(),
                    on_step=lambda step, x, epsilon: advance(step),
                )
        finite = np.isfinite(x).all(axis=(1, 2, 3))
        if not finite.all():
            bad = indices[int(np.argmin(finite))]
            raise ModelError(
                f"sample {bad} holds NaN or infinite values: the model or an engine computes nonsense; "
                "try another seed, or rebuild"
            )
        return x

    def decode(self, x: F64) -> F64:
        """The pictures (N, channels, H, W), in [-1, 1] and not clamped, of samples of a latent model.

        Raises:
            RecipeError: the bundle has no decoder.
            BackendUnavailable, GraphError, ModelError: it does not run here.
        """
        if self._decoder is None:
            self._decoder = self._opened.enter_context(PictureDecoder(self.bundle))
            self.bundle.check_unchanged()
        return self._decoder(x)

    def _sigmas(self) -> F64:
        if self._replaced is not None:
            return self._replaced.sigmas
        return self.bundle.sigmas(self.backend, self.plan)

    def engine_at(self, step: int) -> Engine:
        """The engine of a step, by the plan."""
        precision = self.plan.steps[step]
        if not self._resident and self._in_use not in (None, precision):
            unload = getattr(self.engines[self._in_use], "unload", None)
            if unload is not None:
                unload()
        self._in_use = precision
        return self.engines[precision]

    def close(self) -> None:
        """Free the engines, then their device; a second call does nothing."""
        self._on_device = self._decoder = None
        self.engines.clear()
        self._opened.close()


def check_seed(seed: int) -> None:
    """Raise RecipeError for a seed outside 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise RecipeError(f"seed is {seed!r}: give an integer from 0 to 2^64 - 1")
