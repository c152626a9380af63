"""Captions that lose their end to the cap are counted."""

from __future__ import annotations

from tokenizer import BPETokenizer


def test_cuts_are_counted() -> None:
    tokenizer = BPETokenizer.default(context_length=16)
    texts = ["dog " * words for words in (1, 14, 15, 13, 200)]
    ids, lengths, cut = tokenizer.encode_counting_cuts(texts)
    assert cut == sum(len(tokenizer.encode(text)) > 14 for text in texts) == 2
    assert tokenizer.encode_counting_cuts(texts[:2])[2] == 0
    for ours, plain in zip((ids, lengths), tokenizer.encode_batch(texts), strict=True):
        assert ours.tolist() == plain.tolist()
