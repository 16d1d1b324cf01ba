"""Programs that go wrong in each way that the harness must see; `test_fuzz.py` has it run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

Words = list[str]


def good(words: Words) -> None:
    print("fine")


def refuses(words: Words) -> None:
    print("Error: no", file=sys.stderr)
    raise SystemExit(1)


def crash(words: Words) -> None:
    import ctypes

    ctypes.string_at(0)


def hang(words: Words) -> None:
    time.sleep(600)


def hang_deaf(words: Words) -> None:
    """Also to Ctrl-C and to a polite end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    while True:
        pass


def allocate(words: Words) -> None:
    bytearray(b"x") * (900 << 20)
    time.sleep(600)


def allocate_shortly(words: Words) -> None:
    """Gone before anybody looks."""
    held = bytearray(b"x") * (200 << 20)
    del held


def exhausted(words: Words) -> None:
    print("Error: out of memory (std::bad_alloc): lower --batch-size", file=sys.stderr)
    raise SystemExit(1)


def open_canary(words: Words) -> None:
    Path("canary/secret.bin").read_bytes()


def open_canary_in_c(words: Words) -> None:
    """As a runtime in C++ would: Python is not told."""
    import ctypes

    libc = ctypes.CDLL(None)
    os.close(libc.open(b"canary/secret.bin", os.O_RDONLY))


def open_elsewhere(words: Words) -> None:
    Path("/etc/hosts").read_bytes()


def write_beside(words: Words) -> None:
    Path("new").write_text("x")


def write_bundle(words: Words) -> None:
    Path("bundle/manifest.json").touch()


def start_program(words: Words) -> None:
    subprocess.run(["true"], check=True)


def load_pickle(words: Words) -> None:
    import pickle

    pickle.loads(b"cposix\ngetpid\n.")


def show_canary(words: Words) -> None:
    """What it says lies in two pieces, so that this file does not hold it."""
    print("canary-" + "4c9f1e")


def internal(words: Words) -> None:
    print("Error: internal error: KeyError", file=sys.stderr)
    raise SystemExit(1)


def trace(words: Words) -> None:
    print("Traceback (most recent call last):", file=sys.stderr)
    raise SystemExit(1)


def raises(words: Words) -> None:
    raise ValueError("not caught")


def two_lines(words: Words) -> None:
    print("Error: one\nand two", file=sys.stderr)
    raise SystemExit(1)


def escapes(words: Words) -> None:
    print("Error: \x1b[31mred", file=sys.stderr)
    raise SystemExit(1)


def long_line(words: Words) -> None:
    print("Error: " + "x" * 700, file=sys.stderr)
    raise SystemExit(1)


def on_stdout(words: Words) -> None:
    print("half of a result")
    print("Error: no", file=sys.stderr)
    raise SystemExit(1)


def silent(words: Words) -> None:
    raise SystemExit(1)


def warns(words: Words) -> None:
    """It works, and a library prints by itself."""
    os.write(2, b"[W:onnxruntime] something\n")


def code_two(words: Words) -> None:
    print("Error: no", file=sys.stderr)
    raise SystemExit(2)
