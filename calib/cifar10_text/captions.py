"""The captions of the training pictures, and a CLIP tokenizer that knows their words."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from data import CLASSES

WORDINGS = (
    "{}",
    "{a} {}",
    "the {}",
    "a photo of {a} {}",
    "a photo of the {}",
    "a picture of {a} {}",
    "a picture of the {}",
    "a small photo of {a} {}",
    "a small picture of the {}",
    "an image of {a} {}",
    "a blurry photo of {a} {}",
    "a photograph of one {}",
)
PLAIN = 3
"""The wording that samples are judged in."""
MAX_LENGTH = 16
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def caption(label: int, wording: int) -> str:
    """The caption of a class in one of the wordings."""
    name = CLASSES[label]
    return WORDINGS[wording].format(name, a="an" if name[0] in "aeiou" else "a")


def write_prompts(file: Path) -> None:
    """Write the captions of calibration: every class in every wording, plain ones first."""
    order = sorted(range(len(WORDINGS)), key=lambda wording: (wording != PLAIN, wording))
    lines = [caption(label, wording) for wording in order for label in range(len(CLASSES))]
    file.write_text("\n".join(lines) + "\n", "utf-8")


def _alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes the bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    return [*map(chr, printable), *others]


def _merges(words: Counter[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, most frequent first, until every word is a single token."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            split[word] = merged


def write_tokenizer(folder: Path) -> int:
    """Write the files that `CLIPTokenizer.from_pretrained` reads; returns the number of tokens.

    The words of all captions are tokens; other text falls into parts, down to bytes, so that every prompt
    can be encoded.
    """
    texts = [caption(label, wording) for label in range(len(CLASSES)) for wording in range(len(WORDINGS))]
    merges = _merges(Counter(word for text in texts for word in text.split()))
    characters = _alphabet()
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), BEGIN, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("vocab.json", vocabulary), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return len(vocabulary)
