"""Properties of the soft-quantization layer: cells, monotony, limit, derivative, jumps, inverse, reachable box."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from nsq_repro.quantization import (
    SoftQuantize,
    border_jump,
    borders,
    cell_index,
    hard_quantize,
    output_values,
    reachable_box,
    soft_quantize,
    soft_quantize_derivative,
    soft_quantize_inverse,
    thresholds,
)

PAPER = [(1, 1000.0), (2, 100 * 255.0), (4, 100 * 255.0), (8, 10000.0), (16, 255.0), (4, 1.0)]
FLOATS = [torch.float32, torch.float64]
few = settings(max_examples=60, deadline=None, derandomize=True)

Ks = st.integers(1, 20)
alphas = st.sampled_from([0.1, 1.0, 10.0, 100.0, 255.0, 1000.0, 1e4, 25500.0, 1e6]) | st.floats(-1, 6).map(
    lambda e: 10.0**e
)
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**31)
# in the last but one, vmin + (vmax - vmin) rounds to more than vmax, in float32 and in float64
ranges = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1, 2.7), (5.0, 5.5)])


def pixels(seed, n=200, dtype=torch.float64, vmin=0.0, vmax=1.0, spill=0.0):
    "n random pixels in the range, widened by `spill` of it on both sides."
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vmin + (vmax - vmin) * ((1 + 2 * spill) * u - spill)).to(dtype)


def special(K, dtype, vmin=0.0, vmax=1.0):
    "Borders, thresholds and output values, with the floats just below and above each."
    p = torch.cat([f(K, vmin, vmax, dtype) for f in (borders, thresholds, output_values)])
    inf = torch.full_like(p, math.inf)
    return torch.cat([p, p.nextafter(inf), p.nextafter(-inf)])


def eq3(x, K, alpha):
    "Equation 3 for one Python float in [0, 1], its cell decided in exact arithmetic."
    k = max([i for i in range(K) if Fraction(i, K) < Fraction(x)], default=0)
    v = alpha * float(Fraction(x) - Fraction(2 * k + 1, 2 * K))
    s = 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v))
    return float(Fraction(k, K)) + s / K


# --- cells, thresholds, output values


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_border_belongs_to_the_cell_below(dtype):
    for K in range(1, 65):
        b = torch.tensor([i / K for i in range(1, K)], dtype=dtype)
        above = b.nextafter(torch.ones_like(b))
        assert cell_index(b, K).tolist() == list(range(K - 1))
        assert cell_index(above, K).tolist() == list(range(1, K))
        ends = torch.tensor([-math.inf, -1, 0, 1, 2, math.inf], dtype=dtype)
        assert cell_index(ends, K).tolist() == [0] * 3 + [K - 1] * 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_borders_in_the_units_of_pixels_0_to_255(dtype):
    for K in (2, 3, 4, 5, 16, 17, 51, 85):
        b = torch.tensor([255 * i / K for i in range(1, K)], dtype=dtype)
        assert torch.equal(borders(K, 0, 255, dtype), b)
        assert cell_index(b, K, 0, 255).tolist() == list(range(K - 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_soft_and_hard_use_those_cells_at_borders_and_thresholds(dtype):
    for K in range(2, 40):
        b, t = borders(K, dtype=dtype), thresholds(K, dtype=dtype)
        above = b.nextafter(torch.ones_like(b))
        # alpha = K: the jump, about 0.75/K, tells the cells apart
        assert (soft_quantize(b, K, K) < b).all() and (soft_quantize(above, K, K) > above).all()
        assert torch.equal(hard_quantize(t, K), output_values(K, dtype=dtype)[:-1])
        assert torch.equal(hard_quantize(t.nextafter(torch.ones_like(t)), K), output_values(K, dtype=dtype)[1:])


@given(Ks, ranges, dtypes, seeds)
@few
def test_hard_quantization_has_K_plus_1_values_and_takes_the_nearest(K, r, dtype, seed):
    x = pixels(seed, 500, dtype, *r, spill=0.2)
    z = hard_quantize(x, K, *r)
    known = output_values(K, *r, dtype)
    assert len(known) == K + 1 and torch.isin(z, known).all()
    assert known[0].item() == torch.tensor(r[0], dtype=dtype) and known[-1].item() == torch.tensor(r[1], dtype=dtype)
    nearest = (x[:, None] - known).abs().min(1).values
    assert ((z - x).abs() <= nearest + 1e-5 * (r[1] - r[0])).all()
    assert torch.equal(hard_quantize(known, K, *r), known)


# --- Eq. 3


@given(Ks, alphas, seeds)
@few
def test_equation_3_in_exact_cells(K, alpha, seed):
    x = pixels(seed, 25)
    z = torch.tensor([eq3(a, K, alpha) for a in x.tolist()], dtype=torch.float64)
    assert_close(soft_quantize(x, K, alpha), z, rtol=0, atol=1e-15 * (10 + alpha))


@given(Ks, alphas, dtypes, ranges, seeds)
@few
def test_monotone_and_in_range(K, alpha, dtype, r, seed):
    x = torch.cat([pixels(seed, 300, dtype, *r, spill=0.3), special(K, dtype, *r)]).sort().values
    for a in (alpha, math.inf):
        z = soft_quantize(x, K, a, *r)
        ulp = torch.finfo(dtype).eps * max(map(abs, r))
        assert (z.diff() >= -ulp).all()
        low, high = torch.tensor(r, dtype=dtype)
        assert (z >= low).all() and (z <= high).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_never_leaves_the_range(dtype):
    low, high = torch.tensor([-2.1, 2.7], dtype=dtype)
    assert -2.1 + (2.7 - -2.1) * torch.ones((), dtype=dtype) > high  # what a plain rescaling would return
    for K in (1, 3):
        z = soft_quantize(torch.stack([low, high]), K, 1000.0, -2.1, 2.7)
        assert torch.equal(z, torch.stack([low, high]))


@given(Ks, alphas, seeds)
@few
def test_limit_to_hard_quantization(K, alpha, seed):
    x = pixels(seed)
    d = (x - thresholds(K)[cell_index(x, K)]).abs()
    gap = (soft_quantize(x, K, alpha) - hard_quantize(x, K)).abs()
    assert_close(gap, torch.sigmoid(-alpha * d) / K, rtol=0, atol=1e-14 * (1 + alpha))
    assert (gap <= torch.exp(-alpha * d) / K + 1e-14 * (1 + alpha)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("alpha", [1e39, 1e300, math.inf])
def test_alpha_beyond_the_float_type_is_hard_quantization_and_never_nan(alpha, dtype):
    for K in (1, 3, 4):
        x = torch.cat([torch.linspace(-0.2, 1.2, 211, dtype=dtype), special(K, dtype)])
        x = x[~torch.isin(x, thresholds(K, dtype=dtype))]
        assert torch.equal(soft_quantize(x, K, alpha), hard_quantize(x, K))
        assert soft_quantize(thresholds(K, dtype=dtype), K, alpha).isfinite().all()
    x = torch.tensor([0.2, 0.5, 0.7], dtype=dtype, requires_grad=True)
    assert torch.autograd.grad(soft_quantize(x, 1, math.inf).sum(), x)[0].tolist() == [0, 0, 0]


@given(Ks, alphas, ranges, seeds)
@few
def test_another_range_is_the_same_staircase(K, alpha, r, seed):
    u, w = pixels(seed), r[1] - r[0]
    keep = (u * K - (u * K).round()).abs() > 1e-6  # off the borders, where rounding u decides the cell
    u = u[keep]
    slack = 1e-13 * (1 + alpha) * (1 + abs(r[0]) / w)
    assert_close(
        soft_quantize(r[0] + w * u, K, alpha, *r), r[0] + w * soft_quantize(u, K, alpha), rtol=0, atol=w * slack
    )
    slope = [soft_quantize_derivative(r[0] + w * u, K, alpha, *r), soft_quantize_derivative(u, K, alpha)]
    assert_close(*slope, rtol=0, atol=alpha * slack)


# --- derivative


@given(Ks, alphas, ranges, seeds)
@few
def test_derivative_is_that_of_autograd(K, alpha, r, seed):
    x = torch.cat([pixels(seed, 200, torch.float64, *r, spill=0.1), special(K, torch.float64, *r)]).requires_grad_()
    (g,) = torch.autograd.grad(soft_quantize(x, K, alpha, *r).sum(), x)
    closed = soft_quantize_derivative(x.detach(), K, alpha, *r)
    assert_close(g, closed, rtol=1e-9, atol=1e-14 * alpha)
    assert (closed >= 0).all() and (closed <= alpha / (4 * K) * (1 + 1e-15)).all()


@given(Ks, alphas, seeds)
@few
def test_derivative_against_central_differences(K, alpha, seed):
    x, h = pixels(seed), min(1e-4 / alpha, 1e-5)
    x = x[cell_index(x - h, K) == cell_index(x + h, K)]
    central = (soft_quantize(x + h, K, alpha) - soft_quantize(x - h, K, alpha)) / (2 * h)
    assert_close(central, soft_quantize_derivative(x, K, alpha), rtol=1e-6, atol=1e-7 * alpha / K + 1e-11 / h * 1e-4)


@pytest.mark.parametrize("K, alpha", PAPER)
def test_derivative_peaks_at_alpha_over_4K(K, alpha):
    t = thresholds(K)
    assert_close(soft_quantize_derivative(t, K, alpha), torch.full_like(t, alpha / (4 * K)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("K, alpha", PAPER)
def test_integral_of_the_derivative(K, alpha):
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)
    integral = torch.trapezoid(soft_quantize_derivative(x, K, alpha), x).item()
    assert integral == pytest.approx(math.tanh(alpha / (4 * K)), abs=1e-6)


@pytest.mark.parametrize("S", [SoftQuantize(1, 20.0), SoftQuantize(3, 20.0, -1, 1)])
def test_gradcheck_and_second_derivative(S):
    x = pixels(3, 20).requires_grad_()
    assert torch.autograd.gradcheck(S, x) and torch.autograd.gradgradcheck(S, x)


def test_closed_form_keeps_its_precision_where_float32_autograd_is_zero():
    x = torch.tensor([0.37, 0.4, 0.52, 0.55, 0.58], requires_grad=True)  # v = -130, -100, 20, 50, 80
    (g,) = torch.autograd.grad(soft_quantize(x).sum(), x)
    assert g.tolist() == [0] * 5
    exact = soft_quantize_derivative(x.detach().double())
    assert_close(soft_quantize_derivative(x.detach())[2:].double(), exact[2:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, -128, 24), (torch.float64, -1024, 53)])
def test_band_in_which_autograd_returns_a_gradient(dtype, low, high):
    low, high = low * math.log(2), high * math.log(2)
    v = torch.tensor([low - 0.1, low + 0.1, 0, high - 0.1, high + 0.1], dtype=dtype)
    x = (v + 0.5).requires_grad_()
    (g,) = torch.autograd.grad(soft_quantize(x, 1, 1.0).sum(), x)
    assert (g > 0).tolist() == [False, True, True, True, False]


def test_derivative_of_hard_quantization():
    x = torch.tensor([0.1, 0.25, 0.3, math.nan])
    assert str(soft_quantize_derivative(x, 2, math.inf).tolist()) == "[0.0, inf, 0.0, nan]"


# --- jumps at inner borders


@given(st.integers(2, 20), st.floats(-1, 2).map(lambda e: 10.0**e))
@few
def test_jump_at_inner_borders(K, alpha):
    b = borders(K)
    jump = soft_quantize(b.nextafter(torch.ones_like(b)), K, alpha) - soft_quantize(b, K, alpha)
    sigma = math.exp(-alpha / (2 * K)) / (1 + math.exp(-alpha / (2 * K)))
    assert border_jump(K, alpha) == pytest.approx(2 / K * sigma, rel=1e-12)
    assert_close(jump, torch.full_like(b, 2 / K * sigma), rtol=1e-9, atol=1e-13)
    assert_close(b - soft_quantize(b, K, alpha), torch.full_like(b, sigma / K), rtol=1e-9, atol=1e-13)


def test_jumps_of_the_settings_of_the_paper():
    assert border_jump(1, 1000.0) == 0 and border_jump(2, 100 * 255.0) == 0 and 0 < border_jump(8, 10000.0) < 1e-200
    assert border_jump(16, 255.0) == pytest.approx(4.3e-5, rel=0.01) and border_jump(4, 1.0) == pytest.approx(
        0.234, rel=0.01
    )


# --- inverse


@given(Ks, alphas, dtypes, ranges, seeds)
@few
def test_S_of_the_inverse_gives_z_back(K, alpha, dtype, r, seed):
    x = torch.cat([pixels(seed, 300, dtype, *r), special(K, dtype, *r).clamp(*r)])
    z = soft_quantize(x, K, alpha, *r)
    back = soft_quantize_inverse(z, K, alpha, *r)
    low, high = torch.tensor(r, dtype=dtype)
    assert back.isfinite().all() and (back >= low).all() and (back <= high).all()
    # x' lies on the grid of floats, so z may be off by one rounding of x' times the slope; of the arithmetic, a few
    top = max(map(abs, r))
    ulp = torch.finfo(dtype).eps * top
    slope = torch.maximum(soft_quantize_derivative(back, K, alpha, *r), soft_quantize_derivative(x, K, alpha, *r))
    assert ((soft_quantize(back, K, alpha, *r) - z).abs() <= ulp * (8 + 4 * slope)).all()


@given(st.sampled_from(PAPER), dtypes)
@few
def test_inverse_gives_x_back_where_S_does_not_saturate(setting, dtype):
    K, alpha = setting
    ulp = torch.finfo(dtype).eps
    v = torch.linspace(-1, 1, 101, dtype=torch.float64) * min(-math.log(1e4 * ulp), 0.499 * alpha / K)
    x = (thresholds(K)[:, None] + v / alpha).flatten().to(dtype)
    slope = soft_quantize_derivative(x, K, alpha)
    back = soft_quantize_inverse(soft_quantize(x, K, alpha), K, alpha)
    assert ((back - x).abs() <= 4 * ulp * (1 + 1 / slope)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K, alpha", PAPER + [(1, 1e6), (3, math.inf), (1, math.inf)])
def test_round_trip_on_plateaus(K, alpha, dtype):
    x = torch.linspace(0, 1, 2001, dtype=dtype)
    z = soft_quantize(x, K, alpha)
    plateau = torch.isin(z, output_values(K, dtype=dtype))
    again = soft_quantize(soft_quantize_inverse(z, K, alpha), K, alpha)
    assert_close(again[plateau], z[plateau], rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert plateau.any() or alpha < 1000


def test_inverse_of_values_S_does_not_take():
    b, jump = borders(4), border_jump(4, 3.0)
    above = b.nextafter(torch.ones_like(b))  # the first float of the upper cell
    for part, x in [(-0.49, b), (-0.2, b), (0, b), (0.2, above), (0.49, above)]:
        assert torch.equal(soft_quantize_inverse(b + part * jump, 4, 3.0), x)
    for part, beyond in [(-0.6, -1), (0.6, 1)]:
        assert ((soft_quantize_inverse(b + part * jump, 4, 3.0) - b) * beyond > 0).all()
    z = torch.tensor([-1.0, 0.0, 0.01, 0.99, 1.0, 2.0, math.nan])
    assert (
        soft_quantize_inverse(z, 4, 3.0)[:-1].tolist() == [0, 0, 0, 1, 1, 1]
        and soft_quantize_inverse(z, 4, 3.0)[-1].isnan()
    )
    z = torch.tensor([-0.5, 0.0, 0.1, 0.5, 0.7, 1.0, 1.5])
    assert soft_quantize_inverse(z, 2, math.inf).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert soft_quantize_inverse(z, 2, 10.0).diff().min() >= 0


def test_inverse_is_detached():
    assert not soft_quantize_inverse(torch.rand(3, requires_grad=True)).requires_grad


# --- reachable box


@given(Ks, alphas, dtypes, ranges, seeds, st.floats(0, 0.6))
@few
def test_box_holds_the_image_of_the_ball_and_its_ends_are_images(K, alpha, dtype, r, seed, eps):
    x, eps = pixels(seed, 100, dtype, *r), eps * (r[1] - r[0])
    low, high = reachable_box(x, eps, K, alpha, *r)
    ulp = torch.finfo(dtype).eps * max(map(abs, r))
    for part in (-1, -0.7, -0.1, 0, 0.4, 0.99, 1):
        z = soft_quantize((x + part * eps).clamp(*r), K, alpha, *r)
        assert (z >= low - ulp).all() and (z <= high + ulp).all()
    assert_close(soft_quantize((x - eps).clamp(*r), K, alpha, *r), low, rtol=0, atol=ulp)
    assert_close(soft_quantize((x + eps).clamp(*r), K, alpha, *r), high, rtol=0, atol=ulp)


@given(st.floats(0, 1.5).map(lambda e: 10.0**e), seeds, st.floats(0.01, 0.6), st.floats(0, 1))
@few
def test_for_one_step_every_point_of_the_box_is_reached(alpha, seed, eps, part):
    x = pixels(seed)
    low, high = reachable_box(x, eps, 1, alpha)
    z = low + part * (high - low)
    back = soft_quantize_inverse(z, 1, alpha)
    assert ((back - x).abs() <= eps + 1e-7).all() and (back >= 0).all() and (back <= 1).all()
    assert_close(soft_quantize(back, 1, alpha), z, rtol=0, atol=1e-13)


def test_box_with_one_radius_per_example():
    x, eps = pixels(0, 4 * 3 * 5).reshape(4, 3, 5).float(), torch.tensor([0.0, 0.1, 0.2, 5.0])
    low, high = reachable_box(x, eps, 2, 50.0)
    for i in range(4):
        assert torch.equal(torch.stack(reachable_box(x[i], float(eps[i]), 2, 50.0)), torch.stack([low[i], high[i]]))
    assert torch.equal(low[0], high[0]) and torch.equal(low[0], soft_quantize(x[0], 2, 50.0))
    assert torch.equal(high[3], soft_quantize(torch.ones(3, 5), 2, 50.0))  # clipped to the range first
    scalar = [torch.stack(reachable_box(x, e, 2, 50.0)) for e in (torch.tensor(0.1), float(torch.tensor(0.1)))]
    assert torch.equal(*scalar)


def test_box_of_pixels_outside_the_range():
    low, high = reachable_box(torch.tensor([-3.0, 4.0]), 0.5, 1, 10.0)
    ends = soft_quantize(torch.tensor([0.0, 1.0]), 1, 10.0)
    assert torch.equal(low, ends) and torch.equal(high, ends)


# --- types, shapes, layouts

FUNCTIONS = [cell_index, hard_quantize, soft_quantize, soft_quantize_derivative, soft_quantize_inverse]


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("K", [1, 3])
def test_shapes_and_layouts_without_warnings(f, K):
    x = pixels(1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)  # PyTorch's own warnings come once a process otherwise
        whole = f(x, K)
        for view in (
            x.to(memory_format=torch.channels_last),
            x.transpose(1, 3),
            x[:, ::2],
            x[..., 0],
            x[0, 0, 0, 0],
            x[:0],
        ):
            y = f(view, K)
            assert y.shape == view.shape
            assert_close(y, f(view.contiguous(), K), rtol=0, atol=1e-3 if f is soft_quantize_derivative else 1e-6)
        torch.set_warn_always(False)
    assert_close(whole.flatten(), torch.cat([f(a, K) for a in x]).flatten(), rtol=1e-6, atol=1e-6)
    if f is not cell_index:
        assert f(x.to(memory_format=torch.channels_last), K).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("f", FUNCTIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOATS])
def test_types(f, dtype):
    x = pixels(2).to(dtype)
    assert f(x, 3, vmin=-1, vmax=2).dtype == dtype
    if dtype not in FLOATS:
        assert torch.equal(f(x, 3), f(x.float(), 3).to(dtype))
    assert f(torch.tensor(math.nan, dtype=dtype), 3).isnan()
    low, high = reachable_box(x, 0.1, 3)
    assert low.dtype == high.dtype == dtype


def test_float64_is_computed_in_float64():
    x = torch.tensor([0.5 + 1e-10], dtype=torch.float64)
    assert soft_quantize(x, 1, 1000.0).item() == pytest.approx(0.5 + 2.5e-8, rel=1e-12)


def test_gradient_in_half_precision_comes_from_float32():
    x = torch.tensor([0.5, 0.52], dtype=torch.bfloat16, requires_grad=True)
    (g,) = torch.autograd.grad(soft_quantize(x, 1, 100.0).float().sum(), x)
    assert torch.equal(g, soft_quantize_derivative(x.detach(), 1, 100.0))


def test_infinite_pixels():
    x = torch.tensor([-math.inf, math.inf], requires_grad=True)
    z = soft_quantize(x, 4, 10.0)
    assert z.tolist() == [0, 1] and torch.autograd.grad(z.sum(), x)[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 3])
def test_autocast_leaves_S_in_float32(K, dtype):
    x = pixels(5, 64).float().requires_grad_()
    plain = soft_quantize(x, K, 50.0)
    with torch.autocast("cpu", dtype=dtype):
        z = soft_quantize(x, K, 50.0)
        h = soft_quantize(x.to(dtype), K, 50.0)
    assert z.dtype == torch.float32 and torch.equal(z, plain)
    assert torch.equal(h, soft_quantize(x.to(dtype).float(), K, 50.0).to(dtype))


@pytest.mark.parametrize("layer", [SoftQuantize(1, 1000.0), SoftQuantize(3, 50.0, -1, 1), SoftQuantize(2, math.inf)])
def test_compiles_in_one_graph(layer):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.cat([pixels(6, 100).float(), special(layer.K, torch.float32, layer.vmin, layer.vmax)]).requires_grad_()
    z = compiled(x)
    assert_close(z, layer(x), rtol=0, atol=1e-6)
    (g,) = torch.autograd.grad(z.sum(), x)
    expect = torch.zeros_like(x) if layer.alpha == math.inf else layer.derivative(x.detach())
    assert_close(g, expect, rtol=1e-3, atol=1e-3)


# --- the layer


def test_layer_is_the_functions_and_holds_no_state():
    args = dict(K=3, alpha=40.0, vmin=-1.0, vmax=2.0)
    S, x = SoftQuantize(**args), pixels(7, 50).reshape(5, 10)
    assert torch.equal(S(x), soft_quantize(x, **args))
    assert torch.equal(S.derivative(x), soft_quantize_derivative(x, **args))
    assert torch.equal(S.inverse(x), soft_quantize_inverse(x, **args))
    for eps in (0.1, torch.arange(5) / 10):
        assert all(map(torch.equal, S.reachable_box(x, eps), reachable_box(x, eps, **args)))
    assert not S.state_dict() and not list(S.parameters()) and not list(S.buffers())
    assert repr(S) == "SoftQuantize(K=3, alpha=40.0, vmin=-1.0, vmax=2.0)"


# --- refusals

BAD = [
    (dict(K=0), "K must"),
    (dict(K=-2), "K must"),
    (dict(K=True), "K must"),
    (dict(K=2.0), "K must"),
    (dict(K="2"), "K must"),
    (dict(alpha=0), "alpha must"),
    (dict(alpha=-1.0), "alpha must"),
    (dict(alpha=math.nan), "alpha must"),
    (dict(alpha=True), "alpha must"),
    (dict(alpha="1"), "alpha must"),
    (dict(vmin=1.0, vmax=0.0), "vmin < vmax"),
    (dict(vmin=1.0), "vmin < vmax"),
    (dict(vmax=math.inf), "vmin < vmax"),
    (dict(vmin=math.nan), "vmin < vmax"),
    (dict(vmin=None), "vmin < vmax"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_arguments_are_named(bad, message):
    x = torch.zeros(2)
    for f in (
        lambda **a: SoftQuantize(**a),
        lambda **a: soft_quantize(x, **a),
        lambda **a: soft_quantize_derivative(x, **a),
        lambda **a: soft_quantize_inverse(x, **a),
        lambda **a: reachable_box(x, 0.1, **a),
    ):
        with pytest.raises(ValueError, match=message):
            f(**bad)


@pytest.mark.parametrize(
    "eps",
    [
        -0.1,
        math.nan,
        None,
        "0.1",
        [0.1, 0.1],
        torch.tensor([-0.1, 0.1]),
        torch.tensor([math.nan, 0]),
        torch.zeros(3),
        torch.zeros(2, 1),
        torch.tensor(-1.0),
    ],
)
def test_bad_eps_is_named(eps):
    with pytest.raises(ValueError, match="eps must"):
        reachable_box(torch.zeros(2, 3), eps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_pixels_must_be_floats(dtype):
    x = torch.zeros(2, dtype=dtype)
    for f in FUNCTIONS:
        with pytest.raises(ValueError, match="x must hold floating-point"):
            f(x)
