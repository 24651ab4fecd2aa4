import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from errors import UserError
from estimators import get_estimator
from orchestration.configuration import compose
from tasks.schedules import Decay, Plateau, Reductions, Schedules, Warmup


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_a_warmup_starts_after_its_offset_and_ends_where_it_should(scale):
    warmup = Warmup(0.99, 0.25, steps=1000, offset=50, scale=scale)
    assert [warmup(step) for step in (0, 49, 50)] == [0.99] * 3
    assert [warmup(step) for step in (1050, 1051, 10**7)] == [0.25] * 3
    assert 0.25 < warmup(1049) < warmup(51) < 0.99


def test_the_published_warmup_in_numbers():
    warmup = Warmup(0.99, 0.0, steps=1_000_000, scale="log")
    # 1 - alpha goes from 0.01 to 1: a tenth of a decade each twentieth of the way
    expected = {250_000: 10**-1.5, 500_000: 0.1, 750_000: 10**-0.5, 999_999: 10**-2e-6}
    for step, value in expected.items():
        assert 1 - warmup(step) == pytest.approx(value, rel=1e-12)
    assert Warmup(0.99, 0.0, steps=1_000_000)(500_000) == pytest.approx(0.495, rel=1e-15)


@given(
    st.floats(0, 0.999), st.floats(0, 0.999), st.integers(1, 10**7), st.integers(0, 10**6), st.integers(0, 2 * 10**7)
)
def test_the_log_scale_changes_one_minus_alpha_by_one_factor_a_step(start, end, steps, offset, step):
    warmup = Warmup(start, end, steps, offset, scale="log")
    t = min(max((step - offset) / steps, 0), 1)
    assert 1 - warmup(step) == pytest.approx((1 - start) ** (1 - t) * (1 - end) ** t, rel=1e-12)
    assert min(start, end) - 1e-15 <= warmup(step) <= max(start, end) + 1e-15


def test_a_temperature_falls_to_its_minimum():
    decay = Decay(2.0, rate=1e-3, minimum=0.5)
    assert decay(0) == 2.0
    assert decay(700) == pytest.approx(2.0 * math.exp(-0.7), rel=1e-15)
    assert decay(1386) > decay(1387) == decay(10**6) == 0.5  # ln 4 = 1.3863


def test_reductions_count_from_their_steps_on():
    reductions = Reductions((10, 20), 0.1)
    assert [reductions(step) for step in (0, 9, 10, 19, 20, 10**6)] == [1, 1, 0.1, 0.1, 0.1**2, 0.1**2]


def test_a_plateau_reduces_after_patience_evaluations_without_a_better_one():
    plateau = Plateau(2, 0.5)
    found = []
    for is_better in (True, False, True, False, False, False, False, True):
        plateau.see(is_better)
        found.append(plateau())
    assert found == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    again = Plateau(2, 0.5)
    again.load_state_dict(plateau.state_dict())
    assert (again.waited, again()) == (0, 0.25)
    patient = Plateau(None, 0.5)
    for _ in range(100):
        patient.see(False)
    assert patient() == 1


class Model(nn.Module):
    temperature = 1.0


def schedules(*overrides, estimator="ovis-gamma1", model=None, **options):
    task = OmegaConf.create(compose(overrides).config["task"])
    estimator = get_estimator(estimator, iw=3, **options)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return Schedules(task, estimator, model or Model(), optimizer), estimator, optimizer


def test_what_has_no_schedule_is_never_touched():
    found, estimator, optimizer = schedules(alpha=0.5)
    optimizer.param_groups[0]["lr"] = 7.0
    found.set(10)
    assert (estimator.alpha, estimator.beta, optimizer.param_groups[0]["lr"]) == (0.5, 1.0, 7.0)
    assert found.values() == {}


def test_everything_is_set_and_told():
    model = Model()
    found, estimator, optimizer = schedules(
        "task.warmup_alpha=0.9",
        "task.warmup_beta=0",
        "task.warmup_steps=10",
        "task.lr_steps=[5]",
        "task.lr_factor=0.25",
        "task.temperature_rate=0.1",
        "task.temperature_minimum=0.6",
        model=model,
        alpha=0.5,
        beta=2.0,
    )
    for step, alpha, beta, factor, temperature in (
        (0, 0.9, 0.0, 1, 1.0),
        (5, 1 - math.sqrt(0.1 * 0.5), 1.0, 0.25, 0.6065306597126334),
        (4, 1 - 0.1**0.6 * 0.5**0.4, 0.8, 1, 0.6703200460356393),
        (99, 0.5, 2.0, 0.25, 0.6),
    ):
        found.set(step)
        assert (estimator.alpha, estimator.beta, model.temperature) == pytest.approx((alpha, beta, temperature))
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 * factor, 0.1 * factor]
    named = {"alpha": 0.5, "beta": 2.0, "temperature": 0.6, "lr": 1e-3 * 0.25}
    assert found.values() == {f"schedule/{name}": value for name, value in named.items()}
    assert model.state_dict() == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.warmup_alpha=0.9"], "task.warmup_steps=0: task.warmup_alpha needs a number of steps to change in"),
        (["task.warmup_steps=9"], "task.warmup_steps=9: nothing warms up; give task.warmup_alpha or task.warmup_beta"),
        (["task.warmup_offset=9"], "task.warmup_offset=9: nothing warms up; .*"),
        (["task.warmup_scale=log10"], "task.warmup_scale=log10; did you mean 'log'?"),
        (["task.lr_steps=[9,5]"], r"task.lr_steps=\[9, 5\]: expected steps that increase"),
        (["task.temperature_minimum=0.5"], "task.temperature_minimum=0.5: nothing falls; give task.temperature_rate"),
        (["task.temperature_rate=0.1"], "task.temperature_minimum=0.0: expected above 0 and below .*=1.0"),
        (["task.temperature_rate=0.1", "task.temperature_minimum=1"], "task.temperature_minimum=1.0: expected .*"),
    ],
)
def test_what_fits_nothing_is_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        schedules(*overrides)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_temperature_is_refused_by_name():
    with pytest.raises(UserError, match=r"task.temperature_rate=0.1: Linear has no temperature; give 0"):
        schedules("task.temperature_rate=0.1", "task.temperature_minimum=0.5", model=nn.Linear(1, 1))
