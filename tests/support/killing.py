"""Commands in forked processes that stop, or are killed, at a file operation of one's choice.

    with Server(scratch) as server:
        done = server.run(["run", bundle, "--out", out], watch=[folder], at=5, when="before")

A process that has imported torch, diffusers, onnx and the package (which takes seconds) forks one child per
command; the child is that command from then on, and nothing of it is shared with the next. Where it stops is
counted by an audit hook: before the n-th operation on files below `watch`, right after it, or a moment later.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

When = Literal["before", "after", "soon"]
"""The n-th operation: before it, once it has returned, or up to some milliseconds after it was begun."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EXCHANGE = ("renameat2", "renamex_np")
PATHS = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),),
}
"""Of audit events: which argument is a path, and which one the folder that it is relative to."""
RETURN = ("open", "rename", "replace", "link", "symlink", "mkdir", "rmdir", "remove", "unlink", "truncate")
"""Functions of os that are wrapped, to act once they have returned."""
HUNG = 120.0
"""Seconds until a command counts as hung."""


class Injector:
    """Counts operations on files below `watch`, and does something at the n-th; in the process that it is
    made in, until that ends.

    Args:
        at: number of the operation, from 1; 0 only counts.
        sign: what this process sends itself.
        log: descriptor that gets a line per operation, before it is done.
        reads: opening files for reading counts too.
    """

    def __init__(
        self, watch: Sequence[str], at: int, when: When, sign: int, delay: float, log: int, reads: bool
    ) -> None:
        self._watch = tuple(os.path.join(folder, "") for folder in watch)
        self._at, self._when, self._sign, self._delay = at, when, sign, delay
        self._log, self._reads = log, reads
        self._count, self._armed = 0, False

    def install(self) -> None:
        for name in RETURN:
            setattr(os, name, self._returning(getattr(os, name)))
        io.open = self._returning(io.open)  # pathlib's
        synced = os.fsync

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self._operation("fsync", [os.readlink(f"/proc/self/fd/{number}")])
            synced(file)
            self._returned()

        os.fsync = fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int) and (self._reads or (flags or 0) & WRITING):
                self._operation("open", [_absolute(path)])
        elif event == "ctypes.dlsym" and args[1] in EXCHANGE:
            self._operation("exchange", self._watch)  # found, and called at once
        elif event == "fcntl.flock":
            self._operation("flock", [os.readlink(f"/proc/self/fd/{args[0]}")])
        elif event in PATHS:
            found = [_absolute(args[path], args[at] if at else None) for path, at in PATHS[event]]
            self._operation(event, found)

    def _operation(self, name: str, paths: Sequence[str]) -> None:
        paths = [path for path in paths if (path + os.sep).startswith(self._watch)]
        if not paths:
            return
        if self._armed:
            self._act()
        self._count += 1
        os.write(self._log, f"{self._count} {name} {paths[-1]}\n".encode())
        if self._count == self._at:
            if self._when == "before":
                self._act()
            elif self._when == "after":
                self._armed = True
            else:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process as SIGKILL does
                signal.setitimer(signal.ITIMER_REAL, self._delay)

    def _returning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._returned()
            return result

        return call

    def _returned(self) -> None:
        if self._armed:
            self._act()

    def _act(self) -> None:
        self._armed = False
        os.kill(os.getpid(), self._sign)


def _absolute(path: Any, folder: int | None = None) -> str:
    text = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)


# --- the process that forks


def _serve() -> None:
    """Read requests, one JSON object a line, and answer each with one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load()
    gc.freeze()  # a child's first collection would copy all of this
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"start": _start, "wait": _wait, "prepare": _prepare}[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def _load() -> None:
    """Import what commands import; no thread is started, which a fork would lose."""
    import diffusers  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch  # noqa: F401

    import ptqd_export.assemble.assemble
    import ptqd_export.cli
    import ptqd_export.pictures
    import ptqd_export.runtime  # noqa: F401


def _prepare(recipe: str) -> dict[str, Any]:
    """Export a recipe's network here once: it takes most of the time of a tiny build, and touches no file."""
    from ptqd_export.assemble import assemble
    from ptqd_export.calibrate import open_model
    from ptqd_export.export import export_fp
    from ptqd_export.recipe import Recipe

    network = open_model(Recipe.load(recipe))
    base, whole = export_fp(network.module, network.info), assemble.export_fp

    def exported(module: Any, info: Any, *more: Any) -> Any:
        return base if info == network.info else whole(module, info, *more)

    assemble.export_fp = exported
    return {}


