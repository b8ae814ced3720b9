"""
Train a 10-layer, 512-wide GPT for ten minutes on 8xH100, squeeze it into 16,000,000 bytes together with this file, and
score the FineWeb validation split in bits per byte with test-time training. Not yet measured on 8xH100.

    PRESET=tiny python train_gpt.py                        # everything below, small, on a laptop CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the record run

For OpenAI's Parameter Golf, after thwu1's 1.1428-bpb record and PR #467 of openai/parameter-golf.
- model: GQA, RoPE, per-head QK norm, relu^2 MLP, U-Net skips, hashed bigram embedding, SmearGate, tied embeddings
- optimiser: Muon (same-shape matrices as one batch, divided over the ranks) and AdamW, on flat buffers
- schedule: warmdown against the wall clock or the iteration count, stochastic weight averaging (SWA)
- export: int5 MLPs and int6 attention by GPTQ, steps stretched until it fits, one zstd-22 frame, no pickle
- evaluation: standard, sliding window, or 50 cosine epochs of rank-8 LoRA on Q and V per document. A figure is
  labelled *backward-looking* only if each token was scored before any update had seen it.

Sections stand in the order of the story, each upon those above it (a Run asks the model's for its dtype and attention
backend). Everywhere `s` is Settings, `run` a Run, `stream` a Stream.
"""

import os
import signal

if __name__ == "__main__":  # until entry() has more to say of it: no traceback of an import
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before torch: a thread that waits for another must not hold a core, which on a busy machine that one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import _thread
import contextlib
import copy
import difflib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import platform
import re
import select
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import zstandard
    from torch import Tensor, nn
    from torch.utils._pytree import tree_leaves
    from torch.utils.checkpoint import checkpoint
except (ImportError, OSError) as e:  # the latter by a library that cannot be loaded
    lacks, why = isinstance(e, ModuleNotFoundError), " ".join(str(e).split())[:200]
    what = f"has no {e.name}" if lacks else f"cannot import what it needs ({why})"
    cure = "install requirements.txt, or activate its environment" if lacks else "mend that, or install it anew"
    print(f"error: {sys.executable} {what} — {cure}", file=sys.stderr)
    sys.exit(2)

SOURCE = Path(__file__).resolve()
SOURCE_BYTES = SOURCE.read_bytes()  # read once: the file may change
SOURCE_SHA256 = hashlib.sha256(SOURCE_BYTES).hexdigest()
SAMPLE = SOURCE.parent / "data" / "sample"
SAMPLE_FILES = "fineweb_train_000000.bin", "fineweb_val_000000.bin", "sample_1024_bpe.model"


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


# ======== Configuration ========
# Every setting is an environment variable: the field's name in capitals. Its class says what a value determines: the
# model (an artifact's header), the trained weights besides (a checkpoint must match), or this session alone.

LORA_TARGETS = ("c_q", "c_k", "c_v", "attn.proj", "mlp.fc", "mlp.proj")  # of every layer, in drawing order
LARGEST = 1e30  # number: float32 holds it times a root of any size
ANY_TARGET = f"({'|'.join(map(re.escape, LORA_TARGETS))})"


class UserError(Exception):
    """`what is wrong — what to do`: the process ends with code 2."""


def setting(default, doc: str, low=0, high=LARGEST, choices=(), form=".*", tiny=None):
    """A field: its documentation, range, choices or pattern, and value under PRESET=tiny."""
    kind = type(default)
    choices = (0, 1) if kind is bool else choices
    allowed = f"printable text like {form}" if kind is str else f"{kind.__name__} from {low} to {high}"
    if choices:
        allowed = f"one of {', '.join(map(str, choices))}"
    rule = dict(doc=doc, low=low, high=high, choices=choices, form=form, tiny=tiny, allowed=allowed)
    return field(default=default, metadata=rule)


def settings(cls):
    """A frozen dataclass; its fields have their defaults' types."""
    cls.__annotations__ = {name: type(f.default) for name, f in vars(cls).items() if isinstance(f, Field)}
    return dataclass(frozen=True)(cls)


@settings
class ModelSettings:
    """What an artifact's header holds."""

    vocab_size = setting(1024, "vocabulary", 260, 65536)
    num_layers = setting(10, "transformer blocks", 2, 256, tiny=4)
    model_dim = setting(512, "width", 8, 16384, tiny=96)
    num_heads = setting(8, "query heads", 1, 256, tiny=2)
    num_kv_heads = setting(4, "key/value heads", 1, 256, tiny=1)
    mlp_mult = setting(3.0, "MLP width / MODEL_DIM", 0.125, 64)
    tie_embeddings = setting(True, "embedding and head are one")
    rope_base = setting(10000.0, "RoPE base", 1)
    logit_softcap = setting(30.0, "largest logit, by tanh", 1e-3)
    bigram_vocab_size = setting(10240, "rows of the bigram table", 2, 1 << 24, tiny=1024)
    bigram_dim = setting(128, "its width", 1, 16384, tiny=32)


@settings
class TrainSettings(ModelSettings):
    """What a checkpoint must have been trained with."""

    seed = setting(42, "of weights and adapters", 0, 2**32 - 1)
    qk_gain_init = setting(1.5, "initial gain of queries", -1000, 1000)
    tied_embed_init_std = setting(0.005, "tied embedding's initial std", 1e-9, 1000)
    iterations = setting(20000, "most steps", tiny=120)
    warmdown_iters = setting(3500, "steps of the decay to zero", tiny=60)
    max_wallclock_seconds = setting(600.0, "training time; 0: no limit", tiny=0.0)
    train_batch_tokens = setting(786432, "tokens per step, all ranks", 1, 1 << 30, tiny=4096)
    train_seq_len = setting(2048, "tokens per row", 2, 1 << 20, tiny=256)
    embed_lr = setting(0.6, "lr of both tables, untied")
    tied_embed_lr = setting(0.03, "lr of both tables, tied")
    head_lr = setting(0.008, "lr of an untied head")
    matrix_lr = setting(0.02, "lr of Muon's matrices")
    scalar_lr = setting(0.02, "lr of everything else")
    muon_momentum = setting(0.99, "Muon's momentum", 0, 1, tiny=0.95)
    muon_backend_steps = setting(5, "Newton-Schulz steps", 1, 100)
    muon_momentum_warmup_start = setting(0.92, "momentum at step 0", 0, 1, tiny=0.85)
    muon_momentum_warmup_steps = setting(1500, "steps to MUON_MOMENTUM", tiny=80)
    beta1 = setting(0.9, "Adam's, LoRA's included", 0, 0.999999)
    beta2 = setting(0.95, "Adam's, LoRA's included", 0, 0.999999)
    adam_eps = setting(1e-8, "Adam's, in training", 1e-30)
    grad_clip_norm = setting(0.3, "largest gradient norm; 0: any")
    weight_decay = setting(0.04, "decoupled, of both methods")
    swa_enabled = setting(True, "average the warmdown's weights")
    swa_start_frac = setting(0.35, "largest lr share of a sample", 0, 1)
    swa_every = setting(50, "steps between samples", 1, tiny=5)


@settings
class Settings(TrainSettings):
    """All of a session."""

    preset = setting("record", "tiny: on the bundled sample", choices=("record", "tiny"))
    device = setting("cuda", "auto: what there is", choices=("cuda", "cpu", "auto"), tiny="auto")
    data_path = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_*_*.bin", tiny=f"{SAMPLE}")
    tokenizer_path = setting(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model", tiny=f"{SAMPLE}/{SAMPLE_FILES[2]}"
    )
    run_id = setting("", "empty: OUTPUT_DIR's name, or random")
    output_dir = setting("", "of all results; empty: runs/RUN_ID")
    eval_only = setting("", "score only this artifact (.ptz) or state dict (.pt)")
    resume = setting(False, "go on with OUTPUT_DIR's interrupted run")
    checkpoint_every = setting(0, "steps between checkpoints; 0: when stopped and last")
    compile = setting(-1, "torch.compile; -1: on CUDA only", choices=(-1, 0, 1))
    warmup_steps = setting(20, "preflight's steps, undone; 0 counts as 1", tiny=2)
    micro_batch_tokens = setting(0, "most tokens of a rank at once; 0: what fits")
    val_loss_every = setting(500, "steps between validations; 0: only last", tiny=60)
    val_batch_size = setting(524288, "most tokens per validation batch, all ranks", 1, 1 << 30, tiny=8192)
    train_log_every = setting(100, "steps between log lines", 1, tiny=20)
    fp16_keep_name_patterns = setting("tok_emb,blocks.8.attn.c_k", "tensors kept in fp16", form=".{0,1000}")
    prune_fraction = setting(0.03, "smallest weights that become zero", 0, 0.15)
    quantizer = setting("gptq", "rounding of int5 and int6", choices=("gptq", "nearest"))
    quant_sigmas = setting(
        "0",
        "0 or two numbers k5,k6 from 1 to 99: int5,int6 in steps of max|row| or k * rms(row) over 15,31",
        form=r"0|[1-9]\d?(\.\d+)?,[1-9]\d?(\.\d+)?",
    )
    calibration_tokens = setting(262144, "training tokens for GPTQ", 1, 1 << 30, tiny=32768)
    artifact_max_bytes = setting(16_000_000, "of artifact and this file", 1)
    val_docs = setting(0, "validation documents scored; 0: all")
    eval_stride = setting(64, "stride of the sliding window", 1)
    eval_batch_seqs = setting(32, "most sliding windows per batch and rank", 1, 1 << 30)
    eval_max_seconds = setting(600.0, "from the artifact's load on; 0: no limit", tiny=0.0)
    ttt_enabled = setting(True, "test-time training; 0: sliding window")
    ttt_protocol = setting("replay", "epochs, or one pass", choices=("replay", "single_pass"))
    ttt_context = setting("cached", "keys and values, or windows", choices=("cached", "recompute"))
    ttt_lora_targets = setting("c_q,c_v", "layers with adapters", form=f"{ANY_TARGET}(,{ANY_TARGET})*")
    ttt_lora_rank = setting(8, "rank of the adapters", 1, 4096)
    ttt_lora_alpha = setting(0.0, "rank times their factor; 0: the rank")
    ttt_lora_lr = setting(0.001, "their peak lr")
    ttt_weight_decay = setting(0.0, "decoupled, of the adapters")
    ttt_mixture = setting(False, "mix the predictions without and with adaptation")
    ttt_mixture_lr = setting(0.0, "peak lr of a second adaptation, a third part of the mixture; 0: none")
    ttt_mixture_share = setting(0.1, "share of its weights dealt anew at each target", 1e-6, 1)
    ttt_n_epochs = setting(50, "epochs (replay) or steps per chunk (single_pass)", 1, 100000)
    ttt_chunk_size = setting(256, "targets per adaptation step", 2, 1 << 20)
    ttt_eval_seq_len = setting(2048, "longest window, with the chunk", 2, 1 << 20, tiny=512)
    ttt_batch_size = setting(0, "most documents at once; 0: what fits", 0, 1 << 16)

    @classmethod
    def from_env(cls, env: dict[str, str]):
        """Raises UserError."""
        values = {}
        for f in fields(cls):
            if env.get("PRESET") == "tiny" and f.metadata["tiny"] is not None:
                values[f.name] = f.metadata["tiny"]
            if f.name.upper() in env:
                values[f.name] = parse_setting(f, env[f.name.upper()])
        return cls(**values).checked()

    def checked(self):
        """Itself. Raises UserError for two values that cannot work together."""
        for one, rule, other in (
            ("model_dim", "an even multiple of", "num_heads"),  # RoPE turns pairs
            ("num_heads", "a multiple of", "num_kv_heads"),
            ("train_batch_tokens", "a multiple of", "train_seq_len"),
            ("micro_batch_tokens", "at least", "train_seq_len"),
            ("train_seq_len", "at least", "eval_stride"),
            ("ttt_eval_seq_len", "at least", "ttt_chunk_size"),
        ):
            if (self.eval_only and "batch" in one) or (self.ttt_enabled and other == "eval_stride"):
                continue  # nothing is trained, or no window slides
            a, b = getattr(self, one), getattr(self, other)
            if 0 < a < b or ("multiple" in rule and a % (2 * b if "even" in rule else b)):
                raise UserError(f"{one.upper()}={a} is not {rule} {other.upper()}={b} — change one of the two")
        targets = self.ttt_lora_targets.split(",")
        if len({*targets}) < len(targets):
            raise UserError(f"TTT_LORA_TARGETS={self.ttt_lora_targets} names a layer twice — name each once")
        if self.ttt_mixture_lr and not self.ttt_mixture:
            raise UserError(
                f"TTT_MIXTURE_LR={self.ttt_mixture_lr} but TTT_MIXTURE=0 — set the one to 0 or the other to 1"
            )
        return self

    def of(self, kind: type):
        """The values that one of the three classes names."""
        return {f.name: getattr(self, f.name) for f in fields(kind)}

    @property
    def ttt_figures(self):
        """Scores that adaptation gives a document."""
        return self.ttt_n_epochs if self.ttt_protocol == "replay" else 1

    @property
    def ttt_rates(self):
        """Peak lr of every adaptation whose predictions are a score, or a part of it."""
        second = self.ttt_mixture and self.ttt_mixture_lr > 0
        return (self.ttt_lora_lr, self.ttt_mixture_lr) if second else (self.ttt_lora_lr,)


def parse_setting(f: Field, raw):
    """A field's value from the environment or a header. Raises UserError."""
    kind, rule, name = type(f.default), f.metadata, f.name.upper()
    try:
        value = int(raw) if kind is bool else kind(raw)
        if rule["choices"]:
            good = value in rule["choices"]
        elif kind is str:
            good = value.isprintable() and re.fullmatch(rule["form"], value)
        else:
            good = rule["low"] <= value <= rule["high"]
    except (ValueError, TypeError, OverflowError):
        good = False
    if not good:
        shown = "".join(c if c.isprintable() else "?" for c in str(raw)[:80])
        raise UserError(f"{name}={shown} — set {name} to {rule['allowed']} ({rule['doc']})")
    return kind(value)


def help_text() -> str:
    """A line for each setting."""
    text = "usage: [NAME=value ...] python train_gpt.py [--name=value ...]\n"
    text += "       [NAME=value ...] torchrun [...] train_gpt.py [--name=value ...]\n"
    titles = dict(vocab_size="The model", seed="Its training", preset="This session")  # by the first of each
    for f in fields(Settings):
        if f.name in titles:
            text += f"\n{titles[f.name]}:\n"
        tiny = "" if f.metadata["tiny"] is None else f" (tiny: {f.metadata['tiny']})"
        text += f"{f.name.upper()}={f.default}{tiny}: {f.metadata['doc']}; {f.metadata['allowed']}\n"
    return text.replace("=True", "=1").replace("=False", "=0")


@functools.cache  # asked at the start, in the log and at the end
def resembling(name: str) -> list[str]:
    """Settings that a variable is spelt almost like, or that have its words with some left out or added."""
    known = {f.name.upper(): set(f.name.upper().split("_")) for f in fields(Settings)}
    parts = set(name.upper().split("_"))
    near = difflib.get_close_matches(name.upper(), known, 1, 0.85)
    words = set().union(*known.values())  # other programs' variables have others, too
    if not near and len(parts) > 1 and parts <= words:
        near = [other for other in sorted(known) if parts <= known[other] or parts >= known[other]]
    return near


def misspelt(env: dict[str, str]) -> list[str]:
    """Warnings of variables that resemble settings and are none."""
    unknown = sorted(env.keys() - {f.name.upper() for f in fields(Settings)})
    near = {name: " or ".join(resembling(name)) for name in unknown}
    return [f"warning: {name} is not a setting — did you mean {other}?" for name, other in near.items() if other]


# ======== Ranks ========
# Ranks are the processes of one run, on one machine or several. They share no disk: each reads data for itself, the
# first reads and writes files of the run, and what all must know travels through a collective or through the store in
# which they found each other. A rank ends by an exception, which entry() announces there, or because its watch thread
# has found such an announcement, or another rank silent: so one line ends them all, and nobody waits for the dead.

PATIENCE = 45.0  # seconds for which a rank may be silent
STALL = 10.0  # seconds for which a console may take nothing
GRACE = 8.0  # seconds in which the main thread must have noticed that it is to end


class Interrupted(BaseException):
    """The process's exit code, and a line to print. No Exception: libraries that catch those would swallow it."""

    def __init__(self, code: int, line: str):
        super().__init__(line or f"exit code {code}")
        self.code = code
        self.line = line


def stopped(number: int, when: str = "") -> tuple[int, str]:
    """What Interrupted says of a signal."""
    return 128 + number, f"stopped by {signal.Signals(number).name}{when}"


def takes_more(console) -> bool:
    """Whether a console has room within STALL seconds: print() would wait for its reader for ever."""
    try:
        number = console.fileno()
    except (OSError, ValueError, AttributeError):  # there is none, or one of Python's own
        return True
    return os.name == "nt" or bool(select.select([], [number], [], STALL)[1])


def say(line: str, name: str = "stdout") -> str:
    """Print to a console. One that is gone, full or of a narrow encoding ends nothing: returns what the system says."""
    console = getattr(sys, name)
    try:
        if not takes_more(console):
            raise OSError(errno.EAGAIN, "nobody reads it")
        encoding = console.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=console, flush=True)
    except (OSError, ValueError, AttributeError) as e:  # ValueError: closed; AttributeError: there is none
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        return getattr(e, "strerror", None) or str(e)
    return ""


def out_of_memory(error: Exception) -> bool:
    """Python's, a GPU's, or that of torch's allocator on a CPU, which has no type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def system_says(e: OSError, path: object = None) -> str:
    """An operating system's error as what is wrong and what to do."""
    where = path or e.filename
    cures = {
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENOSPC: "free space there",
        errno.EDQUOT: "free space there",
        errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
        errno.EIO: "try again, or use another place",
        errno.EEXIST: "remove what is in its place, or choose another",
    }
    what = f"cannot use {where}" if where else "the system refused a call"
    return f"{what}: {e.strerror or e} — {cures.get(e.errno, 'check the path and its permissions')}"


@contextlib.contextmanager
def reading(what: object, cure: str):
    """Within, the errors of many kinds that libraries raise for a damaged file become a UserError; too little memory
    is no damage."""
    try:
        yield
    except Exception as e:
        if out_of_memory(e):
            raise
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:80]}"
        raise UserError(f"{what} is damaged, or of another kind or version ({why}) — {cure}") from e


