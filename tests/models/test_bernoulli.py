import pytest
import torch
from torch.distributions import Bernoulli
from torch.func import grad, vmap

from models import bernoulli
from models.bernoulli import (
    bernoulli_draw,
    bernoulli_log_prob,
    draw_bernoulli,
    linear_bernoulli_draw,
    linear_bernoulli_log_prob,
)

MC, IW, BATCH, H, D = 2, 3, 4, 5, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def normal(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def bits(*shape):
    return torch.randint(0, 2, shape).double()


def reference(logits, value):
    return Bernoulli(logits=logits, validate_args=False).log_prob(value).sum(-1)


def assert_same_gradients(value, expected, inputs):
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((weights * value).sum(), inputs)
    wanted = torch.autograd.grad((weights * expected).sum(), inputs)
    for g, w in zip(got, wanted, strict=True):
        assert_exact(g, w)


SHAPES = {
    "alike": ((MC, IW, BATCH), (MC, IW, BATCH)),
    "values shared by particles": ((MC, IW, BATCH), (BATCH,)),
    "logits shared by particles": ((BATCH,), (MC, IW, BATCH)),
    "one row of logits": ((), (MC, IW, BATCH)),
    "ones on both sides": ((MC, 1, BATCH), (1, IW, 1)),
    "single rows": ((), ()),
}


@pytest.mark.parametrize(("of_logits", "of_value"), SHAPES.values(), ids=SHAPES)
def test_log_probabilities_and_gradients_are_those_of_torch_distributions(of_logits, of_value):
    logits, value = normal(*of_logits, D, scale=3.0), bits(*of_value, D).requires_grad_()
    log_prob, expected = bernoulli_log_prob(logits, value), reference(logits, value)
    assert_exact(log_prob, expected)
    assert_same_gradients(log_prob, expected, [logits, value])


@pytest.mark.parametrize(("of_h", "of_value"), SHAPES.values(), ids=SHAPES)
def test_the_linear_form_is_the_linear_map_and_the_log_probability(of_h, of_value):
    inputs = [normal(*of_h, H), normal(D, H), normal(D), bits(*of_value, D).requires_grad_()]
    log_prob = linear_bernoulli_log_prob(*inputs)
    h, weight, bias, value = inputs
    expected = reference(h @ weight.t() + bias, value)
    assert_exact(log_prob, expected)
    assert_same_gradients(log_prob, expected, inputs)


@pytest.mark.parametrize("needed", range(3), ids=["h", "weight", "bias"])
def test_one_input_may_be_the_only_one_with_a_gradient(needed):
    inputs = [normal(BATCH, H), normal(D, H), normal(D)]
    h, weight, bias = (each if i == needed else each.detach() for i, each in enumerate(inputs))
    value = bits(BATCH, D)
    expected = reference(h @ weight.t() + bias, value)
    assert_same_gradients(linear_bernoulli_log_prob(h, weight, bias, value), expected, [inputs[needed]])


def test_rows_and_weights_that_are_not_contiguous():
    h, weight = normal(BATCH, H, IW).transpose(1, 2), normal(H, D).t()
    value = bits(BATCH, 2 * D, IW).transpose(1, 2)[..., ::2]
    bias = normal(D)
    expected = reference(h @ weight.t() + bias, value)
    log_prob = linear_bernoulli_log_prob(h, weight, bias, value)
    assert_exact(log_prob, expected)
    assert_same_gradients(log_prob, expected, [h, weight, bias])
    logits = normal(D, BATCH).t()
    assert_same_gradients(bernoulli_log_prob(logits, value[:, 0]), reference(logits, value[:, 0]), [logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_numbers_to_the_last_digit(dtype):
    logits = torch.tensor([-1e4, -800.0, -90.0, -41.0, -30.0, -1e-8, 0.0, 12.0, 30.0, 41.0, 90.0, 800.0, 1e4])
    logits = logits.to(dtype).unsqueeze(-1).requires_grad_()
    for bit in (0.0, 1.0):
        value = torch.full_like(logits, bit).detach()
        log_prob = bernoulli_log_prob(logits, value)
        signed = (2 * bit - 1) * logits.detach().double().squeeze(-1)
        exact = signed.clamp(max=0) - (-signed.abs()).exp().log1p()  # -log(1 + exp(-s))
        # Relative to the logit, whose product with the value is subtracted from its softplus.
        error = (log_prob.detach().double() - exact).abs() / signed.abs().clamp(min=1)
        assert error.max() <= 2 * torch.finfo(dtype).eps
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        exact_gradient = bit - logits.detach().double().sigmoid()
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_float32_sums_over_many_pixels_keep_six_digits():
    logits = 6 * torch.randn(50, 784, dtype=torch.float64) - 3
    value = (torch.rand(50, 784, dtype=torch.float64) < logits.sigmoid()).double()
    exact = reference(logits, value)
    rounded = reference(logits.float().double(), value)
    got = bernoulli_log_prob(logits.float(), value.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), rounded, rtol=1e-6, atol=0)
    assert (exact - rounded).abs().max() > 0


@pytest.mark.parametrize("size", [784, 5000])
def test_float32_logits_that_values_share_lose_no_more_than_those_of_a_table(size):
    logits = 20 * torch.randn(size, dtype=torch.float64) + 40
    value = (torch.rand(50, size, dtype=torch.float64) < logits.sigmoid()).double()
    rounded = logits.float().double().requires_grad_()
    shared = rounded.detach().float().requires_grad_()
    exact, got = reference(rounded, value), bernoulli_log_prob(shared, value.float())
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(got.sum(), shared)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), rounded)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(D,), (BATCH, D)])
def test_logits_of_few_digits_meet_values_of_more(shape):
    logits, value = (10 * torch.randn(shape)).bfloat16(), bits(50, BATCH, D).float()
    exact = reference(logits.double(), value.double())
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = bernoulli_log_prob(logits, value)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5, atol=1e-6)


