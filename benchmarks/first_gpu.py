"""The first run on a machine with an NVIDIA GPU: all that can be checked there, what proves most first.

    python benchmarks/first_gpu.py [--bundle BUNDLE | --tiny] [--out FILE] [--again] [--only NAME ...]

Every check runs in a process of its own with a time limit, so that a library that crashes or hangs is a
result. Each result goes into FILE, one JSON, as soon as there is one. A run again on the same GPU and driver,
with the same packages, sources and model, takes up where the last one ended: what succeeded is not repeated.
What cannot be tried here is skipped, with the reason. Without --bundle the reference model is calibrated on a
few trajectories, which takes most of the time and needs the extra `build`; --tiny takes a small network with
random weights instead. `--list` says what the checks are. `--write` runs none, and puts what FILE holds of
its last run into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import first_gpu_checks as checks
import first_gpu_engines as engines
from first_gpu_process import FAILED, OK, SKIPPED, Job, Record, Run, isolated
from report import OUT, ROOT, table, write_section

from ptqd_export.bundle.bundle import MANIFEST, Bundle
from ptqd_export.core.backend import BACKENDS
from ptqd_export.errors import PTQDError
from ptqd_export.files import digest, write_file

GPU, ANY_BACKEND = "a GPU", "a backend"
"""What checks need besides one backend by name."""
GPU_BACKENDS = tuple(name for name, backend in reversed(BACKENDS.items()) if backend.on_device)
"""Easiest first."""
PACKAGES = ("numpy", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "cuda-bindings", "polygraphy")
"""Packages that decide results, besides those of the backends and NVIDIA's."""
PUBLISHED = ("cuda-bindings", "nvidia-cudnn-cu13", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "python")
"""Packages whose versions docs/gpu.md names."""
MINUTES = 10.0
LEAST_S = 5.0
"""Seconds that a check must have to be started."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: in the results.
        run: what runs in the process; the first sentence of its documentation says what it proves.
        limit: seconds.
        needs: GPU, ANY_BACKEND, the name of a backend, or "".
        after: checks that must have succeeded.
        backend: the one that it is about, or "".
    """

    name: str
    run: Run
    limit: float
    needs: str = ""
    after: tuple[str, ...] = ()
    backend: str = ""

    @property
    def proves(self) -> str:
        """What it proves, in a sentence."""
        return (inspect.getdoc(self.run) or "").partition("\n\n")[0].replace("\n", " ")

    @property
    def source(self) -> str:
        """Digest of its function, helpers aside: what another one found is no result of this check."""
        return digest(inspect.getsource(self.run))


def all_checks() -> list[Check]:
    """Every check, in order."""
    found = [
        Check("machine", checks.check_machine, 60),
        Check("backends", checks.check_backends, 60),
        Check("cuda-memory", checks.check_cuda_memory, 30, GPU),
        Check("cuda-graphs", checks.check_cuda_graphs, 30, GPU),
        Check("cuda-scratch", checks.check_cuda_scratch, 30, GPU),
        Check("cuda-devices", checks.check_cuda_devices, 30, GPU),
        Check("bundle", checks.check_bundle, 300, ANY_BACKEND),
    ]
    for name in GPU_BACKENDS:
        after: tuple[str, ...] = ("bundle",)
        builds = BACKENDS[name].builds_engines
        if builds:
            found.append(Check(f"{name}-build", checks.check_build, 150, name, after, name))
            after = (*after, f"{name}-build")
        kinds = (("open", engines.check_open, 60), ("parity", engines.check_parity, 90))
        kinds += (("times", engines.check_times, 60), ("loop", engines.check_loop, 60))
        kinds += (("swap", engines.check_swap, 60),) * builds
        found += [Check(f"{name}-{kind}", run, limit, name, after, name) for kind, run, limit in kinds]
    for name in GPU_BACKENDS:
        after = ("bundle", *((f"{name}-build",) if BACKENDS[name].builds_engines else ()))
        found.append(Check(f"{name}-lifetimes", engines.check_lifetimes, 90, name, after, name))
    return found


# What was found, in one JSON


