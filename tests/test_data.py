"""Tests of the data tools: any text, the bundled sample, and the challenge's shards from a hub on the loopback."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import DATA, Result, call, common, fineweb, is_one_line_error, sample, text

FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def split_tokens(directory: Path, split: str) -> np.ndarray:
    """Reads a split without the tools' help: uint16[tokens]."""
    parts = []
    for path in sorted(directory.glob(f"fineweb_{split}_*.bin")):
        header = np.fromfile(path, dtype="<i4", count=256)
        tokens = np.fromfile(path, dtype="<u2", offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
        parts.append(tokens)
    return np.concatenate(parts)


def split_documents(directory: Path, split: str) -> list[str]:
    """Decodes the documents of a split with the model in the same folder."""
    (model,) = directory.glob("*.model")
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    tokens = split_tokens(directory, split)
    assert tokens[0] == 1 and tokens.max() < tokenizer.vocab_size()
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


WORDS = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "child", "place", "work")


def story(number: int) -> str:
    """A distinct document of about 40 words."""
    rng = np.random.default_rng(number)
    return f"Story {number}.\n" + " ".join(rng.choice(WORDS, 40)) + "\n  The end — fin."


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return [story(number) for number in range(60)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    """A .jsonl file of 60 distinct documents."""
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in stories))
    return path


@pytest.fixture(scope="session")
def built_sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sample, built twice with different hash seeds and from different folders, or once where it is there: where
    the one command was run before."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # of all processes of this suite
    places = [shared / name / "sample" for name in ("first sample", "second sample")]
    with FileLock(shared / "samples.lock"):
        build_samples(places)
    return places[0], places[1]


