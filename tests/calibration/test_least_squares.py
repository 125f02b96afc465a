"""fitting: ridge least squares from sums, against plain least squares on the stacked data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revify.calibration.least_squares import Fit, Sums, fit_dense, fit_diagonal, reduce_rank, subtract, take


def data(n: int = 400, features: int = 6, targets: int = 3, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64) * torch.logspace(-1, 2, features) + 5
    weight = torch.randn(features, targets, generator=generator, dtype=torch.float64)
    y = x @ weight + 2 + noise * torch.randn(n, targets, generator=generator, dtype=torch.float64)
    return x, y


def sums_of(x: Tensor, y: Tensor, weight: Tensor | None = None, batch: int = 37) -> Sums:
    weight = torch.ones(len(x)) if weight is None else weight
    sums = Sums.empty(x.shape[1], y.shape[1])
    for rows in (slice(start, start + batch) for start in range(0, len(x), batch)):
        sums.add(x[rows], y[rows], weight[rows])
    return sums


def residual(fit: Fit, x: Tensor, y: Tensor) -> Tensor:
    return y - x @ fit.weight - fit.shift


def test_dense_finds_an_exact_relation() -> None:
    x, y = data()
    fit = fit_dense(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    assert residual(fit, x, y).abs().max() < 1e-3 * y.std()  # the smallest ridge, 1e-5, is not zero


def test_dense_agrees_with_least_squares_on_noisy_data() -> None:
    x, y = data(n=4000, noise=1.0)
    fit = fit_dense(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    reference = y - torch.cat([x, ones], 1) @ best
    assert residual(fit, x, y).square().mean() < 1.001 * reference.square().mean()


def test_ridge_grows_when_there_are_fewer_positions_than_features() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 64, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    fit = fit_dense(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    fresh = torch.randn(500, 64, dtype=torch.float64)
    assert fit.ridge >= 1
    assert (fresh @ fit.weight).square().mean() < 0.2  # pure noise: the fit must stay near nothing


def test_the_ridge_is_no_less_than_asked() -> None:
    x, y = data()
    fits = [fit_dense(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]), least) for least in (0.0, 0.3, 50.0)]
    assert [fit.ridge for fit in fits] == [1e-5, 0.3, 50.0]  # the last beyond all that are tried
    sizes = [(x @ fit.weight).var(0).sum() for fit in fits]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("groups", [1, 2])
def test_diagonal_is_least_squares_per_channel(groups: int) -> None:
    channels = 3
    x, y = data(features=groups * channels, targets=channels, noise=1.0)
    fit = fit_diagonal(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    for c in range(channels):
        own = torch.cat([x[:, c::channels], torch.ones(len(x), 1, dtype=torch.float64)], 1)
        best = (y[:, c : c + 1] - own @ torch.linalg.lstsq(own, y[:, c : c + 1]).solution).square().mean()
        assert residual(fit, x, y)[:, c].square().mean() < 1.01 * best
    off = fit.weight.clone()
    for i in range(groups):
        off[torch.arange(channels) + i * channels, torch.arange(channels)] = 0
    assert torch.count_nonzero(off) == 0


def test_error_is_the_mean_squared_residual() -> None:
    x, y = data(noise=1.0)
    weight, shift = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    direct = (y - x @ weight - shift).square().sum(1).mean()
    assert sums_of(x, y).error(weight, shift) == pytest.approx(float(direct), rel=1e-9)


def test_subtract_is_the_sums_of_the_residual() -> None:
    x, y = data(noise=1.0)
    fit = Fit(torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    left, direct = subtract(sums_of(x, y), fit), sums_of(x, residual(fit, x, y))
    for name in ("cross", "square", "mean_y"):
        torch.testing.assert_close(getattr(left, name), getattr(direct, name), rtol=1e-9, atol=1e-6)


def test_a_position_of_weight_three_counts_three_times() -> None:
    x, y = data(n=10)
    weight = torch.tensor([3.0] + [1.0] * 9)
    repeated = torch.tensor([0, 0, *range(10)])
    weighted, direct = sums_of(x, y, weight), sums_of(x[repeated], y[repeated])
    for name in ("gram", "cross", "square", "mean_x", "mean_y"):
        torch.testing.assert_close(getattr(weighted, name), getattr(direct, name))
    assert weighted.count == direct.count == 12


def test_take_keeps_the_chosen_features() -> None:
    x, y = data()
    chosen, direct = take(sums_of(x, y), slice(1, 3)), sums_of(x[:, 1:3], y)
    torch.testing.assert_close(chosen.gram, direct.gram)
    torch.testing.assert_close(chosen.cross, direct.cross)
    torch.testing.assert_close(chosen.mean_x, direct.mean_x)


def test_full_rank_is_the_dense_fit_and_lower_ranks_are_worse_but_better_than_nothing() -> None:
    x, y = data(noise=0.1)
    sums = sums_of(x, y)
    dense = fit_dense(sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    errors = []
    for rank in (1, 2, 3):
        up, down, shift = reduce_rank(dense, sums, rank)
        assert (up.shape, down.shape) == ((3, rank), (rank, 6))
        errors.append(float((y - x @ down.T @ up.T - shift).square().mean()))
    assert y.var() > errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(float(residual(dense, x, y).square().mean()), rel=1e-6)
