"""The ranges of a recipe that types cannot express."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.backend import ENGINE_BACKENDS, RUNNABLE
from ..core.bits import FLOAT_TIME
from ..core.engine_build import CAPABILITY
from ..core.precision import Precision
from ..core.sampling import MOST_GUIDANCE
from ..errors import need
from ..typed import brief

if TYPE_CHECKING:
    from .recipe import Recipe


def check(recipe: Recipe) -> None:
    """Check the ranges that types cannot express.

    Raises:
        RecipeError: a value is out of range.
    """
    s, c, q, p = recipe.sampler, recipe.calibration, recipe.quantization, recipe.plan

    need(s.n_steps >= 1, f"sampler.n_steps is {s.n_steps}: give at least 1")
    need(0 <= s.eta <= 1, f"sampler.eta is {s.eta}: give a value in [0, 1] (0 is DDIM, 1 is DDPM)")
    need(
        s.solver in (None, "ddim") or s.eta == 0 or (s.solver, s.eta) == ("ddpm", 1),
        f"sampler.eta is {s.eta}, but it belongs to solver ddim: leave it out with {s.solver}",
    )
    need(
        0 <= s.guidance_rescale <= 1,
        f"sampler.guidance_rescale is {s.guidance_rescale}: give a value in [0, 1]",
    )
    need(
        0 <= s.guidance_scale <= MOST_GUIDANCE,
        f"sampler.guidance_scale is {s.guidance_scale}: give a value from 0 to {MOST_GUIDANCE:g}",
    )
    need(c.size >= 2, f"calibration.size is {c.size}: give at least 2 trajectories")
    need(c.held_out >= 2, f"calibration.held_out is {c.held_out}: give at least 2 trajectories")
    need(c.batch_size >= 1, f"calibration.batch_size is {c.batch_size}: give at least 1")
    need(0 <= c.seed < 2**63, f"calibration.seed is {c.seed}: give a value from 0 to 2^63 - 1")
    name, shape = recipe.model.name, recipe.model.sample_shape
    need(name.isprintable(), f"the name {brief(name)} holds characters that cannot be printed: use others")
    m = recipe.model
    need(
        not m.ldm_config or bool(m.checkpoint),
        f"model.ldm_config is {brief(m.ldm_config)}, but model.checkpoint is not set: give the file of its "
        "weights",
    )
    need(
        len(shape) in (0, 3) and all(size >= 1 for size in shape),
        f"model.sample_shape is {list(shape)}: give [channels, height, width]",
    )
    need(50 < c.percentile <= 100, f"calibration.percentile is {c.percentile}: give a value in (50, 100]")
    need(0 <= q.smoothing <= 1, f"quantization.smoothing is {q.smoothing}: give a value in [0, 1]")
    need(1 <= q.layer_budget <= 16, f"quantization.layer_budget is {q.layer_budget}: give a value in [1, 16]")
    for text in q.layer_bits:
        glob, _, given = text.rpartition("=")
        need(
            bool(glob and given),
            f"quantization.layer_bits holds {brief(text)}: give glob=precision, such as *.conv2=w4a8",
        )
        bits = Precision.parse(given)
        need(
            not (bits.is_float or bits.weight_only or bits.mixed) and bits.number == "int",
            f"quantization.layer_bits holds {brief(text)}: give integers of 2 to 8 bits, such as w4a8",
        )
    need(bool(q.precisions), "quantization.precisions is empty: give at least one, such as w8a8")
    precisions = [Precision.parse(text) for text in q.precisions]
    need(
        len(set(precisions)) == len(precisions),
        f"quantization.precisions holds a precision twice: {', '.join(q.precisions)}",
    )
    need(
        q.layer_budget < FLOAT_TIME or not any(p.levels[-1].is_float and p.mixed for p in precisions),
        f"quantization.layer_budget is {q.layer_budget}, which leaves all layers of w8a8+ in float: give "
        f"less than {FLOAT_TIME:g}",
    )
    adaround = q.rounding == "adaround"
    need(
        not adaround or all(p.number == "int" for p in precisions),
        "quantization.rounding is adaround, which chooses integers: leave w8a8-fp8 out, or set it to gptq",
    )
    need(q.iterations >= 1, f"quantization.iterations is {q.iterations}: give at least 1")
    need(
        0 < p.budget <= 1,
        f"plan.budget is {p.budget}: give a fraction in (0, 1] of the dearest precision's cost",
    )
    need(p.batch_size >= 1, f"plan.batch_size is {p.batch_size}: give at least 1")
    for key in ("sensitivity_groups", "sensitivity_samples"):
        need(getattr(p, key) >= 1, f"plan.{key} is {getattr(p, key)}: give at least 1")
    need(
        p.rule != "fixed" or bool(p.steps),
        'plan.rule is fixed but plan.steps is empty: give a precision per step, such as ["w4a8*12", '
        '"w8a8*8"]',
    )
    need(bool(recipe.backends), "backends is empty: give at least one, such as ort-cpu")
    for name in recipe.backends:
        need(name in RUNNABLE, f"backend {brief(name)} is not known: expected one of {', '.join(RUNNABLE)}")
    t, batches = recipe.tensorrt, list(recipe.tensorrt.batch_sizes)
    in_order = len(batches) == 3 and batches == sorted(batches) and batches[0] == 1
    need(
        in_order,
        f"tensorrt.batch_sizes is {batches}: give 1, the usual and the most, such as [1, 8, 32]; the last "
        "batch of a run may hold one sample",
    )
    fits = p.batch_size <= batches[-1] or not set(recipe.backends) & set(ENGINE_BACKENDS)
    need(
        fits,
        f"plan.batch_size is {p.batch_size}, but engines are built for at most {batches[-1]} "
        "(tensorrt.batch_sizes): lower it, or build for more",
    )
    for text in t.compute_capabilities:
        need(
            CAPABILITY.fullmatch(text) is not None,
            f"tensorrt.compute_capabilities holds {brief(text)}: give major.minor, such as 8.9",
        )
    level, space = t.optimization_level, t.workspace_mib
    need(level is None or 0 <= level <= 5, f"tensorrt.optimization_level is {level}: give 0 to 5")
    need(space is None or space >= 1, f"tensorrt.workspace_mib is {space}: give at least 1")
