"""Known holes, each as its smallest case: what was let in, crashed or hung once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from .base import GIB, QUANTIZATION, TABLES, WEIGHTS, Draft, Link, Sparse, Special
from .mutations.engines import add

Case = Callable[[Draft], object]
CORPUS: dict[str, Case] = {}
"""Must be refused."""
HARMLESS: dict[str, Case] = {}
"""Must be accepted: nothing in them is used."""
BOUNDED: dict[str, Case] = {}
"""May be either, in bounds."""


def known(change: Case) -> Case:
    CORPUS[change.__name__.replace("_", " ")] = change
    return change


def harmless(change: Case) -> Case:
    HARMLESS[change.__name__.replace("_", " ")] = change
    return change


def bounded(change: Case) -> Case:
    BOUNDED[change.__name__.replace("_", " ")] = change
    return change


def graph(draft: Draft) -> str:
    """The first graph of the plan's precision on the CPU."""
    one = draft.data["plan"].partition("*")[0]
    return next(
        g["file"] for g in draft.data["graphs"] if (g["precision"], g["emission"]) == (one, "ort-cpu")
    )


@known
def engine_of_six_gigabytes(draft: Draft) -> None:
    draft.contents[add(draft)[0]["file"]] = Sparse(6 * GIB)


@known
def tables_of_six_gigabytes(draft: Draft) -> None:
    draft.contents[TABLES] = Sparse(6 * GIB)


@known
def quantization_of_six_gigabytes(draft: Draft) -> None:
    draft.contents[QUANTIZATION] = Sparse(6 * GIB)


@known
def weights_of_a_terabyte(draft: Draft) -> None:
    """Whoever finds the hash wrong has read it all."""
    draft.contents[WEIGHTS] = Sparse(1 << 40, draft.read(WEIGHTS), "0" * 64)


@known
def graph_of_six_gigabytes(draft: Draft) -> None:
    draft.contents[graph(draft)] = Sparse(6 * GIB)


@known
def terminal_escapes_in_a_name(draft: Draft) -> None:
    name = "\x1b]0;owned\x07\x1b[2J.onnx"
    draft.contents[name] = b"x"


@known
def name_of_a_megabyte(draft: Draft) -> None:
    draft.entries["x" * (1 << 20) + ".json"] = {"sha256": "0" * 64, "size": 1}


@known
def model_name_with_terminal_escapes(draft: Draft) -> None:
    draft.data["sampling"]["model"]["name"] = "\x1b[2J\x1b[31mowned"


@known
def deep_json(draft: Draft) -> None:
    draft.data["provenance"]["recipe"]["deep"] = "@"
    draft.raw.append(lambda content: content.replace(b'"@"', b"[" * 100_000 + b"]" * 100_000))


@known
def json_just_deep_enough(draft: Draft) -> None:
    """json reads it, what walks through it does not: it was an internal error."""
    draft.data["provenance"]["recipe"]["deep"] = "@"
    draft.raw.append(lambda content: content.replace(b'"@"', b"[" * 950 + b"]" * 950))


@known
def plan_of_very_many_steps(draft: Draft) -> None:
    draft.data["plan"] = f"{draft.data['plan'].partition('*')[0]}*999999 " * 1000


@bounded
def front_of_very_long_plans(draft: Draft) -> None:
    one = draft.data["plan"].partition("*")[0]
    draft.data["choice"]["front"] = [{"cost": 1.0, "error": 1.0, "plan": f"{one}*100000"}] * 1000


@known
def number_of_very_many_digits(draft: Draft) -> None:
    draft.data["choice"]["bops"] = "@"
    draft.raw.append(lambda content: content.replace(b'"@"', b"9" * 100_000))


@known
def fifo_in_the_place_of_a_file(draft: Draft) -> None:
    draft.contents[WEIGHTS] = Special("fifo", draft.read(WEIGHTS))


