"""Who built a bundle: a signature holds for this bundle and this key, and for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from helpers import Built, Invoke

PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def write_keys(folder: Path, name: str, key: Any) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(own: Built, tmp_path: Path, invoke: Invoke) -> tuple[Path, Path, Path]:
    """(a signed bundle, its key, its public key)."""
    bundle = tmp_path / "bundle"
    shutil.copytree(own.path, bundle)
    private, public = write_keys(
        tmp_path, "key", ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    )
    result = invoke("sign", bundle, "--key", private, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["signature"] == str(tmp_path / "bundle.sig")
    return bundle, private, public


def test_a_signed_bundle(signed: tuple[Path, Path, Path], invoke: Invoke, tmp_path: Path) -> None:
    bundle, private, public = signed
    result = invoke("verify", bundle, "--key", public, "--json")
    assert (result.code, result.err) == (0, "") and result.json["signed"] is True
    assert f"\nsigned by the owner of {public}\n" in invoke("verify", bundle, "--key", public).out
    assert invoke("verify", bundle, "--json").json["signed"] is False
    other = tmp_path / "elsewhere.sig"
    assert invoke("sign", bundle, "--key", private, "--out", other).code == 0
    assert other.read_bytes() == (tmp_path / "bundle.sig").read_bytes()  # Ed25519 is deterministic
    assert invoke("verify", bundle, "--key", public, "--signature", other).code == 0


def change_digit(signature: Path) -> None:
    data = json.loads(signature.read_text())
    first = data["signature"][0]
    data["signature"] = ("B" if first == "A" else "A") + data["signature"][1:]
    signature.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read .*: the bundle is not signed"),
        (lambda path: path.write_text("{"), "is not a signature"),
        (lambda path: path.write_text("[" * 60_000), "is not a signature"),
        (lambda path: path.write_text("x" * 100_000), "expected at most"),
        (lambda path: path.write_text('{"algorithm": "ed25519"}'), "is not a signature"),
        (change_digit, "was not made with the key of"),
    ],
)
def test_a_wrong_signature(
    signed: tuple[Path, Path, Path], invoke: Invoke, change: Callable[[Path], object], message: str
) -> None:
    bundle, _, public = signed
    change(bundle.with_name("bundle.sig"))
    error = invoke("verify", bundle, "--key", public).error
    assert re.search(message, error), error


def test_another_bundle_or_key(
    signed: tuple[Path, Path, Path], rgb: Built, invoke: Invoke, tmp_path: Path
) -> None:
    bundle, _, public = signed
    error = invoke("verify", rgb.path, "--key", public, "--signature", bundle.with_name("bundle.sig")).error
    assert "is of another bundle" in error
    _, stranger = write_keys(tmp_path, "stranger", ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    assert "was not made with the key of" in invoke("verify", bundle, "--key", stranger).error
    # A seal copied into the signature of another bundle is not signed.
    data = json.loads(bundle.with_name("bundle.sig").read_text())
    forged = tmp_path / "forged.sig"
    forged.write_text(json.dumps(data | {"bundle": rgb.bundle.seal}))
    error = invoke("verify", rgb.path, "--key", public, "--signature", forged).error
    assert "was not made with the key of" in error


def test_keys_of_another_kind(signed: tuple[Path, Path, Path], invoke: Invoke, tmp_path: Path) -> None:
    bundle, private, public = signed
    curve, curve_public = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    assert "is a key of another kind" in invoke("sign", bundle, "--key", curve).error
    assert "is a key of another kind" in invoke("verify", bundle, "--key", curve_public).error
    assert "is not an unencrypted PEM private key" in invoke("sign", bundle, "--key", public).error
    assert "is not a PEM public key" in invoke("verify", bundle, "--key", private).error
    assert "cannot be read" in invoke("sign", bundle, "--key", tmp_path / "none.pem").error
    assert "give --key public.pem" in invoke("verify", bundle, "--signature", tmp_path / "x.sig").error


def test_without_the_package(
    signed: tuple[Path, Path, Path], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, private, _ = signed
    monkeypatch.setitem(sys.modules, "cryptography", None)
    error = invoke("sign", bundle, "--key", private).error
    assert "signatures need cryptography" in error and "pip install '.[sign]'" in error