class Ranks:
    """This process among those of the run; alone until join(). All call sum, max, from_first, queue, gather and agree
    in the same order; each ends for itself."""

    def __init__(self):
        self.rank = self.local = self.node = self.restarts = 0  # local: on its machine, which is number `node`
        self.world = self.here = 1  # here: of them on this machine, as far as the launcher says
        self.store = self.job = dist.HashStore()  # alone, a dictionary; the latter outlives torchrun's restarts
        self.queues = self.gathered = 0  # so far, and so on every rank
        self.waits_for_step = False  # in training a signal waits for the end of the step
        self.signal = 0  # the first that this process received, and when
        self.signal_time = 0.0
        self.found = self.ending = None  # code and line, found by a thread; once the main one is to end by it
        self.beats = []  # of all ranks, when last heard
        self.unwinding = self.leaving = False
        self.how_to_go_on = ""  # a command, while there is a folder without a result
        self.outcome = "nothing had begun"  # where there is none
        # Of the run, and the setting that its memory depends on.
        self.stage = "the start", "NUM_LAYERS, MODEL_DIM or BIGRAM_VOCAB_SIZE"
        self.last_act = lambda: None  # of a rank whose main thread is stuck

    def join(self, env: dict[str, str]):
        """Find the others, as torchrun's environment says. Raises UserError."""
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *({"LOCAL_WORLD_SIZE"} & env.keys()))
        shown = " ".join(f"{name}={env.get(name)}" for name in names)
        waiting = threading.Timer(10, say, [f"{shown}: waiting for the other ranks"])
        waiting.daemon = True
        try:
            self.rank, self.world = int(env["RANK"]), int(env["WORLD_SIZE"])
            self.local, self.node = int(env.get("LOCAL_RANK", self.rank)), int(env.get("GROUP_RANK", 0))
            self.restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
            self.here = int(env.get("LOCAL_WORLD_SIZE", 1))
            if not 0 <= self.rank < self.world or self.here < 1:
                raise ValueError
            if self.world > 1 or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                waiting.start()
                self.job, _, _ = next(dist.rendezvous("env://", timeout=timedelta(days=1)))
            if self.world > 1:
                # torchrun --max-restarts starts all anew beside the same store, where old values still are
                self.store = dist.PrefixStore(f"attempt {self.restarts}", self.job)
                self.gather(None)
                self.beats = [0] * self.world
                # What a signal writes there arrives while its handler waits for a collective to end.
                self.knock, door = socket.socketpair()
                door.setblocking(False)
                signal.set_wakeup_fd(door.detach())
                # The pulse has a clone, since the main thread may wait within the other.
                threading.Thread(target=self.pulse, args=(self.store.clone(),), daemon=True).start()
                threading.Thread(target=self.watch, daemon=True).start()
        except (KeyError, ValueError, dist.DistError) as e:
            why, cure = "", "launch with torchrun, or unset RANK and WORLD_SIZE"
            if isinstance(e, dist.DistError):
                why = f" ({' '.join(str(e).split())[:200]})"
                cure = "choose another MASTER_ADDR or MASTER_PORT, or launch with torchrun"
            raise UserError(f"no place among ranks: {shown}{why} — {cure}") from e
        finally:
            waiting.cancel()

    def connect(self, device: torch.device):
        """Connect the collectives."""
        if self.world == 1:
            return
        cuda = device.type == "cuda"
        place = dict(store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=self.world)
        place["timeout"] = timedelta(days=1)  # for another's last documents; the watch ends what is dead
        place["device_id"] = device if cuda else None  # connects at once: what fails does so here
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **place)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, values) -> np.ndarray:
        """The maximum of a number or, elementwise, of an array. Returns when all ranks have come: the barrier, too."""
        result = torch.from_numpy(np.array(values))  # float64 for Python's floats
        if self.world > 1:
            dist.all_reduce(result, dist.ReduceOp.MAX)
        return result.numpy()

    def from_first(self, work: Callable, *arguments):
        """What work(*arguments) returns on the first rank. What it raises there ends all, by end()."""
        result = [work(*arguments) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(result, device=torch.device("cpu"))
        return result[0]

    def queue(self, items: list) -> Iterator[tuple]:
        """Number, from 1, and item, each on the rank that is free for it first. All ranks give the same list."""
        self.queues += 1
        while (number := self.store.add(f"queue {self.queues}", 1)) <= len(items):
            yield number, items[number - 1]

    def gather(self, value) -> list:
        """Every rank's value (what JSON can hold), in rank order; before connect(), too."""
        self.gathered += 1
        keys = [f"value {self.gathered} {rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], json.dumps(value))
        while not self.store.check(keys):  # get() would wait where no signal gets through
            time.sleep(0.02)
        return [json.loads(self.store.get(key)) for key in keys]

    def begin(self):
        """Let processes that torchrun --max-restarts starts in place of these know that the run has its folder."""
        with contextlib.suppress(RuntimeError):  # the launcher is dead, and starts nothing
            self.job.set("begun", "1")

    def began(self) -> bool:
        """Whether processes before these had it."""
        return self.restarts > 0 and self.job.check(["begun"])

    def agree(self, facts: dict):
        """Raises UserError, on all ranks, with both values where a rank's differ from the first one's."""
        first, *others = self.gather({name: str(value) for name, value in facts.items()})
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs[name] != value:
                    what = f"rank {rank} has {name} {theirs[name]}, rank 0 has {value}"
                    raise UserError(f"{what} — start all ranks with the same")

    def pulse(self, store: dist.Store):
        """A thread: show that this rank lives, and hear of others. A dead machine's answer it waits for for ever."""
        try:
            while not self.leaving:
                store.add(f"beat {self.rank}", 1)
                self.beats = [store.add(f"beat {rank}", 0) for rank in range(self.world)]
                if store.check(["end"]):
                    self.found = json.loads(store.get("end"))["code"], ""
                time.sleep(0.5)
        except RuntimeError:  # nor can ranks agree who says it
            line = "error: the launcher or the first rank is dead or out of reach"
            alone = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # then that rank may be who is dead
            self.found = 1, line if alone or self.local == 0 else ""

    def watch(self):
        """A thread: end this rank once another has ended or is silent, or a signal finds the main thread stuck. The
        first rank listens to all others, they to the first."""
        heard = dict.fromkeys(range(1, self.world) if self.rank == 0 else [0], (0, 0))
        knocks = []
        for turn in itertools.count():  # of half a second; clocks go on where a job stands still as a whole
            if self.found or self.leaving:
                break
            if select.select([self.knock], [], [], 0.5)[0]:
                knocks.append((self.knock.recv(1)[0], turn))
            if knocks and not self.waits_for_step and turn - knocks[0][1] > 2 * GRACE:
                self.found = stopped(knocks[0][0])
            for rank, (count, when) in heard.items():
                if self.beats[rank] != count:
                    heard[rank] = self.beats[rank], turn
                elif turn - when > 2 * PATIENCE:
                    self.found = 1, f"error: rank {rank} is dead or out of reach"
        if not self.leaving:
            self.ending = self.found
            _thread.interrupt_main(signal.SIGTERM)  # it leaves no file half written
            time.sleep(GRACE)
        if not self.leaving:
            with contextlib.suppress(Exception):  # nothing shall keep this process from its end, no disk, no console
                threading.Timer(3 * GRACE, os._exit, [self.found[0]]).start()
                self.last_act()
            os._exit(self.end(*self.found))  # it is stuck

    def on_signal(self, number: int, frame):
        """Raises Interrupted, but a training step is finished first."""
        # A second signal does not wait, unless it comes within 2 s: then it is the first one, passed on by a launcher.
        now = time.monotonic()
        again = self.signal and now > self.signal_time + 2
        waits = self.signal or self.waits_for_step
        if not self.signal and not self.ending:
            self.signal, self.signal_time = number, now
        if self.unwinding and again:
            os._exit(128 + number)
        if self.unwinding or self.leaving or (waits and not again and not self.ending):
            return
        self.unwinding = True
        raise Interrupted(*(self.ending or stopped(number)))

    def end(self, code: int, line: str, curable: bool = False) -> int:
        """Announce why this rank ends, unless another was first; say it once a machine, with how to go on there: after
        a user's error only where the cure is not to change the run. Returns the code of all."""
        self.unwinding = self.leaving = True  # no signal, no watch thread comes in between
        mine = json.dumps(dict(rank=self.rank, node=self.node, code=code, line=line, curable=curable))
        first = [mine]

        def announce():
            with contextlib.suppress(RuntimeError):  # the store is gone
                first[0] = self.store.compare_set("end", "", mine).decode()
                heard = self.store.add("heard", 1)
                until = time.monotonic() + 5
                while self.rank == 0 and heard < self.world and time.monotonic() < until:
                    time.sleep(0.05)  # the store may end with this process
                    heard = self.store.add("heard", 0)

        if self.world > 1:
            announcing = threading.Thread(target=announce, daemon=True)
            try:
                announcing.start()
                announcing.join(GRACE)  # the store's machine may be dead
            except RuntimeError:  # no further thread can be started
                announce()
        said = json.loads(first[0])
        line, elsewhere = said["line"], said["node"] != self.node
        if line and (first[0] == mine or (self.local == 0 and elsewhere)):
            if elsewhere and said["curable"]:  # its paths are not of this machine
                line = line.replace("error: ", f"error: rank {said['rank']}: ", 1)
            if said["code"] != 2:
                line += f" — go on with: {self.how_to_go_on}" if self.how_to_go_on else f" — {self.outcome}"
            elif said["curable"] and self.how_to_go_on:
                line += f", and go on with: {self.how_to_go_on}"
            say(line, "stderr")
        return said["code"]

    def lost(self, e: BaseException) -> str:
        """What failed, if it is a collective, mostly because another rank had left it; else empty."""
        text = " ".join(str(e).split())
        named = isinstance(e, RuntimeError) and re.search("gloo|nccl|connection", text, re.I)
        broken = self.world > 1 and (named or isinstance(e, dist.DistError))
        return f"a collective failed, as where another rank is dead or out of reach: {text[:200]}" if broken else ""

    def leave(self):
        """Once all are here."""
        self.leaving = True
        if self.world > 1:
            self.max(0)
            dist.destroy_process_group()


# ======== Run ========
# What always travels together: settings, ranks, device, folder and log. A copy with other settings or another folder is
# a run, too: that is all the preflight is.

MEMORY = dict(  # what is computed at once: the stage, and the setting that bounds it
    training_rows=("training", "MICRO_BATCH_TOKENS"),
    validation_rows=("validation", "VAL_BATCH_SIZE"),
    sliding_windows=("the sliding evaluation", "EVAL_BATCH_SEQS"),
    documents=("test-time training", "TTT_BATCH_SIZE"),
)
MICRO_BATCH_CPU = 2048  # tokens, where MICRO_BATCH_TOKENS=0
TTT_BATCH = {"cpu": 4, "cuda": 128}  # documents side by side, where TTT_BATCH_SIZE=0 and more would fit
MODEL_FILES = ("checkpoint.pt", "final_model.ptz", "final_model.pt")
FILES = (*MODEL_FILES, "train.log", "sessions.json", "ttt_documents.npz", "ttt_positions.npz", "result.json")


def pairs(account: dict) -> str:
    """An account as a log line."""
    return " ".join(f"{k}:{v:.4f}" if isinstance(v, float) else f"{k}:{v}" for k, v in account.items())


def choose_device(wanted: str, local: int) -> tuple[torch.device, str]:
    """The device, and why it is no GPU. Raises UserError."""
    if wanted == "cpu":
        return torch.device("cpu"), "DEVICE=cpu"
    try:
        torch.cuda.init()  # says why not, where is_available() only says no
        if max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 0))) <= torch.cuda.device_count():
            return torch.device("cuda", local), ""
        reason = f"there are {torch.cuda.device_count()} GPUs, too few for the ranks here (LOCAL_RANK={local})"
    except (RuntimeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:200]
    if wanted == "cuda":
        cure = "mend driver or torch; on a CPU, PRESET=tiny runs a small model on bundled text"
        raise UserError(f"DEVICE=cuda, torch {torch.__version__}: {reason} — {cure}")
    return torch.device("cpu"), reason


def lock(file):
    """Hold a file while this process lives, however it ends. Raises BlockingIOError if another one holds it."""
    if os.name != "nt":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    file.seek(1 << 40)  # a byte that nobody reads: Windows lets nobody read a locked one
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        raise BlockingIOError(*e.args) from e
    file.seek(0, os.SEEK_END)


