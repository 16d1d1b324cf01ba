"""The full-precision export of a torch network; every precision is a rewrite of its graph.

This is the only file of the folder that imports torch, and it does so only when called.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.engine import SAMPLE, TIMESTEP
from ..core.model import ModelInfo
from ..errors import GraphError
from .dialect import ATTENTION, BATCH, LAYER, OPSET, OUTPUT, PRODUCER
from .graph import first_line, is_const

if TYPE_CHECKING:
    import torch

EXAMPLE_BATCH = 2  # torch.export would specialise 0 and 1
SCOPES = "pkg.torch.onnx.name_scopes"
PREFIX = "module."  # what the wrapper adds to every path


def export_fp(module: torch.nn.Module, info: ModelInfo, timestep: str = "int64") -> ir.Model:
    """The network in full precision, as ONNX of opset 21.

    Inputs: sample f32 (batch, C, H, W), timestep (batch,), then info.inputs (batch, *shape).
    Output: `output` f32 (batch, C, H, W), what the network returns, whatever its prediction type.

    The nodes of Conv2d and Linear modules carry their module path (`LAYER`). Nothing else is kept of the
    exporter's metadata, so the same module gives the same bytes. The weights are the module's own memory.

    Args:
        module: called as module(sample, timestep, **conditions) -> Tensor; put into evaluation mode.
        timestep: its type, "int64" or "float32", which is for solvers that evaluate between train timesteps.
    Raises:
        GraphError: the module cannot be exported, or its batch dimension became static
            (pytorch/pytorch#152018).
    """
    import torch

    conditions = info.null_conditions(EXAMPLE_BATCH)
    names = [SAMPLE, TIMESTEP, *conditions]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    arrays = [
        np.zeros((EXAMPLE_BATCH, *info.sample_shape), np.float32),
        np.zeros(EXAMPLE_BATCH, timestep),
        *conditions.values(),
    ]
    example = tuple(torch.from_numpy(array).to(device) for array in arrays)
    wrapper = _wrap(module, list(conditions))
    return _export(wrapper, module, example, names, [OUTPUT], info.name, variadic=True)


def export_part(
    module: torch.nn.Module, name: str, feed: tuple[str, np.ndarray[Any, Any]], outputs: Sequence[str]
) -> ir.Model:
    """A module of one input, such as a text encoder, in full precision, as ONNX of opset 21.

    The nodes of Conv2d and Linear modules carry their path in `module.module`, which the module wraps.

    Args:
        name: for messages.
        feed: name of the graph's input, and an example (EXAMPLE_BATCH, ...).
        outputs: names of what the module returns.
    Raises:
        GraphError: as `export_fp`.
    """
    import torch

    inner, example = module.get_submodule("module"), (torch.from_numpy(feed[1]),)
    return _export(module.eval(), inner, example, [feed[0]], outputs, name, variadic=False)


def _export(
    wrapper: torch.nn.Module,
    inner: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    names: list[str],
    outputs: Sequence[str],
    what: str,
    *,
    variadic: bool,
) -> ir.Model:
    """The exporter's model of a wrapper around a module `module`, which share their weights.

    Args:
        inner: that module.
        what: name for messages.
        variadic: its forward takes `*tensors`.
    """
    import torch

    dynamic: tuple[Any, ...] = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    if variadic:
        dynamic = (dynamic,)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                wrapper,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except Exception as error:  # the exporter passes on whatever the module or one of its passes raises
        raise GraphError(f"{what} cannot be exported to ONNX: {first_line(error)}") from error
    if program is None or len(program.model.graph.outputs) != len(outputs):
        raise GraphError(
            f"{what} cannot be exported to ONNX: expected a module that returns "
            + ("one tensor, the raw network output" if len(outputs) == 1 else f"{len(outputs)} tensors")
        )
    model = program.model
    _check_batch(model, names, what)
    _name_weights(model)
    _note_origins(model, inner)
    _strip(model)
    _name_batch(model)
    return model


def _wrap(module: torch.nn.Module, conditions: list[str]) -> torch.nn.Module:
    import torch

    class Positional(torch.nn.Module):
        """Takes its inputs by position, so that the order of the graph's inputs is ours."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.module(tensors[0], tensors[1], **dict(zip(conditions, tensors[2:], strict=True)))

    return Positional().eval()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the exporter's prints, warnings and log lines; errors are raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _check_batch(model: ir.Model, names: list[str], what: str) -> None:
    inputs = [value.name for value in model.graph.inputs]
    if inputs != names:
        raise GraphError(f"the exported graph of {what} has inputs {inputs}: expected {names}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or len(value.shape) == 0 or isinstance(value.shape[0], int):
            shape = "unknown" if value.shape is None else str(value.shape)
            raise GraphError(
                f"the batch of {value.name!r} became static in the export of {what} (shape {shape}): "
                "do not turn sizes into Python numbers in the module's forward"
            )


def _name_weights(model: ir.Model) -> None:
    """Keep the weights as plain arrays, not copied, under names relative to the module."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = str(value.name)
        short = name.removeprefix(PREFIX)
        if short != name and short not in graph.initializers and all(v.name != short for v in graph.inputs):
            name = short
        assert value.const_value is not None
        array = np.asarray(value.const_value.numpy())
        value.const_value = ir.tensor(array, dtype=value.const_value.dtype, name=name)
        value.name = name


def _note_origins(model: ir.Model, module: torch.nn.Module) -> None:
    """Set LAYER on nodes of Conv2d and Linear modules, ATTENTION on those of scaled_dot_product_attention.

    A node whose weight is not the module's own (the exporter has folded a normalisation into it) gets no
    LAYER: the graph holds no layer that could be quantized with that module's weight.
    """
    import torch

    layers = {
        id(m): (name, m)
        for name, m in reversed(list(module.named_modules(remove_duplicate=False)))
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    }
    paths = dict(module.named_modules(remove_duplicate=False))
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if len(scopes) < 2:
            continue
        if scopes[-1].startswith("scaled_dot_product_attention"):
            node.metadata_props[ATTENTION] = "1"
        # A second call of a module has a suffix: "module.conv@1".
        path = re.sub(r"@\d+", "", scopes[-2]).removeprefix(PREFIX)
        name, layer = layers.get(id(paths.get(path)), ("", None))
        if layer is None or node.op_type not in ("Conv", "MatMul", "Gemm", "Add"):
            continue
        if node.op_type == "Add" or _same_weight(node.inputs[1], layer.weight.detach().cpu().numpy()):
            node.metadata_props[LAYER] = name


def _same_weight(value: ir.Value | None, weight: np.ndarray[Any, Any]) -> bool:
    """Whether a node's weight holds the module's numbers, transposed (MatMul) or not."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    if value is None or not is_const(value) or value.const_value is None:
        return False
    array = value.const_value.numpy()
    return np.array_equal(array, weight) or (weight.ndim == 2 and np.array_equal(array, weight.T))


def _strip(model: ir.Model) -> None:
    """Remove everything but the computation and our own notes.

    Attributes are put in alphabetical order, because the exporter's order changes from run to run.
    """
    model.producer_name, model.producer_version, model.doc_string = PRODUCER, None, None
    model.metadata_props.clear()
    graph = model.graph
    graph.name, graph.doc_string = PRODUCER, None
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        kept = {key: node.metadata_props[key] for key in (ATTENTION, LAYER) if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        attributes = sorted(node.attributes.values(), key=lambda attribute: attribute.name)
        node.attributes.clear()
        for attribute in attributes:
            node.attributes.add(attribute)
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def _name_batch(model: ir.Model) -> None:
    """Give the batch dimension one readable name, in place of torch's symbols.

    An unused input has a symbol of its own.
    """
    graph = model.graph
    symbols = {str(value.shape[0]) for value in graph.inputs if value.shape is not None}
    pattern = re.compile(r"\b(" + "|".join(sorted(re.escape(s) for s in symbols)) + r")\b")
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if value.shape is None:
            continue
        dims = [
            d if isinstance(d, int) else (None if d.value is None else pattern.sub(BATCH, str(d.value)))
            for d in value.shape
        ]
        value.shape = ir.Shape(dims)
