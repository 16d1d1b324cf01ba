from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from text_models import TOKENS, write_tokenizer

from ptqd_export.bundle.tokenizer import MAX_PROMPT, Special, Tokenizer, read_prompts
from ptqd_export.errors import BundleError, RecipeError

STRINGS = (
    "", " ", "cat", "a photo of a cat", "A Photo OF a CAT", "cats and dogs", "it's we'll don't I'M",
    "x1y22 333", "  many\t\tspaces\n and lines ", "!!! ?.,;:", "na\xefve caf\xe9", "cafe\u0301",
    "Stra\xdfe \u1e9e \u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3 \u0130stanbul",
    "\u65e5\u672c\u8a9e\u306e\u306d\u3053", "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0627\u0644\u0645",
    "\U0001f600\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\u200b\xa0\ufeff|", "<|endoftext|> cat <|startoftext|>", "<|EndOfText|>", "\xbd \xb2 \u2167 \u0663",
    "a" * 300, "cat " * 40, "\x00\x07cat\x1b[31m", "\U0010ffff\ue000", "fi \ufb01 \xc5 \xc5",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "tokenizer"
    write_tokenizer(folder)
    return folder


def parse(folder: Path, special: Special | None = None, tokens: int = TOKENS) -> Tokenizer:
    vocabulary = (folder / "vocab.json").read_bytes()
    n = len(json.loads(vocabulary))
    special = special or Special(n - 2, n - 1, n - 1, n - 1)
    return Tokenizer.parse(vocabulary, (folder / "merges.txt").read_bytes(), special, tokens, "tokenizer")


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_it_is_the_tokenizer_of_transformers(folder: Path, pad: str) -> None:
    """Also with another token for padding, as Stable Diffusion 2 has, which then means itself in a prompt."""
    transformers = pytest.importorskip("transformers")
    other = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    n = len(other)
    rng = np.random.default_rng(0)
    drawn = ["".join(map(chr, rng.integers(1, 0xD7FF, 30))) for _ in range(200)]
    drawn += ["".join(rng.choice(list("cat dog's 12!? É"), 20)) for _ in range(200)]
    mine = parse(folder, Special(n - 2, n - 1, other.pad_token_id, n - 1), 64)
    for text in (*STRINGS, *drawn):
        expected = other(text, padding="max_length", max_length=64, truncation=True).input_ids
        ids, _ = mine([text])
        assert ids.tolist() == [expected], ascii(text)


def test_rows_are_cut_and_padded(folder: Path) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = parse(folder)
    s = tokenizer.special
    ids, cut = tokenizer(["", "cat", "cat cat cat cat cat cat cat dog"])
    cat = tokenizer.vocabulary["cat</w>"]
    assert ids.shape == (3, TOKENS) and ids.dtype == np.int64 and cut == (0, 0, 2)
    assert ids[0].tolist() == [s.begin, s.end] + [s.pad] * 6
    assert ids[1].tolist() == [s.begin, cat, s.end] + [s.pad] * 5
    assert ids[2].tolist() == [s.begin, *[cat] * 6, s.end]


def test_what_is_no_prompt(folder: Path) -> None:
    tokenizer = parse(folder)
    with pytest.raises(RecipeError, match="not valid UTF-8"):
        tokenizer(["cat \udcff"])
    with pytest.raises(RecipeError, match=f"at most {MAX_PROMPT}"):
        tokenizer(["a" * (MAX_PROMPT + 1)])


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        (b"[]", b"", "holds no table"),
        (b"{", b"", "holds no tokenizer"),
        (b'{"a": 0, "b": 2, "c": 3}', b"", "other ids than 0 to 2"),
        (b'{"a": 0, "b": 0, "c": 1}', b"", "other ids than 0 to 2"),
        (b'{"a": 0, "b": true, "c": 2}', b"", "other ids than 0 to 2"),
        (b'{"a": 0, "": 1, "c": 2}', b"", "a token that is empty"),
        (b'{"a": 0, "b": 1, "c": 2}', b"a b", "not all in vocab.json"),
        (b'{"a": 0, "b": 1, "c": 2}', b"a b c", "two tokens a line"),
        (b'{"a": 0, "b": 1, "c": 2}', b"\xff\xfe", "holds no tokenizer"),
        (b'{"a": 0, "b": 1}', b"", "special token has the id 2"),
        (b"[" * 100_000, b"", "holds no tokenizer"),
    ],
)  # fmt: skip
def test_files_that_are_no_tokenizer(vocabulary: bytes, merges: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.parse(vocabulary, merges, Special(0, 1, 2, 0), 8, "x")
    assert "\n" not in str(caught.value)


def test_files_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  a dog \nein Bär\u2028x\n".encode())
    assert read_prompts(file) == ("a cat", "a dog", "ein Bär\u2028x")
    for content, message in (
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"a cat\nb\xe4r\n", "not valid UTF-8 in line 2"),
    ):
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read_prompts(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(RecipeError, match="no regular file"):
        read_prompts(tmp_path)
