"""The objects that a configuration names: device, data set, model, estimator, optimizer."""

import inspect
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from datasets.base import Dataset
from errors import UserError
from estimators import get_estimator
from models.template import Template
from orchestration.execution import resolve
from seeding import derive_seed
from tasks.allocator import keep_freed_memory


def prepare_torch(config: DictConfig) -> torch.device:
    """Give this process the job's number of threads, and memory that it keeps; return the job's device.

    The device `auto` is the CUDA device that this process sees, else the CPU.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory()
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
    """Return the data set of a resolved configuration; one whose constructor names `data_root` is given that."""
    options = options_of(config.dataset)
    if "data_root" in inspect.signature(resolve(options["target"])).parameters:
        options.setdefault("data_root", config.data_root)
    return construct(options)


def build_model(config: DictConfig, device: torch.device, dataset: Dataset) -> Template:
    """Return the model of a resolved configuration, its parameters drawn from the job's seed alone, then adapted to
    the training points of its data set.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "parameters"))
        model = component(config.model).to(device)
        model.adapt(dataset.points("train"))
    return model


def build_estimator(config: DictConfig, device: torch.device) -> nn.Module:
    """Return the estimator of a resolved configuration, its parameters drawn from the job's seed alone."""
    return _estimator(config, device, options_of(config.estimator))


def build_estimators(config: DictConfig, device: torch.device) -> dict[str, nn.Module]:
    """Return the estimator of a resolved configuration and those of `task.compare`, which differ in the id, by id."""
    options = options_of(config.estimator)
    ids = dict.fromkeys([options["id"], *config.task.compare])
    return {id: _estimator(config, device, {**options, "id": id}) for id in ids}


def _estimator(config: DictConfig, device: torch.device, options: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "estimator"))
        return get_estimator(**options).to(device)


def build_networks(config: DictConfig, estimator: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Let an estimator build what it builds on its first x: drawn from the job's seed alone, and nothing else changed.

    What is built has to be there before a checkpoint is loaded into it and into its optimizer.
    """
    if not any(map(is_lazy, estimator.parameters())):
        return
    was_training = estimator.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(derive_seed(config.seed, "estimator"))
        estimator.eval()(model, x)
    estimator.train(was_training)


def build_optimizer(config: DictConfig, model: nn.Module, estimator: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters and of the estimator's own, these at `estimator_lr`."""
    options = options_of(config.optimizer)
    estimator_lr = options.pop("estimator_lr")
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if own := list(estimator.parameters()):
        groups.append({"params": own, "lr": options["lr"] if estimator_lr is None else estimator_lr})
    return construct(options, groups)


def component(section: DictConfig, *arguments: Any) -> Any:
    """Call a section's target with these arguments, and the section's other keys as keyword arguments."""
    return construct(options_of(section), *arguments)


def construct(options: dict[str, Any], *arguments: Any) -> Any:
    """Call the target in `options` with these arguments, and the other options as keyword arguments."""
    options = dict(options)
    target = options.pop("target")
    try:
        return resolve(target)(*arguments, **options)
    except TypeError as error:
        raise UserError(f"{target}: {error}") from error


def options_of(section: DictConfig) -> dict[str, Any]:
    """Return a section as plain Python."""
    return dict(OmegaConf.to_container(section))  # type: ignore[arg-type]
