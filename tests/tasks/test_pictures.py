import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, TransformedDistribution

from models import Template
from tasks.pictures import draw_pictures, grid, is_image, png


class Echo(Template):
    """Reconstructs half of x; samples from the prior are dark with one bright pixel. `means`: whether px has them."""

    def __init__(self, shape=(1, 4, 5), means=True, has_prior=True):
        super().__init__()
        self.shape, self.means, self.has_prior = shape, means, has_prior
        self.layer = nn.Dropout(0.5)

    def forward(self, x: Tensor, **kwargs):
        z = torch.zeros(len(x), 1)
        px = (
            Bernoulli(probs=0.5 * x.flatten(1), validate_args=False)
            if self.means
            else TransformedDistribution(Normal(x, 1.0), [])
        )
        return {"px": px, "z": [z], "qz": [Normal(z, 1.0)], "pz": [Normal(z, 1.0)]}

    def sample_from_prior(self, bs: int):
        if not self.has_prior:
            return super().sample_from_prior(bs)
        pixels = torch.zeros(bs, *self.shape)
        pixels[torch.arange(bs), 0, 0, 0] = torch.rand(bs)
        return {"px": Bernoulli(probs=pixels)}


def images(num, shape=(1, 4, 5)):
    return torch.linspace(0, 1, num).view(-1, 1, 1, 1).expand(num, *shape)


def test_a_grid_has_eight_to_a_row_and_margins_between():
    picture = grid(images(10))
    assert picture.shape == (2 * 4 + 3 * 2, 8 * 5 + 9 * 2, 1)
    assert picture.dtype == np.uint8
    assert (picture[2:6, 2:7] == 0).all()
    assert (picture[8:12, 9:14] == 255).all()  # the tenth
    assert (picture[:2] == 128).all()
    assert (picture[8:12, 16:] == 128).all()  # there is no eleventh
    assert grid(images(3, (3, 4, 5))).shape == (4 + 2 * 2, 8 * 5 + 9 * 2, 3)


def test_values_outside_of_0_and_1_are_held_within():
    picture = grid(torch.tensor([-3.0, 0.5, 7.0, float("nan")]).view(4, 1, 1, 1))
    assert [int(picture[2, 2 + 3 * i, 0]) for i in range(4)] == [0, 128, 255, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture(channels):
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, channels), dtype=np.uint8)
    found = np.asarray(Image.open(io.BytesIO(png(picture))))
    assert np.array_equal(found.reshape(picture.shape), picture)


def test_reconstructions_stand_below_their_observations():
    found = draw_pictures(Echo(), images(100), seed=0)["reconstruction"]
    assert found.shape == (8 * 4 + 9 * 2, 8 * 5 + 9 * 2, 1)
    x = images(100)
    for index in (0, 5, 8, 31):
        row, column = divmod(index, 8)
        top, left = 2 + 2 * row * 6, 2 + column * 7
        assert found[top, left] == round(255 * x[index, 0, 0, 0].item())
        assert found[top + 6, left] == round(127.5 * x[index, 0, 0, 0].item())


def test_the_same_seed_gives_the_same_pictures_and_nothing_is_changed():
    model = Echo().train()
    before = torch.get_rng_state()
    first, again, other = (draw_pictures(model, images(9), seed)["prior"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_what_a_model_cannot_draw_is_left_out():
    assert draw_pictures(Echo(has_prior=False), images(9), 0).keys() == {"reconstruction"}
    assert draw_pictures(Echo(means=False), images(9), 0).keys() == {"prior"}
    assert draw_pictures(Echo(shape=(1, 3, 3)), images(9), 0).keys() == {"reconstruction"}
    assert not is_image(torch.zeros(3, 784))
    assert not is_image(torch.zeros(3, 2, 4, 4))
    assert is_image(torch.zeros(3, 3, 4, 4))
