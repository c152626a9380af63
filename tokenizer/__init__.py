"""Text -> ids: CLIP's byte-level BPE, its training, and its files. Needs neither torch nor clip_train.

from tokenizer import BPETokenizer, train_bpe
"""

from __future__ import annotations

from tokenizer.bpe import BPETokenizer
from tokenizer.cleaning import clean
from tokenizer.training import SmallVocabularyWarning, train_bpe
from tokenizer.vocabulary import Vocabulary

load = BPETokenizer.load
from_openai = BPETokenizer.from_openai
default = BPETokenizer.default

__all__ = [
    "BPETokenizer",
    "SmallVocabularyWarning",
    "Vocabulary",
    "clean",
    "default",
    "from_openai",
    "load",
    "train_bpe",
]
