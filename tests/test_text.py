"""Tests of what the data tools share and of text.py where things go wrong: consoles, disks, folders, odd text."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import itertools
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sentencepiece as spm
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import DATA, Result, call, common, compare, fineweb, is_one_line_error, plot, record, sample, text

FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
OPTIONS = "--vocab-size", 300, "--threads", 1


def written(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(count)]


def write_corpus(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in written(count)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    write_corpus(path, 40)
    return path


def documents(out: Path) -> list[str]:
    """All documents of a dataset, decoded."""
    (model,) = out.glob("*.model")
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    found = []
    for path in sorted(out.glob("*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024)
        found += [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]
    return found


# ---------------------------------------------------------------------------------------------- consoles


def gone() -> io.TextIOWrapper:
    """A terminal whose other end was closed: EIO."""
    ours, theirs = pty.openpty()
    os.close(ours)
    return open(theirs, "w")


def unread() -> io.TextIOWrapper:
    """A pipe that nobody reads: EPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def of_ascii() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "ascii")


CONSOLES = [gone, unread, full, of_ascii]


@pytest.mark.parametrize("console", CONSOLES)
def test_no_console_costs_a_dataset(tmp_path: Path, corpus: Path, console: Callable[[], io.TextIOWrapper]) -> None:
    out = tmp_path / "läufe"
    with console() as stream:
        assert call(text, corpus, "--out", out, *OPTIONS, stdout=stream, stderr=stream).code == 0
    assert sorted(documents(out)) == sorted(written(40))


@pytest.mark.parametrize("console", CONSOLES)
def test_no_console_changes_the_code_of_an_error(tmp_path: Path, console: Callable[[], io.TextIOWrapper]) -> None:
    with console() as stream:
        assert call(text, tmp_path / "fehlt–", "--out", tmp_path / "x", stdout=stream, stderr=stream).code == 2


