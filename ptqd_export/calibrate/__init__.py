"""Calibration in torch: open a model, collect trajectories, quantize, simulate and measure the noise."""

from .captions import prompts_of
from .intake import open_model, open_source
from .layer_noise import given_layers, sensitivity, steps_and_weights
from .measure import measure, measure_own
from .network import Network
from .observe import Observed, observe
from .pipeline import DecoderPart, Parts, open_parts
from .pooled import Workers
from .quantize import layer_precisions, quantize
from .refine import refine
from .simulate import LayerSimulator, SimulatedLayer, simulate
from .text import TextPart
from .torch_engine import TorchEngine, set_threads
from .trajectories import Batch, Trajectories, collect

__all__ = [
    "Batch",
    "DecoderPart",
    "LayerSimulator",
    "Network",
    "Observed",
    "Parts",
    "SimulatedLayer",
    "TextPart",
    "TorchEngine",
    "Trajectories",
    "Workers",
    "collect",
    "given_layers",
    "layer_precisions",
    "measure",
    "measure_own",
    "observe",
    "open_model",
    "open_parts",
    "open_source",
    "prompts_of",
    "quantize",
    "refine",
    "sensitivity",
    "set_threads",
    "simulate",
    "steps_and_weights",
]
