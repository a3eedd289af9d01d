"""A tokenizer that splits at blanks, for the embedded model of digits."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tta.messages import nearest


class WordTokenizer:
    """Texts -> token ids (texts, length): lower case, one token a word, full stops and commas tokens of their own.

    Args:
        vocabulary: word -> id, with ``<pad>``, ``<start>`` and ``<end>``.
        length: largest number of tokens of a text, with its start and end.

    Raises:
        ValueError: when called with a word that is not in the vocabulary (the nearest is offered), or too long a text.
    """

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self.vocabulary = {word: number for number, word in enumerate(vocabulary)}
        self.length = length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [[self._number(word) for word in ["<start>", *self._words(text), "<end>"]] for text in texts]
        longest = max(map(len, rows))
        if longest > self.length:
            raise ValueError(f"A text has {longest} tokens; this text tower reads {self.length}. Use shorter names.")
        pad = self.vocabulary["<pad>"]
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"[.,]|[^\s.,]+", text.lower())

    def _number(self, word: str) -> int:
        if word not in self.vocabulary:
            known = [word for word in self.vocabulary if not word.startswith("<")]
            raise ValueError(
                f"This text tower knows no word '{word}'.{nearest(word, known)} It knows: {', '.join(known)}."
            )
        return self.vocabulary[word]
