"""The export-pipeline command."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.backend import Emission, install_hint
from ..core.precision import Precision
from ..errors import BackendUnavailable
from .common import common, show


@click.command("export-pipeline")
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--precision", help="Of the network, at all steps; that of most steps of the plan if left out.")
@click.option(
    "--emission",
    type=click.Choice([str(emission) for emission in Emission]),
    default=str(Emission.PORTABLE),
    show_default=True,
    help="The form of its graph.",
)
@common
def export_pipeline(bundle_dir: Path, out: Path, precision: str | None, emission: str, as_json: bool) -> None:
    """Write BUNDLE as a folder that optimum-onnx and optimum-intel open as a StableDiffusionPipeline."""
    from ..bundle import Bundle

    try:
        from ..assemble.stock_folder import write_stock
    except ImportError as error:
        raise BackendUnavailable(f"this needs onnx ({error}): {install_hint('build')}") from error
    wanted = None if precision is None else Precision.parse(precision)
    stock = write_stock(Bundle.open(bundle_dir), out, wanted, Emission(emission))
    result = {
        "pipeline": str(out),
        "precision": str(stock.precision),
        "emission": str(stock.emission),
        "scheduler": stock.scheduler,
        "call": dict(stock.call),
    }
    call = ", ".join(f"{name}={value}" for name, value in stock.call.items())
    text = f"{out}: {stock.precision} at all steps, {stock.scheduler}; call it with {call}"
    show(result, as_json, text)
