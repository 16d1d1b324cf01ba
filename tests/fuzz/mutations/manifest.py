"""The manifest's form: types, missing and unknown keys, numbers, texts, nesting, doubled keys, bytes."""

from __future__ import annotations

import json
from typing import Any

from ..base import ZEROS, Draft, Link, NotApplicable, Sparse, Special
from . import mutation

OTHERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, "", "x", [], {}, [[]], {"a": 1}, [None] * 50, "0" * 64, ["w8a8"],
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**300, 10**400, 1e308,
    -1e308,
    5e-324, -0.0, 0.5, 1e-300,
)  # fmt: skip
TEXTS = (
    "", " ", "\x1b[2J\x1b[31mowned", "\x1b]0;owned\x07", "\x9b31m", "a\nError: forged\nb", "a\r\nb", "\0",
    "\u202e gnp.exe",
    "\u2028", "\ufeff", "\U000e0041" * 9, "e\u0301" * 40, "\ud800", "x" * 1000, "\u00e9" * 5000, "../" * 50,
    "%s%n{0}{x.__class__}",
    "\t" * 30, "\x7f", "$(id)", "-rf", "__proto__", "w8a8*3", "ort-cpu", "1e999", "\x08" * 80,
)  # fmt: skip
MEGABYTE = "A" * (1 << 20)


def places(data: Any, draft: Draft, stop: float = 0.15) -> list[Any]:
    """Keys from the manifest's root to some value: each level is as likely as the next, however long its
    lists. Never to the seal alone, which is written last, over whatever stands there."""
    path: list[Any] = []
    value = data
    if isinstance(data, dict) and [*data] == ["sha256"]:
        raise NotApplicable("nothing but the seal")
    while isinstance(value, dict | list) and value and (not path or draft.rng.random() > stop):
        keys = list(value) if isinstance(value, dict) else range(min(len(value), 40))
        key = draft.rng.choice(keys)
        path.append(key)
        value = value[key]
    return places(data, draft, stop) if path == ["sha256"] else path


