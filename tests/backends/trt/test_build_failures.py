"""How real builds fail: graphs that cannot be read or built, crashes, memory, interrupts and full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers import environment, has_gpu

from ptqd_export.backends.trt.build import _in_words
from ptqd_export.backends.trt.child import Failure, Request, Trouble
from ptqd_export.errors import BackendUnavailable, GraphError, PTQDError, RecipeError

from .shared import RTX, SETTINGS, Build, conv_graph, crashing_graph, one_line


@pytest.mark.parametrize("content", ["missing", "garbage", "operator", "dimension"])
def test_graphs_that_it_cannot_read(build: Build, tmp_path: Path, content: str) -> None:
    path = tmp_path / "g.onnx"
    if content == "garbage":
        path.write_bytes(b"hello")
    elif content == "operator":
        conv_graph(path, op="NoSuchOp")
    elif content == "dimension":
        model = onnx.load(conv_graph(path))
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
        onnx.save(model, path)
    with pytest.raises(GraphError, match=r"g\.onnx|dynamic size in the first dimension only") as caught:
        build(path)
    text = one_line(caught)
    assert content != "operator" or ("'conv_a' (NoSuchOp)" in text and "e.log" in text)
    assert content != "dimension" or "input 'sample'" in text
    assert not (tmp_path / "e.engine").exists()


def test_braces_in_names(build: Build, tmp_path: Path) -> None:
    """Nothing that the library quotes is taken for a place to fill in."""
    model = onnx.load(conv_graph(tmp_path / "{graph}.onnx", op="NoSuchOp"))
    next(node for node in model.graph.node if node.op_type == "NoSuchOp").name = "{told} {0} {"
    onnx.save(model, tmp_path / "{graph}.onnx")
    with pytest.raises(GraphError, match=r"\{graph\}\.onnx: node '\{told\} \{0\} \{' \(NoSuchOp\)") as caught:
        build(tmp_path / "{graph}.onnx")
    one_line(caught)


def test_a_crash(build: Build, tmp_path: Path) -> None:
    """A scale from a table ends the builder by a signal; this process lives on, the old engine stays."""
    (tmp_path / "e.engine").write_bytes(b"old")
    wanted = r"the builder crashed \(SIG[A-Z]+\) on .*g\.onnx.*every scale must be a constant.*e\.log"
    with pytest.raises(GraphError, match=wanted) as caught:
        build(crashing_graph(tmp_path / "g.onnx"))
    one_line(caught)
    assert (tmp_path / "e.engine").read_bytes() == b"old"


WORDS = {
    Trouble.LIBRARY: (BackendUnavailable, "why {it}"),
    Trouble.TARGET: (RecipeError, "why {it}"),
    Trouble.DRIVER: (
        BackendUnavailable,
        "does not work here: why {it}: see that the NVIDIA driver is installed",
    ),
    Trouble.GRAPH: (GraphError, "cannot read g.onnx: node 'n' (Conv): why {it}"),
    Trouble.INPUT: (
        GraphError,
        "input 'n' of g.onnx is why {it}: expected a dynamic size in the first dimension",
    ),
    Trouble.SETTING: (GraphError, "refuses why {it} for g.onnx"),
    Trouble.BUILD: (GraphError, "cannot build g.onnx: why {it}: keep the layers"),
    Trouble.WORKSPACE: (GraphError, "cannot build g.onnx: why {it}: raise tensorrt.workspace_mib"),
    Trouble.MEMORY: (BackendUnavailable, "memory ran out on g.onnx (why {it}): end other programs"),
    Trouble.LOG: (PTQDError, "cannot write e.log: why {it}: choose another place"),
    Trouble.ENGINE: (
        PTQDError,
        "cannot write the engine of 5 bytes into there: why {it}: choose another place",
    ),
}


@pytest.mark.parametrize("trouble", Trouble)
def test_failures_in_words(trouble: Trouble) -> None:
    """Every trouble has its type and its line."""
    request = Request(RTX, "g.onnx", "there/part", SETTINGS, {})
    failure = Failure(trouble, "why {it}", "n", "Conv", 5)
    error = _in_words(failure, request, Path("g.onnx"), Path("e.log"))
    kind, text = WORDS[trouble]
    assert type(error) is kind and text in str(error) and "\n" not in str(error)


def _children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@needs_proc
def test_killed_by_the_system(build: Build, tmp_path: Path) -> None:
    def kill(fraction: float, phase: str) -> None:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)

    wanted = r"most likely because memory ran out.*e\.log"
    with pytest.raises(BackendUnavailable, match=wanted) as caught:
        build(conv_graph(tmp_path / "g.onnx"), advance=kill)
    one_line(caught)


def test_memory_runs_out(rtx: Any, tmp_path: Path) -> None:
    """Under a real limit on the address space, until it is enough.

    At some limits, a few MiB wide, TensorRT-RTX 1.7 waits forever for a thread of its own: these say nothing.
    """
    if has_gpu():
        pytest.skip("a GPU's driver takes address space of its own")
    code = f"""
import resource, sys
from pathlib import Path
from ptqd_export.backends import trt
from ptqd_export.core.engine_build import EngineSettings
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
graph, engine, log = Path("g.onnx"), Path("e.engine"), Path("e.log")
try:
    trt.build("{RTX}", graph, engine, EngineSettings((1, 2, 4)), key="0" * 64, quantized={{}}, log=log)
except Exception as error:
    print(type(error).__name__, error)
"""
    conv_graph(tmp_path / "g.onnx")
    outcomes = []
    for limit in range(430, 1300, 60):
        words = [sys.executable, "-c", code, str(limit)]
        try:
            run = subprocess.run(
                words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired:
            continue
        assert run.stderr == "" and run.stdout.count("\n") <= 1
        outcomes.append(run.stdout)
        if not run.stdout:
            break
    assert outcomes[-1] == "", "no limit was enough"
    assert len(outcomes) > 1, outcomes
    assert all(text.startswith("BackendUnavailable") for text in outcomes[:-1]), outcomes


class Stop(Exception):
    pass


@needs_proc
@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt])
def test_interrupted(build: Build, tmp_path: Path, stop: type[BaseException]) -> None:
    before, seen = set(_children()), list[int]()

    def advance(fraction: float, phase: str) -> None:
        seen.extend(set(_children()) - before)
        raise stop

    with pytest.raises(stop):
        build(conv_graph(tmp_path / "g.onnx"), advance=advance)
    assert len(seen) == 1 and not _is_running(seen[0])
    assert not (tmp_path / "e.engine").exists()


def test_a_full_disk(build: Build, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full to stand for a full disk")
    graph = conv_graph(tmp_path / "g.onnx")
    (tmp_path / f".e.engine.{os.getpid()}.part").symlink_to("/dev/full")
    wanted = r"cannot write the engine of \d+ bytes into .*No space left on device.*free some space"
    with pytest.raises(PTQDError, match=wanted) as caught:
        build(graph)
    one_line(caught)
    wanted = r"cannot write /dev/full: No space left on device"
    with pytest.raises(PTQDError, match=wanted) as caught:
        build(graph, log=Path("/dev/full"))
    one_line(caught)
    with pytest.raises(PTQDError, match=r"cannot write .*nowhere.*choose another place"):
        build(graph, log=tmp_path / "nowhere" / "e.log")
    assert not (tmp_path / "e.engine").exists()