@known
def link_to_a_device(draft: Draft) -> None:
    draft.contents[WEIGHTS] = Link("/dev/zero", draft.read(WEIGHTS))


@known
def link_to_a_file_of_the_user(draft: Draft) -> None:
    draft.may_open.add("secret.bin")
    draft.contents[TABLES] = Link("../canary/secret.bin", draft.read(TABLES))


@known
def manifest_is_a_fifo(draft: Draft) -> None:
    draft.manifest_as = Special("fifo")


@known
def the_format_before_this_one(draft: Draft) -> None:
    draft.data["format_version"] = 4


@known
def one_graph_very_many_times(draft: Draft) -> None:
    """Each was evaluated."""
    draft.data["graphs"] = draft.data["graphs"][:1] * 5000 + draft.data["graphs"][1:]


@known
def graph_by_the_name_of_a_text(draft: Draft) -> None:
    draft.rename(draft.data["update"]["file"], "update.json")


@known
def engine_that_is_the_weights(draft: Draft) -> None:
    add(draft)[0]["file"] = WEIGHTS


@known
def tables_that_overlap(draft: Draft) -> None:
    data = draft.read(TABLES)
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    keys = [key for key in header if key.endswith(".e") or key.endswith(".d")]
    header[keys[0]]["data_offsets"] = header[keys[1]]["data_offsets"]
    text = json.dumps(header).encode()
    draft.contents[TABLES] = len(text).to_bytes(8, "little") + text + data[8 + length :]


@bounded
def sums_that_overflow(draft: Draft) -> None:
    """numpy warned of it, on stderr."""
    arrays = load(draft.read(TABLES))
    key = next(key for key in arrays if key.endswith(".ort-cpu.e"))
    draft.contents[TABLES] = save({**arrays, key: np.full_like(arrays[key], -1e300)})


@known
def sums_that_ratios_overflow_by(draft: Draft) -> None:
    """numpy warned of it, on stderr."""
    arrays = load(draft.read(TABLES))
    key = next(key for key in arrays if key.endswith(".ort-cpu.dd"))
    draft.contents[TABLES] = save({**arrays, key: np.full_like(arrays[key], 1e-320)})


@known
def guidance_that_overflows(draft: Draft) -> None:
    """numpy warned of it, on stderr."""
    draft.data["sampling"]["guidance_scale"] = -1e308


@harmless
def plan_that_is_written_backwards(draft: Draft) -> None:
    """`inspect` printed it as it was."""
    draft.data["choice"]["compared"][0]["plan"] = "\u202e gnp.exe"


@bounded
def schedule_at_the_edge(draft: Draft) -> None:
    """numpy warned of it, on stderr."""
    draft.data["sampling"]["schedule"]["alphas_cumprod"][-1] = 5e-324


@bounded
def case_of_letters_alone(draft: Draft) -> None:
    """Two files, or one that counts as the other."""
    draft.contents["Manifest.json"] = b"{}"


@harmless
def nothing_changed(draft: Draft) -> None:
    pass


@harmless
def note_in_the_recipe(draft: Draft) -> None:
    draft.data["provenance"]["recipe"]["note"] = "a note"


@harmless
def file_that_is_not_listed(draft: Draft) -> None:
    draft.contents["numpy.py"] = b"raise SystemExit('owned')"
    draft.unlisted.add("numpy.py")


@harmless
def link_to_the_right_content(draft: Draft) -> None:
    _linked(draft, TABLES)


@harmless
def every_file_a_link_as_a_cache_of_downloads_has_them(draft: Draft) -> None:
    for name in draft.names:
        _linked(draft, name)


def _linked(draft: Draft, name: str) -> None:
    blob = hashlib.sha256(draft.read(name)).hexdigest()
    (draft.canary / blob).write_bytes(draft.read(name))
    draft.may_open.add(blob)
    draft.contents[name] = Link(f"../canary/{blob}", draft.read(name))


@harmless
def engines_that_cannot_run_here(draft: Draft) -> None:
    add(draft)