class Run:
    """Settings, ranks, device and folder. Making one has no effect outside it."""

    def __init__(self, s: Settings, ranks: Ranks | None = None):
        self.s = s
        self.ranks = ranks or Ranks()
        self.device, self.no_gpu = choose_device(s.device, self.ranks.local)
        self.cuda = self.device.type == "cuda"
        self.capability = torch.cuda.get_device_capability(self.device) if self.cuda else None
        self.dtype = compute_dtype(self.capability)
        self.compile = self.cuda if s.compile < 0 else bool(s.compile)
        self.graphs = False  # CUDA graphs, once they have computed the same
        self.rehearsed = {}  # how nearly
        self.longest = 1  # targets of the longest validation document
        self.fits = {}  # most() of what the preflight has tried
        self.pace = {}  # seconds of a unit of batch_cost(), with and without them
        self.folder = Path(s.output_dir)
        self.log_file = self.lock_file = None  # only the first rank's; without the former a run is silent
        self.spoke = 0.0  # when
        self.devices = [environment(self)["device"]]  # of all ranks, once they are asked
        self.sessions = []  # of this run in its folder, by this and earlier processes
        self.session_kept = self.session_cost = 0.0  # when they were last written, and seconds that it took
        self.unaccounted = False  # once they could not be
        if self.cuda:
            torch.cuda.set_device(self.device)
            self.event = torch.cuda.Event()  # of the last step

    @property
    def attention(self) -> str:
        """The backend, which depends on the model's width, too."""
        capability = self.capability if self.cuda else None
        built = torch.backends.cuda.is_flash_attention_available() and not torch.version.hip
        return attention_backend(capability, self.s.model_dim // self.s.num_heads, self.dtype, built)

    def most(self, what: str) -> int:
        """Rows, windows or documents of this rank at once: as settings say, or what of that fits."""
        s = self.s
        tokens = s.micro_batch_tokens or (s.train_batch_tokens if self.cuda else MICRO_BATCH_CPU)
        tokens = min(tokens, s.train_batch_tokens // self.ranks.world)
        allowed = dict(
            training_rows=max(1, tokens // s.train_seq_len),
            validation_rows=max(1, s.val_batch_size // (s.train_seq_len * self.ranks.world)),
            sliding_windows=s.eval_batch_seqs,
            documents=s.ttt_batch_size or TTT_BATCH[self.device.type],
        )
        return self.fits.get(what, allowed[what])

    def using(self, **changes) -> "Run":
        """A copy with other settings."""
        other = copy.copy(self)
        other.s = replace(self.s, **changes)
        return other

    def compiled(self, function: Callable, **options) -> Callable:
        return torch.compile(function, **options) if self.compile else function

    def wait(self):
        """For the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def wait_one_behind(self):
        """For what came before the last such call: the host runs a step ahead and keeps the device busy."""
        if self.cuda:
            previous, self.event = self.event, torch.cuda.Event()
            self.event.record()
            previous.synchronize()

    def log(self, line: object, console: bool = True):
        """Print to console and train.log. Either may fail: the run goes on, and the other one says so."""
        if not self.log_file:
            return
        self.spoke = time.perf_counter()
        gone = say(str(line)) if console else ""
        note = f"\nnote: the console is gone ({gone}); the run goes on" if gone else ""
        try:
            print(f"{line}{note}", file=self.log_file, flush=True)
        except OSError as e:
            say(f"note: {system_says(e, self.folder / 'train.log')}; the run goes on without it", "stderr")
            self.log_file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end

    def log_after_silence(self, line: str):
        """Of half a minute: nobody shall wonder whether the run still goes on."""
        if time.perf_counter() - self.spoke > 30:
            self.log(line)

    def check_folder(self):
        """Raises Interrupted where another run holds the log that is there now: what is written would be among its."""
        log = self.folder / "train.log"
        try:
            if self.lock_file and not os.path.samestat(os.fstat(self.lock_file.fileno()), os.stat(log)):
                with open(log, "a") as another:  # an editor's, if it can be locked
                    lock(another)
        except BlockingIOError:
            what = f"{self.folder} has become another run's: it was moved or removed"
            raise Interrupted(2, f"error: {what} — leave a folder in its place while its run lives") from None
        except OSError:
            pass  # whatever else is amiss with a log ends no run

    def write(self, name: str, content: bytes | memoryview):
        """Write a file that is whole at any time, or leave what there was. Raises UserError; Interrupted by
        check_folder()."""
        path = self.folder / name
        temporary = self.folder / f"{name}.tmp"
        self.check_folder()
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                self.log(f"note: {self.folder} was removed or moved: it is made again, without what was in it")
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError as e:
            raise UserError(system_says(e, f"{path} ({len(content)} bytes)")) from e
        finally:
            with contextlib.suppress(OSError):  # it has taken its place, or cannot be removed either
                temporary.unlink()

    @contextlib.contextmanager
    def session(self, stage: str):
        """Account for a stage that RESUME=1 can continue: sessions.json says how long each process worked at it, on
        what, and how it ended."""
        row = dict(stage=stage, tag="", world_size=self.ranks.world, devices=self.devices, seconds=0.0)
        row["ended"] = "killed"  # until it ends otherwise
        self.sessions.append(row)
        self.session_began = time.perf_counter()
        self.ranks.last_act = functools.partial(self.tick, 0.0)
        self.tick(0.0)
        try:
            yield
            row["ended"] = "finished"
        except BaseException as e:
            row["ended"] = self.ranks.lost(e) or " ".join(str(e).split())[:200] or type(e).__name__
            raise
        finally:
            self.tick(0.0)

    def tick(self, every: float = 5.0):
        """Bring the session's seconds up to date, on the first rank's clock and disk: a slow one once a minute."""
        now = time.perf_counter()
        every = every and max(every, min(100 * self.session_cost, 60.0))
        if self.ranks.rank == 0 and self.sessions and now - self.session_kept >= every:
            self.session_kept = now
            self.sessions[-1]["seconds"] = now - self.session_began
            try:
                self.write("sessions.json", json.dumps(self.sessions).encode())
            except UserError as e:  # an account is not worth a run
                if not self.unaccounted:
                    self.log(f"note: {e}; the run goes on")
                self.unaccounted = True
            self.session_cost = time.perf_counter() - now


def environment(run: Run) -> dict:
    """What a run depends on besides its source and settings."""
    found = {module.__name__: module.__version__ for module in (torch, np, zstandard, sentencepiece)}
    found |= dict(python=platform.python_version(), cuda=torch.version.cuda, device_type=run.device.type)
    found |= dict(compile=run.compile, dtype=str(run.dtype).removeprefix("torch."), attention=run.attention)
    device = torch.cuda.get_device_name() if run.cuda else platform.machine()
    return found | dict(world_size=run.ranks.world, device=device, threads=torch.get_num_threads())


def choose_folder(run: Run) -> str:
    """OUTPUT_DIR, or one named by RUN_ID, or a new one. On the first rank. Raises UserError, OSError."""
    s = run.s
    if s.output_dir or s.run_id:
        return s.output_dir or f"runs/{s.run_id}"
    if s.resume or run.ranks.restarts:
        known = sorted(Path("runs").glob("*/train.log"), key=lambda path: path.stat().st_mtime)
        those = [f"OUTPUT_DIR={shlex.quote(str(path.parent))}" for path in known[-3:]]
        those = " or ".join(those or ["OUTPUT_DIR to the run's folder"])
        raise UserError(f"a run cannot be resumed without OUTPUT_DIR or RUN_ID — set {those}")
    stem = f"runs/{time.strftime('%Y-%m-%d')}_{s.preset}_seed{s.seed}"
    Path("runs").mkdir(exist_ok=True)  # if it cannot be, its error shall end the search for a name
    for number in itertools.count(1):
        name = f"{stem}_{number}" if number > 1 else stem
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir()  # whoever makes it has it
            return name


def files_of_run(run: Run, resume: bool) -> list[str]:
    """What its folder holds. Raises UserError if this run may not begin or, if it is to `resume`, go on there."""
    s, folder = run.s, run.folder
    names = [name for name in FILES if (folder / name).exists() and (folder / name).stat().st_size]
    holds = f"OUTPUT_DIR={folder} holds"
    foreign = s.eval_only and {*MODEL_FILES} & {*names}
    if not s.eval_only and "final_model.ptz" in names and "checkpoint.pt" not in names:
        cure = f"score it by EVAL_ONLY={shlex.quote(str(folder / 'final_model.ptz'))}, or choose another"
        raise UserError(f"{holds} an artifact, but no checkpoint to go on from — {cure}")
    if names and (foreign or not (resume or "result.json" in names)):
        cure = "choose another" if foreign else "choose another, or set RESUME=1"
        raise UserError(f"{holds} a run's {names[0]} — {cure}")
    if "result.json" in names:
        cure = "choose another"
        if run.ranks.began():
            cure = "it is this job's own; see above how it ended"
        elif s.eval_only or "checkpoint.pt" in names:
            cure = "choose another, or delete that file and set RESUME=1"
        raise UserError(f"{holds} a run's result.json — {cure}")
    return names


def claim_folder(run: Run) -> bool:
    """Lock it and open the log; on the first rank. Returns whether to go on with what is there: by RESUME=1, or because
    torchrun starts again what it had started there. Raises UserError if that is another run, a live one or a result."""
    folder = run.folder
    for path in (folder / name for name in FILES):
        if path.exists() and not (path.is_file() or path.is_char_device()):  # who opens a pipe waits for its other end
            raise UserError(f"{path} is no file — remove it, or choose another OUTPUT_DIR")
    resume = run.s.resume or run.ranks.began()
    files_of_run(run, resume)  # before anything there is touched
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    try:
        run.lock_file = open(log, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 - stays open
        lock(run.lock_file)
        run.log_file = run.lock_file
    except BlockingIOError as e:
        what = f"OUTPUT_DIR={folder} is in use by a live run: it holds a run's locked log"
        raise UserError(f"{what} — wait for it, or choose another") from e
    except OSError as e:
        if e.filename:  # it cannot be opened
            raise
        cure = "choose an OUTPUT_DIR on a disk that can lock files"
        raise UserError(f"{log} cannot be locked: {e.strerror} — {cure}") from e
    names = files_of_run(run, resume)  # another run may have come and gone
    run.ranks.begin()
    for left in folder.glob("preflight_????????.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    if resume and ("checkpoint.pt" not in names and not run.s.eval_only):
        run.log(f"note: {folder} has no checkpoint to go on from: this run starts afresh")
    run.sessions = read_sessions(folder) if "sessions.json" in names else []
    return resume


def read_sessions(folder: Path) -> list[dict]:
    """Raises UserError, OSError."""
    content = (folder / "sessions.json").read_bytes()
    with reading(folder / "sessions.json", "delete it to go on without its account"):
        rows = json.loads(content)
        names = {"stage", "tag", "world_size", "devices", "seconds", "ended"}
        if type(rows) is not list or any({*row} != names or not isinstance(row["seconds"], float) for row in rows):
            raise ValueError("another form")
        return rows


def open_folder(run: Run) -> Run:
    """The run with its folder: the first rank's has log, lock and results; on other machines one of that name has only
    scores. Raises UserError, OSError."""
    folder = run.ranks.from_first(choose_folder, run)
    name = "".join(c if c.isprintable() else "?" for c in os.path.basename(os.path.realpath(folder)))
    run = run.using(run_id=run.s.run_id or name, output_dir=folder)
    run.folder = Path(folder)
    run = run.using(resume=run.ranks.from_first(claim_folder, run))
    run.folder.mkdir(parents=True, exist_ok=True)
    run.ranks.how_to_go_on = command(run, RESUME="1", OUTPUT_DIR=folder)
    return run


def python() -> str:
    """How a shell calls this interpreter: by its name, if that leads there."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable or "python")


def command(run: Run, **changes: str) -> str:
    """What a shell takes to start this run again with changed settings, in another folder if none is among them."""
    given = {f.name.upper() for f in fields(Settings)} & {*os.environ} - {"RESUME", "OUTPUT_DIR", *changes}
    if "OUTPUT_DIR" not in changes:
        given -= {"RUN_ID"}
    values = changes | {name: os.environ[name] for name in sorted(given)}
    launcher = python()
    if run.ranks.world > 1:
        beside = str(Path(sys.executable).with_name("torchrun"))
        launcher = "torchrun" if shutil.which("torchrun") == beside else f"{launcher} -m torch.distributed.run"
        alone = run.ranks.here == run.ranks.world
        launcher += f" --standalone --nproc_per_node={run.ranks.here}" if alone else " ... (as before)"
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in values.items()), launcher, shlex.quote(sys.argv[0])])


# ======== Data ========
# Training reads the endless concatenation of its shards. Validation is one stream of N tokens and N - 1
# targets, each with the bytes that it adds to the text, cut into documents at BOS.

BOS = 1
SHARD = 20240520, 1  # magic number, version
SHARD_HEADER = 1024  # bytes
COMPARED_DOCUMENTS = 1000  # of validation, whose counted bytes are compared with their decoded text
COMPARED_TOKENS = 1 << 21  # of them at most: a second's work


@dataclass(frozen=True)
class Shard:
    """Tokens of a file, uint16. Slices are read when they are asked for: of a memory-mapped file that is cut off, or
    whose disk fails, the process would die by SIGBUS."""

    path: Path
    tokens: int
    sha256: str = ""  # of the tokens, once they have been read

    def __len__(self):
        return self.tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(self.tokens)
        if start >= stop:
            return np.empty(0, "<u2")
        found = np.fromfile(self.path, "<u2", stop - start, offset=SHARD_HEADER + 2 * start)
        if len(found) < stop - start:
            raise UserError(f"shard {self.path} could not be read to its end any more — fetch or make it again")
        return found


def open_shard(path: Path) -> Shard:
    """Raises UserError, OSError."""
    header = np.fromfile(path, "<i4", 3).tolist()
    magic, version, count = (header + [0, 0, 0])[:3]  # the file may be shorter
    room = (path.stat().st_size - SHARD_HEADER) / 2
    if (magic, version) != SHARD or count < 1 or count != room:
        found = f"magic {magic}, version {version}, announces {count} tokens and has {room:g}"
        raise UserError(f"shard {path} has {found} — fetch or make it again")
    return Shard(path, count)


def open_shards(split: str, run):
    """The shards of a split, whose tokens are all in the vocabulary. Raises UserError."""
    s = run.s
    where = f"fineweb_{split}_*.bin in {s.data_path}"
    with contextlib.suppress(FileNotFoundError):
        os.scandir(s.data_path).close()  # raises what glob() hides
    paths = sorted(Path(s.data_path).glob(f"fineweb_{split}_*.bin"), key=lambda path: (len(path.name), path.name))
    numbered = {path: re.fullmatch(rf"fineweb_{split}_(\d+)", path.stem) for path in paths}
    numbers = [int(found[1]) for found in numbered.values() if found]
    first = 0 if split == "val" else min(numbers, default=0)  # of training any part will do
    if numbers and numbers != [*range(first, first + len(numbers))]:
        raise UserError(f"of {where} some number is missing: there are {numbers[:9]} — fetch or make all")
    if 0 < len(numbers) < len(paths):
        odd = next(path.name for path, found in numbered.items() if not found)
        raise UserError(f"of {where} {odd} has no number — remove it, or give it one")
    shards = [open_shard(path) for path in paths]
    if not shards:
        raise UserError(f"no {where} — set DATA_PATH, or run data/fineweb.py or data/text.py")
    ranks = run.ranks
    mine = {str(i): read_whole(shards[i], s) for i in range(ranks.local % ranks.here, len(shards), ranks.here)}
    found = {}
    for node, digests in ranks.gather([ranks.node, mine]):  # each machine has its own
        found |= digests if node == ranks.node else {}
    found |= mine  # whatever the launcher says of machines
    return [replace(shard, sha256=found.get(str(i)) or read_whole(shard, s)) for i, shard in enumerate(shards)]


def read_whole(shard: Shard, s) -> str:
    """Its SHA-256. Raises UserError for a token beyond the vocabulary."""
    digest = hashlib.sha256()
    for start in range(0, len(shard), 1 << 24):
        block = shard[start : start + (1 << 24)]
        if block.max() >= s.vocab_size:
            what = f"{shard.path} has token {block.max()} but VOCAB_SIZE={s.vocab_size}"
            raise UserError(f"{what} — use shards of the vocabulary")
        digest.update(block)
    return digest.hexdigest()


def fingerprint(shards: list[Shard]) -> str:
    """SHA-256 of all that open_shards() has read."""
    return hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()


class BatchLoader:
    """Batch k starts at token k * TRAIN_BATCH_TOKENS of the endless stream. Raises UserError if rows do not divide."""

    def __init__(self, shards: list[Shard], run):
        self.run, self.shards = run, shards
        self.tokens = sum(map(len, shards))
        s = run.s
        rows = s.train_batch_tokens // s.train_seq_len
        if rows % run.ranks.world:
            what = f"TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN={rows} rows do not divide by WORLD_SIZE={run.ranks.world}"
            raise UserError(f"{what} — change one of them")
        self.rows = rows // run.ranks.world  # of this rank

    @property
    def micro_rows(self):
        most = min(self.rows, self.run.most("training_rows"))
        return max(n for n in range(1, most + 1) if self.rows % n == 0)

    def read(self, start, rows):
        """Inputs and targets, (rows, TRAIN_SEQ_LEN) int64 each, from `start` in the endless stream."""
        offset = start % self.tokens
        missing = rows * self.run.s.train_seq_len + 1  # the last target belongs to the next row
        pieces = []
        for shard in itertools.cycle(self.shards):
            pieces.append(shard[offset : offset + missing])  # empty for a shard that ends before
            missing -= len(pieces[-1])
            offset = max(offset - len(shard), 0)
            if not missing:
                break
        block = torch.from_numpy(np.concatenate(pieces).astype(np.int32))
        if self.run.cuda:
            block = block.pin_memory()  # else the copy would wait
        block = block.to(self.run.device, non_blocking=True).long()
        return block[:-1].view(rows, -1), block[1:].view(rows, -1)

    def batch(self, step):
        """This rank's micro-batches of a step."""
        s = self.run.s
        start = step * s.train_batch_tokens + self.run.ranks.rank * self.rows * s.train_seq_len
        inputs, targets = self.read(start, self.rows)
        size = self.micro_rows
        return list(zip(inputs.split(size), targets.split(size), strict=True))


def load_tokenizer(path: str, vocab_size: int):
    """The SentencePieceProcessor of a file. Raises UserError, also for a BOS that is not the shards', and OSError."""
    model = Path(path).read_bytes()
    with reading(path, "set TOKENIZER_PATH to the dataset's .model file"):
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    if sp.vocab_size() != vocab_size:
        raise UserError(f"{path} has {sp.vocab_size()} pieces but VOCAB_SIZE={vocab_size} — set one to match the other")
    if sp.bos_id() not in (BOS, -1):
        what = f"{path} has BOS {sp.bos_id()}, but in shards a document begins with token {BOS}"
        raise UserError(f"{what} — make them again with a tokenizer of bos_id={BOS}, as data/text.py does")
    return sp


def target_bytes(sp, tokens: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each target adds to the decoded text, (len(tokens) - 1,) int16."""
    ids = range(sp.vocab_size())
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])  # add nothing
    texts = ["?" if sp.is_byte(i) else sp.id_to_piece(i).replace("▁", " ") for i in ids]  # U+2581 is a space
    length = np.array([len(text.encode()) for text in texts], np.int16) * ~silent
    spaced = np.array([text.startswith(" ") for text in texts]) & ~silent
    # Where the tokenizer puts a space in front of a text (its dummy prefix, a field that sentencepiece does not show),
    # its decoder takes one from a text's first piece, and so from one after a silent piece. It does so, too, for
    # tokenizers that drop extra spaces, such as the challenge's, where no text begins with one.
    probe = int(spaced.argmax())
    dropped = spaced & (sp.decode([probe]) != texts[probe])
    before, target = tokens[:-1], tokens[1:]
    return length[target] - (dropped[target] & silent[before])


def decoded_bytes(sp, documents: list[np.ndarray]) -> list[int]:
    """UTF-8 bytes that each document's tokens after its first add to the text, by SentencePiece's own decoder: the
    judge of target_bytes, with which it shares nothing."""
    ids = range(sp.vocab_size())
    control = np.array([sp.is_control(i) for i in ids])
    byte = np.array([sp.is_byte(i) for i in ids])
    letter = next((i for i in ids if byte[i] and sp.id_to_piece(i) == "<0x41>"), 0)

    def decode(tokens):
        # What stands between control tokens was a text of its own, and the decoder takes the tokenizer's own space only
        # from the first piece that it is given.
        texts = np.split(tokens, np.flatnonzero(control[tokens]))
        return "".join(sp.decode(text.tolist()) for text in texts)

    def length(tokens):
        text = decode(tokens)
        if "\ufffd" in text:
            # Bytes that form no character, as where a document was cut, decode to 3 bytes each that nobody wrote. A
            # letter in the place of every byte is as long as the bytes are.
            text = decode(np.where(byte[tokens], letter, tokens))
        # Without a piece for a space the tokenizer spells U+2581 by three byte pieces; one space it remains.
        return len(text.replace("▁", " ").encode())

    return [length(tokens) - length(tokens[:1]) for tokens in documents]


def compare_bytes(sp, tokens: np.ndarray, bytes_: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
    """Raises UserError at the first document whose counted bytes are not those of its decoded text."""
    documents = [tokens[start : start + n + 1] for start, n in zip(starts, lengths, strict=True)]
    for i, decoded in enumerate(decoded_bytes(sp, documents)):
        counted = int(bytes_[starts[i] : starts[i] + lengths[i]].sum())
        if counted != decoded:
            unknown = sum(map(sp.is_unknown, documents[i].tolist()))
            what = f"validation document {i} counts {counted} bytes, but its decoded text has {decoded}"
            what += f" and {unknown} unknown pieces" * (unknown > 0)
            raise UserError(f"{what} — make the shards with a tokenizer that gives texts back, as data/text.py does")


def find_documents(tokens: np.ndarray, bos: int = BOS):
    """Start of each document and its number of targets, (documents,) int64 each: from BOS to the next one inclusive,
    or to the end. What comes before the first BOS is one, too."""
    starts = np.flatnonzero(tokens[:-1] == bos)
    starts = starts if len(starts) and starts[0] == 0 else np.append(0, starts)
    return starts, np.diff(starts, append=len(tokens) - 1)


class Stream:
    """N validation tokens on a device: `tokens` (N,) int32, `bytes` per target (N-1,) int16; `starts` and `lengths` of
    documents in targets, found by BOS unless given."""

    def __init__(self, tokens: np.ndarray, bytes_: np.ndarray, device: torch.device, documents=None):
        self.starts, self.lengths = documents or find_documents(tokens)
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.bytes = torch.from_numpy(bytes_.astype(np.int16)).to(device)
        self.target_count = len(tokens) - 1
        ends = np.cumsum(np.append(0, bytes_), dtype=np.int64)
        self.byte_count = int(ends[-1])
        self.document_bytes = ends[self.starts + self.lengths] - ends[self.starts]
        self.tokenizer = ""  # its SHA-256
        self.fingerprint = hashlib.sha256(tokens.astype("<u2").tobytes() + bytes_.astype("<i2").tobytes()).hexdigest()


def load_validation(run):
    """The first VAL_DOCS documents. Raises UserError, OSError."""
    s = run.s
    sp = load_tokenizer(s.tokenizer_path, s.vocab_size)
    tokens = np.concatenate([shard[:] for shard in open_shards("val", run)])
    starts, lengths = find_documents(tokens, sp.bos_id())
    if len(starts) == 1 and tokens[0] != sp.bos_id() and run.ranks.rank == 0:
        say(f"warning: no document in {s.data_path} begins with BOS, so that all its text is one")
    if s.val_docs > len(starts):
        raise UserError(f"VAL_DOCS={s.val_docs} but {s.data_path} has {len(starts)} — set VAL_DOCS to at most that")
    if s.val_docs:
        starts, lengths = starts[: s.val_docs], lengths[: s.val_docs]
        tokens = tokens[: starts[-1] + lengths[-1] + 1]
    bytes_ = target_bytes(sp, tokens)
    if not bytes_.any():
        cure = "raise VAL_DOCS" if s.val_docs else "fetch or make it again"
        raise UserError(f"of the validation set in {s.data_path} no target that is scored has text — {cure}")
    compared = tokens[:COMPARED_TOKENS]  # its last document may go on, and is compared as far as it goes
    compare_bytes(sp, compared, bytes_, *(x[:COMPARED_DOCUMENTS] for x in find_documents(compared, sp.bos_id())))
    stream = Stream(tokens, bytes_, run.device, (starts, lengths))
    stream.tokenizer = hashlib.sha256(Path(s.tokenizer_path).read_bytes()).hexdigest()
    return stream


def synthetic_stream(lengths: list[int], run):
    """Documents of random tokens with these numbers of targets, a byte each: for the preflight."""
    ends = np.cumsum(lengths)
    tokens = np.random.default_rng(0).integers(BOS + 1, run.s.vocab_size, ends[-1] + 1)
    return Stream(tokens, np.ones(ends[-1], np.int16), run.device, (ends - lengths, np.array(lengths)))


def prepare_sample(run):
    """Build the bundled sample if DATA_PATH is it and lacks a file. Raises UserError."""
    whole = all((SAMPLE / name).exists() for name in SAMPLE_FILES)
    if Path(os.path.realpath(run.s.data_path)) == SAMPLE and not whole:  # of a part the builder says what to do
        code = subprocess.call([sys.executable, str(SAMPLE.parent / "sample.py")], stdout=sys.stderr)
        if code:
            raise UserError(f"data/sample.py ended with code {code} — see its message above")


# ======== Model ========
# One forward pass serves training, scoring and adaptation; LoRA and a context of cached keys and values are optional.

RMS_EPS = torch.finfo(torch.float32).eps  # F.rms_norm's default; bf16's own would swamp a fresh embedding


class Past(NamedTuple):
    """Where B chunks begin and what they attend to besides themselves."""

    position: int | Tensor  # tokens before the chunk
    kv: Tensor  # (B, layers, 2, kv heads, context + T, head_dim) rotated keys, and values; the chunk's own come last


class Lora(NamedTuple):
    """One linear layer's adapters for B documents: y += x A' B'."""

    a: Tensor  # (B, r, inputs)
    b: Tensor  # (B, outputs, r)


def norm(x):
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotary(position, head_dim, base, dtype):
    """cos and sin of RoPE's angles (Su et al. 2021), (T, 1, head_dim / 2), computed in float32."""
    inverse = base ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(position.float(), inverse)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Rotate (B, T, heads, head_dim), in halves layout."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def compute_dtype(capability: tuple | None) -> torch.dtype:
    """bf16 on a GPU that multiplies it, else float32; None is a CPU. Raises UserError for a GPU out of support."""
    if capability is None:
        return torch.float32
    if capability < (7, 0):  # neither Triton nor PyTorch's kernels support it any more
        what = f"this GPU has compute capability {capability[0]}.{capability[1]}, below 7.0"
        raise UserError(f"{what} — use a newer one, or set DEVICE=cpu")
    return torch.bfloat16 if capability >= (8, 0) else torch.float32


def attention_backend(capability: tuple | None, head_dim: int, dtype: torch.dtype, built=True) -> str:
    """`flash` where GPU (None: a CPU), head width and dtype allow it and PyTorch was built with it, else `plain`."""
    if capability is None:
        return "flash"
    fits = capability >= (8, 0) and dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= 256
    return "flash" if fits and built else "plain"


def flash(q, k, v, causal: bool):
    """Output (B, heads, T, head_dim), log-sum-exp (B, heads, T) and what flash_backward() asks for besides."""
    # F.scaled_dot_product_attention would hide the log-sum-exp and choose the backend itself.
    if not q.is_cuda:
        return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal), (0.0, causal)
    y, lse, *rest, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return y, lse, (*rest, 0.0, causal, seed, offset)


def flash_backward(gradient, q, k, v, y, lse, rest):
    """Gradients of q, k and v, where y and lse may be those of a softmax over more keys."""
    name = "_scaled_dot_product_flash_attention" + ("" if q.is_cuda else "_for_cpu") + "_backward"
    return getattr(torch.ops.aten, name)(gradient, q, k, v, y, lse, *rest)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, …) as (B, kv heads, heads / kv heads * T, …): the query heads of a key head as rows of one."""
    return x.reshape(x.size(0), kv_heads, -1, *x.shape[3:])


def grouped_rows_first(x: Tensor, kv_heads: int) -> Tensor:
    """As grouped(), but in memory (B, rows, kv heads, head_dim): flash's backward would copy it there."""
    return x.unflatten(1, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2).transpose(1, 2)


def plain(q, k, v):
    """Causal attention of q (B, heads, T, head_dim) to k and v (B, kv heads, S, head_dim), whose last T entries are the
    queries' own positions, written out in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = grouped(q.to(wide) * q.size(-1) ** -0.5, k.size(1)) @ k.to(wide).mT
    hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1 + k.size(2) - q.size(2))
    scores = scores.masked_fill(hidden.repeat(q.size(1) // k.size(1), 1), -math.inf)
    return (scores.softmax(-1) @ v.to(wide)).view(q.shape).to(q.dtype)


class ContextAttention(torch.autograd.Function):
    """Causal flash attention of q (B, heads, T, head_dim) to k and v (B, kv heads, T, head_dim) and to all of a frozen
    context before them, keys and values (B, kv heads, C, head_dim)."""

    # Two kernels, one softmax: outputs over disjoint keys are averaged by their shares of the sum of exponentials, and
    # each backward, given the joint output and log-sum-exp, yields its part of the gradient. Towards the context there
    # is no mask, so the query heads of a key head are rows of one head: nothing is expanded to `heads` keys.

    @staticmethod
    def forward(ctx, q, k, v, keys, values):
        y, lse, ctx.near = flash(q, k, v, True)
        far, far_lse, ctx.far = flash(grouped(q, k.size(1)), keys, values, False)
        far_lse = far_lse.reshape(lse.shape)
        lse = torch.logaddexp(lse, far_lse)
        # In memory (B, T, heads, head_dim): so the output projection and flash's backward need no copy.
        near, y = y, y.new_empty(y.transpose(1, 2).shape).transpose(1, 2)
        torch.lerp(near, far.reshape(q.shape), (far_lse - lse).exp().to(q.dtype)[..., None], out=y)
        ctx.context = keys, values  # autograd would take the next chunk's entry into the cache for a change of these
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, y, lse = ctx.saved_tensors
        near, dk, dv = flash_backward(gradient, q, k, v, y, lse, ctx.near)
        gradient, y = (grouped_rows_first(x, k.size(1)) for x in (gradient, y))
        q_rows, lse = (grouped(x, k.size(1)) for x in (q, lse))
        # Two of the kernel's five matrix products are for the context's gradients, which nobody needs.
        far, _, _ = flash_backward(gradient, q_rows, *ctx.context, y, lse, ctx.far)
        return near + far.reshape(q.shape), dk, dv, None, None


def attend(q, k, v, kv, backend="flash"):
    """Causal attention, after the context in kv (B, 2, kv heads, context + T, head_dim) if given, whose last T entries
    k and v become."""
    context = []  # keys and values
    if kv is not None:
        before, own = kv.split((kv.size(3) - k.size(2), k.size(2)), dim=3)
        own[:, 0], own[:, 1] = k.detach(), v.detach()
        context = before.unbind(1) if before.size(3) else []
    if backend == "plain":
        if context:
            k, v = (torch.cat(parts, 2) for parts in zip(context, (k, v), strict=True))
        # The backward pass computes the scores again, so that nothing large is kept.
        return checkpoint(plain, q, k, v, use_reentrant=False, preserve_rng_state=False)
    if context:
        return ContextAttention.apply(q, k, v, *context)
    y = flash(q, k, v, True)[0]  # the operator knows its own backward
    return y.transpose(1, 2).contiguous().transpose(1, 2)  # as after a context: compiled code serves both


class Linear(nn.Linear):
    """No bias; float32 weight, used in the dtype of its input. Adapters add to its output."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x, lora: Lora | None = None):
        y = F.linear(x, self.weight.to(x.dtype))
        if lora is None:
            return y
        return y + (x @ lora.a.to(x.dtype).mT) @ lora.b.to(x.dtype).mT