def build_samples(places: list[Path]) -> None:
    """Builds what is not there yet: another process may have."""
    absent = "tqdm", "scipy", "huggingface_hub", "pyarrow", "matplotlib"  # the sample needs none of these
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import sample; sample.run_tool(sample.main)"
    commands = [["-c", program], [DATA / "sample.py"]]
    if (DATA / "sample").exists():
        places[1] = DATA / "sample"
        commands.pop()
    if places[0].exists():
        return
    for place in places[: len(commands)]:
        place.parent.mkdir(exist_ok=True)
    runs = [
        subprocess.Popen(
            [sys.executable, *command, "--out", place],
            env=os.environ | {"PYTHONHASHSEED": str(number + 1), "PYTHONPATH": str(DATA)},
            cwd=place.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, (place, command) in enumerate(zip(places[: len(commands)], commands, strict=True))
    ]
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
        assert "val: " in output


@pytest.fixture(scope="session")
def tokenizer(built_sample: tuple[Path, Path]) -> spm.SentencePieceProcessor:
    return text.load_tokenizer((built_sample[0] / "sample_1024_bpe.model").read_bytes(), "x")


# ---------------------------------------------------------------------------------------------- pieces of text.py


@FAST
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_tokenizer_loses_nothing(tokenizer: spm.SentencePieceProcessor, document: str) -> None:
    (tokens,) = tokenizer.encode([document], return_type="numpy")
    assert tokens.max() < 1 << 16 and tokens[0] == text.BOS and text.BOS not in tokens[1:]
    assert tokenizer.decode(tokens[1:].tolist()) == document


def test_tokenizer_ids_are_the_challenges(tokenizer: spm.SentencePieceProcessor) -> None:
    special = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert special == (0, 1, 2, 3) and tokenizer.vocab_size() == 1024
    assert [tokenizer.id_to_piece(4 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


@FAST
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=30), min_size=1), st.integers(1, 40))
def test_shards_hold_the_documents_in_order(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    with closing(text.ShardWriter(directory, "train", shard_tokens)) as writer:
        for document in documents:
            writer.write(np.array(document, dtype=np.uint16))
    total = sum(map(len, documents))
    assert split_tokens(directory, "train").tolist() == [token for document in documents for token in document]
    assert (writer.documents, writer.tokens, writer.shards) == (len(documents), total, -(-total // shard_tokens))
    counts = [common.check_shard(path) for path in sorted(directory.iterdir())]
    assert counts[:-1] == [shard_tokens] * (len(counts) - 1) and sum(counts) == total


@pytest.mark.parametrize("damage", [b"", b"\0" * 2000, "short", "long", "empty", "negative"])
def test_check_shard_finds_damage(tmp_path: Path, damage: bytes | str) -> None:
    with closing(text.ShardWriter(tmp_path, "val")) as writer:
        writer.write(np.ones(99, dtype=np.uint16))
    path = tmp_path / "fineweb_val_000000.bin"
    whole = path.read_bytes()
    empty, negative = (whole[:8] + struct.pack("<i", n) + whole[12 : 1024 + 2 * n] for n in (0, -1))
    damaged = {"short": whole[:-2], "long": whole + b"\0", "empty": empty, "negative": negative}
    path.write_bytes(damaged.get(damage, damage))
    with pytest.raises(common.UserError):
        common.check_shard(path)


@FAST
@given(st.lists(st.text("ab|\n", max_size=6)), st.sampled_from(["|", "\n\n", "a|b"]), st.integers(1, 9), st.booleans())
def test_delimiters_are_found_wherever_a_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str], delimiter: str, read: int, compressed: bool
) -> None:
    monkeypatch.setattr(text, "READ_BYTES", read)
    data = delimiter.join(parts).encode()
    path = tmp_path / ("x.txt.gz" if compressed else "x.txt")
    path.write_bytes(gzip.compress(data) if compressed else data)
    expected = [part for part in data.split(delimiter.encode()) if part]
    assert [part for part in text.records(path, delimiter.encode()) if part] == expected
    assert list(text.records(path, b"")) == [data]


@FAST
@given(st.lists(st.text(st.characters(exclude_categories=[]))), st.integers(0, 2**64))
def test_jsonl_round_trip_counts_and_split(tmp_path: Path, documents: list[str], seed: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    counts = Counter()
    found = list(text.read_documents([path], "", seed, counts))
    clean = ["".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in document) for document in documents]
    assert [content for _, content in found] == list(dict.fromkeys(filter(None, map(str.strip, clean))))
    assert counts["documents"] + counts["empty"] + counts["duplicates"] == len(documents)
    assert counts["bytes"] == sum(len(content.encode()) for _, content in found)
    assert counts["not_utf8"] == sum(before != after for before, after in zip(documents, clean, strict=True))
    if len(found) > 1:
        threshold = text.draw_validation([digest for digest, _ in found], 0.3)
        assert sum(digest <= threshold for digest, _ in found) == max(1, round(0.3 * len(found)))


@pytest.mark.parametrize("limit", [20_000, 1 << 20])
def test_tokenizer_sample_is_bounded(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, stories: list[str], limit: int
) -> None:
    samples: list[list[str]] = []
    train_tokenizer = text.train_tokenizer

    def train(texts: list[str], vocab_size: int) -> bytes:
        samples.append(texts)
        return train_tokenizer(texts, vocab_size)

    (tmp_path / "x.jsonl").write_text(corpus.read_text() + json.dumps({"text": "".join(stories) * 4}) + "\n")
    monkeypatch.setattr(text, "SAMPLE_CHARS", limit)
    monkeypatch.setattr(text, "train_tokenizer", train)
    for seed in (1, 2):
        options = "--out", tmp_path / f"{seed}", "--vocab-size", 300, "--seed", seed
        assert call(text, tmp_path / "x.jsonl", *options).code == 0
    total = min(limit, 5 * sum(map(len, stories)))
    for pieces in samples:
        assert max(map(len, pieces)) <= 1000
        assert 0.8 * total < sum(map(len, pieces)) <= total
    assert set(samples[0]) != set(samples[1])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@settings(deadline=None, max_examples=30)
@given(st.lists(TEXTS, min_size=1), st.integers(261, 400))
def test_training_gives_a_tokenizer_or_says_what_to_do(pieces: list[str], vocab_size: int) -> None:
    try:
        model = text.train_tokenizer(pieces, vocab_size)
    except common.UserError as error:
        assert "--vocab-size" in str(error)
    else:
        assert text.load_tokenizer(model, "x").vocab_size() == vocab_size


def test_characters_never_fill_the_vocabulary() -> None:
    pieces = ["".join(chr(0x4E00 + (7 * i * k) % 3000) for i in range(1000)) for k in range(1, 30)]
    tokenizer = text.load_tokenizer(text.train_tokenizer(pieces, 400), "x")
    assert tokenizer.vocab_size() == 400 and tokenizer.decode(tokenizer.encode(pieces[0])) == pieces[0]


# ---------------------------------------------------------------------------------------------- text.py as a command


def test_any_number_of_threads_writes_the_same_bytes(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BATCH_CHARS", 500)
    options = "--vocab-size", 300, "--shard-tokens", 1000, "--val-fraction", 0.1
    for threads in (1, 2):
        arguments = corpus, "--out", tmp_path / str(threads) / "set", *options, "--threads", threads
        assert call(text, *arguments).code == 0
    assert contents(tmp_path / "1" / "set") == contents(tmp_path / "2" / "set")


def test_dataset_holds_every_document_once(tmp_path: Path, corpus: Path, stories: list[str]) -> None:
    doubled = tmp_path / "again.jsonl"
    doubled.write_bytes(corpus.read_bytes() * 2)
    splits = []
    for seed in (1, 2):
        out = tmp_path / f"seed{seed}"
        options = "--vocab-size", 300, "--val-fraction", 0.2, "--seed", seed, "--threads", 1
        result = call(text, corpus, doubled, "--out", out, *options)
        assert result.code == 0 and "120 duplicates dropped" in result.out and "12 documents" in result.out
        assert (out / f"seed{seed}_300_bpe.model").exists()
        train, val = (split_documents(out, split) for split in ("train", "val"))
        assert sorted(train + val) == sorted(stories) and len(val) == 12
        assert train == [document for document in stories if document in set(train)]
        splits.append(set(val))
    assert splits[0] != splits[1]


def test_tokenizer_does_not_see_validation_text(tmp_path: Path, corpus: Path, stories: list[str]) -> None:
    out = tmp_path / "set"
    options = "--vocab-size", 300, "--val-fraction", 0.5, "--threads", 1
    assert call(text, corpus, "--out", out, *options).code == 0
    train = split_documents(out, "train")
    assert text.train_tokenizer(train, 300) == (out / "set_300_bpe.model").read_bytes()
    assert text.train_tokenizer(stories, 300) != (out / "set_300_bpe.model").read_bytes()


def write_txt(path: Path, document: str) -> None:
    path.with_suffix(".txt").write_text(document)


def write_markdown_gz(path: Path, document: str) -> None:
    path.with_suffix(".md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + document.encode()))


def write_jsonl(path: Path, document: str) -> None:
    path.with_suffix(".jsonl").write_text("\n" + json.dumps({"id": 1, "text": document}))


def write_jsonl_zst(path: Path, document: str) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    line = json.dumps({"text": document}).encode()
    halves = zstandard.compress(line[:50]), zstandard.compress(line[50:])  # two frames, as parallel packers write them
    path.with_suffix(".jsonl.zst").write_bytes(b"".join(halves))


def write_parquet(path: Path, document: str) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pa.table({"id": [1, 2], "text": [None, document]}), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [write_txt, write_markdown_gz, write_jsonl, write_jsonl_zst, write_parquet])
def test_every_kind_of_file(tmp_path: Path, stories: list[str], write: Callable[[Path, str], None]) -> None:
    for number, document in enumerate(stories[:9]):
        path = tmp_path / "in" / f"{number % 2}" / f"{number}.x"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, document)
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    files, skipped = text.find_files([tmp_path / "in"])
    found = [content for _, content in text.read_documents(files, "", 0, Counter())]
    assert found == stories[:9:2] + stories[1:9:2] and skipped == 1  # folder 0 comes before folder 1


def test_delimiters_make_documents(tmp_path: Path, stories: list[str]) -> None:
    (tmp_path / "stories.txt").write_text("\n--\n".join(stories))
    options = "--delimiter", r"\n--\n", "--vocab-size", 300, "--threads", 1
    result = call(text, tmp_path / "stories.txt", "--out", tmp_path / "set", *options)
    assert result.code == 0 and not result.err
    train, val = (split_documents(tmp_path / "set", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(stories)
    assert len(list((tmp_path / "set").iterdir())) == 3


def test_tokenizer_is_reused(tmp_path: Path, corpus: Path, built_sample: tuple[Path, Path], stories: list[str]) -> None:
    model = built_sample[0] / "sample_1024_bpe.model"
    assert call(text, corpus, "--out", tmp_path / "set", "--tokenizer", model, "--threads", 1).code == 0
    assert (tmp_path / "set" / model.name).read_bytes() == model.read_bytes()
    assert len(split_documents(tmp_path / "set", "train")) == len(stories) - 1


def test_defects_are_counted(tmp_path: Path, stories: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, document in enumerate([*stories[:20], stories[0], stories[1] + "\n\n", " \n", ""]):
        (folder / f"{number:02}.txt").write_text(document)
    (folder / "latin1.txt").write_bytes("Café au lait".encode("latin1"))
    (folder / "notes.pdf").write_bytes(b"%PDF")
    result = call(text, folder, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 1)
    assert result.code == 0
    assert "2 duplicates dropped, 2 empty, 1 not UTF-8, 1 files of other kinds" in result.out
    assert "Caf\ufffd au lait" in split_documents(tmp_path / "set", "train") + split_documents(tmp_path / "set", "val")


def test_a_dataset_that_is_there_is_never_touched(tmp_path: Path, corpus: Path) -> None:
    arguments = corpus, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 1
    assert call(text, *arguments).code == 0
    before = contents(tmp_path / "set")
    assert is_one_line_error(call(text, *arguments, "--seed", 5), "not empty")
    assert contents(tmp_path / "set") == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


MISTAKES = {
    "missing file": (["nothing.txt"], ["nothing.txt does not exist —"]),
    "unknown kind": (["a.pdf"], ["a.pdf is no", ".parquet"]),
    "one document": (["one.txt"], ["1 distinct documents", "--delimiter"]),
    "no document": (["empty"], ["0 distinct documents"]),
    "too little text": (["two.jsonl"], ["few", "--vocab-size"]),
    "vocabulary too large for uint16": (["ok.jsonl", "--vocab-size", 65537], ["65537", "65,536"]),
    "vocabulary too small for bytes": (["ok.jsonl", "--vocab-size", 260], ["261"]),
    "not json": (["bad.jsonl"], ["bad.jsonl line 2"]),
    "no text field": (["field.jsonl"], ["field.jsonl line 1", "`text`"]),
    "text is a number": (["number.jsonl"], ["number.jsonl line 1"]),
    "damaged gzip": (["cut.txt.gz"], ["cut.txt.gz", "damaged"]),
    "damaged parquet": (["bad.parquet"], ["parquet"]),
    "not a model": (["ok.jsonl", "--tokenizer", "bad.jsonl"], ["bad", "--tokenizer"]),
    "no such model": (["ok.jsonl", "--tokenizer", "no.model"], ["no.model"]),
    "no such model, known before the input is read": (["bad.jsonl", "--tokenizer", "no.model"], ["no.model"]),
    "bad option": (["ok.jsonl", "--shard-tokens", 0], ["--shard-tokens", "--help"]),
    "shards too large for their header": (["ok.jsonl", "--shard-tokens", 2**31], ["--shard-tokens", "2,147,483,647"]),
    "bad fraction": (["ok.jsonl", "--val-fraction", 1], ["--val-fraction", "between 0 and 1, both excluded"]),
    "all for validation": (["ok.jsonl", "--val-fraction", 0.999], ["--val-fraction 0.999 of 60", "lower it"]),
    "nothing to do": ([], ["INPUT"]),
    "output is a file": (["ok.jsonl", "--out", "a.pdf"], ["a.pdf", "choose another folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path, mistake: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    files = {
        "a.pdf": b"%PDF",
        "one.txt": b"one document",
        "two.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "ok.jsonl": corpus.read_bytes(),
        "bad.jsonl": b'{"text": "one"}\n{"text": \n',
        "field.jsonl": b'{"txt": "one"}\n',
        "number.jsonl": b'{"text": 1}\n',
        "cut.txt.gz": gzip.compress(os.urandom(999))[:500],
        "bad.parquet": b"PAR1 or not",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    arguments, words = MISTAKES[mistake]
    assert is_one_line_error(call(text, "--out", "set", "--threads", 1, *arguments), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "empty"])


def test_damaged_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    (tmp_path / "cut.txt.zst").write_bytes(zstandard.compress(os.urandom(9999))[:5000])
    assert is_one_line_error(call(text, tmp_path / "cut.txt.zst", "--out", tmp_path / "set"), "cut.txt.zst", "damaged")


def test_optional_packages_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).touch()
    for package in ("pyarrow", "tqdm", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    assert is_one_line_error(call(text, tmp_path / "a.parquet", "--out", tmp_path / "set"), "pip install tqdm")
    monkeypatch.delitem(sys.modules, "tqdm")
    for name in ("a.parquet", "a.txt.zst"):
        assert is_one_line_error(call(text, tmp_path / name, "--out", tmp_path / "set"), "pip install pyarrow")
    assert is_one_line_error(call(fineweb, "--out", tmp_path / "set"), "pip install huggingface_hub")


def test_a_document_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "big.txt").write_bytes(b"word " * 400_000)
    result = call(text, tmp_path / "big.txt", "--out", tmp_path / "set")
    assert is_one_line_error(result, "big.txt", "1 MiB", "--delimiter")


def test_input_that_changes_while_it_is_read(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(corpus.read_bytes())
    train_tokenizer = text.train_tokenizer

    def train_and_append(pieces: list[str], vocab_size: int) -> bytes:
        with path.open("a") as file:
            file.write('{"text": "late"}\n')
        return train_tokenizer(pieces, vocab_size)

    monkeypatch.setattr(text, "train_tokenizer", train_and_append)
    result = call(text, path, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 1)
    assert is_one_line_error(result, "changed") and not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 2)]
)
def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    def write_and_fail(writer: text.ShardWriter, document: np.ndarray) -> None:
        if writer.documents == 10:
            raise failure
        write(writer, document)

    write = text.ShardWriter.write
    monkeypatch.setattr(text.ShardWriter, "write", write_and_fail)
    result = call(text, corpus, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 1)
    assert result.code == code and len(result.err.splitlines()) == 1 and " — " in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path, kill: signal.Signals) -> None:
    (tmp_path / "in.txt").write_text("one|two|three")
    os.mkfifo(tmp_path / "endless.model")
    options = "--delimiter", "|", "--tokenizer", tmp_path / "endless.model"
    command = [sys.executable, DATA / "text.py", tmp_path / "in.txt", "--out", tmp_path / "set", *options]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(list(tmp_path.iterdir())) == 2:
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(kill)
    run.communicate(timeout=20)
    for name in ("in.txt", "endless.model"):
        (tmp_path / name).unlink()
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([f"set.partial-{run.pid}"] if kill == signal.SIGKILL else [])
    assert run.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(tmp_path: Path, corpus: Path, terminal: bool) -> None:
    arguments = corpus, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 1
    result = call(text, *arguments, terminal=terminal)
    assert result.code == 0
    assert ("reading" in result.err and "encoding" in result.err and "/60" in result.err) == terminal
    assert terminal or not result.err


# ---------------------------------------------------------------------------------------------- sample.py


def test_sample_is_the_same_whatever_the_hash_seed(built_sample: tuple[Path, Path]) -> None:
    first, second = map(contents, built_sample)
    hint = f"if {built_sample[1]} is of another Python or sentencepiece, remove it"
    assert first == second and set(first) == set(sample.FILES), hint


def test_sample_validation_is_small_varied_and_disjoint(built_sample: tuple[Path, Path]) -> None:
    out = built_sample[0]
    tokens = split_tokens(out, "val")
    lengths = np.diff(np.append(np.flatnonzero(tokens == 1), len(tokens)))
    assert 10 <= len(lengths) <= 20 and 10_000 <= len(tokens) <= 14_000
    assert (lengths < 300).sum() >= 3 and ((lengths >= 1000) & (lengths < 2500)).sum() >= 3 and lengths.max() > 2500

    train, val = (split_documents(out, split) for split in ("train", "val"))
    paragraphs = [{p.strip() for document in side for p in document.split("\n\n")} - {""} for side in (train, val)]
    assert not paragraphs[0] & paragraphs[1]
    assert len(train) > 200 and 1_000_000 < sum(len(document.encode()) for document in train + val) < 3_000_000
    assert len(set(train + val)) == len(train + val)


def test_sample_that_is_there_is_left_alone(built_sample: tuple[Path, Path]) -> None:
    out = built_sample[0]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    result = call(sample, "--out", out)
    assert result.code == 0 and "complete already" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_sample_validation_needs_enough_documents() -> None:
    with pytest.raises(common.UserError, match="too little documentation"):
        sample.choose_validation([np.ones(500, dtype=np.uint16)] * 100)


def test_sample_loses_a_race_in_peace(
    built_sample: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sample"

    def other_run_finishes_first(place: Path) -> None:
        out.mkdir()
        for path in built_sample[0].iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        with common.new_directory(place):
            pass

    monkeypatch.setattr(sample, "build", other_run_finishes_first)
    assert call(sample, "--out", out).code == 0


# ---------------------------------------------------------------------------------------------- fineweb.py

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shard(tokens: int) -> bytes:
    return np.array([20240520, 1, tokens] + [0] * 253, dtype="<i4").tobytes() + np.ones(tokens, dtype="<u2").tobytes()


class LoopbackHub(ThreadingHTTPServer):
    """Serves `files` as the hub serves a dataset repository; `cut`, `broken` and `token` make it misbehave."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.cut: set[str] = set()  # paths whose next transfer ends half way
        self.broken: set[str] = set()  # paths that cannot be transferred
        self.slow: dict[str, threading.Event] = {}  # paths whose second half waits for an event
        self.token: str | None = None
        self.sent: list[tuple[str, int]] = []  # (path, first byte) of every transfer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        resolve = f"/datasets/{fineweb.REPO}/resolve/{COMMIT}/"
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif self.path.startswith(f"/api/datasets/{fineweb.REPO}/tree/{COMMIT}"):
            sizes = {name: len(data) for name, data in self.server.files.items()}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.reply(200, json.dumps(tree).encode())
        elif self.path.startswith(f"/api/datasets/{fineweb.REPO}"):
            self.reply(200, json.dumps({"id": fineweb.REPO, "sha": COMMIT, "siblings": []}).encode())
        elif self.path.startswith(resolve) and (name := self.path.removeprefix(resolve)) in self.server.files:
            self.send_file(name, self.server.files[name])
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})

    def send_file(self, name: str, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name in self.server.broken:
            self.reply(500, b"")
            return
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.server.sent.append((name, start))
        cut = self.command == "GET" and name in self.server.cut
        self.server.cut -= {name} if cut else set()
        self.reply(206 if requested else 200, data[start:], headers, cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            half = len(body) // 2
            self.wfile.write(body[:half])
            for path, event in self.server.slow.items():
                if self.path.endswith(path):
                    self.wfile.flush()
                    event.wait(30)
            self.wfile.write(b"" if cut else body[half:])
        self.close_connection = self.close_connection or cut


def hub_files(model: bytes) -> dict[str, bytes]:
    """The files of a repository with three training shards and one validation shard of the variant sp1024."""
    manifest = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1},
            },
            {
                "name": "fineweb10B_byte260",
                "tokenizer_name": "pure_byte_260",
                "stats": {"files_train": 1, "files_val": 1},
            },
        ],
        "tokenizers": [
            {"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"},
            {"name": "pure_byte_260", "path": "tokenizers/fineweb_pure_byte_260.json"},
        ],
    }
    folder = "datasets/datasets/fineweb10B_sp1024"
    return {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": model,
        f"{folder}/fineweb_val_000000.bin": shard(1000),
        **{f"{folder}/fineweb_train_{i:06d}.bin": shard(100_000 + i) for i in range(3)},
    }


@pytest.fixture
def loopback(built_sample: tuple[Path, Path]) -> Iterator[LoopbackHub]:
    """A hub with hub_files()."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    server = LoopbackHub(hub_files((built_sample[0] / "sample_1024_bpe.model").read_bytes()))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(endpoint: str, out: Path, *arguments: object, **environment: str) -> Result:
    """Runs fineweb.py against an endpoint, without the token and cache of whoever runs the tests."""
    kept = [name for name in os.environ if not name.startswith("HF_") and "proxy" not in name.lower()]
    clean = {name: os.environ[name] for name in kept}
    run = subprocess.run(
        [sys.executable, "fineweb.py", "--out", out, *map(str, arguments)],
        cwd=DATA,
        env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "hf"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return Result(run.returncode, run.stdout, run.stderr)


FOLDER = "datasets/fineweb10B_sp1024"


def test_download_survives_a_broken_transfer(loopback: LoopbackHub, tmp_path: Path) -> None:
    out, name = tmp_path / "data", f"datasets/{FOLDER}/fineweb_train_000001.bin"
    loopback.files[name] = shard(12_000_000)  # huggingface_hub keeps what it got in steps of 10 MB
    loopback.cut.add(name)
    result = download(loopback.url, out, "--train-shards", 2)
    assert result.code == 0 and not result.err and "12,101,000 tokens in 3 shards" in result.out
    assert [start > 0 for path, start in loopback.sent if path == name] == [False, True]
    for path in (f"{FOLDER}/fineweb_val_000000.bin", f"{FOLDER}/fineweb_train_000001.bin"):
        assert (out / path).read_bytes() == loopback.files[f"datasets/{path}"]
    text.load_tokenizer((out / "tokenizers" / "fineweb_1024_bpe.model").read_bytes(), "x")
    assert sorted(path.name for path in out.iterdir()) == ["datasets", "tokenizers"]


def test_download_goes_on_after_a_failure(loopback: LoopbackHub, tmp_path: Path) -> None:
    out, name = tmp_path / "data", f"datasets/{FOLDER}/fineweb_train_000002.bin"
    loopback.broken.add(name)
    assert is_one_line_error(download(loopback.url, out, "--train-shards", 3), "fineweb_train_000002.bin", "again")
    loopback.broken.clear()
    loopback.sent.clear()
    assert download(loopback.url, out, "--train-shards", 3).code == 0
    assert [path for path, _ in loopback.sent if path.endswith(".bin")] == [name]

    (out / name.removeprefix("datasets/")).write_bytes(shard(9)[:-1])
    result = download(loopback.url, out, "--train-shards", 3)
    assert is_one_line_error(result, "fineweb_train_000002.bin", "delete it")


class Hub:
    """Stands for fineweb.fetch(): a repository with hub_files(), whose newest commit can change."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.newest = "a" * 40
        self.asked: list[tuple[str, str]] = []  # (file, commit)

    def fetch(self, paths: list[str], staging: Path, commit: str | None = None) -> str:
        commit = commit or self.newest
        for path in paths:
            self.asked.append((path, commit))
            place = staging / "datasets" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.files[f"datasets/{path}"])
        return commit


@pytest.fixture
def hub(built_sample: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(hub_files((built_sample[0] / "sample_1024_bpe.model").read_bytes()))
    monkeypatch.setattr(fineweb, "fetch", found.fetch)
    return found


def test_all_is_of_one_commit_over_several_runs(hub: Hub, tmp_path: Path) -> None:
    def run(shards: int) -> Result:
        hub.asked.clear()
        result = call(fineweb, "--out", tmp_path, "--train-shards", shards)
        assert result.code == 0, result.err
        return result

    note = tmp_path / FOLDER / fineweb.KEPT
    assert str(note) not in run(1).out
    hub.newest = "b" * 40
    assert f"delete {note} for the newest" in run(2).out
    assert hub.asked == [("manifest.json", "a" * 40), (f"{FOLDER}/fineweb_train_000001.bin", "a" * 40)]
    note.unlink()
    run(3)
    assert {commit for _, commit in hub.asked} == {"b" * 40} and not note.exists()  # shards are of two now
    note.write_text("x")
    assert is_one_line_error(call(fineweb, "--out", tmp_path), str(note), "delete it")


@pytest.mark.parametrize("content", [b"", b"no model", shard(9)])
def test_a_tokenizer_that_is_there_and_damaged_is_found_before_the_download(
    hub: Hub, tmp_path: Path, content: bytes
) -> None:
    model = tmp_path / "tokenizers" / "fineweb_1024_bpe.model"
    model.parent.mkdir()
    model.write_bytes(content)
    result = call(fineweb, "--out", tmp_path, "--train-shards", 1)
    assert is_one_line_error(result, str(model), "delete it, then run this again") and len(hub.asked) == 1
    model.unlink()
    assert call(fineweb, "--out", tmp_path, "--train-shards", 1).code == 0


def test_two_downloads_into_one_folder_both_end_well(loopback: LoopbackHub, tmp_path: Path) -> None:
    out, name = tmp_path / "data", "fineweb_train_000001.bin"
    loopback.files[f"datasets/{FOLDER}/{name}"] = shard(12_000_000)
    loopback.slow[name] = threading.Event()
    results: dict[int, Result] = {}

    def run(shards: int) -> None:
        results[shards] = download(loopback.url, out, "--train-shards", shards)

    runs = [threading.Thread(target=run, args=[shards]) for shards in (2, 1)]
    runs[0].start()
    while not any(path.endswith(name) for path, _ in loopback.sent):
        assert runs[0].is_alive()
        time.sleep(0.02)
    runs[1].start()
    runs[1].join(4)  # time enough to end and to take away what the other has half
    loopback.slow[name].set()
    for thread in runs:
        thread.join()
    assert [results[shards].code for shards in (2, 1)] == [0, 0], results
    assert (out / FOLDER / name).read_bytes() == loopback.files[f"datasets/{FOLDER}/{name}"]
    assert [start for path, start in loopback.sent if path.endswith(name)] == [0]
    assert not list(out.rglob("*.partial"))


def test_shards_may_lie_on_another_file_system(loopback: LoopbackHub, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    (tmp_path / "data").mkdir()
    with tempfile.TemporaryDirectory(dir=memory) as other:
        (tmp_path / "data" / "datasets").symlink_to(other)
        result = download(loopback.url, tmp_path / "data", "--train-shards", 1)
        assert result.code == 0, result.err
        assert (Path(other) / "fineweb10B_sp1024" / "fineweb_train_000000.bin").stat().st_size == 1024 + 200_000


@pytest.mark.parametrize("wrong", [b"<html>Not the file</html>" * 99, shard(50)[:-2], shard(50) + b"\0\0", shard(0)])
def test_download_refuses_a_wrong_file(hub: Hub, tmp_path: Path, wrong: bytes) -> None:
    hub.files[f"datasets/{FOLDER}/fineweb_train_000000.bin"] = wrong
    result = call(fineweb, "--out", tmp_path / "data", "--train-shards", 1)
    assert is_one_line_error(result, f"error: {FOLDER}/fineweb_train_000000.bin is not", "run it again")
    assert "partial" not in result.err and "delete" not in result.err
    assert not list(tmp_path.rglob("fineweb_train_000000.bin"))


def test_download_refuses_a_wrong_tokenizer(hub: Hub, tmp_path: Path) -> None:
    hub.files["datasets/tokenizers/fineweb_1024_bpe.model"] = b"no model"
    result = call(fineweb, "--out", tmp_path / "data", "--train-shards", 1)
    assert is_one_line_error(result, "error: tokenizers/fineweb_1024_bpe.model is not", "run it again")
    assert "--tokenizer" not in result.err and not list(tmp_path.rglob("*.model"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant", "sp9999"], ["sp9999", "byte260, sp1024"]),
        (["--variant", "byte260"], ["SentencePiece"]),
        (["--train-shards", 4], ["3 training shards"]),
    ],
)
def test_download_mistakes(hub: Hub, tmp_path: Path, arguments: list[object], words: list[str]) -> None:
    assert is_one_line_error(call(fineweb, "--out", tmp_path / "data", *arguments), *words)


def test_download_needs_and_takes_a_token(loopback: LoopbackHub, tmp_path: Path) -> None:
    loopback.token = "hf_secret"
    assert is_one_line_error(download(loopback.url, tmp_path / "data"), "HF_TOKEN")
    assert download(loopback.url, tmp_path / "data", "--train-shards", 1, HF_TOKEN="hf_secret").code == 0


def test_download_offline(loopback: LoopbackHub, tmp_path: Path) -> None:
    unreachable = "http://127.0.0.1:9"
    assert is_one_line_error(download(unreachable, tmp_path / "data"), unreachable, "connection")
    assert is_one_line_error(download(loopback.url, tmp_path / "data", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), ["a.bin", "No space left", "free some space"]),
        (MemoryError(), ["memory ran out"]),
    ],
)
def test_download_without_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: huggingface_hub.DatasetInfo(id="a", sha="b"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert is_one_line_error(call(fineweb, "--out", tmp_path / "data"), *words)


@pytest.mark.parametrize("manifest", [{}, [], {"datasets": [{}], "tokenizers": []}, {"datasets": 1, "tokenizers": 2}])
def test_manifest_of_another_form(manifest: object) -> None:
    with pytest.raises(common.UserError, match="another form"):
        fineweb.find_variant(json.dumps(manifest).encode(), "sp1024")


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        *(("model_path", x) for x in (5, ["a"], "/etc/x", "../x", "a/../../x", "a//x", ".", "a\\x", "*", "a\n")),
        *(("name", "fineweb10B_sp1024" + x) for x in ("/..", "/../../..", "\0")),
        *(("files_val", x) for x in (0, -1, "1", 1.0, True, None, 10**9)),
        ("files_train", "80"),
        ("files_train", 10**9),
    ],
)
def test_manifest_that_names_what_no_dataset_has(place: str, wrong: object) -> None:
    entry = {"name": "fineweb10B_sp1024", "tokenizer_name": "t"}
    model = {"name": "t", "model_path": "tokenizers/a.model"}
    stats = {"files_val": 1, "files_train": 9}
    manifest = {"datasets": [entry | {"stats": stats}], "tokenizers": [model]}
    assert len(fineweb.find_variant(json.dumps(manifest).encode(), "sp1024", 2)) == 4
    for part in (entry, model, stats):
        part |= {place: wrong} if place in part and (place, part) != ("name", model) else {}
    manifest = {"datasets": [entry | {"stats": stats}], "tokenizers": [model]}
    variant = entry["name"].removeprefix("fineweb10B_")
    with pytest.raises(common.UserError, match="the manifest of .* another form"):
        fineweb.find_variant(json.dumps(manifest).encode(), variant, 2)
