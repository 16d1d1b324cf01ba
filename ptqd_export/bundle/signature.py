"""Signatures: who built a bundle. Hashes alone show damage, not origin.

A detached Ed25519 signature (RFC 8032) over the bundle's seal, the SHA-256 of its manifest, which holds the
SHA-256 of every other file. It lies beside the bundle's folder, as `<bundle>.sig`: a line of JSON.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from ..core.backend import install_hint
from ..errors import BackendUnavailable, BundleError, RecipeError
from ..files import write_file
from .bundle import Bundle
from .reading import read_small

ALGORITHM = "ed25519"
MAX_BYTES = 1 << 16
"""Of a key or a signature."""


def _message(seal: str) -> bytes:
    """What is signed: nothing that was signed for another purpose can pass for it."""
    return b"ptqd-export bundle\n" + seal.encode()


def _library() -> Any:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise BackendUnavailable(f"signatures need cryptography ({error}): {install_hint('sign')}") from error
    return exceptions, serialization, ed25519


def signature_path(bundle: Path) -> Path:
    """Where the signature of a bundle lies, if not said otherwise."""
    resolved = bundle.resolve()
    return resolved.with_name(f"{resolved.name}.sig")


def sign(bundle: Bundle, private_key: Path, out: Path) -> None:
    """Write the signature of an opened bundle.

    Args:
        private_key: PEM file of an Ed25519 key, not encrypted: `openssl genpkey -algorithm ed25519 -out
            key.pem`.
    Raises:
        BackendUnavailable: cryptography is not installed.
        RecipeError: no such key.
        PTQDError: the signature cannot be written.
    """
    _, serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(_read(private_key), password=None)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{private_key} is not an unencrypted PEM private key: make one with "
            "`openssl genpkey -algorithm ed25519 -out key.pem`"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise RecipeError(f"{private_key} is a key of another kind: give an Ed25519 one")
    signature = base64.b64encode(key.sign(_message(bundle.seal))).decode()
    line = json.dumps({"algorithm": ALGORITHM, "bundle": bundle.seal, "signature": signature})
    write_file(out, line.encode() + b"\n")


def check_signature(bundle: Bundle, public_key: Path, signature: Path) -> None:
    """The holder of a key has signed this bundle.

    Args:
        public_key: PEM file: `openssl pkey -in key.pem -pubout -out public.pem`.
    Raises:
        BackendUnavailable: cryptography is not installed.
        RecipeError: no such key.
        BundleError: there is no signature, or it is not of this bundle by this key.
    """
    exceptions, serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_public_key(_read(public_key))
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{public_key} is not a PEM public key: make one with `openssl pkey -in key.pem -pubout -out "
            "public.pem`"
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise RecipeError(f"{public_key} is a key of another kind: give an Ed25519 one")
    try:
        data = json.loads(read_small(signature, MAX_BYTES))
        algorithm, seal, signed = (data[name] for name in ("algorithm", "bundle", "signature"))
        raw = base64.b64decode(signed, validate=True)
    except OSError as error:
        raise BundleError(
            f"{signature} cannot be read ({error.strerror}): the bundle is not signed"
        ) from error
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"{signature} is not a signature: ask for it again") from error
    if algorithm != ALGORITHM or seal != bundle.seal:
        raise BundleError(f"{signature} is of another bundle: ask for the one of {bundle.path}")
    try:
        key.verify(raw, _message(bundle.seal))
    except exceptions.InvalidSignature as error:
        raise BundleError(
            f"{signature} was not made with the key of {public_key}: do not trust the bundle, or give the "
            "right key"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return read_small(path, MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give the file of a key") from error
