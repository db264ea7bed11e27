"""Small tokenizers of each kind that checkpoints have; they differ in what a decoder does to its first tokens."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from paged_jax.models import DEMO

SPECIAL = ["<s>", "</s>", "<|tool|>"]
WORDS = ["the", "cat", "sat", "a", "is", "it", "on", "mat"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Tokens are bytes that were joined: a character can end within the next token."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentencepiece(strip: bool = True) -> Tokenizer:
    """Words begin with a mark for a space, and what is not in the vocabulary becomes bytes (Llama 2; Gemma keeps the
    space before the first word)."""
    pieces = ["<unk>", *BYTES, "▁", *string.ascii_lowercase, *string.punctuation, "é", *(f"▁{word}" for word in WORDS)]
    merges, vocab = [], list(dict.fromkeys(pieces))
    for word in WORDS:
        for end in range(1, len(word) + 1):
            left, right = f"▁{word[: end - 1]}", word[end - 1]
            merges.append((left, right))
            vocab += [left, left + right]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(vocab))}
    merges = [merge for merge in dict.fromkeys(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram pieces, whose decoder itself drops the first space."""
    pieces = ["<unk>", "▁", *string.ascii_lowercase, *(f"▁{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def wordpiece() -> Tokenizer:
    """Pieces that continue a word have a mark; all others are written with a space before them."""
    pieces = ["[UNK]", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *WORDS[:3], ".", ","]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece_unstripped": lambda: sentencepiece(strip=False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}
