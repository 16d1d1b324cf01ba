"""What else a user could run: the same network by other tools, from the same weights."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..core.backend import install_hint
from ..core.engine import SAMPLE, TIMESTEP, Array
from ..core.model import ModelInfo
from ..errors import BackendUnavailable
from .subject import TORCH_MODES, Subject

EXPORTED = "ORT fp32, as exported"
STATIC = "onnxruntime quantize_static"
OPENVINO = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}
NNCF = "OpenVINO + NNCF INT8"
TORCH = {f"PyTorch {mode}": mode for mode in TORCH_MODES}
BASELINES = (EXPORTED, STATIC, *OPENVINO, NNCF, *TORCH)
CALIBRATION = 10
"""Batches of noise, at timesteps all over, that the other quantizers calibrate on."""
Say = Callable[[str], None]


def make_baselines(
    bundle: Bundle, model: Path, folder: Path, wanted: Sequence[str], say: Say
) -> list[Subject]:
    """Those of BASELINES that can be made here, in `folder`; what cannot is told.

    Args:
        model: what the bundle was built from: a recipe, or what `Recipe.load` takes.
        wanted: of BASELINES.
        say: called with a line for each that is left out.
    Raises:
        RecipeError, ModelError, GraphError: the model cannot be read or exported.
        BundleError: it is not the bundle's.
        BackendUnavailable: torch, diffusers or onnx is not installed.
    """
    # Here, as the engines of a bundle are timed without them.
    try:
        from ..calibrate.reference import open_original
        from ..export import export_fp, save
    except ImportError as error:
        raise BackendUnavailable(
            f"--model needs torch, diffusers and onnx ({error}): {install_hint('build')}"
        ) from error
    network = open_original(bundle, model)
    file = folder / "exported.onnx"
    save({file.stem: export_fp(network.module, network.info)}, folder, "exported.safetensors")
    every: dict[str, Callable[[], Subject]] = {
        EXPORTED: lambda: Subject(EXPORTED, "onnx", file=file),
        STATIC: lambda: Subject(STATIC, "onnx", file=_apart(_static, file, network.info)),
        NNCF: lambda: Subject(NNCF, "openvino", "f32", file=_apart(_nncf, file, network.info)),
    }
    for name, hint in OPENVINO.items():
        every[name] = partial(_openvino, name, hint, file)
    for name, mode in TORCH.items():
        every[name] = partial(Subject, name, "torch", mode, file=model)
    found = []
    for name in BASELINES:
        if name in wanted:
            try:
                found.append(every[name]())
            except BackendUnavailable as error:
                say(f"{name} is left out: {error}")
    return found


def _openvino(name: str, hint: str, file: Path) -> Subject:
    _need("openvino", "pip install openvino")
    return Subject(name, "openvino", hint, file=file)


def _need(library: str, how: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise BackendUnavailable(f"{library} is not installed: {how}")


def _apart(make: Callable[[Path, ModelInfo], Path], file: Path, info: ModelInfo) -> Path:
    """`make` in a process of its own: these tools open sessions with threads of their own, and
    print, which goes to stderr."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.dup2, (2, 1)) as pool:
        try:
            return pool.submit(make, file, info).result()
        except BrokenProcessPool as error:
            raise BackendUnavailable("its process ended, most likely because memory ran out") from error


def _noise(info: ModelInfo, rows: int) -> Iterator[dict[str, Array]]:
    """Feeds for the other quantizers: noise at timesteps all over."""
    rng = np.random.default_rng(0)
    for t in np.linspace(0, 999, CALIBRATION).astype(np.int64):
        x = rng.standard_normal((rows, *info.sample_shape)).astype(np.float32)
        yield {SAMPLE: x, TIMESTEP: np.full(rows, t), **info.conditions(None, rows)}


def _static(file: Path, info: ModelInfo) -> Path:
    """onnxruntime's own quantization with its defaults: QDQ, all operators."""
    import onnxruntime.quantization as ortq

    from ..export.graph import first_line

    feeds = _noise(info, 4)

    class Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    logging.disable(logging.WARNING)
    target = file.with_name("static.onnx")
    try:
        ortq.quantize_static(file, target, Reader())
    except Exception as error:  # whatever its passes raise
        raise BackendUnavailable(f"it cannot quantize this model: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return target


def _nncf(file: Path, info: ModelInfo) -> Path:
    """NNCF's post-training quantization of the same graph."""
    _need("openvino", "pip install openvino")
    _need("nncf", "pip install nncf")
    import nncf
    import openvino

    from ..export.graph import first_line

    model = openvino.Core().read_model(str(file))
    data = nncf.Dataset(list(_noise(info, 1)))
    target = file.with_name("nncf.xml")
    try:
        openvino.save_model(nncf.quantize(model, data), str(target), compress_to_fp16=False)
    except Exception as error:
        raise BackendUnavailable(f"it cannot quantize this model: {first_line(error)}") from error
    return target
