"""Turns any text into a dataset: a SentencePiece tokenizer, training shards and validation shards.

python data/text.py notes/ book.txt dump.jsonl.zst --out data/mine --vocab-size 1024
"""

from common import HEADER_BYTES, MAGIC, VERSION, UserError, naming, new_directory, number, place, run_tool, value_of

# isort: split
import argparse
import hashlib
import heapq
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

import common

PAD, BOS, EOS, UNK = range(4)
RESERVED = 4 + 256  # the four ids above and one piece for every byte
SHARD_TOKENS = 100_000_000
MAX_SHARD_TOKENS = 2**31 - 1  # that the header's int32 can count
MAX_DOCUMENT_BYTES = 16 << 20  # SentencePiece needs about 50 bytes of memory per byte of one document
SAMPLE_CHARS = 32 << 20
PIECE_CHARS = 1000  # SentencePiece skips training sentences of more than 4192 bytes; this is at most 4000
BATCH_CHARS = 1 << 20  # encoded at once by all threads
READ_BYTES = 1 << 18
PARQUET_ROWS = 16  # read at once: each may have MAX_DOCUMENT_BYTES
SPACE = "\u2581"  # SentencePiece's sign for a space
# SentencePiece passes over what it trains on where it meets its own sign for the unknown, or NUL.
UNTRAINABLE = "\u2585\0"
# Trains in a process of its own, for SentencePiece hears no signal before it has ended: sentences come in, the model
# goes out.
TRAINER = """
import io, json, sys, sentencepiece
model = io.BytesIO()
sentences = map(json.loads, sys.stdin.buffer)
sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **json.loads(sys.argv[1]))
sys.stdout.buffer.write(model.getvalue())
"""

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
                self.path = self.directory / f"fineweb_{self.split}_{self.shards:06d}.bin"
                self.file = self.path.open("wb")
                self.file.write(bytes(HEADER_BYTES))
                self.shards += 1
            part, document = np.split(document, [self.shards * self.shard_tokens - self.tokens])
            with naming(self.path):
                self.file.write(part.astype("<u2").tobytes())
            self.tokens += len(part)

    def close(self) -> None:
        """Gives the open shard its header."""
        if self.file:
            count = self.tokens - (self.shards - 1) * self.shard_tokens
            with naming(self.path), self.file:
                self.file.seek(0)
                self.file.write(np.array([MAGIC, VERSION, count], "<i4").tobytes())


def write_splits(folder: Path, documents: Iterable[tuple[bool, np.ndarray]], shard_tokens=SHARD_TOKENS) -> list[str]:
    """Writes documents, each with whether it is for validation; returns a line on each split."""
    writers = [ShardWriter(folder, split, shard_tokens) for split in ("train", "val")]
    for validation, tokens in documents:
        writers[validation].write(tokens)
    for writer in writers:
        writer.close()
    return [f"{w.split:>5}: {w.documents:,} documents, {w.tokens:,} tokens, {w.shards} shards" for w in writers]