def test_nan_stays_nan():
    logits = torch.tensor([0.0, torch.nan])
    assert bernoulli_log_prob(logits, torch.ones(2)).isnan()


def test_vmap_of_grad_equals_a_loop_of_grads():
    parameters = [normal(BATCH, H), normal(D, H), normal(D)]
    parameters = [parameter.detach() for parameter in parameters]
    values = bits(7, IW, BATCH, D)
    weights = torch.randn(7, IW, BATCH, dtype=torch.float64)

    def loss(inputs, value, weights):
        h, weight, bias = inputs
        of_linear = linear_bernoulli_log_prob(h.expand(IW, BATCH, H), weight, bias, value)
        of_shared = linear_bernoulli_log_prob(h, weight, bias, value)
        of_logits = bernoulli_log_prob(h @ weight.t() + bias, value[0])
        return (weights * (of_linear + 2 * of_shared + of_logits)).sum()

    for in_dims in ((None, 0, 0), (None, 0, None), (None, None, 0)):
        arguments = [each if dim == 0 else each[0] for each, dim in zip((values, weights), in_dims[1:], strict=True)]
        batched = vmap(grad(loss), in_dims=in_dims)(parameters, *arguments)
        for i in range(7):
            chosen = [each[i] if dim == 0 else each for each, dim in zip(arguments, in_dims[1:], strict=True)]
            for many, one in zip(batched, grad(loss)(parameters, *chosen), strict=True):
                assert_exact(many[i], one)


def test_vmap_over_parameters_gives_each_its_own_gradient():
    h, weight, bias, value = normal(7, BATCH, H), normal(7, D, H), normal(7, D), bits(BATCH, D)
    inputs = (h.detach(), weight.detach(), bias.detach())

    def loss(inputs):
        h, weight, bias = inputs
        return linear_bernoulli_log_prob(h, weight, bias, value).sum()

    batched = vmap(grad(loss))(inputs)
    for i in range(7):
        for many, one in zip(batched, grad(loss)(tuple(each[i] for each in inputs)), strict=True):
            assert_exact(many[i], one)


def test_a_draw_comes_with_its_log_probability_and_gradients():
    inputs = [normal(MC, IW, BATCH, H), normal(D, H), normal(D)]
    z, log_prob = linear_bernoulli_draw(*inputs)
    h, weight, bias = inputs
    expected = reference(h @ weight.t() + bias, z)
    assert z.shape == (MC, IW, BATCH, D)
    assert not z.requires_grad
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert_exact(log_prob, expected)
    assert_same_gradients(log_prob, expected, inputs)


