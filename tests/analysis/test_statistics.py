import math
from functools import partial

import pytest
import torch

from analysis.statistics import GradientStatistics, Oracle, reduce_replicates

METRICS = ("grads/snr", "grads/dsnr", "grads/variance", "grads/magnitude")


def reduce(gradients: torch.Tensor, block_size: int = 100) -> GradientStatistics:
    return reduce_replicates(lambda: iter(gradients.split(block_size)), gradients.dtype)


def skewed(num: int, generator: torch.Generator) -> torch.Tensor:
    """Correlated and skewed gradients [num, 4] whose means lie several standard errors from zero."""
    mix = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.8, 0.5, 0.0, 0.0], [-0.3, 0.2, 1.0, 0.0], [0.1, 0.4, 0.3, 2.0]])
    noise = torch.empty(num, 4, dtype=torch.float64).exponential_(generator=generator) - 1
    return torch.tensor([1.0, -0.8, 0.5, 1.5], dtype=torch.float64) + noise @ mix.double().T


def test_definitions():
    gradients = skewed(300, torch.Generator().manual_seed(0))
    stats, summary = reduce(gradients), reduce(gradients).summary()
    mean, variance = gradients.mean(0), gradients.var(0)
    snr = mean.abs() / variance.sqrt()
    along = (gradients @ mean / mean.norm()).unsqueeze(1) * mean / mean.norm()
    dsnr = (along.norm(dim=1) / (gradients - along).norm(dim=1)).mean()
    torch.testing.assert_close(stats.mean, mean)
    torch.testing.assert_close(stats.variance, variance)
    torch.testing.assert_close(stats.snr, snr)
    expected = (snr.mean(), dsnr, variance.mean(), mean.abs().mean())
    assert [summary[name] for name in METRICS] == pytest.approx([value.item() for value in expected], rel=1e-12)
    for p in (5, 25, 50, 75, 95):
        assert summary[f"snr/p{p}"] == pytest.approx(torch.quantile(snr, p / 100).item(), rel=1e-12)
    assert summary["grads/num_constant"] == 0
    assert all(isinstance(value, float) for value in summary.values())


@pytest.mark.parametrize("block_size", [1, 7, 150, 1000])
def test_blocks_do_not_matter(block_size):
    gradients = skewed(300, torch.Generator().manual_seed(1))
    whole, blocks = reduce(gradients, 300), reduce(gradients, block_size)
    for name in ("mean", "variance", "snr", "mean_se", "variance_se", "snr_se"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), rtol=1e-11, atol=0)
    assert blocks.summary() == pytest.approx(whole.summary(), rel=1e-11)