class Ledger:
    """The JSON file: {"runs": [{"key", "identity", "commit", "checks": {name: Record}}]}.

    There is one run per identity: what decides results, such as versions and GPU.
    """

    def __init__(self, path: Path) -> None:
        """Raises SystemExit: the file is there, and is not this script's."""
        self._path = path
        try:
            self._data = json.loads(path.read_bytes()) if path.exists() else {"runs": []}
            self._runs: dict[str, Any] = {run["key"]: run for run in self._data["runs"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not a file of this script ({error}): give another --out") from error

    def open(self, identity: Mapping[str, Any], commit: str) -> str:
        """The key of the run of this identity, which is made if need be."""
        key = digest(json.dumps(identity, sort_keys=True))
        run = self._runs.setdefault(key, {"key": key, "identity": identity, "commit": commit, "checks": {}})
        run["commit"] = commit
        return key

    def last(self) -> tuple[dict[str, Any], dict[str, Record]]:
        """The identity of the last run, and its records.

        Raises:
            SystemExit: the file holds none.
        """
        if not self._runs:
            raise SystemExit(f"{self._path} holds no run: run this script without --write")
        run = list(self._runs.values())[-1]
        return run["identity"], {name: Record(**record) for name, record in run["checks"].items()}

    def found(self, key: str, name: str) -> Record | None:
        """What is known of a check."""
        held = self._runs[key]["checks"].get(name)
        return None if held is None else Record(**held)

    def put(self, key: str, name: str, record: Record) -> None:
        """Write a result to the disk at once; a skip replaces nothing that was tried."""
        held = self.found(key, name)
        if record.status != SKIPPED or held is None or held.status == SKIPPED:
            self._runs[key]["checks"][name] = dataclasses.asdict(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"runs": list(self._runs.values())}, indent=1, allow_nan=False)
        write_file(self._path, text.encode() + b"\n")


def versions() -> dict[str, str]:
    """Of the packages that decide results, as far as they are installed."""
    names = {*PACKAGES, *(name for backend in BACKENDS.values() for name in backend.distributions)}
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    mine = {n: v for n, v in found.items() if n in names or n.startswith(("nvidia-", "tensorrt"))}
    return {"python": sys.version.partition(" ")[0], **dict(sorted(mine.items()))}


def sources() -> str:
    """Digest of the package's sources: what a commit is for, changes that are not committed counted too."""
    files = sorted((ROOT / "ptqd_export").rglob("*.py"))
    return digest(*(part for file in files for part in (str(file.relative_to(ROOT)), file.read_bytes())))


def commit() -> str:
    """The checkout's commit, for people; "" where git does not know one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# All of them


def _tried(check: Check, job: Job) -> Record:
    record = isolated(check.run, job, job.work / "logs" / f"{check.name}.log")
    return dataclasses.replace(record, source=check.source)


class Session:
    """One call of the script: which checks run, and what came of each."""

    def __init__(self, options: argparse.Namespace, checks_: Sequence[Check]) -> None:
        self._options, self._checks = options, checks_
        self._until = time.monotonic() + 60 * options.minutes
        self._ledger = Ledger(options.out)
        self.records: dict[str, Record] = {}

    def run(self) -> int:
        """Run the checks; the exit code, 1 where one failed.

        Raises:
            PTQDError: the bundle that was given is none, or results cannot be written.
        """
        first, *others = self._checks
        work = self._options.out.with_suffix("")
        machine = _tried(first, Job(work, work, seconds=first.limit))
        key = self._ledger.open(self._identity(machine), commit())
        folder = work / key[:12]
        job = Job(work, folder / "bundle", self._options.bundle, self._options.tiny)
        self._note(key, first, machine)
        chosen = [
            c for c in others if not self._options.only or c.name in (others[0].name, *self._options.only)
        ]
        for check in chosen:
            held = self._ledger.found(key, check.name)
            if held is not None and self._stands(check, held, job, machine):
                self._note(key, check, held, "from an earlier run: ")
                continue
            left = self._until - time.monotonic()
            limit = min(check.limit, left)
            why = self._hindrance(check, key)
            if why is None and left < LEAST_S:
                why = f"no time is left of {self._options.minutes:g} minutes: run it again"
            if why is not None:
                self._note(key, check, Record(SKIPPED, why))
                continue
            mine = dataclasses.replace(job, backend=check.backend, seconds=limit)
            self._note(key, check, _tried(check, mine))
        return int(any(record.status == FAILED for record in self.records.values()))

    def _identity(self, machine: Record) -> dict[str, Any]:
        source = self._options.bundle
        model = "tiny" if self._options.tiny else "reference"
        gpus = {name: machine.figures.get(name) for name in ("nvidia_smi", "gpus", "cuda")}
        model = model if source is None else f"bundle {Bundle.open(source).seal}"
        return {"model": model, "machine": gpus, "versions": versions(), "sources": sources()}

    def _stands(self, check: Check, held: Record, job: Job, machine: Record) -> bool:
        """A success of an earlier run holds: of the same code, and what it made is still there."""
        same = held.status == OK and held.source == check.source and machine.status == OK
        if self._options.again or not same or check is self._checks[1]:
            return False
        if check.needs == ANY_BACKEND:
            return (job.bundle / MANIFEST).is_file()
        if check.run is checks.check_build:
            with contextlib.suppress(PTQDError):
                return check.backend in Bundle.open(job.bundle).manifest.backends
            return False
        return True

    def _hindrance(self, check: Check, key: str) -> str | None:
        """Why a check cannot be tried, as far as others have told; None where nothing is known against it."""
        machine, states = (
            self.records[c.name].figures if c.name in self.records else {} for c in self._checks[:2]
        )
        if check.needs == GPU and "no_gpu" in machine:
            return str(machine["no_gpu"])
        if check.needs == ANY_BACKEND and all(states.get(name, OK) != OK for name in GPU_BACKENDS):
            return "no backend that runs on a GPU works here"
        if states.get(check.needs, OK) != OK:
            return str(states[check.needs])
        for name in check.after:
            before = self.records.get(name) or self._ledger.found(key, name)
            if before is None or before.status != OK:
                return f"it needs {name}, which is {'not there' if before is None else before.status}"
        return None

    def _note(self, key: str, check: Check, record: Record, before: str = "") -> None:
        self.records[check.name] = record
        self._ledger.put(key, check.name, record)
        took = "" if record.seconds is None else f"{record.seconds:.1f} s"
        print(f"{check.name:<24} {record.status:<8} {took:>8}  {before}{record.why}", flush=True)


def summary(records: Mapping[str, Record]) -> str:
    """For people: how many checks of each status, and the step times."""
    count = {status: sum(r.status == status for r in records.values()) for status in (OK, FAILED, SKIPPED)}
    lines = ["", ", ".join(f"{n} {status}" for status, n in count.items())]
    rows: list[list[str]] = []
    for name in GPU_BACKENDS:
        record = records.get(f"{name}-times")
        batches = {k: v for k, v in (record.figures if record else {}).items() if k.startswith("batch ")}
        for batch, found in batches.items():
            rows += [
                [name, p, batch, f"{t['ms']:.3f}", f"{t['through_host_ms']:.3f}"] for p, t in found.items()
            ]
    if rows:
        lines += ["", table(("backend", "precision", "batch", "ms per step", "through the host"), rows)]
    return "\n".join(lines)


def published(identity: Mapping[str, Any], records: Mapping[str, Record]) -> str:
    """What docs/gpu.md says of a run: the machine, what each check that was tried found, step times."""
    versions_ = {name: version for name, version in identity["versions"].items() if name in PUBLISHED}
    about = [*identity["machine"]["nvidia_smi"], *(f"{name} {v}" for name, v in versions_.items())]
    tried = {name: record for name, record in records.items() if record.status != SKIPPED}
    found = [[name, record.status, record.why] for name, record in tried.items()]
    return f"{'; '.join(about)}.\n\n{table(('check', '', 'found'), found)}\n{summary(tried)}"


def main(arguments: Sequence[str] | None = None, checks_: Sequence[Check] | None = None) -> int:
    """The script; `checks_` instead of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--bundle", type=Path, help="check this bundle, of which a copy is made")
    group.add_argument("--tiny", action="store_true", help="build a small network with random weights")
    parser.add_argument("--out", type=Path, default=OUT / "first_gpu.json")
    parser.add_argument("--again", action="store_true", help="repeat what succeeded too")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these checks alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all checks together")
    parser.add_argument("--list", action="store_true", help="print the checks, run none")
    parser.add_argument("--write", action="store_true", help="run none: put FILE's last run into docs/gpu.md")
    options = parser.parse_args(arguments)
    every = all_checks() if checks_ is None else checks_
    if unknown := {*options.only} - {check.name for check in every}:
        parser.error(f"there is no check {min(unknown)}: see --list")
    if options.list:
        print("\n".join(f"{check.name:<24} {check.limit:4.0f} s  {check.proves}" for check in every))
        return 0
    options.out = options.out.resolve()
    if options.write:
        write_section("first-gpu", published(*Ledger(options.out).last()))
        return 0
    session = Session(options, every)
    try:
        code = session.run()
    except PTQDError as error:  # of the bundle that was given, or of the place for the results
        raise SystemExit(f"Error: {error}") from error
    print(f"{summary(session.records)}\n\n{options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
