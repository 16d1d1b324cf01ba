"""run and the others on a bundle of a text model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Built, Invoke, Launch, copied, environment, reseal
from PIL import Image


def test_prompts_to_pictures(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\nphoto\n", "utf-8")
    result = invoke(
        "run",
        texts.path,
        "--out",
        tmp_path / "a",
        "--prompts-file",
        file,
        "--negative-prompt",
        "mat",
        "--json",
    )
    assert result.code == 0 and result.json["files"] == ["00000.png", "00001.png", "00002.png"]
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["prompts"] == ["a cat", "a dog", "photo"] and about["negative_prompt"] == "mat"
    assert "tokenizers" in about["versions"]
    for name, size in (("00000.png", (8, 8)), ("grid.png", (24, 8))):
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.size == size
    words = ("--prompt", "a cat", "--prompt", "a dog", "--prompt", "photo", "--num-samples", 3)
    again = invoke("run", texts.path, "--out", tmp_path / "b", *words, "--negative-prompt", "mat")
    assert again.code == 0 and "note" not in again.out
    for name in ("00000.png", "00001.png", "00002.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_arrays_of_pictures_and_of_latents(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    for kind, shape in (("npy", (2, 3, 8, 8)), ("latents", (2, 4, 4, 4))):
        words = ("--prompt", "cat " * 9, "--num-samples", 2, "--format", kind)
        result = invoke("run", texts.path, "--out", tmp_path / kind, *words)
        assert result.code == 0 and "tokens, of which the first" in result.out
        assert np.load(tmp_path / kind / "samples.npy").shape == shape
        assert (tmp_path / kind / "grid.png").exists() == (kind == "npy")


def test_without_torch(texts: Built, tmp_path: Path) -> None:
    """Nor transformers, diffusers or onnx: what builds bundles is not needed to draw from one."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'diffusers', 'onnx', 'onnx_ir')))\n"
        "from ptqd_export.cli import main\n"
        "main(sys.argv[1:])"
    )
    words = [
        "run",
        str(texts.path),
        "--out",
        str(tmp_path / "out"),
        "--prompt",
        "a cat",
        "--num-samples",
        "2",
        "--backend",
        "ort-cpu",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out" / "00001.png").exists()


def test_tokenizers_that_are_missing(
    texts: Built, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = invoke("run", texts.path, "--out", tmp_path / "out", "--prompt", "a cat").error
    assert "prompts need tokenizers" in line and "pip install '.[text]'" in line
    assert invoke("verify", texts.path).out.count("not evaluated here: text_encoder") == 1


def test_no_prompt_is_said(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("run", texts.path, "--out", tmp_path / "out", "--num-samples", 1)
    assert "note: no prompt was given" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--negative-prompt", "x"), "without a prompt"),
        (("--prompt", "x", "--prompts-file", "empty.txt"), "both given"),
        (("--prompts-file", "empty.txt"), "holds no prompt"),
        (("--prompts-file", "latin.txt"), "not valid UTF-8 in line 1"),
        (("--prompts-file", "nothing.txt"), "cannot be read"),
        (("--prompt", "\udcff"), "not valid UTF-8"),
        (("--prompt", "x", "--condition", "encoder_hidden_states=c.npy"), "both given"),
        (("--prompt", "x", "--class-labels", "0"), "has no classes"),
    ],
)
def test_one_line(
    texts: Built,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"b\xe4r")
    np.save("c.npy", np.zeros((16, 8, 8), np.float32))
    assert message in invoke("run", texts.path, "--out", tmp_path / "out", *words).error
    assert not (tmp_path / "out").exists()


def test_a_model_without_text_or_latents(guided: Built, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "takes no text" in invoke("run", guided.path, "--out", out, "--prompt", "a cat").error
    assert "samples no latents" in invoke("run", guided.path, "--out", out, "--format", "latents").error


def test_latents_are_no_pictures(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    """Of a bundle without a decoder, however many channels they have."""
    bundle = copied(texts, tmp_path)
    shutil.rmtree(bundle / "vae_decoder")
    reseal(bundle, lambda data: data["pipeline"].update(decoder=None))
    for kind in ("png", "npy"):
        line = invoke("run", bundle, "--out", tmp_path / "out", "--prompt", "a", "--format", kind).error
        assert "no decoder that makes pictures of them: give --format latents" in line
    words = ("--prompt", "a", "--format", "latents", "--num-samples", 1)
    assert invoke("run", bundle, "--out", tmp_path / "out", *words).code == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["run.json", "samples.npy"]


def test_eval_and_inspect(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    words = ("--num-samples", 3, "--resamples", 0, "--prompt", "a cat", "--prompt", "a dog")
    result = invoke("eval", texts.path, "--out", tmp_path / "report", *words, "--json")
    assert result.code == 0 and result.json["rows"][1]["paired"]["psnr"]["value"] > 20
    assert "update, text_encoder, vae_decoder" in invoke("verify", texts.path).out
    shown = invoke("inspect", texts.path).out
    assert "text_encoder: prompts of up to 6 tokens to 8x8, fp32" in shown
    assert "vae_decoder: AutoencoderKL, latents to pictures 3x8x8, scaling factor 0.5, fp32" in shown


def test_eval_takes_prompts_and_threads(texts: Built, tmp_path: Path, launch: Launch) -> None:
    """In a process that has opened no engine: encoding prompts opens the first."""
    words = ("--num-samples", "2", "--resamples", "0", "--prompt", "a cat", "--backend", "ort-cpu")
    threads = str(len(os.sched_getaffinity(0)) + 1)  # not what engines have by themselves
    process = launch("eval", texts.path, "--out", tmp_path / "report", *words, "--threads", threads)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def test_another_plan_keeps_the_parts(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("plan", texts.path, "--rule", "snr", "--out", tmp_path / "other").code == 0
    words = ("--num-samples", 1, "--prompt", "a cat")
    assert invoke("run", tmp_path / "other", "--out", tmp_path / "out", *words).code == 0
