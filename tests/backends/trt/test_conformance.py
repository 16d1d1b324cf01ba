"""Every name that this package uses of TensorRT-RTX and of CUDA is in the real bindings."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from fake_cuda import FUNCTIONS, REAL, FakeCuda

import ptqd_export.backends
from ptqd_export.backends.trt import library, loaded

FOLDER = Path(ptqd_export.backends.__file__).parent
MEMBERS: dict[str, set[str]] = {
    "Builder": {
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    },
    "IBuilderConfig": {
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "create_timing_cache",
        "get_timing_cache",
        "num_compute_capabilities",
        "profiling_verbosity",
        "progress_monitor",
        "set_compute_capability",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    },
    "ICudaEngine": {
        "create_engine_inspector",
        "create_execution_context",
        "create_runtime_config",
        "device_memory_size_v2",
        "get_engine_stat",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "load_weights",
        "num_io_tensors",
        "unload_weights",
        "weights_loaded",
    },
    "IExecutionContext": {
        "execute_async_v3",
        "get_tensor_shape",
        "is_stream_capturable",
        "set_device_memory",
        "set_input_shape",
        "set_tensor_address",
    },
    "EngineInspector": {"get_engine_information"},
    "INetworkDefinition": {"get_input", "num_inputs"},
    "IOptimizationProfile": {"set_shape"},
    "IRuntimeCache": {"deserialize", "serialize"},
    "IRuntimeConfig": {
        "create_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    },
    "ITimingCache": {"serialize"},
    "OnnxParser": {"get_error", "num_errors", "parse_from_file"},
    "Runtime": {"defer_weights_loading", "deserialize_cuda_engine", "get_engine_validity"},
    "ILogger": {"log"},
    "IProgressMonitor": {"phase_finish", "phase_start", "step_complete"},
    "IHostMemory": set(),
}
"""What is used of each class of the library."""
CONSTANTS = {
    "BuilderFlag": {"REQUIRE_USER_ALLOCATION", "TF32"},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
    "EngineInvalidityDiagnostics": set(loaded.REASONS),
    "EngineStat": {"TOTAL_WEIGHTS_SIZE"},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
    "LayerInformationFormat": {"JSON"},
    "MemoryPoolType": {"WORKSPACE"},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
    "ProfilingVerbosity": {"DETAILED"},
    "TensorIOMode": {"INPUT", "OUTPUT"},
    "TensorLocation": {"DEVICE"},
    "DataType": set(library.DTYPES),
    "ComputeCapability": {"SM75", "SM89"},
}
OWN = {"__name__", "__version__"}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_are_there(rtx: Any, kind: str) -> None:
    real = getattr(rtx, kind)
    assert {name for name in MEMBERS[kind] if not hasattr(real, name)} == set()


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_there(rtx: Any, kind: str) -> None:
    assert CONSTANTS[kind] <= set(getattr(rtx, kind).__members__)


def test_the_lists_above_are_whole() -> None:
    """Every attribute of the module and of the library's objects that the code names is on one of them."""
    of_module: set[str] = set()
    chains: set[tuple[str, str]] = set()
    used: set[str] = set()
    objects = {
        "builder", "network", "config", "parser", "profile", "runtime", "engine", "inspector", "_engine",
        "_raw", "_cache", "cache", "library.runtime",
    }  # fmt: skip
    for file in (FOLDER / "trt").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node.value)
            if text in ("trt", "module", "self._trt"):
                of_module.add(node.attr)
            if match := re.fullmatch(r"(?:trt|module)\.(\w+)", text):
                chains.add((match[1], node.attr))
            if text.removeprefix("self.") in objects:
                used.add(node.attr)
    assert of_module - OWN <= set(MEMBERS) | set(CONSTANTS) and len(of_module) > 15
    for kind, attribute in chains:
        known = CONSTANTS.get(kind, MEMBERS.get(kind, set()))
        assert attribute in known or attribute in ("__members__", "__init__"), (kind, attribute)
    known = set().union(*MEMBERS.values())
    # Attributes of paths and of this package's own objects that share a name with the library's.
    own = {"exists", "is_file", "name", "parent", "read_bytes", "with_name", "current", "resolve"}
    assert used - known - own == set() and len(used & known) > 30


def test_what_the_fake_checks_arguments_by(rtx: Any) -> None:
    """The signatures of the real bindings are read, and wrong arguments refused."""
    methods = [
        "ICudaEngine.load_weights",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.get_tensor_shape",
        "IExecutionContext.is_stream_capturable",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address",
        "IRuntimeCache.deserialize",
        "Runtime.deserialize_cuda_engine",
    ]
    for method in methods:
        assert fake_tensorrt.signatures(method), method
    check = fake_tensorrt.check_arguments
    check("IExecutionContext.set_tensor_address", "a", 3)
    check("IExecutionContext.set_input_shape", "a", (1, 2))
    for wrong in (("a",), ("a", "b"), (3, "a"), ("a", 3, 4), ("a", None)):
        with pytest.raises(TypeError, match="set_tensor_address takes"):
            check("IExecutionContext.set_tensor_address", *wrong)
    with pytest.raises(TypeError):
        check("ICudaEngine.load_weights", 7)


def test_the_fake_library_has_only_what_the_real_one_has(rtx: Any) -> None:
    pairs = {
        fake_tensorrt.FakeRtxContext: "IExecutionContext",
        fake_tensorrt.FakeRtxEngine: "ICudaEngine",
        fake_tensorrt.FakeCache: "IRuntimeCache",
        fake_tensorrt.FakeConfig: "IRuntimeConfig",
    }
    for fake, kind in pairs.items():
        names = {
            name
            for cls in fake.__mro__[:-1]
            for name, value in vars(cls).items()
            if callable(value) and not name.startswith("_")
        }
        assert names and {name for name in names if not hasattr(getattr(rtx, kind), name)} == set()


def test_every_cuda_function_is_checked_by_the_real_one() -> None:
    """Those that the code calls are all in the fake, which asks the real one first."""
    text = (FOLDER / "cuda.py").read_text()
    called = set(re.findall(r"\b(cuda[A-Z]\w+)\(|_call\(\"(cuda\w+)\"", text))
    names = {name for pair in called for name in pair if name}
    assert len(names) > 20 and names <= set(FUNCTIONS)
    if REAL is None:
        pytest.skip("no cuda-bindings, or a GPU, on which the calls would act")
    fake = FakeCuda()
    for name, wrong in (("cudaMalloc", ("many",)), ("cudaStreamSynchronize", ("s",)), ("cudaSetDevice", ())):
        with pytest.raises(TypeError):
            getattr(fake, name)(*wrong)
    assert fake.calls == []
