"""Read the tokenizer of a model's folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ..bundle.pipeline import TOKENIZER_FILES
from ..bundle.tokenizer import MERGES, VOCABULARY, Special, Tokenizer
from ..errors import BundleError, ModelError
from ..typed import brief
from .network import one_line

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_FILE = 1 << 24
"""Bytes of a tokenizer's file."""


def read_tokenizer(folder: Path, most: int) -> tuple[Tokenizer, dict[str, bytes]]:
    """A CLIP tokenizer's folder, and the files of it that a bundle takes over.

    Without vocab.json and merges.txt they are taken out of tokenizer.json.

    Args:
        most: tokens that the text encoder takes.
    Raises:
        ModelError: it is missing, damaged, or of another kind.
    """
    found: dict[str, bytes] = {}
    for name in (*TOKENIZER_FILES, "tokenizer.json", "added_tokens.json"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if (folder / name).stat().st_size > MAX_FILE:
                raise ModelError(f"{folder / name} has more than {MAX_FILE} bytes: no tokenizer has")
            found[name] = (folder / name).read_bytes()
    whole = found.pop("tokenizer.json", None)
    if VOCABULARY not in found or MERGES not in found:
        if whole is None:
            raise ModelError(
                f"{folder} holds no tokenizer: expected {VOCABULARY} and {MERGES}, or tokenizer.json; copy "
                "them from the model, or set pipeline.text = false in the recipe"
            )
        found |= _from_whole(whole, folder)
    try:
        config = json.loads(found.get("tokenizer_config.json", b"{}"))
        config |= json.loads(found.get("special_tokens_map.json", b"{}"))
        vocabulary = json.loads(found[VOCABULARY])
        extra = json.loads(found.pop("added_tokens.json", b"{}"))
        config.get, vocabulary.get, extra.keys  # noqa: B018
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder} holds no tokenizer: {one_line(error)}: copy it again") from error
    if config.get("tokenizer_class") not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise ModelError(f"{folder} holds a {brief(config['tokenizer_class'])}: expected a CLIPTokenizer")
    if unknown := extra.keys() - vocabulary.keys():
        raise ModelError(f"{folder} adds tokens such as {brief(min(unknown))}, which is not supported")

    def token(name: str, default: str) -> int:
        given = config.get(name) or default
        text = given.get("content") if isinstance(given, dict) else given
        number = vocabulary.get(text) if isinstance(text, str) else None
        if not isinstance(number, int):
            raise ModelError(f"{folder} says {name} is {brief(text)}, which is not in {VOCABULARY}")
        return number

    special = Special(
        token("bos_token", BEGIN), token("eos_token", END), token("pad_token", END), token("unk_token", END)
    )
    given = config.get("model_max_length")
    length = min(most, given) if isinstance(given, int) and given > 2 else most
    try:
        return Tokenizer.parse(found[VOCABULARY], found[MERGES], special, length, str(folder)), found
    except BundleError as error:
        raise ModelError(str(error)) from error


def _from_whole(data: bytes, folder: Path) -> dict[str, bytes]:
    """vocab.json and merges.txt from a tokenizer.json.

    Raises:
        ModelError: it is no CLIP tokenizer's.
    """
    try:
        model = json.loads(data)["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        vocabulary = dict(model["vocab"])
        if model["type"] != "BPE" or model.get("end_of_word_suffix") != "</w>":
            raise ValueError("no BPE model whose words end in </w>")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ModelError(
            f"{folder / 'tokenizer.json'} is not of a CLIPTokenizer: {one_line(error)}"
        ) from error
    text = "\n".join(["#version: 0.2", *pairs]) + "\n"
    return {VOCABULARY: json.dumps(vocabulary).encode(), MERGES: text.encode()}
