"""The objects that a configuration names: device, data set, model, estimator, optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from datasets.base import Dataset
from errors import UserError
from estimators import get_estimator
from orchestration.execution import resolve
from seeding import derive_seed


def prepare_torch(config: Mapping[str, Any]) -> torch.device:
    """Give this process the job's number of threads; return the job's device.

    The device `auto` is the CUDA device that this process sees, else the CPU.
    """
    torch.set_num_threads(config["threads"])
    name = config["device"]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: expected auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: no CUDA device is visible to this process; use device=auto or device=cpu")
    return device


def build_dataset(config: Mapping[str, Any]) -> Dataset:
    """Return the data set of a resolved configuration."""
    return component(config["dataset"])


def build_model(config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Return the model of a resolved configuration, its parameters drawn from the job's seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config["seed"], "parameters"))
        return component(config["model"]).to(device)


def build_estimator(config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Return the estimator of a resolved configuration."""
    return get_estimator(**config["estimator"]).to(device)


def build_optimizer(config: Mapping[str, Any], model: nn.Module, estimator: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters and of the estimator's own."""
    return component(config["optimizer"], [*model.parameters(), *estimator.parameters()])


def component(section: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a section's target with these arguments, and the section's other keys as keyword arguments."""
    options = {str(name): value for name, value in section.items() if name != "target"}
    try:
        return resolve(section["target"])(*arguments, **options)
    except TypeError as error:
        raise UserError(f"{section['target']}: {error}") from error
