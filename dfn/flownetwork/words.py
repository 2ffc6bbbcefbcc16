"""Words as tokens: a vocabulary of the most frequent pieces of a text."""

import re
from collections import Counter

import torch
from torch import Tensor

# A name or a word without its digits, a single digit, a run of blanks, a line break, any other character.
PIECE = re.compile(r"[^\W\d]+|\d|[ \t]+|\n|.", re.DOTALL)
UNKNOWN = 0


class WordTokenizer:
    """Splits text into words, digits, blanks and single other characters; the `size - 1` most frequent have a number.

    Number 0 stands for everything else. Every character belongs to exactly one piece, so text whose pieces all have
    numbers survives ``decode(encode(text))`` unchanged.

    >>> tokenizer = WordTokenizer.from_text("to be or not to be", 5)
    >>> tokenizer.encode("to be, to be").tolist()
    [3, 1, 2, 0, 1, 3, 1, 2]
    >>> tokenizer.decode(tokenizer.encode("be to"))
    'be to'
    """

    def __init__(self, pieces: list[str]):
        self.pieces = ["\N{REPLACEMENT CHARACTER}", *pieces]
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}

    @classmethod
    def from_text(cls, text: str, size: int) -> "WordTokenizer":
        """The pieces of `text` by falling frequency, equal ones in alphabetical order."""
        if size < 2:
            raise ValueError(f"WordTokenizer: size must be at least 2, got {size}")
        counts = Counter(PIECE.findall(text))
        return cls(sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - 1])

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> Tensor:
        """int64 ``[n]``."""
        return torch.tensor([self.numbers.get(piece, UNKNOWN) for piece in PIECE.findall(text)], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return "".join(self.pieces[i] for i in ids.tolist())


def unigram_entropy(ids: Tensor) -> float:
    """Nats per token of the best model that knows only how often each token occurs in `ids`."""
    share = torch.bincount(ids).double() / len(ids)
    return -(share * share.clamp_min(1e-30).log()).sum().item()
