"""verify: every graph and engine that can run here beside what it computed where the bundle was built."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import PRECISIONS, RTX, Built, Invoke, reseal
from wrong_layers import changed

from ptqd_export import backends, parity
from ptqd_export.backends import OrtEngine
from ptqd_export.bundle import Bundle
from ptqd_export.core.backend import Emission
from ptqd_export.errors import ParityError
from ptqd_export.parity import machines
from ptqd_export.parity.machines import backend_states, verify_engines

pytest.importorskip("polygraphy")


def test_every_graph_and_the_update_are_evaluated(guided: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, its own emission as the provider optimises it, the others as they are written."""
    opened: list[tuple[str, bool]] = []

    def engine(path: Path, *, optimise: bool) -> OrtEngine:
        opened.append((path.name, optimise))
        return OrtEngine(path, optimise=optimise)

    monkeypatch.setattr(backends, "OrtEngine", engine)
    names, left_out = verify_engines(guided.bundle)
    m = guided.bundle.manifest
    assert names == [*(graph.name for graph in m.graphs), "update"] and left_out == {}
    assert opened == [
        *((graph.file, graph.emission is Emission.ORT_CPU) for graph in m.graphs),
        ("update.onnx", False),
    ]


def test_another_graph_and_another_update_are_refused(spoilt: Path, own: Built, rgb: Built) -> None:
    m = Bundle.open(spoilt).manifest
    one, other = (spoilt / f"{p}.ort-cpu.onnx" for p in ("w8a8", "w4a4"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    reseal(spoilt)
    with pytest.raises(ParityError, match=r"w8a8\.ort-cpu computes something else here"):
        verify_engines(Bundle.open(spoilt))
    one.write_bytes(content)
    reseal(spoilt, lambda data: data["sampling"].update(guidance_scale=m.sampling.guidance_scale + 0.5))
    with pytest.raises(ParityError, match=r"computes something else here|the sampler's update does not do"):
        verify_engines(Bundle.open(spoilt))


def test_what_cannot_run_here_is_said(several: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason of each, and counted: nothing is passed over in silence."""
    states = {"tensorrt": "not installed", RTX: "no GPU", "ort-cuda": "no GPU", "ort-cpu": "broken"}
    monkeypatch.setattr(machines.backends, "available", lambda: states)
    names, left_out = verify_engines(several.bundle)
    assert names == []
    assert left_out == {f"{3 * 7 + 1} graphs": "broken", f"8 {RTX} engines": "no GPU"}
    assert backend_states(several.bundle) == states
    monkeypatch.setattr(machines.backends, "available", lambda: dict.fromkeys(states, "ok"))
    told = backend_states(several.bundle)
    assert told[RTX] == told["ort-cuda"] == told["ort-cpu"] == "ok"
    assert (
        "the bundle has no engines for it: `ptqd-export run ... --backend tensorrt --rebuild`"
        in told["tensorrt"]
    )


# --- the command, with --against


def test_verify_against(guided: Built, invoke: Invoke) -> None:
    result = invoke("verify", guided.path, "--against", "ort-cpu", "--json")
    assert (result.code, result.err) == (0, "")
    assert (
        result.json["ok"]
        and result.json["against"] == "ort-cpu"
        and result.json["backends"]["ort-cpu"] == "ok"
    )
    assert "pip install" in result.json["backends"]["tensorrt"]
    mine = [c for c in result.json["compared"] if c["backend"] == "ort-cpu"]
    assert [c["precision"] for c in mine] == list(PRECISIONS)
    for c in mine:
        assert (c["layers"] > 10) == (c["worst_layer"] is not None) == (c["precision"] != "fp32")
        assert c["share_apart"] <= 1e-3 and list(c["network_snr"]) == ["0", "1", "2"]
        assert all(snr is None or snr >= c["network_limit"][step] for step, snr in c["network_snr"].items())


def test_verify_against_for_people(classes: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {n: s if n == "ort-cpu" else "not now" for n, s in machines.backends.available().items()}
    monkeypatch.setattr(machines.backends, "available", lambda: states)
    out = invoke("verify", classes.path, "--against", "ort-cpu").out
    assert "files match their SHA-256" in out and "\nort-cpu: ok\n" in out
    assert (
        "against ort-cpu running the graphs as they are written: worst layer and whole network in dB (and "
        "the least allowed):" in out
    )
    every = [line.split() for line in out.splitlines() if line.startswith(PRECISIONS)]
    rows = [row for row in every if row[2] == "ort-cpu"]
    assert [row[:3] for row in rows] == [[p, "ort-cpu", "ort-cpu"] for p in PRECISIONS]
    assert len({len(line) for line in out.splitlines() if line.startswith(("fp32 ", "precision "))}) <= 2
    assert rows[0][3:5] == ["0", "-"] and int(rows[1][3]) > 5


def test_a_failure_is_one_line(classes: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = changed("down_blocks.0.resnets.0.conv1", ".weight.scale", lambda scale: scale * np.float32(1.05))
    monkeypatch.setattr(backends, "open_engine", lambda name, path, *rest, **about: opened(path))
    line = invoke("verify", classes.path, "--against", "ort-cpu").error
    assert re.match(
        r"Error: (ort-cpu|openvino) at w8a8: layer down_blocks\.0\.resnets\.0\.conv1 differs from "
        r"w8a8\.(ort-cpu|portable)\.onnx as it is written: ",
        line,
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "polygraphy.comparator",
            "comparing backends needs polygraphy (import of polygraphy.comparator halted; None in "
            "sys.modules): ",
        ),
        (
            "ptqd_export.export",
            "comparing layers needs onnx (import of ptqd_export.export halted; None in sys.modules): ",
        ),
    ],
)
def test_what_is_missing_is_said(
    classes: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "ptqd_export.export":  # the module that needs it is loaded anew
        monkeypatch.delitem(sys.modules, "ptqd_export.parity.compare")
        monkeypatch.delattr(parity, "compare")
    extra = "verify" if "polygraphy" in missing else "build"
    assert (
        invoke("verify", classes.path, "--against", "ort-cpu").error
        == f"Error: {message}in a checkout of ptqd-export: pip install '.[{extra}]'\n"
    )
    assert invoke("verify", classes.path).code == 0


def test_the_other_reference_is_refused(classes: Built, invoke: Invoke) -> None:
    assert "'ort-cuda' is not" in invoke("verify", classes.path, "--against", "ort-cuda").error
