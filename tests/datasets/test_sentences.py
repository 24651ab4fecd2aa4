import pytest
import torch

from datasets.sentences import (
    BEGIN,
    STOP,
    TOKEN,
    WORDS,
    is_grammatical,
    num_adjectives,
    sentences,
    text_of,
    words_of,
)


def tokens_of(text, steps=12):
    words = [BEGIN, *text.split()]
    return torch.tensor([[TOKEN[word] for word in words + [STOP] * (steps - len(words))]])


def test_every_sentence_that_is_drawn_is_grammatical():
    drawn = sentences(2000, 12, seed=3)
    assert drawn.shape == (2000, 13)
    assert is_grammatical(drawn).all()
    assert set(drawn.flatten().tolist()) == set(range(len(WORDS)))
    assert torch.equal(drawn, sentences(2000, 12, seed=3))
    assert not torch.equal(drawn, sentences(2000, 12, seed=4))


def test_adjectives_come_with_the_chance_of_three_in_ten():
    """A phrase has 3/7 adjectives in the mean, and a sentence one phrase or two with equal chances."""
    counts = num_adjectives(sentences(4000, 40, seed=0)).double()
    assert abs(counts.mean() - 1.5 * 3 / 7) < 4.5 * counts.std() / len(counts) ** 0.5


@pytest.mark.parametrize(
    ("text", "grammatical", "adjectives"),
    [
        ("the cat sleeps .", True, 0),
        ("two old red dogs see a happy child .", True, 3),
        ("the cat sleep .", False, 0),
        ("a dogs sleep .", False, 0),
        ("the cat sees .", False, 0),
        ("the red red red cat", False, 3),
        ("the cat . sleeps .", False, 0),
        (".", False, 0),
    ],
)
def test_what_is_grammatical(text, grammatical, adjectives):
    steps = 12 if "." in text else len(text.split()) + 1
    tokens = tokens_of(text, steps)
    assert is_grammatical(tokens).tolist() == [grammatical]
    assert num_adjectives(tokens).tolist() == [adjectives]


def test_words_and_text():
    tokens = tokens_of("the cat sleeps .", 6)[0]
    assert words_of(tokens) == [BEGIN, "the", "cat", "sleeps", ".", "."]
    assert text_of(tokens) == "the cat sleeps ."


def test_room_for_too_few_words_is_refused():
    with pytest.raises(ValueError, match="sentences of 5 words: expected room for 6"):
        sentences(1, 5, seed=0)
