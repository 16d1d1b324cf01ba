"""What to build: a recipe's sections, how it is read, and what is refused."""

from .check import check
from .recipe import RECIPE_FILE, Recipe
from .sections import ModelSpec, PlanSpec, QuantizationSpec

__all__ = ["RECIPE_FILE", "ModelSpec", "PlanSpec", "QuantizationSpec", "Recipe", "check"]