def test_draws_under_vmap_differ_from_replicate_to_replicate():
    h, weight, bias = (each.detach() for each in (normal(BATCH, H), normal(D, H), normal(D)))

    def replicate(index):
        def loss(weight):
            z, log_prob = linear_bernoulli_draw(h, weight, bias)
            return log_prob.sum(), z

        return grad(loss, has_aux=True)(weight)

    gradients, z = vmap(replicate, randomness="different")(torch.zeros(50))
    assert len(z.unique(dim=0)) == 50
    for i in range(50):
        expected = (z[i] - (h @ weight.t() + bias).sigmoid()).t() @ h
        assert_exact(gradients[i], expected)


@pytest.mark.parametrize("linear", [False, True])
def test_draws_are_as_frequent_as_their_probabilities(linear):
    probs = torch.tensor([0.0, 0.02, 0.5, 0.97, 1.0])
    num_samples = 200_000
    if linear:
        z, _ = linear_bernoulli_draw(torch.zeros(num_samples, 1), torch.zeros(5, 1), probs.logit())
    else:
        z = draw_bernoulli(probs, (num_samples // 2, 2)).flatten(0, 1)
    assert z.dtype == torch.float32
    error = (probs * (1 - probs) / num_samples).sqrt()
    assert ((z.mean(0) - probs).abs() <= 4.5 * error).all()
    covariance = torch.cov(z[:, 1:4].double().t())
    expected = (probs * (1 - probs))[1:4].double()
    assert ((covariance - expected.diag()).abs() < 5 * (expected.outer(expected) / num_samples).sqrt() + 1e-3).all()


def test_a_uniform_number_below_the_probability_draws_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.0, 0.3, 0.5, 0.0]))
    z = draw_bernoulli(torch.tensor([1e-40, 0.4, 0.5, 0.0]))
    assert z.tolist() == [1, 1, 0, 0]
    assert not z.signbit().any()


@pytest.mark.parametrize("piece", [1, 7, 40, 100])
def test_pieces_change_nothing_but_rounding(piece, monkeypatch):
    h, weight, bias = (each.detach() for each in (normal(MC, IW, BATCH, H), normal(D, H), normal(D)))
    value, shared = bits(MC, IW, BATCH, D), bits(BATCH, D)

    def everything():
        torch.manual_seed(1)
        rows = h.clone().requires_grad_()
        drawn = linear_bernoulli_draw(rows, weight, bias)
        found = [linear_bernoulli_log_prob(rows, weight, bias, each) for each in (value, shared)]
        found += [bernoulli_log_prob(rows @ weight.t(), each) for each in (value, shared)]
        found += [linear_bernoulli_log_prob(rows[0, 0, 0], weight, bias, shared[0])]
        total = torch.stack([each.sum() for each in (drawn[1], *found)]).sum()
        return [*drawn, *found, *torch.autograd.grad(total, rows)]

    whole = everything()
    monkeypatch.setattr("models.pieces.PIECE", piece)
    for cut, uncut in zip(everything(), whole, strict=True):
        assert_exact(cut, uncut)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("batched", range(3), ids=["h", "weight", "bias"])
