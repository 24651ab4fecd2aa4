"""Sentences of a small grammar, drawn on request: text that needs neither a file nor a network.

    sentence: a subject, a verb that agrees with it in number, an object where the verb takes one, and a full stop
    subject, object: a determiner, any number of adjectives (each after a chance of 0.3), and a noun

Sentences are tokens of words, the first of which is BEGIN.
"""

import re
from functools import cache

import numpy as np
import torch
from torch import Tensor

from datasets.base import generator

BEGIN, STOP = "<s>", "."
ADJECTIVES = ("big", "happy", "old", "quiet", "red", "small")
MORE = 0.3  # the chance of one more adjective

# Words of one kind behave alike; a letter stands for each kind in `GRAMMATICAL`.
KINDS = {
    "b": (BEGIN,),
    ".": (STOP,),
    "j": ADJECTIVES,
    "t": ("the",),
    "d": ("a", "every", "this"),
    "D": ("many", "these", "two"),
    "n": ("bird", "cat", "child", "dog"),
    "N": ("birds", "cats", "children", "dogs"),
    "i": ("runs", "sings", "sleeps"),
    "I": ("run", "sing", "sleep"),
    "v": ("chases", "likes", "sees"),
    "V": ("chase", "like", "see"),
}
WORDS = tuple(word for words in KINDS.values() for word in words)
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
GRAMMATICAL = re.compile(r"b(?:[td]j*n(?:i|v(?:[td]j*n|[tD]j*N))|[tD]j*N(?:I|V(?:[td]j*n|[tD]j*N)))\.+")
TOKEN = {word: token for token, word in enumerate(WORDS)}


def words_of(tokens: Tensor) -> list[str]:
    """Return the words of a sentence's tokens."""
    return [WORDS[token] for token in tokens.tolist()]


def text_of(tokens: Tensor) -> str:
    """Return a sentence up to its first full stop as text, without BEGIN."""
    words = words_of(tokens)[1:]
    return " ".join(words[: words.index(STOP) + 1] if STOP in words else words)


def is_grammatical(tokens: Tensor) -> Tensor:
    """Return which sentences [batch, steps] are of the grammar: whole, and after their full stop only others."""
    kinds = ("".join(map(KIND_OF.__getitem__, words_of(sentence))) for sentence in tokens)
    return torch.tensor([GRAMMATICAL.fullmatch(each) is not None for each in kinds])


@cache
def adjectives() -> Tensor:
    """Return which tokens are adjectives, [vocabulary]."""
    return torch.tensor([word in ADJECTIVES for word in WORDS])


def num_adjectives(tokens: Tensor) -> Tensor:
    """Return how many adjectives sentences [batch, steps] have."""
    return adjectives()[tokens].sum(1)


def sentences(number: int, steps: int, seed: int) -> Tensor:
    """Return sentences [number, 1 + steps]: BEGIN, the sentence, and full stops up to the end.

    A sentence that does not fit is drawn again. Raises ValueError for fewer steps than the shortest objects need.
    """
    if steps < 6:
        raise ValueError(f"sentences of {steps} words: expected room for 6, such as 'the cat sees a dog .'")
    draws = generator("sentences", seed)
    found: list[list[int]] = []
    while len(found) < number:
        words = _sentence(draws)
        if len(words) <= steps:
            found.append([TOKEN[word] for word in (BEGIN, *words, *[STOP] * (steps - len(words)))])
    return torch.tensor(found)


def _sentence(draws: np.random.Generator) -> list[str]:
    many, words = _noun_phrase(draws)
    takes_object = bool(draws.integers(2))
    words.append(_one_of(draws, ("iI", "vV")[takes_object][many]))
    return [*words, *(_noun_phrase(draws)[1] if takes_object else []), STOP]


def _noun_phrase(draws: np.random.Generator) -> tuple[bool, list[str]]:
    many = bool(draws.integers(2))
    words = [_one_of(draws, "t" + "dD"[many])]
    while draws.random() < MORE:
        words.append(_one_of(draws, "j"))
    return many, [*words, _one_of(draws, "nN"[many])]


def _one_of(draws: np.random.Generator, kinds: str) -> str:
    words = [word for kind in kinds for word in KINDS[kind]]
    return words[draws.integers(len(words))]