class Embedding(nn.Embedding):
    """A table (rows, width), float32."""

    def reset_parameters(self):  # on the meta device there is nothing to draw, but seconds of imports for it
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Grouped-query projections, with per-head norm and RoPE on queries and keys."""

    def __init__(self, s):
        super().__init__()
        self.head_dim = s.model_dim // s.num_heads
        kv_dim = self.head_dim * s.num_kv_heads
        self.c_q = Linear(s.model_dim, s.model_dim)
        self.c_k = Linear(s.model_dim, kv_dim)
        self.c_v = Linear(s.model_dim, kv_dim)
        self.proj = Linear(s.model_dim, s.model_dim)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))

    def forward(self, x, rope, lora: dict[str, Lora]):
        """x (B, T, d) -> q (B, heads, T, head_dim), k and v (B, kv heads, T, head_dim)."""
        q, k, v = self.c_q(x, lora.get("c_q")), self.c_k(x, lora.get("c_k")), self.c_v(x, lora.get("c_v"))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        q = apply_rotary(norm(q), *rope) * self.q_gain.to(q.dtype)[:, None]
        k = apply_rotary(norm(k), *rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        # Flash lays out its output as its queries are: so, neither the projection nor its own backward copies it. With
        # adapters there is mostly a context, for which the rows of a head must lie together: see grouped().
        return q.contiguous() if lora else q, k, v


class MLP(nn.Module):
    """proj(relu(fc(x))²)."""

    def __init__(self, s):
        super().__init__()
        hidden = int(s.mlp_mult * s.model_dim)
        self.fc = Linear(s.model_dim, hidden)
        self.proj = Linear(hidden, s.model_dim)

    def forward(self, x, lora: dict[str, Lora]):
        return self.proj(self.fc(x, lora.get("mlp.fc")).relu().square(), lora.get("mlp.proj"))


class Block(nn.Module):
    """A learned mix of x with the first layer's input x0, attention, MLP."""

    def __init__(self, s, attention):
        super().__init__()
        self.attention = attention  # the backend
        self.attn = Attention(s)
        self.mlp = MLP(s)
        self.attn_scale = nn.Parameter(torch.ones(s.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(s.model_dim))
        self.resid_mix = nn.Parameter(torch.zeros(2, s.model_dim))

    def before(self, x, x0, rope, lora):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        return x, self.attn(norm(x), rope, lora)

    def after(self, x, y, lora: dict[str, Lora]):
        """y: the heads' output (B, heads, T, head_dim)."""
        heads = y.transpose(1, 2).flatten(2)
        x = x + self.attn_scale.to(x.dtype) * self.attn.proj(heads, lora.get("attn.proj"))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x), lora)

    def forward(self, x, x0, rope, lora, kv):
        x, qkv = self.before(x, x0, rope, lora)
        return self.after(x, attend(*qkv, kv, self.attention), lora)


class BigramHash(nn.Module):
    """Embedding of (previous token, token), hashed (thwu1's record)."""

    def __init__(self, s):
        super().__init__()
        self.embed = Embedding(s.bigram_vocab_size, s.bigram_dim)
        self.proj = nn.Identity() if s.bigram_dim == s.model_dim else Linear(s.bigram_dim, s.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids, at, dtype):
        """ids (B, T) at positions `at` (T,) -> (B, T, d)."""
        last_row = self.embed.num_embeddings - 1  # position 0 has it
        ids = ids.to(torch.int32)
        hashed = (36313 * ids ^ 27191 * F.pad(ids[:, :-1], (1, 0))) % last_row
        return self.scale * self.proj(self.embed(torch.where(at > 0, hashed, last_row).long()).to(dtype))


class SmearGate(nn.Module):
    """Blends each position with the one before it, by a gate per channel."""

    def __init__(self, s):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(s.model_dim))

    def forward(self, x):
        g = self.gate.sigmoid().to(x.dtype)
        return (1 - g) * x + g * F.pad(x[:, :-1], (0, 0, 1, 0))


class GPT(nn.Module):
    """The model, with float32 weights; its stream is of `dtype`, its attention `flash` or `plain`."""

    LEAD = 2  # tokens before a chunk that its first depends on: SmearGate's, and that one's bigram's

    def __init__(self, s, dtype=torch.float32, attention="flash"):
        super().__init__()
        self.softcap = s.logit_softcap
        self.rope_base = s.rope_base
        self.dtype = dtype
        self.tok_emb = Embedding(s.vocab_size, s.model_dim)
        self.bigram = BigramHash(s)
        self.smear = SmearGate(s)
        self.encoders = s.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoders, s.model_dim))
        self.blocks = nn.ModuleList(Block(s, attention) for _ in range(s.num_layers))
        if not s.tie_embeddings:
            self.lm_head = Linear(s.model_dim, s.vocab_size)
        if not self.skip_weights.is_meta:
            self.init_weights(s)

    @torch.no_grad()
    def init_weights(self, s):
        for name, module in self.named_modules():
            if name.endswith(("attn.proj", "mlp.proj", "lm_head")):
                module.weight.zero_()
            elif isinstance(module, Linear):  # the bigram table starts at 0, so its projection must not
                nn.init.orthogonal_(module.weight, (2 * s.num_layers) ** -0.5 if name == "bigram.proj" else 1.0)
        for block in self.blocks:
            block.resid_mix[0] = 1.0  # no operation on the meta device, where most import seconds of modules
        self.tok_emb.weight.normal_(0.0, s.tied_embed_init_std if s.tie_embeddings else 1.0)
        self.bigram.embed.weight.zero_()

    def embed(self, ids, lead, position):
        """ids (B, lead + T), the first of the T at `position` -> embedding (B, T, d), RoPE's cos and sin."""
        at = torch.arange(-lead, ids.size(1) - lead, device=ids.device) + position
        x = norm((self.tok_emb(ids) + self.bigram(ids, at, self.dtype)).to(self.dtype))
        x = self.smear(torch.where((at >= 0)[:, None], x, 0.0))  # nothing comes before a document
        return x[:, lead:].contiguous(), rotary(at[lead:], self.blocks[0].attn.head_dim, self.rope_base, self.dtype)

    def logits(self, x):
        """x (B, T, d) -> (B, T, vocabulary) float32, each within the soft cap."""
        weight = self.lm_head.weight if hasattr(self, "lm_head") else self.tok_emb.weight
        return self.softcap * F.linear(norm(x), (weight / self.softcap).to(x.dtype)).float().tanh()

    def head(self, x, targets):
        nll = F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten(), reduction="none")
        return nll.view(targets.shape)

    def forward(self, ids, targets=None, lora: list[dict[str, Lora]] | None = None, past: Past | None = None):
        """NLL of targets (B, T) in nats, (B, T) float32, or without them the logits (B, T, vocabulary) float32.

        `lora`: each layer's adapters by LORA_TARGETS. After a `past`, whose kv takes up the chunk's own, ids (B, LEAD +
        T) begin before the chunk; else they are (B, T)."""
        position, kv = past or (torch.zeros((), dtype=torch.int64, device=ids.device), None)
        x, rope = self.embed(ids, self.LEAD if past else 0, position)
        x0 = x
        if lora:  # x0 needs no gradient; x has one for block 0 to compile like the others
            x = x.detach().requires_grad_()
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= self.encoders and skips:
                x = x + self.skip_weights[i - self.encoders].to(x.dtype) * skips.pop()
            x = block(x, x0, rope, lora[i] if lora else {}, None if kv is None else kv[:, i])
            if i < self.encoders:
                skips.append(x)
        return self.logits(x) if targets is None else self.head(x, targets)

    def compile_regions(self):
        """Compile what repeats once: test-time training has many shapes."""
        # Attention writes to its input, and so stays outside.
        import torch._dynamo  # takes seconds, which an error before would cost

        torch._dynamo.config.recompile_limit = 64  # beyond it: eager
        torch.fx.experimental._config.use_duck_shape = False  # equal sizes need not stay equal

        def region(function: Callable, *varying: tuple) -> Callable:
            """Compiled for any size of these dimensions of each argument's tensors: symbols for all of them would take
            almost twice as long."""
            compiled = torch.compile(function)

            def call(*arguments):
                for argument, dimensions in zip(arguments, varying, strict=True):
                    for tensor in tree_leaves(argument) if dimensions else ():
                        torch._dynamo.maybe_mark_dynamic(tensor, dimensions)
                return compiled(*arguments)

            return call

        documents, both = (0,), (0, 1)  # (B, …), and (B, T, …)
        self.embed = region(self.embed, both, (), ())
        self.head = region(self.head, both, both)
        for block in self.blocks:
            block.before = region(block.before, both, both, (0,), documents)  # RoPE's are (T, …)
            block.after = region(block.after, both, (0, 2), documents)


# ======== Optimiser ========
# All parameters are views into one flat buffer, all gradients into another: norm, all-reduce, averaging and checkpoint
# are one operation each.


def recipe(name, s):
    """Method, learning rate and weight decay of a parameter."""
    if name in ("tok_emb.weight", "bigram.embed.weight"):
        return "adam", s.tied_embed_lr if s.tie_embeddings else s.embed_lr, s.weight_decay
    if name == "lm_head.weight":
        return "adam", s.head_lr, 0.0
    if name.endswith(".weight"):
        return "muon", s.matrix_lr, s.weight_decay
    return "adam", s.scalar_lr, s.weight_decay


def newton_schulz_step(x):
    """A step of a stack (n, rows, cols), rows <= cols, towards singular values of 1 (K. Jordan's Muon, 2024)."""
    gram = x @ x.mT
    return 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x


def newton_schulz(g, steps: int = 5, dtype=torch.bfloat16, step=newton_schulz_step):
    """Nearest semi-orthogonal matrices of a stack (n, rows, cols), roughly. bf16 will do."""
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        x = step(x)
    return x.mT if tall else x


def adam_(p, g, m, v, step, lr, betas: tuple, eps: float, decay):
    """One AdamW step in place (Loshchilov & Hutter 2019). `step`, () or one per row, counts from 1."""
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    step = step.unsqueeze(-1)
    direction = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    p.mul_(1 - lr * decay).sub_(lr * direction)


def adam_where_(good, p, g, m, v, *recipe):
    """adam_() where `good`, () bool; elsewhere nothing changes."""
    before = p.clone(), m.clone(), v.clone()  # compiled, one kernel without copies
    adam_(p, g, m, v, *recipe)
    for now, old in zip((p, m, v), before, strict=True):
        now.copy_(torch.where(good, now, old))


MOST_SKIPPED = 10  # steps in a row without a finite gradient


class Group(NamedTuple):
    """Parameters of one recipe that lie together in the flat buffers."""

    method: str
    lr: float
    decay: float
    span: slice  # of the buffers
    shape: tuple  # of Muon's stack (n, rows, cols)


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest. Flat float32 buffers (n,): weights, gradients, `m` first
    moments, `v` Adam's second. `skipped` (2,) int64: steps without a finite gradient, in all and in a row."""

    def __init__(self, model, run):
        self.run = run
        alike = {}  # parameters by what a group has in common; Muon's have one shape, to be a stack
        for name, p in model.named_parameters():
            kind = recipe(name, run.s)
            alike.setdefault((kind, p.shape if kind[0] == "muon" else ()), []).append(p)
        self.groups = []
        spans = {}  # of each parameter
        end = 0
        for (kind, shape), parameters in alike.items():
            start = end
            for p in parameters:
                spans[p] = slice(end, end + p.numel())
                end += p.numel() if kind[0] == "muon" else ceil_div(p.numel(), 64) * 64  # aligned, for wide loads
            self.groups.append(Group(*kind, slice(start, end), (len(parameters), *shape)))
            end = ceil_div(end, 64) * 64
        self.weights, self.grads, self.m, self.v = (torch.zeros(end, device=run.device) for _ in range(4))
        for p, span in spans.items():
            self.weights[span].copy_(p.detach().flatten())
            p.data = self.weights[span].view(p.shape)
            p.grad = self.grads[span].view(p.shape)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=run.device)
        self.state = dict(weights=self.weights, m=self.m, v=self.v, skipped=self.skipped)
        self.newton_schulz_step = run.compiled(newton_schulz_step)  # unrolled, it would take five times as long
        self.adam_where_ = run.compiled(adam_where_)

    def step(self, step, multiplier):
        """Returns the gradients' norm before clipping; unless that is finite, only `skipped` changes."""
        s = self.run.s
        gradient_norm = self.run.ranks.sum(self.grads).norm()
        good = gradient_norm < math.inf  # nor is NaN; it stays on the device, for which the host need not wait
        self.skipped += ~good
        self.skipped[1:].mul_(~good | (self.skipped[1:] >= MOST_SKIPPED))  # so many are seen whenever one looks
        if s.grad_clip_norm:
            self.grads.mul_((s.grad_clip_norm / (gradient_norm + 1e-6)).clamp_max(1.0))
        self.grads.masked_fill_(~good, 0.0)  # what is multiplied by 0 below must be finite
        self.muon_step(step, multiplier, good)
        for group in self.groups:
            if group.method == "adam":  # full(): a copy from the host would wait
                count = torch.full((), step + 1.0, device=self.run.device)
                lr = torch.full((), group.lr * multiplier, device=self.run.device)
                buffers = (x[group.span] for x in (self.weights, self.grads, self.m, self.v))
                self.adam_where_(good, *buffers, count, lr, (s.beta1, s.beta2), s.adam_eps, group.decay)
        self.grads.zero_()
        return gradient_norm

    def muon_step(self, step, multiplier, good):
        """Unless `good`, () bool, the gradients are zero, and decay and update are multiplied away."""
        s = self.run.s
        warm = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
        momentum = s.muon_momentum_warmup_start + warm * (s.muon_momentum - s.muon_momentum_warmup_start)
        kept = torch.where(good, momentum, 1.0)
        # Each rank orthogonalises its share of each stack; a stack is gathered while the next one is computed.
        muon = [group for group in self.groups if group.method == "muon"]
        pending = [(group, *self.begin_update(group, momentum, kept)) for group in muon]
        for group, update, gathering in pending:
            if gathering:
                gathering.wait()
            n, rows, cols = group.shape
            lr = group.lr * multiplier
            weights = self.weights[group.span].mul_(torch.where(good, 1 - lr * group.decay, 1.0))
            weights.sub_(update[:n].flatten().float().mul_(good), alpha=lr * max(1, rows / cols) ** 0.5)

    def begin_update(self, group: Group, momentum: float, kept: Tensor):
        """The orthogonal update of a stack, padded to equal shares, and the work that still gathers it, if any."""
        world = self.run.ranks.world
        g = self.grads[group.span]
        g.add_(self.m[group.span].mul_(kept).add_(g), alpha=momentum)  # Nesterov's
        share = ceil_div(group.shape[0], world)
        padded = F.pad(g.view(group.shape), (0, 0, 0, 0, 0, share * world - group.shape[0]))
        mine = padded.split(share)[self.run.ranks.rank]
        mine = newton_schulz(mine, self.run.s.muon_backend_steps, self.run.dtype, self.newton_schulz_step)
        if world == 1:
            return mine, None
        update = mine.new_empty(padded.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        return update, gather(update, mine.contiguous(), async_op=True)


# ======== Training ========
# Learning rate, averaging and the end follow from the seconds that rank 0 announces, so ranks never diverge. Its clock
# excludes warm-up, validation and export; the last training data, which GPTQ sees, are read within it.

RECORD_SHARE = 3500 * 0.0894 / 600  # of the record's steps are warmdown: 89.4 ms each, in 600 s


def lr_multiplier(step: int, elapsed: float, s):
    """In [0, 1], by the iterations or the seconds of training that are left, whichever are fewer."""
    if not s.warmdown_iters:
        return 1.0
    left = s.iterations - step
    if s.max_wallclock_seconds and elapsed:
        left = min(left, (s.max_wallclock_seconds - elapsed) * max(step, 1) / elapsed)
    return min(max(left / s.warmdown_iters, 0.0), 1.0)


def forward_backward(forward, micro_batches: list, share: float):
    """Add to the gradients; returns the sum of `share` times each mean NLL, ()."""
    total = 0.0
    parameters = list(forward.parameters())
    for x, y in micro_batches:
        loss = forward(x, y).mean() * share
        # Added all at once: backward() would launch a kernel for each parameter.
        torch._foreach_add_([p.grad for p in parameters], torch.autograd.grad(loss, parameters))
        total = total + loss.detach()
    return total


@torch.no_grad()
def calibrate(model, loader: BatchLoader, start: int, tokens: int, run):
    """E[x x'] of the inputs x of linear layers, by their weights' names, (cols, cols) float64; for GPTQ alone."""
    if run.s.quantizer != "gptq":
        return {}
    run.ranks.stage = "calibration", "TRAIN_SEQ_LEN"
    sums = {}
    hooks = []

    def add(total, layer, inputs):
        x = inputs[0].flatten(0, -2).float()
        total.add_(x.mT @ x)

    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and name != "lm_head":
            total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=run.device)
            sums[f"{name}.weight"] = total
            hooks.append(layer.register_forward_pre_hook(functools.partial(add, total)))
    width = run.s.train_seq_len
    rows = ceil_div(tokens, width)
    for row in range(run.ranks.rank, rows, run.ranks.world):  # one at a time: any number of ranks agrees
        model(*loader.read(start + row * width, 1))
    for hook in hooks:
        hook.remove()
    return {name: run.ranks.sum(total) / (rows * width) for name, total in sums.items()}