def _start(words: list[str], files: str, cwd: str, **injected: Any) -> dict[str, Any]:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(words, files, cwd, injected)
    return {"pid": pid}


def _become(words: list[str], files: str, cwd: str, injected: dict[str, Any]) -> None:
    """The command, as the whole life of this process."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(files + suffix, flags, 0o666), target)
        os.chdir(cwd)
        log = os.open(files + ".log", flags, 0o666)
        if injected["watch"]:
            Injector(**injected, log=log).install()
        from ptqd_export import cli

        try:
            cli.main(words)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def _wait(pid: int) -> dict[str, Any]:
    """Until a child has ended, or has stopped."""
    end = time.monotonic() + HUNG
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            return {"status": None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)}
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"status": "hung"}
        time.sleep(0.002)


# --- the side that asks


@dataclass(frozen=True)
class Done:
    """What became of a command.

    Attributes:
        code: of its exit; negative: the signal that ended it; None: it has stopped.
        operations: those that it began, such as "os.mkdir /tmp/x".
    """

    code: int | None
    out: str
    err: str
    operations: tuple[str, ...]
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGALRM)

    @property
    def line(self) -> str | None:
        """The one line of a failure, if that is all that it printed and it is no internal error."""
        one = self.out == "" and self.err.startswith("Error: ") and self.err.count("\n") == 1
        good = one and self.err.endswith("\n") and self.err.strip().isprintable()
        return self.err if good and "internal error" not in self.err else None


@dataclass
class Child:
    """A command that was started."""

    server: Server
    pid: int
    files: Path
    started: float

    def wait(self) -> Done:
        """Until it has ended or stopped."""
        status = self.server.ask(do="wait", pid=self.pid)["status"]
        seconds = time.monotonic() - self.started
        assert status != "hung", f"a command hung: {self.read('.log')}"
        lines = tuple(line.partition(" ")[2] for line in self.read(".log").splitlines())
        return Done(status, self.read(".out"), self.read(".err"), lines, seconds)

    def read(self, suffix: str) -> str:
        path = self.files.with_name(self.files.name + suffix)
        return path.read_text() if path.exists() else ""

    def send(self, sign: int) -> None:
        os.kill(self.pid, sign)  # it is there until `wait` has seen its end

    def go_on(self) -> Done:
        """Let it go on after a stop, to its end."""
        self.send(signal.SIGCONT)
        return self.wait()


class Server:
    """A context manager: the process that forks. `scratch` gets what commands print."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._number = scratch, 0
        root = str(Path(__file__).resolve().parents[2])
        caches = str(scratch / "caches")
        env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": caches}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        self._ready = False

    def ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        if not self._ready:
            assert json.loads(stdout.readline()) == {"ready": True}
            self._ready = True
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    def prepare(self, recipe: Path) -> None:
        """Export this recipe's network beforehand."""
        self.ask(do="prepare", recipe=str(recipe))

    def start(
        self,
        words: Sequence[object],
        watch: Sequence[Path] = (),
        *,
        at: int = 0,
        when: When = "before",
        sign: int = signal.SIGKILL,
        delay: float = 0.001,
        reads: bool = False,
        cwd: Path | None = None,
    ) -> Child:
        """Start a command; see Injector for where it stops."""
        self._number += 1
        files = self._scratch / f"{self._number:05d}"
        started = time.monotonic()
        pid = self.ask(
            do="start",
            words=[str(word) for word in words],
            files=str(files),
            cwd=str(cwd or self._scratch),
            watch=[str(folder) for folder in watch],
            at=at,
            when=when,
            sign=int(sign),
            delay=delay,
            reads=reads,
        )["pid"]
        return Child(self, pid, files, started)

    def run(self, words: Sequence[object], watch: Sequence[Path] = (), **where: Any) -> Done:
        """A command to its end, or to where it stops."""
        return self.start(words, watch, **where).wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()


def operations(done: Done) -> Iterator[tuple[int, str]]:
    """Number and name of the operations of a command that ran to its end."""
    for number, line in enumerate(done.operations, 1):
        yield number, line.partition(" ")[0]


if __name__ == "__main__":
    _serve()