def find_files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """Returns the text files among `paths`, folders searched through in sorted order, and the number of others, links
    that lead nowhere among them; says which have a text's name and are no file. OSError for a folder that cannot be
    read."""
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist — check the path")
        if not path.is_dir() and not kind_of(path):
            raise UserError(f"{path} is no .txt, .md, .jsonl (also .gz, .zst) or .parquet — give one")
        common.require_file(path)  # text is read twice
        found += common.walk(path) if path.is_dir() else [path]
    texts = [path for path in found if kind_of(path)]
    if special := [ascii(str(path)) for path in texts if common.is_special(path)]:
        print(f"not read, for these are pipes, sockets or devices: {', '.join(special)}")
    files = [path for path in texts if path.is_file()]
    return files, len(found) - len(files)


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, compression aside, or None for a file that is not text."""
    found = re.search(r"(\.txt|\.md|\.jsonl)(\.gz|\.zst)?$|\.parquet$", path.name.lower())
    return found and (found[1] or ".parquet")


def read_documents(files: Iterable[Path], delimiter: str, seed: int, counts: Counter) -> Iterator[Document]:
    """Yields the distinct documents of `files` in order, stripped; counts them and what was met beside them."""
    seen: set[bytes] = set()
    for found in chain.from_iterable(read_texts(path, delimiter, counts) for path in files):
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
            counts["digest"] ^= int.from_bytes(digest)  # of all, in any order: what changes must not go unnoticed
            yield digest, text


def read_texts(path: Path, delimiter: str, counts: Counter) -> Iterator[str]:
    """Yields the documents of a file, a surrogate for each byte that is not UTF-8, and counts whether the delimiter cut
    it; UserError if it is damaged or has a document that is too large."""
    import pyarrow

    kind = kind_of(path)
    separator = b"\n" if kind == ".jsonl" else delimiter.encode(errors="surrogateescape")
    line = 0
    try:
        for line, record in enumerate(rows(path) if kind == ".parquet" else records(path, separator), start=1):
            check_size(len(record), path)
            text = record.decode(errors="surrogateescape")
            if line == 1:
                text = text.removeprefix("\ufeff")
            if kind != ".jsonl":
                yield text
            elif text.strip():
                yield json_text(text, f"{path} line {line}")
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) or isinstance(error, MemoryError):  # the system's, not the format's
            raise
        if "Frame requires too much memory" in str(error):
            raise UserError(
                f"{path} is compressed with a window over 128 MiB — unpack it first: zstd -d --long=31"
            ) from error
        raise UserError(f"{path} is damaged or not what its name says ({error}) — get it again") from error
    if delimiter and kind in (".txt", ".md"):
        counts["cut" if line > 1 else "uncut"] += 1


def check_size(size: int, path: Path) -> None:
    """UserError for a document of more bytes than SentencePiece is given at once."""
    if size > MAX_DOCUMENT_BYTES:
        limit = f"{MAX_DOCUMENT_BYTES >> 20} MiB"
        raise UserError(f"{path} has a document over {limit} — split it, in a text file by --delimiter")


def rows(path: Path) -> Iterator[bytes]:
    """Yields the column `text` of a parquet file, nothing for null; UserError if it has none of strings."""
    import pyarrow
    from pyarrow import parquet

    with naming(path), path.open("rb") as opened:
        file = parquet.ParquetFile(opened)
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column `text` — rename the column with the text")
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=["text"]):
            column = batch.column(0)
            try:
                column = column.cast(pyarrow.binary())
            except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowTypeError) as error:
                raise UserError(f"{path} has a column `text` of type {column.type} — give strings") from error
            yield from (row.as_py() or b"" for row in column)


def records(path: Path, separator: bytes) -> Iterator[bytes]:
    """Yields the parts of a file between separators, or the whole of it; UserError for a part that is too large. The
    end of a line in a separator is that of Windows, too."""
    import pyarrow  # it notices a compressed file that was cut short, as zstandard does not

    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    lines = re.split(rb"(?<!\r)\n", separator)
    either = re.compile(rb"\r?\n".join(map(re.escape, lines)))
    held = b""
    if codec and not path.stat().st_size:
        raise OSError("it is empty, which nothing compressed is")
    with naming(path), path.open("rb") as opened, pyarrow.input_stream(opened, compression=codec) as file:
        while block := file.read(READ_BYTES):
            held += block
            if separator:
                *whole, held = either.split(held) if b"\r" in held else held.split(separator)
                yield from whole
            check_size(len(held), path)
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
    found = Counter(chain.from_iterable(pieces))
    frequent = [character for character, _ in found.most_common() if character not in UNTRAINABLE]
    rare = dict.fromkeys(map(ord, [*frequent[(vocab_size - RESERVED) // 2 :], *UNTRAINABLE]), " ")
    options = dict(
        vocab_size=vocab_size,
        **dict(model_type="bpe", byte_fallback=True, split_digits=True, num_threads=1, minloglevel=2),
        **dict(normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False),
        **dict(pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK),
        required_chars=SPACE,  # else a text that begins to have spaces in validation has three bytes for each
    )
    try:
        return train_apart((piece.translate(rare) for piece in pieces), options)
    except RuntimeError as error:
        most = re.search(r"Vocabulary size too high .* value <= (\d+)", str(error))
        if not most and "sentences_.empty" not in str(error):
            raise
        count = f"{sum(map(len, pieces)):,} characters, {len(found):,} different ones"
        most = f"a vocabulary of {most[1]}" if most else "none"
        what = f"the training text ({count}) has too few pieces: for {most}"
        raise UserError(f"{what}, not {vocab_size} — add text, or lower --vocab-size") from error


def train_apart(sentences: Iterable[str], options: dict[str, Any]) -> bytes:
    """The model that TRAINER makes of them, whose process ends with this call, however that ends. RuntimeError with
    what it complained of, MemoryError, UserError if it was killed."""
    command = [sys.executable, "-P", "-c", TRAINER, json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            with suppress(BrokenPipeError):  # it has ended, and says why
                child.stdin.writelines(f"{json.dumps(x, ensure_ascii=False)}\n".encode() for x in sentences)
            model, complaint = child.communicate()
        except BaseException:
            child.kill()
            child.wait()
            with suppress(OSError):  # of what it has not read
                child.stdin.close()
            raise
    said = complaint.decode(errors="replace").strip()
    if child.returncode and re.search("MemoryError|bad_alloc", said):
        raise MemoryError
    if child.returncode < 0 and not said:
        name = signal.Signals(-child.returncode).name
        raise UserError(f"{name} ended the process that trained the tokenizer — run it again")
    if child.returncode:
        raise RuntimeError(said.rpartition("RuntimeError: ")[2])
    return model


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Loads a model file's content, BOS before each text; UserError naming it if its ids do not suit the shards."""
    try:
        if not model:
            raise RuntimeError("of an empty one SentencePiece makes a tokenizer without pieces")
        tokenizer = spm.SentencePieceProcessor(model_proto=model, add_bos=True)
    except RuntimeError as error:
        raise UserError(f"{name} is not a SentencePiece model — choose another --tokenizer") from error
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 1 << 16:  # bos_id() is -1 unless that is a control symbol
        raise UserError(f"{name} needs BOS = {BOS} and at most {1 << 16:,} pieces — choose another --tokenizer")
    return tokenizer


