"""Names and what stands under them: paths that lead out, links, FIFOs, devices, folders, other suffixes."""

from __future__ import annotations

import unicodedata

from ..base import WEIGHTS, Draft, Link, Special, entry_of
from . import mutation

OUT = (
    "../canary/secret.bin", "../canary/secret.safetensors", "unet/../../canary/secret.bin",
    "..\\canary\\secret.bin",
    "./../canary/secret.bin", "..", ".", "/", "//etc/passwd", "/etc/passwd", "/proc/self/environ",
    "/dev/zero", "~/.ssh/id_rsa",
    "file:///etc/passwd", "C:\\x.onnx", "\\\\host\\x.onnx", "unet//x.onnx", "a/b/c.onnx",
    "x/_ORT_MEM_ADDR_/y.onnx",
    "*/_ORT_MEM_ADDR_/*", "unet/unet/x.onnx", "../bundle/weights.safetensors", "./weights.safetensors",
    "weights.safetensors/",
    "unet/./x.json", "%2e%2e/canary/secret.bin", "..%2fcanary%2fsecret.bin", "$HOME/x.onnx",
)  # fmt: skip
ODD = (
    "", " ", "a.pkl", "a.py", "a.so", "a.pt", "a.bin", "a.JSON", "a.onnx ", "a.onnx\0", "a\0.onnx",
    "a.onnx\n", "a\nb.onnx",
    "\x1b[31m.onnx", "\u202exnno.exe", "\u00e9.onnx", "\uff0e\uff0e\uff0fa.onnx", ".onnx", ".hidden.onnx",
    "-rf.onnx", "a b.onnx",
    "a;id.onnx", "x" * 116 + ".onnx", "x" * 121 + ".onnx", "x" * 300 + ".onnx", "x" * (1 << 20) + ".onnx",
    "a.onnx.json.exe",
    "\ud800.onnx", "CON", "a:b.onnx", "\u0430.onnx", "a.onnx/", "a..onnx", "manifest.json", "Manifest.json",
    "MANIFEST.JSON",
    "a.engine", "a.safetensors", "a.txt", "a.json",
)  # fmt: skip
RIGHT = (
    "a.engine",
    "a.safetensors",
    "a.txt",
    "a.json",
    "x" * 116 + ".onnx",
    "a..onnx",
    "-rf.onnx",
    "a.onnx.json.exe",
    "Manifest.json",
)


@mutation("names/listed-outside", refuse=True, weight=3)
def listed_outside(draft: Draft) -> object:
    """The manifest lists a file that lies elsewhere, with the right hash where we know it."""
    name = draft.rng.choice(
        [*OUT, str(draft.canary / "secret.bin"), str(draft.canary / "secret.safetensors")]
    )
    secret = (draft.canary / "secret.bin").read_bytes()
    draft.entries[name] = entry_of(secret)
    if draft.rng.random() < 0.2:
        draft.contents[name] = secret  # where it can be put down inside of the bundle
    return name


@mutation("names/graph-outside", refuse=True, weight=2)
def graph_outside(draft: Draft) -> object:
    """A graph, an artifact or the update is a file elsewhere, which the manifest lists."""
    data, name = draft.data, draft.rng.choice([*OUT, str(draft.canary / "secret.bin")])
    entry = draft.rng.choice([*data["graphs"], *data["artifacts"], data["update"]])
    entry["file"] = name
    draft.entries[name] = entry_of((draft.canary / "secret.bin").read_bytes())
    return name


@mutation("names/listed-odd", weight=2)
def listed_odd(draft: Draft) -> object:
    """One more file, listed, by a name of another kind."""
    name = draft.rng.choice(ODD)
    draft.contents[name] = draft.rng.choice([b"", b"{}", b"\x80\x04.", bytes(100)])
    draft.refuse |= name not in RIGHT
    return name[:60]


@mutation("names/renamed", weight=2)
def renamed(draft: Draft) -> object:
    """A graph by another name, wherever it is named."""
    old = draft.rng.choice([*draft.base.graphs, draft.data["update"]["file"]])
    new = draft.rng.choice(
        [*ODD, *OUT, "unet/a.onnx", "scheduler/a.onnx", "a.onnx", old.upper(), WEIGHTS, "é" + old]
    )
    draft.rename(old, new)
    folder, _, file = new.rpartition("/")
    good = (
        file.endswith(".onnx")
        and len(file) < 126
        and folder in ("", "unet", "scheduler")
        and not new.startswith("/")
    )
    plain = (
        file.isascii()
        and file.replace(".", "").replace("-", "").replace("_", "").isalnum()
        and file[0] != "."
    )
    draft.refuse |= not (good and plain)
    return old, new[:60]