def load_pt(content: bytes):
    """What torch.save() wrote. Raises errors of many kinds, also for a changed byte, which torch.load() would take."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} has another checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class Trainer:
    """A model in training, new or, with RESUME=1, from its checkpoint."""

    def __init__(self, shards: list[Shard], data: str, run: Run):
        self.run = run
        torch.manual_seed(run.s.seed)
        self.model = GPT(run.s, run.dtype, run.attention).to(run.device)
        self.forward = run.compiled(self.model, dynamic=False)
        self.optimizer = Optimizer(self.model, run)
        self.loader = BatchLoader(shards, run)
        self.identity = dict(source=SOURCE_SHA256, data=data) | run.s.of(TrainSettings)
        self.average = torch.zeros_like(self.optimizer.weights)  # a sum of `averaged` samples
        self.tensors = self.optimizer.state | dict(average=self.average)
        self.step = self.averaged = 0  # steps completed
        self.elapsed = self.calibration = 0.0  # seconds, the latter's after the former's
        self.finished = False
        self.schedule = run.s  # its seconds without calibration's
        self.step_seconds = 0.0  # of warm-up's, but for the first
        self.reported = 0  # skipped steps
        self.unsaved = ""  # why the last checkpoint could not be written
        self.saved = -1  # step of the last that was
        path = run.folder / "checkpoint.pt"
        self.resumed = run.s.resume and run.ranks.from_first(path.exists)
        if self.resumed:
            self.resume(path)

    def state(self):
        """What a checkpoint holds."""
        counts = dict(step=self.step, averaged=self.averaged, elapsed=self.elapsed, finished=self.finished)
        return counts | self.tensors | dict(identity=self.identity)

    def restore(self, state: dict):
        for name in ("step", "averaged", "elapsed", "finished"):
            setattr(self, name, type(getattr(self, name))(state[name]))  # or it raises
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name].view_as(tensor))

    def save(self, run: Run):
        """Keep a checkpoint, or in `unsaved` why not."""

        def write():
            content = io.BytesIO()  # so that the disk's errors are the system's, not the serialiser's
            torch.save(self.state(), content)
            try:
                run.write("checkpoint.pt", content.getbuffer())
            except UserError as e:
                return str(e)
            return ""

        self.unsaved = run.ranks.from_first(write)
        self.saved = self.saved if self.unsaved else self.step

    def keep(self):
        """Save, with a note where that fails."""
        self.save(self.run)
        if self.saved == self.step:
            self.unsaved = ""  # else one of this step, from which a resume goes on, is there already
        else:
            self.run.log(f"note: no checkpoint of step {self.step}: {self.unsaved}")

    def stop_on_signal(self, number: float):
        """Raises Interrupted for one that any rank has received, once a checkpoint is written."""
        if number:
            if self.saved != self.step:
                self.keep()
            where = self.unsaved or f"its checkpoint is in {self.run.folder}"
            raise Interrupted(*stopped(int(number), f" after step {self.step}; {where}"))

    def resume(self, path: Path):
        """From the first rank's file. Raises UserError."""
        content = self.run.ranks.from_first(path.read_bytes)
        artifact = path.with_name("final_model.ptz")
        cure = "delete it to start afresh"
        if self.run.ranks.from_first(artifact.exists):
            cure = f"score it by EVAL_ONLY={shlex.quote(str(artifact))}, or choose another OUTPUT_DIR"
        with reading(f"checkpoint {path}", cure):
            state = load_pt(content)
            theirs = state["identity"]
            others = [f"{k.upper()}: {theirs.get(k)}, now {v}" for k, v in self.identity.items() if theirs.get(k) != v]
            if not others:
                self.restore(state)
        if others:
            raise UserError(f"checkpoint {path} has another {others[0]} — restore it, or change OUTPUT_DIR")

    def state_dict(self):
        """The model's, copied to the CPU."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}

    def account(self):
        """For log and result.json."""
        peak = torch.cuda.max_memory_allocated() if self.run.cuda else None
        account = dict(steps=self.step, seconds=self.elapsed, calibration=self.calibration, averaged=self.averaged)
        return account | dict(resumed=self.resumed, peak_memory=peak, skipped=self.reported)

    def timed(self, work, *arguments):
        """What it returns, and seconds."""
        self.run.wait()
        began = time.perf_counter()
        result = work(*arguments)
        self.run.wait()
        return result, time.perf_counter() - began

    def warm_up(self):
        """Steps, undone: everything is compiled."""
        self.run.ranks.stage = MEMORY["training_rows"]
        before = copy.deepcopy(self.state())
        steps = max(self.run.s.warmup_steps, 1)
        seconds = [self.timed(self.train_step)[1] for _ in range(steps)]
        self.step_seconds = float(np.median(seconds[1:])) if steps > 1 else 0.0  # the first compiles
        self.restore(before)
        self.run.log(f"warmup_step:{steps}/{steps}")

    def rehearse(self, run: Run):
        """Warm up, and write as many checkpoints as there will be side by side. Raises UserError."""
        self.warm_up()
        for _ in range(1 if self.resumed or not self.run.s.checkpoint_every else 2):
            self.save(run)
        if self.unsaved:
            raise UserError(self.unsaved)
        self.saved = self.step if self.resumed else -1

    def calibrate(self, start, tokens):
        return self.timed(calibrate, self.model, self.loader, start, tokens, self.run)

    def reserve(self):
        """Keep free what calibration takes, by trying it. Returns Hessians. Raises UserError if no time is left."""
        s = self.run.s
        hessians, _ = self.calibrate(0, s.train_seq_len * self.run.ranks.world)  # may load kernels
        if s.max_wallclock_seconds and not self.finished:
            hessians, seconds = self.calibrate(0, s.calibration_tokens)
            seconds = float(self.run.ranks.max(seconds))
            left = s.max_wallclock_seconds - 1.5 * seconds
            if left <= 0:
                what = f"calibration takes {seconds:.1f} s of MAX_WALLCLOCK_SECONDS={s.max_wallclock_seconds}"
                raise UserError(f"{what} — raise it, lower CALIBRATION_TOKENS, or set QUANTIZER=nearest")
            self.schedule = replace(s, max_wallclock_seconds=left)
            self.note_warmdown(left)
        return hessians

    def note_warmdown(self, seconds):
        """Where it is longer than the run will be."""
        s = self.run.s
        steps = min(s.iterations, seconds / self.step_seconds) if self.step_seconds else math.inf
        if steps < s.warmdown_iters:
            what = f"note: the warmdown is longer than this run's about {steps:.0f} steps, so the learning rate reaches"
            cure = f"WARMDOWN_ITERS={RECORD_SHARE * steps:.0f} would be the record's share"
            self.run.log(f"{what} {steps / s.warmdown_iters:.1%} of its peak; {cure}")

    def seconds_left(self):
        """Of training, by its mean step or, before the first, the preflight's; infinite if nothing is known."""
        mean = self.elapsed / self.step if self.step else self.step_seconds or math.inf
        left = (self.schedule.max_wallclock_seconds or math.inf) - self.elapsed
        return min((self.run.s.iterations - self.step) * mean, left)

    def over(self):
        """Whether another step of mean length would pass a limit."""
        limit = self.schedule.max_wallclock_seconds or math.inf
        ahead = (1 + self.run.cuda) / max(self.step, 1)  # on a GPU the clock is a step behind
        return self.step >= self.run.s.iterations or self.elapsed * (1 + ahead) >= limit

    def train(self, stream):
        """Returns the Hessians. Raises Interrupted, once a checkpoint is written."""
        run, s = self.run, self.run.s
        rows = f"rows per rank:{self.loader.rows} rows per micro-step:{self.loader.micro_rows}"
        run.log(f"training tokens:{self.loader.tokens} {rows}")
        if run.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter() - self.elapsed  # moved on by what is not training
        run.ranks.waits_for_step = True
        while not self.finished:
            over = self.over()
            if over or (s.val_loss_every and self.step % s.val_loss_every == 0):
                if over and not s.max_wallclock_seconds and self.saved != self.step:
                    self.keep()  # before what may take long; under a clock the last training data comes first
                score, seconds = self.timed(evaluate_standard, self.forward, stream, run)
                self.report(score)
                began += seconds
                if self.step and not over:
                    run.log(f"about {self.seconds_left():.0f}s of training left")
                self.stop_on_signal(run.ranks.max(run.ranks.signal))
            if over:
                break
            loss = self.train_step()
            signalled = self.tell_time(began)
            run.tick()
            if self.step <= 10 or self.step % s.train_log_every == 0 or self.over():
                self.report(f"train_loss:{run.ranks.sum(loss).item():.8f}")
            self.stop_on_signal(signalled)
            if s.checkpoint_every and self.step % s.checkpoint_every == 0:
                self.keep()
                self.stop_on_signal(self.tell_time(began))
        return self.finish()

    def tell_time(self, began: float) -> float:
        """Bring `elapsed` up to date. Returns the number of a signal that any rank has received, or 0."""
        ranks = self.run.ranks
        elapsed = time.perf_counter() - began if ranks.rank == 0 else 0.0  # one clock counts
        self.elapsed, signalled = ranks.max([elapsed, float(ranks.signal)]).tolist()
        return signalled

    def report(self, what):
        """Log a loss, and steps that changed nothing. Raises UserError after ten of those in a row."""
        skipped, in_a_row = self.optimizer.skipped.tolist()
        if skipped > self.reported:
            last = f"by {self.step} (batch from token {(self.step - 1) * self.run.s.train_batch_tokens})"
            self.run.log(f"note: {skipped} steps {last} had no finite gradient and changed nothing")
            self.reported = skipped
        if in_a_row >= MOST_SKIPPED:
            what = f"{MOST_SKIPPED} or more steps in a row, up to {self.step}, had no finite gradient"
            raise UserError(f"{what} — lower the learning rates or WEIGHT_DECAY")
        timing = f"train_time:{1000 * self.elapsed:.0f}ms step_avg:{1000 * self.elapsed / max(self.step, 1):.2f}ms"
        self.run.log(f"step:{self.step}/{self.run.s.iterations} {what} {timing}")

    def train_step(self):
        """One step and, late in the warmdown, a sample. Returns this rank's part of the loss, ()."""
        self.run.ranks.stage = MEMORY["training_rows"]
        s = self.run.s
        multiplier = lr_multiplier(self.step, self.elapsed, self.schedule)
        batch = self.loader.batch(self.step)
        loss = forward_backward(self.forward, batch, 1 / (len(batch) * self.run.ranks.world))
        self.optimizer.step(self.step, multiplier)
        self.step += 1
        if s.swa_enabled and multiplier < s.swa_start_frac and self.step % s.swa_every == 0:
            self.average.add_(self.optimizer.weights)
            self.averaged += 1
        self.run.wait_one_behind()
        return loss

    def finish(self):
        """Average and calibrate; a finished checkpoint needs only the latter."""
        run = self.run
        if not self.finished and self.averaged >= 2:
            self.optimizer.weights.copy_(self.average / self.averaged)
        # Before the checkpoint, which takes a disk's time: training data is read within the budget.
        hessians, self.calibration = self.calibrate(self.step * run.s.train_batch_tokens, run.s.calibration_tokens)
        if not self.finished:
            self.finished = True
            self.keep()
        run.ranks.waits_for_step = False  # only now is everything kept
        self.stop_on_signal(run.ranks.max(run.ranks.signal))
        outcome = "their mean is the final model" if self.averaged >= 2 else "too few, the last weights are final"
        run.log(f"swa: {self.averaged} checkpoints: {outcome}")
        run.log(f"training {pairs(self.account())}")
        return hessians


# ======== Export ========
# The artifact holds a model's configuration and its numbers, sorted by kind. All names, shapes and kinds follow from
# the configuration, so the reader knows every length beforehand.

CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram.scale")
LIMITS = {"int5": 15, "int6": 31, "int8": 127}  # largest code
STREAMS = {"int5": "<i1", "int6": "<i1", "int8": "<i1", "scale": "<f2", "fp16": "<f2", "fp32": "<f4"}  # in file order
MAGIC = b"PGOLFGPT"
FORMAT = 2
HEADER = "<8sIQQ32s"  # magic, format, lengths of the frame and of what it expands to, SHA-256 of the frame
HEADER_BYTES = struct.calcsize(HEADER)
MOST_EXPANDED = 1 << 29  # bytes
MOST_CONFIG = 1 << 16  # bytes: JSON parsed may take forty times as many
LARGEST_STRETCH = 8.0
SLACK = 0.004  # share of the cap that may stay free
GPTQ_BLOCK = 128  # columns


class Stored(NamedTuple):
    """Floats, or int8 codes (rows, cols) with an fp16 `scale` (rows,)."""

    kind: str
    values: Tensor
    scale: Tensor | None = None

    def restored(self):
        return self.values.float() * (1.0 if self.scale is None else self.scale.float()[:, None])


def prune(weight: Tensor, fraction: float):
    """Zero what is below the `fraction` quantile of a large matrix's magnitudes."""
    if weight.ndim != 2 or weight.numel() <= 65_536 or not fraction:
        return weight
    size = weight.abs().flatten()
    threshold = torch.quantile(size, fraction) if len(size) <= 1 << 24 else np.quantile(size.numpy(), fraction)
    return torch.where(weight.abs() < threshold, 0.0, weight)


def kind_of(name: str, size: int, fp16_patterns: str):
    """The first rule that fits a tensor of `size` numbers."""
    if size <= 8_192:
        return "fp16"
    if any(pattern in name for pattern in CONTROL):
        return "fp32"
    if any(pattern in name for pattern in fp16_patterns.split(",") if pattern):
        return "fp16"
    if ".mlp." in name:
        return "int5"
    return "int6" if ".attn." in name or "bigram" in name else "int8"


def row_steps(weight: Tensor, kind: str, s, stretch: float = 1.0):
    """Of each row of a float32 matrix, (rows, 1) float32; of int5 and int6 as fp16 has it."""
    limit = LIMITS[kind]
    if kind == "int8":  # rows are clipped at their 99.99984% magnitude (the challenge's baseline)
        return weight.abs().quantile(0.9999984, 1, keepdim=True).div(limit).clamp_min(1 / limit)
    sizes = weight.abs().amax(1, keepdim=True)  # thwu1's record
    if s.quant_sigmas != "0":  # follows the row's bulk
        k = float(s.quant_sigmas.split(",")[kind == "int6"])
        sizes = k * weight.square().mean(1, keepdim=True).sqrt()
    return (sizes / limit * stretch).half().clamp_min(torch.finfo(torch.float16).tiny).float()


def nearest(weight: Tensor, step: Tensor, limit: int):
    """Codes of weights (…, cols) under steps (…, 1)."""
    lowest = -limit if limit == LIMITS["int8"] else -limit - 1  # int8 is symmetric, as in the challenge's baseline
    return (weight / step).round().clamp(lowest, limit)


def gptq(weight: Tensor, step: Tensor, hessian: Tensor, limit: int):
    """Codes of n matrices (n, rows, cols) under steps (n, rows, 1) and Hessians (n, cols, cols), that keep W x rather
    than W (Frantar et al. 2022)."""
    # Rounding a column changes the layer's output by its error times an input. Later columns can undo most of that, as
    # far as their inputs are correlated: row j of the Cholesky factor U of H^-1 = U'U says how the best correction is
    # spread over columns j, j + 1, … once all before are fixed. Columns of the largest inputs come first, while most
    # others can still make up for them.
    h = hessian.float()
    order = h.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)  # (n, cols)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    order = order[:, None].expand_as(weight)
    w = weight.gather(2, order)
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal += (0.01 * diagonal.mean(1, keepdim=True)).clamp_min(1e-8)  # an input may be zero
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for start in range(0, w.size(2), GPTQ_BLOCK):
        span = slice(start, min(start + GPTQ_BLOCK, w.size(2)))
        block, spread = w[:, :, span], u[:, span, span]
        errors = torch.empty_like(block)
        for j in range(block.size(2)):
            column = block[:, :, j : j + 1]
            code = nearest(column, step, limit)
            codes[:, :, start + j] = code[:, :, 0]
            errors[:, :, j : j + 1] = (column - code * step) / spread[:, j, None, j : j + 1]
            block[:, :, j + 1 :] -= errors[:, :, j : j + 1] * spread[:, j, None, j + 1 :]
        w[:, :, span.stop :] -= errors @ u[:, span, span.stop :]
    return torch.empty_like(codes).scatter_(2, order, codes)


def quantize_model(state: dict[str, Tensor], s, hessians=None, stretch=1.0):
    """Prune and quantise a float32 state dict's tensors, in order; those with a Hessian by GPTQ."""
    tensors = {}
    batches = {}  # matrices of one kind and shape
    for name, weight in state.items():
        kind = kind_of(name, weight.numel(), s.fp16_keep_name_patterns)
        weight = prune(weight, s.prune_fraction)
        if kind not in LIMITS:
            tensors[name] = Stored(kind, weight.half() if kind == "fp16" else weight)
            continue
        step = row_steps(weight, kind, s, stretch)
        tensors[name] = Stored(kind, nearest(weight, step, LIMITS[kind]).to(torch.int8), step.half().flatten())
        if name in (hessians or {}):
            batches.setdefault((kind, weight.shape), []).append((name, weight, step, hessians[name]))
    for (kind, _), batch in batches.items():
        names, *columns = zip(*batch, strict=True)
        weight, step, hessian = (torch.stack(column).to(columns[2][0].device) for column in columns)
        codes = gptq(weight, step, hessian, LIMITS[kind]).to("cpu", torch.int8)
        for name, values in zip(names, codes, strict=True):
            tensors[name] = tensors[name]._replace(values=values)
    return tensors


def streams_of(tensors: dict[str, Stored]):
    """The pieces of each of an artifact's streams, in file order."""
    streams = {kind: [t.values for t in tensors.values() if t.kind == kind] for kind in STREAMS}
    return streams | dict(scale=[t.scale for t in tensors.values() if t.scale is not None])


def entropy(codes: np.ndarray):
    """Bits per code, drawn one by one."""
    p = torch.from_numpy(np.bincount(codes.view(np.uint8).ravel()) / codes.size)
    return abs(torch.special.entr(p).sum().item()) / math.log(2)


def artifact_config(s):
    """With this a reader knows every name, shape and kind."""
    return s.of(ModelSettings) | dict(fp16_keep_name_patterns=s.fp16_keep_name_patterns)


@functools.lru_cache(8)
def layout(s):
    """The kinds and shapes of a model's tensors, in order, on the meta device; nobody changes them."""
    tensors = {}
    with torch.device("meta"):
        for name, weight in GPT(s).state_dict().items():
            kind = kind_of(name, weight.numel(), s.fp16_keep_name_patterns)
            tensors[name] = Stored(kind, weight, torch.empty(len(weight)) if kind in LIMITS else None)
    return tensors


def pack(tensors: dict[str, Stored], s):
    """Artifact, and what became of each stream; the same input gives the same bytes."""
    # One zstd frame: the configuration's length (4 bytes), it as JSON, the streams as byte planes: all first bytes of a
    # stream's numbers, then all second ones, each compressed with statistics of its own.
    config = json.dumps(artifact_config(s)).encode()
    planes = {"config": np.frombuffer(len(config).to_bytes(4, "little") + config, np.uint8)[None]}
    for kind, pieces in streams_of({name: tensors[name] for name in layout(s)}).items():
        if pieces:
            numbers = torch.cat([piece.flatten() for piece in pieces]).numpy().astype(STREAMS[kind])
            planes[kind] = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    expanded = sum(plane.size for plane in planes.values())
    if expanded > MOST_EXPANDED:
        raise UserError(
            f"the model has {expanded} bytes, and an artifact {MOST_EXPANDED} — lower MODEL_DIM or NUM_LAYERS"
        )
    # Codes hardly repeat, so matches are chance: none under 7 bytes is smaller and four times faster.
    # Jobs are of one size, so the bytes do not depend on how many of the node's cores take them.
    jobs = dict(threads=min(8, os.cpu_count() or 1), job_size=1 << 21, overlap_log=1)
    level22 = zstandard.ZstdCompressionParameters.from_level(22, source_size=expanded, min_match=7, **jobs)
    compressor = zstandard.ZstdCompressor(compression_params=level22).compressobj(size=expanded)
    frame = b""
    kinds = {}
    for kind, rows in planes.items():
        before = len(frame)
        for row in rows:
            frame += compressor.compress(row.tobytes()) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        size, n = len(frame) - before, rows.shape[1]
        kinds[kind] = dict(weights=n, bytes=size, bits_per_weight=8 * size / n)
        if kind in LIMITS:
            kinds[kind]["entropy"] = entropy(rows)
    frame += compressor.flush()
    del kinds["config"]
    return struct.pack(HEADER, MAGIC, FORMAT, len(frame), expanded, hashlib.sha256(frame).digest()) + frame, kinds


def unpack(blob: bytes, origin: str = "artifact"):
    """Settings with the model's configuration, and float32 state dict. Raises UserError."""
    frame = blob[HEADER_BYTES:]
    with reading(origin, "fetch or make it again"):
        magic, version, length, expanded, digest = struct.unpack(HEADER, blob[:HEADER_BYTES])
        if (magic, version, length) != (MAGIC, FORMAT, len(frame)) or digest != hashlib.sha256(frame).digest():
            raise ValueError(f"no header of format {FORMAT} for the {len(frame)} bytes after it")
        if expanded > MOST_EXPANDED:
            raise ValueError(f"it would expand to {expanded} bytes")
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(frame, read_across_frames=True)
        raw = reader.read(expanded + 1)
        start = 4 + int.from_bytes(raw[:4], "little")
        if len(raw) != expanded or start > MOST_CONFIG:
            raise ValueError(f"it does not expand to {expanded} bytes, or has {start - 4} of configuration")
        config = json.loads(raw[4:start])
        types, usual = ({k: type(v) for k, v in c.items()} for c in (config, artifact_config(Settings())))
        if types != usual:
            raise ValueError("the configuration is not a model's")
        s = Settings.from_env({name.upper(): value for name, value in config.items()})
        state = restored(raw[start:], s)
        if not all(weight.isfinite().all() for weight in state.values()):
            raise ValueError("a weight is not finite")
    return s, state


def restored(raw: bytes, s):
    """The streams' float32 state dict. Raises ValueError if they are not as long as the model's."""
    tensors = layout(s)
    read = {}
    for kind, pieces in streams_of(tensors).items():
        sizes = [piece.numel() for piece in pieces]
        width = np.dtype(STREAMS[kind]).itemsize
        planes = np.frombuffer(raw[: sum(sizes) * width], np.uint8).reshape(width, sum(sizes))
        read[kind] = iter(torch.from_numpy(planes.T.copy().view(STREAMS[kind]).ravel()).split(sizes))
        raw = raw[planes.size :]
    if raw:
        raise ValueError(f"{len(raw)} bytes too many")
    state = {}
    for name, (kind, values, scale) in tensors.items():
        scale = None if scale is None else next(read["scale"])
        state[name] = Stored(kind, next(read[kind]).view(values.shape), scale).restored()
    return state


def fit(state: dict[str, Tensor], hessians: dict, run):
    """The least stretch of steps whose artifact fits the cap, or the largest; and what pack() returns for it."""
    cap = run.s.artifact_max_bytes
    state = {name: prune(weight, run.s.prune_fraction) for name, weight in state.items()}
    s = replace(run.s, prune_fraction=0.0)
    codes = 0
    for name, stored in quantize_model(state, s).items():
        if not stored.restored().isfinite().all():
            what = "beyond fp16's range" if state[name].isfinite().all() else "that are not finite"
            raise UserError(f"{name} has weights {what} — lower the learning rates, or change WEIGHT_DECAY")
        codes += stored.values.numel() * (stored.kind in ("int5", "int6"))
    stretch = low = 1.0  # does not fit, once it is tried
    high = LARGEST_STRETCH
    best = None
    for attempt in range(8):
        blob, kinds = pack(quantize_model(state, s, hessians, stretch), s)
        free = cap - len(SOURCE_BYTES) - len(blob)
        run.log(f"export: steps stretched by {stretch:.4f}: {free} bytes free of ARTIFACT_MAX_BYTES={cap}")
        tried = stretch, blob, kinds
        if free >= 0:
            high = stretch
            best = tried
        else:
            low = stretch
        if low in (high, LARGEST_STRETCH) or 0 <= free <= SLACK * cap:
            break
        # Twice the step is a bit less per code, or not quite where steps are coarse; bisection helps where that misses.
        stretch *= 2 ** min(8 * (SLACK / 2 * cap - free) / max(codes, 1), 3)
        if not best and (stretch >= high or attempt >= 5):
            stretch = high  # whether anything fits
        elif not low < stretch < high:
            stretch = (low + high) / 2
    return best or tried


def export(state: dict[str, Tensor], hessians: dict, run, then: str = ""):
    """Write the artifact and final_model.pt. Returns the account. Raises UserError. `then`: how to go on with the
    artifact, where a checkpoint could not be written."""
    began = time.perf_counter()
    stretch, blob, kinds = fit(state, hessians, run)
    run.write("final_model.ptz", blob)  # what is small and matters comes before what is large
    run.ranks.how_to_go_on = then or run.ranks.how_to_go_on
    floats = io.BytesIO()
    torch.save(state, floats)
    run.write("final_model.pt", floats.getbuffer())
    total = len(blob) + len(SOURCE_BYTES)
    cap = run.s.artifact_max_bytes
    account = dict(model_bytes=len(blob), code_bytes=len(SOURCE_BYTES), total_bytes=total, max_bytes=cap)
    account |= dict(fits=total <= cap, stretch=stretch, seconds=time.perf_counter() - began)
    account["sha256"] = hashlib.sha256(blob).hexdigest()
    account["float_sha256"] = hashlib.sha256(floats.getbuffer()).hexdigest()
    for kind, row in kinds.items():
        run.log(f"export kind:{kind} {pairs(row)}")
    run.log(f"export {pairs(account)}")
    return account | dict(kinds=kinds)


# ======== Evaluation ========
# Every target exactly once: one function scores windows for all modes, a Score knows what it covers.


class Score(NamedTuple):
    """A sum over targets: NLL in nats, counts of targets and bytes."""

    nll: float
    targets: int
    bytes: int

    @classmethod
    def of(cls, nll: np.ndarray, stream) -> "Score":
        """Of the whole stream's NLL, by target or by document."""
        return cls(float(nll.sum(dtype=np.float64)), stream.target_count, stream.byte_count)

    @property
    def loss(self):  # nats per target
        return self.nll / self.targets

    @property
    def bpb(self):  # bits per byte
        return self.nll / math.log(2) / self.bytes

    def __str__(self):
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f}"

    def checked(self, stream) -> "Score":
        """Itself. Raises RuntimeError if it does not cover the stream."""
        whole = stream.target_count, stream.byte_count
        if self[1:] != whole:
            raise RuntimeError(f"scored {self.targets} targets and {self.bytes} bytes of {whole}")
        return self

    def figure(self, protocol, context, seconds, **more) -> dict:
        """For result.json; what is not finite is null."""
        figure = dict(protocol=protocol, context=context, backward_looking=True)
        figure |= dict(val_loss=finite(self.loss), val_bpb=finite(self.bpb), targets=self.targets, bytes=self.bytes)
        return figure | dict(seconds=seconds, lacking=0) | more


