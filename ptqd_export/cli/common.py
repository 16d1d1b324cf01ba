"""What all commands share: options, output, and the one line that reports a failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import PTQDError, RecipeError
from ..typed import visible

if TYPE_CHECKING:
    from ..bundle.manifest import Artifact, UpdateEngine


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every command has."""
    command = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )(command)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one machine-readable JSON object on stdout."
    )(command)


# Options of the commands that sample.
condition = click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="A tensor condition (N, ...), e.g. text embeddings.",
)
_PROMPTS = (
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT", help="Of a text model; several go in turn."
    ),
    click.option(
        "--prompts-file",
        type=click.Path(path_type=Path),
        help="A text file in UTF-8 with a prompt a line, in turn.",
    ),
    click.option(
        "--negative-prompt",
        metavar="TEXT",
        help="What guidance leads away from, in place of the empty prompt.",
    ),
)


def prompts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name prompts."""
    for option in reversed(_PROMPTS):
        command = option(command)
    return command


def read_texts(
    prompts: Sequence[str], prompts_file: Path | None, negative_prompt: str | None
) -> tuple[str, ...]:
    """The prompts that the options name; empty where they name none.

    Raises:
        RecipeError: they contradict each other, or the file is of no use.
    """
    from ..bundle.tokenizer import read_prompts

    if prompts and prompts_file is not None:
        raise RecipeError("--prompt and --prompts-file were both given: leave one out")
    if negative_prompt is not None and not prompts and prompts_file is None:
        raise RecipeError("--negative-prompt was given without a prompt: give --prompt too")
    return tuple(prompts) if prompts_file is None else read_prompts(prompts_file)


batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Samples at a time; without it as many as memory and cores suit.",
)
device = click.option(
    "--device", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the GPU."
)
workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes of one thread each that split the batches.",
)


def say(text: str) -> None:
    """Print a line on what is being done, for people who watch."""
    if sys.stderr.isatty():
        click.echo(visible(text), err=True)


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result on stdout."""
    click.echo(json.dumps(result, indent=1, allow_nan=False) if as_json else visible(text))


def engine_notes(engines: Iterable[Artifact | UpdateEngine]) -> list[str]:
    """What a user should know about finished engines."""
    return [
        f"engine {engine.name}: {note}" for engine in engines if engine.build for note in engine.build.notes
    ]


def in_one_line(error: BaseException) -> str:
    """What went wrong, on one line for people."""
    text = " ".join(str(error).split())
    if isinstance(error, PTQDError):
        return text
    if isinstance(error, OSError):
        return (
            f"{error.strerror or text}{f': {error.filename}' if error.filename else ''}: nothing was changed"
        )
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text[:120]}): lower --batch-size, or the number of samples"
    return (
        f"internal error: {type(error).__name__}: {text[:300]} "
        "(run again with --debug for the traceback; please report it)"
    )


def fail(line: str, code: int = 1) -> None:
    """End the program with one line on stderr."""
    click.echo(f"Error: {visible(line)}", err=True)
    raise SystemExit(code)