@FAST
@given(st.text(st.characters(exclude_categories=[])), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_any_text_can_be_said_and_is_read_again(said: str, encoding: str) -> None:
    buffer = io.BytesIO()
    console = common.Console(io.TextIOWrapper(buffer, encoding, newline=""))
    print(said, file=console)
    assert console.lost is None
    shown = buffer.getvalue().decode(encoding)
    assert shown == said.encode(encoding, "backslashreplace").decode(encoding) + "\n"


def test_a_pipe_that_closes_ends_quietly(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, DATA / "text.py", corpus, "--out", tmp_path / "set", *OPTIONS]
    with unread() as stream:
        run = subprocess.run([*map(str, command)], stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(documents(tmp_path / "set")) == 40


# ---------------------------------------------------------------------------------------------- errors and their names


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.txt"), ["a.txt", "ulimit -n"]),
        (OSError(errno.EFBIG, "File too large", "a.bin"), ["a.bin", "ulimit -f"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.bin"), ["a.bin", "space", "quota"]),
        (OSError(errno.EACCES, "Permission denied", "a"), ["a: Permission denied", "permissions"]),
        (MemoryError(), ["memory"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["memory ran out", "less at once"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["memory ran out", "less at once"]),
        (RuntimeError("can't start new thread"), ["thread", "ulimit -u", "--threads"]),
        (ModuleNotFoundError("No module named 'tqdm'", name="tqdm.std"), ["pip install tqdm"]),
        (ModuleNotFoundError("No module named '_lzma'", name="_lzma"), ["this needs the module _lzma"]),
        (RuntimeError("Resource temporarily unavailable"), ["thread", "ulimit -u"]),
    ],
)
def test_an_error_is_called_by_its_cause(error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(text, "find_files", fail)
    result = call(text, "a.txt", "--out", "b")
    assert is_one_line_error(result, *words) and ("pip install" in result.err) == ("tqdm" in result.err)


def test_an_option_is_advised_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[Path]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(plot, "read_runs", fail)
    result = call(plot, "a", "--out", "b")
    assert is_one_line_error(result, "ulimit -u") and "--threads" not in result.err


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_files", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(text, "a.txt", "--out", "b")


def test_no_more_threads_is_one_line_and_leaves_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = call(text, corpus, "--out", tmp_path / "set", "--vocab-size", 300, "--threads", 4)
    assert is_one_line_error(result, "thread", "--threads")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


PLACES = [
    (text, ["", "--out", "x"]),
    (text, ["in.jsonl", "--out", ""]),
    (text, ["in.jsonl", "--tokenizer", "", "--out", "x"]),
    (fineweb, ["--out", " "]),
    (sample, ["--out", ""]),
    (record, ["run", "--out", ""]),
    (record, ["run", "--folder", ""]),
    (record, [""]),
    (compare, ["run", ""]),
    (plot, ["run", "--out", ""]),
    (plot, ["", "--out", "x"]),
    (plot, ["run", "--out", "a\0b"]),
]


@pytest.mark.parametrize(("tool", "arguments"), PLACES)
def test_an_empty_path_is_not_the_folder_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_one_line_error(call(tool, *arguments), "is no path")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["/", ".", "..", "a/.."])
def test_a_picture_needs_a_name(tmp_path: Path, out: str) -> None:
    (tmp_path / "log.txt").write_text("Code size: 1 bytes\n")
    assert is_one_line_error(call(plot, tmp_path / "log.txt", "--out", out), out, "names no file")


def test_links_in_a_circle_are_one_line(tmp_path: Path, corpus: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert is_one_line_error(call(text, corpus, "--out", loop, *OPTIONS), "loop", "circle")
    with pytest.raises(OSError, match="loop"):
        common.write_atomic(loop, b"")


@pytest.mark.parametrize("tool", [text, fineweb, sample, record, compare, plot])
def test_help_that_is_lost_is_an_error(tool: ModuleType) -> None:
    assert call(tool, "--help").out.startswith("usage: ")
    with full() as stream:
        assert is_one_line_error(call(tool, "--help", stdout=stream), "standard output", "No space left")
    with unread() as stream:
        assert call(tool, "--help", stdout=stream).code == 0


def test_help_without_a_console_is_an_error() -> None:
    command = f"exec {sys.executable} {DATA / 'record.py'} --help >&-"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert is_one_line_error(Result(run.returncode, run.stdout, run.stderr), "standard output", "closed")


# ---------------------------------------------------------------------------------------------- signals

TOOLS = ["text", "fineweb", "sample", "compare", "plot", "audit", "compress", "generate"]  # record.py imports none


def with_numpy(folder: Path, source: str, tool: str) -> subprocess.CompletedProcess:
    """Runs a tool that imports this for numpy, the first package that each of them imports."""
    (folder / "numpy.py").write_text(source)
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, DATA / f"{tool}.py"], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_while_a_tool_imports_is_quiet(tmp_path: Path, tool: str) -> None:
    run = with_numpy(tmp_path, "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)", tool)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")  # of which a shell makes 130


@pytest.mark.parametrize("tool", ["sample", "compress"])
def test_a_package_that_is_missing_is_one_line(tmp_path: Path, tool: str) -> None:
    run = with_numpy(tmp_path, "raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')", tool)
    assert is_one_line_error(Result(run.returncode, run.stdout, run.stderr), "pip install numpy")


def test_a_tool_that_is_imported_leaves_signals_alone() -> None:
    code = "import signal, text; assert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=DATA, check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_further_signals_do_not_disturb_the_cleaning(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rmtree = shutil.rmtree

    def stop(*_: object) -> None:
        os.kill(os.getpid(), number)

    def disturbed(*arguments: object, **options: object) -> None:
        stop()
        rmtree(*arguments, **options)

    def train(*_: object) -> None:
        try:
            stop()
        finally:
            stop()  # as by who presses it twice

    monkeypatch.setattr(text, "train_tokenizer", train)
    monkeypatch.setattr(shutil, "rmtree", disturbed)
    result = call(text, corpus, "--out", tmp_path / "set", *OPTIONS)
    assert result.code == 128 + number
    assert result.err == ("error: interrupted — run it again\n" if number == signal.SIGINT else "")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_signal_while_an_error_is_cleaned_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def disturbed(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        rmtree(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", disturbed)
    result = call(text, tmp_path, "--out", tmp_path / "set", *OPTIONS)
    assert is_one_line_error(result, "0 distinct documents") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 1000), (signal.SIGTERM, 1000), (signal.SIGTERM, 40)])
def test_training_a_tokenizer_is_interrupted(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, number: int, count: int
) -> None:
    """Within SentencePiece no signal is heard, so that it runs in a process of its own. It may not have read all."""
    write_corpus(corpus, count)
    started = tmp_path / "started"
    code = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    monkeypatch.setattr(text, "TRAINER", code)

    def stop() -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    began = time.monotonic()
    result = call(text, corpus, "--out", tmp_path / "set", *OPTIONS)
    thread.join()
    assert result.code == 128 + number and time.monotonic() - began < 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "started"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ("raise MemoryError", ["memory ran out"]),
        ("import os, sys; sys.stderr.write('what(): std::bad_alloc'); sys.stderr.flush(); os.abort()", ["memory ran"]),
        ("import os; os.kill(os.getpid(), 9)", ["SIGKILL ended the process that trained the tokenizer"]),
    ],
)
def test_training_that_fails_is_one_line(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, words: list[str]
) -> None:
    write_corpus(corpus, 1000)  # more than a pipe holds
    monkeypatch.setattr(text, "TRAINER", trainer)
    assert is_one_line_error(call(text, corpus, "--out", tmp_path / "set", *OPTIONS), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_signal_that_comes_later_ends_what_is_stuck(tmp_path: Path) -> None:
    code = f"""
import common, os, signal
def main(parser):
    common.PATIENCE = 0
    try:
        os.kill(os.getpid(), {int(signal.SIGTERM)})
    finally:
        os.kill(os.getpid(), {int(signal.SIGTERM)})
        print("still there")
common.run_tool(main)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=DATA, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (143, "", "")


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a full disk, but EFBIG: no file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 500, 1024, 3000])
def test_a_shard_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path, corpus: Path, size: int) -> None:
    model = tmp_path / "m.model"
    model.write_bytes(text.train_tokenizer(written(40), 300))
    with file_size_limit(size):
        result = call(text, corpus, "--out", tmp_path / "set", "--tokenizer", model, "--threads", 1)
    assert is_one_line_error(result, "set.partial-", "File too large", "larger files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "m.model"]


@pytest.mark.parametrize("size", [0, 1, 999])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, size: int) -> None:
    path, link = tmp_path / "real", tmp_path / "link"
    path.write_bytes(b"before")
    link.symlink_to(path)
    with file_size_limit(size), pytest.raises(OSError, match="File too large: .*real") as caught:
        common.write_atomic(link, bytes(1000))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before" and {p.name for p in tmp_path.iterdir()} == {"real", "link"}
    common.write_atomic(link, b"after")
    assert path.read_bytes() == b"after" and link.is_symlink()


def test_a_file_that_cannot_be_made_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        common.write_atomic(tmp_path / "none" / "a.json", b"")
    assert caught.value.filename == str(tmp_path / "none" / "a.json")


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    common.write_atomic(tmp_path / "pipe", b"content")
    assert os.read(reading, 99) == b"content" and (tmp_path / "pipe").is_fifo()
    os.close(reading)


# ---------------------------------------------------------------------------------------------- folders


def begun(*_: object) -> None:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("place", ["pipe.txt", "socket.txt", "device.txt"])
def test_a_pipe_a_socket_or_a_device_is_no_folder(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    special_files(tmp_path)
    monkeypatch.setattr(text, "build", begun)
    assert is_one_line_error(call(text, corpus, "--out", tmp_path / place, *OPTIONS), f"{place} is a pipe", "another")


def test_a_sample_that_cannot_be_written_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "documents", begun)
    assert is_one_line_error(call(sample, "--out", tmp_path / "file" / "sample"), "Not a directory")


@pytest.mark.parametrize("tool", [text, sample, fineweb])
def test_a_dataset_whose_name_no_setting_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType
) -> None:
    """DATA_PATH could not name it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\nb").mkdir()
    inputs = ["a.txt"] if tool is text else []
    for name in ("new\nline", "bell\a/set", "caf\udce9", "a\nb"):
        assert is_one_line_error(call(tool, *inputs, "--out", name), ascii(name), "DATA_PATH", "another name")
    monkeypatch.chdir(tmp_path / "a\nb")
    assert is_one_line_error(call(tool, *inputs, "--out", "."), "DATA_PATH")
    assert [path.name for path in tmp_path.iterdir()] == ["a\nb"]


def test_an_empty_folder_that_cannot_be_replaced_is_filled(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "mount", Path.rename

    def busy(path: Path, target: Path) -> Path:
        if Path(target) == out:  # what the system says of a mount point
            raise OSError(errno.EBUSY, "Device or resource busy", str(path), None, str(target))
        return rename(path, target)

    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", busy)
    assert call(text, corpus, "--out", out, *OPTIONS).code == 0
    assert sorted(documents(out)) == sorted(written(40))
    assert {path.suffix for path in out.iterdir() if path.name != "lost+found"} == {".bin", ".model"}


def test_a_failure_leaves_an_empty_folder_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError), common.new_directory(tmp_path / "out") as folder:
        (folder / "a").touch()
        1 / 0  # noqa: B018
    assert not list((tmp_path / "out").iterdir())


def test_two_runs_never_mix_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", itertools.count(1).__next__)
    for there in (False, True):
        out = tmp_path / f"out{there}"
        if there:
            out.mkdir()
        with pytest.raises(common.UserError, match="not empty|another run"), common.new_directory(out) as first:
            (first / "a").write_text("first")
            with common.new_directory(out) as second:
                (second / "b").write_text("second")
        assert [path.name for path in out.iterdir()] == ([] if there else ["b"])
    assert len(list(tmp_path.iterdir())) == 2


def texts_of(folder: Path) -> list[str]:
    files, _ = text.find_files([folder])
    return [content for _, content in text.read_documents(files, "", 0, Counter())]


def test_linked_folders_and_files_are_read_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for place in (folder, elsewhere / "deep"):
        place.mkdir(parents=True)
    for number, document in enumerate(written(3)):
        [folder, elsewhere, elsewhere / "deep"][number].joinpath(f"{number}.txt").write_text(document)
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "deep" / "back").symlink_to(folder)  # a circle
    (folder / "nowhere.txt").symlink_to(tmp_path / "gone")
    files, others = text.find_files([folder])
    assert len(files) == len({path.resolve() for path in files}) == 3 and others == 1
    assert sorted(texts_of(folder)) == sorted(written(3))
    result = call(text, folder, "--out", tmp_path / "set", *OPTIONS)
    assert result.code == 0 and "1 files of other kinds (broken links among them)" in result.out


def test_a_folder_without_text_says_what_is_read(tmp_path):
    (tmp_path / "code.py").write_text("print()")
    assert is_one_line_error(call(text, tmp_path, "--out", tmp_path / "out"), "none of 1 files", ".jsonl")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "locked").mkdir(parents=True)
    for number, document in enumerate(written(30)):
        (tmp_path / "in" / f"{number}.txt").write_text(document)
    scandir = os.scandir

    def refuse(path: object) -> Iterator[os.DirEntry]:
        if str(path).endswith("locked"):  # permissions do not bind who may do everything, as in a container
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = call(text, tmp_path / "in", "--out", tmp_path / "set", *OPTIONS)
    assert is_one_line_error(result, "locked", "Permission denied")


