"""A small vocabulary of the Gemma kind, and texts that are hard on a tokenizer."""

from __future__ import annotations

import json

from tokenizers import Tokenizer as Rust
from tokenizers import models, normalizers, trainers

BYTES = [f"<0x{value:02X}>" for value in range(256)]
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "</s>"]
MARKUP = ["<|channel>", "<channel|>", "<|tool_response>", '<|"|>']
USER_DEFINED = ["<table>"]
SPECIAL_COUNT = len(CONTROL) + len(MARKUP)
IDS = {"bos_id": 2, "eos_id": 1, "unk_id": 3, "pad_id": 0, "add_bos": True}

CORPUS = [
    "the quick brown fox jumps over the lazy dog\n\nthe dog sleeps\n",
    "def add(a, b):\n    return a + b\n\n\n    # the sum\n" * 3,
    "naïve café naïve café 12345 1234 123\t\tthe the the",
    "привет мир, привет " * 3,
]

HOSTILE = [
    "",
    " ",
    "  the   dog    sleeps     ",
    "\n\n\n\n the\n \n  \r\n\t",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 the",
    "e\u0301 versus é, Å versus A\u030a, \u0301alone",
    "שלום the عربى \u202ethe\u202c",
    "中文 the 日本語 한국어",
    "\x00\x01\x1b[31m\x7f\u0085\u2028\ufeff\ufffd",
    "".join(chr(value) for value in range(256)),
    "already \u2581 the\u2581dog \u2581\u2581",
    "<bos>the<eos></s><turn|><|turn>model\nthe<|channel>thought\n<channel|>dog",
    "<|channel><|channel>> <<bos>> <|turn <table></table> <0x41> <0xE2>",
    '<|"|>quote<|"|> <mask><unk> <bos',
    "the" * 2000,
    "😀" * 300,
    "\U0010ffff\ue000\u200b\u200d",
]


def small_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """tokens, token types and merges of a vocabulary of 430 tokens or so, as a GGUF would hold them."""
    rust = Rust(models.BPE())
    rust.normalizer = normalizers.Replace(" ", "\u2581")
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(rust.to_str())["model"]
    head = [*CONTROL, *MARKUP, *USER_DEFINED, *BYTES]
    learnt = sorted(model["vocab"], key=model["vocab"].get)
    tokens = head + [token for token in learnt if token not in head]
    types = [3] * len(CONTROL) + [4] * (len(MARKUP) + len(USER_DEFINED)) + [6] * 256
    types += [1] * (len(tokens) - len(types))
    return tokens, types, [" ".join(merge) for merge in model["merges"]]
