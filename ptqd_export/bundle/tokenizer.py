"""CLIP's tokenizer, from a bundle's or a model's vocab.json and merges.txt, by the tokenizers package alone.

What it does is fixed here, as in transformers' CLIPTokenizer: NFC, single spaces, lower case; words, digits
and runs of signs; byte-level BPE whose words end in `</w>`; then begin and end, cut or padded to one length.
A tokenizer.json, which could ask for anything, is never handed to the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.backend import install_hint
from ..errors import BackendUnavailable, BundleError, RecipeError
from ..typed import brief
from .reading import read_small

VOCABULARY, MERGES = "vocab.json", "merges.txt"
"""Files of a tokenizer's folder that are read; others beside them are for other programs."""
MAX_TOKENS, MAX_VOCABULARY, MAX_TOKEN = 4096, 1_000_000, 1000
MAX_PROMPT = 100_000
"""Characters of a prompt: nearly all of more would be cut off."""
MAX_PROMPTS = 1 << 26
"""Bytes of a file of prompts."""
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
I64 = npt.NDArray[np.int64]


def check_prompt(text: str) -> None:
    """Raise RecipeError for a prompt that is not UTF-8, or too long to be one."""
    if len(text) > MAX_PROMPT:
        raise RecipeError(f"a prompt has {len(text)} characters: give at most {MAX_PROMPT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"the prompt {brief(text)} is not valid UTF-8: give it as UTF-8") from error


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a text file: UTF-8, one a line; blank lines do not count.

    Raises:
        RecipeError: it cannot be read, is not UTF-8, or holds none.
    """
    try:
        data = read_small(file, MAX_PROMPTS)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file} is not valid UTF-8 in line {line}: save it as UTF-8") from error
    except BundleError as error:  # its advice is for the files of a bundle
        why = str(error).removeprefix(f"{file} ").partition(": ")[0]
        raise RecipeError(f"{file} {why}: give a text file with a prompt a line") from error
    except OSError as error:
        raise RecipeError(
            f"{file} cannot be read ({error.strerror}): give a text file with a prompt a line"
        ) from error
    found = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not found:
        raise RecipeError(f"{file} holds no prompt: give a text file with a prompt a line")
    for prompt in found:
        check_prompt(prompt)
    return found


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that mean something: around a prompt, in place of missing ones, of unknown parts."""

    begin: int
    end: int
    pad: int
    unknown: int


@dataclass(frozen=True)
class Tokenizer:
    """Texts to token ids.

    Attributes:
        vocabulary: ids by token, 0 up to their number.
        merges: pairs of tokens that become one, in order.
        special: ids; where their tokens are written in a prompt, they mean themselves.
        tokens: length of every row, begin and end included.
    """

    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    special: Special
    tokens: int

    @classmethod
    def parse(cls, vocabulary: bytes, merges: bytes, special: Special, tokens: int, where: str) -> Tokenizer:
        """From the content of the two files.

        Args:
            where: the folder, for messages.
        Raises:
            BundleError: they are no tokenizer's, or do not go together.
        """
        try:
            found = json.loads(vocabulary)
            pairs = _pairs(merges.decode("utf-8"))
            _check(found, pairs, special, tokens)
        except (ValueError, RecursionError) as error:  # JSON, UTF-8, and what `_check` says
            raise BundleError(f"{where} holds no tokenizer ({brief(str(error))}): copy it again") from error
        return cls(found, pairs, special, tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[I64, tuple[int, ...]]:
        """Token ids int64 (N, tokens), and how many tokens of each text were cut off.

        Raises:
            BackendUnavailable: tokenizers is not installed.
            RecipeError: a text is not UTF-8, or of more than MAX_PROMPT characters.
        """
        for text in texts:
            check_prompt(text)
        room, s = self.tokens - 2, self.special
        rows, cut = np.full((len(texts), self.tokens), s.pad, np.int64), []
        for row, text in zip(rows, texts, strict=True):
            ids = self._library.encode(text, add_special_tokens=False).ids
            kept = [s.begin, *ids[:room], s.end]
            row[: len(kept)] = kept
            cut.append(max(0, len(ids) - room))
        return rows, tuple(cut)

    @cached_property
    def _library(self) -> Any:
        try:
            from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise BackendUnavailable(f"prompts need tokenizers ({error}): {install_hint('text')}") from error
        by_id = {i: token for token, i in self.vocabulary.items()}
        model = models.BPE(
            vocab=dict(self.vocabulary),
            merges=list(self.merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=by_id[self.special.unknown],
        )
        library = Library(model)
        library.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        s = self.special
        marked = dict.fromkeys(by_id[i] for i in (s.begin, s.end, s.unknown, s.pad))
        library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in marked])
        return library


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """The merges of a merges.txt: a pair a line, after a line with its version."""
    found = []
    for line in text.splitlines() if "\r" in text else text.split("\n"):
        if not line or line.startswith("#version"):
            continue
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise ValueError(f"{MERGES} holds {brief(line)}, expected two tokens a line")
        found.append((first, second))
    return tuple(found)


def _check(vocabulary: Any, merges: Sequence[tuple[str, str]], special: Special, tokens: int) -> None:
    if not isinstance(vocabulary, dict) or not 2 <= len(vocabulary) <= MAX_VOCABULARY:
        raise ValueError(f"{VOCABULARY} holds no table of 2 to {MAX_VOCABULARY} tokens")
    ids = list(vocabulary.values())
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids) or sorted(ids) != list(
        range(len(ids))
    ):
        raise ValueError(f"{VOCABULARY} has other ids than 0 to {len(ids) - 1}, each once")
    if not all(0 < len(token) <= MAX_TOKEN for token in vocabulary):
        raise ValueError(f"{VOCABULARY} holds a token that is empty or of more than {MAX_TOKEN} characters")
    for first, second in merges:
        if not {first, second, first + second} <= vocabulary.keys():
            raise ValueError(f"{MERGES} joins {brief(first)} and {brief(second)}, not all in {VOCABULARY}")
    for token in (special.begin, special.end, special.pad, special.unknown):
        if not 0 <= token < len(ids):
            raise ValueError(f"a special token has the id {token}, expected 0 to {len(ids) - 1}")
    if not 3 <= tokens <= MAX_TOKENS:
        raise ValueError(f"rows of {tokens} tokens, expected 3 to {MAX_TOKENS}")