@pytest.mark.parametrize("suffix", [b".txt", b".md.gz", b".jsonl"])
def test_names_that_are_not_utf8_are_read(tmp_path: Path, suffix: bytes) -> None:
    content = {b".txt": b"text", b".md.gz": gzip.compress(b"text"), b".jsonl": b'{"text": "text"}'}[suffix]
    with open(os.fsencode(tmp_path) + b"/caf\xe9" + suffix, "wb") as file:
        file.write(content)
    assert texts_of(tmp_path) == ["text"]
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt.gz", "wb") as file:
        file.write(b"no gzip")
    assert is_one_line_error(call(text, tmp_path, "--out", tmp_path / "set"), "caf", "damaged")


def special_files(folder: Path) -> list[Path]:
    """A pipe that nobody writes to, a socket, and a link to a device without end, all with names of texts."""
    pipe, socket_, device = (folder / f"{name}.txt" for name in ("pipe", "socket", "device"))
    os.mkfifo(pipe)
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as listening:  # a socket's path must be short
        listening.bind(socket_.name)
    device.symlink_to("/dev/zero")
    return [pipe, socket_, device]


def test_pipes_sockets_and_devices_in_a_folder_are_passed_over_and_named(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    special = special_files(folder)
    corpus.rename(folder / "in.jsonl")
    result = call(text, folder, "--out", tmp_path / "set", *OPTIONS)
    assert result.code == 0 and len(documents(tmp_path / "set")) == 40
    first, *_ = result.out.splitlines()
    assert first.startswith("not read") and all(str(path) in first for path in special)


def test_a_pipe_a_socket_or_a_device_is_no_input(tmp_path: Path, corpus: Path) -> None:
    for path in special_files(tmp_path):
        result = call(text, corpus, path, "--out", tmp_path / "set", *OPTIONS)
        assert is_one_line_error(result, path.name, "pipe", "give a file")
    assert not (tmp_path / "set").exists()


# ---------------------------------------------------------------------------------------------- delimiters


@FAST
@given(st.lists(st.text("ab\n", max_size=5)), st.sampled_from(["\n", "\n\n", "a\nb", "\n--\n"]), st.integers(1, 9))
def test_lines_that_end_as_on_windows_are_cut_alike(
    tmp_path: Path, parts: list[str], delimiter: str, read: int
) -> None:
    joined = delimiter.join(parts)
    expected = joined.split(delimiter)
    path = tmp_path / "x.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "READ_BYTES", read)
        for ends in ("\n", "\r\n"):
            path.write_bytes(joined.replace("\n", ends).encode())
            found = [part.decode().replace("\r\n", "\n") for part in text.records(path, delimiter.encode())]
            assert [part for part in found if part] == [part for part in expected if part]


def test_a_delimiter_with_carriage_returns_means_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n\nthree\rfour")
    assert list(text.records(tmp_path / "a.txt", b"\r\n\r\n")) == [b"one", b"two\n\nthree\rfour"]
    (tmp_path / "b.txt").write_text("\r".join(written(30)), newline="")
    result = call(text, tmp_path / "b.txt", "--out", tmp_path / "set", *OPTIONS, "--delimiter", r"\r")
    assert result.code == 0 and sorted(documents(tmp_path / "set")) == sorted(written(30))
    assert "--delimiter" not in result.out


def test_text_that_changes_between_two_readings_is_noticed_whatever_its_lengths(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many documents and bytes as before, in other words: the tokenizer may have seen the validation's."""
    inner = text.train_tokenizer

    def train(*arguments):
        corpus.write_text(corpus.read_text().replace("a", "\0").replace("b", "a").replace("\0", "b"))
        return inner(*arguments)

    monkeypatch.setattr(text, "train_tokenizer", train)
    done = call(text, corpus, "--out", tmp_path / "out", *OPTIONS)
    assert is_one_line_error(done, "the input changed while it was read") and not (tmp_path / "out").exists()


def test_a_link_into_what_cannot_be_looked_into_is_an_error_and_a_broken_one_is_not(tmp_path: Path, monkeypatch):
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("a")
    assert [path.name for path in common.walk(tmp_path)] == ["a.txt", "broken"]
    (tmp_path / "locked").symlink_to(tmp_path / "secret")
    known = Path.stat

    def stat(path, *, follow_symlinks=True):
        if follow_symlinks and path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return known(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(PermissionError, match="locked"):
        common.walk(tmp_path)


def test_a_delimiter_that_cuts_nothing_is_said(tmp_path: Path) -> None:
    for name, part in (("a", written(30)), ("b", written(1, seed=5)), ("c", written(1, seed=6))):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    out = "--out", tmp_path / "set", *OPTIONS
    one = call(text, tmp_path / "a.txt", *out, "--delimiter", "@@")
    assert is_one_line_error(one, "--delimiter leaves 1 of 1 text files whole", "another delimiter")
    result = call(text, tmp_path, *out, "--delimiter", r"\n\n")
    assert result.code == 0 and "--delimiter leaves 2 of 3 text files whole" in result.out
    unset = call(text, tmp_path, "--out", tmp_path / "other", *OPTIONS, "--delimiter", "")
    assert is_one_line_error(unset, "--delimiter", "empty")


# ---------------------------------------------------------------------------------------------- tokenizers


def tokenizer_of(texts: list[str], **options: object) -> bytes:
    """A SentencePiece model as others train them: it normalises."""
    model = io.BytesIO()
    ids = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    shape = dict(vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2)
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **shape | ids | options)
    return model.getvalue()


def test_what_a_tokenizer_loses_is_counted(tmp_path: Path) -> None:
    plain, code = written(20), [f"def f():\n    return  {i}\n\n\nⅧ" for i in range(100, 110)]
    model = tmp_path / "other.model"
    model.write_bytes(tokenizer_of(plain))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in plain + code))
    result = call(text, path, "--out", tmp_path / "set", "--tokenizer", model, "--threads", 2)
    size, decoded = sum(len(document.encode()) for document in code), len(b"def f(): return 100 VIII") * 10
    total = sum(len(document.encode()) for document in plain) + size
    assert f"does not give back 10 of 30 documents: {size:,} bytes became {decoded:,}" in result.out
    assert f"{(total - size + decoded) / total:.1%}" in result.out
    assert documents(tmp_path / "set").count("def f(): return 100 VIII") == 1


