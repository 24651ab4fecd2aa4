"""Stochastic graphs against Storchastic 0.3.7: the tutorial of a discrete VAE, training, measuring, enumerating.

    python -m benchmarks.stochastic_graph [--rounds 5] [--peer PYTHON]

Storchastic replaces functions of torch in the whole process, so it runs in one of its own, which takes turns with this
one: `--peer` is the Python of an environment that has it beside torch (without it, ours alone is measured):

    python -m venv --system-site-packages peer
    peer/bin/pip install --no-deps storchastic==0.3.7 pyro-ppl pyro-api entmax opt_einsum

Times are of the processor, each library's on one thread, so that what else the machine does falls on neither. Goals, as
multiples of Storchastic's speed: a training step with ten samples 1.5, a hundred gradients 3, enumeration 5.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import OneHotCategorical

GOALS = {"training step, 10 samples": 1.5, "100 gradients": 3.0, "enumeration": 5.0}


class DiscreteVAE(nn.Module):
    """784-512-256-(2 x 10)-256-512-784, as in the tutorial."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 512, 256, 20, 256, 512, 784)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())

    def decode(self, z: Tensor) -> Tensor:
        return self.layers[5](self.layers[4](self.layers[3](z).relu()).relu()).sigmoid()


def works(storch: Any) -> dict[str, Callable[[], object]]:
    """Return the tutorial's pieces of work, written for either library."""
    torch.manual_seed(0)
    model, data = DiscreteVAE(), torch.rand(64, 784).round()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def story(method: Any) -> Any:
        x = storch.denote_independent(data, 0, "data")
        q = OneHotCategorical(probs=model.encode(x).reshape(-1, 2, 10).softmax(dim=-1))
        z = method(q)
        prior = OneHotCategorical(probs=torch.ones_like(q.probs) / 10.0)
        storch.add_cost(torch.distributions.kl_divergence(q, prior).sum(-1), "kl-div")
        reconstruction = model.decode(z.reshape((*z.shape[:-2], 2 * 10)))
        storch.add_cost(nn.BCELoss(reduction="none")(reconstruction, x).sum(-1), "reconstruction")
        return z

    batch_average = storch.method.ScoreFunction("z", n_samples=10, baseline_factory="batch_average")
    single = storch.method.ScoreFunction("z", n_samples=1, baseline_factory="None")
    expect = storch.method.Expect("z")

    def step(method: Any) -> None:
        optimizer.zero_grad()
        story(method)
        storch.backward()
        optimizer.step()

    def hundred() -> Any:
        if hasattr(storch, "replicates"):
            with storch.replicates(100, "gradients"):
                z = story(single)
                storch.backward()
            return storch.variance(z.param_grads["probs"], "gradients")
        gradients = []
        for _ in range(100):
            optimizer.zero_grad()
            z = story(single)
            storch.backward()
            gradients.append(z.param_grads["probs"])
        return storch.variance(storch.gather_samples(gradients, "gradients"), "gradients")

    def enumerate_all() -> None:
        optimizer.zero_grad()
        story(expect)
        storch.backward()

    return {
        "training step, 10 samples": lambda: step(batch_average),
        "100 gradients": hundred,
        "enumeration": enumerate_all,
        "training step, 1 sample": lambda: step(single),
    }


def serve() -> None:
    """Run in the peer's process: read a name, do that work, write its seconds."""
    import storch

    torch.set_num_threads(1)
    table = works(storch)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        table[line.strip()]()
        print(time.process_time() - start, flush=True)


def memory(run: Callable[[], object], steps: int) -> tuple[int, int, int]:
    """Return how many tensors there are after `steps` runs more than after ten, and the peak memory of both in kB."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    for _ in range(10):
        run()
    first, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count()
    for _ in range(steps):
        run()
    return count() - before, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of the long loop")
    parser.add_argument("--peer", help="the Python of an environment with storchastic")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    import stochastic_graph as storch
    from benchmarks.timing import machine

    torch.set_num_threads(1)
    print(machine())
    ours, peer = works(storch), None
    if options.peer:
        peer = subprocess.Popen(
            [options.peer, "-m", "benchmarks.stochastic_graph", "--serve"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert peer.stdin is not None
        assert peer.stdout is not None
        if peer.stdout.readline().strip() != "ready":
            raise SystemExit(f"{options.peer} has no Storchastic that runs; see --help for how to install it")
    else:
        print("Storchastic is not measured: --peer was not given; see --help for how to install it")
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ours}
    for turn in range(options.rounds + 1):
        for name, run in ours.items():
            start = time.process_time()
            run()
            own, other = time.process_time() - start, float("nan")
            if peer is not None and peer.stdin is not None and peer.stdout is not None:
                print(name, file=peer.stdin, flush=True)
                other = float(peer.stdout.readline())
            if turn:
                seconds[name][0].append(own)
                seconds[name][1].append(other)
    print(f"{'':28}{'ours ms':>18}{'Storchastic ms':>20}{'times faster':>16}   goal   (minimum, median)")
    for name, (own_times, other_times) in seconds.items():
        own_min, own_median = 1e3 * min(own_times), 1e3 * statistics.median(own_times)
        other_min, other_median = 1e3 * min(other_times), 1e3 * statistics.median(other_times)
        print(
            f"{name:28}{own_min:9.1f}{own_median:9.1f}{other_min:11.1f}{other_median:9.1f}"
            f"{other_min / own_min:9.2f}{other_median / own_median:7.2f}   {GOALS.get(name, '')}"
        )
    if peer is not None:
        peer.terminate()
    more, first, last = memory(ours["training step, 1 sample"], options.steps)
    print(f"after {options.steps} steps: {more} tensors more, peak memory {first} kB, then {last} kB")
    return None


if __name__ == "__main__":
    main()