def finite(number: float) -> float | None:
    """JSON has no other numbers."""
    return number if math.isfinite(number) else None


def score_windows(forward, stream, windows: tuple, width: int, lora=None, past: Past | None = None):
    """Score targets [skip, length) of B windows, `windows` start, length and skip, (B,) int64 each. Returns NLL (B,
    width) float32, 0 where not scored, and detached sums (B, 3) float64 of NLL, targets, bytes."""
    start, length, skip = windows
    column = torch.arange(-GPT.LEAD if past else 0, width, device=start.device)
    at = (start[:, None] + column).clamp(0, stream.target_count - 1)
    column, within = column[-width:], at[:, -width:]
    nll = forward(stream.tokens[at].long(), stream.tokens[within + 1].long(), lora, past)
    scored = (column >= skip[:, None]) & (column < length[:, None])
    nll = torch.where(scored, nll, 0.0)
    sums = nll.detach().sum(1, dtype=torch.float64), scored.sum(1), (stream.bytes[within] * scored).sum(1)
    return nll, torch.stack(sums, 1)


def overlapping(stream, size, stride):
    """(n, 3) start, length and skip of windows that score what no earlier one reached."""
    start = np.arange(0, max(stream.target_count - size, 0) + stride, stride)
    length = np.minimum(size, stream.target_count - start)
    return np.stack((start, length, np.where(start > 0, size - stride, 0)), 1)


@torch.no_grad()
def evaluate_standard(forward, stream, run, stride=None):
    """The Score by windows of TRAIN_SEQ_LEN targets, side by side or every `stride`."""
    s = run.s
    what = "sliding_windows" if stride else "validation_rows"
    run.ranks.stage = MEMORY[what]
    batch = run.most(what)
    size = s.train_seq_len
    windows = overlapping(stream, size, stride or size)
    total = torch.zeros(3, dtype=torch.float64, device=run.device)
    mine = np.array_split(windows, run.ranks.world)[run.ranks.rank]
    if run.compile:  # one shape, one compilation
        mine = np.pad(mine, ((0, -len(mine) % batch), (0, 0)))
    mine = torch.from_numpy(mine).to(run.device)  # at once: a copy waits for all that the device has to do
    for i in range(0, len(mine), batch):
        _, sums = score_windows(forward, stream, mine[i : i + batch].unbind(1), int(windows[0, 1]))
        total += sums.sum(0)
        if stride and i // batch % 100 == 99:
            run.log(f"sliding evaluation: window {i + batch} of {len(mine)}")
    nll, targets, bytes_ = run.ranks.sum(total).tolist()
    return Score(nll, int(targets), int(bytes_)).checked(stream)


def evaluate_sliding(forward, stream, run):
    """The Score by windows every EVAL_STRIDE."""
    return evaluate_standard(forward, stream, run, run.s.eval_stride)


def under_way(sessions: list[dict]) -> list[dict]:
    """What the last one, an evaluation, goes on with: those of its tag, or killed before they had one, since one of
    these finished. Their scores are still there."""
    *earlier, now = sessions or [dict(tag="")]
    rows = [row for row in earlier if row["stage"] == "evaluation" and row["tag"] in ("", now["tag"])]
    ends = [i for i, row in enumerate(rows, 1) if row["ended"] == "finished"]
    return rows[ends[-1] if ends else 0 :]


def time_spent(began: float, run: Run) -> dict:
    """The first rank's seconds since `began`; at least that many if a process was killed."""
    seconds = time.perf_counter() - began
    killed = any(row["ended"] == "killed" for row in under_way(run.sessions))
    within = not run.s.eval_max_seconds or seconds <= run.s.eval_max_seconds
    return dict(seconds=seconds, at_least=killed, within_budget=within)


# ======== Test-time training ========
# LoRA (Hu et al. 2021), fresh for every document; documents of like length advance chunk by chunk side by side. A
# deadline or other ranks decide when a document's number is made, never which one it is.
#
# A batch advances in steps: a chunk of its first n documents is scored, trained on, kept as context, or several of
# these. On a GPU a step of a shape that has come before is one launch: a recorded graph of some hundred kernels. What a
# graph has frozen is what ChunkStep names, and every address; position and learning rate therefore lie in tensors on
# the device, which the host fills before it launches.

STEP_FLOOR = {"cpu": 0, "cuda": 2048}  # tokens; smaller steps cost no less
LORA_EPS = 1e-10  # Adam's, for the adapters
UNSCORED = -math.inf  # so that a maximum merges what two ranks or two sessions know
PLAIN, ADAPTED = 0, 1  # rows of target NLL: without adaptation, and the adapted score; behind it a mixture's third part


def lora_shapes(s) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers that TTT_LORA_TARGETS names, in the order of LORA_TARGETS."""
    width = s.model_dim
    kv_width = width // s.num_heads * s.num_kv_heads
    hidden = int(s.mlp_mult * width)
    sizes = (width, width), (width, kv_width), (width, kv_width), (width, width), (width, hidden), (hidden, width)
    chosen = s.ttt_lora_targets.split(",")
    return {name: shape for name, shape in zip(LORA_TARGETS, sizes, strict=True) if name in chosen}


def draw_lora_a(s, document: int) -> np.ndarray:
    """A document's A of every layer and target, (rank, inputs) each, flat float32: uniform in +-1/sqrt(inputs)."""
    rng = np.random.default_rng([s.seed, document])
    widths = np.array([inputs for inputs, _ in lora_shapes(s).values()] * s.num_layers)
    drawn = rng.random(int(s.ttt_lora_rank * widths.sum()), np.float32)
    drawn *= 2
    drawn -= 1
    for n, part in zip(widths, np.split(drawn, s.ttt_lora_rank * np.cumsum(widths)[:-1]), strict=True):
        part *= np.float32(n**-0.5)
    return drawn