def test_draws_under_vmap_have_the_log_probabilities_of_their_own_logits(randomness, batched):
    shapes = [(BATCH, H), (D, H), (D,)]
    inputs = [torch.randn(*([7] if i == batched else []), *shape) for i, shape in enumerate(shapes)]
    in_dims = tuple(0 if i == batched else None for i in range(3))
    z, log_prob = vmap(linear_bernoulli_draw, in_dims, randomness=randomness)(*inputs)
    for i in range(7):
        h, weight, bias = (each[i] if dim == 0 else each for dim, each in zip(in_dims, inputs, strict=True))
        torch.testing.assert_close(log_prob[i], reference(h @ weight.t() + bias, z[i]))
    alike = [torch.zeros(7, 100, H), torch.zeros(D, H), torch.zeros(D)]
    z, _ = vmap(linear_bernoulli_draw, (0, None, None), randomness=randomness)(*alike)
    assert all(torch.equal(z[0], each) == (randomness == "same") for each in z[1:])
    twice = vmap(vmap(linear_bernoulli_log_prob, (0, None, None, None)), (0, None, None, 0))
    rows, value = normal(2, 3, BATCH, H), bits(2, BATCH, D)
    weight, bias = normal(D, H), normal(D)
    assert_exact(twice(rows, weight, bias, value), reference(rows @ weight.t() + bias, value.unsqueeze(1)))
    several, values = normal(MC, IW, BATCH, H), bits(7, BATCH, D)  # of fewer dimensions than the rows
    many = vmap(linear_bernoulli_log_prob, (None, None, None, 0))(several, weight, bias, values)
    assert_exact(many, reference(several @ weight.t() + bias, values[:, None, None]))
    many = vmap(bernoulli_log_prob, (None, 0))(several @ weight.t() + bias, values)
    assert_exact(many, reference(several @ weight.t() + bias, values[:, None, None]))


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    """The gradient of h alone takes no product for the weight's, and vice versa; asked for together they are two."""
    inputs = [normal(MC, IW, BATCH, H), normal(D, H), normal(D)]
    h, weight, bias = inputs
    log_prob = linear_bernoulli_log_prob(h, weight, bias, bits(MC, IW, BATCH, D)).sum()
    asked: list[tuple[bool, ...]] = []
    gradients = bernoulli._linear_gradients

    def spy(ctx, *arguments):
        asked.append(ctx.needs_input_grad[:3])
        return gradients(ctx, *arguments)

    monkeypatch.setattr(bernoulli, "_linear_gradients", spy)
    for chosen, expected in ((inputs[:1], [(True, False, False)]), (inputs[1:], [(False, True, True)])):
        asked.clear()
        torch.autograd.grad(log_prob, chosen, retain_graph=True)
        assert asked == expected
    asked.clear()
    torch.autograd.grad(log_prob, inputs)
    assert sorted(asked) == [(False, True, True), (True, False, False)]


def test_the_value_s_gradient_depends_on_the_weight():
    h, weight, bias = normal(BATCH, H), normal(D, H), normal(D)
    value = torch.rand(BATCH, D, dtype=torch.float64, requires_grad=True)
    (by_value,) = torch.autograd.grad(linear_bernoulli_log_prob(h, weight, bias, value).sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(by_value.square().sum(), weight)
    assert_exact(second, 2 * (h @ weight.t() + bias).t() @ h)


@pytest.mark.parametrize("parts", ["linear", "draw", "logits"])
def test_under_autocast_the_gradients_may_be_computed_outside_of_it(parts):
    h, weight, bias = (each.detach().float().requires_grad_() for each in (normal(BATCH, H), normal(D, H), normal(D)))
    value = bits(BATCH, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        if parts == "linear":
            log_prob = linear_bernoulli_log_prob(h, weight, bias, value)
        elif parts == "draw":
            value, log_prob = linear_bernoulli_draw(h, weight, bias)
        else:
            log_prob = bernoulli_log_prob(torch.nn.functional.linear(h, weight, bias), value)
    assert log_prob.dtype == torch.float32
    got = torch.autograd.grad(log_prob.sum(), (h, weight, bias))
    wanted = torch.autograd.grad(reference(h @ weight.t() + bias, value).sum(), (h, weight, bias))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(), (BATCH,), (IW, BATCH)])
def test_a_draw_from_shared_logits_comes_with_its_log_probability_and_gradient(shape):
    logits = normal(*shape, D)
    z, log_prob = bernoulli_draw(logits, (MC, 7))
    assert z.shape == (MC, 7, *shape, D)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    expected = reference(logits, z)
    assert_exact(log_prob, expected)
    assert_same_gradients(log_prob, expected, [logits])
    for randomness in ("same", "different"):
        draws, log_probs = vmap(lambda _: bernoulli_draw(logits, (50,)), randomness=randomness)(torch.zeros(7))
        assert all(torch.equal(draws[0], each) == (randomness == "same") for each in draws[1:])
        assert_exact(log_probs, reference(logits, draws))
