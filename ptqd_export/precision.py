"""Precision: the numerics of a network's quantized layers, not the kernel that runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import RecipeError

FLOAT_BITS = 32


@dataclass(frozen=True, order=True)
class Precision:
    """Bits of weights and activations. `str` is "w4a8"; 32/32 is "fp32".

    It names the numerics only. How a backend realises it (INT8 container, packed INT4, float simulation) is recorded
    per artifact as its lowering: no speed follows from a label.
    """

    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Parse "fp32", "w8a8", "w4a8", "w4a4", ... (2 to 8 bits each).

        Raises:
            RecipeError: not a precision.
        """
        if text == "fp32":
            return cls(FLOAT_BITS, FLOAT_BITS)
        match = re.fullmatch(r"w([2-8])a([2-8])", text)
        if not match:
            raise RecipeError(f"precision {text!r} is not known: give fp32, or wXaY with 2 to 8 bits each, such as w8a8, w4a8, w4a4")
        return cls(int(match[1]), int(match[2]))

    @property
    def is_float(self) -> bool:
        return self.weight_bits == FLOAT_BITS

    def __str__(self) -> str:
        return "fp32" if self.is_float else f"w{self.weight_bits}a{self.activation_bits}"


FP32 = Precision(FLOAT_BITS, FLOAT_BITS)
