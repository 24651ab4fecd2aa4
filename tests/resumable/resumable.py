"""A user's model and optimizer with state of every kind, for the proof that a resumed job is exact."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, RelaxedBernoulli

from models import Template


class Noisy(Template):
    """p(z) = Bernoulli(1/2)^3, p(x|z) normal, q(z|x) with dropout; a buffer and an attribute that training changes."""

    centre: Tensor

    def __init__(self, dropout: float):
        super().__init__()
        self.inference_network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.generative_model = nn.Linear(3, 1)
        self.register_buffer("centre", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, **kwargs):
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            with torch.no_grad():
                self.centre = 0.9 * self.centre + 0.1 * x.mean() * (1 + 0.01 * (self.calls % 7))
        x = x.reshape(-1, 1)
        qz = Bernoulli(logits=self.inference_network(x - self.centre))
        z = qz.sample()
        px = Normal(100 * self.generative_model(z), 5.0)
        return {"px": px, "z": [z], "qz": [qz], "pz": [Bernoulli(logits=torch.zeros_like(z))]}

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


class Pictured(Template):
    """Images from three relaxed bits, whose temperature is an attribute that training changes; q has dropout."""

    def __init__(self, dropout: float, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.inference_network = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 3))
        self.generative_model = nn.Linear(3, 784)

    def forward(self, x: Tensor, reparam: bool = False, **kwargs):
        qz = self._relaxed(self.inference_network(x))
        z = qz.rsample() if reparam else qz.sample()
        px = Bernoulli(logits=self.generative_model(z))
        return {"px": px, "z": [z], "qz": [qz], "pz": [self._relaxed(torch.zeros_like(z))]}

    def sample_from_prior(self, bs: int):
        z = self._relaxed(torch.zeros(bs, 3)).sample()
        return {"px": Bernoulli(logits=self.generative_model(z)), "z": [z]}

    def _relaxed(self, logits: Tensor) -> RelaxedBernoulli:
        return RelaxedBernoulli(torch.tensor(self.temperature), logits=logits, validate_args=False)


class Scheduled(torch.optim.SGD):
    """SGD with momentum whose rate falls with every step, by a torch scheduler that is part of its state."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self, 0.97)

    def step(self, closure=None):
        loss = super().step(closure)
        self.schedule.step()
        return loss

    def state_dict(self):
        return {"optimizer": super().state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
