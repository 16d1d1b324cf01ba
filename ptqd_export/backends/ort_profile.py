"""Where ONNX Runtime's CPU kernels spend a call."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from ..core.engine import Feeds
from .ort import OrtEngine


def operator_seconds(path: Path, feeds: Feeds, calls: int, exact: bool = True) -> dict[str, float]:
    """Seconds per kind of operator in a call of a graph, those that take most first.

    The profiler adds a little to every node, so that shares of many small nodes are too large.

    Args:
        exact: as for `OrtEngine`.
    Raises:
        BackendUnavailable, GraphError: as `OrtEngine`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with OrtEngine(path, profile=Path(folder) / "profile", exact=exact) as engine:
            own = {name: feeds[name] for name in engine.inputs}
            for _ in range(calls + 1):
                engine(own)
            file = Path(engine.session.end_profiling())
        events = json.loads(file.read_text("utf-8"))
    seconds: Counter[str] = Counter()
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    for event in nodes[len(nodes) // (calls + 1) :]:  # the first call also allocates
        seconds[event["args"]["op_name"]] += event["dur"] * 1e-6 / calls
    return dict(seconds.most_common())
