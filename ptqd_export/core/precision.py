"""Precision: the numerics of a network's quantized layers, not the kernel that runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import RecipeError
from ..typed import brief

FLOAT_BITS = 32
HALF_BITS = 16

MORE_BITS = (1, 2)
"""Bits that inputs of single layers may get more at a mixed precision, besides 8 in all.

Each takes 6 dB off their noise, so that one more for many layers is worth as much as 8 for a few.
"""
LOWEST_WEIGHTS = 3
"""Weights of single layers may get a bit less there, down to this.

Rounded by GPTQ they make a small part of the noise, and what they give up pays for more bits of inputs. At 2
bits layers make far more noise together than each alone, by which nothing can be dealt out.
"""

Number = Literal["int", "fp8"]
"""How a code represents a number: as a signed integer, or as FP8 E4M3.

E4M3 is that of the OCP FP8 specification: 4 exponent bits, 3 mantissa bits, no infinity.
"""


@dataclass(frozen=True, order=True)
class Precision:
    """Bits of weights and activations.

    `str` gives "w4a8", "w8a8-fp8", "w4a16" (only weights are quantized), "w4a4+" (bits are dealt
    out among layers by the noise that each makes), "w8a8+" (layers that carry most of it stay float), "fp32"
    or "fp16". The label names the numerics only. How a backend computes them (INT8 container, packed INT4,
    float simulation) is recorded per artifact as its lowering; no speed follows from the label.
    """

    weight_bits: int
    activation_bits: int
    number: Number = "int"
    mixed: bool = False

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Parse "fp32", "fp16", "w8a8", "w4a4", ... (2 to 8 bits each), "w4a4+", "w4a16" or "w8a8-fp8".

        Raises:
            RecipeError: not a precision.
        """
        if text in ("fp32", "fp16"):
            bits = int(text[2:])
            return cls(bits, bits)
        if text == "w8a8-fp8":
            return cls(8, 8, "fp8")
        match = re.fullmatch(r"w([2-8])a([2-8]|16)(\+?)", text)
        if not match or (match[3] and match[2] == "16"):
            raise RecipeError(
                f"precision {brief(text)} is not known: give fp32, fp16, wXaY with 2 to 8 bits each (such as "
                "w8a8, w4a8, w4a4), wXaY+ where layers have bits of their own, wXa16 for weights alone, or "
                "w8a8-fp8"
            )
        return cls(int(match[1]), int(match[2]), mixed=bool(match[3]))

    @classmethod
    def from_plain(cls, value: object) -> Precision:
        """From the text that `str` gives.

        Raises:
            RecipeError: anything else.
        """
        if not isinstance(value, str):
            raise RecipeError(f"precision {brief(value)} is not known: give its name, such as w8a8")
        return cls.parse(value)

    def to_plain(self) -> str:
        return str(self)

    @property
    def is_float(self) -> bool:
        """No layer is quantized."""
        return self.weight_bits >= HALF_BITS

    @property
    def weight_only(self) -> bool:
        """Weights are quantized, activations are not."""
        return not self.is_float and self.activation_bits == HALF_BITS

    @property
    def base(self) -> Precision:
        """What the budget of a mixed precision is relative to; else the precision itself."""
        return replace(self, mixed=False)

    @property
    def levels(self) -> tuple[Precision, ...]:
        """What a layer may get, fewest bit operations first; a precision that is not mixed has one level."""
        base = self.base
        if not self.mixed:
            return (base,)
        if base == Precision(8, 8):
            return (base, FP32)
        inputs = {base.activation_bits, *(base.activation_bits + more for more in MORE_BITS), 8}
        weights = {base.weight_bits, max(base.weight_bits - 1, min(base.weight_bits, LOWEST_WEIGHTS))}
        levels = {Precision(w, a) for w in weights for a in inputs if a <= 8} | {Precision(8, 8)}
        return tuple(sorted(levels, key=lambda p: (p.operations, p)))

    @property
    def operations(self) -> int:
        """Bit operations of one multiply-accumulate."""
        return self.weight_bits * self.activation_bits

    @property
    def stem(self) -> str:
        """`str`, for names of files: "w4a4-mixed" for w4a4+."""
        return str(self).replace("+", "-mixed")

    def __str__(self) -> str:
        if self.is_float:
            return f"fp{self.weight_bits}"
        more = "-fp8" if self.number == "fp8" else "+" if self.mixed else ""
        return f"w{self.weight_bits}a{self.activation_bits}{more}"


FP32 = Precision(FLOAT_BITS, FLOAT_BITS)
