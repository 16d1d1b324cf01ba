"""The manifest's values: right in form, absurd or contradictory in what they say."""

from __future__ import annotations

from typing import Any

from ..base import Draft, NotApplicable
from . import mutation
from .manifest import TEXTS

PRECISIONS = (
    "w8a8", "w4a4", "fp32", "fp16", "w8a8-fp8", "w4a16", "w0a0", "w3a3", "w99999999999a8", "w8a8 ", "W8A8",
    "int8", "w-8a8",
    "w8a8\u0663", "\x1b[1m", "w1a1", "w16a16", "w8", "",
)  # fmt: skip
SHAPES: tuple[list[int], ...] = (
    [1, 16384, 16384], [3, 16384, 16384], [2**28, 1, 1], [1, 2**28, 1], [1, 1, 2**28], [1, 1, 1], [0, 8, 8],
    [1, -8, 8],
    [1, 8], [1, 8, 8, 8], [], [4, 8, 8], [3, 8, 8], [1, 9, 9], [2**63, 1, 1], [2**31, 2**31, 1], [1, 16384,
    16383],
    [1, 2048, 2048], [3, 1024, 1024], [10**9, 10**9, 10**9],
)  # fmt: skip
NAMES = (
    "sample",
    "timestep",
    "step",
    "epsilon",
    "class_labels",
    "noise",
    "x",
    "\x1b[31m",
    "a" * 5000,
    "",
    "self",
)


@mutation("manifest/plan", weight=2)
def plan(draft: Draft) -> object:
    rng, steps = draft.rng, len(draft.data["sampling"]["schedule"]["timesteps"])
    one = draft.data["plan"].partition("*")[0]
    value = rng.choice(
        [
            f"{one}*999999", f"{one}*100000", f"{one}*100001", f"{one}*{'9' * 5000}", f"{one}*0", f"{one}*-1",
            f"{one}*\u0663",
            f"{one}* {steps}", (one + " ") * 50_000, f"{one}*100000 " * 1000, "", " ", one * 100_000,
            f"{one}*{steps}*2",
            f"{rng.choice(PRECISIONS)}*{steps}", f"{one}*{steps - 1} {rng.choice(PRECISIONS)}",
            f"{one}*{steps + 1}",
            f"{one}*00{steps}", "*", "* " * 10_000, f"\x1b[31m*{steps}", [one] * steps, {one: steps},
        ]
    )  # fmt: skip
    draft.data["plan"] = value
    return str(value)[:60]


@mutation("manifest/front")
def front(draft: Draft) -> object:
    """A Pareto front of absurdly many, or of absurdly long, plans."""
    rng = draft.rng
    count, length = rng.choice(
        [(1, 100_000), (400, 100_000), (20_000, 1), (30, 1_000_000), (3, -1), (5000, 20)]
    )
    one = draft.data["plan"].partition("*")[0]
    point = {"cost": rng.choice([1.0, -1.0, 1e308]), "error": 1.0, "plan": f"{one}*{length}"}
    draft.data["choice"]["front"] = [point] * count
    return count, length


@mutation("manifest/schedule", weight=2)
def schedule(draft: Draft) -> object:
    """Steps in another number or order, and values at the edge of what a schedule has."""
    rng, s = draft.rng, draft.data["sampling"]["schedule"]
    name = rng.choice(
        ["timesteps", "alphas_cumprod", "alphas_cumprod_prev", "eta", "clip_sample", "prediction_type"]
    )
    if name in ("eta", "clip_sample", "prediction_type"):
        s[name] = rng.choice(
            [0, 1, 0.5, 1.0000001, -1, 1e308, 5e-324, "v_prediction", "sample", None, True, "epsilon"]
        )
        return name, s[name]
    values = s[name]
    kind = rng.choice(["reverse", "same", "empty", "one less", "one more", "edge", "many"])
    edge: list[Any] = [0, 1, -1, 2**62, 2**63, 999_999, 0.5, 1e-300, 5e-324, 1 - 1e-16, 0.0, 1.0]
    if kind == "many":
        count = rng.choice([1000, 100_000, 100_001, 300_000])
        for each in ("timesteps", "alphas_cumprod", "alphas_cumprod_prev"):
            s[each] = [s[each][-1]] * count
        draft.data["plan"] = f"{draft.data['plan'].partition('*')[0]}*{count}"
        draft.refuse = True  # the tables are not of so many steps
        return kind, count
    change: dict[str, Any] = {
        "reverse": values[::-1],
        "same": [values[0]] * len(values),
        "empty": [],
        "one less": values[:-1],
        "one more": [*values, values[-1]],
        "edge": [*values[:-1], rng.choice(edge)],
    }
    s[name] = change[kind]
    return name, kind


