"""Runs commands on hostile bundles, each case in a process of its own, forked from this one, under limits.

A program of its own (`python tests/fuzz/child.py`): one JSON request per line on stdin, one JSON answer per
line on stdout. It has everything loaded before it forks, so that a case costs milliseconds, and no threads.

    {"folder": ..., "commands": [[word, ...], ...], "target": "cli", "wall": 10, "memory": 500, "read": [...],
     "exact": [...], "write": [...]}
->  {"runs": [{"code", "out", "err", "seconds"}, ...], "ended": "exit" | "signal 11" | "wall" | "memory",
     "peak": MB above the start, "escapes": [...]}
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import io
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 20_000
"""Most characters of an output that are handed back."""
MB = 1 << 20
TICK_MS = 10
ADDRESS_SPACE = 6 << 30
"""What a case may map, above the start: a net below the watch on memory, for what grows faster than it
looks."""
FILE_BYTES = 256 * MB
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
"""Any of these flags: a file is opened to be changed."""
NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect",
    "socket.bind",
    "pickle.find_class", "ctypes.dlopen.path", "os.kill", "os.chown", "os.putenv", "webbrowser.open",
    "shutil.chown",
)  # fmt: skip
CHANGES = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)
"""Audit events whose first arguments are paths that change."""
SYSTEM = (
    sys.prefix,
    sys.base_prefix,
    str(ROOT / "ptqd_export"),
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/dev",
)
FILES = ("/dev/null", "/dev/urandom")
LAYERS = "@layers"
"""In the place of a command: read the quantization file."""
HOOK = ".__path_hook__"
"""How the names end under which Python looks for a package that is installed in place: no files."""


class Guard:
    """Says which files Python opened or changed outside of its own places."""

    def __init__(
        self, read: Sequence[str], exact: Sequence[str], write: Sequence[str], report: Callable[[str], None]
    ) -> None:
        self.read = tuple(map(os.path.realpath, (*SYSTEM, *write, *read)))
        self.write = tuple(map(os.path.realpath, write))
        self.exact = {*FILES, *map(os.path.realpath, exact)}
        self.report, self.on = report, True

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int):
                self.check(path, bool(isinstance(flags, int) and flags & WRITE), event)
        elif event in NEVER:
            self.tell(f"{event} {args!a}")
        elif event in CHANGES:
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if not isinstance(path, int):
                    self.check(path, True, event)

    def check(self, path: Any, changes: bool, event: str) -> None:
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (ValueError, OSError):
            return
        places = self.write if changes else self.read
        if real.endswith(HOOK):
            return
        if (
            (changes or real not in self.exact)
            and real not in FILES
            and not any(real == place or real.startswith(place + "/") for place in places)
        ):
            self.tell(f"{event} {real!a}")

    def tell(self, text: str) -> None:
        self.on = False
        try:
            self.report(text[:300])
        finally:
            self.on = True


def preload() -> None:
    """Everything that the commands use, once."""
    import onnxruntime  # noqa: F401
    import PIL.PngImagePlugin
    import safetensors.numpy  # noqa: F401

    import ptqd_export.evaluate.inspect
    import ptqd_export.parity.machines
    import ptqd_export.pictures
    import ptqd_export.runtime  # noqa: F401
    from ptqd_export import backends

    PIL.Image.init()
    backends.available()
    backends.set_threads(1)


def target_of(name: str) -> Callable[[list[str]], object]:
    """The command line, or a function of a file: "bad.py:crash"."""
    if name == "cli":
        from ptqd_export import cli

        return cli.main
    file, _, function = name.partition(":")
    spec = importlib.util.spec_from_file_location("fuzz_target", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[list[str]], object] = getattr(module, function)
    return found


def layers(words: list[str]) -> None:
    """What the torch backend does with a bundle's quantization file, without torch and without the model."""
    import numpy as np

    from ptqd_export.bundle import Bundle
    from ptqd_export.bundle.layers import read_layers
    from ptqd_export.cli.common import fail, in_one_line

    shapes = json.loads(words[1])
    try:
        bundle = Bundle.open(words[0])
        precisions = [precision for precision in bundle.manifest.bops if not precision.is_float]
        read_layers(bundle.reader, precisions, lambda name: {"weight": np.zeros(shapes[name], np.float32)})
    except Exception as error:
        fail(in_one_line(error))


