"""What README.md and docs/ name exists: commands, options, files, extras, links; scripts write the tables."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import click
import diffusers
import pytest

import ptqd_export
from ptqd_export import Manifest, Recipe, dropin
from ptqd_export.bundle.manifest import FORMAT_VERSION
from ptqd_export.cli import cli
from ptqd_export.core.backend import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS = (ROOT / "engines" / "README.md", ROOT / "calib" / "fashion_mnist" / "README.md")
MOST_LINES = 130
PROGRAM = "ptqd-export"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, indented or fenced."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def prose(text: str) -> str:
    """The text without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def spans(text: str) -> list[str]:
    """Code in the running text, on one line each."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(text))]


def options(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def command_problem(line: str) -> str | None:
    """What is wrong with a whole command line of the program; nothing is run."""
    _, *words = shlex.split(line, comments=True)
    command = cli.commands.get(words[0]) if words else None
    if command is None:
        return f"{line}: no such command"
    try:
        command.make_context(words[0], words[1:])
    except click.ClickException as error:
        return f"{line}: {error.format_message()}"
    return None


def span_problem(span: str) -> str | None:
    """What is wrong with code in the running text: a command with options, or an option alone."""
    name, *words = span.removeprefix(f"{PROGRAM} ").split()
    asked = {word.partition("=")[0] for word in (name, *words) if word.startswith("--")}
    if name in cli.commands:
        known = options(cli.commands[name])
    elif span.startswith(f"{PROGRAM} "):
        return f"{span}: no such command"
    elif name.startswith("--"):
        scripts = (
            path.read_text("utf-8") for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("calib/*/*.py"))
        )
        known = {found for text in scripts for found in re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text)}
        known |= {option for command in cli.commands.values() for option in options(command)}
    else:
        return None
    return f"{span}: no option {min(asked - known)}" if asked - known else None


def script_problem(line: str) -> str | None:
    """What is wrong with a call of a script: `python FILE --option ...`."""
    words = shlex.split(line, comments=True)
    file = ROOT / words[words.index("python") + 1]
    if not file.is_file():
        return f"{line}: no such file"
    missing = [word for word in words if word.startswith("--") and f'"{word}"' not in file.read_text("utf-8")]
    return f"{line}: no option {missing[0]}" if missing else None


def make_problem(line: str) -> str | None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    asked = [word for word in shlex.split(line)[1:] if "=" not in word]
    return None if asked and set(asked) <= {*targets} else f"{line}: no such target"


def install_problem(line: str) -> str | None:
    """From a checkout, with extras that there are: there is no release of the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    found = re.search(r"pip install (?:--\S+ |-c \S+ |-e )*'\.\[([a-z,-]+)\]'", line)
    if found is None:
        return f"{line}: expected pip install '.[EXTRA]'"
    unknown = {*found[1].split(",")} - extras.keys()
    return f"{line}: no extra {min(unknown)}" if unknown else None


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problem(page: Path, target: str) -> str | None:
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return f"{target}: no such file"
    if anchor and anchor not in slugs(file.read_text("utf-8")):
        return f"{target}: no such heading"
    return None


def problems(text: str, page: Path) -> list[str]:
    """Everything on a page that is not there, or is called otherwise."""
    found: list[str | None] = []
    for line in code_lines(text):
        if line.startswith(f"{PROGRAM} "):
            found.append(command_problem(line))
        elif re.match(r"(taskset -c \d+ )?python ", line):
            found.append(script_problem(line))
        elif line.startswith("make "):
            found.append(make_problem(line))
        elif "pip install" in line:
            found.append(install_problem(line))
    for span in spans(text):
        if span.startswith("make "):
            found.append(make_problem(span))
        elif span.startswith("python "):
            found.append(script_problem(span))
        elif "pip install" in span:
            found.append(install_problem(span))
        elif (
            re.match(r"(ptqd_export|benchmarks|tests|docs|calib)/[\w./-]+$", span)
            and not (ROOT / span).exists()
        ):
            found.append(f"{span}: no such file")
        else:
            found.append(span_problem(span))
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if not target.startswith("https://"):
            found.append(link_problem(page, target))
    return [problem for problem in found if problem is not None]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert problems(page.read_text("utf-8"), page) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("    ptqd-export build model --no-such 3", "no-such"),
        ("    ptqd-export build model --plan w8a8 --backend cpu", "cpu"),
        ("    ptqd-export run bundle", "--out"),
        ("    ptqd-export bake model", "no such command"),
        ("```\nptqd-export bake model\n```", "no such command"),
        ("see `run --no-such`", "no option"),
        ("see `--no-such`", "no option"),
        ("see `ptqd-export bake`", "no such command"),
        ("    python benchmarks/step_time.py --no-such", "no option"),
        ("    python benchmarks/no_such.py", "no such file"),
        ("`make tea`", "no such target"),
        ("    pip install '.[cpu,tea]'", "no extra tea"),
        ("    pip install 'ptqd-export[gpu]'", "expected pip install"),
        ("`benchmarks/no_such.py`", "no such file"),
        ("[x](no_such.md)", "no such file"),
        ("[x](../../elsewhere.md)", "no such file"),
        ("[x](docs/design.md#no-such)", "no such heading"),
    ],
)
def test_what_is_not_there_is_found(text: str, reason: str) -> None:
    found = problems(text, ROOT / "README.md")
    assert len(found) == 1 and reason in found[0]


