"""Weights as shares of the labels' gradient."""

import pytest

from raygkd.engine.gradient_units import STEPS, WITHOUT_LABELS, GradientUnits


def test_factors_make_the_gradients_of_terms_equal_to_the_labels():
    units = GradientUnits(["vertex", "edge"])
    for task, vertex, edge in ((1.0, 0.1, 4.0), (3.0, 0.3, 4.0)):
        assert units.is_measuring
        units.add({"task": task, "vertex": vertex, "edge": edge})
    # means: task 2, vertex 0.2, edge 4
    assert units.factor("vertex", 1.0) == pytest.approx(10.0)
    assert units.factor("edge", 3.0) == pytest.approx(1.5)
    assert units.factor("kd", 0.9) == 0.9


def test_factors_stay_after_the_first_steps():
    units = GradientUnits(["vertex"])
    for _ in range(STEPS):
        assert units.is_measuring
        units.add({"task": 1.0, "vertex": 0.5})
    assert not units.is_measuring


def test_without_labels_a_share_is_of_a_fixed_norm():
    units = GradientUnits(["vertex"])
    units.add({"vertex": 0.25})
    units.add({"vertex": 0.75})
    assert units.factor("vertex", 2.0) == pytest.approx(2 * WITHOUT_LABELS / 0.5)


def test_no_gradient_divides_nothing():
    """A detector's first batches may have no boxes, and a term nothing to say of them."""
    units = GradientUnits(["vertex", "edge"])
    units.add({"task": 0.0, "vertex": 0.5, "edge": 0.0})
    assert units.factor("vertex", 2.0) == pytest.approx(2 * WITHOUT_LABELS / 0.5)
    assert units.factor("edge", 2.0) == 2.0


def test_a_factor_before_the_first_measurement_is_an_error():
    with pytest.raises(RuntimeError, match="have not been measured"):
        GradientUnits(["vertex"]).factor("vertex", 1.0)


def test_what_was_measured_is_restored():
    units = GradientUnits(["vertex"])
    units.add({"task": 1.0, "vertex": 0.5})
    other = GradientUnits(["vertex"])
    other.load_state_dict(units.state_dict())
    assert other.factor("vertex", 1.0) == units.factor("vertex", 1.0) == pytest.approx(2.0)
    other.add({"task": 3.0, "vertex": 0.5})
    assert units.factor("vertex", 1.0) == pytest.approx(2.0)