def rss(pid: int | str) -> int:
    """Resident bytes of a process; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def limit() -> None:
    """Of a forked case."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives its parent
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_AS, mapped + ADDRESS_SPACE),
    ):
        resource.setrlimit(kind, (most, most))


def case(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """In the forked process: the commands, up to the first that is refused."""
    folder = Path(request["folder"])
    tell({"rss": rss("self")})
    os.chdir(folder)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), "TMPDIR": str(folder)}
    limit()
    call = target_of(request["target"])
    guard = Guard(request["read"], request["exact"], request["write"], lambda text: tell({"escape": text}))
    sys.addaudithook(guard)
    for i, words in enumerate(request["commands"]):
        guard.on = False
        streams = [os.open(folder / f"{i}.{what}", os.O_WRONLY | os.O_CREAT) for what in ("out", "err")]
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        # As Python opens them, so that what cannot be written there fails here as it does there.
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", "strict", write_through=True)
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
        )
        tell({"started": i})
        guard.on = True
        started, code = time.monotonic(), 0
        try:
            if words[0] == LAYERS:
                layers(words[1:])
            else:
                call(list(words))
            gc.collect()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            code = -1
            sys.stderr.write(f"escaped exception {type(error).__name__}: {error}\n")
        guard.on = False
        tell({"code": code, "seconds": time.monotonic() - started})
        if code:
            break


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, watch and judge nothing: what happened."""
    folder = Path(request["folder"])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            case(request, lambda message: os.write(writer, json.dumps(message).encode() + b"\n") and None)
        except BaseException as error:
            os.write(writer, json.dumps({"escape": f"harness: {error!a}"}).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    ended, messages, peak = watch(request, pid, reader)
    os.close(reader)
    answer: dict[str, Any] = {"runs": [], "ended": ended, "escapes": [], "peak": round(peak / MB)}
    for message in messages:
        if "rss" in message:
            continue
        if "escape" in message:
            answer["escapes"].append(message["escape"])
        elif "started" in message:
            answer["runs"].append({"code": None, "seconds": None})
        else:
            answer["runs"][-1] |= message
    for i, done in enumerate(answer["runs"]):
        for what in ("out", "err"):
            with (folder / f"{i}.{what}").open("rb") as file:
                done[what] = file.read(SHOWN).decode("utf-8", "replace")
    return answer


def watch(request: dict[str, Any], pid: int, reader: int) -> tuple[str, list[dict[str, Any]], float]:
    """(how the case ended, what it told, bytes above the start at most)."""
    poll, told, ended = select.poll(), b"", ""
    poll.register(reader, select.POLLIN)
    deadline, start = time.monotonic() + request["wall"], rss(pid)
    largest, killed = 0, False
    while True:
        if poll.poll(TICK_MS):
            piece = os.read(reader, 1 << 16)
            told += piece
            if b"rss" in piece:
                # Of the forked process itself: it shares files with this one, which count when it uses them.
                start = json.loads(piece.partition(b"\n")[0])["rss"]
            if b"started" in piece:
                deadline = time.monotonic() + request["wall"]
            if not piece:
                break
        largest = max(largest, rss(pid))
        if not ended and largest > start + request["memory"] * MB:
            ended = "memory"
        elif not ended and time.monotonic() > deadline:
            ended = "wall"
        if ended and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
    _, status, usage = os.wait4(pid, 0)
    largest = max(largest, usage.ru_maxrss * 1024)
    if not ended:
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "exit"
    lines = [json.loads(line) for line in told.split(b"\n")[:-1]]
    return ended, lines, max(0, largest - start)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    preload()
    assert threading.active_count() == 1, "a process with threads must not fork"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
