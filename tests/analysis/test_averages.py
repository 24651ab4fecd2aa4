"""Averages of diagnostics, alone and in the training loop of a user."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Bernoulli
from torch.utils.tensorboard import SummaryWriter

from analysis.averages import Averages
from analysis.gradients import gradient_statistics
from estimators import get_config
from tests.simple_model import SimpleModel


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of an event folder: by name, the steps and values."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_means_are_weighted_and_each_name_has_its_own_number():
    averages = Averages()
    averages.update({"a": torch.tensor(1.0), "b": 4})
    averages.update({"a": torch.tensor([3.0], dtype=torch.float64)}, weight=3)
    assert averages.means() == {"a": 2.5, "b": 4.0}
    averages.update({"b": 0.0})
    assert averages.means() == {"a": 2.5, "b": 2.0}
    averages.reset()
    assert averages.means() == {}


def test_a_long_sum_of_float32_keeps_its_digits():
    averages = Averages()
    for _ in range(3000):
        averages.update({"a": torch.tensor(1e8)})
        averages.update({"a": torch.tensor(1.0)})
    assert averages.means()["a"] == 50_000_000.5


def test_no_graph_is_kept_and_no_value_is_read(monkeypatch: pytest.MonkeyPatch):
    """Reading a value of a device waits for it."""
    averages, value = Averages(), torch.tensor(2.0, requires_grad=True)
    with monkeypatch.context() as unreadable:
        for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
            unreadable.setattr(torch.Tensor, name, None)
        averages.update({"a": value * 3})
        averages.update({"a": value.detach()}, weight=2)
    assert averages.means()["a"] == pytest.approx(10 / 3)
    assert not any(isinstance(total, torch.Tensor) and total.requires_grad for total in averages._sums.values())


@pytest.mark.parametrize(
    ("values", "weight", "message"),
    [
        ({"a": 1.0, "b": torch.ones(2, 1)}, 1.0, r"b has the shape \[2, 1\], expected a scalar; give its mean"),
        ({"a": 1.0}, 0.0, r"weight = 0.0, expected a positive number"),
        ({"a": 1.0}, float("nan"), r"weight = nan, expected a positive number"),
    ],
)
def test_what_cannot_be_averaged_is_refused_and_nothing_is_added(values: dict, weight: float, message: str):
    averages = Averages()
    with pytest.raises(ValueError, match=f"^{message}$"):
        averages.update(values, weight)
    assert averages.means() == {}


def test_means_are_logged_under_their_names(tmp_path: Path):
    averages = Averages()
    averages.update({"loss/L_k": -2.0})
    with SummaryWriter(str(tmp_path)) as writer:
        averages.log(writer, 3)
        averages.log(writer, 4, prefix="train")
    assert read(tmp_path) == {"loss/L_k": [(3, -2.0)], "train/loss/L_k": [(4, -2.0)]}


def test_a_training_loop_of_a_user(tmp_path: Path):
    """Two epochs: estimator, optimiser, averages, gradient statistics, TensorBoard."""
    torch.manual_seed(0)
    Estimator, config = get_config("ovis-gamma1")
    estimator, model = Estimator(mc=1, iw=8, **config), SimpleModel(10, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(Bernoulli(0.8).sample((20, 10)), batch_size=8)
    averages, step, written = Averages(), 0, []
    with SummaryWriter(str(tmp_path)) as writer:
        for _ in range(2):
            averages.reset()
            bounds = []
            for x in loader:
                step += 1
                loss, diagnostics, _ = estimator(model, x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                averages.update(diagnostics, weight=len(x))
                bounds.append(-loss.item() * len(x))
            statistics = gradient_statistics(estimator, model, x, num_replicates=10, parameters="inference_network")
            averages.update(statistics.summary())
            averages.log(writer, step)
            written.append((step, sum(bounds) / 20))
            assert set(averages.means()) == {*diagnostics, *statistics.summary()}
    scalars = read(tmp_path)
    assert [step for step, _ in scalars["grads/snr"]] == [3, 6]
    for (step, value), (expected_step, expected) in zip(scalars["loss/L_k"], written, strict=True):
        assert step == expected_step
        assert value == pytest.approx(expected, rel=1e-5)
    assert scalars["loss/L_k"][1][1] > scalars["loss/L_k"][0][1]
