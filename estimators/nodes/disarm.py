"""DisARM: ARM with the uniform integrated out, given the pair of samples."""

import torch
from torch import Tensor

from estimators.nodes.arm import AntitheticPair
from estimators.nodes.base import Sample, logits_of


class DisARM(AntitheticPair):
    """1/2 (f(b) - f(b~)) (-1)^b~ 1[b != b~] sigmoid(|l|), the mean over n pairs.

    (Dong et al. 2020; Yin et al. 2020: U2G.) It is the mean of ARM given both samples, so its variance is never larger.
    Two costs a sample, whatever the number of variables. Unbiased. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Dong et al. 2020; Yin et al. 2020"

    def factor(self, sample: Sample) -> Tensor:
        """Return 1/2 (-1)^b~ 1[b != b~] sigmoid(|l|) = (b - b~) sigmoid(|l|) / 2."""
        first, second = sample.points.chunk(2)
        return 0.5 * (first - second) * torch.sigmoid(logits_of(sample.distribution).detach().abs())


U2G = DisARM