@mutation("manifest/shape", refuse=True, weight=2)
def shape(draft: Draft) -> object:
    model = draft.data["sampling"]["model"]
    known = model["sample_shape"]
    value = draft.rng.choice([s for s in SHAPES if s != known])
    model["sample_shape"] = value
    return value


@mutation("manifest/input", weight=2)
def input_spec(draft: Draft) -> object:
    """One more conditioning input, or another for the one that there is."""
    rng, model = draft.rng, draft.data["sampling"]["model"]
    spec = rng.choice(
        [
            {"dtype": "float32", "shape": [2**28], "num_classes": None, "null_class": None},
            {"dtype": "float32", "shape": [16384, 16384], "num_classes": None, "null_class": None},
            {"dtype": "float32", "shape": [1] * 1000, "num_classes": None, "null_class": None},
            {"dtype": "float32", "shape": [], "num_classes": None, "null_class": None},
            {"dtype": "int64", "shape": [], "num_classes": 1_000_000, "null_class": 999_999},
            {"dtype": "int64", "shape": [], "num_classes": 2**62, "null_class": None},
            {"dtype": "int64", "shape": [], "num_classes": 1, "null_class": None},
            {"dtype": "int64", "shape": [2**20], "num_classes": 5, "null_class": None},
            {"dtype": "float32", "shape": [8], "num_classes": 5, "null_class": None},
            {"dtype": "float64", "shape": [8], "num_classes": None, "null_class": None},
        ]
    )
    spec = {
        "name": rng.choice(NAMES),
        **spec,
        "values": rng.choice([None, "/etc/passwd", "../canary/secret.txt"]),
    }
    inputs = model["inputs"]
    kind = rng.choice(["more", "instead", "many", "none"])
    if kind == "many":
        model["inputs"] = inputs + [{**spec, "name": f"x{i}"} for i in range(rng.choice([3, 1000, 20_000]))]
    else:
        model["inputs"] = {"more": [*inputs, spec], "instead": [spec], "none": []}[kind]
    draft.refuse |= kind in ("more", "many") or (kind == "none" and bool(inputs))
    return kind, spec["name"][:20], spec["shape"][:3], spec["num_classes"]


@mutation("manifest/classes", weight=0.7)
def classes(draft: Draft) -> object:
    """More or fewer classes than the graph's embedding has rows for."""
    spec = next((s for s in draft.data["sampling"]["model"]["inputs"] if s["num_classes"]), None)
    if spec is None:
        raise NotApplicable("no classes")
    kind = draft.rng.choice(["num_classes", "null_class"])
    spec[kind] = draft.rng.choice([1, 2, 4, 6, 1000, 1_000_000, 1_000_001, 2**40, 0, -1, None])
    return kind, spec[kind]


@mutation("manifest/sampling")
def sampling(draft: Draft) -> object:
    data, rng = draft.data, draft.rng
    name = rng.choice(["guidance_scale", "guidance_rescale", "solver", "recalibrate_variance"])
    value = rng.choice([0, 1, -1, 1.5, 1e308, -1e308, "ddpm", "ddim", "euler", True, False, 1e-308])
    holders = {"recalibrate_variance": data, "solver": data["sampling"]["schedule"]}
    holders.get(name, data["sampling"])[name] = value
    return name, value


@mutation("manifest/graph-entry", weight=2)
def graph_entry(draft: Draft) -> object:
    """A graph of another precision, emission or file than it is; an update that is a network."""
    data, rng = draft.data, draft.rng
    entry = rng.choice([*data["graphs"], *data["artifacts"], data["update"]])
    key = rng.choice(sorted(entry))
    files = [
        *data["files"],
        "manifest.json",
        "missing.onnx",
        "weights.safetensors",
        ".",
        "",
        "unet/x.onnx",
        "CON.onnx",
    ]
    choices: dict[str, list[Any]] = {
        "file": files,
        "precision": list(PRECISIONS),
        "emission": ["portable", "half", "ort-cpu", "torch", "", "ORT-CPU"],
        "backend": ["ort-cpu", "ort-cuda", "torch", "tensorrt", "tensorrt-rtx", "", "\x1b[31m"],
        "quantized": [{}, {"x": "int8"}, {"\x1b": "fp8"}, {"x" * 5000: "int8"}, {"a": "int4"}],
    }
    entry[key] = rng.choice(choices.get(key, [*TEXTS, None, 0, -1.0, 1e308, 2**70]))
    return key, str(entry[key])[:60]


@mutation("manifest/entries-order")
def entries_order(draft: Draft) -> object:
    """Graphs or artifacts in another order, twice, or swapped between precisions."""
    data, rng = draft.data, draft.rng
    name, kind = (
        rng.choice(["graphs", "artifacts"]),
        rng.choice(["reverse", "twice", "swap", "none", "first"]),
    )
    entries = data[name]
    if kind == "swap":
        a, b = rng.sample(entries, 2)
        a["file"], b["file"] = b["file"], a["file"]
    else:
        data[name] = {"reverse": entries[::-1], "twice": entries * 2, "none": [], "first": entries[:1]}[kind]
    return name, kind