def test_what_our_own_tokenizer_gives_back_is_said(tmp_path: Path, corpus: Path) -> None:
    result = call(text, corpus, "--out", tmp_path / "set", *OPTIONS)
    assert "decoding the tokens gives every document back" in result.out
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "a\u2581b"}) + "\n")  # the one character that SentencePiece has for itself
    result = call(text, corpus, "--out", tmp_path / "again", *OPTIONS)
    assert "does not give back 1 of 41 documents: 5 bytes became 3" in result.out


def test_a_bos_that_texts_can_hold_is_refused(tmp_path: Path, corpus: Path) -> None:
    model = tmp_path / "m.model"
    for options in (dict(user_defined_symbols=["<s>"]), dict(bos_id=2, eos_id=1), dict(bos_id=-1)):
        model.write_bytes(tokenizer_of(written(40), **options))
        arguments = corpus, "--out", tmp_path / "set", "--tokenizer", model, "--threads", 1
        assert is_one_line_error(call(text, *arguments), "BOS = 1")


def test_a_bos_within_a_text_is_refused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(tokenizer: spm.SentencePieceProcessor, *_: object, **__: object) -> np.ndarray:
        return np.array([1, 5, 1, 6])

    monkeypatch.setattr(spm.SentencePieceProcessor, "encode", encode)
    result = call(text, corpus, "--out", tmp_path / "set", *OPTIONS)
    assert is_one_line_error(result, "BOS within the text") and not (tmp_path / "set").exists()


