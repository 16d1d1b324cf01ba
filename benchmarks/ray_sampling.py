"""What sampling into shards on Ray takes here, by one worker and by one per core, and would take elsewhere.

    python benchmarks/ray_sampling.py [BUNDLE] [--samples 512] [--shard-size 32] [--many N] [--kill] [--write]

Per number of workers, while all of them are at work: samples per second, and those of as many processes
without Ray; seconds of a core per sample, by the workers' own CPU time, which other work on the machine
disturbs less. Besides, the largest memory of a worker, and the seconds until the first shard, with Ray's
start. What all of them wrote is compared byte by byte. A second table is computed from the first, for a
million samples on 1, 10 and 1,000 machines like this one. `--many` samples that many once more, by a worker
per core, one of which `--kill` kills half-way; what is said of it stays until it is done anew. Of every
folder the indices are counted, and a batch of the first, the middle and the last shard is drawn again without
Ray and compared byte by byte.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from report import REFERENCE_BUNDLE, machine, read_section, table, write_section

from ptqd_export.backends import set_threads
from ptqd_export.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.farm import sample_shards
from ptqd_export.pictures import encode_images
from ptqd_export.runtime import Runtime, draw

TICK = os.sysconf("SC_CLK_TCK")
HEADER = (
    "workers",
    "samples / s",
    "without Ray",
    "core seconds per sample",
    "memory of a worker, MB",
    "s to the first shard",
)
SECTION = "ray-sampling"
SAME = "shards drawn again without Ray: the same bytes."
"""How the line of `--many` ends."""
PLANNED = (1, 10, 1000)
MILLION = 1_000_000


def stat(pid: str) -> list[str]:
    """What the kernel says of a process, from its state on: [state, parent, ...]."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def actors() -> dict[int, tuple[float, float]]:
    """{process: (CPU seconds, largest memory in bytes)} of the workers of this process's Ray."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                times = stat(folder.name)
                if stat(times[1])[1] != str(os.getpid()):  # a worker is a child of the raylet, that is ours
                    continue
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                seconds = (int(times[11]) + int(times[12])) / TICK
                found[int(folder.name)] = (seconds, float(status["VmHWM"].split()[0]) * 1024)
        except (OSError, KeyError):
            continue
    return found


@dataclass
class Run:
    """What one number of workers did: per finished shard the time, the samples so far, and the workers."""

    kill: bool
    started: float = field(default_factory=time.perf_counter)
    seen: list[tuple[float, int, dict[int, tuple[float, float]]]] = field(default_factory=list)
    killed: int = 0

    def advance(self, samples: int) -> None:
        total = samples + (self.seen[-1][1] if self.seen else 0)
        self.seen.append((time.perf_counter() - self.started, total, actors()))

    def end_one(self, samples: int) -> None:
        """Kill a worker once half of the samples are there."""
        if self.kill and not self.killed and self.seen[-1][1] * 2 >= samples:
            self.killed = min(self.seen[-1][2])
            os.kill(self.killed, signal.SIGKILL)

    def window(self) -> tuple[float, int, float]:
        """Seconds, samples, and the workers' CPU seconds, while all of them, and the same, were at work.

        A worker is there before it is at work: as many shards as there are workers are passed over.
        """
        most = max(len(found) for _, _, found in self.seen)
        spans = [list(span) for _, span in itertools.groupby(self.seen, lambda at: at[2].keys())]
        span = max((span for span in spans if len(span[0][2]) == most), key=len)[most:]
        if not span:
            sys.exit("too few shards to measure: give more --samples")
        begin, end = span[0], span[-1]
        if end is begin:
            sys.exit("too few shards to measure: give more --samples")
        cpu = sum(end[2][pid][0] - seconds for pid, (seconds, _) in begin[2].items())
        return end[0] - begin[0], end[1] - begin[1], cpu

    @property
    def memory(self) -> float:
        return max(memory for _, _, found in self.seen for _, memory in found.values())


def measure(
    bundle: Bundle, out: Path, samples: int, workers: int, args: argparse.Namespace, kill: bool = False
) -> Run:
    run = Run(kill)

    def advance(more: int) -> None:
        run.advance(more)
        run.end_one(samples)

    sample_shards(
        bundle, out, samples, workers=workers, batch_size=args.batch_size, shard_size=args.shard_size,
        backend=ORT_CPU, advance=advance,
    )  # fmt: skip
    if kill and not run.killed:
        sys.exit("no worker was killed: give more --samples")
    return run


def without_ray(bundle: Bundle, samples: int, workers: int, batch_size: int) -> float:
    """Samples per second of as many processes of `run --workers`, as PNG, while all of them are at work."""
    batches = [range(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]
    ends = []
    for indices, x in draw(bundle, batches, workers=workers, backend=ORT_CPU):
        for _ in encode_images(x).values():
            pass
        ends.append((time.perf_counter(), len(indices)))
    first, *others = ends[workers - 1 : len(ends) - workers + 1]
    return sum(size for _, size in others) / (others[-1][0] - first[0])


def check_samples(bundle: Bundle, folder: Path, samples: int, batch_size: int) -> int:
    """Count the indices, and draw three batches again as `run` does; how many samples were compared.

    Raises:
        SystemExit: one is missing, there twice, or another.
    """
    import pyarrow.parquet

    tables = [pyarrow.parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    indices = [i for one in tables for i in one["index"].to_pylist()]
    if indices != [*range(samples)]:
        sys.exit(
            f"{folder}: {samples} samples were asked for, and {len({*indices})} of {len(indices)} are there"
        )
    compared = 0
    with Runtime(bundle, ORT_CPU) as runtime:
        for one in (tables[0], tables[len(tables) // 2], tables[-1]):
            rows = one.slice(0, batch_size).to_pydict()
            drawn = encode_images(runtime.sample(rows["index"])).values()
            if [*drawn] != rows["image"]:
                sys.exit(f"{folder}: samples {rows['index']} are not those of run")
            compared += len(rows["index"])
    return compared


def planned(seconds: float, memory: float, size: float, cores: int) -> list[list[str]]:
    """Rows of the second table: a million samples, by the formulas of docs/many-machines.md."""
    rows = []
    for machines in PLANNED:
        workers = machines * cores
        shard = min(1024, max(1, MILLION // (10 * workers)))
        waves = ceil(ceil(MILLION / shard) / workers)
        hours = waves * shard * seconds / 3600
        core_hours = MILLION * seconds / 3600
        row = [f"{machines:,}", f"{workers:,}", str(shard), f"{hours:.2f}", f"{core_hours:.0f}"]
        rows.append([*row, f"{cores * memory / 1e9:.1f}", f"{MILLION * size / 1e9:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--many", type=int, default=0, help="Sample so many more, by all workers.")
    parser.add_argument("--kill", action="store_true", help="Kill a worker half-way in that.")
    parser.add_argument("--write", action="store_true", help="Put the tables into docs/many-machines.md.")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    set_threads(1)  # as a worker has
    m, cores = bundle.manifest, len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    rows, folders = [], []
    killed = ", one of which was killed half-way" if args.kill else ""
    with tempfile.TemporaryDirectory() as scratch:
        for workers in dict.fromkeys((1, cores)):
            out = Path(scratch) / str(workers)
            run = measure(bundle, out, args.samples, workers, args)
            seconds, samples, cpu = run.window()
            check_samples(bundle, out, args.samples, args.batch_size)
            folders.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
            alone = without_ray(bundle, args.samples, workers, args.batch_size)
            row = [str(workers), f"{samples / seconds:.2f}", f"{alone:.2f}", f"{cpu / samples:.3f}"]
            rows.append([*row, f"{run.memory / 1e6:.0f}", f"{run.seen[0][0]:.1f}"])
        if args.many:
            out, began = Path(scratch) / "many", time.monotonic()
            measure(bundle, out, args.many, cores, args, args.kill)
            minutes = (time.monotonic() - began) / 60
            compared = check_samples(bundle, out, args.many, args.batch_size)
            more = (
                f"{args.many:,} samples by {cores} workers{killed}: {minutes:.0f} minutes, none missing, "
                f"none twice, and {compared} of the first, middle and last {SAME}\n\n"
            )
        else:
            kept = (line for line in read_section(SECTION).splitlines() if line.endswith(SAME))
            more = "".join(f"{line}\n\n" for line in kept)
    if any(folder != folders[0] for folder in folders):
        sys.exit("the folders differ: the number of workers must not decide what is sampled")
    size = sum(map(len, folders[0].values())) / args.samples
    text = (
        f"{table(HEADER, rows)}\n\n{m.sampling.model.name}, {m.sampling.summary}, {m.plan}: {args.samples} "
        f"samples as PNG in Parquet, {args.shard_size} per shard, batches of {args.batch_size}; one thread "
        f"per worker. All workers wrote the same bytes. Load by other work when it "
        f"began: {load:.1f} on {cores} cores. {machine('onnxruntime', 'ray', 'pyarrow')}.\n\n"
        f"{more}Computed from the last row, for a million samples on machines with {cores} cores like "
        "these:\n\n"
    )
    columns = ("machines", "workers", "samples per shard", "hours", "core hours", "GB of memory per machine",
               "GB of files")  # fmt: skip
    text += table(columns, planned(cpu / samples, run.memory, size, cores))
    print(text)
    if args.write:
        write_section(SECTION, text)


if __name__ == "__main__":
    main()
