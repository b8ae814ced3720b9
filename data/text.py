"""Turns any text into a dataset: a SentencePiece tokenizer, training shards and validation shards.

python data/text.py notes/ book.txt dump.jsonl.zst --out data/mine --vocab-size 1024
"""

import argparse
import hashlib
import heapq
import io
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece as spm

from common import HEADER_BYTES, MAGIC, VERSION, UserError, new_directory, number, run_tool, value_of

PAD, BOS, EOS, UNK = range(4)
RESERVED = 4 + 256  # the four ids above and one piece for every byte
SHARD_TOKENS = 100_000_000
MAX_DOCUMENT_BYTES = 16 << 20  # SentencePiece needs about 50 bytes of memory per byte of one document
SAMPLE_CHARS = 32 << 20
PIECE_CHARS = 1000  # SentencePiece skips training sentences of more than 4192 bytes; this is at most 4000
BATCH_CHARS = 1 << 20  # encoded at once by SentencePiece's threads
READ_BYTES = 1 << 18

# 16 bytes that depend on text and seed alone, the document's identity and its place in the draw; and the text.
Document = tuple[bytes, str]


class ShardWriter:
    """Writes one split as fineweb_<split>_NNNNNN.bin files; documents run on from one into the next. Close it."""

    def __init__(self, directory: Path, split: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory = directory
        self.split = split
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = self.shards = 0
        self.file = None

    def write(self, document: np.ndarray) -> None:
        """Appends one document: integers[tokens] that fit uint16, its first token BOS."""
        self.documents += 1
        while len(document):
            if self.tokens == self.shards * self.shard_tokens:
                self.close()
                self.file = (self.directory / f"fineweb_{self.split}_{self.shards:06d}.bin").open("wb")
                self.file.write(bytes(HEADER_BYTES))
                self.shards += 1
            part, document = np.split(document, [self.shards * self.shard_tokens - self.tokens])
            self.file.write(part.astype("<u2").tobytes())
            self.tokens += len(part)

    def close(self) -> None:
        """Gives the open shard its header."""
        if self.file:
            count = self.tokens - (self.shards - 1) * self.shard_tokens
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, count], "<i4").tobytes())
            self.file.close()


def write_splits(folder: Path, documents: Iterable[tuple[bool, np.ndarray]], shard_tokens=SHARD_TOKENS) -> list[str]:
    """Writes documents, each with whether it is for validation; returns a line on each split."""
    writers = [ShardWriter(folder, split, shard_tokens) for split in ("train", "val")]
    for validation, tokens in documents:
        writers[validation].write(tokens)
    for writer in writers:
        writer.close()
    return [f"{w.split:>5}: {w.documents:,} documents, {w.tokens:,} tokens, {w.shards} shards" for w in writers]


def find_files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """Returns the text files among `paths`, folders searched through in sorted order, and the number of others."""
    found = []
    for path in paths:
        if not path.is_dir() and not (path.exists() and kind_of(path)):
            raise UserError(f"{path} does not exist or is no .txt, .md, .jsonl (also .gz, .zst) or .parquet — give one")
        found += sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]
    files = [path for path in found if kind_of(path)]
    return files, len(found) - len(files)


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, compression aside, or None for a file that is not text."""
    found = re.search(r"(\.txt|\.md|\.jsonl)(\.gz|\.zst)?$|\.parquet$", path.name.lower())
    return found and (found[1] or ".parquet")


def read_documents(files: Iterable[Path], delimiter: str, seed: int, counts: Counter) -> Iterator[Document]:
    """Yields the distinct documents of `files` in order, stripped; counts them and what was met beside them."""
    seen: set[bytes] = set()
    for found in chain.from_iterable(read_texts(path, delimiter) for path in files):
        text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", found.strip())
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16, key=b"%d" % (seed % 2**64)).digest()
        counts["not_utf8"] += replaced > 0
        if not data:
            counts["empty"] += 1
        elif digest in seen:
            counts["duplicates"] += 1
        else:
            seen.add(digest)
            counts["documents"] += 1
            counts["bytes"] += len(data)
            yield digest, text


def read_texts(path: Path, delimiter: str) -> Iterator[str]:
    """Yields the documents of a file, a surrogate for each byte that is not UTF-8; UserError if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    kind = kind_of(path)
    separator = b"\n" if kind == ".jsonl" else delimiter.encode()
    try:
        if kind == ".parquet":
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
                for row in batch.column("text").cast(pyarrow.binary()).to_pylist():
                    yield (row or b"").decode(errors="surrogateescape")
            return
        for line, record in enumerate(records(path, separator), start=1):
            text = record.decode(errors="surrogateescape")
            if line == 1:
                text = text.removeprefix("\ufeff")
            if kind != ".jsonl":
                yield text
            elif text.strip():
                yield json_text(text, f"{path} line {line}")
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None):  # the system's, not the format's
            raise
        raise UserError(f"{path} is damaged or has no column `text` ({error}) — get it again") from error