class Encoded(NamedTuple):
    """A document's tokens, BOS first, and the bytes of what they decode to, None if that is the document itself."""

    tokens: np.ndarray
    other_bytes: int | None


def encode(texts: list[str], tokenizer: spm.SentencePieceProcessor) -> list[Encoded]:
    """Encodes texts and decodes them again. UserError if BOS is not their first token alone: it is what parts them."""
    encoded = []
    for text in texts:
        tokens = tokenizer.encode(text, return_type="numpy")
        if tokens[0] != BOS or np.count_nonzero(tokens == BOS) > 1:
            what = f"the tokenizer has no BOS before, or BOS within the text {text[:40]!r}"
            raise UserError(f"{what} — choose another --tokenizer")
        back = tokenizer.decode(tokens)
        encoded.append(Encoded(tokens, None if back == text else len(back.encode(errors="replace"))))
    return encoded


def encode_all(
    documents: Iterable[Document], tokenizer: spm.SentencePieceProcessor, threads: int
) -> Iterator[tuple[bytes, str, Encoded]]:
    """Yields digest, text and tokens of each document. The threads are Python's: one that the system refuses is an
    error there, and the end of the process in SentencePiece's own."""
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(documents):
            texts = [text for _, text in batch]
            share = -(-len(texts) // threads) or 1
            parts = [texts[start : start + share] for start in range(0, len(texts), share)]
            encoded = chain.from_iterable(pool.map(partial(encode, tokenizer=tokenizer), parts))
            yield from ((digest, text, tokens) for (digest, text), tokens in zip(batch, encoded, strict=True))


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
    if len(digests) > 1 and count >= len(digests):
        what = f"--val-fraction {fraction:g} of {len(digests)} distinct documents leaves none to train on"
        raise UserError(f"{what} — lower it")
    if count >= len(digests):
        raise UserError(
            f"{len(digests)} distinct documents are too few to split — add files, or cut one by --delimiter"
        )
    return heapq.nsmallest(count, digests)[-1]


def sample_pieces(
    documents: Iterable[Document], seed: int, limit: int, digests: list[bytes]
) -> list[tuple[float, bytes, str]]:
    """A uniform sample of pieces of text of so many characters at most, each behind its draw and its document's digest;
    appends the digests of all documents."""
    # Not SentencePiece's input_sentence_size: which documents are for validation, and which characters are too rare for
    # a piece, is known only when all were read.
    sample: list[tuple[float, bytes, str]] = []  # a heap: the piece to give up first is on top
    size = 0
    draw = random.Random(seed)
    for digest, text in documents:
        digests.append(digest)
        for piece in cut(text) if limit else ():
            heapq.heappush(sample, (draw.random(), digest, piece))
            size += len(piece)
            while size > limit:
                size -= len(heapq.heappop(sample)[-1])
    return sorted(sample)


def build(files: list[Path], directory: Path, name: str, options: argparse.Namespace) -> list[str]:
    """Fills `directory` with shards and `<name>_<vocabulary>_bpe.model`, and returns a summary in lines."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own

    def read(label: str, counts: Counter, total: int | None = None) -> Iterable[Document]:
        documents = read_documents(files, options.delimiter or "", options.seed, counts)
        return tqdm(documents, label, total, unit=" documents", leave=False, disable=None)  # None: only on a terminal

    began = time.monotonic()
    first, second, lost = Counter(), Counter(), Counter()
    digests: list[bytes] = []
    if options.tokenizer:  # first: what comes now may take hours
        model_name, model = options.tokenizer.stem, options.tokenizer.read_bytes()
        tokenizer = load_tokenizer(model, model_name)
    sample = sample_pieces(read("reading", first), options.seed, SAMPLE_CHARS * (not options.tokenizer), digests)
    if len(digests) < 2 and first["uncut"]:
        raise UserError(f"{uncut(first)}, so there is no second document — choose another delimiter, or add files")
    threshold = draw_validation(digests, options.val_fraction)

    if not options.tokenizer:
        model_name = f"{name}_{options.vocab_size}_bpe"
        model = train_tokenizer([piece for _, digest, piece in sample if digest > threshold], options.vocab_size)
        tokenizer = load_tokenizer(model, model_name)
    common.write_atomic(directory / f"{model_name}.model", model)

    def encoded() -> Iterator[tuple[bool, np.ndarray]]:
        documents = read("encoding", second, first["documents"])
        for digest, text, found in encode_all(documents, tokenizer, options.threads):
            if found.other_bytes is not None:
                size = len(text.encode())
                stay = min(size, found.other_bytes)  # what stands for a lost character may be longer
                lost.update(documents=1, bytes=size, tokens=found.other_bytes, stay=stay)
            yield digest <= threshold, found.tokens

    lines = write_splits(directory, encoded(), options.shard_tokens)
    if second != first:
        raise UserError("the input changed while it was read — run it again when nothing writes to it")
    seconds = time.monotonic() - began
    speed = f"{seconds:.1f} s ({first['bytes'] / 1e6 / seconds:.2f} MB/s)"
    return [
        *lines,
        f"{first['bytes']:,} bytes of text, {tokenizer.vocab_size():,} pieces, {speed}",
        *notes(first, lost),
    ]


def uncut(counts: Counter) -> str:
    """What the delimiter did not do."""
    return f"--delimiter leaves {counts['uncut']:,} of {counts['cut'] + counts['uncut']:,} text files whole"


def notes(counts: Counter, lost: Counter) -> list[str]:
    """Lines on the documents: how much their tokens give back, whether they were cut, and what is not among them."""
    lines = ["decoding the tokens gives every document back"]
    if lost:
        kept = counts["bytes"] - lost["bytes"] + lost["stay"]
        lines = [
            f"decoding the tokens does not give back {lost['documents']:,} of {counts['documents']:,} documents: "
            f"{lost['bytes']:,} bytes became {lost['tokens']:,}, so that at most {kept / counts['bytes']:.1%} of all "
            "bytes stay"
        ]
    lines += [uncut(counts)] * (counts["uncut"] > 0)
    dropped = f"{counts['duplicates']:,} duplicates dropped, {counts['empty']:,} empty"
    return [*lines, f"{dropped}, {counts['not_utf8']:,} not UTF-8"]


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        type=place,
        metavar="INPUT",
        help="files or folders: .txt .md .jsonl (.gz .zst) .parquet",
    )
    add("--out", type=common.dataset_place, required=True, help="the dataset's folder")
    add("--vocab-size", type=number(int, RESERVED + 1, 1 << 16), default=1024, help="pieces to train (default 1024)")
    add("--tokenizer", type=place, help="use this SentencePiece model and train none")
    understood = "\\n, \\r, \\t understood (default: none)"
    add("--delimiter", type=common.delimiter, help=f"parts documents in text files; {understood}")
    add("--val-fraction", type=number(float, 0, 1), default=0.01, help="share for validation (default 0.01)")
    add("--seed", type=int, default=0, help="of the split and of the tokenizer's sample (default 0)")
    tokens = number(int, 1, MAX_SHARD_TOKENS)
    add("--shard-tokens", type=tokens, default=SHARD_TOKENS, help="tokens per shard (default 100 million)")
    add("--threads", "--processes", type=number(int, 1), default=os.cpu_count() or 1, help="default: one per CPU")
    options = parser.parse_args()
    files, skipped = find_files(options.inputs)
    if skipped and not files:
        kinds = ".txt, .md, .jsonl (these also .gz or .zst) or .parquet"
        raise UserError(f"none of {skipped:,} files is text by its name — give some that end in {kinds}")
    with new_directory(options.out) as directory:
        report = "\n".join(build(files, directory, options.out.resolve().name, options))
    print(f"{report}, {skipped:,} files of other kinds (broken links among them)\nwrote {options.out}")


if __name__ == "__main__":
    run_tool(main)
