"""Calibration in torch: open a model, collect trajectories, quantize, simulate and measure the noise."""

from .intake import open_model, open_model_parts
from .layer_noise import given_layers, sensitivity
from .measure import measure, measure_own
from .model_parts import FirstStage, ModelParts
from .network import Network
from .observe import Observed, observe
from .quantize import quantize
from .refine import refine
from .simulate import LayerSimulator, SimulatedLayer, simulate
from .torch_engine import TorchEngine, set_threads
from .trajectories import Batch, Trajectories, collect

__all__ = [
    "Batch",
    "FirstStage",
    "LayerSimulator",
    "ModelParts",
    "Network",
    "Observed",
    "SimulatedLayer",
    "TorchEngine",
    "Trajectories",
    "collect",
    "given_layers",
    "measure",
    "measure_own",
    "observe",
    "open_model",
    "open_model_parts",
    "quantize",
    "refine",
    "sensitivity",
    "set_threads",
    "simulate",
]
