"""What the tests through whole processes share: a micro model's settings, its data, and runs.

A run is a fork of a server that has imported torch already: the same `entry()`, without the seconds of the import."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt

gc.freeze()  # what is imported here stays: no collection in a fork walks through it, nor copies its pages
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 300
LENGTHS = [70, 1, 40, 17, 33, 90, 5, 16, 64, 12, 28, 50]  # tokens of the validation documents, BOS included
MICRO = dict(
    DEVICE="cpu", NUM_LAYERS=2, MODEL_DIM=16, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=2, BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=8, VOCAB_SIZE=VOCABULARY, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=256, ITERATIONS=12, WARMDOWN_ITERS=8,
    WARMUP_STEPS=1, MAX_WALLCLOCK_SECONDS=0, VAL_LOSS_EVERY=6, VAL_BATCH_SIZE=1024, TRAIN_LOG_EVERY=5,
    SWA_START_FRAC=0.8, SWA_EVERY=2, EVAL_STRIDE=16, TTT_LORA_RANK=2, TTT_LORA_LR=0.01, TTT_N_EPOCHS=2,
    TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=64, TTT_BATCH_SIZE=6, CALIBRATION_TOKENS=128,
)  # fmt: skip


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard as SPEC section 6 has it, or one that lies."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def documents(lengths: list[int], seed: int) -> np.ndarray:
    """Random documents, each of so many tokens with its BOS."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.append(1, rng.integers(4, VOCABULARY, n - 1)) for n in lengths]).astype(np.uint16)


@functools.cache
def data() -> Path:
    """A folder with two training shards, one validation shard and tokenizer.model, made once."""
    folder = Path(tempfile.mkdtemp(prefix="train_gpt_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for i in range(2):
        write_shard(folder / f"fineweb_train_{i:06}.bin", documents([100, 37, 211, 52] * 5, i))
    write_shard(folder / "fineweb_val_000000.bin", documents(LENGTHS, 7))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(300)]
    (folder / "text").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, model_type="bpe",
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return folder


def environment(folder: Path | str, **settings) -> dict[str, str]:
    """The variables of a micro run into `folder`. A value of None leaves a variable out."""
    files = dict(DATA_PATH=data(), TOKENIZER_PATH=data() / "tokenizer.model", OUTPUT_DIR=folder)
    return {k: str(v) for k, v in (MICRO | files | settings).items() if v is not None}


def alone(folder: Path | str = os.devnull, **settings) -> train_gpt.Run:
    """The micro run in this process."""
    return train_gpt.Run(train_gpt.Settings.from_env(environment(folder, **settings)))


# Imported once by the server: else each of its processes would import pytest and more to find its `before`.
PLANTING = "test_command_line", "test_faults", "test_folders", "test_preflight", "test_ranks", "test_resume"
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # of the environment that tests run in


def _child(env: dict[str, str], out: str, err: str, before: Callable | None) -> None:
    inherited = {name: os.environ[name] for name in KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(inherited | env)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if before:
        before()
    sys.exit(train_gpt.entry())


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.set_forkserver_preload(["runs", *PLANTING])
    return context


class Run:
    """One process of `python train_gpt.py` with its output in `folder`; `before` runs in it first, to plant a fault."""

    def __init__(self, folder: Path, before: Callable | None = None, **settings):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        env = environment(folder, **settings)
        self.paths = [folder / f"console.{settings.get('RANK', 0)}.{name}" for name in ("out", "err")]
        for path in self.paths:
            path.write_text("")
        self.process = _server().Process(target=_child, args=(env, *map(str, self.paths), before), daemon=True)
        self.process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 90) -> int:
        """The exit code as a shell shows it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.out[-500:]}"
        code = self.process.exitcode
        return code if code >= 0 else 128 - code

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait for `text` on the console."""
        deadline = time.monotonic() + seconds
        while text not in self.out:
            alive = self.process.is_alive()
            assert time.monotonic() < deadline and alive, f"no {text!r}: {self.out[-500:]} {self.err[-1500:]}"
            time.sleep(0.005)

    out = property(lambda self: self.paths[0].read_text())
    err = property(lambda self: self.paths[1].read_text())
    lines = property(lambda self: self.out.splitlines())
    log = property(lambda self: (self.folder / "train.log").read_text())
    result = property(lambda self: json.loads((self.folder / "result.json").read_text()))
    artifact = property(lambda self: (self.folder / "final_model.ptz").read_bytes())

    def figures(self, name: str) -> list[list[float]]:
        """The numbers of each line of the log that starts with `name`."""
        lines = [line for line in self.log.splitlines() if line.startswith(name)]
        return [[float(x) for x in re.findall(r":(-?\d+\.\d+)", line)] for line in lines]


def run(folder: Path, code: int = 0, **settings) -> Run:
    """A whole run that must end with `code`."""
    done = Run(folder, **settings)
    assert done.wait() == code, done.err[-3000:]
    return done


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def machine(folder: Path) -> dict:
    """Settings of a machine that shares nothing with another: a copy of the data of its own."""
    if not (folder / "data").exists():
        shutil.copytree(data(), folder / "data")
    return dict(DATA_PATH=folder / "data", TOKENIZER_PATH=folder / "data" / "tokenizer.model")


def launch(folders: list[Path], counts: list[int], each: list[dict] | None = None, **settings) -> list[Run]:
    """One process per rank, as a launcher on each machine would start them: counts[i] of them into folders[i], with the
    settings each[i] besides."""
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    common = dict(WORLD_SIZE=len(places), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) | settings
    started = []
    for rank, (node, local) in enumerate(places):
        own = dict(RANK=rank, LOCAL_RANK=local, GROUP_RANK=node) | (each[node] if each else {})
        started.append(Run(folders[node], **common | own))
    return started


def ranks(folder: Path, world: int = 2, **settings) -> list[Run]:
    """So many ranks of one machine."""
    return launch([folder], [world], **settings)


def codes(processes: list[Run], seconds: float = 90) -> list[int]:
    """The exit codes of all; what they printed is shown if a test fails."""
    ended = [process.wait(seconds) for process in processes]
    print(*(f"rank {i}: {process.err[-1000:]}" for i, process in enumerate(processes) if process.err), sep="\n")
    return ended


def one_error(processes: list[Run]) -> str:
    """The one line of an error that the ranks of one machine print together."""
    return user_error("\n".join(process.err for process in processes))


def line_of(error: Exception) -> str:
    """What a run would print of a user's error or the operating system's."""
    return train_gpt.system_says(error) if isinstance(error, OSError) else str(error)


def user_error(text: str) -> str:
    """The one line of a user's error in `text`, checked for its form: `error: what — what to do`."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text.partition(lines[0])[0], text
    what, _, cure = lines[0].partition(" — ")
    assert what and cure, text
    return lines[0]


def sign(raw: bytes, frame: bytes | None = None, expanded: int | None = None) -> bytes:
    """An artifact of the expanded content `raw` with honest lengths and hash, as an attacker can make it."""
    frame = zstandard.ZstdCompressor(1).compress(raw) if frame is None else frame
    size = len(raw) if expanded is None else expanded
    header = train_gpt.MAGIC + struct.pack("<IQQ", train_gpt.FORMAT, len(frame), size)
    return header + hashlib.sha256(frame).digest() + frame
