"""Calibration in torch: open a model, collect its trajectories, quantize it, simulate it, measure its noise."""

from .engine import TorchEngine, set_threads
from .measure import measure
from .models import Network, open_model
from .quantize import Observed, observe, quantize
from .simulate import LayerSimulator, SimulatedEngine, SimulatedLayer
from .trajectories import Batch, Trajectories, collect

__all__ = [
    "Batch",
    "LayerSimulator",
    "Network",
    "Observed",
    "SimulatedEngine",
    "SimulatedLayer",
    "TorchEngine",
    "Trajectories",
    "collect",
    "measure",
    "observe",
    "open_model",
    "quantize",
    "set_threads",
]
