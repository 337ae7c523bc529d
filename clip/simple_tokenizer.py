"""CLIP's tokenizer: byte-level byte-pair encoding of lower-cased, cleaned text.

The merges in bpe_simple_vocab_16e6.txt.gz are data from github.com/openai/CLIP (MIT licence,
Copyright (c) 2021 OpenAI).  Vocabulary: 256 bytes, 256 bytes that end a word, 48,894 merges and two
special tokens; every string has an encoding, so there is no "unknown" token.
"""
import gzip
import html
from pathlib import Path

import ftfy
import regex

END = "</w>"  # marks the last symbol of a word
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
N_MERGES = 49152 - 256 - 2  # the file holds more; CLIP was trained with this many

# A text is cut into special tokens, clitics, runs of letters, single digits, and runs of the rest.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)


def default_bpe():
    """Path of the merges file that lies beside this module."""
    return str(Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))


def bytes_to_unicode():
    """{byte: character}: printable Latin-1 is itself, the other 68 bytes get 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table


def clean(text):
    """Repair mojibake (ftfy), undo HTML entities twice, collapse white space, lower-case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


class SimpleTokenizer:
    """encode(str) -> list of ids, without start and end tokens; decode(ids) -> str."""

    def __init__(self, bpe_path=None):
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        with gzip.open(bpe_path or default_bpe(), "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:N_MERGES + 1]  # line 0 is a version note
        merges = [tuple(line.split()) for line in lines]
        chars = list(self.byte_encoder.values())
        vocab = chars + [c + END for c in chars] + ["".join(pair) for pair in merges] + [*SPECIAL]
        self.encoder = {symbol: i for i, symbol in enumerate(vocab)}
        self.decoder = dict(enumerate(vocab))
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache = {word: (word,) for word in SPECIAL}  # word -> its symbols

    def bpe(self, word):
        """Join neighbours, the earliest-learnt pair first, until no pair of the word is a merge."""
        if word in self.cache:
            return self.cache[word]
        parts = [*word[:-1], word[-1] + END]
        while len(parts) > 1:
            rank, best = min((self.bpe_ranks.get(pair, N_MERGES), pair)
                             for pair in zip(parts, parts[1:]))
            if rank == N_MERGES:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i:i + 2]) == best else 1
                joined.append("".join(parts[i:i + step]))
                i += step
            parts = joined
        self.cache[word] = tuple(parts)
        return self.cache[word]

    def encode(self, text):
        """Ids of the text's symbols; the special tokens are recognised when written out."""
        ids = []
        for word in WORDS.findall(clean(text)):
            word = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            ids += [self.encoder[symbol] for symbol in self.bpe(word)]
        return ids

    def decode(self, tokens):
        """The text, lower-cased, with a space after each word; invalid UTF-8 becomes U+FFFD."""
        chars = "".join(self.decoder[int(token)] for token in tokens)
        raw = bytes(self.byte_decoder[char] for char in chars)
        return raw.decode("utf-8", errors="replace").replace(END, " ")