def holder(data: Any, path: list[Any]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def find(draft: Draft, kinds: tuple[type, ...]) -> list[Any]:
    """A place whose value is of one of `kinds`."""
    for _ in range(200):
        path = places(draft.data, draft, 0.0)
        value = holder(draft.data, path)[path[-1]]
        if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            return path
    raise NotApplicable("no such value")


def put(draft: Draft, path: list[Any], value: Any) -> str:
    holder(draft.data, path)[path[-1]] = value
    return f"{path} = {str(value)[:60]}"


@mutation("manifest/type", weight=3)
def other_type(draft: Draft) -> object:
    return put(draft, places(draft.data, draft), draft.rng.choice(OTHERS))


@mutation("manifest/missing", weight=2)
def missing(draft: Draft) -> object:
    path = places(draft.data, draft)
    del holder(draft.data, path)[path[-1]]
    return path


@mutation("manifest/unknown-key")
def unknown_key(draft: Draft) -> object:
    """In some table; in a free one, such as the recipe, it does no harm."""
    path = places(draft.data, draft)
    table = holder(draft.data, path)
    if not isinstance(table, dict):
        raise NotApplicable("a list")
    key = draft.rng.choice([*TEXTS, "a", "__class__", "format_version", "model", "file", MEGABYTE])
    table[key] = draft.rng.choice(OTHERS)
    return path[:-1], key[:40]


@mutation("manifest/renamed-key")
def renamed_key(draft: Draft) -> object:
    path = places(draft.data, draft)
    table = holder(draft.data, path)
    if not isinstance(table, dict):
        raise NotApplicable("a list")
    key = draft.rng.choice([*TEXTS, str(path[-1]).upper(), str(path[-1]) + "\u200b", MEGABYTE])
    table[key] = table.pop(path[-1])
    return path, key[:40]


@mutation("manifest/number", weight=3)
def number(draft: Draft) -> object:
    return put(draft, find(draft, (int, float)), draft.rng.choice(NUMBERS))


@mutation("manifest/not-a-number", refuse=True)
def not_a_number(draft: Draft) -> object:
    return put(
        draft, find(draft, (int, float)), draft.rng.choice([float("nan"), float("inf"), -float("inf")])
    )


@mutation("manifest/literal")
def literal(draft: Draft) -> object:
    """A number as no JSON writer writes it."""
    path = find(draft, (int, float))
    text = draft.rng.choice(
        [b"1e999", b"-1e999", b"9" * 5000, b"9" * 200_000, b"0." + b"1" * 100_000, b"1E400", b"01"]
    )
    put(draft, path, "@literal@")
    draft.raw.append(lambda content: content.replace(b'"@literal@"', text))
    return path, text[:20]


@mutation("manifest/text", weight=3)
def text(draft: Draft) -> object:
    return put(draft, find(draft, (str,)), draft.rng.choice(TEXTS))


@mutation("manifest/megabyte")
def megabyte(draft: Draft) -> object:
    unit = draft.rng.choice(["A", "A ", "\x1b[7m", "\u00e9", "a/", "w8a8 "])
    return put(draft, find(draft, (str,)), unit * ((1 << 20) // len(unit)))


@mutation("manifest/raw-text", refuse=True)
def raw_text(draft: Draft) -> object:
    """Bytes that no JSON text holds: control characters and half characters as they are."""
    path = find(draft, (str,))
    put(draft, path, "@raw@")
    bad = draft.rng.choice([b"\x1b[31m", b"\xff\xfe", b"\xed\xa0\x80", b"a\nb", b"\0", b"\xc0\xaf", b'"'])
    draft.raw.append(lambda content: content.replace(b"@raw@", bad))
    return path, bad


@mutation("manifest/deep")
def deep(draft: Draft) -> object:
    depth = draft.rng.choice([100, 900, 990, 1000, 3000, 10_000, 100_000, 1_000_000])
    opened, closed = draft.rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")])
    path = places(draft.data, draft)
    put(draft, path, "@deep@")
    nested = opened * depth + b"1" + closed * depth
    draft.raw.append(lambda content: content.replace(b'"@deep@"', nested))
    draft.refuse |= depth >= 3000
    return path, depth, opened


@mutation("manifest/deep-free")
def deep_free(draft: Draft) -> object:
    """Where any value may stand, so that everything that walks through the manifest meets it."""
    depth = draft.rng.choice([50, 300, 480, 700, 950, 2000])
    opened, closed = draft.rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    draft.data["provenance"]["recipe"]["deep"] = "@deep@"
    draft.raw.append(lambda content: content.replace(b'"@deep@"', opened * depth + b"1" + closed * depth))
    return depth


@mutation("manifest/double-key")
def double_key(draft: Draft) -> object:
    """A key twice, the hostile one first or last; readers of JSON disagree on which counts."""
    key = draft.rng.choice(list(draft.data))
    value = draft.rng.choice(
        [b"null", b"{}", b"[]", b"1", b'"\\u001b[31m"', json.dumps(draft.data.get(key)).encode()]
    )
    pair = b'"' + key.encode() + b'": ' + value
    first = draft.rng.random() < 0.5

    def change(content: bytes) -> bytes:
        head, _, rest = content.partition(b"{")
        if first:
            return head + b"{" + pair + b"," + rest
        before, _, after = content.rpartition(b"}")
        return before + b"," + pair + b"}" + after

    draft.raw.append(change)
    return key, value[:30], first


@mutation("manifest/wide")
def wide(draft: Draft) -> object:
    """A list or a table of very many."""
    path = find(draft, (str, int, float))
    count = draft.rng.choice([1000, 20_000, 200_000])
    table = holder(draft.data, path)
    value = table[path[-1]]
    if isinstance(table, list):
        table.extend([value] * count)
    else:
        table |= {f"{path[-1]}{i}": value for i in range(count)}
    return path, count


@mutation("manifest/many-entries")
def many_entries(draft: Draft) -> object:
    """A list of tables, or a table of tables, that repeats one of its own."""
    name = draft.rng.choice(["graphs", "artifacts", "files", "parity"])
    count = draft.rng.choice([2, 50, 5000])
    value = draft.data[name]
    if isinstance(value, list):
        draft.data[name] = value + [draft.rng.choice(value)] * count
    else:
        one = draft.rng.choice(list(value.values()))
        value |= {f"x{i}.json": one for i in range(count)}
        draft.refuse |= name == "files"  # those files are not there
    return name, count


@mutation("manifest/version", weight=2)
def version(draft: Draft) -> object:
    """Another format version; no other than 5 is read."""
    found = draft.rng.choice(
        [4, 3, 2, 1, 0, -1, 99, 10**30, "5", 5.5, True, None, [5], {}, "3", "\x1b[31m", 2**64]
    )
    draft.data["format_version"] = found
    draft.refuse = True
    return found


@mutation("manifest/format-2", refuse=True)
def format_2(draft: Draft) -> object:
    """A manifest as the format before this one had it, with a part of it spoilt or not."""
    data = draft.data
    sampling = data["sampling"]
    graphs = [{**graph, "ops": {"Conv": 3}} for graph in data["graphs"]]
    draft.data = {
        "sha256": data["sha256"], "format_version": 2, "model": sampling["model"],
        "schedule": sampling["schedule"],
        "solver": sampling["schedule"]["solver"], "guidance_scale": sampling["guidance_scale"],
        "recalibrate_variance": data["recalibrate_variance"], "plan": data["plan"].split(),
        "plan_info": data["choice"],
        "graphs": graphs, "artifacts": data["artifacts"], "correction": data["correction"],
        "parity": data["parity"],
        "bops": data["bops"], "engine_settings": data["engine_settings"], "provenance": data["provenance"],
        "files": data["files"],
    }  # fmt: skip
    path = places(draft.data, draft)
    if path != ["format_version"] and draft.rng.random() < 0.7:
        return put(draft, path, draft.rng.choice([*OTHERS, *TEXTS]))
    return "whole"


@mutation("manifest/bytes", weight=2)
def other_bytes(draft: Draft) -> object:
    """The text of the manifest spoilt, and sealed all the same."""
    rng = draft.rng
    kind = rng.choice(
        [
            "cut",
            "flip",
            "bom",
            "utf-16",
            "tail",
            "empty",
            "zeros",
            "comment",
            "spaces",
            "list",
            "text",
            "two",
            "comma",
        ]
    )

    def change(content: bytes) -> bytes:
        at = rng.randrange(len(content))
        return {
            "cut": lambda: content[:at],
            "flip": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            "bom": lambda: b"\xef\xbb\xbf" + content,
            "utf-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
            "tail": lambda: content + b"\0\1garbage",
            "empty": lambda: b"",
            "zeros": lambda: bytes(1000),
            "comment": lambda: b"// \x1b[31m\n" + content,
            "spaces": lambda: content + b" " * (5 << 20),
            "list": lambda: b"[" + content + b"]",
            "text": lambda: json.dumps(content.decode("utf-8", "replace")).encode(),
            "two": lambda: content + content,
            "comma": lambda: content.replace(b",", b",,", 1),
        }[kind]()

    draft.raw.append(change)
    draft.refuse |= kind not in ("flip", "cut", "bom")
    return kind


@mutation("manifest/as", refuse=True)
def manifest_as(draft: Draft) -> object:
    """Something else in the place of the manifest."""
    kind = draft.rng.choice(
        ["fifo", "folder", "socket", "device", "missing", "canary", "zero", "sparse", "self"]
    )
    if kind == "canary":
        draft.manifest_as = Link("../canary/secret.json")
        draft.may_open.add("secret.json")
    elif kind in ("zero", "self"):
        draft.manifest_as = Link("/dev/zero" if kind == "zero" else "manifest.json")
    elif kind == "sparse":
        draft.manifest_as = Sparse(
            draft.rng.choice([5 << 20, 1 << 30, 1 << 40]), b'{"format_version": 5, "a": "'
        )
    else:
        draft.manifest_as = Special(kind)
    return kind


@mutation("manifest/seal")
def seal(draft: Draft) -> object:
    """The manifest's own hash: missing, elsewhere, twice, or another."""
    kind = draft.rng.choice(["missing", "other", "short", "number", "last", "twice", "escape", "upper"])
    data = draft.data
    if kind == "missing":
        del data["sha256"]
        draft.unsealed = True
    elif kind == "last":
        data["sha256"] = data.pop("sha256")
    elif kind == "twice":
        data["provenance"]["versions"]["a"] = ZEROS.decode()
    elif kind == "upper":
        data["sha256"] = data["sha256"].upper()
        draft.unsealed = True
    else:
        data["sha256"] = {"other": "1" * 64, "short": "0", "number": 0, "escape": "\x1b[31m"}[kind]
        draft.unsealed = True
    draft.refuse |= kind not in ("last", "twice")
    return kind