def test_a_space_is_a_piece_even_where_training_has_none() -> None:
    texts = [document.replace(" ", "") for document in written(60)]
    for trained in (texts, [*texts, "one space"]):
        tokenizer = text.load_tokenizer(text.train_tokenizer(trained * 40, 300), "x")
        assert tokenizer.encode(" ", out_type=str) == ["<s>", "\u2581"]


def test_characters_that_sentencepiece_keeps_for_itself_do_not_silence_a_text() -> None:
    texts = [document + " \u2585\0" for document in written(60)]
    tokenizer = text.load_tokenizer(text.train_tokenizer(texts, 300), "x")
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert len(tokenizer.encode(texts[0])) < 0.8 * len(texts[0])  # pieces were learnt


@pytest.mark.parametrize("document", ["\u2585" * 98_807, "\0" * 5000, "x" * 5000, "ab" * 3000, "abcdefgh"])
def test_too_few_pieces_are_counted_rightly(document: str) -> None:
    with pytest.raises(common.UserError, match="too few pieces") as caught:
        text.train_tokenizer([document], 600)
    assert f"{len(document):,} characters, {len(set(document))} different ones" in str(caught.value)
    most = int(re.search(r"a vocabulary of (\d+), not 600", str(caught.value))[1])
    assert text.load_tokenizer(text.train_tokenizer([document], most), "x").vocab_size() == most
    with pytest.raises(common.UserError):
        text.train_tokenizer([document], most + 1)