@mutation("names/weights-renamed", refuse=True)
def weights_renamed(draft: Draft) -> object:
    """A file that every bundle has by its fixed name is there by another, in case or in form alone."""
    old = draft.rng.choice([WEIGHTS, "tables.safetensors", "quantization.safetensors"])
    new = draft.rng.choice(
        [
            old.upper(),
            old.title(),
            " " + old,
            old + ".json",
            "unet/" + old,
            unicodedata.normalize("NFD", "é") + old,
        ]
    )
    draft.contents[new] = draft.read(old)
    draft.contents[old] = Special("missing")
    draft.unlisted.add(old)
    return old, new


@mutation("names/link", refuse=True, weight=2)
def link(draft: Draft) -> object:
    """A link in the place of a file, to something else than the manifest says."""
    name = draft.rng.choice(draft.names)
    target = draft.rng.choice(
        ["../canary/secret.bin", str(draft.canary / "secret.bin"), "/dev/zero", "/dev/stdin",
        "/proc/self/mem", "/proc/self/environ",
         "/etc/passwd", name, "missing", ".", "..", "/", "../canary", "/dev/tty", "/proc/self/fd/0",
         "manifest.json", "/dev/random"]
    )  # fmt: skip
    draft.may_open.add("secret.bin")
    draft.contents[name] = Link(target, draft.read(name))
    return name, target


@mutation("names/link-right")
def link_right(draft: Draft) -> object:
    """A link to a file with the right content, inside or outside: as a cache of downloads has them."""
    name = draft.rng.choice(draft.names)
    kind = draft.rng.choice(["inside", "outside", "chain"])
    data = draft.read(name)
    if kind == "inside":
        draft.contents["blob.txt"] = data
        draft.unlisted.add("blob.txt")
        draft.contents[name] = Link("blob.txt", data)
    else:
        (draft.canary / "blob").write_bytes(data)
        draft.may_open.add("blob")
        draft.contents[name] = Link("../canary/blob", data)
        if kind == "chain":
            (draft.canary / "chain").symlink_to("blob")
            draft.may_open.add("chain")
            draft.contents[name] = Link("../canary/chain", data)
    return name, kind


@mutation("names/special", refuse=True, weight=2)
def special(draft: Draft) -> object:
    """A FIFO, a socket, a device or a folder in the place of a file, or nothing."""
    name, kind = (
        draft.rng.choice(draft.names),
        draft.rng.choice(["fifo", "socket", "device", "folder", "missing"]),
    )
    claim = draft.rng.choice([b"", draft.read(name)])
    draft.contents[name] = Special(kind, claim)
    if kind != "missing":
        draft.entries[name] = entry_of(claim)
    return name, kind, len(claim)


@mutation("names/unlisted")
def unlisted(draft: Draft) -> object:
    """A file that the manifest does not list: nobody may look at it."""
    name = draft.rng.choice(["model.py", "conftest.py", "numpy.py", "onnxruntime.py", "sitecustomize.py",
    "libonnxruntime.so",
                             ".netrc", "pytorch_model.bin", "x.onnx", "tables.safetensors.part", "\x1b[31m",
                             "recipe.toml"])  # fmt: skip
    draft.contents[name] = draft.rng.choice([b"raise SystemExit('owned')", bytes(1000), b"\x80\x04."])
    draft.unlisted.add(name)
    return name


@mutation("names/swapped")
def swapped(draft: Draft) -> object:
    """Two files in each other's places, with the right hashes."""
    a, b = draft.rng.sample(draft.names, 2)
    one, other = draft.read(a), draft.read(b)
    draft.contents[a], draft.contents[b] = other, one
    draft.refuse |= one != other and a.rpartition(".")[2] != b.rpartition(".")[2]
    return a, b


@mutation("names/unhashed", refuse=True)
def unhashed(draft: Draft) -> object:
    """A file changed, and not hashed again."""
    name = draft.rng.choice(draft.names)
    data = bytearray(draft.read(name))
    data[draft.rng.randrange(len(data))] ^= 1 << draft.rng.randrange(8)
    draft.contents[name] = bytes(data)
    draft.entries[name] = draft.data["files"][name]
    return name


@mutation("names/not-listed", refuse=True)
def not_listed(draft: Draft) -> object:
    """A file that the bundle needs, without a hash."""
    name = draft.rng.choice(draft.names)
    del draft.data["files"][name]
    draft.unlisted.add(name)
    return name
