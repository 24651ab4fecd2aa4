"""The models, and the template that users subclass."""

from models.gaussian_mixture import GaussianMixture
from models.gaussian_toy import GaussianToy
from models.template import Template

__all__ = ["GaussianMixture", "GaussianToy", "Template"]