@mutation("manifest/settings")
def settings(draft: Draft) -> object:
    rng = draft.rng
    kind = rng.choice(["rows", "compute_capabilities", "optimization_level", "workspace_mib"])
    value = rng.choice(
        [[0, 0, 0], [1, 1, 1], [3, 2, 1], [1, 2**31, 2**62], [-1, 1, 1], ["8.9"] * 100_000, ["8.9; rm -rf"],
        ["\x1b[31m"],
         2**70, -5, 1e9, [], None, [1, 2]]
    )  # fmt: skip
    draft.data["engine_settings"][kind] = value
    return kind, str(value)[:40]


@mutation("manifest/record")
def record(draft: Draft) -> object:
    """Figures that people are shown: of the gate, of parity, of the choice; keys and counts of none."""
    data, rng = draft.data, draft.rng
    place = rng.choice(
        [
            "correction.steps",
            "parity",
            "bops",
            "half_bops",
            "layers",
            "choice.snr_q",
            "choice.error",
            "choice.seconds_error",
            "choice.sensitivity.paired",
        ]
    )
    table = data
    for key in place.split("."):
        table = table[key]
    kind = rng.choice(["empty", "extra", "long", "short", "huge"])
    key = rng.choice(list(table))
    if kind == "empty":
        table.clear()
        draft.refuse |= place in ("bops", "half_bops", "layers")
    elif kind == "extra":
        table[rng.choice([*PRECISIONS, *TEXTS, "w2a2.portable"])] = table[key]
    elif kind == "huge":
        table[key] = rng.choice([1e308, 2**80, [1e308] * 5, [None] * 100_000, {}, -1])
    else:
        value = table[key]
        values = (
            value
            if isinstance(value, list)
            else value.get(rng.choice(["kept", "z_k", "z_bias", "float"]), [])
            if isinstance(value, dict)
            else None
        )
        if not values:
            raise NotApplicable("no list")
        if kind == "short":
            values.pop()
        else:
            values.extend([values[0]] * rng.choice([1, 100_000]))
    return place, kind


@mutation("manifest/layers", weight=2)
def layers(draft: Draft) -> object:
    """Bits of very many layers, of none that is known, of bits that are none; sensitivities of no mixed
    precision."""
    data, rng = draft.data, draft.rng
    precision = rng.choice(list(data["layers"]))
    table = data["layers"][precision]
    bits = rng.choice(list(table))
    kind = rng.choice(["many", "twice", "bits", "names", "sensitivity", "moved"])
    if kind == "many":
        count = rng.choice([9_000, 10_001, 100_000])
        table[bits] = [f"x{i}" for i in range(count)]
        draft.refuse |= count > 10_000
    elif kind == "twice":
        table[bits] = [*table[bits], "x", "x"]
    elif kind == "bits":
        table[rng.choice(["w9a9", "w1a1", "fp32", "w4a4+", "", "\u0663", "w\u0664a4", *TEXTS])] = table.pop(
            bits
        )
    elif kind == "names":
        table[bits] = [rng.choice(TEXTS)]
    elif kind == "moved":
        table["float"], table[bits] = table[bits], table.get("float", [])
    else:
        size = rng.choice([1, 1000, 20_000])
        data["layer_sensitivity"][rng.choice([*PRECISIONS, "w4a4+", precision])] = {
            "layers": ["x"] * size, "macs": [rng.choice([1, -1, 2**70])] * size, "steps": [0],
            "weights": [rng.choice([1.0, -1.0, 1e308])],
            "noise": {p: [[1e308]] * size for p in ("w4a4", "w4a8", "w8a8")},
        }  # fmt: skip
    draft.refuse |= kind in ("twice", "bits", "sensitivity")
    return precision, bits, kind


@mutation("manifest/file-entry", weight=2)
def file_entry(draft: Draft) -> object:
    """What the manifest says of a file: a size or a hash that is none."""
    rng = draft.rng
    name = rng.choice(draft.names)
    entry = dict(draft.data["files"][name])
    kind = rng.choice(["size", "sha256"])
    digest = entry["sha256"]
    entry[kind] = rng.choice(
        [-1, 0, 2**40, 2**63, 2**64, 10**30, 1.5, None, True, str(entry["size"]), float(entry["size"]),
        [entry["size"]]]
        if kind == "size"
        else [digest.upper(), digest[:-1], digest + "0", "", None, 0, "\x1b[31m", "0" * 64, f" {digest}",
        f"{digest}\n", [digest]]
    )  # fmt: skip
    draft.entries[name] = entry
    draft.refuse = True
    return name, kind, str(entry[kind])[:70]
