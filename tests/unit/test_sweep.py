"""The space of a sweep and the parabola through its losses."""

import math

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raybert.errors import InputError
from raybert.sweep import space
from raybert.sweep.summary import fit_parabola


def sweep(tmp_path, **tree):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"storage": str(tmp_path), "space": {"optimizer.lr": {"grid": [1e-3]}}} | tree))
    return space.load(str(path))


def test_trials_are_every_combination_with_directories_of_their_own(tmp_path):
    dimensions = {"model.size": {"grid": ["tiny", "mini"]}, "optimizer.lr": {"log_uniform": [1e-4, 1e-2], "draws": 5}}
    loaded = sweep(tmp_path, space=dimensions, base={"train": {"steps": 200}})
    found = space.trials(loaded)
    assert len(found) == 10
    assert len({trial.config.run_uri for trial in found}) == 10
    rates = [trial.config.optimizer.lr for trial in found[:5]]
    assert rates == sorted(rates)
    assert 1e-4 <= rates[0] <= rates[-1] <= 1e-2
    assert found == space.trials(loaded), "a resumed sweep would have other trials"
    assert {trial.config.model.size for trial in found} == {"tiny", "mini"}
    assert {trial.config.train.steps for trial in found} == {200}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"spaces": {}}, "Did you mean space"),
        ({"space": {"optimizer.lrr": {"grid": [1]}}}, "Did you mean optimizer.lr"),
        ({"space": {"optimizer.lr": {"log_uniform": [1, 0.1]}}}, "0 < low < high"),
        ({"space": {"optimizer.lr": {}}}, "either grid or log_uniform"),
        ({"base": {"every": {"validation": 0}}}, "base.every.validation"),
        ({"asha": {"grace": 1}}, "asha.grace_fraction"),
    ],
)
def test_a_wrong_sweep_is_a_sentence(tmp_path, tree, sentence):
    with pytest.raises(InputError, match=sentence):
        space.trials(sweep(tmp_path, **tree))


@given(best=st.floats(-7, -5), bend=st.floats(0.05, 2), count=st.integers(4, 8))
def test_the_minimum_of_an_exact_parabola_is_found(best, bend, count):
    rates = np.exp(np.linspace(-8, -4, count))
    losses = 7 + bend * (np.log(rates) - best) ** 2
    fitted, interval, remark = fit_parabola(rates.tolist(), losses.tolist())
    assert math.log(fitted) == pytest.approx(best, abs=1e-4)
    assert interval[0] <= fitted * 1.001
    assert interval[1] >= fitted * 0.999
    assert remark == ""


def test_the_interval_holds_the_true_minimum_as_often_as_it_says():
    rng = np.random.default_rng(0)
    rates, inside = np.exp(np.linspace(-8, -4, 6)), 0
    for _ in range(300):
        losses = 7 + 0.3 * (np.log(rates) + 6) ** 2 + rng.normal(0, 0.02, 6)
        _, interval, _ = fit_parabola(rates.tolist(), losses.tolist())
        inside += interval[0] <= math.exp(-6) <= interval[1]
    assert 0.90 < inside / 300 < 0.99


@pytest.mark.parametrize(
    ("losses", "remark"), [([3, 2, 1, 0.5], "widen the range"), ([1, 2, 2, 1], "no minimum"), ([1, 2], "three rates")]
)
def test_where_there_is_no_minimum_none_is_given(losses, remark):
    rates = [1e-4, 1e-3, 1e-2, 1e-1][: len(losses)]
    fitted, interval, said = fit_parabola(rates, losses)
    assert fitted is None
    assert interval is None
    assert remark in said
