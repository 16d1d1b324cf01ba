"""Time and memory of a bundle's engines, beside what else a user could run.

Each thing that is timed lives in a process of its own: its threads and its memory are its own, and all take
turns.
"""

from .baselines import BASELINES, make_baselines
from .measure import Settings, bench
from .report import Bench, Row, bench_text, plot_bench

__all__ = ["BASELINES", "Bench", "Row", "Settings", "bench", "bench_text", "make_baselines", "plot_bench"]
