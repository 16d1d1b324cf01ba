"""How good samples are, and plots of what a bundle does.

Importing it loads numpy alone; scikit-image, SciPy and matplotlib are imported inside functions.
"""

from .candidates import Candidate
from .evaluation import SEED, evaluate
from .report import Report, markdown

__all__ = ["SEED", "Candidate", "Report", "evaluate", "markdown"]
