import pytest
import torch

from models.transformer import Transformer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(vocabulary=7, length=6, width=8, layers=2, heads=2).double()


def test_no_logit_sees_what_comes_later(model):
    tokens = torch.randint(7, (3, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_what_is_generated_has_the_law_of_the_logits(model):
    torch.manual_seed(1)
    with torch.no_grad():
        model.readout.weight.mul_(4)
    number = 20_000
    tokens = model.generate(torch.full((number,), 2), steps=2)
    assert tokens.shape == (number, 3)
    assert (tokens[:, 0] == 2).all()
    pairs = torch.cartesian_prod(torch.tensor([2]), torch.arange(7), torch.arange(7))
    logp = model(pairs[:, :-1]).log_softmax(-1).gather(-1, pairs[:, 1:, None]).sum((1, 2))
    expected = logp.exp()
    counts = (tokens[:, 1] * 7 + tokens[:, 2]).bincount(minlength=49) / number
    assert expected.sum().item() == pytest.approx(1)
    assert ((counts - expected).abs() < 4.5 * (expected * (1 - expected) / number).sqrt() + 1e-9).all()


def test_after_the_end_comes_the_end(model):
    torch.manual_seed(1)
    tokens = model.generate(torch.zeros(200, dtype=torch.long), steps=5, end=3)
    ended = (tokens == 3).cummax(1).values
    assert (tokens[ended] == 3).all()
    assert ended.any()
    assert not ended.all(1).any()


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="7 tokens: the model was built for 6"):
        model(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="a width of 10 cannot be shared by 4 heads"):
        Transformer(7, 6, width=10, heads=4)
