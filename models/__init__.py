"""The models, and the template that users subclass."""

from models.conv_vae import ConvVAE
from models.gaussian_mixture import GaussianMixture
from models.gaussian_toy import GaussianToy
from models.sigmoid_belief_network import SigmoidBeliefNetwork
from models.template import Template
from models.vae import VAE

__all__ = ["VAE", "ConvVAE", "GaussianMixture", "GaussianToy", "SigmoidBeliefNetwork", "Template"]
