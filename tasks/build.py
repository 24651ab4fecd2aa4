"""The objects that a configuration names: device, data set, model, estimator, optimizer."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from datasets.base import Dataset
from errors import UserError
from estimators import get_estimator
from models.template import Template
from orchestration.execution import resolve
from seeding import derive_seed


def prepare_torch(config: DictConfig) -> torch.device:
    """Give this process the job's number of threads; return the job's device.

    The device `auto` is the CUDA device that this process sees, else the CPU.
    """
    torch.set_num_threads(config.threads)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"device={config.device}: expected auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={config.device}: this process sees no CUDA device; use device=auto or device=cpu")
    return device


def build_dataset(config: DictConfig) -> Dataset:
    """Return the data set of a resolved configuration."""
    return component(config.dataset)


def build_model(config: DictConfig, device: torch.device) -> Template:
    """Return the model of a resolved configuration, its parameters drawn from the job's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "parameters"))
        return component(config.model).to(device)


def build_estimator(config: DictConfig, device: torch.device) -> nn.Module:
    """Return the estimator of a resolved configuration."""
    return get_estimator(**options_of(config.estimator)).to(device)


def build_optimizer(config: DictConfig, model: nn.Module, estimator: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters and of the estimator's own."""
    return component(config.optimizer, [*model.parameters(), *estimator.parameters()])


def component(section: DictConfig, *arguments: Any) -> Any:
    """Call a section's target with these arguments, and the section's other keys as keyword arguments."""
    options = options_of(section)
    target = options.pop("target")
    try:
        return resolve(target)(*arguments, **options)
    except TypeError as error:
        raise UserError(f"{target}: {error}") from error


def options_of(section: DictConfig) -> dict[str, Any]:
    """Return a section as plain Python."""
    return dict(OmegaConf.to_container(section))  # type: ignore[arg-type]
