"""Bits per layer: the choice against trying everything, its budget, and what is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from ptqd_export.core.bits import LayerSensitivity, assign, most_operations, to_measure
from ptqd_export.core.precision import Precision
from ptqd_export.errors import RecipeError
from ptqd_export.typed import read_typed, to_plain

LEVELS = (Precision(4, 4), Precision(4, 8), Precision(8, 8))
BITS = {level: level.operations for level in LEVELS}


def table(macs: tuple[int, ...], *noise: tuple[float, ...]) -> LayerSensitivity:
    """One step of weight 1; a row of `noise` per level."""
    names = tuple(f"layer{i}" for i in range(len(macs)))
    rows = {level: tuple((n,) for n in row) for level, row in zip(LEVELS, noise, strict=True)}
    return LayerSensitivity(names, macs, (0,), (1.0,), rows)


def random_table(seed: int, n: int = 6) -> LayerSensitivity:
    """Noise that falls with bits, now and then from one level to the next not at all."""
    rng = np.random.default_rng(seed)
    low = 10 ** rng.uniform(-4, 0, n)
    middle = low * rng.uniform(0.02, 1.1, n)
    high = middle * rng.uniform(0.1, 1.1, n)
    return table(
        tuple(map(int, rng.integers(1, 50, n))), *(tuple(map(float, row)) for row in (low, middle, high))
    )


def noise_of(s: LayerSensitivity, chosen: Mapping[str, Precision]) -> float:
    return sum(s.total(chosen[name])[i] for i, name in enumerate(s.layers))


def bops_of(s: LayerSensitivity, chosen: Mapping[str, Precision]) -> int:
    return sum(macs * BITS[chosen[name]] for name, macs in zip(s.layers, s.macs, strict=True))


def best(s: LayerSensitivity, most: float) -> float:
    """Least noise of all choices within `most` bit operations."""
    choices = (dict(zip(s.layers, c, strict=True)) for c in itertools.product(LEVELS, repeat=len(s.layers)))
    return min(noise_of(s, c) for c in choices if bops_of(s, c) <= most)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_or_one_layer_short_of_it(seed: int) -> None:
    """What does not fit is one layer's step at most: the greedy choice with a share of it could not be
    beaten (the relaxed knapsack), so it alone is the distance to the best."""
    s = random_table(seed)
    base = bops_of(s, dict.fromkeys(s.layers, LEVELS[0]))
    equal = 0
    for budget in (1.0, 1.15, 1.5, 2.0, 3.0, 4.0):
        chosen = assign(s, LEVELS, LEVELS[0], budget, {})
        assert list(chosen) == list(s.layers) and bops_of(s, chosen) <= base * budget * (1 + 1e-12)
        one = max(max(s.total(level)) for level in LEVELS)
        got, wanted = noise_of(s, chosen), best(s, base * budget)
        assert wanted <= got * (1 + 1e-12) and got - wanted <= one
        equal += got == pytest.approx(wanted, rel=1e-9)
    assert equal >= 2  # with no room, and with room for everything
    assert assign(s, LEVELS, LEVELS[0], 1.0, {}) == dict.fromkeys(s.layers, LEVELS[0])


def test_choices_are_mostly_the_best() -> None:
    ratios = []
    for seed in range(20):
        s = random_table(seed, 5)
        most = 1.5 * bops_of(s, dict.fromkeys(s.layers, LEVELS[0]))
        ratios.append(noise_of(s, assign(s, LEVELS, LEVELS[0], 1.5, {})) / best(s, most))
    assert float(np.median(ratios)) < 1.02


def test_each_layer_is_raised_where_it_saves_most() -> None:
    """Two layers of equal size: the one that saves more comes first; a step that does not fit is left out,
    and a smaller layer takes its place."""
    s = table((10, 10), (1.0, 2.0), (0.5, 0.4), (0.4, 0.3))
    assert list(assign(s, LEVELS, LEVELS[0], 1.5, {}).values()) == [LEVELS[0], LEVELS[1]]
    assert list(assign(s, LEVELS, LEVELS[0], 2.0, {}).values()) == [LEVELS[1], LEVELS[1]]
    big = table((100, 1), (50.0, 0.1), (1.0, 0.01), (0.9, 0.001))
    assert list(assign(big, LEVELS, LEVELS[0], 1.05, {}).values()) == [LEVELS[0], LEVELS[2]]


def test_a_level_above_the_hull_is_skipped() -> None:
    """w4a8 saves nothing here: the layer goes from w4a4 to w8a8, or stays."""
    s = table((1, 1), (1.0, 0.1), (1.0, 0.1), (0.1, 0.09))
    assert list(assign(s, LEVELS, LEVELS[0], 2.5, {}).values()) == [LEVELS[2], LEVELS[0]]
    assert list(assign(s, LEVELS, LEVELS[0], 2.4, {}).values()) == [LEVELS[0], LEVELS[0]]


def test_more_bits_that_make_more_noise_are_not_given() -> None:
    s = table((3, 4), (1.0, 2.0), (1.5, 2.0), (1.0, 2.5))
    assert set(assign(s, LEVELS, LEVELS[0], 16.0, {}).values()) == {LEVELS[0]}


def test_layers_that_are_given_keep_their_bits_and_count() -> None:
    s = table((10, 10, 10), (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), (0.0, 0.0, 0.0))
    given = {"layer2": LEVELS[2], "nowhere": LEVELS[1]}
    assert list(assign(s, LEVELS, LEVELS[0], 2.0, given).values()) == [LEVELS[0], LEVELS[0], LEVELS[2]]
    assert list(assign(s, LEVELS, LEVELS[0], 2.34, given).values()) == [LEVELS[1], LEVELS[0], LEVELS[2]]
    # Over the budget by themselves: they stay, and nothing else is raised.
    assert list(assign(s, LEVELS, LEVELS[0], 1.0, given).values()) == [LEVELS[0], LEVELS[0], LEVELS[2]]
    low = {"layer0": LEVELS[0]}
    assert list(assign(s, LEVELS, LEVELS[0], 16.0, low).values()) == [LEVELS[0], LEVELS[2], LEVELS[2]]


def test_ties_go_to_the_first_layer_whatever_the_order_of_what_is_given() -> None:
    s = table((10,) * 4, (1.0,) * 4, (0.5,) * 4, (0.4,) * 4)
    for budget, raised in ((1.25, 1), (1.5, 2), (1.75, 3)):
        wanted = [LEVELS[1]] * raised + [LEVELS[0]] * (4 - raised)
        assert all(list(assign(s, LEVELS, LEVELS[0], budget, {}).values()) == wanted for _ in range(3))
    given = {"layer3": LEVELS[1], "layer1": LEVELS[1]}
    turned = dict(reversed(given.items()))
    assert assign(s, LEVELS, LEVELS[0], 2.0, given) == assign(s, LEVELS, LEVELS[0], 2.0, turned)


def test_bits_of_weights_pay_for_bits_of_inputs() -> None:
    """The budget is relative to a base that is not the lowest level: what one layer gives up another gets."""
    low, base, high = levels = Precision(3, 4), Precision(4, 4), Precision(4, 5)
    noise = {low: ((0.1,), (9.0,)), base: ((0.09,), (8.0,)), high: ((0.08,), (1.0,))}
    s = LayerSensitivity(("quiet", "loud"), (10, 10), (0,), (1.0,), noise)
    assert assign(s, levels, base, 1.0, {}) == {"quiet": low, "loud": high}
    assert assign(s, levels, base, 1.25, {}) == {"quiet": high, "loud": high}
    assert assign(s, levels, low, 1.0, {}) == {"quiet": low, "loud": low}


def test_what_fewer_bits_of_weights_add_is_added() -> None:
    """Measured with inputs of 8 bits alone, and nothing where they happen to take some away."""
    measured = to_measure(Precision.parse("w4a6+"))
    assert [str(p) for p in measured] == ["w3a8", "w4a6", "w4a7", "w4a8", "w8a8"]
    totals = {
        "w4a6": (3.0, 2.0),
        "w4a7": (2.0, 1.5),
        "w3a8": (1.5, 0.5),
        "w4a8": (1.0, 0.75),
        "w8a8": (0.5,) * 2,
    }
    s = LayerSensitivity(
        ("a", "b"), (1, 1), (0,), (1.0,), {p: tuple((n,) for n in totals[str(p)]) for p in measured}
    )
    assert all(s.total(p) == totals[str(p)] for p in measured)
    assert s.total(Precision(3, 6)) == (3.5, 2.0) and s.total(Precision(3, 7)) == (2.5, 1.5)
    assert to_measure(Precision.parse("w8a8+")) == (Precision(8, 8),)
    for unknown in (Precision(2, 6), Precision(5, 8)):  # nothing to derive them from
        with pytest.raises(KeyError):
            s.total(unknown)


def test_a_layer_without_operations_has_no_price() -> None:
    """It gets what makes least noise, and others lose nothing by it."""
    s = table((0, 10), (5.0, 1.0), (1.0, 0.5), (0.5, 0.4))
    assert list(assign(s, LEVELS, LEVELS[0], 2.0, {}).values()) == [LEVELS[2], LEVELS[1]]


@pytest.mark.parametrize("budget", [1.0, 1.15, 1.6])
@pytest.mark.parametrize("text", ["w4a4+", "w5a4+", "w8a6+"])
def test_choices_of_real_levels(text: str, budget: float) -> None:
    """Levels that cost the same among them: within the budget, never worse than the base everywhere, and
    mostly near the best of all choices."""
    precision = Precision.parse(text)
    levels, base, ratios = precision.levels, precision.base, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n = 1 + seed % 4
        macs = tuple(map(int, rng.integers(1, 50, n)))
        weights, inputs = 10 ** rng.uniform(-5, -1, (2, n))
        rows = {
            p: tuple(
                (float(w * 4.0**-p.weight_bits + a * 4.0**-p.activation_bits),)
                for w, a in zip(weights, inputs, strict=True)
            )
            for p in levels
        }
        s = LayerSensitivity(tuple(f"layer{i}" for i in range(n)), macs, (0,), (1.0,), rows)
        chosen = assign(s, levels, base, budget, {})
        most = base.operations * sum(macs) * budget * (1 + 1e-12)

        def cost(used: Mapping[str, Precision], s: LayerSensitivity = s) -> int:
            return sum(m * used[name].operations for name, m in zip(s.layers, s.macs, strict=True))

        every = (dict(zip(s.layers, c, strict=True)) for c in itertools.product(levels, repeat=n))
        least = min(noise_of(s, c) for c in every if cost(c) <= most)
        assert cost(chosen) <= most
        assert least <= noise_of(s, chosen) <= noise_of(s, dict.fromkeys(s.layers, base)) * (1 + 1e-12)
        ratios.append(noise_of(s, chosen) / least)
    assert float(np.median(ratios)) < 1.25 and min(ratios) < 1 + 1e-9


def test_what_is_given_takes_from_no_other_what_the_base_gives() -> None:
    low, base, high = levels = Precision(3, 4), Precision(4, 4), Precision(8, 8)
    noise = {low: ((2.0,),) * 2, base: ((1.0,),) * 2, high: ((0.1,),) * 2}
    s = LayerSensitivity(("a", "b"), (10, 10), (0,), (1.0,), noise)
    assert assign(s, levels, base, 1.15, {"b": high}) == {"a": base, "b": high}
    # What it saves is theirs.
    assert assign(s, levels, base, 2.5, {"b": low}) == {"a": high, "b": low}
    assert assign(s, levels, base, 2.3, {"b": low}) == {"a": base, "b": low}


def test_some_layers_alone() -> None:
    s = random_table(0, 3)
    few = s.only(["layer2", "layer0", "nowhere"])
    assert few.layers == ("layer0", "layer2") and few.macs == (s.macs[0], s.macs[2])
    assert all(few.total(level) == (s.total(level)[0], s.total(level)[2]) for level in LEVELS)


def test_noise_is_weighted_over_steps() -> None:
    w4a4 = LEVELS[0]
    s = LayerSensitivity(("a", "b"), (1, 2), (0, 9), (0.5, 4.0), {w4a4: ((2.0, 0.25), (0.0, 1.0))})
    assert s.total(w4a4) == (2.0, 4.0)


def test_plain_form_and_rows_that_differ_in_length() -> None:
    s = random_table(0, 3)
    assert read_typed(LayerSensitivity, to_plain(s), "sensitivity") == s
    rows = ((1.0,), (2.0,))
    for macs, steps, weights, noise in (
        ((1,), (0,), (1.0,), rows),
        ((1, 2), (0, 1), (1.0,), rows),
        ((1, 2), (0,), (1.0, 2.0), rows),
        ((1, 2), (0,), (1.0,), rows[:1]),
        ((1, 2), (0,), (1.0,), ((1.0, 2.0), (2.0,))),
    ):
        with pytest.raises(RecipeError, match="rows differ in length"):
            LayerSensitivity(("a", "b"), macs, steps, weights, {LEVELS[0]: noise})


def test_float_layers_cost_time_and_make_no_noise() -> None:
    """Three times the time of an 8-bit layer, whatever their bit operations."""
    w8a8, full = Precision.parse("w8a8+").levels
    s = LayerSensitivity(("a", "b", "c"), (10, 10, 80), (0,), (1.0,), {w8a8: ((2.0,), (1.0,), (4.0,))})
    assert s.total(full) == (0.0, 0.0, 0.0)
    for budget, raised in ((1.0, 0), (1.19, 0), (1.2, 1), (1.4, 2), (2.9, 2), (3.0, 3)):
        chosen = assign(s, (w8a8, full), w8a8, budget, {})
        assert list(chosen.values()) == [full] * raised + [w8a8] * (3 - raised), budget


def test_most_operations_are_what_the_dearest_choice_takes() -> None:
    assert most_operations(Precision.parse("w4a4+"), 1.15) == pytest.approx(16 * 1.15)
    mixed = Precision.parse("w8a8+")
    assert most_operations(mixed, 1.0) == 64 and most_operations(mixed, 3.0) == 32 * 32
    assert most_operations(mixed, 2.0, 16) == (64 + 256) / 2 and most_operations(mixed, 9.0) == 1024
