"""Task `shortest_path`: a network that learns what cells cost from cheapest paths, through Dijkstra's algorithm.

The network sees a map and returns the cost of each cell; the loss is the Hamming distance of the cheapest path by these
costs to the given one. Its gradient is the method's (tasks.solver_learning).
"""

from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from datasets.base import FiniteDataset
from datasets.grid_maps import COLOURS
from errors import UserError
from estimators.imle.noise import draw
from models.solvers import LEAST_COST, shortest_path
from orchestration.storage import write_atomically
from tasks.build import build_dataset, prepare_torch
from tasks.context import Context
from tasks.map_pictures import animation, draw_map, draw_paths
from tasks.solver_learning import SolverLearning, adaptive_target, check_method, differentiable, noise_of

METHODS = ("imle", "aimle", "perturbed", "blackbox", "straight-through")
OPTIMAL = 1e-4  # a path costs so much more, relatively, than the cheapest, at most, where it is as cheap
SAMPLES = 100  # of the path, for pictures of its distribution
FRAMES = 24  # single samples in an animation


class Costs(nn.Module):
    """From what is seen of a map, [batch, 3, height, width], to the costs of its cells, [batch, height, width]."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(COLOURS, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, 1, 1), nn.Softplus()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the costs, above 0."""
        return self.layers(x).squeeze(1) + LEAST_COST


def hamming(y: Tensor, gold: Tensor) -> Tensor:
    """Return the number of cells, [batch], that are on one of two paths alone; linear in y for relaxed ones."""
    return (y + gold - 2 * y * gold).flatten(1).sum(1)


class ShortestPath(SolverLearning):
    """One run of the study."""

    network: Costs

    def make_network(self) -> nn.Module:
        """Return the network."""
        check(self.config)
        self.dataset = build_dataset(self.config).to(self.device)
        dataset = self.config.dataset
        self.solver = partial(shortest_path, neighbours=dataset.neighbours)
        self.noise = noise_of(self.task.noise, float(dataset.side))
        self.solve = differentiable(self.task, self.solver, self.noise, self.target)
        return Costs(self.task.hidden)

    def loss(self) -> Tensor:
        """Return the sum of the losses of the batch: their gradient by y, a step's direction, has no batch's size."""
        x = self.dataset.batch(self.step, self.config.batch_size, self.config.seed)
        y = self.solve(-self.network(x[:, :COLOURS]))
        samples = len(y) // len(x)
        return hamming(y, x[:, -1].repeat_interleave(samples, 0)).sum() / samples

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return how the cheapest paths by the learnt costs, without noise, compare with the given ones."""
        found = {}
        for split in ("train", "test"):
            x = self.dataset.points(split)[: self.config.evaluation.points]
            cost, gold = x[:, COLOURS], x[:, -1]
            learnt = self.network(x[:, :COLOURS])
            y = self.solver(-learnt)
            excess = ((y - gold) * cost).sum((1, 2)) / (gold * cost).sum((1, 2))
            found[split] = {
                "path/hamming": hamming(y, gold).mean().item(),
                "path/excess_cost": excess.mean().item(),
                "path/optimal": (excess < OPTIMAL).float().mean().item(),
                "path/cost_correlation": torch.corrcoef(torch.stack([learnt.flatten(), cost.flatten()]))[0, 1].item(),
            }
        if self.task.method == "aimle":
            found["train"]["path/relative_step"] = self.target.beta
        self._draw()
        return found

    def _draw(self) -> None:
        """Draw the first test map: learnt costs, marginals of the path under noise, gradients of the Hamming loss."""
        x = self.dataset.points("test")[:1]
        cost, gold = x[0, COLOURS], x[0, -1]
        learnt = self.network(x[:, :COLOURS])
        marginals = self._paths(learnt).mean(0)
        repeated = learnt.detach().repeat(SAMPLES, 1, 1).requires_grad_()
        with torch.enable_grad():
            # A target of its own: a picture leaves that of the training as it is.
            target = adaptive_target(self.task)
            target.load_state_dict(self.target.state_dict())
            y = differentiable(self.task, self.solver, self.noise, target)(-repeated)
            samples = len(y) // SAMPLES
            loss = hamming(y, gold.expand_as(y)).sum() / samples
        (gradient,) = torch.autograd.grad(loss, repeated)
        picture = draw_map(cost, gold, learnt[0], marginals, gradient.mean(0), self.step)
        self._write(f"map-{self.step:010d}.png", picture)

    def _paths(self, costs: Tensor, num: int = SAMPLES) -> Tensor:
        """Return paths [num, height, width] by costs [1, height, width] that noise perturbs."""
        scores = -costs.detach().expand(num, -1, -1)
        eps = draw(noise_of("sum-of-gamma", float(self.config.dataset.side)), scores)
        return self.solver(scores + self.task.temperature * eps)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the animations: the map over training, and single paths under perturbation."""
        frames = [path.read_bytes() for path in sorted(self.context.run.samples.glob("map-*.png"))]
        self._write("training.gif", animation(frames, milliseconds=500))
        x = self.dataset.points("test")[:1]
        torch.manual_seed(self.config.seed)
        paths = self._paths(self.network(x[:, :COLOURS]), FRAMES)
        self._write("paths.gif", animation(draw_paths(x[0, COLOURS], paths), milliseconds=250))

    def _write(self, name: str, content: bytes) -> None:
        self.context.run.samples.mkdir(exist_ok=True)
        write_atomically(self.context.run.samples / name, content)


def run(config: DictConfig, context: Context) -> None:
    """Learn as `config` says; write metrics, checkpoints, pictures and TensorBoard events to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, UserError for wrong options.
    """
    ShortestPath(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options of the task that no job can have."""
    prepare_torch(config)
    check_method(config.task, METHODS)
    noise_of(config.task.noise, 1)
    if not str(config.dataset.target).endswith(".GridMaps"):
        raise UserError(f"dataset={config.dataset.target}: the task shortest_path needs maps; use dataset=grid_maps")
    dataset = build_dataset(config)
    assert isinstance(dataset, FiniteDataset)
    dataset.batches_per_epoch(config.batch_size)