def test_variance_of_gradients_far_from_zero():
    noise = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stats = reduce(1e8 + noise, 10)
    torch.testing.assert_close(stats.variance, noise.var(0), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_runs():
    """500 runs: the empirical spread is known to 1/sqrt(1000) = 3.2% (for normal values); four of them allowed."""
    generator = torch.Generator().manual_seed(3)
    runs = [reduce(skewed(500, generator), 250) for _ in range(500)]
    for name in METRICS:
        values = torch.tensor([run.summary()[name] for run in runs], dtype=torch.float64)
        reported = torch.tensor([run.summary()[f"{name}_se"] for run in runs], dtype=torch.float64).mean()
        assert reported / values.std() == pytest.approx(1, abs=0.13), name
    for name in ("mean", "variance", "snr"):
        values = torch.stack([getattr(run, name) for run in runs])
        reported = torch.stack([getattr(run, f"{name}_se") for run in runs]).mean(0)
        torch.testing.assert_close(reported / values.std(0), torch.ones(4).double(), rtol=0, atol=0.13)


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.1])
def test_standard_errors_where_the_means_are_lost_in_noise(scale):
    """abs(mean) is folded there: the standard errors are held to 30%, the DSNR's to be no smaller than the spread."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    mean = scale * torch.randn(12, dtype=torch.float64, generator=generator) * mix.norm(dim=0)
    runs = [reduce(mean + torch.randn(200, 12, dtype=torch.float64, generator=generator) @ mix) for _ in range(300)]
    for name in METRICS:
        values = torch.tensor([run.summary()[name] for run in runs])
        ratio = torch.tensor([run.summary()[f"{name}_se"] for run in runs]).mean() / values.std()
        assert 0.85 < ratio < (2 if name == "grads/dsnr" else 1.3), (name, ratio)
    values = torch.stack([run.snr for run in runs])
    ratio = torch.stack([run.snr_se for run in runs]).mean(0) / values.std(0)
    assert ((ratio > 0.8) & (ratio < 1.4)).all()


def test_constant_parameters_are_left_out_and_counted():
    gradients = skewed(200, torch.Generator().manual_seed(5)).float()
    zeros = torch.zeros(200, 1)
    rounded = torch.full((200, 1), 0.7)
    rounded[::2] *= 1 + 50 * torch.finfo(torch.float32).eps
    padded = torch.cat([zeros, gradients, rounded], 1)
    stats, summary, expected = reduce(padded), reduce(padded).summary(), reduce(gradients).summary()
    assert stats.constant.tolist() == [True, False, False, False, False, True]
    assert stats.snr[stats.constant].isnan().all()
    assert (stats.variance[stats.constant] == 0).all()
    assert summary["grads/num_constant"] == 2
    for name in expected.keys() - {"grads/num_constant", "grads/dsnr", "grads/dsnr_se"}:
        assert summary[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_small_spread_is_not_constant():
    gradients = 1e-30 * torch.randn(100, 3, generator=torch.Generator().manual_seed(6))
    assert reduce(gradients).summary()["grads/num_constant"] == 0


def test_a_small_relative_spread_is_not_constant():
    gradients = 1 + 1e-3 * torch.randn(100, 3, generator=torch.Generator().manual_seed(6))
    assert reduce(gradients).summary()["grads/num_constant"] == 0
    assert reduce(gradients).summary()["grads/snr"] == pytest.approx(1000, rel=0.2)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_all_constant_is_nan(value):
    stats = reduce(torch.full((50, 3), value))
    summary = stats.summary()
    assert summary.pop("grads/num_constant") == 3
    assert all(math.isnan(value) for value in summary.values())
    torch.testing.assert_close(stats.mean, torch.full((3,), value))


def test_one_parameter_has_nothing_across():
    summary = reduce(torch.randn(50, 1, generator=torch.Generator().manual_seed(7))).summary()
    assert summary["grads/dsnr"] == math.inf
    assert math.isfinite(summary["grads/snr_se"])


def test_standard_errors_of_bias_and_cosine_are_their_spread():
    """Over 200 seeds, whose spread is known to 1 / sqrt(400) of itself, 5%: to 20%, then. The oracle has errors too.

    Every parameter's bias is 7 standard errors or more, so that abs() is a straight line, and the angle to the oracle
    is wide, so that the cosine is one too. The bound on the mean is what the curvature of the cosine leaves.
    """
    generator = torch.Generator().manual_seed(11)
    truth = torch.tensor([3.0, 0.7, -1.5, -2.0], dtype=torch.float64)
    se = torch.full_like(truth, 0.1)
    names = ("grads/bias", "grads/bias_se", "grads/cosine", "grads/cosine_se")
    rows = []
    for _ in range(200):
        oracle = Oracle(truth + se * torch.randn(4, generator=generator, dtype=torch.float64), se, "reference")
        gradients = skewed(200, generator)
        summary = reduce_replicates(partial(iter, [gradients]), gradients.dtype, oracle).summary()
        rows.append([summary[name] for name in names])
    bias, bias_se, cosine, cosine_se = torch.tensor(rows, dtype=torch.float64).unbind(1)
    assert bias.std() / bias_se.square().mean().sqrt() == pytest.approx(1, abs=0.2)
    assert cosine.std() / cosine_se.square().mean().sqrt() == pytest.approx(1, abs=0.2)
    mean = torch.tensor([1.0, -0.8, 0.5, 1.5], dtype=torch.float64)
    assert abs(bias.mean() - (mean - truth).abs().mean()) < 4.5 * bias.std() / 200**0.5
    assert abs(cosine.mean() - mean @ truth / mean.norm() / truth.norm()) < 0.4 * cosine.std()


def test_a_replicate_of_zeros_counts_nothing_in_the_dsnr():
    gradients = skewed(50, torch.Generator().manual_seed(8))
    gradients[3] = 0
    assert math.isfinite(reduce(gradients).summary()["grads/dsnr"])
    assert math.isfinite(reduce(gradients).summary()["grads/dsnr_se"])


def test_what_is_not_finite_is_seen():
    gradients = skewed(50, torch.Generator().manual_seed(9))
    gradients[3, 1] = torch.nan
    stats = reduce(gradients)
    assert not stats.constant.any()
    assert stats.mean.isnan().tolist() == [False, True, False, False]
    assert math.isnan(stats.summary()["grads/snr"])


def test_dtype_follows_the_gradients():
    for dtype in (torch.float32, torch.float64):
        stats = reduce(skewed(20, torch.Generator().manual_seed(10)).to(dtype))
        assert {getattr(stats, name).dtype for name in ("mean", "variance", "snr", "variance_se")} == {dtype}


def test_one_replicate_is_refused():
    with pytest.raises(ValueError, match="at least two replicates"):
        reduce(torch.ones(1, 3))
