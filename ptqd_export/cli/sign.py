"""The sign command."""

from __future__ import annotations

from pathlib import Path

import click

from .common import common, show


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    help="PEM file of an Ed25519 private key: openssl genpkey -algorithm ed25519 -out key.pem",
)
@click.option("--out", type=click.Path(path_type=Path), help="The signature; <BUNDLE>.sig if left out.")
@common
def sign(bundle_dir: Path, key: Path, out: Path | None, as_json: bool) -> None:
    """Sign BUNDLE, so that others can tell who built it: `ptqd-export verify BUNDLE --key public.pem`."""
    from ..bundle import Bundle, signature

    bundle = Bundle.open(bundle_dir)
    out = signature.signature_path(bundle_dir) if out is None else out
    signature.sign(bundle, key, out)
    result = {"bundle": str(bundle_dir), "sha256": bundle.seal, "signature": str(out)}
    show(result, as_json, f"{out}: signature of {bundle_dir} ({bundle.seal})")
