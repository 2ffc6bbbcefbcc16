import math

import pytest
import torch
from helpers import INTERPRETED

from dfn.flownetwork.words import UNKNOWN, WordTokenizer, unigram_entropy

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about kernels")


def test_every_character_belongs_to_one_piece():
    text = "def f(x1, y_2):\n\treturn 'Größe'  # 10 %\r\n\0 日本"
    tokenizer = WordTokenizer.from_text(text, 1000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == len(set(tokenizer.pieces))


def test_frequent_pieces_come_first():
    tokenizer = WordTokenizer.from_text("b b b a a c", 4)
    assert tokenizer.pieces[1:] == [" ", "b", "a"]
    assert tokenizer.encode("c").tolist() == [UNKNOWN] and tokenizer.encode("").dtype == torch.int64
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        WordTokenizer.from_text("a", 1)


def test_unigram_entropy():
    assert unigram_entropy(torch.tensor([0, 1, 2, 3])) == pytest.approx(math.log(4))
    assert unigram_entropy(torch.tensor([5, 5, 5])) == 0
