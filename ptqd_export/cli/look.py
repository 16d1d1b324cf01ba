"""The inspect and verify commands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..core.backend import ORT_CPU, install_hint
from ..errors import BackendUnavailable, RecipeError
from .common import common, show


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the per-step figures to this PNG, the Pareto front to <name>-pareto.png, and the noise of "
    "single layers to <name>-layers-<precision>.png for precisions such as w4a4+.",
)
@common
def inspect(bundle_dir: Path, plot: Path | None, as_json: bool) -> None:
    """Show what BUNDLE holds: engines, layers, and per step precision, k, bias, sigma, sigma', SNR."""
    from ..bundle import Bundle
    from ..evaluate.inspect import per_step, plot_bundle, text

    bundle = Bundle.open(bundle_dir)
    rows = per_step(bundle)
    if plot is not None:
        plot_bundle(bundle, plot)
    manifest = {name: value for name, value in bundle.manifest.to_dict().items() if name != "files"}
    result = {"bundle": bundle.seal, "manifest": manifest, "steps": [asdict(row) for row in rows]}
    show(result, as_json, text(bundle, rows))


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Choice([ORT_CPU]),
    help="Also compare every backend that works here with this one, without optimisations, layer by layer.",
)
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Also check the signature, by this PEM public key (Ed25519).",
)
@click.option("--signature", type=click.Path(path_type=Path), help="The signature; <BUNDLE>.sig if left out.")
@common
def verify(
    bundle_dir: Path, against: str | None, key: Path | None, signature: Path | None, as_json: bool
) -> None:
    """Check every hash of BUNDLE, and what its graphs and engines compute here.

    Every graph and engine that can run here is compared with what it computed where the bundle was built.
    """
    from ..bundle import Bundle
    from ..bundle import signature as signing
    from ..parity.machines import backend_states, verify_engines

    bundle = Bundle.open(bundle_dir)
    if key is not None:
        signing.check_signature(bundle, key, signature or signing.signature_path(bundle_dir))
    elif signature is not None:
        raise RecipeError("--signature is checked by a key: give --key public.pem too")
    compare = None if against is None else _comparer()
    engines, left_out = verify_engines(bundle)
    result: dict[str, Any] = {
        "bundle": str(bundle_dir),
        "files": len(bundle.manifest.files),
        "sha256": bundle.seal,
        "signed": key is not None,
        "engines": engines,
        "not_evaluated": left_out,
        "ok": True,
    }
    lines = (
        f"{bundle_dir}: {result['files']} files match their SHA-256; evaluated: "
        f"{', '.join(engines) or 'nothing'}"
    )
    if key is not None:
        lines += f"\nsigned by the owner of {key}"
    lines += "".join(f"\nnot evaluated here: {what}: {why}" for what, why in left_out.items())
    if compare is not None:
        states, parsed = backend_states(bundle), compare.parsers(bundle)
        compared = compare.compare_backends(bundle, states)
        result |= {
            "against": against,
            "backends": states,
            "parsers": parsed,
            "compared": [asdict(comparison) for comparison in compared],
        }
        lines += "\n" + compare.text(states, parsed, compared)
    show(result, as_json, lines)


def _comparer() -> Any:
    """Import the module that compares backends.

    Raises:
        BackendUnavailable: onnx or Polygraphy is not installed.
    """
    try:
        from ..parity import compare, polygraphy
    except ImportError as error:
        raise BackendUnavailable(f"comparing layers needs onnx ({error}): {install_hint('build')}") from error
    polygraphy.load()
    return compare