class Adapters:
    """LoRA of B documents and its Adam state: `flat`, `m`, `v` (B, n) float32; `steps` (B,) taken. A row holds every A,
    layer by layer, then every B."""

    def __init__(self, batch: int, run: Run):
        s = run.s
        rank = s.ttt_lora_rank
        targets = lora_shapes(s)
        self.names = list(targets)
        a_shapes = [(rank, inputs) for inputs, _ in targets.values()] * s.num_layers
        self.shapes = a_shapes + [(outputs, rank) for _, outputs in targets.values()] * s.num_layers
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.a_size = sum(self.sizes[: len(a_shapes)])
        self.scale = (s.ttt_lora_alpha or rank) / rank
        self.flat, self.m, self.v = (torch.zeros(batch, sum(self.sizes), device=run.device) for _ in range(3))
        self.steps = torch.zeros(batch, dtype=torch.int64, device=run.device)
        self.recipe = (s.beta1, s.beta2), LORA_EPS, s.ttt_weight_decay
        self.adam_ = run.compiled(adam_, dynamic=True)

    def begin(self, a: np.ndarray | None):
        """Start from a (B, …), as draw_lora_a gives it, and B = 0; without `a`, from the model itself."""
        for x in (self.flat, self.m, self.v, self.steps):
            x.zero_()
        if a is not None:
            self.flat[: len(a), : self.a_size] = torch.from_numpy(a.reshape(len(a), -1))

    def layers(self, n: int) -> tuple[Tensor, list[dict[str, Lora]]]:
        """The first n documents' rows as a leaf, and for every layer its views by target."""
        flat = leaf = self.flat[:n].detach().requires_grad_()
        if self.scale != 1:
            flat = torch.cat((self.scale * leaf[:, : self.a_size], leaf[:, self.a_size :]), dim=1)
        pieces = flat.split(self.sizes, dim=1)  # its backward is one concatenation
        views = [piece.unflatten(1, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        half = len(views) // 2
        loras = list(map(Lora, views[:half], views[half:]))
        targets = len(self.names)
        return leaf, [dict(zip(self.names, loras[i : i + targets], strict=True)) for i in range(0, half, targets)]

    def step(self, gradient: Tensor, lr: Tensor):
        """Adam on the first len(gradient) documents."""
        n = len(gradient)
        self.steps[:n] += 1
        self.adam_(self.flat[:n], gradient, self.m[:n], self.v[:n], self.steps[:n], lr, *self.recipe)


class ChunkStep(NamedTuple):
    """All of a step that its graph depends on."""

    documents: int  # the first of the batch
    width: int  # tokens of a window
    context: int | None  # cached tokens before the chunk; None: a window of its own
    score: bool = False  # note its NLL
    train: bool = False  # take an Adam step on each document's mean NLL
    keep: bool = False  # append it to the context


def device_is_full() -> bool:
    """Whether less than a twentieth of the GPU's memory is free: half of what most_that_fits() leaves."""
    free, total = torch.cuda.mem_get_info()
    return 20 * free < total


def memory_beside_tensors() -> int:
    """Bytes of the GPU that PyTorch's allocator has no part in: contexts, kernels, graphs."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


class DocumentBatch:
    """Documents that advance together, longest first: those that still have chunk c are the first active[c].

    `nll` (B, targets) float32 is what the present reading of the documents has scored, UNSCORED elsewhere; `epochs` are
    the documents' sums, (B,) float64, of each reading that adapt() has begun."""

    def __init__(self, model, stream, capacity: int, run: Run):
        self.model, self.stream, self.run = model, stream, run
        s = run.s
        capacity = max(capacity, 1 + run.compile)  # _step() says why
        run.ranks.stage = MEMORY["documents"]
        integers = functools.partial(torch.zeros, dtype=torch.int64, device=run.device)
        self.start, self.end = integers(capacity), integers(capacity)
        self.adapters = Adapters(capacity, run)
        room = ceil_div(int(stream.lengths.max()), s.ttt_chunk_size) * s.ttt_chunk_size
        self.nll = torch.zeros(capacity, room, device=run.device)
        # Keys, rotated, and values. The chunk in progress owns the last slots; before them token t of the last `window`
        # has slot window - 1 - t % window. With a window of 4 and chunks of 2:
        #     chunk of tokens 4, 5:   [ 3  2  1  0 | 4  5 ]
        #     chunk of tokens 6, 7:   [ 3  2  5  4 | 6  7 ]    4 and 5 took the places of 0 and 1
        # So a context shorter than the window borders on the chunk, and a new token replaces the oldest. Softmax does
        # not ask for their order.
        self.window = s.ttt_eval_seq_len - s.ttt_chunk_size
        shape = capacity, s.num_layers, 2, s.num_kv_heads, s.ttt_eval_seq_len, s.model_dim // s.num_heads
        self.kv = torch.zeros(shape, dtype=model.dtype, device=run.device)
        self.position = integers(())  # of the chunk's first target
        self.lr = torch.zeros((), device=run.device)
        self.graphs = {}  # by ChunkStep: None once it has run eagerly, False if it cannot be recorded
        self.recording = True  # until that fails
        self.memory_before = None  # beside tensors, when the first is recorded
        if run.cuda:  # one stream: graphs share memory
            self.pool, self.recorder = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def load(self, documents: np.ndarray):
        """Take up at most `capacity` documents. Raises ValueError if they do not come longest first."""
        self.documents = documents
        self.epochs = []
        self.part = 0
        self.lengths = self.stream.lengths[documents]
        chunks = ceil_div(self.lengths, self.run.s.ttt_chunk_size)
        if (np.diff(chunks) > 0).any():
            raise ValueError("documents must come longest first")
        self.active = [int((chunks > chunk).sum()) for chunk in range(chunks[0] + 1)]
        self.start[: len(documents)] = torch.from_numpy(self.stream.starts[documents])
        self.end[: len(documents)] = torch.from_numpy(self.lengths)

    def score(self):
        """Read without adaptation, whatever the time. Adapters of zeros: compiled code is shared."""
        self.deadline = math.inf
        self.adapters.begin(None)
        self._read_through(cached=True, train=False)

    def adapt(self, epochs: int, deadline: float = math.inf, a: np.ndarray | None = None, part: int = 0):
        """Adapt to every document until the deadline, from its drawn A or those given, as that part of a mixture.
        replay: each of the first `epochs` epochs scores every chunk, then trains on it (PR #467). single_pass: each
        chunk is scored once, then trained on TTT_N_EPOCHS times."""
        s = self.run.s
        self.deadline = deadline
        self.part, self.peak_lr = part, s.ttt_rates[part]
        self.adapters.begin(self.draw_a() if a is None else a)
        waves = [math.cos(math.pi * epoch / s.ttt_n_epochs) for epoch in range(s.ttt_n_epochs)]
        cached = s.ttt_context == "cached"
        self.epochs = []
        if s.ttt_protocol == "single_pass":
            self._single_pass(waves, cached)
            return
        for wave in waves[:epochs]:
            self._set_lr(wave)
            self._read_through(cached, train=True)
            self.epochs.append(self._document_sums())

    def draw_a(self) -> np.ndarray:
        """Of every document, (B, …) float32."""
        return np.stack([draw_lora_a(self.run.s, int(document)) for document in self.documents])

    def target_nll(self) -> list[np.ndarray]:
        """Of the last reading, (targets,) float32 for each document, UNSCORED where cut off; for NaN +inf."""
        rows = self.nll[: len(self.lengths), : int(self.lengths.max())]
        rows = rows.nan_to_num(math.inf, math.inf, UNSCORED).cpu().numpy()
        return [nll[:length] for nll, length in zip(rows, self.lengths, strict=True)]

    def epoch_nll(self) -> np.ndarray:
        """Sums of each epoch, (epochs, B) float64, UNSCORED where cut off; for NaN +inf."""
        return torch.stack(self.epochs).nan_to_num(math.inf, math.inf, UNSCORED).cpu().numpy()

    def _document_sums(self) -> Tensor:
        nll = self.nll[: len(self.lengths), : int(self.lengths.max())]
        beyond = torch.arange(nll.size(1), device=nll.device) >= self.end[: len(nll), None]
        nll = nll.masked_fill(beyond, 0.0)
        return torch.where((nll == UNSCORED).any(1), UNSCORED, nll.sum(1, dtype=torch.float64))  # whatever else it has

    def _set_lr(self, wave: float):
        """From its peak at 1 to zero at -1."""
        self.lr.fill_(self.peak_lr * 0.5 * (1 + wave))

    def _single_pass(self, waves: list[float], cached: bool):
        self.nll.fill_(UNSCORED)
        for chunk, n in enumerate(self.active[:-1]):
            longer = self.active[chunk + 1]  # documents that go on after this chunk
            if self._expired():
                return
            self._run_step(chunk, n, cached, score=True)
            for wave in waves if longer else ():
                if self._expired():
                    return
                self._set_lr(wave)
                self._run_step(chunk, longer, cached, train=True)
            if longer and cached:  # under the final adapters
                self._run_step(chunk, longer, cached, keep=True)

    def _read_through(self, cached: bool, train: bool):
        """Score every chunk, and train on it or not."""
        self.nll.fill_(UNSCORED)
        for chunk, n in enumerate(self.active[:-1]):
            if self._expired():
                return
            keep = cached and self.active[chunk + 1] > 0
            self._run_step(chunk, n, cached, score=True, train=train, keep=keep)

    def _expired(self) -> bool:
        return time.perf_counter() >= self.deadline

    def _run_step(self, chunk: int, n: int, cached: bool, **asked):
        """A step on a chunk of the first n documents."""
        size = self.run.s.ttt_chunk_size
        first = chunk * size
        width = size if self.run.compile else min(size, int(self.lengths[0]) - first)  # compiled: one width for all
        context = min(first, self.window)
        if not cached:
            width = min(first + width, self.run.s.ttt_eval_seq_len)
            context = None
        self.position.fill_(first)
        self._launch(ChunkStep(n, width, context, **asked))
        self.run.wait_one_behind()
        self.run.tick()
        reading = f"part {self.part + 1} reading {len(self.epochs) + 1}"
        self.run.log_after_silence(f"{reading}: chunk {chunk + 1} of {len(self.active) - 1}")

    def _launch(self, step: ChunkStep):
        """_step(), by a CUDA graph from the second of a shape on: one launch instead of hundreds."""
        came_before = step in self.graphs
        graph = self.graphs.setdefault(step)
        if self.run.graphs and came_before and graph is None:
            graph = self.graphs[step] = self._record(step)
        if self.run.graphs and graph:
            graph.replay()
        else:
            self._step(step)

    def _record(self, step: ChunkStep):
        """A graph of the step; False if recording fails, or if too little of the device is free for what one takes."""
        # Nothing is executed meanwhile: if it fails the state is whole, and the step goes on kernel by kernel.
        if not any(self.graphs.values()) or device_is_full():
            torch.cuda.empty_cache()  # while a graph is recorded the allocator gives nothing back
        if not self.recording or device_is_full():
            return False
        if self.memory_before is None:
            self.memory_before = memory_beside_tensors()
        graph = torch.cuda.CUDAGraph()
        self.recorder.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.recorder):
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    self._step(step)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # what broke it says more
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as e:
            self.recording = False
            what = f"{step} gave {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            self.run.log(f"note: no more CUDA graphs, what is not recorded is launched kernel by kernel: {what}")
            return False
        return graph

    def account_of_graphs(self) -> dict:
        """Shapes that steps had, how many were recorded, and bytes of the device that these take besides tensors."""
        recorded = sum(map(bool, self.graphs.values()))
        taken = memory_beside_tensors() - self.memory_before if recorded else 0
        return dict(shapes=len(self.graphs), recorded=recorded, bytes_beside_tensors=taken)

    def _step(self, step: ChunkStep):
        documents, width, context, score, train, keep = step
        size = self.run.s.ttt_chunk_size
        # A batch of one would be compiled apart: a document that has come to its end accompanies it, or an empty one.
        n = max(documents, 2) if self.run.compile else documents
        leaf, loras = self.adapters.layers(n)
        end = self.end[:n].minimum(self.position + size)
        begin, past = self.position.expand(n), None
        if context is None:
            begin = (end - self.run.s.ttt_eval_seq_len).clamp_min(0)
        else:
            past = Past(self.position, self.kv[:n, ..., self.window - context : self.window + width, :])
        windows = self.start[:n] + begin, end - begin, self.position - begin
        with torch.set_grad_enabled(train or self.run.compile):  # compiled code would be compiled for both
            nll, sums = score_windows(self.model, self.stream, windows, width, loras, past)
        if score:
            # Each window's chunk begins at another column; beyond a document's end there is nothing to read.
            column = torch.arange(min(size, width), device=nll.device)
            chunk = nll.detach().gather(1, (windows[2][:, None] + column).clamp_max(width - 1))
            self.nll[:n].index_copy_(1, self.position + column, chunk)
        if train:
            loss = (nll.sum(1) / sums[:, 1].clamp_min(1).float()).sum()  # each gets its own gradient
            # Who only accompanies stays as it is: replay's next epoch begins from there.
            self.adapters.step(torch.autograd.grad(loss, leaf)[0][:documents], self.lr)
        if keep:
            self._push(n, width)

    def _push(self, n: int, width: int):
        """The chunk's last tokens become context."""
        keep = min(width, self.window)
        if keep:
            at = self.position + torch.arange(width - keep, width, device=self.kv.device)
            new = self.kv[:n, ..., self.window + width - keep : self.window + width, :]
            self.kv[:n].index_copy_(4, self.window - 1 - at % self.window, new)


def batch_documents(lengths: np.ndarray, run: Run) -> list[np.ndarray]:
    """Batches of like length, the same for any world size, costliest first."""
    size = run.most("documents")
    if not run.s.ttt_batch_size:
        size = min(size, ceil_div(len(lengths), 8))
    order = np.argsort(-lengths, kind="stable")
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return sorted(batches, key=lambda documents: -batch_cost(lengths[documents], run.s, STEP_FLOOR[run.device.type]))


def batch_cost(lengths: np.ndarray, s, floor: int) -> float:
    """Predicted cost of a batch's epoch (targets per document, longest first), in tokens of matrix products."""
    # Its chunks are sequential: each costs its tokens weighted by their context, never less than `floor`.
    size = s.ttt_chunk_size
    chunks = np.arange(ceil_div(int(lengths[0]), size))
    tokens = np.clip(lengths[:, None] - chunks * size, 0, size).sum(0)
    context = np.minimum(chunks * size, s.ttt_eval_seq_len - size) + size / 2
    weight = 1 + context / (1 + s.num_kv_heads / s.num_heads + s.mlp_mult) / s.model_dim
    return float(np.maximum(tokens * weight, floor).sum())


def training_steps(s) -> float:
    """Steps for each chunk in DocumentBatch.adapt(); one without training counts a third."""
    return s.ttt_n_epochs + (0 if s.ttt_protocol == "replay" else 2 / 3)


def predict(stream, run: Run) -> dict[str, float]:
    """Seconds of the evaluation by the preflight's paces, were all ranks equally busy."""
    # Besides, there is the reading without adaptation; every part of a score is a pass, and replay's epochs follow.
    s = run.s
    part, epochs = (1, s.ttt_n_epochs) if s.ttt_protocol == "replay" else (training_steps(s), 0)
    steps = 1 / 3 + len(s.ttt_rates) * part + epochs * (s.ttt_figures > 1)
    lengths, floor = stream.lengths, STEP_FLOOR[run.device.type]
    cost = sum(batch_cost(lengths[documents], s, floor) for documents in batch_documents(lengths, run))
    return {name: pace * steps * cost / run.ranks.world for name, pace in run.pace.items()}


class Scores:
    """NLL in nats, UNSCORED where none is known: of every target, `targets` (rows, N-1) float32, PLAIN, ADAPTED and
    perhaps a mixture's third part; of every document for replay's epochs, `epochs` (E, documents) float64 (E = 0 where
    one epoch is all)."""

    # Each process writes what it has scored to a file of its own, in pairs of arrays: rows of (figure, document, count)
    # and their numbers; figures are the rows of `targets`, then those of `epochs`. Of two numbers for one thing the
    # worse counts, so what ranks and sessions know merges in any order, and a file may be cut off anywhere.

    def __init__(self, tag: str, stream, run: Run):
        self.run, self.stream = run, stream
        epochs = run.s.ttt_figures if run.s.ttt_figures > 1 else 0
        self.targets = np.full((1 + len(run.s.ttt_rates), stream.target_count), UNSCORED, np.float32)
        self.epochs = np.full((epochs, len(stream.lengths)), UNSCORED)
        self.pattern = f"scores_{tag}_*.bin"
        if run.s.resume:
            for path in run.folder.glob(self.pattern):
                self._read(path)
            self.merge()
        accounts = (row for row in under_way(run.sessions) if row["tag"] or row["ended"] == "killed")
        if run.sessions and (self.targets != UNSCORED).any() and not any(accounts):  # made in seconds that nobody knows
            run.sessions.insert(-1, run.sessions[-1] | dict(seconds=0.0, ended="killed"))
        run.folder.mkdir(parents=True, exist_ok=True)  # another machine's may have been removed
        self.path = run.folder / f"scores_{tag}_{run.ranks.rank}_{time.time_ns()}.bin"  # never behind what is cut off
        self.file = open(self.path, "xb")  # noqa: SIM115 - open to the end

    def _read(self, path: Path):
        """A file up to where it is cut off, by a process that ended, or damaged."""
        file = io.BytesIO(path.read_bytes())
        with contextlib.suppress(ValueError, EOFError, IndexError, TypeError, MemoryError):
            while True:
                rows, numbers = np.load(file), np.load(file)
                parts = np.split(numbers, np.cumsum(rows[:, 2])[:-1])
                for (figure, document, count), nll in zip(rows.tolist(), parts, strict=True):
                    if len(nll) == count:
                        self._note(figure, document, nll)

    def _note(self, figure: int, document: int, nll: np.ndarray):
        start = self.stream.starts[document]
        if figure < len(self.targets):
            known = self.targets[figure, start : start + len(nll)]
        else:
            known = self.epochs[figure - len(self.targets), document : document + 1]
        np.maximum(known, nll, out=known)

    def add(self, figure: int, documents: np.ndarray, nll: list[np.ndarray]):
        """Keep one array of NLL for each document. Raises UserError if the disk takes no more."""
        rows = []
        for document, numbers in zip(documents, nll, strict=True):
            rows.append((figure, document, len(numbers)))
            self._note(figure, document, numbers)
        content = io.BytesIO()  # of numpy's own errors no cause is known
        np.save(content, np.array(rows))
        np.save(content, np.concatenate(nll))
        try:
            self.file.write(content.getbuffer())
            self.file.flush()
        except OSError as e:
            raise UserError(system_says(e, self.path)) from e

    def of_documents(self, nll: np.ndarray) -> np.ndarray:
        """Sums of targets' NLL (N-1,) by document, (documents,) float64; UNSCORED where one is missing."""
        missing = np.logical_or.reduceat(nll == UNSCORED, self.stream.starts)
        with np.errstate(invalid="ignore"):  # infinite ones of both signs
            return np.where(missing, UNSCORED, np.add.reduceat(nll, self.stream.starts, dtype=np.float64))

    def merge(self):
        """Give every rank what any rank has."""
        self.targets = self.run.ranks.max(self.targets)
        self.epochs = self.run.ranks.max(self.epochs)

    def remove(self):
        """Once the result is written."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):  # whatever is left does no harm
            for path in self.run.folder.glob(self.pattern):
                path.unlink(missing_ok=True)  # another rank may have
        if self.run.ranks.rank > 0:
            with contextlib.suppress(OSError):  # another machine's, left empty
                self.run.folder.rmdir()


def score_documents(model, stream, scores: Scores, deadline: float, run: Run) -> dict[str, float]:
    """Every document without adaptation, whatever the time; then what is the score; then replay's epochs, the first one
    again. Returns this rank's seconds of each pass."""
    batches = batch_documents(stream.lengths, run)
    batch = DocumentBatch(model, stream, max(map(len, batches)), run)
    unscored = np.stack([scores.of_documents(row) for row in scores.targets]) == UNSCORED
    missing = dict(no_adaptation=unscored[PLAIN], score=unscored[ADAPTED:].any(0))
    if len(scores.epochs):
        missing["replay"] = (scores.epochs == UNSCORED).any(0)
    seconds = {}
    for label, lacking in missing.items():
        if label == "replay" and time.perf_counter() < deadline:
            known = "no batch is left to begin of what is to have a score"  # none waits for other ranks
            if run.ranks.world == 1:
                score, plain = (Score.of(scores.targets[row], stream).bpb for row in (ADAPTED, PLAIN))
                bpb = f"epoch 1: {score:.4f} bits per byte, {plain:.4f} without adaptation"
                known = f"every document that is to have a score has it ({bpb})"
            run.log(f"{known}; replay's other epochs follow, no scores")
        began = time.perf_counter()
        todo = [documents for documents in batches if lacking[documents].any()]
        done = np.cumsum([batch_cost(stream.lengths[documents], run.s, 0) for documents in todo])
        for number, documents in run.ranks.queue(todo):
            if label != "no_adaptation" and time.perf_counter() >= deadline:
                break
            batch.load(documents)
            score_batch(label, batch, scores, deadline)
            spent = time.perf_counter() - began
            left = spent * (done[-1] / done[number - 1] - 1)
            run.log(f"{label}: batch {number} of {len(todo)} after {spent:.0f}s, about {left:.0f}s left")
        seconds[label] = time.perf_counter() - began
    if run.cuda:
        run.log(f"CUDA graphs {pairs(batch.account_of_graphs())}")
    scores.merge()
    return seconds


def score_batch(label: str, batch: DocumentBatch, scores: Scores, deadline: float):
    """One pass over a loaded batch, whose NLL go into the table."""
    if label == "no_adaptation":
        batch.score()
        scores.add(PLAIN, batch.documents, batch.target_nll())
    elif label == "score":
        a = batch.draw_a()
        for part in range(len(batch.run.s.ttt_rates)):
            batch.adapt(1, deadline, a, part)
            scores.add(ADAPTED + part, batch.documents, batch.target_nll())
    else:
        batch.adapt(batch.run.s.ttt_n_epochs, deadline)
        for figure, nll in enumerate(batch.epoch_nll(), len(scores.targets)):
            scores.add(figure, batch.documents, list(nll[:, None]))


def mix(weights: np.ndarray, parts: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n,) by mixtures of K that give `parts` (K, n), under weights (K, n) or (K, 1), and the weights
    (K, n) that follow once what they are of has come."""
    weights = weights * parts
    p = weights.sum(0)
    weights *= (1 - share) / p
    weights += share / len(parts)
    return p, weights


def mixture(nll: np.ndarray, starts, lengths, share: float) -> np.ndarray:
    """NLL (N,) float64 of a fixed-share mixture of K predictions, from the NLL (K, N) that each gives to the targets of
    documents that start at `starts` and have `lengths` targets (Herbster & Warmuth, Machine Learning 1998)."""
    # Weights begin equal; each target multiplies them by the probability that each gave it, and `share` of the sum is
    # dealt out evenly again. So they know earlier targets alone, and the mixture is a probability.
    order = np.argsort(-lengths, kind="stable")
    least, parts = np.empty(nll.shape[1]), np.empty(nll.shape)

    def take_exponentials(span: slice):
        least[span] = nll[:, span].min(0)  # taken out, for what float64 cannot hold
        np.exp(least[span] - nll[:, span], out=parts[:, span])

    def mix_documents(some: np.ndarray):
        longer = np.searchsorted(-lengths[some], -np.arange(lengths[some[0]]))  # than t: the first ones
        weights = np.full((len(nll), len(some)), 1 / len(nll))
        for t, n in enumerate(longer):
            at = starts[some[:n]] + t
            parts[0, at], weights = mix(weights[:, :n], parts.take(at, axis=1), share)  # half of [:, at]'s seconds

    def take_logarithms(span: slice):
        least[span] -= np.log(parts[0, span])

    spans = [slice(i, i + (1 << 20)) for i in range(0, len(least), 1 << 20)]
    quiet = functools.partial(np.seterr, invalid="ignore")  # NaN where all are infinite; each thread has its own
    with ThreadPoolExecutor(2, initializer=quiet) as pool:  # some at a time: what the cache holds, for two cores
        list(pool.map(take_exponentials, spans))
        list(pool.map(mix_documents, np.split(order, range(4096, len(order), 4096))))
        list(pool.map(take_logarithms, spans))
    return least


def by_position(nll: dict[str, np.ndarray], stream) -> dict[str, np.ndarray]:
    """Sums over spans of the document that end at 64, 128, 256 and so on: `figures` (F,) names, `nll` (F, S) in nats,
    `targets`, `bytes` and `ends` (S,)."""
    longest = int(stream.lengths.max())
    ends = 64 << np.arange(max(1, math.ceil(math.log2(longest / 64)) + 1))
    bytes_ = stream.bytes.cpu().numpy()
    position = np.arange(stream.target_count) - np.repeat(stream.starts, stream.lengths)
    span = np.searchsorted(ends, position, side="right")
    rows = (*nll.values(), np.ones_like(bytes_), bytes_)
    *sums, targets, bytes_ = (np.bincount(span, values, len(ends)) for values in rows)
    return dict(figures=[*nll], nll=np.stack(sums), targets=targets, bytes=bytes_, ends=np.minimum(ends, longest))


def report_documents(scores: Scores, seconds: dict[str, float], began: float, run: Run) -> tuple[dict, Score]:
    """Figures and the Score from the merged table; keeps NLL by document and by position. On the first rank."""
    s, stream = run.s, scores.stream
    plain, adapted, *_ = scores.targets
    sums = np.stack([scores.of_documents(row) for row in scores.targets])
    nll = np.stack([*sums[: ADAPTED + 1], *scores.epochs[1:]])
    lacking = nll == UNSCORED
    if lacking[0].any():
        raise RuntimeError(f"{lacking[0].sum()} documents were not scored")
    nll = np.where(lacking, nll[0], nll)  # nothing is dropped
    name = "epoch_1" if s.ttt_protocol == "replay" else "single_pass"
    targets = {"no_adaptation": plain, name: np.where(np.repeat(lacking[1], stream.lengths), plain, adapted)}
    arrays = dict(index=np.arange(nll.shape[1]), targets=stream.lengths, bytes=stream.document_bytes)
    arrays |= dict(nll_no_adaptation=nll[0], nll_per_epoch=nll[1:], figures_finished=(~lacking[1:]).sum(0))
    mixed = None
    if s.ttt_mixture:
        # Where the deadline cut a part off, the prediction without adaptation is in its place.
        known = np.where(scores.targets == UNSCORED, plain, scores.targets)
        targets["mixture"] = mixture(known, stream.starts, stream.lengths, s.ttt_mixture_share)
        arrays["nll_mixture"] = scores.of_documents(targets["mixture"])
        names = "no_adaptation", s.ttt_protocol, f"{s.ttt_protocol}_at_{s.ttt_mixture_lr:g}"
        parts = (Score.of(row, stream).bpb for row in np.where(sums == UNSCORED, sums[PLAIN], sums))
        cut = (sums == UNSCORED).any(0)
        arrays["figures_finished"] *= ~cut  # of a score that lacks a part none is
        mixed = arrays["nll_mixture"], int(cut.sum()), dict(zip(names, parts, strict=False))
    account = dict(documents=len(stream.lengths)) | time_spent(began, run) | dict(passes=seconds)
    if len(scores.epochs):
        again = scores.epochs[0] != UNSCORED
        with np.errstate(invalid="ignore"):  # both may be infinite
            account["epoch_1_again"] = finite(float(np.abs(scores.epochs[0] - nll[1])[again].max(initial=0.0)))
    run.write("ttt_documents.npz", npz(arrays))
    run.write("ttt_positions.npz", npz(by_position(targets, stream)))
    return label_figures(nll, lacking.sum(1).tolist(), mixed, account, stream, run)


def label_figures(nll, lacking: list[int], mixed, account: dict, stream, run: Run) -> tuple[dict, Score]:
    """Log every figure for what it is; result.json's account, and the Score. `nll` (1 + figures, documents); `lacking`
    counts the documents that a figure lacks; `mixed` is None or a mixture's NLL (documents,), how many lack a part, and
    each part's bits per byte."""
    s = run.s
    seconds = account["passes"]
    plain, *scores = (Score.of(row, stream) for row in nll)
    figures = account | dict(curve=[], score="backward_looking")
    figures["no_adaptation"] = plain.figure("no_adaptation", "cached", seconds["no_adaptation"])
    run.log(f"no_adaptation {plain}")
    for epoch, score in enumerate(scores, 1):
        reading = dict(backward_looking=epoch == 1, epoch=epoch, lacking=lacking[epoch])
        reading["not_finite"] = int((~np.isfinite(nll[epoch])).sum())
        took = seconds["score" if epoch == 1 else "replay"]
        figures["curve"].append(score.figure(f"ttt_{s.ttt_protocol}", s.ttt_context, took, **reading))
        if s.ttt_protocol == "replay":
            told = epoch in (1, len(scores)) or epoch % 10 == 0
            run.log(f"ttt_epoch:{epoch}/{s.ttt_n_epochs} {score}", console=told)
    first, last = scores[0], scores[-1]
    figures |= dict(backward_looking=figures["curve"][0], last_epoch=figures["curve"][-1])
    if epoch > 1:
        run.log(f"note: only epoch 1 is backward-looking, a valid score; {epoch} has seen its text {epoch - 1} times")
    score = first
    if mixed:
        score = Score.of(mixed[0], stream)
        reading = dict(lacking=mixed[1], share=s.ttt_mixture_share, parts={k: finite(v) for k, v in mixed[2].items()})
        figures["mixture"] = score.figure("mixture", s.ttt_context, seconds["score"], **reading)
        figures["score"] = "mixture"
        run.log(f"mixture {score} {' '.join(f'{name}:{bpb:.8f}' for name, bpb in mixed[2].items())}")
    lacks = figures[figures["score"]]["lacking"]
    run.log(f"ttt {pairs(account)} first_lacks:{lacks} last_lacks:{lacking[-1]}")
    if lacks or lacking[-1]:
        what = f"{lacks} documents lack the score, {lacking[-1]} the last epoch"
        what += ", and count without adaptation there"
        run.log(f"note: EVAL_MAX_SECONDS={s.eval_max_seconds:g} ran out: {what}; raise it, or 0 for no limit")
    bpb = f"backward_looking_val_bpb:{first.bpb:.8f} last_epoch_val_bpb:{last.bpb:.8f}"
    run.log(f"final_ttt_exact protocol:{s.ttt_protocol} context:{s.ttt_context} {bpb}")
    return figures, score


def evaluate_documents(model, stream, run: Run, tag: str, began: float) -> tuple[dict, Score, Scores]:
    """Figures, the score, and the table behind them. What a document lacks EVAL_MAX_SECONDS after `began` is its NLL
    without adaptation."""
    scores = Scores(tag, stream, run)
    limit = run.s.eval_max_seconds
    margin = min(2.0 + 3e-7 * stream.target_count, 0.1 * limit)  # for merging, the mixture and the report
    seconds = score_documents(model, stream, scores, began + (limit or math.inf) - margin, run)
    seconds = dict(zip(seconds, run.ranks.max(list(seconds.values())).tolist(), strict=True))
    figures, score = run.ranks.from_first(report_documents, scores, seconds, began, run)
    return figures, score, scores


# ======== Main ========
# The preflight tells the story once in small before main() does, so that what a late stage can hit is hit early.


class Weights(NamedTuple):
    """Settings (an artifact's header fixes the model), float32 state dict, and the file's SHA-256."""

    settings: Settings
    state: dict[str, Tensor]
    sha256: str


def read_weights(path: Path, run: Run) -> Weights:
    """A .ptz, or a .pt's state dict, read by the first rank, told to all. Raises UserError."""
    s = run.s
    blob = run.ranks.from_first(path.read_bytes)
    digest = hashlib.sha256(blob).hexdigest()
    if path.suffix == ".pt":
        with reading(path, "name a run's .ptz or .pt"):
            state = {str(name): tensor.float() for name, tensor in load_pt(blob).items()}
            if not all(tensor.isfinite().all() for tensor in state.values()):
                raise ValueError("a weight is not finite")
        return Weights(s, state, digest)
    theirs, state = unpack(blob, str(path))
    for name, value in artifact_config(theirs).items():
        if name.upper() in os.environ and getattr(s, name) != value:
            raise UserError(f"{name.upper()}={getattr(s, name)} but {path} has {value} — unset {name.upper()}")
    return Weights(replace(s, **artifact_config(theirs)).checked(), state, digest)


def scoring_model(run: Run) -> GPT:
    """Frozen, its weights still to be loaded."""
    with torch.device("meta"):
        model = GPT(run.s, run.dtype, run.attention)
    there = {name: torch.empty(p.shape, device=run.device) for name, p in model.named_parameters()}
    model.load_state_dict(there, assign=True)
    model.requires_grad_(False)
    for module in (model.bigram.proj, *model.blocks.modules()):
        if isinstance(module, Linear):
            module.to(run.dtype)  # cast once what every step would cast
    if run.compile and run.s.ttt_enabled:
        model.compile_regions()
    return model


def load_weights(model: GPT, state: dict[str, Tensor], origin: str, run: Run):
    """Raises UserError where names or shapes differ, or what ranks hold."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        what = " ".join(str(e).split()[6:])[:200]  # without "Error(s) in loading state_dict for GPT:"
        raise UserError(f"{origin}: {what} — set NUM_LAYERS, MODEL_DIM, … to match") from e
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    run.ranks.agree(dict(weights=digest.hexdigest()[:16]))


def make_artifact(trainer: Trainer, hessians: dict[str, Tensor], stream, run: Run) -> dict:
    """Export, and what quantisation costs: the standard bpb of both weights. The trainer keeps the artifact's."""
    path = run.folder / "final_model.ptz"
    then = command(run, EVAL_ONLY=str(path)) if trainer.unsaved else ""
    account = run.ranks.from_first(export, trainer.state_dict(), hessians, run, then)
    run.ranks.how_to_go_on = then or run.ranks.how_to_go_on
    bpb = dict(float=evaluate_standard(trainer.forward, stream, run).bpb)
    load_weights(trainer.model, read_weights(path, run).state, "the artifact", run)
    bpb["artifact"] = evaluate_standard(trainer.forward, stream, run).bpb
    run.log(f"export val_bpb float:{bpb['float']:.8f} artifact:{bpb['artifact']:.8f}")
    return account | dict(val_bpb={name: finite(value) for name, value in bpb.items()})


def evaluation_tag(weights: str, stream, run: Run) -> str:
    """Of all that the scores of targets depend on, so not of ranks, batches or a mixture's share."""
    s = run.s
    kinds, others = ("ttt_", "eval_stride", "beta", "seed"), ("ttt_batch_size", "ttt_mixture_share")
    scoring = [(k, v) for k, v in asdict(s).items() if k.startswith(kinds) and k not in others]
    machine = str(run.dtype), run.attention, run.compile, torch.__version__, 0 if s.ttt_enabled else s.train_seq_len
    inputs = scoring, s.of(ModelSettings), machine, SOURCE_SHA256, weights, stream.fingerprint
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]


def keep_result(result: dict, run: Run):
    """Write result.json, by the first rank. From then on there is nothing to go on with."""

    def done():
        if run.folder == Path(run.s.output_dir):  # not the preflight's
            run.ranks.how_to_go_on, run.ranks.outcome = "", f"the result is in {run.folder}"

    def write():
        run.write("result.json", json.dumps(result, indent=1).encode())
        done()

    run.ranks.from_first(write)
    done()