# ---------------------------------------------------------------------------------------------- files of text


def test_a_long_window_is_not_damage(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(b"text " * 99) + packer.flush())
    result = call(text, tmp_path / "a.txt.zst", "--out", tmp_path / "set")
    assert is_one_line_error(result, "a.txt.zst", "window", "--long=31") and "damaged" not in result.err


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_file_is_no_compressed_text(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").touch()
    result = call(text, tmp_path, "--out", tmp_path / "set")
    assert is_one_line_error(result, f"a.txt{suffix} is damaged", "it is empty", "get it again")


def write_table(path: Path, **columns: list) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("a", {"content": ["a"]}, ["no column `text`"]),
        ("b", {"text": [1, 2]}, ["type int64", "strings"]),
        ("c", {"text": ["short", "long" * 300_000]}, ["over 1 MiB"]),
    ],
)
def test_a_table_is_refused_by_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, columns: dict[str, list], words: list[str]
) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = write_table(tmp_path / f"{name}.parquet", **columns)
    result = call(text, path, "--out", tmp_path / "set")
    assert is_one_line_error(result, path.name, *words) and "damaged" not in result.err


# ---------------------------------------------------------------------------------------------- sample.py


def test_an_incomplete_sample_is_to_be_deleted(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Path) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(sample, "build", build)
    out = tmp_path / "sample"
    assert call(text, corpus, "--out", out, "--vocab-size", 300, "--threads", 1).code == 0
    assert is_one_line_error(call(sample, "--out", out), sample.FILES[2], "not the whole sample", "delete it")
    (out / "sample_300_bpe.model").rename(out / sample.FILES[2])
    assert call(sample, "--out", out).code == 0
    for name in sample.FILES:
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        assert is_one_line_error(call(sample, "--out", out), name, "damaged", "delete it")
        (out / name).write_bytes(whole)


def test_a_folder_of_something_else_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    result = call(sample, "--out", tmp_path)
    assert is_one_line_error(result, "no file of the sample", "another --out") and "delete" not in result.err
