"""Runtime: samples from a bundle, switching engines across timesteps by its plan. Only the torch backend needs torch and diffusers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .backends.base import DeviceEngine
from .bundle import Bundle
from .conditioning import ModelInfo
from .device import DeviceSampler, check_update
from .engine import Array, Engine
from .errors import BackendUnavailable, BundleError, GraphError, ModelError, ParityError
from .manifest import Manifest
from .plan import Plan
from .precision import Precision
from .quant import BACKENDS, BUILDERS, Emission
from .recipe import BUILT
from .sampler import branches, predict_epsilon, sample
from .schedule import NoiseSchedule

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """Sampler settings a caller asks for; None takes what the bundle holds."""

    n_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    solver: str | None = None

    def check(self, bundle: Bundle) -> None:
        """The tables are valid only for what they were measured on (science.md, notation).

        Raises:
            BundleError: another setting is asked for; the line says what the bundle holds and how to rebuild.
        """
        m = bundle.manifest
        held = {"n_steps": len(m.schedule), "eta": m.schedule.eta, "guidance_scale": m.guidance_scale, "solver": m.solver}
        wrong = {name: getattr(self, name) for name, value in held.items() if getattr(self, name) not in (None, value)}
        if wrong:
            asked, measured = (", ".join(f"{name} {of[name]}" for name in wrong) for of in (wrong, held))
            options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wrong.items())
            raise BundleError(
                f"{asked} was asked for, but {bundle.path} was measured for {measured}: "
                f"leave it out, or rebuild with `ptqd-export build ... {options}`"
            )


def probe(engine: Engine, schedule: NoiseSchedule, info: ModelInfo, guidance_scale: float) -> F32:
    """The guided epsilon that an engine predicts at step 0 for one fixed noise and the first two conditions, float32 (2, C, H, W)."""
    x = np.random.default_rng(0).standard_normal((2, *info.sample_shape))
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is compared
        return predict_singly(engine, x, 0, schedule, info, info.conditions(None, 2), guidance_scale).astype(np.float32)


def predict_singly(
    engine: Engine,
    x: npt.NDArray[np.floating],
    step: int,
    schedule: NoiseSchedule,
    info: ModelInfo,
    conditions: Mapping[str, Array],
    guidance_scale: float,
) -> F64:
    """`predict_epsilon`, a sample at a time: every engine takes that, whatever batches it was built for."""
    parts = []
    for i in range(len(x)):
        own = {spec.name: conditions[spec.name][i : i + 1] for spec in info.inputs}
        parts.append(predict_epsilon(engine, x[i : i + 1], step, schedule, info, own, guidance_scale))
    return np.concatenate(parts)


def check_probe(bundle: Bundle, precision: Precision, emission: Emission, engine: Engine) -> None:
    """An engine computes here what its graph computed where its bundle was built.

    A processor may lack the instructions that an integer kernel was right on: ONNX Runtime's U8 x S8 products saturate on x86
    without VNNI (microsoft/onnxruntime#14642), which no hash can show. A GPU engine is compared with the portable graph's probe.

    Raises:
        ParityError: it does not; the line gives both figures.
        BundleError: the bundle holds no probe.
    """
    m, name = bundle.manifest, f"{precision}.{emission}"
    got = probe(engine, m.schedule, m.model, m.guidance_scale).astype(np.float64)
    if got.shape != (2, *m.model.sample_shape) or not np.isfinite(got).all():
        raise ParityError(f"{name} returns NaN, infinite values or a wrong shape {got.shape}: the bundle or this machine computes nonsense; rebuild")
    expected, allowed = bundle.probe(precision, emission)
    difference = float(np.sqrt(((got - expected) ** 2).mean()))
    if not difference <= allowed:
        raise ParityError(
            f"{name} computes something else here than where the bundle was built (RMS difference {difference:.3g}, allowed {allowed:.3g}): "
            "this processor, or the runtime's version, differs: rebuild the bundle on this machine (finished engines: run with --rebuild)"
        )


def choose_backend(bundle: Bundle) -> tuple[str, dict[str, str]]:
    """The best backend that works here and that the bundle has engines for, and why each better one was passed over.

    Works: all its engines load, and compute what they did where the bundle was built. The last resort, ort-cpu, is not tried.

    Raises:
        BackendUnavailable: none works; the line gives every reason.
    """
    from .backends import check

    passed: dict[str, str] = {}
    for name in BUILT:
        if name in BUILDERS and name not in bundle.manifest.backends:
            continue
        try:
            check(name)
            if name != BUILT[-1]:
                Runtime(bundle, name).close()
            return name, passed
        except (BackendUnavailable, BundleError, GraphError, ParityError) as error:
            passed[name] = str(error)
    raise BackendUnavailable(f"no backend works here: {'; '.join(f'{name}: {why}' for name, why in passed.items())}")


def state_of(backend: str) -> str:
    """Where and as what a run keeps x."""
    return "float64 on the host" if backend in ("ort-cpu", "torch") else "float32 on the device"


class Runtime:
    """All engines of a plan, warm: on ORT CPU on one shared thread pool, on a GPU with the state kept on the device; a context manager.

    Args:
        bundle: opened bundle.
        backend: one of `quant.BACKENDS`; the best that works here if None (`choose_backend`).
        plan: another plan over the bundle's precisions, e.g. for comparisons; the bundle's own if None.
        model: the recipe or model that the bundle was built from, which the torch backend needs; others ignore it.
    Raises:
        BackendUnavailable, BundleError.
        ParityError: an engine computes something else here than where the bundle was built.
    """

    def __init__(self, bundle: Bundle, backend: str | None = None, plan: Plan | None = None, model: Path | None = None) -> None:
        self.bundle, self.backend = bundle, backend or choose_backend(bundle)[0]
        self.plan = bundle.manifest.plan if plan is None else plan
        self.engines: dict[Precision, Engine] = {}
        self._opened = contextlib.ExitStack()  # the device is closed after its engines
        self._on_device: DeviceSampler | None = None
        try:
            if self.backend == "torch":
                from .reference import simulated_engines

                self.engines.update(simulated_engines(bundle, self.plan.precisions, model))
            else:
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """The engines of a backend that runs files; and where it has a device of its own, what keeps the state there."""
        from .backends import open_device
        from .engines import open_artifact

        m, name = self.bundle.manifest, self.backend
        device = None if name == "ort-cpu" else self._opened.enter_context(contextlib.closing(open_device(name)))

        def opened(precision: Precision | None) -> DeviceEngine:
            return self._opened.enter_context(open_artifact(self.bundle, m.artifact(precision, name), device))

        for precision in self.plan.precisions:
            self.engines[precision] = opened(precision)
            check_probe(self.bundle, precision, BACKENDS[name], self.engines[precision])
        # The update graph holds the variances of the bundle's own plan.
        if device is not None and (self.plan == m.plan or not m.schedule.sigmas.any()):
            update = opened(None)
            check_update(update, m.schedule, m.model, m.guidance_scale, self.bundle.sigmas(name))
            self._on_device = DeviceSampler(device, update, m.schedule, m.model, m.guidance_scale)

    def sample(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        tensors: Mapping[str, Array] | None = None,
        advance: Callable[[int], None] = lambda step: None,
    ) -> F64:
        """Samples `indices` of `seed` as one batch, float64 (N, C, H, W), not clamped. labels, tensors: one row per index.

        Without labels, sample i gets class i modulo the number of classes. `advance` is told of every step.

        Raises:
            ModelError: a sample is not finite.
            RecipeError: labels or tensors that the model does not take.
        """
        m = self.bundle.manifest
        labels = m.model.labels_in_turn(indices) if labels is None else labels
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused below
            conditions = m.model.conditions(labels, len(indices), tensors)
            if self._on_device is not None:
                x = self._on_device.sample(self._engine_at, conditions, indices, seed=seed, advance=advance)
            else:
                x = sample(
                    self._engine_at,
                    m.schedule,
                    m.model,
                    conditions,
                    indices,
                    seed=seed,
                    guidance_scale=m.guidance_scale,
                    sigmas=self.bundle.sigmas(self.backend, self.plan),
                    on_step=lambda step, x, epsilon: advance(step),
                )
        finite = np.isfinite(x).all(axis=(1, 2, 3))
        if not finite.all():
            bad = indices[int(np.argmin(finite))]
            raise ModelError(f"sample {bad} holds NaN or infinite values: the model or an engine computes nonsense; try another seed, or rebuild")
        return x

    def _engine_at(self, step: int) -> Any:
        return self.engines[self.plan.steps[step]]

    def close(self) -> None:
        self._on_device = None
        self.engines.clear()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(
    bundle: Bundle,
    num_samples: int,
    labels: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    workers: int = 1,
    backend: str | None = None,
    model: Path | None = None,
    tensors: Mapping[str, Array] | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> F64:
    """Samples 0 .. num_samples - 1 of `seed`, in batches; float64 (N, C, H, W), not clamped.

    Args:
        labels: one class per sample; None: classes in turn.
        workers: processes (on the CPU with one thread each) that split the batches; 1 runs here, with all threads.
        backend, model: as Runtime.
        advance: told how many sample steps (samples x denoising steps) were done since the last call.
    Raises:
        BackendUnavailable, BundleError, ParityError: as Runtime; or a worker died.
        ModelError: a sample is not finite.
        RecipeError: labels or tensors that the model does not take.
    """
    m = bundle.manifest
    backend = backend or choose_backend(bundle)[0]
    if labels is not None or tensors:
        m.model.conditions(labels, num_samples, tensors)  # wrong ones are refused before any work
    out = np.empty((num_samples, *m.model.sample_shape))
    batch_size = min(batch_size, -(-num_samples // workers))  # a batch for every worker
    _check_batch(m, backend, batch_size)
    batches = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]

    def part(batch: range) -> tuple[list[int] | None, dict[str, Array]]:
        chosen = None if labels is None else [int(labels[i]) for i in batch]
        return chosen, {k: v[batch.start : batch.stop] for k, v in (tensors or {}).items()}

    if workers == 1 or len(batches) == 1:
        with Runtime(bundle, backend, model=model) as runtime:
            for batch in batches:
                chosen, conditions = part(batch)
                steps = functools.partial(lambda n, step: advance(n), len(batch))
                out[batch.start : batch.stop] = runtime.sample(batch, chosen, seed=seed, tensors=conditions, advance=steps)
    else:
        workers = min(workers, len(batches))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (bundle.path, backend, model))
        todo, running = iter(batches), dict[Future[F64], range]()
        try:
            while True:
                # A few at a time: CPython's pool may hang if it breaks while work is being submitted.
                with _ctrl_c_blocked():
                    for batch in itertools.islice(todo, 2 * workers - len(running)):
                        running[pool.submit(_work, batch, *part(batch), seed)] = batch
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    out[batch.start : batch.stop] = future.result()
                    advance(len(batch) * len(m.schedule))
        except BrokenProcessPool as error:
            raise BackendUnavailable(
                "a worker process died, most likely for lack of memory: lower --workers or --batch-size "
                '(a script that calls run() with workers must do so under `if __name__ == "__main__":`)'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return out


def _check_batch(manifest: Manifest, backend: str, batch_size: int) -> None:
    """Finished engines take batches of a certain range only.

    Raises:
        BundleError: more samples than that.
    """
    build = manifest.artifact(None, backend).build if backend in BUILDERS else None
    if build is not None:
        most = int(build.settings["rows"][2]) // branches(manifest.guidance_scale)
        if batch_size > most:
            raise BundleError(
                f"{batch_size} samples per batch were asked for, but the {backend} engines take at most {most}: "
                "lower --batch-size, or rebuild with larger tensorrt.batch_sizes"
            )


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Workers that start meanwhile inherit this: Ctrl-C reaches the whole group, and the parent ends it and says so once."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_start: tuple[Path, str, Path | None]
_worker: Runtime | None = None


def _start_worker(path: Path, backend: str, model: Path | None) -> None:
    global _start
    _start = path, backend, model


def _work(batch: range, labels: list[int] | None, tensors: Mapping[str, Array], seed: int) -> F64:
    global _worker
    if _worker is None:  # not when the worker starts: here an error reaches the parent as it is
        path, backend, model = _start
        if backend == "torch":
            from .reference import set_threads as set_torch_threads

            set_torch_threads(1)
        elif backend == "ort-cpu":
            from .backends import set_threads

            set_threads(1)
        _worker = Runtime(Bundle.open(path, verify=False), backend, model=model)  # the parent has checked every hash a moment ago
    return _worker.sample(batch, labels, seed=seed, tensors=tensors)
