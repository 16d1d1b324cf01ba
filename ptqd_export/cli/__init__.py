"""The command line: build, run, eval, bench, plan, inspect, verify, sign, export-pipeline.

It composes the other parts and holds no numerics. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ..version import __version__
from .bench import bench
from .build import build
from .common import fail, in_one_line
from .eval import evaluate
from .look import inspect, verify
from .pipeline import export_pipeline
from .plan import plan
from .run import run
from .sign import sign


class _Group(click.Group):
    """Raises click.Abort on Ctrl-C, without the empty line that click prints before it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ptqd-export")
def cli() -> None:
    """Quantize a diffusion UNet, correct it (PTQD), and sample from it with an engine per bitwidth."""


for _command in (build, run, evaluate, bench, plan, inspect, verify, sign, export_pipeline):
    cli.add_command(_command)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals that ask for the end, SIGINT and SIGTERM, as KeyboardInterrupt; the list is of those that came.

    Libraries may swallow the exception, or make another of it.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = threading.current_thread() is threading.main_thread()
    try:
        if ours:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, interrupt)
        yield came
    finally:
        if ours:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every failure prints one line on stderr and exits with code 1."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with _interrupts() as came:
        try:
            cli.main(argv, prog_name="ptqd-export", standalone_mode=False)
        except click.Abort:
            _fail_interrupted(came)
        except click.ClickException as error:
            fail(" ".join(error.format_message().split()))
        except Exception as error:  # every failure is one line
            if "--debug" in argv:
                traceback.print_exc()
            if came:
                _fail_interrupted(came)
            fail(in_one_line(error))


def _fail_interrupted(came: Sequence[int]) -> None:
    number = came[0] if came else signal.SIGINT
    fail(
        "interrupted: the old files stand, or the new ones, whole; a build, eval or run --ray takes up "
        "where it stopped when the same command is given again",
        128 + number,
    )


if __name__ == "__main__":
    main()
