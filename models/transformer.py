"""A small causal transformer over tokens: what comes next, given what came before."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """Attention to what came before and a network of one hidden layer, each added to its input, which is normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the block's output for h [batch, steps, width], and the keys and values of all steps so far.

        `past`: the keys and values of the steps before those of h, of which there is then one.
        """
        batch, steps, width = h.shape
        parts = self.project(self.attention_norm(h)).view(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # [batch, heads, steps, width / heads]
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=past is None)
        h = h + self.merge(mixed.transpose(1, 2).reshape(batch, steps, width))
        return h + self.network(self.network_norm(h)), (key, value)


class Transformer(nn.Module):
    """Logits of the next token after each token, of sequences up to `length` tokens (Vaswani et al. 2017).

    Layers are normalised before they are entered (Xiong et al. 2020); positions are learnt.
    """

    def __init__(self, vocabulary: int, length: int, width: int = 64, layers: int = 2, heads: int = 4):
        """Raise ValueError where the heads do not share the width evenly."""
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads: expected a multiple")
        self.length = length
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, steps, vocabulary] of what follows tokens [batch, steps]; ValueError for too many."""
        if tokens.shape[1] > self.length:
            raise ValueError(f"{tokens.shape[1]} tokens: the model was built for {self.length} at most")
        h = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            h, _ = block(h)
        return self.readout(self.norm(h))

    @torch.no_grad()
    def generate(self, first: Tensor, steps: int, end: int | None = None) -> Tensor:
        """Draw `steps` tokens after each of first [batch], from the softmax of the logits; return [batch, 1 + steps].

        Keys and values are kept, so that each token costs one pass of its own. After `end` comes `end` again and again.
        """
        tokens = [first]
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        ended = torch.zeros_like(first, dtype=torch.bool)
        for step in range(steps):
            h = (self.embedding(tokens[-1]) + self.positions[step]).unsqueeze(1)
            for i, block in enumerate(self.blocks):
                h, past[i] = block(h, past[i])
            logits = self.readout(self.norm(h.squeeze(1)))
            noise = torch.empty_like(logits).exponential_().clamp_(min=torch.finfo(logits.dtype).tiny)
            drawn = (logits - noise.log_()).argmax(-1)
            if end is not None:
                drawn = torch.where(ended, end, drawn)
                ended = ended | (drawn == end)
            tokens.append(drawn)
        return torch.stack(tokens, 1)