def records(path: Path, separator: bytes) -> Iterator[bytes]:
    """Yields the parts of a file between separators, or the whole of it; UserError for a part that is too large."""
    import pyarrow  # it notices a compressed file that was cut short, as zstandard does not

    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    held = b""
    with pyarrow.input_stream(path, compression=codec) as file:
        while block := file.read(READ_BYTES):
            *whole, held = (held + block).split(separator) if separator else [held + block]
            yield from whole
            if len(held) > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{path} has a document over {MAX_DOCUMENT_BYTES >> 20} MiB — split it or use --delimiter"
                )
    if held or not separator:
        yield held


def json_text(line: str, where: str) -> str:
    """Returns the field `text` of a JSON object; UserError naming `where` if there is none."""
    try:
        text = value_of(json.loads(line), "text")
    except (ValueError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{where} is no JSON object with a string `text` — correct or remove it")
    return text


def cut(text: str) -> list[str]:
    """A text in pieces of PIECE_CHARS."""
    return [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE that loses nothing; returns the model file's content. UserError for too few texts."""
    pieces = list(chain.from_iterable(map(cut, texts)))
    # SentencePiece wants a piece for nearly every character, which in some scripts are more than the vocabulary holds.
    frequent = Counter(chain.from_iterable(pieces)).most_common()
    rare = {ord(character): " " for character, _ in frequent[(vocab_size - RESERVED) // 2 :]}
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(piece.translate(rare) for piece in pieces),
            model_writer=model,
            vocab_size=vocab_size,
            **dict(model_type="bpe", byte_fallback=True, split_digits=True, num_threads=1, minloglevel=2),
            **dict(normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False),
            **dict(pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK),
        )
    except RuntimeError as error:
        if not re.search("Vocabulary size too high|sentences_.empty", str(error)):
            raise
        raise UserError(f"{sum(map(len, pieces)):,} characters are too few — add text or lower --vocab-size") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Loads a model file's content, BOS before each text; UserError naming it if its ids do not suit the shards."""
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=model, add_bos=True)
    except RuntimeError as error:
        raise UserError(f"{name} is not a SentencePiece model — choose another --tokenizer") from error
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 1 << 16:
        raise UserError(f"{name} needs BOS = {BOS} and at most {1 << 16:,} pieces — choose another --tokenizer")
    return tokenizer


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents into lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for digest, text in documents:
        batch.append((digest, text))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def draw_validation(digests: list[bytes], fraction: float) -> bytes:
    """Returns the largest digest of a validation document: those with the smallest are it. UserError for too few."""
    count = max(1, round(fraction * len(digests)))
    if count >= len(digests):
        raise UserError(
            f"{len(digests)} distinct documents are too few to split — add files, or cut one by --delimiter"
        )
    return heapq.nsmallest(count, digests)[-1]


def build(files: list[Path], directory: Path, name: str, options: argparse.Namespace) -> str:
    """Fills `directory` with shards and `<name>_<vocabulary>_bpe.model`, and returns a summary of a few lines."""
    from tqdm import tqdm

    def read(label: str, counts: Counter, total: int | None = None) -> Iterable[Document]:
        documents = read_documents(files, delimiter, options.seed, counts)
        return tqdm(documents, label, total, unit=" documents", leave=False, disable=None)  # None: only on a terminal

    began = time.monotonic()
    delimiter = options.delimiter.replace("\\n", "\n").replace("\\t", "\t")
    first, second = Counter(), Counter()
    digests = []
    # A uniform sample of pieces for the tokenizer. Not SentencePiece's input_sentence_size: which documents are for
    # validation, and which characters are too rare for a piece, is known only when all were read.
    sample: list[tuple[float, bytes, str]] = []  # a heap: the piece to give up first is on top
    size = 0
    draw = random.Random(options.seed)
    for digest, text in read("reading", first):
        digests.append(digest)
        for piece in () if options.tokenizer else cut(text):
            heapq.heappush(sample, (draw.random(), digest, piece))
            size += len(piece)
            while size > SAMPLE_CHARS:
                size -= len(heapq.heappop(sample)[-1])
    threshold = draw_validation(digests, options.val_fraction)

    pieces = [piece for _, digest, piece in sorted(sample) if digest > threshold]
    model_name = options.tokenizer.stem if options.tokenizer else f"{name}_{options.vocab_size}_bpe"
    model = options.tokenizer.read_bytes() if options.tokenizer else train_tokenizer(pieces, options.vocab_size)
    tokenizer = load_tokenizer(model, model_name)
    (directory / f"{model_name}.model").write_bytes(model)

    def encoded() -> Iterator[tuple[bool, np.ndarray]]:
        for batch in batches(read("encoding", second, first["documents"])):
            texts = [text for _, text in batch]
            tokens = tokenizer.encode(texts, num_threads=options.threads, return_type="numpy")
            yield from zip((digest <= threshold for digest, _ in batch), tokens, strict=True)

    lines = write_splits(directory, encoded(), options.shard_tokens)
    if second != first:
        raise UserError("the input changed while it was read — run it again when nothing writes to it")
    seconds = time.monotonic() - began
    speed = f"{seconds:.1f} s ({first['bytes'] / 1e6 / seconds:.2f} MB/s)"
    lines += [f"{first['bytes']:,} bytes of text, {tokenizer.vocab_size():,} pieces, {speed}"]
    kept_out = f"{first['duplicates']:,} duplicates dropped, {first['empty']:,} empty"
    return "\n".join([*lines, f"{kept_out}, {first['not_utf8']:,} not UTF-8"])


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders: .txt .md .jsonl (.gz .zst) .parquet")
    add("--out", type=Path, required=True, help="the dataset's folder")
    add("--vocab-size", type=number(int, RESERVED + 1, 1 << 16), default=1024, help="pieces to train (default 1024)")
    add("--tokenizer", type=Path, help="use this SentencePiece model and train none")
    add("--delimiter", default="", help="separates documents in text files, \\n and \\t understood (default: none)")
    add("--val-fraction", type=number(float, 0, 1), default=0.01, help="share for validation (default 0.01)")
    add("--seed", type=int, default=0, help="of the split and of the tokenizer's sample (default 0)")
    add("--shard-tokens", type=number(int, 1), default=SHARD_TOKENS, help="tokens per shard (default 100 million)")
    add("--threads", "--processes", type=number(int, 1), default=os.cpu_count() or 1, help="default: one per CPU")
    options = parser.parse_args()
    files, skipped = find_files(options.inputs)
    with new_directory(options.out) as directory:
        report = build(files, directory, options.out.resolve().name, options)
    print(f"{report}, {skipped:,} files of other kinds\nwrote {options.out}")


if __name__ == "__main__":
    run_tool(main)
