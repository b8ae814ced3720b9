"""Turns any text into a dataset: a SentencePiece tokenizer, training shards and validation shards.

    python data/text.py notes/ book.txt dump.jsonl.zst --out data/mine --vocab-size 1024

The input is read twice as a stream: first to count, to choose the validation documents and to sample text for the
tokenizer, then to encode. What stays in memory is one 16-byte digest per document and a bounded sample of the text.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import gzip
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import sentencepiece as spm

try:
    import zstandard
except ImportError:
    zstandard = None

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")
PAD, BOS, EOS, UNK = range(4)
RESERVED = 4 + 256  # the four ids above and one piece for every byte

SHARD_TOKENS = 100_000_000
MAX_DOCUMENT_BYTES = 16 << 20  # SentencePiece needs about 50 bytes of memory per byte of one document
SAMPLE_CHARS = 32 << 20
PIECE_CHARS = 1000  # SentencePiece skips training sentences of more than 4192 bytes; this is at most 4000
BATCH_CHARS = 1 << 18
READ_BYTES = 1 << 18
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

PLAIN, JSONL, PARQUET = (".txt", ".md"), ".jsonl", ".parquet"
COMPRESSED = (".gz", ".zst")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile) + ((zstandard.ZstdError,) if zstandard else ())


class UserError(Exception):
    """Something the user can put right. The message reads `what is wrong — what to do`."""


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, but a bad command line is a UserError: one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} — see --help")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main function; what goes wrong ends in one line on stderr and exit code 2 (130 for Ctrl-C)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated run still removes what it began
    try:
        main()
    except UserError as error:
        message, code = str(error), 2
    except BrokenProcessPool:
        message, code = "a worker process died, probably for lack of memory — use fewer --processes", 2
    except OSError as error:
        advice = "free some space" if error.errno in DISK_FULL else "check the path, its permissions and the disk"
        message, code = f"{error.filename or 'input/output'}: {error.strerror or error} — {advice}", 2
    except KeyboardInterrupt:
        message, code = "interrupted — run it again", 130
    else:
        sys.exit(0)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


class Progress(AbstractContextManager):
    """A one-line bar on stderr, there only when stderr is a terminal. Use as a context manager."""

    def __init__(self, label: str, total: int = 0) -> None:
        self.label, self.total, self.drawn, self.began = label, total, 0.0, time.monotonic()
        self.visible = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Draws `done` of `total` bytes, at most ten times a second."""
        now = time.monotonic()
        if not self.visible or now - self.drawn < 0.1:
            return
        self.drawn = now
        rate = done / 1e6 / max(now - self.began, 1e-9)
        filled = 30 * done // self.total if self.total else 0
        bar = f"[{'#' * filled:<30}] {done / self.total:4.0%}" if self.total else ""
        print(f"\r{self.label} {bar} {done / 1e6:,.1f} MB {rate:,.1f} MB/s\x1b[K", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- shards


def check_shard(path: Path, advice: str = "delete it and get or build it again") -> int:
    """Returns the number of tokens in a shard; UserError with `advice` unless magic, version, count and size agree."""
    with open(path, "rb") as file:
        head, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(f"{path} is not a token shard (wrong header) — {advice}")
    if size != HEADER_BYTES + TOKEN.itemsize * count:
        raise UserError(f"{path} has {size:,} bytes, but its header announces {count:,} tokens — {advice}")
    return count


class ShardWriter(AbstractContextManager):
    """Writes one split as fineweb_<split>_NNNNNN.bin files of `shard_tokens` tokens (the last may be shorter).

    A shard carries a temporary name until it is whole. Documents run on from one shard into the next.
    Use as a context manager; `tokens` and `documents` count what was written.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.tokens = self.documents = self.shards = self.filled = 0
        self.file: BinaryIO | None = None

    def write(self, document: np.ndarray) -> None:
        """Appends one document: uint16[tokens], its first token BOS."""
        self.documents += 1
        self.tokens += len(document)
        while len(document):
            if self.file is None:
                self.file = self._path(".tmp").open("wb")
                self.file.write(bytes(HEADER_BYTES))
            part, document = np.split(document, [self.shard_tokens - self.filled])
            self.file.write(part.astype(TOKEN).tobytes())
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self._finish()

    def _path(self, suffix: str = "") -> Path:
        return self.directory / f"fineweb_{self.split}_{self.shards:06d}.bin{suffix}"

    def _finish(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.filled
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        self._path(".tmp").rename(self._path())
        self.file, self.filled, self.shards = None, 0, self.shards + 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.file and kind is None:
            self._finish()
        elif self.file:
            self.file.close()


@contextmanager
def new_directory(out: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty sibling of `out` to fill; it takes the name `out` only if the block ends without an exception.

    UserError if `out` holds anything and `replace` is false, or holds files that are no part of a dataset.
    """
    require_free(out, replace)
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    retired = out.with_name(f"{out.name}.partial-{os.getpid()}-old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace and out.exists():
            out.rename(retired)
        require_free(out, replace=False)  # another run may have finished first
        partial.rename(out)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(out: Path, replace: bool) -> None:
    """UserError unless a dataset may be written to `out`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file — choose another --out")
    names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if names and not replace:
        raise UserError(f"{out} is not empty — choose another --out or replace it with --force")
    if foreign := [name for name in names if not re.fullmatch(r"fineweb_(train|val)_\d+\.bin|.*\.model", name)]:
        raise UserError(f"{out} holds {foreign[0]}, which is no part of a dataset — choose another --out")


# ---------------------------------------------------------------------------------------------- reading


@dataclass
class Counts:
    """What was met while reading; `documents` and `bytes` (UTF-8) count only what is kept."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    duplicates: int = 0
    invalid_utf8: int = 0


class Document(NamedTuple):
    """`digest` is 16 bytes that depend on the text and the seed: the document's identity and its place in the draw."""

    digest: bytes
    text: str


def find_files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """Returns the text files among `paths`, folders searched through in sorted order, and how many others were there.

    UserError for a path that does not exist or a named file of an unknown kind.
    """
    files, skipped = [], 0
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file())
            files += [p for p in found if kind_of(p)]
            skipped += sum(not kind_of(p) for p in found)
        elif not path.exists():
            raise UserError(f"{path} does not exist — check the path")
        elif not kind_of(path):
            raise UserError(f"{path} is of an unknown kind — use .txt, .md, .jsonl (also .gz, .zst) or .parquet")
        else:
            files.append(path)
    return files, skipped


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, compression aside, or None for a file that is not text."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*PLAIN, JSONL) else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*PLAIN, JSONL, PARQUET) else None


def read_documents(files: Iterable[Path], delimiter: str | None, seed: int, counts: Counts) -> Iterator[Document]:
    """Yields the distinct documents of `files` in order, white space at their ends removed, and keeps `counts`."""
    seen: set[bytes] = set()
    for path in files:
        for text, valid in read_texts(path, delimiter):
            data = text.strip().encode()
            digest = hashlib.blake2b(data, digest_size=16, key=b"%d" % (seed % 2**64)).digest()
            counts.invalid_utf8 += not valid
            if not data:
                counts.empty += 1
            elif digest in seen:
                counts.duplicates += 1
            else:
                seen.add(digest)
                counts.documents += 1
                counts.bytes += len(data)
                yield Document(digest, text.strip())


def decode(raw: bytes) -> tuple[str, bool]:
    """Returns the text and whether it was valid UTF-8; what is not becomes U+FFFD."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), False


def read_texts(path: Path, delimiter: str | None) -> Iterator[tuple[str, bool]]:
    """Yields (text, was it valid UTF-8) for each document of a file; UserError if it cannot be read as its kind."""
    kind = kind_of(path)
    if kind == PARQUET:
        yield from parquet_rows(path)
        return
    separator = b"\n" if kind == JSONL else delimiter.encode() if delimiter else None
    try:
        for number, record in enumerate(records(path, separator), start=1):
            raw = record.removeprefix(codecs.BOM_UTF8) if number == 1 else record
            if kind in PLAIN:
                yield decode(raw)
            elif raw.strip():
                yield json_text(raw, f"{path} line {number}")
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}) — get it again") from error


def records(path: Path, separator: bytes | None) -> Iterator[bytes]:
    """Yields the parts of a file between separators, or the whole of it; UserError for a part that is too large."""
    held = b""
    for chunk in chunks(path):
        *whole, held = (held + chunk).split(separator) if separator else [held + chunk]
        yield from whole
        if len(held) > MAX_DOCUMENT_BYTES:
            limit = MAX_DOCUMENT_BYTES >> 20
            raise UserError(f"{path} has a document of more than {limit} MiB — split it, or name a --delimiter")
    if held or not separator:
        yield held


def chunks(path: Path) -> Iterator[bytes]:
    """Yields a file's bytes, decompressed, about READ_BYTES at a time; one of DAMAGE if the file is cut short."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        blocks = iter(lambda: file.read(READ_BYTES), b"")
        yield from decompress_zstd(blocks) if path.suffix.lower() == ".zst" else blocks


def decompress_zstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the content of one or more Zstandard frames; EOFError if the last one is not whole."""
    if zstandard is None:
        raise UserError("reading .zst needs zstandard — pip install zstandard")
    # zstandard's own stream reader takes a file that was cut short for a whole one, so the frames are followed here.
    frame = zstandard.ZstdDecompressor().decompressobj()
    for block in blocks:
        while block:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends too early")


def json_text(line: bytes, where: str) -> tuple[str, bool]:
    """Returns (field `text` of a JSON object, was it valid UTF-8); UserError naming `where` if there is none."""
    line_text, valid = decode(line)
    try:
        text = json.loads(line_text)["text"].encode(errors="surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object with a string `text` — correct or remove it") from error
    text, whole = decode(text)  # an escape such as \ud800 alone is no character
    return text, valid and whole


def parquet_rows(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields the column `text` as read_texts does, a null as an empty text; UserError without pyarrow or the column."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow — pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column `text` — rename the column that holds the text")
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                yield from (decode(row or b"") for row in batch.column(0).cast(pa.binary()).to_pylist())
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read ({error}) — get it again") from error


# ---------------------------------------------------------------------------------------------- tokenizer


class TextSample:
    """A uniform sample of the pieces of many documents that holds at most `limit` characters."""

    def __init__(self, seed: int, limit: int = SAMPLE_CHARS) -> None:
        self.random, self.limit, self.size, self.count = random.Random(seed), limit, 0, 0
        self.heap: list[tuple[float, int, Document]] = []  # the piece to give up first is on top

    def add(self, document: Document) -> None:
        """Offers a document, cut into pieces of PIECE_CHARS."""
        for start in range(0, len(document.text), PIECE_CHARS):
            piece = Document(document.digest, document.text[start : start + PIECE_CHARS])
            heapq.heappush(self.heap, (self.random.random(), self.count, piece))
            self.count += 1
            self.size += len(piece.text)
            while self.size > self.limit:
                self.size -= len(heapq.heappop(self.heap)[2].text)

    def pieces(self, keep: Callable[[bytes], bool]) -> list[str]:
        """Returns, in the order they came, the pieces of the documents whose digest `keep` accepts."""
        ordered = sorted(self.heap, key=lambda entry: entry[1])
        return [piece.text for _, _, piece in ordered if keep(piece.digest)]


def train_tokenizer(pieces: list[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE on texts of at most PIECE_CHARS characters and returns the model file's content.

    The tokenizer loses nothing: text is not normalized, and characters without a piece become byte pieces.
    The same pieces in the same order give the same bytes. UserError if the text is too small for `vocab_size`.
    """
    check_vocab_size(vocab_size)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(without_rare_characters(pieces, (vocab_size - RESERVED) // 2)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "Vocabulary size too high" not in str(error):
            raise
        raise UserError(
            f"{sum(map(len, pieces)):,} characters of training text are too few for a vocabulary of {vocab_size:,}"
            " — add text or lower --vocab-size"
        ) from error
    return model.getvalue()


def check_vocab_size(vocab_size: int) -> None:
    """UserError unless the vocabulary holds more than the reserved ids and every id fits uint16."""
    if not RESERVED < vocab_size <= 1 << 16:
        raise UserError(f"a vocabulary of {vocab_size:,} is not possible — choose from {RESERVED + 1} to {1 << 16:,}")


def without_rare_characters(pieces: list[str], limit: int) -> list[str]:
    """Returns the pieces with a space in place of every character that is not among the `limit` most frequent.

    SentencePiece wants a piece for nearly every character, which in some scripts are more than the vocabulary holds.
    """
    frequent = Counter(chain.from_iterable(pieces)).most_common()
    rare = {ord(character): " " for character, _ in frequent[limit:]}
    return [piece.translate(rare) for piece in pieces] if rare else pieces


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Loads a model file's content; UserError naming it if it is none, or its ids do not suit the shards."""
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{name} is not a SentencePiece model — choose another --tokenizer") from error
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > 1 << 16:
        raise UserError(f"{name} needs BOS = {BOS} and at most {1 << 16:,} pieces — choose another --tokenizer")
    return tokenizer


def encode(tokenizer: spm.SentencePieceProcessor, text: str) -> np.ndarray:
    """Returns one document, uint16[1 + tokens]: BOS, then its tokens."""
    return np.array([BOS, *tokenizer.encode(text)], dtype=TOKEN)


# ---------------------------------------------------------------------------------------------- many processes


class Labelled(NamedTuple):
    """A text and the split it goes to, "train" or "val"."""

    split: str
    text: str


def encode_all(documents: Iterable[Labelled], model: bytes, processes: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (split, uint16[1 + tokens]) for each document, in order, whatever the number of processes.

    Only a few batches per process are under way at any time, so that memory stays bounded.
    """
    if processes == 1:
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
        yield from ((split, encode(tokenizer, text)) for split, text in documents)
        return
    spawn = multiprocessing.get_context("spawn")  # the same on every system, and safe beside threads
    pending: deque[Future[list[tuple[str, np.ndarray]]]] = deque()
    with ProcessPoolExecutor(processes, spawn, start_worker, (model,)) as pool:
        for batch in batches(documents):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 3 * processes:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def batches(documents: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    """Groups documents into lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_worker(model: bytes) -> None:
    """Loads the tokenizer once per worker process and leaves Ctrl-C to the parent."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker_tokenizer = spm.SentencePieceProcessor(model_proto=model)


def encode_batch(batch: list[Labelled]) -> list[tuple[str, np.ndarray]]:
    """What a worker process does with one batch."""
    return [(split, encode(worker_tokenizer, text)) for split, text in batch]


# ---------------------------------------------------------------------------------------------- the dataset


def draw_validation(digests: list[bytes], fraction: float) -> Callable[[bytes], bool]:
    """Returns a test for digests of validation documents: the `fraction` (at least one) with the smallest digests.

    A digest depends on the text and the seed alone, so equal documents can never fall on both sides.
    UserError if no training document would be left.
    """
    count = max(1, round(fraction * len(digests)))
    if count >= len(digests):
        raise UserError(
            f"{len(digests)} distinct documents cannot be split into training and validation"
            " — add files, or cut a file into documents with --delimiter"
        )
    threshold = heapq.nsmallest(count, digests)[-1]
    return lambda digest: digest <= threshold


def build(files: list[Path], directory: Path, name: str, options: argparse.Namespace) -> str:
    """Fills `directory` with shards and `<name>_<vocabulary>_bpe.model`, and returns a summary of a few lines."""
    began, first, second = time.monotonic(), Counts(), Counts()
    digests, sample = [], TextSample(options.seed)
    with Progress("reading") as progress:
        for document in read_documents(files, options.delimiter, options.seed, first):
            digests.append(document.digest)
            if not options.tokenizer:
                sample.add(document)
            progress.show(first.bytes)
    is_validation = draw_validation(digests, options.val_fraction)
    del digests

    if options.tokenizer:
        model = options.tokenizer.read_bytes()
    else:
        model = train_tokenizer(sample.pieces(lambda digest: not is_validation(digest)), options.vocab_size)
    model_name = options.tokenizer.stem if options.tokenizer else f"{name}_{options.vocab_size}_bpe"
    tokenizer = load_tokenizer(model, model_name)
    (directory / f"{model_name}.model").write_bytes(model)

    labelled = (
        Labelled("val" if is_validation(document.digest) else "train", document.text)
        for document in read_documents(files, options.delimiter, options.seed, second)
    )
    with (
        ShardWriter(directory, "train", options.shard_tokens) as train,
        ShardWriter(directory, "val", options.shard_tokens) as val,
        Progress("encoding", first.bytes) as progress,
    ):
        writers = {"train": train, "val": val}
        for split, tokens in encode_all(labelled, model, options.processes):
            writers[split].write(tokens)
            progress.show(second.bytes)
    if second != first:
        raise UserError("the input changed while it was read — run it again when nothing writes to it")
    return summary(first, train, val, tokenizer.vocab_size(), time.monotonic() - began)


def summary(counts: Counts, train: ShardWriter, val: ShardWriter, vocab_size: int, seconds: float) -> str:
    """The report at the end of a build."""
    lines = [
        f"{writer.split:>5}: {writer.documents:,} documents, {writer.tokens:,} tokens, {writer.shards} shards"
        for writer in (train, val)
    ]
    rate = counts.bytes / 1e6 / seconds
    lines.append(f"{counts.bytes:,} bytes of text, {vocab_size:,} pieces, {seconds:.1f} s ({rate:.2f} MB/s)")
    lines.append(f"{counts.duplicates:,} duplicates dropped, {counts.empty:,} empty, {counts.invalid_utf8:,} not UTF-8")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Turns any text into training and validation shards with their tokenizer.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders or - for stdin: .txt .md .jsonl (.gz .zst) .parquet")
    add("--out", type=Path, required=True, help="the dataset's folder")
    add("--force", action="store_true", help="replace the dataset in --out")
    add("--vocab-size", type=positive, default=1024, help="pieces of the tokenizer to train (default 1024)")
    add("--tokenizer", type=Path, help="use this SentencePiece model and train none")
    add("--delimiter", type=unescape, help="separates documents in text files, \\n and \\t understood (default: none)")
    add("--stdin-format", choices=("txt", "jsonl"), default="txt", help="what - holds (default txt)")
    add("--val-fraction", type=fraction, default=0.01, help="share of documents for validation (default 0.01)")
    add("--seed", type=int, default=0, help="of the split and of the tokenizer's sample (default 0)")
    add("--shard-tokens", type=positive, default=SHARD_TOKENS, help="tokens per shard (default 100 million)")
    add("--processes", type=positive, default=os.cpu_count() or 1, help="for encoding (default: one per CPU)")
    return parser.parse_args()


def fraction(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def unescape(text: str) -> str:
    """An argparse type: a non-empty string in which \\n and \\t mean a line break and a tab."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def main() -> None:
    options = parse_arguments()
    if not options.tokenizer:
        check_vocab_size(options.vocab_size)
    if "-" in options.inputs and len(options.inputs) > 1:
        raise UserError("- stands beside other inputs — give it alone")
    with new_directory(options.out, options.force) as directory:
        if options.inputs == ["-"]:
            # What follows reads its input twice, and that may be larger than memory.
            spooled = directory / f"stdin.{options.stdin_format}"
            with open(spooled, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            report = build([spooled], directory, options.out.resolve().name, options)
            spooled.unlink()
        else:
            files, skipped = find_files(map(Path, options.inputs))
            report = build(files, directory, options.out.resolve().name, options)
            report += f", {skipped:,} files of other kinds"
    print(report)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