def score_file(model: GPT, stream, run: Run, **known) -> Score:
    """Load the file, evaluate it and report; result.json takes what else is `known`. Raises UserError."""
    s = run.s
    began = time.perf_counter()
    path = Path(s.eval_only or run.folder / "final_model.ptz")
    scores = None
    with run.session("evaluation"):
        if run.ranks.rank == 0:
            for name in ("ttt_documents.npz", "ttt_positions.npz"):  # whose result was deleted, or never written
                (run.folder / name).unlink(missing_ok=True)
        weights = read_weights(path, run)
        run.sessions[-1]["tag"] = tag = evaluation_tag(weights.sha256, stream, run)
        earlier = sum(row["seconds"] for row in under_way(run.sessions))  # killed ones took a little longer
        began -= float(run.ranks.max(float(earlier)))
        load_weights(model, weights.state, str(path), run)
        quantised = path.suffix != ".pt"
        run.log(f"evaluating {path}, {'' if quantised else 'un'}quantised weights: {s.of(ModelSettings)}")
        if s.ttt_enabled:
            figures, score, scores = evaluate_documents(model, stream, run, tag, began)
        else:
            score = evaluate_sliding(run.compiled(model, dynamic=False), stream, run)
            run.log(f"final_sliding_exact {score}")
            figures = time_spent(began, run)
            figures["sliding"] = score.figure("sliding", f"stride {s.eval_stride}", figures["seconds"])
        run.tick(0.0)
        result = dict(schema_version=3, run_id=s.run_id, seed=s.seed, settings=asdict(s), source_sha256=SOURCE_SHA256)
        result["overridden"] = sorted(f.name for f in fields(s) if f.name.upper() in os.environ)
        result |= dict(source_bytes=len(SOURCE_BYTES), environment=environment(run), weights_sha256=weights.sha256)
        result |= dict(quantised=quantised, world_size=run.ranks.world, evaluation=figures) | known
        result["sessions"] = [*run.sessions[:-1], run.sessions[-1] | dict(ended="finished")]  # once this is written
        result |= dict(val_loss=finite(score.loss), val_bpb=finite(score.bpb))
        keep_result(result, run)
        if scores:
            scores.remove()
    if math.isfinite(score.nll):
        run.ranks.from_first(summarise, result, run)
    return score


def most_that_fits(most: int, work: Callable[[int], object], run: Run) -> int:
    """`most`, or a half, a quarter and so on of it, at which work(n) finds room on the GPU of every rank. Raises
    OutOfMemoryError where one is too many."""
    # A tenth of what others leave stays free for what is not the allocator's: graphs, buffers of NCCL and cuBLAS.
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.9 * (free + torch.cuda.memory_reserved()) / total)
    n = most
    try:
        while True:
            try:
                work(n)
                run.wait()
                break
            except torch.OutOfMemoryError:
                if n == 1:
                    what = f"{run.ranks.stage[0]}, one at a time"
                    run.ranks.stage = what, "TRAIN_SEQ_LEN, TTT_EVAL_SEQ_LEN or NUM_LAYERS"
                    raise
                n //= 2
            finally:  # when the error holds nothing any more
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return -int(run.ranks.max(-n))


def find_what_fits(trainer: Trainer | None, model: GPT, run: Run) -> dict[str, int]:
    """How much each stage to come can compute at once, for Run.fits."""
    # Tried kernel by kernel, which takes more memory than compiled code does and compiles nothing for a size that is
    # then too large. No score depends on what is found, but for rounding.
    s = run.s
    size = s.train_seq_len
    longest = s.ttt_eval_seq_len + s.ttt_chunk_size

    def train(rows: int):
        before = copy.deepcopy(trainer.tensors)  # as warm_up() has it
        forward_backward(trainer.forward, [trainer.loader.read(0, rows)], 1.0)
        del before

    @torch.no_grad()
    def score(rows: int):
        start = torch.zeros(rows, dtype=torch.int64, device=run.device)
        windows = start, start + size, start
        score_windows(trainer.forward if trainer else model, synthetic_stream([size], run), windows, size)

    def adapt(documents: int):
        stream = synthetic_stream([longest] * documents + [run.longest], run)  # scores have room for the latter
        batch = DocumentBatch(model, stream, documents, run.using(ttt_n_epochs=1))
        batch.load(np.arange(documents))
        torch.cuda.reset_peak_memory_stats()
        batch.adapt(1)
        kept = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        graphs = torch.empty(kept, dtype=torch.uint8, device=run.device)  # they keep as much as a step needs
        batch.adapt(1)
        del graphs

    tries = dict(training_rows=train, validation_rows=score) if trainer else {}
    tries |= dict(documents=adapt) if s.ttt_enabled else dict(sliding_windows=score)
    found = {}
    with torch.compiler.set_stance("force_eager"):
        for what, work in tries.items():
            run.ranks.stage = MEMORY[what]
            found[what] = most_that_fits(run.most(what), work, run)
    if trainer:
        trainer.optimizer.grads.zero_()
    return found


def preflight(trainer: Trainer | None, model: GPT, run: Run) -> dict[str, float]:
    """Every stage to come once, untrained and short, outside both budgets: a run in a temporary folder, without a log.
    Returns the seconds of each."""
    s = run.s
    seconds = {}
    began = time.perf_counter()

    def done(stage):
        run.wait()
        seconds[stage] = time.perf_counter() - began - sum(seconds.values())

    small = run.using(eval_max_seconds=0.0, ttt_n_epochs=min(s.ttt_n_epochs, 2), resume=False)
    small.log_file = small.lock_file = None
    small.sessions = []
    if run.cuda:  # a CPU does not say before it is too late
        run.fits = small.fits = find_what_fits(trainer, model, small)
        done("memory")
    stride = 0 if s.ttt_enabled else s.eval_stride
    longest = max(s.train_seq_len * run.ranks.world + stride, s.ttt_eval_seq_len + s.ttt_chunk_size)
    stream = synthetic_stream([longest, s.ttt_chunk_size + 1], run)  # rows for all ranks; more context than a window's
    place = dict(prefix="preflight_", suffix=".tmp", dir=run.folder, ignore_cleanup_errors=True)
    with tempfile.TemporaryDirectory(**place) as folder:  # of each rank its own: nothing is shared
        small.folder = Path(folder)
        if trainer and not trainer.finished:
            trainer.rehearse(small)
            done("training")
            evaluate_standard(trainer.forward, stream, small)
            done("validation")
        if trainer:
            before = trainer.state_dict()
            make_artifact(trainer, trainer.reserve(), stream, small)
            load_weights(trainer.model, before, "the weights before", run)
            done("export")
        if s.ttt_enabled:
            run.graphs = small.graphs = rehearse_adaptation(model, small)
            run.rehearsed, run.pace = small.rehearsed, small.pace
        exit_code(score_file(model, stream, small), None, None, small)  # raises where weights give no number
        done("evaluation")
    run.log("preflight " + " ".join(f"{name}:{value:.1f}s" for name, value in seconds.items()))
    return seconds


def describe_what_follows(trainer: Trainer | None, stream, rehearsed: dict[str, float], run: Run):
    """Log what the preflight, which took `rehearsed` seconds, has found: memory, graphs, and how long each stage to
    come will take."""
    if run.cuda:
        run.log(f"at once, as settings say or what of that fits: {pairs(run.fits)}")
        sizes = *torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
        run.log("memory free:{:.1f} of {:.1f} GiB, kept by the allocator:{:.1f}".format(*(x / 2**30 for x in sizes)))
    if run.rehearsed:
        used = "used" if run.graphs else "note: not used, every step is launched kernel by kernel"
        run.log(f"CUDA graphs against eager steps: {pairs(run.rehearsed)} (at most: nll 0.001, movement 0.1); {used}")
    expected = {}
    if trainer:  # the former is infinite after a single warm-up step, which compiles
        expected = dict(training=0.0 if trainer.finished else trainer.seconds_left(), export=rehearsed["export"])
    expected |= {f"evaluation_{name}": seconds for name, seconds in predict(stream, run).items()}
    if known := {stage: seconds for stage, seconds in expected.items() if 0 < seconds < math.inf}:
        run.log(f"expected seconds of what follows: {pairs(known)}")


def rehearse_batch(batch: DocumentBatch, graphs: bool) -> tuple[np.ndarray, Tensor, float]:
    """NLL, the adapters' movement (B, n) and seconds of all the stream's documents, by graphs or kernel by kernel."""
    run = batch.run
    run.graphs = graphs
    batch.load(np.arange(len(batch.stream.lengths)))
    a = batch.draw_a()
    batch.score()
    run.wait()
    began = time.perf_counter()
    batch.adapt(run.s.ttt_n_epochs, a=a, part=-1)  # the boldest
    run.wait()
    seconds = time.perf_counter() - began
    end = batch.adapters.flat.clone()
    batch.adapters.begin(a)
    nll = batch.epoch_nll() if batch.epochs else np.concatenate(batch.target_nll())
    return nll, end - batch.adapters.flat, seconds


def differences(one: tuple, other: tuple) -> tuple[float, float]:
    """Of two rehearsals, relative: the largest of an NLL, and that of the movements."""
    (nll, moved, _), (other_nll, other_moved, _) = one, other
    movement = (other_moved - moved).norm() / moved.norm().clamp_min(1e-30)  # at TTT_LORA_LR=0 nothing moves
    return float((np.abs(other_nll - nll) / np.abs(nll)).max()), movement.item()


def rehearse_adaptation(model: GPT, run: Run) -> bool:
    """Compile every shape, by documents that end one after another. Returns whether CUDA graphs compute what was
    recorded, scores and movement: `rehearsed` says how nearly, beside what an eager repeat does (flash's backward adds
    in any order), and `pace` how fast."""
    s, device = run.s, run.device.type
    for p in model.parameters():  # a fresh model's zeros would leave LoRA without gradient
        p.normal_(std=0.05)
    size = run.most("documents") if run.cuda or run.compile else 1  # only to be timed
    longest = s.ttt_eval_seq_len + s.ttt_chunk_size
    stream = synthetic_stream([longest // (1 + 3 * i // size) for i in range(size)], run)
    batch = DocumentBatch(model, stream, size, run)
    modes = dict(kernel_by_kernel=False, graphs=True) if run.cuda else dict(kernel_by_kernel=False)
    again = eager, *graphs = [rehearse_batch(batch, mode) for mode in modes.values()]
    if run.cuda or run.compile:  # now nothing is compiled or recorded any more
        again = [rehearse_batch(batch, mode) for mode in modes.values()]
    cost = training_steps(s) * batch_cost(stream.lengths, s, STEP_FLOOR[device])
    run.pace = {name: seconds / cost for name, (_, _, seconds) in zip(modes, again, strict=True)}
    if not graphs:
        return False
    nll, movement = differences(eager, graphs[0])
    run.rehearsed = dict(nll=nll, movement=movement, movement_of_a_repeat=differences(eager, again[0])[1])
    same = batch.recording and nll <= 1e-3 and movement <= 0.1  # NaN is not
    return not run.ranks.max(not same)


def describe(trainer: Trainer | None, stream, run: Run):
    """Log what repeats the run; a star marks settings from the environment."""
    for text in (SOURCE_BYTES.decode(), *misspelt(os.environ)):
        run.log(text, console=False)
    usual = asdict(Settings.from_env({"PRESET": run.s.preset}))
    for name, value in asdict(run.s).items():
        star = "*" if name.upper() in os.environ else " "
        run.log(f"{star} {name.upper()}={value}", console=value != usual[name])
    run.log(pairs(environment(run)))
    if run.ranks.world > 1:
        run.log(f"devices of the ranks: {', '.join(run.devices)}")
    if run.no_gpu:
        run.log(f"on the CPU: {run.no_gpu}")
    elif run.attention == "plain":
        run.log(
            "note: no flash attention for this GPU, dtype and head width; it is written out, slower and in more memory"
        )
    run.log(f"validation documents:{len(stream.lengths)} targets:{stream.target_count} bytes:{stream.byte_count}")
    if trainer:
        run.log(f"model parameters:{sum(p.numel() for p in trainer.model.parameters())}")
        if trainer.resumed:
            run.log(f"resumed from {run.folder / 'checkpoint.pt'} at step {trainer.step}")
    run.log("preflight: every stage to come, once and in small")


def located(path: str, run_file: Path) -> str:
    """Where a path of a run's settings leads, as it is if nowhere. A relative one was meant from where the run was
    started, which no result says: it is tried from here, then from each folder above the run's file."""
    tried = (str(folder / path) for folder in (Path(), *Path(os.path.realpath(run_file)).parents))
    return next(filter(os.path.exists, tried), path)


def settings_beside(weights: str) -> dict:
    """Data, tokenizer and the settings of model and evaluation, as variables, of the run whose weights EVAL_ONLY names,
    for where the environment is silent; nothing where no result.json of these weights is beside them."""
    path = Path(weights).parent / "result.json"
    if not weights or not path.exists():
        return {}
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    kinds = ("device", "data_path", "tokenizer_path", "train_seq_len", "eval_s", "eval_b", "eval_m", "val_", "ttt_")
    kinds += ("beta", "seed", *(f.name for f in fields(ModelSettings)))
    content = path.read_bytes()
    with reading(f"{path}, whose settings EVAL_ONLY takes,", "restore it, or move it away"):
        result = json.loads(content)
        artifact = result["artifact"] or {}
        if digest not in (result["weights_sha256"], artifact.get("sha256"), artifact.get("float_sha256")):
            return {}
        kept = {name: value for name, value in result["settings"].items() if name.startswith(kinds)}
        kept |= {name: located(kept[name], path) for name in ("data_path", "tokenizer_path")}
        if os.environ.get("TTT_MIXTURE", str(int(kept.get("ttt_mixture", False)))) == "0":
            kept["ttt_mixture_lr"] = 0.0  # which belongs to the mixture
        values = {name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in kept.items()}
        return dict(settings=values, tokenizer=str(result["data"]["tokenizer"]))


def tokenizer_beside(env: dict[str, str]) -> dict[str, str]:
    """TOKENIZER_PATH where the environment has only a DATA_PATH with a single tokenizer, as data/text.py leaves it."""
    models = [*Path(env["DATA_PATH"]).glob("*.model")] if env.get("DATA_PATH") else []
    return dict(TOKENIZER_PATH=str(models[0])) if len(models) == 1 else {}


def summarise(result: dict, run: Run):
    """The outcome, in a few lines of plain words."""
    figures = result["evaluation"]
    score = figures[figures.get("score", "sliding")]
    kind = "artifact" if result["quantised"] else "unquantised weights"
    run.log(f"score of the {kind}: {score['val_bpb']:.4f} bits per byte ({score['protocol']}, backward-looking)")
    if "curve" in figures:
        plain, last = figures["no_adaptation"]["val_bpb"], figures["last_epoch"]
        if plain:  # else it is not finite
            run.log(f"without adaptation {plain:.4f}: adaptation gains {plain - score['val_bpb']:.4f}")
        if last["val_bpb"] and not last["backward_looking"]:
            run.log(f"epoch {last['epoch']}: {last['val_bpb']:.4f}, no score: it has trained on what it predicts")
    if result.get("artifact"):
        run.log("artifact and code: {total_bytes:,} of {max_bytes:,} bytes".format(**result["artifact"]))
        spent = result["training"]["seconds"] + result["training"]["calibration"]
        limit = result["settings"]["max_wallclock_seconds"]
        limit = f" of MAX_WALLCLOCK_SECONDS={limit:g}" if limit else ""
        run.log(f"training and calibration took {spent:.0f}s{limit}")
    run.log(f"evaluation took {figures['seconds']:.0f}s; all figures are in {run.folder}")
    folder, picture = (shlex.quote(str(path)) for path in (run.folder, run.folder / "picture"))
    audit = f"{python()} data/audit.py {folder}; " if "curve" in figures else ""  # of test-time training
    run.log(f"next: {audit}{python()} data/plot.py {folder} --out {picture}")
    for line in misspelt(os.environ):
        run.log(line)


def agree_on_start(run: Run):
    """Raises UserError unless all ranks have one source, settings (but paths), versions and kind of device."""
    own = {"data_path", "tokenizer_path", "output_dir", "eval_only", "run_id"}  # of each rank's machine
    settings = {name.upper(): value for name, value in asdict(run.s).items() if name not in own}
    shared = {name: value for name, value in environment(run).items() if name not in ("device", "threads")}
    run.ranks.agree(dict(source=SOURCE_SHA256, EVAL_ONLY=bool(run.s.eval_only)) | shared | settings)
    run.devices = run.ranks.gather(environment(run)["device"])


def check_tokenizer(trained: str, stream, run: Run):
    """Raises UserError unless the text was made by the tokenizer of the training, given by its SHA-256."""
    if trained != stream.tokenizer:
        what = f"TOKENIZER_PATH={run.s.tokenizer_path} is not the tokenizer of the training of {run.s.eval_only}"
        raise UserError(f"{what} — unset TOKENIZER_PATH and DATA_PATH to take that run's")


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a .npz file."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def look_around(ranks: Ranks) -> dict:
    """Warn of misspelt settings, look for EVAL_ONLY's file, and return settings_beside() it, all by the first rank."""
    weights = os.environ.get("EVAL_ONLY", "")
    if ranks.rank == 0:
        for line in misspelt(os.environ):
            say(line)  # first of all: what fails may fail for them
        if weights and not Path(weights).is_file():  # a folder, or a pipe, whose reader waits for its other end
            Path(weights).stat()  # before a device is looked for; an error says why
            raise UserError(f"EVAL_ONLY={weights} is no file — name a run's final_model.ptz or .pt")
    kept = ranks.gather(settings_beside(weights) if ranks.rank == 0 else None)[0]
    if weights and not kept and ranks.rank == 0:
        what = f"no result.json of {weights} beside it, or an earlier version's"
        say(f"note: {what}: data and settings are the environment's, or the defaults")
    return kept


def exit_code(score: Score, trainer: Trainer | None, artifact: dict | None, run: Run) -> int:
    """0, or 3 with a line of what an artifact has too much, once everything is written. Raises UserError for a score
    that is not finite, and for a last checkpoint that could not be written."""
    if not math.isfinite(score.nll):
        raise UserError(f"the score is {score.nll} — lower the learning rates, or score other weights")
    if trainer and trainer.unsaved:
        raise UserError(f"{trainer.unsaved}; everything else is written")
    if not artifact or artifact["fits"]:
        return 0
    if run.ranks.rank == 0:
        what = "artifact and code have {total_bytes} bytes, more than ARTIFACT_MAX_BYTES={max_bytes}".format(**artifact)
        say(f"error: {what} — lower MODEL_DIM, NUM_LAYERS or MLP_MULT; everything is written", "stderr")
    return 3


def main(ranks: Ranks) -> int:
    """Train, export and evaluate, or evaluate EVAL_ONLY's file. Returns the exit code."""
    kept = look_around(ranks)
    run = Run(Settings.from_env(kept.get("settings", {}) | tokenizer_beside(os.environ) | os.environ), ranks)
    agree_on_start(run)
    ranks.connect(run.device)
    if ranks.local == 0:  # each machine has its own
        prepare_sample(run)
    ranks.max(0)
    if run.s.eval_only:  # its header decides the vocabulary
        weights = read_weights(Path(run.s.eval_only), run)
        run = run.using(**artifact_config(weights.settings))
    stream = load_validation(run)
    run.longest = int(stream.lengths.max())
    shards = [] if run.s.eval_only else open_shards("train", run)
    train = fingerprint(shards) if shards else None
    data = dict(validation=stream.fingerprint, tokenizer=stream.tokenizer, train=train)
    ranks.agree({f"data of {name}": value for name, value in data.items()})
    check_tokenizer(kept.get("tokenizer", stream.tokenizer), stream, run)
    run = open_folder(run)
    trainer = Trainer(shards, data["train"], run) if shards else None
    model = scoring_model(run)
    describe(trainer, stream, run)
    seconds = preflight(trainer, model, run)
    describe_what_follows(trainer, stream, seconds, run)
    known = dict(data=data, preflight=seconds, at_once=run.fits, training=None, artifact=None)
    if trainer:
        with run.session("training"):
            hessians = trainer.train(stream)
        known |= dict(training=trainer.account(), artifact=make_artifact(trainer, hessians, stream, run))
    # From here on nothing is known but the file.
    score = score_file(model, stream, run, **known)
    # The name that the field's tools look for; no rank's error ends the first one before it is said.
    ranks.from_first(run.log, f"final_int8_zlib_roundtrip_exact {score}")
    return exit_code(score, trainer, known["artifact"], run)


def take_arguments(arguments: list[str]):
    """Settings as --name=value become variables. Raises UserError for any other argument."""
    known = {f.name.upper() for f in fields(Settings)}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_").upper()
        if name not in known or not equals or not argument.startswith("--"):
            cure = f"write {argument}=value, or " if name in known and not equals else ""
            raise UserError(f"{argument} is no setting as --name=value — {cure}see --help")
        os.environ[name] = value


def entry(arguments: list[str] = ()) -> int:
    """Run main() and turn its exceptions into one line and an exit code, the same on all ranks."""
    if "--help" in arguments:
        return 2 if say(help_text()) else 0
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed console's number would be the next file's
        pass
    os.close(number)
    ranks = Ranks()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while a handler would not be called
    try:
        ranks.join(os.environ)
        take_arguments(arguments)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the last one by batch systems
            # nohup's SIGHUP stays ignored, but not under torchrun, which passes it on and kills who does not end
            number = getattr(signal, name, None)
            if number and ("TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, ranks.on_signal)
        code = main(ranks)
        ranks.leave()
        return code
    except UserError as e:
        return ranks.end(2, f"error: {e}", isinstance(e.__cause__, OSError))
    except OSError as e:
        return ranks.end(2, f"error: {system_says(e)}", True)
    except Interrupted as e:
        return ranks.end(e.code, e.line)
    except Exception as e:
        if out_of_memory(e):
            stage, limit = ranks.stage
            what = f"out of memory in {stage}: {' '.join(str(e).split())[:120]} — set {limit} lower"
            return ranks.end(2, f"error: {what}", True)
        if "start new thread" in str(e):  # Python's words
            return ranks.end(2, f"error: {e} — allow more processes (ulimit -u)", True)
        ranks.unwinding = True
        lost = ranks.lost(e)
        if lost:
            time.sleep(2)  # the rank that broke the collective says why
        elif not ranks.ending:
            traceback.print_exc()
        return ranks.end(1, f"error: {lost}" if lost else "")


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
