"""The published package's examples, with only their import changed, and those of docs/dice.md; on tiny models."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datasets.sentences import BEGIN, TOKEN, WORDS
from models.transformer import Transformer

SOURCE = Path(__file__).resolve().parents[3]
EXAMPLES = SOURCE.parent / "shared" / "seeds"
PAGE = SOURCE / "docs" / "dice.md"
BATCH, PROMPT, LENGTH = 6, 3, 9


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Language:
    """What the examples ask of a language model: to generate, and to give logits of all tokens."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.transformer = Transformer(len(WORDS), LENGTH, width=8, layers=1, heads=2)
        self.prompts = torch.randint(len(WORDS), (BATCH, PROMPT - 1))

    def generate(self, prompt, do_sample, temperature, top_k):
        assert (do_sample, temperature, top_k) == (True, 1.0, 0)
        first = torch.full((BATCH, 1), TOKEN[BEGIN])
        tokens = torch.cat([first, self.prompts], 1)
        for _ in range(LENGTH - PROMPT):
            probabilities = self.transformer(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
        return tokens

    def __call__(self, tokens, attention_mask=None):
        return SimpleNamespace(logits=self.transformer(tokens))


@pytest.fixture
def names():
    """What the examples take for granted."""
    torch.manual_seed(0)
    logits = [torch.zeros(BATCH, 4, requires_grad=True) for _ in range(3)]
    model, old = Language(1), Language(2)
    found: dict[str, Any] = {f"logits_{i + 1}": each for i, each in enumerate(logits)}
    found |= {"torch": torch, "F": F, "device": "cpu", "opt": torch.optim.SGD(logits, lr=0.1), "model": model}
    return found | {"prompt_len": PROMPT, "attention_mask": torch.ones(BATCH, LENGTH), "old": old}


def run(code, names):
    exec(compile(code, "example", "exec"), names)


def run_examples(codes, names):
    """Run them in order; give each the costs and samples that its text speaks of."""
    for code in codes:
        if "losses_1 =" in code:
            names["losses_1"] = torch.rand(BATCH)
        if "0.1 * losses_2" in code:
            from estimators import dice

            for i in (2, 3):
                names[f"logp_{i}"], names[f"actions_{i}"] = dice.sample_categorical(names[f"logits_{i}"])
            names["losses_2"] = dice.cost_node(torch.rand(BATCH), [names["logp_2"], names["logp_3"]])
        if "outputs_old_model" in code:
            names["outputs_old_model"] = names["old"](names["tokens"])
        if "baseline(losses" in code:
            code = code.replace("...\n", "")
            losses = names["losses_1"] + 0.1 * names["losses_2"]
            names["losses"] = losses
            for each in ("logits_1", "logits_2", "logits_3"):
                names[each].grad = None
            names["losses"] = fresh_losses(names)
        run(code, names)


def fresh_losses(names):
    """Return new losses of new samples: a graph is differentiated once."""
    from estimators import dice

    for i in (1, 2, 3):
        names[f"logp_{i}"], _ = dice.sample_categorical(names[f"logits_{i}"])
    return dice.cost_node(torch.rand(BATCH), [names["logp_1"], names["logp_2"], names["logp_3"]])


def test_the_published_examples(names):
    files = sorted(EXAMPLES.glob("000*.txt"))
    if not files:
        pytest.skip("the published package's examples do not lie beside this repository")
    text = files[0].read_text().replace("import dice_mc.torch as dice", "from estimators import dice")
    codes = snippets(text)
    assert len(codes) == 8
    before = [names[f"logits_{i}"].detach().clone() for i in (1, 2, 3)]
    run_examples(codes, names)
    assert all(not torch.equal(old, names[f"logits_{i}"].detach()) for i, old in enumerate(before, start=1))
    losses_kl = names["losses_kl"]
    assert losses_kl.shape == (BATCH, LENGTH - PROMPT)
    losses_kl.mean().backward()
    weights = [parameter.grad for parameter in names["model"].transformer.parameters()]
    assert all(weight is not None and weight.isfinite().all() for weight in weights)
    assert sum(weight.abs().sum() for weight in weights) > 0


def test_the_examples_of_the_page(names):
    text = PAGE.read_text()
    for code in snippets(text):
        run(code, names)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / target).exists(), target
