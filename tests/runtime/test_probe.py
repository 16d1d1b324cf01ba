"""The probe: an engine that computes something else here stops every command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import reseal
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.tables import TABLES
from ptqd_export.parity.machines import verify_engines


def spoil_tables(bundle: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tables = load_file(bundle / TABLES)
    change(tables)
    save_file(tables, bundle / TABLES)
    reseal(bundle)


def test_an_engine_that_computes_something_else_here(spoilt: Path, refused: Callable[..., str]) -> None:
    """What another processor's kernels would do is done to the probe instead: shifted by a little more, and a
    little less, than is allowed."""
    words = ("run", spoilt, "--out", spoilt.parent / "x", "--format", "npy", "--batch-size", "4")
    words = (*words, "--num-samples", "8", "--workers")
    key = "w4a8.ort-cpu.probe"
    noise, sound = load_file(spoilt / TABLES)[f"{key}_noise"][0], load_file(spoilt / TABLES)[key]
    spoil_tables(spoilt, lambda t: t.update({key: sound + np.float32(1.02 * noise)}))
    for line in (refused("verify", spoilt), refused(*words, "1"), refused(*words, "2")):
        assert re.search(
            r"w4a8.ort-cpu computes something else here than where the bundle was built "
            r"\(RMS difference .*, allowed .*\): "
            r"this processor, or the runtime's version, differs: rebuild the bundle on this machine",
            line,
        )
    assert not (spoilt.parent / "x").exists()
    spoil_tables(spoilt, lambda t: t.update({key: sound + np.float32(0.98 * noise)}))
    assert verify_engines(Bundle.open(spoilt))[0]


def test_a_bundle_without_probes(spoilt: Path, refused: Callable[..., str]) -> None:
    tables = load_file(spoilt / TABLES)
    for name in ("probe", "probe_noise"):
        spoil_tables(spoilt, lambda t, name=name: (t.update(tables), t.pop(f"w4a8.ort-cpu.{name}")))
        for words in (("verify", spoilt), ("run", spoilt, "--out", spoilt.parent / "x", "--format", "npy")):
            assert f"has no table 'w4a8.ort-cpu.{name}': rebuild the bundle" in refused(*words)
        spoil_tables(spoilt, lambda t, name=name: t.update({f"w4a8.ort-cpu.{name}": np.zeros((1, 3))}))
        assert "(1, 3)), expected" in refused("verify", spoilt)
