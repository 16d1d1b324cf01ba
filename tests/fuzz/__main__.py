"""Long runs: `python -m tests.fuzz --bundle DIR --cases 10000 --seed 0 --workers 2 --out report.json`.

The journal beside the report, `<out>.jsonl`, has a line per case; the same command takes up where it stopped.
`--only N` runs one case of the seed again, with the same --bundle, --whole and --kinds; with `--keep DIR` its
bundle stays. Long runs keep numbers alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from .base import Base
from .campaign import check_base, report, run_many, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a right bundle, which stays as it is")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the report, JSON")
    parser.add_argument("--work", type=Path, help="folder for the cases; a temporary one if left out")
    parser.add_argument(
        "--keep", type=Path, help="with --only: folder that gets the bundle, but for files above 64 MiB"
    )
    parser.add_argument("--only", type=int, action="append", help="run this case alone; repeat for several")
    parser.add_argument(
        "--whole", action="store_true", help="every graph of the bundle, not those of its plan alone"
    )
    parser.add_argument(
        "--kinds", default="", help="mutations whose names begin so, with commas: graph/,names/link"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fz", dir=options.work) as folder:
        root = Path(folder)
        base = Base.copied(options.bundle, root / "base", slim=not options.whole)
        first = check_base(base, root)
        if first.outcome != "accepted":
            print(f"the bundle itself is {first.outcome}: {first.why}", file=sys.stderr)
            return 2
        print(
            f"the bundle itself: accepted in {first.seconds} s, {first.peak} MB", file=sys.stderr, flush=True
        )
        started = time.monotonic()
        lines = run_many(
            base, root, options.seed, options.only or range(options.cases), options.workers,
            None if options.out is None or options.only else options.out.with_suffix(".jsonl"),
            options.keep if options.only else None, lambda line: print(line, file=sys.stderr, flush=True),
            options.kinds.split(",") if options.kinds else (),
        )  # fmt: skip
        found = report(
            lines,
            bundle=options.bundle.name,
            seed=options.seed,
            workers=options.workers,
            wall_seconds=round(time.monotonic() - started, 1),
        )
    if options.only:
        print(json.dumps(lines, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