def blocks(language: str) -> list[str]:
    pages = (page.read_text("utf-8") for page in PAGES)
    return [
        block
        for text in pages
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def test_recipes_of_the_pages_are_recipes() -> None:
    found = blocks("toml")
    assert found
    for block in found:
        Recipe.from_dict(tomllib.loads(block))


def test_python_of_the_pages_calls_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("build", "run"):
        monkeypatch.setattr(ptqd_export, name, create_autospec(getattr(ptqd_export, name)))
    monkeypatch.setattr(dropin, "PtqdUNet", create_autospec(dropin.PtqdUNet))
    monkeypatch.setattr(diffusers.DDIMPipeline, "from_pretrained", lambda folder: SimpleNamespace())
    found = blocks("python")
    assert found
    for block in found:
        exec(block, {})


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", ["README.md", "docs/cpu.md", "docs/gpu.md"])
def test_backends_are_those_of_the_table(page: str) -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `([a-z-]+)` \|", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    known = {name: backend.extra for name, backend in BACKENDS.items()}
    assert {(name, extra) for name, extra in rows} <= {*known.items()}
    assert page != "README.md" or dict(rows) == known


def test_sections_stand_where_scripts_write_them(script: Callable[[str], ModuleType]) -> None:
    report = script("report")
    marks = {page: re.findall(r"<!-- ([a-z-]+): (begin|end) -->", page.read_text("utf-8")) for page in PAGES}
    expected = {page: {name for name, file in report.SECTIONS.items() if file == page} for page in PAGES}
    for page, found in marks.items():
        assert [name for name, _ in found[::2]] == [name for name, _ in found[1::2]]
        assert {kind for _, kind in found[::2]} <= {"begin"} and {kind for _, kind in found[1::2]} <= {"end"}
        assert {name for name, _ in found} == expected[page]
    sources = {path: path.read_text("utf-8") for path in ROOT.glob("benchmarks/*.py")}
    written = {name for text in sources.values() for name in re.findall(r'write_section\("([a-z-]+)"', text)}
    named = {
        name for name in report.SECTIONS for path, text in sources.items()
        if f'"{name}"' in text and path.name != "report.py"
    }  # fmt: skip
    assert written <= report.SECTIONS.keys() == named
    assert all(report.read_section(name) for name in report.SECTIONS)


def test_write_section(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = script("report")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    monkeypatch.setattr(report, "SECTIONS", {"x": page, "y": page})
    report.write_section("x", "new\n")
    assert page.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
    assert report.read_section("x") == "new"
    with pytest.raises(SystemExit, match="has no section y"):
        report.read_section("y")


def test_recipe_keys_are_those_of_the_code(script: Callable[[str], ModuleType]) -> None:
    assert script("report").read_section("recipe-keys") == script("recipe_reference").reference()


def test_recipe_reference_asks_for_every_key(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("recipe_reference")
    monkeypatch.setattr(module, "MEANING", {k: v for k, v in module.MEANING.items() if k != "sampler.eta"})
    with pytest.raises(SystemExit, match=r"sampler\.eta"):
        module.reference()


def test_first_table_has_the_figures_of_the_benchmarks(script: Callable[[str], ModuleType]) -> None:
    report = script("report")
    measured = (report.read_section(name) for name in ("weights", "step-time", "quality-headline"))
    assert report.read_section("summary") == script("summary").summary(*measured)


def test_manifest_is_described() -> None:
    text = (ROOT / "docs" / "bundle.md").read_text("utf-8")
    assert f"`format_version` is {FORMAT_VERSION}." in text
    rows = re.findall(
        r"^\| (`[^|]+) \|", text.partition("## The manifest")[2].partition("\n## ")[0], re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in fields(Manifest)} | {"sha256", "format_version"}


def test_house_is_described() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8").partition("## The house")[2].partition("\n## ")[0]
    package = Path(ptqd_export.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {*re.findall(r"`(\w+)/`", text)} >= rooms
