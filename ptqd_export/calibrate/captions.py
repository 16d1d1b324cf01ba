"""Prompts for calibration: those of a recipe, or short captions of everyday pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.tokenizer import check_prompt, read_prompts
from ..errors import RecipeError
from ..recipe import Recipe

CAPTIONS = (
    "a photo of a cat sleeping on a sofa",
    "a dog running on the beach",
    "two horses on a green meadow",
    "a red car parked in a street",
    "an airplane above the clouds",
    "a ship in a harbour at sunset",
    "a truck on a country road",
    "a bird on a branch",
    "a frog by a pond",
    "a deer in a forest in the morning",
    "a portrait of an old man with a hat",
    "a woman reading a book in a cafe",
    "children playing football in a park",
    "a crowded market in the rain",
    "a mountain lake with snow on the peaks",
    "a desert with a road to the horizon",
    "waves breaking on black rocks",
    "a city at night seen from above",
    "a small wooden house in winter",
    "the inside of an old library",
    "a kitchen table with bread and fruit",
    "a bowl of soup, close up",
    "a vase of yellow flowers by a window",
    "a bicycle leaning on a brick wall",
    "a train crossing a stone bridge",
    "an oil painting of a village",
    "a watercolour of a garden",
    "a pencil drawing of a hand",
    "a black and white photograph of a staircase",
    "a map of an island",
    "a robot in a workshop, digital art",
    "an astronaut on a red planet",
)
"""For recipes that give none: people, animals, places, things, some styles."""


def prompts_of(recipe: Recipe) -> Sequence[str]:
    """The prompts of calibration: the recipe's own, or CAPTIONS.

    Raises:
        RecipeError: the file cannot be read, or holds none.
    """
    spec = recipe.calibration
    if spec.prompts and spec.prompts_file:
        raise RecipeError("calibration.prompts and calibration.prompts_file are both given: leave one out")
    if spec.prompts_file:
        return read_prompts(recipe.path(spec.prompts_file))
    for text in spec.prompts:
        check_prompt(text)
    return spec.prompts or CAPTIONS
