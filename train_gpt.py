"""
Train a 10-layer, 512-wide GPT for ten minutes on 8xH100, squeeze it into 16,000,000 bytes with this file, and
score the FineWeb validation split in bits per byte with test-time training. Not yet measured on 8xH100.

    PRESET=tiny python train_gpt.py                        # everything below, small, on a laptop CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the record run

An entry to OpenAI's Parameter Golf, built on thwu1's 1.1428-bpb record and on PR #467 of openai/parameter-golf.
- model: GQA, RoPE, per-head QK norm, relu^2 MLP, U-Net skips, hashed bigram embedding, SmearGate, tied embeddings
- optimiser: Muon (same-shape matrices orthogonalised as one batch, divided over the ranks) and AdamW, on flat buffers
- schedule: warmdown against the wall clock or the iteration count, stochastic weight averaging (SWA)
- export: 3% magnitude pruning, int5 MLPs, int6 attention, one zstd-22 frame, no pickle
- evaluation: standard, sliding window, or 50 cosine epochs of rank-8 LoRA on Q and V per document. Every figure is
  labelled: it is *backward-looking* only if each token was scored before any update had seen it.
"""
import bisect
import difflib
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch._dynamo  # the meta device would import it on first use, within the evaluation's seconds
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn

SOURCE = Path(__file__).resolve()
SAMPLE = SOURCE.parent / "data" / "sample"

# ---- Configuration: every setting is an environment variable, the field's name in capitals -------------------------
class UserError(Exception):
    """Something the user can mend; its text reads `what is wrong — what to do`. The process ends with code 2."""
def setting(default, doc: str, low=None, high=None, choices=None, tiny=None):
    """A field with its documentation, its allowed range, and its value under PRESET=tiny where that differs."""
    return field(default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices, tiny=tiny))

@dataclass(frozen=True)
class Settings:
    """Every setting: default, documentation, range, and its value under PRESET=tiny where that differs."""
    preset: str = setting("record", "record, or tiny: a CPU-sized model on the bundled sample", choices=("record", "tiny"))
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin", tiny=str(SAMPLE))
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model", tiny=str(SAMPLE / "sample_1024_bpe.model"))
    run_id: str = setting("", "name of the run; empty: random")
    output_dir: str = setting("", "where log, weights and results go; empty: runs/RUN_ID")
    eval_only: str = setting("", "score this file and train nothing: a .ptz artifact, or a .pt state dict as it is")
    resume: bool = setting(False, "go on from OUTPUT_DIR's checkpoint, if there is one")
    checkpoint_every: int = setting(0, "steps between training checkpoints; 0: only when stopped and at the end", 0)
    vocab_size: int = setting(1024, "tokens in the vocabulary", 260, 65536)
    num_layers: int = setting(10, "transformer blocks", 2, 256, tiny=4)
    model_dim: int = setting(512, "width of the residual stream", 8, 16384, tiny=96)
    num_heads: int = setting(8, "query heads", 1, 256, tiny=2)
    num_kv_heads: int = setting(4, "key/value heads", 1, 256, tiny=1)
    mlp_mult: float = setting(3.0, "MLP hidden width / model width", 0.125, 64)
    tie_embeddings: bool = setting(True, "one matrix for embedding and head")
    rope_base: float = setting(10000.0, "RoPE base", 1.0)
    logit_softcap: float = setting(30.0, "logits = cap * tanh(logits / cap)", 1e-3)
    qk_gain_init: float = setting(1.5, "initial gain of the normalised queries")
    bigram_vocab_size: int = setting(10240, "rows of the hashed bigram table", 2, 1 << 24, tiny=1024)
    bigram_dim: int = setting(128, "width of the bigram table", 1, 16384, tiny=32)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the tied embedding at the start", 0.0)
    seed: int = setting(42, "of the initial weights, the adapters and the audit", 0, 2**32 - 1)
    iterations: int = setting(20_000, "most optimiser steps", 0, tiny=160)
    warmdown_iters: int = setting(3_500, "length of the final decay to zero, in steps", 0, tiny=80)
    warmup_steps: int = setting(20, "steps that compile everything and are then undone", 0, tiny=2)
    max_wallclock_seconds: float = setting(600.0, "training time; 0: no limit", 0.0, tiny=0.0)
    train_batch_tokens: int = setting(786_432, "tokens per optimiser step, over all ranks", 1, 1 << 30, tiny=4_096)
    train_seq_len: int = setting(2048, "tokens per row", 2, 1 << 20, tiny=256)
    micro_batch_tokens: int = setting(98_304, "most tokens per rank in one forward and backward", 1, tiny=2_048)
    val_loss_every: int = setting(500, "steps between validations; 0: only at the end", 0, tiny=80)
    val_batch_size: int = setting(524_288, "tokens per validation batch, over all ranks", 1, tiny=8_192)
    train_log_every: int = setting(100, "steps between log lines", 1, tiny=20)
    embed_lr: float = setting(0.6, "lr of token and bigram tables, untied", 0.0)
    tied_embed_lr: float = setting(0.03, "lr of token and bigram tables, tied", 0.0)
    head_lr: float = setting(0.008, "lr of an untied head", 0.0)
    matrix_lr: float = setting(0.02, "lr of Muon's matrices", 0.0)
    scalar_lr: float = setting(0.02, "lr of everything else", 0.0)
    muon_momentum: float = setting(0.99, "Muon's momentum", 0.0, 1.0, tiny=0.95)
    muon_backend_steps: int = setting(5, "Newton-Schulz steps", 1, 100)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at step 0", 0.0, 1.0, tiny=0.85)
    muon_momentum_warmup_steps: int = setting(1_500, "steps to reach MUON_MOMENTUM", 0, tiny=80)
    beta1: float = setting(0.9, "Adam's first decay rate, LoRA's included", 0.0, 0.999999)
    beta2: float = setting(0.95, "Adam's second decay rate, LoRA's included", 0.0, 0.999999)
    adam_eps: float = setting(1e-8, "Adam's epsilon in training", 0.0)
    grad_clip_norm: float = setting(0.3, "largest global gradient norm; 0: no clipping", 0.0)
    weight_decay: float = setting(0.04, "decoupled, for Muon and AdamW", 0.0)
    swa_enabled: bool = setting(True, "average the weights of the warmdown")
    swa_start_frac: float = setting(0.35, "average while the lr multiplier is below this", 0.0, 1.0)
    swa_every: int = setting(50, "steps between samples of the average", 1, tiny=5)
    compile: int = setting(-1, "torch.compile; -1: on CUDA only", choices=(-1, 0, 1))
    fp16_keep_name_patterns: str = setting("tok_emb,blocks.8.attn.c_k", "tensors kept in fp16, comma separated")
    prune_fraction: float = setting(0.03, "smallest weights set to zero before quantising", 0.0, 0.15)
    artifact_max_bytes: int = setting(16_000_000, "cap on the artifact and this file together", 1)
    val_docs: int = setting(0, "score only the first n validation documents; 0: all", 0)
    eval_stride: int = setting(64, "stride of the sliding window", 1)
    eval_batch_seqs: int = setting(32, "windows per batch and rank of the sliding evaluation", 1)
    eval_max_seconds: float = setting(600.0, "evaluation time from the artifact's load; 0: no limit", 0.0)
    ttt_enabled: bool = setting(True, "test-time training; 0: the final evaluation is the sliding window")
    ttt_protocol: str = setting("replay", "epochs over the document, or one pass, valid at any number", choices=("replay", "single_pass"))
    ttt_context: str = setting("cached", "cached keys and values, or recompute each window", choices=("cached", "recompute"))
    ttt_lora_rank: int = setting(8, "rank of the adapters", 1, 4096)
    ttt_lora_lr: float = setting(0.001, "peak of the adapters' cosine", 0.0)
    ttt_n_epochs: int = setting(50, "epochs per document (replay) or steps per chunk (single_pass)", 1, 100_000)
    ttt_chunk_size: int = setting(256, "targets per adaptation step", 1)
    ttt_eval_seq_len: int = setting(2048, "longest window, the chunk included", 2, tiny=512)
    ttt_batch_size: int = setting(0, "documents adapted side by side; 0: chosen for the device", 0)
    ttt_audit: int = setting(0, "documents audited for leaks of later tokens into earlier scores", 0, tiny=2)

    @classmethod
    def from_env(cls, env: dict[str, str]) -> "Settings":
        """Parse and check every variable. Raises UserError naming the variable, its value and what is allowed."""
        tiny = parse_setting(cls.__dataclass_fields__["preset"], env.get("PRESET", "record")) == "tiny"
        values = {}
        for f in fields(cls):
            raw, preset = env.get(f.name.upper()), f.metadata["tiny"] if tiny else None
            values[f.name] = parse_setting(f, raw) if raw is not None else f.default if preset is None else preset
        check_combinations(settings := cls(**values))
        return settings

MODEL_FIELDS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "tie_embeddings", "rope_base",
                "logit_softcap", "bigram_vocab_size", "bigram_dim")  # what the artifact's header carries
BOS = 1

def parse_setting(f, raw):
    """The value of field `f` from an environment string, or from a header's JSON value. Raises UserError."""
    kind, low, high, choices = type(f.default), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    allowed = "0 or 1" if kind is bool else f"one of {', '.join(map(str, choices))}" if choices else kind.__name__
    if low is not None and not choices:
        allowed += f" from {low}" + (f" to {high}" if high is not None else " up")
    try:
        value = {"0": False, "1": True}[str(int(raw))] if kind is bool else kind(raw)
        good = value in choices if choices else value.isprintable() if kind is str else (
            math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high))
    except (ValueError, KeyError, TypeError, OverflowError):
        good = False
    if not good:
        shown = "".join(c if c.isprintable() else "?" for c in str(raw)[:80])
        raise UserError(f"{f.name.upper()}={shown} — set {f.name.upper()} to {allowed} ({f.metadata['doc']})")
    return value

def check_combinations(s: Settings) -> None:
    """Raise UserError for values that are each allowed but cannot work together, naming both."""
    problems = [(s.model_dim % s.num_heads, f"MODEL_DIM={s.model_dim} does not divide by NUM_HEADS={s.num_heads}"),
        (s.num_heads % s.num_kv_heads, f"NUM_HEADS={s.num_heads} does not divide by NUM_KV_HEADS={s.num_kv_heads}"),
        (s.model_dim // s.num_heads % 2, f"MODEL_DIM={s.model_dim} over NUM_HEADS={s.num_heads} is odd and RoPE needs pairs"),
        (s.train_batch_tokens % s.train_seq_len,
         f"TRAIN_BATCH_TOKENS={s.train_batch_tokens} does not divide by TRAIN_SEQ_LEN={s.train_seq_len}"),
        (s.micro_batch_tokens < s.train_seq_len, f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} is less than TRAIN_SEQ_LEN={s.train_seq_len}"),
        (s.eval_stride > s.train_seq_len, f"EVAL_STRIDE={s.eval_stride} exceeds TRAIN_SEQ_LEN={s.train_seq_len}"),
        (s.ttt_chunk_size > s.ttt_eval_seq_len, f"TTT_CHUNK_SIZE={s.ttt_chunk_size} exceeds TTT_EVAL_SEQ_LEN={s.ttt_eval_seq_len}"),
        (s.tie_embeddings and not s.tied_embed_init_std, "TIE_EMBEDDINGS=1 cannot learn from TIED_EMBED_INIT_STD=0"),]
    for bad, problem in problems:
        if bad:
            raise UserError(f"{problem} — change one of the two")

def misspelt(env: dict[str, str]) -> list[str]:
    """A warning for each variable that is no setting but is spelt almost like one."""
    known = [f.name.upper() for f in fields(Settings)]
    near = ((name, difflib.get_close_matches(name, known, 1, 0.85)) for name in sorted(env) if name not in known)
    return [f"warning: {name} is not a setting — did you mean {match[0]}?" for name, match in near if match]

class Runtime:
    """This process among the others: rank, device, compute dtype, and the few collectives the script needs.
    Works under torchrun (nccl for CUDA tensors, gloo for CPU tensors) and as a single plain process."""
    def __init__(self, s: Settings):
        cuda = torch.cuda.is_available()
        self.rank, self.world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
        self.device, self.dtype = (torch.device("cuda", local), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
        self.compile, self.signal, self.event = cuda if s.compile < 0 else bool(s.compile), 0, None
        if cuda:
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
    def on_signal(self, number: int, frame) -> None:
        """Remember the first signal, so that the step in progress is finished; a second one ends the process at once."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor
    def agree(self, seconds: float) -> tuple[float, int]:
        """Rank 0's seconds and the highest pending signal of any rank, the same on every rank."""
        state = torch.tensor([seconds if self.rank == 0 else 0.0, self.signal], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(state, dist.ReduceOp.MAX)
        return float(state[0]), int(state[1])
    def gather(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values
    def together(self, work: Callable):
        """Rank 0's result of `work()`, run on every rank; if it raises UserError on any, that error is raised on all."""
        result = error = None
        try:
            result = work()
        except UserError as e:
            error = str(e)
        outcomes = self.gather((error, result if self.rank == 0 else None))
        if error := next((error for error, _ in outcomes if error), None):
            raise UserError(error)
        return outcomes[0][1]
    def compiled(self, function: Callable, **options) -> Callable:
        return torch.compile(function, **options) if self.compile else function
    def synchronize(self, lag: bool = False) -> None:
        """Wait for the device; with `lag`, only for what was launched before the last such call.
        A host at most one step ahead keeps the device busy, and its clock and deadlines mean something."""
        if self.device.type == "cuda":
            previous, self.event = self.event, torch.cuda.Event()
            self.event.record()
            ((previous or self.event) if lag else self.event).synchronize()

class Log:
    """Lines to the console and to OUTPUT_DIR/train.log, from rank 0 only: the other ranks have no file. Raises UserError."""
    def __init__(self, file=None):
        self.file = file
    def __call__(self, line: str, console: bool = True) -> None:
        try:
            for file in (self.file, sys.stdout)[: 1 + console] if self.file else ():
                print(line, file=file, flush=True)
        except OSError as e:
            raise UserError(f"cannot write {self.file.name}: {e.strerror} — free space or set OUTPUT_DIR") from e

def environment(run: Runtime) -> dict:
    """Versions, devices and thread count: what a run depends on besides its source and settings."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.processor() or platform.machine()
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, zstandard=zstandard.__version__,
                sentencepiece=sentencepiece.__version__, cuda=torch.version.cuda, device=device, device_type=run.device.type,
                world_size=run.world, threads=torch.get_num_threads(), compile=run.compile, dtype=str(run.dtype).split(".")[1])

def write_whole(path: Path, write: Callable) -> None:
    """Write a file so that `path` is always whole: the old content until the new one is on the disk. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror} — the earlier file is untouched; free space or set OUTPUT_DIR") from e

# ---- Data: token shards, byte counts, documents --------------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024

def open_shard(path: Path) -> np.ndarray:
    """Memory-map one shard's tokens, (n,) uint16. Raises UserError for a file that is not a whole shard."""
    repair = "fetch or make this shard again"
    try:
        size, header = path.stat().st_size, np.fromfile(path, "<i4", 256)
        magic, version, count = header[:3].tolist() if len(header) == 256 else (0, 0, 0)
        if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
            raise UserError(f"shard {path} ({size} bytes) has magic {magic}, version {version}, not {SHARD_MAGIC}, 1 — {repair}")
        if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
            raise UserError(f"shard {path} announces {count} tokens but has {(size - SHARD_HEADER_BYTES) / 2:g} — {repair}")
        return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,))
    except OSError as e:
        raise UserError(f"cannot read shard {path}: {e.strerror} — check the file and its permissions") from e

def open_shards(folder: str, split: str) -> list[np.ndarray]:
    """All shards of a split ('train' or 'val') in the order of their names. Raises UserError."""
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(f"no fineweb_{split}_*.bin in {folder} — set DATA_PATH, or run data/fineweb.py or data/text.py")
    return [open_shard(path) for path in paths]

def check_tokens(shards: list[np.ndarray], vocab_size: int, run: Runtime) -> None:
    """Raise UserError on every rank if any shard holds a token outside the vocabulary. The ranks share the reading."""
    def scan():
        for shard in shards[run.rank :: run.world]:
            if (top := max(int(shard[i : i + (1 << 24)].max()) for i in range(0, len(shard), 1 << 24))) >= vocab_size:
                raise UserError(f"shard {shard.filename} has token {top} but VOCAB_SIZE={vocab_size} — use shards of the vocabulary")
    run.together(scan)

class BatchLoader:
    """Global batches of consecutive tokens, cut into equal slices per rank and micro-step, read ahead on a thread.
    Batch k covers TRAIN_BATCH_TOKENS + 1 tokens from k * TRAIN_BATCH_TOKENS on, wrapping around the shards, so the batches depend
    on the step alone and not on the world size. Raises UserError where the sizes do not divide."""
    def __init__(self, shards: list[np.ndarray], s: Settings, run: Runtime):
        rows = s.train_batch_tokens // s.train_seq_len
        if rows % run.world:
            raise UserError(f"TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN={rows} rows do not divide by WORLD_SIZE={run.world} — change one of them")
        self.rows = rows // run.world  # of this rank
        self.micro_rows = max(n for n in range(1, self.rows + 1) if self.rows % n == 0 and n * s.train_seq_len <= s.micro_batch_tokens)
        self.shards, self.ends = shards, np.cumsum([len(x) for x in shards])
        self.seq_len, self.batch_tokens, self.run = s.train_seq_len, s.train_batch_tokens, run
        self.pool, self.ahead = ThreadPoolExecutor(1), None
    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the endless stream from position `start`, (count,) uint16."""
        out, filled = np.empty(count, np.uint16), 0
        while filled < count:
            at = (start + filled) % int(self.ends[-1])
            i = int(np.searchsorted(self.ends, at, side="right"))
            piece = self.shards[i][at - int(self.ends[i]) + len(self.shards[i]) :][: count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out
    def load(self, step: int) -> Tensor:
        tokens = self.rows * self.seq_len
        block = torch.from_numpy(self.read(step * self.batch_tokens + self.run.rank * tokens, tokens + 1).astype(np.int32))
        return block.pin_memory() if self.run.device.type == "cuda" else block
    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of a step: inputs and targets, each (micro_rows, TRAIN_SEQ_LEN) int64."""
        block = self.ahead[1].result() if self.ahead and self.ahead[0] == step else self.load(step)
        self.ahead = step + 1, self.pool.submit(self.load, step + 1)
        block = block.to(self.run.device, non_blocking=True).long()
        x, y = (part.view(-1, self.micro_rows, self.seq_len) for part in (block[:-1], block[1:]))
        return list(zip(x, y))

def load_tokenizer(path: str, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model. Raises UserError if it is missing, damaged or of another size."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"cannot read tokenizer {path}: {e.strerror} — set TOKENIZER_PATH") from e
    except Exception as e:  # sentencepiece raises bare RuntimeErrors
        raise UserError(f"{path} is not a SentencePiece model — set TOKENIZER_PATH to the dataset's .model file") from e
    if sp.vocab_size() != vocab_size:
        raise UserError(f"tokenizer {path} has {sp.vocab_size()} pieces but VOCAB_SIZE={vocab_size} — set one to match the other")
    return sp

def target_bytes(sp: sentencepiece.SentencePieceProcessor, tokens: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each target adds to the text, (len(tokens) - 1,) int16 (SPEC of the challenge's bpb).
    A byte piece is 1; control, unknown and unused pieces 0; any other its length, its leading space counted as one byte unless the
    token before it is control, unknown or unused."""
    ids = range(sp.vocab_size())
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    pieces = ["" if silent[i] else "?" if sp.is_byte(i) else sp.id_to_piece(i) for i in ids]
    spaced = np.array([p.startswith("▁") for p in pieces])
    length = np.array([len(p.removeprefix("▁").encode()) for p in pieces], np.int16)
    before, target = tokens[:-1], tokens[1:]
    return length[target] + (spaced[target] & ~silent[before])

def find_documents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and number of targets of each document, both (documents,) int64.
    A document runs from its BOS to the next one inclusive, the last to the end of the stream; tokens before the first BOS are a
    document of their own. Every target belongs to exactly one document."""
    starts = np.flatnonzero(tokens == BOS)
    starts = np.unique(np.concatenate([[0], starts[starts < len(tokens) - 1]])).astype(np.int64)
    return starts, np.diff(np.append(starts, len(tokens) - 1))

class Stream:
    """A stream of N validation tokens on a device: `tokens` (N,) int32, `bytes` per target (N-1,) int16, documents."""
    def __init__(self, tokens: np.ndarray, bytes_: np.ndarray, device: torch.device, documents=None):
        self.starts, self.targets = documents or find_documents(tokens)
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.bytes = torch.from_numpy(bytes_.astype(np.int16)).to(device)
        self.target_count, self.byte_count = len(tokens) - 1, int(bytes_.sum(dtype=np.int64))
        ends = np.concatenate([[0], np.cumsum(bytes_, dtype=np.int64)])
        self.document_bytes = ends[self.starts + self.targets] - ends[self.starts]

def load_validation(s: Settings, run: Runtime) -> Stream:
    """The validation stream, its first VAL_DOCS documents if asked, with byte counts. Raises UserError."""
    sp = load_tokenizer(s.tokenizer_path, s.vocab_size)
    shards = open_shards(s.data_path, "val")
    check_tokens(shards, s.vocab_size, run)
    tokens = np.concatenate(shards)
    starts, targets = find_documents(tokens)
    if s.val_docs > len(starts):
        raise UserError(f"VAL_DOCS={s.val_docs} but {s.data_path} has {len(starts)} validation documents — set VAL_DOCS to at most that")
    if s.val_docs:
        tokens = tokens[: starts[s.val_docs - 1] + targets[s.val_docs - 1] + 1]
    if not (bytes_ := target_bytes(sp, tokens)).any():
        raise UserError(f"the {len(tokens)} validation tokens of {s.data_path} hold no target with text — fetch or make the shards again")
    return Stream(tokens, bytes_, run.device)

def prepare_sample(s: Settings, run: Runtime) -> None:
    """Build the bundled sample if DATA_PATH is its place and it is missing: on rank 0, the others wait."""
    def build():
        if run.rank == 0 and Path(s.data_path).resolve() == SAMPLE and not SAMPLE.exists():
            if code := subprocess.call([sys.executable, str(SAMPLE.parent / "sample.py")], stdout=sys.stderr):
                raise UserError(f"data/sample.py ended with code {code} — see its message above")
    run.together(build)

# ---- Model ---------------------------------------------------------------------------------------------------------
RMS_EPS = torch.finfo(torch.float32).eps  # F.rms_norm's default, also under bf16, whose own would swamp a fresh embedding

class Past(NamedTuple):
    """What the chunks before this one leave to it, for B documents in step."""
    position: int | Tensor  # tokens before the chunk
    last_id: Tensor  # (B, 1) the token before it
    last_x: Tensor  # (B, 1, d) that token's normalised embedding, before SmearGate
    kv: Tensor  # (B, layers, 2, kv heads, context, head dim) rotated keys, and values

class Lora(NamedTuple):
    """One layer's adapters for B documents: q += x A[:r]' Bq', v += x A[r:]' Bv'."""
    a: Tensor  # (B, 2r, d)
    b_q: Tensor  # (B, d, r)
    b_v: Tensor  # (B, kv dim, r)

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)

def rotary(position: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, (T, head_dim / 2), computed in float32."""
    inverse = base ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(position.float(), inverse)
    return angle.cos().to(dtype), angle.sin().to(dtype)

def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (…, T, head_dim), in halves layout, by RoPE's angles (Su et al. 2021)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

class Linear(nn.Linear):
    """No bias; float32 master weight, used in the dtype of its input."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Attention(nn.Module):
    """Causal grouped-query attention with per-head RMS norm and RoPE on queries and keys."""
    def __init__(self, s: Settings):
        super().__init__()
        self.head_dim = s.model_dim // s.num_heads
        kv_dim = self.head_dim * s.num_kv_heads
        self.c_q, self.proj = Linear(s.model_dim, s.model_dim), Linear(s.model_dim, s.model_dim)
        self.c_k, self.c_v = Linear(s.model_dim, kv_dim), Linear(s.model_dim, kv_dim)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lora: Lora | None, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            low_q, low_v = (x @ lora.a.to(x.dtype).mT).chunk(2, dim=-1)  # (B, T, r) each
            q = q + low_q @ lora.b_q.to(x.dtype).mT
            v = v + low_v @ lora.b_v.to(x.dtype).mT
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, head_dim)
        q, k = apply_rotary(norm(q), cos, sin), apply_rotary(norm(k), cos, sin)
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        if kv is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # every query sees the whole context, then its own chunk causally
            keys, values = torch.cat((kv[:, 0], k), dim=2), torch.cat((kv[:, 1], v), dim=2)
            if q.is_cuda:  # this kernel aligns causality with the last key, F.scaled_dot_product_attention with the first
                y = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, True)[0]
            else:
                seen = torch.ones(q.size(2), keys.size(2), dtype=torch.bool).tril(keys.size(2) - q.size(2))
                y = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2)), k, v

class MLP(nn.Module):
    """proj(relu(fc(x))^2)."""
    def __init__(self, s: Settings):
        super().__init__()
        hidden = int(s.mlp_mult * s.model_dim)
        self.fc, self.proj = Linear(s.model_dim, hidden), Linear(hidden, s.model_dim)
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).relu().square())

class Block(nn.Module):
    """A learned mix of the stream with the first layer's input, then attention and MLP, each with per-channel scales."""
    def __init__(self, s: Settings):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(s.model_dim)), nn.Parameter(torch.ones(s.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(s.model_dim), torch.zeros(s.model_dim))))
    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, lora: Lora | None, kv: Tensor | None):
        mix, attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0
        y, k, v = self.attn(norm(x), cos, sin, lora, kv)
        x = x + attn_scale * y
        return x + mlp_scale * self.mlp(norm(x)), k, v

class BigramHash(nn.Module):
    """Embedding of (previous token, token), hashed into a small table (thwu1's record)."""
    def __init__(self, s: Settings):
        super().__init__()
        self.embed = nn.Embedding(s.bigram_vocab_size, s.bigram_dim)
        self.proj = Linear(s.bigram_dim, s.model_dim) if s.bigram_dim != s.model_dim else nn.Identity()
        self.scale = nn.Parameter(torch.tensor(0.05))
    def forward(self, ids: Tensor, last_id: Tensor | None) -> Tensor:
        """ids (B, T), last_id (B, 1) the tokens before them -> (B, T, d) float32."""
        last_row, ids = self.embed.num_embeddings - 1, ids.to(torch.int32)
        previous = ids[:, :-1] if last_id is None else torch.cat((last_id.to(torch.int32), ids[:, :-1]), dim=1)
        current = ids[:, 1:] if last_id is None else ids
        h = (36313 * current ^ 27191 * previous) % last_row
        if last_id is None:  # a first token has no predecessor: the table's last row is its own
            h = F.pad(h, (1, 0), value=last_row)
        return self.scale * self.proj(self.embed(h.long()))

class SmearGate(nn.Module):
    """Blends each position with the one before it, by a learned gate per channel."""
    def __init__(self, s: Settings):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(s.model_dim))
    def forward(self, x: Tensor, last_x: Tensor | None) -> Tensor:
        before = x.new_zeros(x.size(0), 1, x.size(2)) if last_x is None else last_x
        g = self.gate.sigmoid().to(x.dtype)
        return (1 - g) * x + g * torch.cat((before, x[:, :-1]), dim=1)

class GPT(nn.Module):
    """The model. One forward pass serves training, scoring and adaptation."""
    def __init__(self, s: Settings, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.softcap, self.rope_base, self.dtype = s.logit_softcap, s.rope_base, dtype
        self.tok_emb = nn.Embedding(s.vocab_size, s.model_dim)
        self.bigram, self.smear = BigramHash(s), SmearGate(s)
        self.encoders = s.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(min(self.encoders, s.num_layers - self.encoders), s.model_dim))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        if not s.tie_embeddings:
            self.lm_head = Linear(s.model_dim, s.vocab_size)
        self.init_weights(s)
    @torch.no_grad()
    def init_weights(self, s: Settings) -> None:
        for name, module in self.named_modules():
            if name.endswith(("attn.proj", "mlp.proj", "lm_head")):
                module.weight.zero_()
            elif isinstance(module, Linear):  # the bigram table starts at 0, so its projection must not
                nn.init.orthogonal_(module.weight, (2 * s.num_layers) ** -0.5 if name == "bigram.proj" else 1.0)
        self.tok_emb.weight.normal_(0.0, s.tied_embed_init_std if s.tie_embeddings else 1.0)
        self.bigram.embed.weight.zero_()
    def embed(self, ids: Tensor, last_id: Tensor | None, last_x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token and bigram embedding, normalised, before and after SmearGate: (B, T, d) each."""
        x = norm((self.tok_emb(ids) + self.bigram(ids, last_id)).to(self.dtype))
        return x, self.smear(x, last_x)
    def head(self, x: Tensor, targets: Tensor) -> Tensor:
        """NLL of each target in nats under the capped logits, (B, T) float32."""
        weight = self.tok_emb.weight if not hasattr(self, "lm_head") else self.lm_head.weight
        capped = F.linear(norm(x), (weight / self.softcap).to(x.dtype)).float().tanh()  # one pass less over the logits
        return F.cross_entropy(self.softcap * capped.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    def forward(self, ids: Tensor, targets: Tensor, lora: list[Lora] | None = None, past: Past | None = None,
                keep: bool = False) -> tuple[Tensor, Past | None]:
        """NLL of each target in nats, (B, T) float32, from ids and targets (B, T) int64.
        `lora` adapts every layer; `past` is the context before `ids`; with `keep`, what these add to it is returned too, detached."""
        embedded, x = self.embed(ids, past.last_id if past else None, past.last_x if past else None)
        x0, x, skips, kept = x.view_as(x), x.requires_grad_() if lora else x, [], []  # with lora, block 0 compiles like the others
        position = torch.arange(ids.size(1), device=ids.device) + (past.position if past else 0)
        cos, sin = rotary(position, self.blocks[0].attn.head_dim, self.rope_base, self.dtype)
        for i, block in enumerate(self.blocks):
            if i >= self.encoders and skips:
                x = x + self.skip_weights[i - self.encoders].to(x.dtype) * skips.pop()
            x, k, v = block(x, x0, cos, sin, lora[i] if lora else None, past.kv[:, i] if past else None)
            if i < self.encoders:
                skips.append(x)
            if keep:
                kept += k.detach(), v.detach()
        present = Past(position[-1] + 1, ids[:, -1:], embedded[:, -1:].detach(), torch.stack(kept, 1).unflatten(1, (-1, 2))) if keep else None
        return self.head(x, targets), present
    def compile_regions(self) -> None:
        """Compile the repeated parts once each instead of unrolling all layers: test-time training has many shapes."""
        torch._dynamo.config.recompile_limit = 64  # beyond it a function would silently run uncompiled
        torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal today need not be tomorrow
        for block in self.blocks:
            block.compile(dynamic=True)
        self.embed, self.head = torch.compile(self.embed, dynamic=True), torch.compile(self.head, dynamic=True)

def model_config(s: Settings) -> dict:
    """The settings that fix a model's shapes and arithmetic: the artifact's header."""
    return {name: getattr(s, name) for name in MODEL_FIELDS}

def load_weights(model: GPT, state: dict[str, Tensor], origin: str) -> None:
    """Give the model a state dict's tensors. Raises UserError where names or shapes differ."""
    have, want = ({name: tuple(p.shape) for name, p in each.items()} for each in (state, model.state_dict()))
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(f"{origin}: {name} is {have.get(name)}, the model's {want.get(name)} — set NUM_LAYERS, MODEL_DIM, … to match")
    model.load_state_dict(state, assign=True)

# ---- Optimiser: Muon for the matrices of the blocks, AdamW for the rest --------------------------------------------
class Row(NamedTuple):
    """How a parameter is updated: by "muon" or "adam", and with what."""
    method: str
    lr: float
    decay: float

MUON = tuple(f"{end}.weight" for end in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj", "bigram.proj"))

def optimiser_table(s: Settings) -> list[tuple[tuple[str, ...], Row]]:
    """Endings of parameter names and their settings; the first row that matches counts."""
    return [(MUON, Row("muon", s.matrix_lr, s.weight_decay)),
        (("tok_emb.weight", "bigram.embed.weight"), Row("adam", s.tied_embed_lr if s.tie_embeddings else s.embed_lr, s.weight_decay)),
        (("lm_head.weight",), Row("adam", s.head_lr, 0.0)), (("",), Row("adam", s.scalar_lr, s.weight_decay)),]

def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack (n, rows, cols), roughly, in bf16 (K. Jordan's Muon, 2024)."""
    x = g.bfloat16()
    if tall := x.size(-2) > x.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x

def adam_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float,
          decay: float = 0.0) -> None:
    """One AdamW step in place (Loshchilov & Hutter 2019). `step`, () or one per row, counts from 1."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step = step.unsqueeze(-1)
    direction = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
    p.mul_(1 - lr * decay).sub_(lr * direction)

class Optimizer:
    """Owns the model's parameters as one flat float32 buffer and their gradients as another, both (n,).
    Parameters of one table row lie together, Muon's same-shape matrices as contiguous stacks, so that each update, the gradient's
    norm, the all-reduce, averaging and checkpointing touch whole buffers. `m` is both methods' first moment, `v` Adam's second."""
    def __init__(self, model: GPT, s: Settings, run: Runtime):
        self.s, self.run = s, run
        table = optimiser_table(s)
        stacks: dict[tuple, list[nn.Parameter]] = {}  # Muon's by shape, Adam's by row
        for name, p in model.named_parameters():
            row = next(row for endings, row in table if name.endswith(endings))
            stacks.setdefault((row, p.shape if row.method == "muon" else ()), []).append(p)
        self.muon, self.adam, offsets, at = [], [], [], 0
        for (row, shape), ps in stacks.items():
            start = at
            for p in ps:
                offsets.append((p, at))
                at += p.numel() if shape else -(-p.numel() // 64) * 64  # every vector and every stack aligned for wide loads
            (self.muon if shape else self.adam).append((row, slice(start, at), (len(ps), *shape)))
            at = -(-at // 64) * 64
        self.weights, self.grads, self.m, self.v = (torch.zeros(at, device=run.device) for _ in range(4))
        for p, at in offsets:
            span = slice(at, at + p.numel())
            self.weights[span].copy_(p.detach().flatten())
            p.data, p.grad = self.weights[span].view(p.shape), self.grads[span].view(p.shape)
        self.state = dict(weights=self.weights, m=self.m, v=self.v)
        self.newton_schulz, self.adam_ = run.compiled(newton_schulz), run.compiled(adam_)
    def step(self, step: int, multiplier: float) -> Tensor:
        """Reduce the gradients over the ranks, clip, update, clear. `step` counts from 0. Returns the norm before clipping, ()."""
        norm_ = self.run.sum(self.grads).norm()
        if self.s.grad_clip_norm:
            self.grads.mul_((self.s.grad_clip_norm / (norm_ + 1e-6)).clamp_max(1.0))
        self.muon_step(step, multiplier)
        scalar = lambda value: torch.full((), value, device=self.run.device)  # no tensor from the host: that would wait for the device
        for row, span, _ in self.adam:
            self.adam_(self.weights[span], self.grads[span], self.m[span], self.v[span], scalar(step + 1.0), scalar(row.lr * multiplier),
                       self.s.beta1, self.s.beta2, self.s.adam_eps, row.decay)
        self.grads.zero_()
        return norm_
    def muon_step(self, step: int, multiplier: float) -> None:
        """Nesterov momentum, then each stack orthogonalised, every rank its share of matrices, gathered while the next one runs."""
        s, world, rank, pending = self.s, self.run.world, self.run.rank, []
        warm = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
        momentum = s.muon_momentum_warmup_start + warm * (s.muon_momentum - s.muon_momentum_warmup_start)
        for row, span, (n, rows, cols) in self.muon:
            g, m, work = self.grads[span], self.m[span], None
            update = g.add_(m.mul_(momentum).add_(g), alpha=momentum).view(n, rows, cols)
            if world > 1:  # equal shares: zero matrices fill the last one
                share = -(-n // world)
                update = F.pad(update, (0, 0, 0, 0, 0, share * world - n))[rank * share : (rank + 1) * share]
            update = self.newton_schulz(update, s.muon_backend_steps)
            if world > 1:
                mine, update = update.contiguous(), torch.empty(share * world, rows, cols, dtype=update.dtype, device=update.device)
                work = dist.all_gather_into_tensor(update, mine, async_op=True)
            pending.append((row, span, update, n, work))
        for row, span, update, n, work in pending:
            if work:
                work.wait()
            lr, shape_factor = row.lr * multiplier, max(1, update.size(1) / update.size(2)) ** 0.5
            self.weights[span].mul_(1 - lr * row.decay).add_(update[:n].flatten().float(), alpha=-lr * shape_factor)
    def restore(self, state: dict[str, Tensor]) -> None:
        """Copy `state`'s tensors into the buffers that `self.state` names."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.grads.zero_()

# ---- Training ------------------------------------------------------------------------------------------------------
class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and everything worth keeping is on the disk. The process ends with code 128 + signal."""
    def __init__(self, number: int, where: str):
        super().__init__(f"{signal.Signals(number).name} {where} — the same command with RESUME=1 and the same OUTPUT_DIR goes on")
        self.number = number

def lr_multiplier(step: int, elapsed: float, s: Settings) -> float:
    """The smaller of the wall-clock and the iteration rule, at most 1. `elapsed` in seconds of training before `step`."""
    if not s.warmdown_iters:
        return 1.0
    rules = [1.0, (s.iterations - step) / s.warmdown_iters]
    if s.max_wallclock_seconds and elapsed:
        rules.append((s.max_wallclock_seconds - elapsed) * max(step, 1) / (s.warmdown_iters * elapsed))
    return max(min(rules), 0.0)

FREE_ON_RESUME = ("preset", "data_path", "tokenizer_path", "run_id", "output_dir", "eval_only", "resume", "checkpoint_every", "compile",
                  "val_docs", "warmup_steps", "val_loss_every", "val_batch_size", "train_log_every", "micro_batch_tokens", "artifact_max_bytes")

def checkpoint_identity(s: Settings, data: str) -> dict:
    """What a run must agree with to go on from a checkpoint: source, data, and every setting that the training depends on."""
    settings = {k: v for k, v in asdict(s).items() if k not in FREE_ON_RESUME and not k.startswith(("eval_", "ttt_"))}
    return dict(source=hashlib.sha256(SOURCE.read_bytes()).hexdigest(), data=data) | settings

def load_checkpoint(path: Path, identity: dict) -> dict | None:
    """The state in a checkpoint, on the CPU, or None if there is none. Raises UserError if it is another run's or damaged."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = dict(state["identity"])
    except Exception as e:  # torch.load raises many kinds for a damaged file
        raise UserError(f"checkpoint {path} is damaged ({type(e).__name__}) — delete it to start afresh") from e
    for name in identity | theirs:
        if theirs.get(name) != identity.get(name):
            raise UserError(f"checkpoint {path} has another {name.upper()}: {theirs.get(name)}, now {identity.get(name)} — "
                            "restore it, or start afresh in another OUTPUT_DIR")
    return state

def forward_backward(forward: Callable, micro_batches: list, share: float) -> Tensor:
    """Accumulate the gradients of `share` times each micro-batch's mean NLL. Returns the sum of those terms, ()."""
    total = 0.0
    for x, y in micro_batches:
        loss = forward(x, y)[0].mean() * share
        loss.backward()
        total = total + loss.detach()
    return total

def warm_up(forward: Callable, loader: BatchLoader, optimizer: Optimizer, s: Settings, log: Log) -> None:
    """Run WARMUP_STEPS steps so that everything is compiled, then undo them: they train nothing."""
    before = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    for step in range(s.warmup_steps):
        forward_backward(forward, batch := loader.batch(step), 1 / (len(batch) * optimizer.run.world))
        optimizer.step(step, 1.0)
    optimizer.restore(before)
    log(f"warmup_step:{s.warmup_steps}/{s.warmup_steps}")

def train(model: GPT, optimizer: Optimizer, stream: Stream, s: Settings, run: Runtime, log: Log, output: Path) -> dict:
    """Train until ITERATIONS or MAX_WALLCLOCK_SECONDS; the model ends with the averaged weights. Returns the account for result.json.
    Raises Interrupted after writing a checkpoint, UserError on a non-finite gradient."""
    shards = open_shards(s.data_path, "train")
    check_tokens(shards, s.vocab_size, run)
    loader, forward = BatchLoader(shards, s, run), run.compiled(model, dynamic=False)
    path, identity = output / "checkpoint.pt", checkpoint_identity(s, f"{len(shards)} shards, {loader.ends[-1]} tokens")
    average, averaged, step, elapsed, finished = torch.zeros_like(optimizer.weights), 0, 0, 0.0, False
    saved = load_checkpoint(path, identity) if s.resume else None
    if run.rank == 0 and not s.resume:
        path.unlink(missing_ok=True)  # an earlier run's: this one must not resume from it
    if saved:
        optimizer.restore(saved)
        average.copy_(saved["average"])
        averaged, step, elapsed, finished = (saved[k] for k in ("averaged", "step", "elapsed", "finished"))
        log(f"resumed from {path} at step {step}")
    peak = torch.cuda.max_memory_allocated  # 0 on a CPU
    account = lambda: dict(steps=step, seconds=elapsed, averaged=averaged, resumed=bool(saved), peak_memory=peak() or None)
    if finished:
        return account()
    log(f"training tokens:{loader.ends[-1]} rows per rank:{loader.rows} rows per micro-step:{loader.micro_rows}")
    warm_up(forward, loader, optimizer, s, log)

    def save(finished: bool) -> None:
        run.synchronize()
        check_finite(norms, s)
        if run.rank == 0:
            state = dict(identity=identity, step=step, elapsed=elapsed, averaged=averaged, finished=finished, average=average)
            write_whole(path, lambda f: torch.save(state | optimizer.state, f))
    timing = lambda: f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / max(step, 1):.2f}ms"
    norms, stop = [], 0 < s.max_wallclock_seconds <= elapsed
    run.synchronize()
    began = time.perf_counter() - elapsed  # moved on by whatever is not training
    while True:
        last = stop or step >= s.iterations
        if last or (s.val_loss_every and step % s.val_loss_every == 0):
            run.synchronize()
            paused = time.perf_counter()
            score = evaluate_standard(forward, stream, s, run)
            log(f"step:{step}/{s.iterations} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} {timing()}")
            began += time.perf_counter() - paused
        if last:
            break
        multiplier = lr_multiplier(step, elapsed, s)
        batch = loader.batch(step)
        loss = forward_backward(forward, batch, 1 / (len(batch) * run.world))
        norms.append((step, multiplier, optimizer.step(step, multiplier).to("cpu", non_blocking=True)))
        step += 1
        if s.swa_enabled and multiplier < s.swa_start_frac and step % s.swa_every == 0:
            average.add_(optimizer.weights)
            averaged += 1
        run.synchronize(lag=True)  # the step before this one has ended: its norm has arrived
        check_finite(norms[:-1], s)
        norms = norms[-1:]
        elapsed, signal_number = run.agree(time.perf_counter() - began)
        stop = 0 < s.max_wallclock_seconds <= elapsed
        if step <= 10 or step % s.train_log_every == 0 or stop or step == s.iterations:
            log(f"step:{step}/{s.iterations} train_loss:{run.sum(loss).item():.8f} {timing()}")
        if signal_number or (s.checkpoint_every and step % s.checkpoint_every == 0):
            save(finished=False)
        if signal_number:
            raise Interrupted(signal_number, f"after step {step}; checkpoint in {path}")
    if averaged >= 2:
        optimizer.weights.copy_(average / averaged)
    log(f"swa: {averaged} checkpoints: " + ("their mean is the final model" if averaged >= 2 else "too few, the last weights are final"))
    save(finished=True)
    log("training " + " ".join(f"{k}:{v}" for k, v in account().items()))
    return account()

def check_finite(norms: list[tuple[int, float, Tensor]], s: Settings) -> None:
    """Raise UserError if a gradient norm, given with its step and lr multiplier and arrived on the host, is not finite."""
    for step, multiplier, norm_ in norms:
        if not norm_.isfinite():
            raise UserError(f"gradient norm {norm_.item()} at step {step} (lr multiplier {multiplier:.4f}, batch from token "
                            f"{step * s.train_batch_tokens}) — lower the learning rates, or RESUME=1 from the last checkpoint")

# ---- Export: prune, quantise, pack ---------------------------------------------------------------------------------
CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "bigram.scale")
LIMITS = {"int5": 15, "int6": 31, "int8": 127}  # largest code; int5 and int6 have one more below zero
MAGIC, FORMAT, HEADER_BYTES = b"PGOLFGPT", 1, 60  # magic 8, format 4, packed and expanded bytes 8 + 8, SHA-256 32
MOST_EXPANDED, MOST_TABLE = 1 << 29, 1 << 20  # bytes: no artifact near the cap needs more, and a hostile one cannot claim more

def prune(weight: Tensor, fraction: float) -> Tensor:
    """Zero the smallest magnitudes of a large matrix; other tensors are returned as they are."""
    if weight.ndim != 2 or weight.numel() <= 65_536 or not fraction:
        return weight
    size = weight.abs().flatten()
    threshold = torch.quantile(size, fraction) if size.numel() <= 1 << 24 else np.quantile(size.numpy(), fraction)  # torch takes no more
    return torch.where(weight.abs() < threshold, 0.0, weight)

def kind_of(name: str, tensor: Tensor, fp16_patterns: list[str]) -> str:
    """How a tensor is stored: fp16, fp32, int5, int6 or int8. The first rule that fits."""
    if any(pattern in name for pattern in CONTROL):
        return "fp16" if tensor.numel() <= 8_192 else "fp32"
    if tensor.numel() <= 8_192 or any(pattern in name for pattern in fp16_patterns):
        return "fp16"
    return "int5" if ".mlp." in name else "int6" if ".attn." in name or "bigram" in name else "int8"

def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """float32 tensor -> values as stored, and fp16 scales per row for the integer kinds.
    int5/int6: symmetric, scale = max|row| / 15 or 31 rounded to fp16 before use (thwu1's record). int8: rows are clipped at their
    99.99984% magnitude (the challenge's baseline)."""
    if kind in ("fp16", "fp32"):
        return weight.to(torch.float16 if kind == "fp16" else torch.float32), None
    rows, limit = weight.float().reshape(-1, weight.shape[-1]), LIMITS[kind]
    if kind == "int8":
        top = torch.quantile(rows.abs(), 0.9999984, dim=1, keepdim=True)
        scale = (top / limit).clamp_min(1 / limit)
        codes = (rows.clamp(-top, top) / scale).round().clamp(-limit, limit)
    else:
        scale = (rows.abs().amax(dim=1, keepdim=True) / limit).half().clamp_min(torch.finfo(torch.float16).tiny)
        codes = (rows / scale.float()).round().clamp(-limit - 1, limit)
    return codes.to(torch.int8).view(weight.shape), scale.half().flatten()

def dequantize(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 tensor that the stored values stand for."""
    return values.float() if scale is None else (values.reshape(len(scale), -1).float() * scale.float()[:, None]).view(values.shape)

STREAMS = {"int5": "<i1", "int6": "<i1", "int8": "<i1", "scale": "<f2", "fp16": "<f2", "fp32": "<f4"}  # in file order

def pack(state: dict[str, Tensor], config: dict, prune_fraction: float = 0.03,
         fp16_patterns: list[str] = ("tok_emb", "blocks.8.attn.c_k")) -> tuple[bytes, dict]:
    """State dict (float32, CPU) -> artifact: pruned, quantised, one zstd-22 frame, no pickle. Same input, same bytes.
    Also returns the account by stream: weights, compressed bytes, bits per weight, and the entropy of integer codes in bits.
    Layout: magic, format, packed length, expanded length, SHA-256 of the frame; then the frame: the streams in STREAMS' order as
    byte planes, a JSON table (model configuration; name, shape and kind of each tensor), its length in 4 bytes."""
    table, streams = [], {kind: [np.empty(0, dtype)] for kind, dtype in STREAMS.items()}
    for name, weight in state.items():
        kind = kind_of(name, weight, fp16_patterns)
        values, scale = quantize(prune(weight, prune_fraction), kind)
        table.append([name, list(weight.shape), kind])
        streams[kind].append(values.numpy().ravel())
        if scale is not None:
            streams["scale"].append(scale.numpy())
    arrays = {kind: np.concatenate(pieces).astype(STREAMS[kind]) for kind, pieces in streams.items()}
    tail = json.dumps(dict(config=config, tensors=table), separators=(",", ":")).encode()
    parts = [(kind, plane.tobytes()) for kind, array in arrays.items() for plane in array.view(np.uint8).reshape(-1, array.itemsize).T]
    parts.append(("table", tail + len(tail).to_bytes(4, "little")))
    expanded, report = sum(len(part) for _, part in parts), {}
    # codes hold no real repeats: long matches only is smaller and four times faster than level 22's own least of 3
    level22 = zstandard.ZstdCompressionParameters.from_level(22, source_size=expanded, min_match=7)
    squeeze, frame = zstandard.ZstdCompressor(compression_params=level22).compressobj(size=expanded), b""
    for kind, part in parts:  # flushing at each boundary keeps the statistics, and the account, of the kinds apart
        packed = squeeze.compress(part) + squeeze.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        frame += packed
        if kind in arrays and arrays[kind].size:
            row = report.setdefault(kind, dict(weights=arrays[kind].size, bytes=0))
            row["bytes"] += len(packed)
            row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
            if kind in LIMITS:
                p = np.bincount(arrays[kind].view(np.uint8), minlength=256) / row["weights"]
                row["entropy"] = float(-(p[p > 0] * np.log2(p[p > 0])).sum())
    frame += squeeze.flush()
    header = MAGIC + FORMAT.to_bytes(4, "little") + len(frame).to_bytes(8, "little") + expanded.to_bytes(8, "little")
    return header + hashlib.sha256(frame).digest() + frame, report

def unpack(blob: bytes, origin: str = "artifact") -> tuple[dict, dict[str, Tensor]]:
    """Artifact bytes -> model configuration and float32 state dict. Raises UserError for anything but a whole, honest artifact.
    Memory stays within the expanded bytes and the weights: lengths are checked before they are believed."""
    def refuse(what: str):
        raise UserError(f"{origin}: {what} — the file is damaged or not an artifact of this script; fetch or make it again")
    if len(blob) < HEADER_BYTES or blob[:8] != MAGIC:
        refuse("no artifact header")
    version, packed, expanded = (int.from_bytes(blob[a:b], "little") for a, b in ((8, 12), (12, 20), (20, 28)))
    frame = blob[HEADER_BYTES:]
    if version != FORMAT:
        refuse(f"format {version}, this script reads {FORMAT}")
    if packed != len(frame) or expanded > MOST_EXPANDED:
        refuse(f"{len(frame)} bytes follow the header, which announces {packed} expanding to {expanded}")
    if hashlib.sha256(frame).digest() != blob[28:HEADER_BYTES]:
        refuse("the SHA-256 does not match")
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(frame, read_across_frames=True) as reader:
            raw = reader.read(expanded + 1)
        if len(raw) != expanded:
            refuse(f"it expands to {len(raw)} bytes, not {expanded}")
        end = expanded - 4 - int.from_bytes(raw[-4:], "little")
        if not max(0, expanded - MOST_TABLE) <= end:
            refuse(f"its table claims {expanded - 4 - end} bytes")
        table = json.loads(raw[end:-4])
        config, tensors = table["config"], [(name, tuple(shape), kind) for name, shape, kind in table["tensors"]]
        check_table(config, tensors)
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as e:
        refuse(f"{type(e).__name__} {str(e)[:80]}")
    sizes = {stream: [math.prod(shape) for _, shape, kind in tensors if kind == stream] for stream in STREAMS}
    sizes["scale"] = [math.prod(shape[:-1]) for _, shape, kind in tensors if kind in LIMITS]
    if end != sum(sum(n) * np.dtype(STREAMS[stream]).itemsize for stream, n in sizes.items()):
        refuse("its table does not add up to its data")
    parts, start = {}, 0
    for stream, dtype in STREAMS.items():
        plane = np.frombuffer(raw, np.uint8, sum(sizes[stream]) * np.dtype(dtype).itemsize, start).reshape(np.dtype(dtype).itemsize, -1)
        parts[stream] = iter(torch.from_numpy(plane.T.copy().view(dtype).reshape(-1)).split(sizes[stream]))
        start += plane.size
    state = {name: dequantize(next(parts[kind]).view(shape), next(parts["scale"]) if kind in LIMITS else None)
             for name, shape, kind in tensors}
    if not all(weight.isfinite().all() for weight in state.values()):
        refuse("a weight is not finite")
    return config, state

def check_table(config: dict, tensors: list[tuple]) -> None:
    """Check an artifact's table against the model that its configuration describes, before anything is allocated.
    Raises ValueError or UserError. The configuration is checked like the user's own variables."""
    known = {f.name: f for f in fields(Settings) if f.name in MODEL_FIELDS}
    if not isinstance(config, dict) or {n: type(v) for n, v in config.items()} != {n: type(f.default) for n, f in known.items()}:
        raise ValueError("the model's configuration is incomplete")
    check_combinations(s := Settings(**{name: parse_setting(known[name], value) for name, value in config.items()}))
    if len(tensors) < 10 * s.num_layers or any(kind not in (*LIMITS, "fp16", "fp32") for *_, kind in tensors):
        raise ValueError("too few tensors, or one of an unknown kind")
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPT(s).state_dict().items()}
    if {name: shape for name, shape, _ in tensors} != expected or len(tensors) != len(expected):
        raise ValueError("names or shapes are not those of its model")
    if any(type(n) is not int for _, shape, _ in tensors for n in shape):
        raise ValueError("a dimension is not a whole number")

def export(state: dict[str, Tensor], s: Settings, log: Log) -> tuple[bytes, dict]:
    """Pack with PRUNE_FRACTION, or with the smallest larger fraction (grid 0.005, to 0.15) whose total fits the cap.
    Returns the artifact and the account for result.json; `fits` is False if even the largest fraction does not fit."""
    began, code, tried = time.perf_counter(), len(SOURCE.read_bytes()), {}
    patterns = [pattern for pattern in s.fp16_keep_name_patterns.split(",") if pattern]

    def fits(fraction: float) -> bool:
        tried[fraction] = pack(state, model_config(s), fraction, patterns)
        over = len(tried[fraction][0]) + code - s.artifact_max_bytes
        log(f"export: pruned fraction {fraction} leaves {-over} bytes free" if over <= 0 else
            f"export: pruned fraction {fraction} is {over} bytes over ARTIFACT_MAX_BYTES={s.artifact_max_bytes}")
        return over <= 0
    grid = [s.prune_fraction] + [k / 200 for k in range(31) if k / 200 > s.prune_fraction]
    best = grid[0] if fits(grid[0]) else grid[min(bisect.bisect_left(grid, True, lo=1, key=fits), len(grid) - 1)]
    blob, report = tried[best]  # the largest fraction has been tried if none fits
    total = len(blob) + code
    account = dict(model_bytes=len(blob), code_bytes=code, total_bytes=total, max_bytes=s.artifact_max_bytes, fits=total <= s.artifact_max_bytes,
                   prune_fraction=best, seconds=time.perf_counter() - began, sha256=hashlib.sha256(blob).hexdigest(), kinds=report)
    for kind, row in report.items():
        log(f"export kind:{kind} " + " ".join(f"{k}:{v:.4f}" if isinstance(v, float) else f"{k}:{v}" for k, v in row.items()))
    log("export " + " ".join(f"{k}:{v}" for k, v in account.items() if k != "kinds"))
    return blob, account

# ---- Evaluation: bits per byte, every target exactly once ----------------------------------------------------------
class Score(NamedTuple):
    """A sum over scored targets; loss in nats per target, bpb in bits per byte."""
    nll: float  # nats
    targets: int
    bytes: int
    @property
    def loss(self) -> float:
        return self.nll / self.targets
    @property
    def bpb(self) -> float:
        return self.nll / math.log(2) / self.bytes
    def checked(self, stream: Stream) -> "Score":
        """Itself, if it covers the stream: each mode must score every target once."""
        if (self.targets, self.bytes) != (stream.target_count, stream.byte_count):
            raise RuntimeError(f"scored {self.targets} targets and {self.bytes} bytes of {stream.target_count} and {stream.byte_count}")
        return self

def score_windows(forward: Callable, stream: Stream, start: Tensor, length: Tensor, skip: Tensor, width: int,
                  lora: list[Lora] | None = None, past: Past | None = None, keep: bool = False) -> tuple[Tensor, Tensor, Past | None]:
    """Score targets [skip, length) of windows that start at target `start`; all three (B,) int64. Serves every mode.
    Returns the NLL (B, width) float32, 0 where not scored; the sums of NLL, targets and bytes (B, 3) float64, detached; and what
    `keep` asks of the forward pass. Windows are padded on the right to `width`, which causality makes harmless."""
    column = torch.arange(width, device=start.device)
    at = (start[:, None] + column).clamp_max(stream.target_count - 1)
    nll, present = forward(stream.tokens[at].long(), stream.tokens[at + 1].long(), lora, past, keep)
    scored = (column >= skip[:, None]) & (column < length[:, None])
    nll = torch.where(scored, nll, 0.0)
    sums = torch.stack((nll.detach().sum(1, dtype=torch.float64), scored.sum(1), (stream.bytes[at] * scored).sum(1)), 1)
    return nll, sums, present

class Progress:
    """A line every few seconds: how much of this rank's work is done, the running bpb, tokens/s and the time left."""
    def __init__(self, log: Log, label: str, total: int, every: float = 5.0):
        self.log, self.label, self.total, self.every, self.done, self.sums = log, label, total, every, 0, np.zeros(3)
        self.began = self.printed = time.monotonic()
    def __call__(self, tokens: int, sums: Tensor | None = None) -> None:
        """Count tokens that went through the model, and sums of NLL, targets and bytes (n, 3) that will not change any more."""
        self.done += tokens
        self.sums += 0 if sums is None else sums.sum(0).cpu().numpy()
        if (now := time.monotonic()) - self.printed >= self.every:
            self.printed, rate = now, max(self.done, 1) / (now - self.began)
            bpb = f" val_bpb:{Score(*self.sums).bpb:.4f}" if self.sums[2] else ""
            self.log(f"{self.label}: {100 * self.done / self.total:.1f}%{bpb} tokens/s:{rate:.0f} left:{(self.total - self.done) / rate:.0f}s")

@torch.no_grad()
def evaluate_windows(forward: Callable, stream: Stream, windows: np.ndarray, batch: int, run: Runtime,
                     progress: Callable = lambda tokens, sums: None) -> Score:
    """Sum the scores of windows (n, 3) int64, each (start, length, skip), divided over the ranks."""
    width = int(windows[:, 1].max())
    mine, total = np.array_split(windows, run.world)[run.rank], torch.zeros(3, dtype=torch.float64, device=run.device)
    for i in range(0, len(mine), batch):
        part = mine[i : i + batch]
        if run.compile:  # empty windows fill the last batch: one shape, one compilation
            part = np.pad(part, ((0, batch - len(part)), (0, 0)))
        _, sums, _ = score_windows(forward, stream, *torch.from_numpy(part).to(run.device).T, width)
        total += sums.sum(0)
        progress(int(part[:, 1].sum()), sums)
    nll, targets, bytes_ = run.sum(total).tolist()
    return Score(nll, int(targets), int(bytes_)).checked(stream)

def evaluate_standard(forward: Callable, stream: Stream, s: Settings, run: Runtime) -> Score:
    """Non-overlapping rows of TRAIN_SEQ_LEN targets, the last one shorter."""
    start, batch = np.arange(0, stream.target_count, s.train_seq_len), max(1, s.val_batch_size // (s.train_seq_len * run.world))
    length = np.minimum(s.train_seq_len, stream.target_count - start)
    return evaluate_windows(forward, stream, np.stack((start, length, 0 * start), 1), batch, run)

def evaluate_sliding(forward: Callable, stream: Stream, s: Settings, run: Runtime, log: Callable = lambda line: None) -> Score:
    """Windows of TRAIN_SEQ_LEN every EVAL_STRIDE targets; each but the first scores only the targets no earlier one reached."""
    size, stride, n = s.train_seq_len, s.eval_stride, stream.target_count
    start = np.arange(1 + -(-max(n - size, 0) // stride)) * stride
    length, skip = np.minimum(size, n - start), np.where(start > 0, size - stride, 0)
    shown = Progress(log, "sliding", int(length.sum()) // run.world + 1)
    def progress(tokens: int, sums: Tensor) -> None:
        if run.signal:
            raise Interrupted(run.signal, "in the sliding evaluation, which keeps nothing")
        shown(tokens, sums)
    return evaluate_windows(forward, stream, np.stack((start, length, skip), 1), s.eval_batch_seqs, run, progress)

# ---- Test-time training: LoRA on Q and V, fresh for every document -------------------------------------------------
TTT_BATCH = {"cpu": 8, "cuda": 64}  # documents side by side, where TTT_BATCH_SIZE=0
STEP_FLOOR = {"cpu": 0, "cuda": 4096}  # tokens below which a step costs no less: launches, not arithmetic

def draw_lora_a(s: Settings, document: int) -> np.ndarray:
    """A document's initial A of all layers, Q's rows above V's: (layers, 2r, d) float32, uniform in +-1/sqrt(d)."""
    unit = np.random.default_rng([s.seed, document]).random((s.num_layers, 2 * s.ttt_lora_rank, s.model_dim), np.float32)
    return (2 * unit - 1) * s.model_dim**-0.5

class Adapters:
    """LoRA weights of a batch of documents with their Adam state, one float32 row each: `flat`, `m`, `v` (B, n)."""
    def __init__(self, a: np.ndarray, s: Settings, device: torch.device):
        """a: (B, layers, 2r, d). B starts at zero, so that adaptation starts at the model itself."""
        kv_dim = s.model_dim // s.num_heads * s.num_kv_heads
        self.shapes = [(s.num_layers, 2 * s.ttt_lora_rank, s.model_dim), (s.num_layers, s.model_dim, s.ttt_lora_rank),
                       (s.num_layers, kv_dim, s.ttt_lora_rank)]
        self.flat, self.m, self.v = (torch.zeros(len(a), sum(map(math.prod, self.shapes)), device=device) for _ in range(3))
        self.flat[:, : a[0].size] = torch.from_numpy(a.reshape(len(a), -1)).to(device)
        self.betas = s.beta1, s.beta2
    def layers(self, n: int) -> tuple[Tensor, list[Lora]]:
        """The first n documents' rows as a leaf, (n, all), and views of it by layer. Two unbinds: their backward is one copy each."""
        leaf = self.flat[:n].detach().requires_grad_()
        parts = leaf.split([math.prod(shape) for shape in self.shapes], dim=1)
        return leaf, [Lora(*layer) for layer in zip(*(p.unflatten(1, shape).unbind(1) for p, shape in zip(parts, self.shapes)))]
    def step(self, gradient: Tensor, count: Tensor, lr: Tensor, adam: Callable) -> None:
        """One Adam step of the first len(gradient) documents; `count` (n,) counts each document's own steps from 1."""
        n = len(gradient)
        adam(self.flat[:n], gradient, self.m[:n], self.v[:n], count, lr, *self.betas, 1e-10)

class ContextCache:
    """Rotated keys and values of the last `window` tokens of each document, in a ring; order is free, positions are in the keys."""
    def __init__(self, model: GPT, batch: int, window: int, device: torch.device):
        attn = model.blocks[0].attn
        self.kv = torch.zeros(batch, len(model.blocks), 2, attn.c_k.out_features // attn.head_dim, window + 1, attn.head_dim,
                              dtype=model.dtype, device=device)  # one slot more: a full context has strides like any other
        self.window, self.last, self.position = window, None, 0
    def past(self, n: int) -> Past | None:
        """The context of the first n documents, None at their start."""
        if not self.position:
            return None
        context = min(self.position, self.window)
        return Past(self.last.position, self.last.last_id[:n], self.last.last_x[:n], self.kv[:n, ..., :context, :])
    def push(self, present: Past | None) -> None:
        """Append a chunk of the first len(present.last_id) documents, if it was kept."""
        if present is None:
            return
        n, tokens = present.kv.size(0), present.kv.size(4)
        self.position += tokens
        if keep := min(tokens, self.window):
            slots = torch.arange(self.position - keep, self.position, device=self.kv.device) % self.window
            self.kv[:n, ..., slots, :] = present.kv[..., tokens - keep :, :]
        self.last = present

class DocumentBatch:
    """Documents that advance chunk by chunk together, longest first: those that still have chunk c are a prefix of the batch.
    A document that has ended is out of the prefix, so nothing of it moves while longer ones go on. Every pass leaves in `sums`
    (figures, B, 3) float64 the NLL, targets and bytes of each document; with `trace`, in `nll` (figures, B, targets) float32 that
    of every target. A figure is an epoch of replay, or the one pass of the others."""
    def __init__(self, model: GPT, stream: Stream, documents: np.ndarray, s: Settings, run: Runtime, adam: Callable | None = None,
                 progress: Progress | None = None, trace: bool = False):
        self.model, self.stream, self.documents, self.s, self.run = model, stream, documents, s, run
        self.adam, self.progress, self.trace = adam or adam_, progress or (lambda tokens: None), trace
        self.targets = stream.targets[documents]
        self.chunks = -(-self.targets // s.ttt_chunk_size)
        if (np.diff(self.chunks) > 0).any():
            raise ValueError("documents must come longest first")
        self.start, self.end, self.count = (torch.tensor(x, device=run.device) for x in (stream.starts[documents], self.targets, self.chunks))
        size, self.steps = s.ttt_chunk_size, []  # per chunk: how many documents have it, how many one after it, its targets in all
        for chunk in range(int(self.chunks[0])):
            n, go_on = ((self.chunks > c).sum() for c in (chunk, chunk + 1))
            self.steps.append((int(n), int(go_on), int(np.minimum(self.targets[:n] - chunk * size, size).sum())))
        self.cache = ContextCache(model, len(documents), min(s.ttt_eval_seq_len - size, (len(self.steps) - 1) * size), run.device)
    def begin(self, figures: int) -> None:
        self.sums = torch.zeros(figures, len(self.documents), 3, dtype=torch.float64, device=self.run.device)
        self.nll = torch.full((figures, len(self.documents), int(self.targets[0])), math.nan) if self.trace else None
        self.cache.position = 0
    def score(self, chunk: int, n: int, lora: list[Lora] | None = None, figure: int | None = None, keep: bool = False,
              cached: bool = True) -> tuple[Tensor, Past | None]:
        """Mean NLL of a chunk of the first n documents, (n,), after the cached context or in a window run afresh.
        Counts towards `figure`, if given. With `keep`, what the chunk adds to the cache is returned as well."""
        size, window = self.s.ttt_chunk_size, self.s.ttt_eval_seq_len
        end, widest = self.end[:n].clamp_max((chunk + 1) * size), int(min(self.targets[0], (chunk + 1) * size))
        if cached:
            begin, past = torch.full_like(end, chunk * size), self.cache.past(n)
            width = size if self.run.compile else widest - chunk * size  # compiled: one shape for every chunk
        else:
            begin, past, width = (end - window).clamp_min(0), None, min(widest, window)
        nll, sums, present = score_windows(self.model, self.stream, self.start[:n] + begin, end - begin, chunk * size - begin,
                                           width, lora, past, keep and cached)
        if figure is not None:
            self.sums[figure, :n] += sums
            for i in range(n if self.trace else 0):
                first, last = chunk * size, int(end[i])
                self.nll[figure, i, first:last] = nll[i, first - int(begin[i]) : last - int(begin[i])].detach()
        return nll.sum(1) / sums[:, 1].float(), present
    def plain(self, fresh: Adapters) -> np.ndarray:
        """Score without adaptation: under fresh adapters, whose B is zero, so that compiled code is shared. Returns (B,) true."""
        self.begin(1)
        for chunk, (n, go_on, targets) in enumerate(self.steps):
            self.cache.push(self.score(chunk, n, fresh.layers(n)[1], 0, go_on > 0)[1])
            self.progress(targets)
        return np.ones(len(self.documents), bool)
    def train(self, adapters: Adapters, chunk: int, n: int, epoch: int, count: Tensor, figure: int | None = None,
              keep: bool = False) -> Past | None:
        """Score a chunk under the adapters as they are, then take one Adam step on its mean NLL. `count` (n,): steps, from 1."""
        leaf, lora = adapters.layers(n)
        loss, present = self.score(chunk, n, lora, figure, keep, self.s.ttt_context == "cached")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)  # documents are independent: the sum gives each its own
        lr = self.s.ttt_lora_lr * 0.5 * (1 + math.cos(math.pi * epoch / self.s.ttt_n_epochs))
        adapters.step(gradient, count, torch.full((), lr, device=leaf.device), self.adam)
        self.run.synchronize(lag=True)
        return present
    def adapt(self, adapters: Adapters, expired: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Adapt to every document under TTT_PROTOCOL. Returns which were finished before `expired()`, (B,) bool."""
        return (self.replay if self.s.ttt_protocol == "replay" else self.single_pass)(adapters, expired)
    def replay(self, adapters: Adapters, expired: Callable[[], bool]) -> np.ndarray:
        """Whole-document epochs: every chunk is scored, then trained on. Only epoch 1 is backward-looking (PR #467)."""
        epochs = self.s.ttt_n_epochs
        self.begin(epochs)
        for epoch in range(epochs):
            self.cache.position = 0
            for chunk, (n, go_on, targets) in enumerate(self.steps):
                if expired():
                    return (self.chunks <= chunk) & (epoch == epochs - 1)
                count = self.count[:n] * epoch + chunk + 1
                self.cache.push(self.train(adapters, chunk, n, epoch, count, epoch, go_on > 0))
                self.progress(targets)
        return np.ones(len(self.documents), bool)
    def single_pass(self, adapters: Adapters, expired: Callable[[], bool]) -> np.ndarray:
        """Each chunk is scored once, then adapted to with TTT_N_EPOCHS steps, never scored again: valid at any number of steps."""
        cached, epochs = self.s.ttt_context == "cached", self.s.ttt_n_epochs
        self.begin(1)
        for chunk, (n, go_on, _) in enumerate(self.steps):
            self.score(chunk, n, adapters.layers(n)[1], figure=0, cached=cached)
            for epoch in range(epochs if go_on else 0):
                if expired():
                    return self.chunks <= chunk + 1
                count = torch.full((go_on,), chunk * epochs + epoch + 1, device=self.run.device)
                self.train(adapters, chunk, go_on, epoch, count)
                self.progress(go_on * self.s.ttt_chunk_size)
            if go_on and cached:  # the next chunk's context is this one under its final adapters
                self.cache.push(self.score(chunk, go_on, adapters.layers(go_on)[1], keep=True)[1])
        return np.ones(len(self.documents), bool)

def plan_batches(targets: np.ndarray, s: Settings, run: Runtime) -> list[list[np.ndarray]]:
    """Divide documents (targets per document, (D,)) over the ranks: for each rank its batches of document indices, longest first.
    Documents of like length share a batch. Batches go, costliest first, to the least loaded rank."""
    most = s.ttt_batch_size or TTT_BATCH[run.device.type]
    size = min(most, -(-len(targets) // (4 * run.world))) if run.world > 1 else most  # few documents still use every rank
    order = np.lexsort((np.arange(len(targets)), -targets))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    costs = np.array([batch_cost(targets[documents], s, STEP_FLOOR[run.device.type]) for documents in batches])
    plan, load = [[] for _ in range(run.world)], np.zeros(run.world)
    for i in np.argsort(-costs, kind="stable"):
        rank = int(load.argmin())
        plan[rank].append(batches[i])
        load[rank] += costs[i]
    return plan

def batch_cost(targets: np.ndarray, s: Settings, floor: int) -> float:
    """Predicted cost of one epoch of a batch (targets longest first), in tokens of the model's matrix products.
    A chunk step costs its active tokens weighted by their context, but never less than `floor`: long documents are sequential."""
    size, chunks = s.ttt_chunk_size, np.arange(-(-int(targets[0]) // s.ttt_chunk_size))
    tokens = np.clip(targets[:, None] - chunks * size, 0, size).sum(0)
    kv_dim, hidden = s.model_dim // s.num_heads * s.num_kv_heads, int(s.mlp_mult * s.model_dim)
    matrices = 2 * s.model_dim + 2 * kv_dim + 2 * hidden + s.vocab_size / s.num_layers
    context = np.minimum(chunks * size, s.ttt_eval_seq_len - size) + size / 2
    return float(np.maximum(tokens * (1 + 2 * context / matrices), floor).sum())

class Results:
    """This rank's part of a test-time training evaluation, kept in OUTPUT_DIR so that an interrupted one can go on.
    `nll` (1 + figures, D) float64: without adaptation, then per figure; `done` (2, D) bool: plainly scored, adapted."""
    def __init__(self, figures: int, documents: int, path: Path, identity: str):
        self.nll, self.done = np.zeros((1 + figures, documents)), np.zeros((2, documents), bool)
        self.path, self.identity, self.seconds, self.saved = path, identity, 0.0, time.monotonic()
    def save(self, seconds: float) -> None:
        write_whole(self.path, lambda f: np.savez(f, nll=self.nll, done=self.done, identity=self.identity, seconds=seconds))
        self.saved = time.monotonic()
    def load(self) -> None:
        """Take over what an interrupted evaluation of the same weights, settings and world size left, if anything."""
        try:
            with np.load(self.path) as kept:
                if str(kept["identity"]) == self.identity:
                    self.nll, self.done, self.seconds = kept["nll"], kept["done"], float(kept["seconds"])
        except Exception:  # none, or damaged in one of zip's many ways: score everything again
            pass

def score_documents(model: GPT, stream: Stream, s: Settings, run: Runtime, log: Log, results: Results, plan: list[np.ndarray],
                    clock: Callable[[], float], deadline: float) -> list[float]:
    """Fill `results` for this rank's batches: first all without adaptation, then adapted until the deadline in seconds of `clock`.
    Returns the seconds of `clock` when each of the two had ended. Raises Interrupted, the results saved."""
    adam, size, ends, stopped = run.compiled(adam_, dynamic=True), s.ttt_chunk_size, [], lambda: run.signal != 0
    expired = lambda: stopped() or clock() >= deadline
    for adapted, label in enumerate(("no_adaptation", f"ttt {s.ttt_protocol}")):
        todo = [documents for documents in plan if not results.done[adapted, documents].all()]
        targets = stream.targets[np.concatenate(todo)] if todo else np.zeros(0, np.int64)
        trained = (targets - 1) // size * size if s.ttt_protocol == "single_pass" else targets  # it never trains on a last chunk
        progress = Progress(log, label, max(1, int(trained.sum()) * s.ttt_n_epochs if adapted else int(targets.sum())))
        for documents in todo:
            if (expired if adapted else stopped)():
                break
            batch = DocumentBatch(model, stream, documents, s, run, adam, progress)
            adapters = Adapters(np.stack([draw_lora_a(s, int(d)) for d in documents]), s, run.device)
            finished = batch.adapt(adapters, expired) if adapted else batch.plain(adapters)
            nll, targets, bytes_ = batch.sums.cpu().numpy()[:, finished].transpose(2, 0, 1)
            scored = documents[finished]
            if (targets != stream.targets[scored]).any() or (bytes_ != stream.document_bytes[scored]).any():
                raise RuntimeError("a figure does not cover each of a document's targets once")
            results.nll[1 if adapted else 0 :][: len(nll), scored] = nll
            results.done[adapted, scored] = True
            progress(0, batch.sums[0, torch.from_numpy(finished)])
            if time.monotonic() - results.saved > 20:
                results.save(clock())
        ends.append(clock())
    if stopped():
        results.save(clock())
        raise Interrupted(run.signal, f"in the evaluation; {int(results.done[1].sum())} adapted documents of this rank are kept")
    return ends

def warm_up_ttt(model: GPT, s: Settings, run: Runtime, documents: int) -> float:
    """Compile the shapes that batches of this size meet, on synthetic tokens. Returns the seconds it took."""
    began, chunk = time.monotonic(), s.ttt_chunk_size
    model.compile_regions()
    targets = np.append(7 * chunk, -np.sort(-np.tile([5 * chunk, 4 * chunk, 2 * chunk + 1], documents)[: documents - 1]))
    tokens = np.random.default_rng(0).integers(BOS + 1, s.vocab_size, targets.sum() + 1)
    stream = Stream(tokens, np.ones(len(tokens) - 1, np.int16), run.device, (np.cumsum(targets) - targets, targets))
    batch = DocumentBatch(model, stream, np.arange(documents), replace(s, ttt_n_epochs=2), run, run.compiled(adam_, dynamic=True))
    for work in (batch.plain, batch.adapt):  # the plain pass is cached even where TTT_CONTEXT is not
        work(Adapters(np.stack([draw_lora_a(s, document) for document in range(documents)]), s, run.device))
    run.synchronize()
    return time.monotonic() - began

def evaluate_ttt(model: GPT, stream: Stream, s: Settings, run: Runtime, log: Log, output: Path, identity: str, began: float):
    """Score the stream without and with test-time training; log the figures; return them (dict) and the backward-looking Score.
    `began` is time.monotonic() when the artifact was loaded; documents unfinished EVAL_MAX_SECONDS later count with their NLL
    without adaptation. Writes ttt_documents.npz."""
    plan = plan_batches(stream.targets, s, run)[run.rank]
    compile_seconds = warm_up_ttt(model, s, run, len(plan[0]) if plan else 1) if run.compile else 0.0
    figures = s.ttt_n_epochs if s.ttt_protocol == "replay" else 1
    results = Results(figures, len(stream.targets), output / f"ttt_progress_{run.rank}.npz", identity)
    if s.resume:
        results.load()
        log(f"resumed the evaluation: {int(results.done[1].sum())} of this rank's documents are done")
    clock = lambda: results.seconds + time.monotonic() - began
    deadline = s.eval_max_seconds - min(2.0, 0.1 * s.eval_max_seconds) if s.eval_max_seconds else math.inf  # the rest is for gathering
    ends = score_documents(model, stream, s, run, log, results, plan, clock, deadline)
    nll = run.sum(torch.from_numpy(results.nll)).numpy()  # each document is one rank's: the sum only places it
    finished = run.sum(torch.from_numpy(results.done[1].astype(np.int64))).numpy() > 0
    nll[1:, ~finished] = nll[0, ~finished]
    seconds, _ = run.agree(clock())
    targets, bytes_ = int(stream.targets.sum()), int(stream.document_bytes.sum())
    without, *scores = (Score(float(row.sum()), targets, bytes_).checked(stream) for row in nll)
    account = dict(documents=len(finished), unfinished_documents=np.flatnonzero(~finished).tolist(), compile_seconds=compile_seconds,
                   seconds=seconds, within_budget=not s.eval_max_seconds or seconds <= s.eval_max_seconds)
    report_ttt(without, scores, account, s, log)
    if run.rank == 0:
        arrays = dict(index=np.arange(len(finished)), targets=stream.targets, bytes=stream.document_bytes, finished=finished,
                      nll_no_adaptation=nll[0], nll_per_epoch=nll[1:])
        write_whole(output / "ttt_documents.npz", lambda f: np.savez(f, **arrays))
        for path in output.glob("ttt_progress_*.npz"):  # an earlier world size's too
            path.unlink()
    curve = [figure(f, f"ttt_{s.ttt_protocol}", s.ttt_context, ends[1] - ends[0], e == 0, epoch=e + 1) for e, f in enumerate(scores)]
    plain, scored = figure(without, "no_adaptation", "cached", ends[0]), dict(backward_looking=curve[0], last_epoch=curve[-1], curve=curve)
    return account | dict(no_adaptation=plain) | scored, scores[0]

def report_ttt(without: Score, scores: list[Score], account: dict, s: Settings, log: Log) -> None:
    """Log every figure for what it is, and what the budget left undone."""
    log(f"no_adaptation val_loss:{without.loss:.8f} val_bpb:{without.bpb:.8f}")
    if s.ttt_protocol == "replay":
        for epoch, score in enumerate(scores, 1):
            log(f"ttt_epoch:{epoch}/{s.ttt_n_epochs} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if len(scores) > 1:
        log(f"note: only epoch 1 is backward-looking, a valid score; epoch {len(scores)} scores text trained on {len(scores) - 1} times")
    left = account["unfinished_documents"]
    log(f"ttt documents:{account['documents']} scored_without_adaptation:{len(left)} {left if len(left) < 20 else [*left[:20], ...]} "
        f"compile_seconds:{account['compile_seconds']:.1f} eval_seconds:{account['seconds']:.1f} within_budget:{account['within_budget']}")
    log(f"final_ttt_exact protocol:{s.ttt_protocol} context:{s.ttt_context} backward_looking_val_bpb:{scores[0].bpb:.8f} "
        f"last_epoch_val_bpb:{scores[-1].bpb:.8f}")

def figure(score: Score, protocol: str, context: str, seconds: float, backward_looking: bool = True, **more) -> dict:
    """A score with what is needed to read it, for result.json; `seconds` are rank 0's for the pass, all its epochs together."""
    return dict(protocol=protocol, context=context, backward_looking=backward_looking, val_loss=score.loss, val_bpb=score.bpb,
                targets=score.targets, bytes=score.bytes, seconds=seconds, **more)

def audit(model: GPT, stream: Stream, s: Settings, run: Runtime, log: Log) -> list[dict]:
    """Does a later token reach an earlier score? For TTT_AUDIT documents, replace every token after t and score again.
    For each figure: the largest change of any target's NLL with index <= t, in nats, beside that of an unchanged repeat."""
    rng = np.random.default_rng([s.seed, 0xA0D17])
    chosen = rng.permutation(np.flatnonzero(stream.targets > s.ttt_chunk_size))[: s.ttt_audit]
    chosen = chosen[np.argsort(-stream.targets[chosen], kind="stable")]
    if not len(chosen):
        return []
    spans = [slice(int(stream.starts[d]), int(stream.starts[d] + stream.targets[d] + 1)) for d in chosen]
    tokens, t = [stream.tokens[span].cpu().numpy() for span in spans], [int(rng.integers(1, stream.targets[d])) for d in chosen]
    other = [rng.integers(BOS + 1, s.vocab_size - 1, len(x)) for x in tokens]  # skipping each token's own value below
    changed = [np.where(np.arange(len(x)) > at, y + (y >= x), x) for x, y, at in zip(tokens, other, t)]
    runs = (tokens, tokens if run.device.type == "cuda" else None, changed)  # a CPU repeats itself exactly
    first, repeat, after = (trace_documents(model, x, chosen, s, run) if x else None for x in runs)
    rows = []
    for i, document in enumerate(chosen.tolist()):
        for name in first:  # token j is target j - 1, so t targets have an index <= t
            change, noise = ((x[name][i, : t[i]] - first[name][i, : t[i]]).abs().max().item() for x in (after, repeat or first))
            rows.append(dict(document=document, targets=int(stream.targets[document]), t=t[i], figure=name,
                             backward_looking=not name.startswith("last"), change=change, repeat=noise))
            log(f"audit document:{document} targets:{rows[-1]['targets']} t:{t[i]} figure:{name} change:{change:.3e} repeat:{noise:.3e}")
    return rows

def trace_documents(model: GPT, tokens: list[np.ndarray], documents: np.ndarray, s: Settings, run: Runtime) -> dict[str, Tensor]:
    """NLL of every target of these documents (given longest first), (B, targets) float32: without adaptation, first, last epoch."""
    ends = np.cumsum([len(x) for x in tokens])
    targets, flat = np.array([len(x) - 1 for x in tokens]), np.concatenate(tokens)
    stream = Stream(flat, np.zeros(len(flat) - 1, np.int16), run.device, (ends - targets - 1, targets))
    batch = DocumentBatch(model, stream, np.arange(len(tokens)), s, run, trace=True)
    adapters = Adapters(np.stack([draw_lora_a(s, int(document)) for document in documents]), s, run.device)
    batch.plain(adapters)
    traces = {"no_adaptation": batch.nll[0]}
    batch.adapt(adapters)
    traces["epoch_1" if s.ttt_protocol == "replay" else "single_pass"] = batch.nll[0]
    if len(batch.nll) > 1:
        traces[f"last_epoch_{len(batch.nll)}"] = batch.nll[-1]
    return traces

# ---- Main ----------------------------------------------------------------------------------------------------------
def describe(s: Settings, run: Runtime, log: Log) -> None:
    """What a reader needs to repeat the run from its log alone: source, settings (a star marks overridden ones), versions, devices."""
    log(SOURCE.read_text(encoding="utf-8"), console=False)
    settings = [f"{'*' if f.name.upper() in os.environ else ' '} {f.name.upper()}={getattr(s, f.name)}" for f in fields(s)]
    for line in misspelt(os.environ) + settings:
        log(line)
    log(" ".join(f"{k}:{v}" for k, v in environment(run).items()))

def open_output(s: Settings, run: Runtime) -> tuple[Settings, Path, Log]:
    """Fix the run's name on all ranks, make OUTPUT_DIR and open its log. Raises UserError."""
    run_id = s.run_id or run.gather(uuid.uuid4().hex[:12])[0]
    output = Path(s.output_dir or f"runs/{run_id}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = Log(open(output / "train.log", "a" if s.resume else "w", encoding="utf-8") if run.rank == 0 else None)
    except OSError as e:
        raise UserError(f"cannot write to OUTPUT_DIR={output}: {e.strerror} — set OUTPUT_DIR to a writable folder") from e
    return replace(s, run_id=run_id, output_dir=str(output)), output, log

def load_model(path: Path, s: Settings, run: Runtime) -> tuple[GPT, Settings, str]:
    """The model to be scored, frozen, from a .ptz artifact (whose header decides its configuration) or a .pt state dict.
    Also returns the settings with that configuration and the SHA-256 of the file. Raises UserError."""
    try:
        blob = path.read_bytes()
        state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True) if path.suffix == ".pt" else None
        state = state and {name: tensor.float() for name, tensor in state.items()}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror} — set EVAL_ONLY to an existing file") from e
    except Exception as e:  # torch.load raises many kinds for a damaged or hostile file
        raise UserError(f"{path} is no state dict of tensors ({type(e).__name__}) — set EVAL_ONLY to a .ptz or .pt file of a run") from e
    if state is None:
        config, state = unpack(blob, str(path))
        for name, value in config.items():
            if name.upper() in os.environ and getattr(s, name) != value:
                raise UserError(f"{name.upper()}={getattr(s, name)} contradicts {path}, which has {value} — unset {name.upper()}")
        check_combinations(s := replace(s, **config))
    with torch.device("meta"):
        model = GPT(s, run.dtype)
    load_weights(model, state, str(path))
    model.to(run.device).requires_grad_(False)
    for linear in (module for module in model.blocks.modules() if isinstance(module, Linear)):
        linear.weight.data = linear.weight.data.to(run.dtype)  # cast once what every step would cast
    return model, s, hashlib.sha256(blob).hexdigest()

def train_and_export(stream: Stream, s: Settings, run: Runtime, log: Log, output: Path) -> tuple[dict, dict]:
    """Train, write final_model.pt and the artifact final_model.ptz. Returns what training and export report."""
    torch.manual_seed(s.seed)
    model = GPT(s, run.dtype).to(run.device)
    log(f"model parameters:{sum(p.numel() for p in model.parameters())}")
    trained = train(model, Optimizer(model, s, run), stream, s, run, log, output)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def write() -> dict:
        write_whole(output / "final_model.pt", lambda f: torch.save(state, f))
        blob, account = export(state, s, log)
        write_whole(output / "final_model.ptz", lambda f: f.write(blob))
        return account
    return trained, run.together(lambda: None if run.rank else write())

def evaluate(stream: Stream, model: GPT, s: Settings, digest: str, began: float, run: Runtime, log: Log, output: Path):
    """Score the stream with a model loaded at `began`. Returns the figures (dict) and the backward-looking Score."""
    if not s.ttt_enabled:
        score = evaluate_sliding(run.compiled(model, dynamic=False), stream, s, run, log)
        log(f"final_sliding_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        seconds, _ = run.agree(time.monotonic() - began)
        return dict(sliding=figure(score, "sliding", f"stride {s.eval_stride}", seconds), seconds=seconds,
                    within_budget=not s.eval_max_seconds or seconds <= s.eval_max_seconds), score
    scored_by = {k: v for k, v in asdict(s).items() if k.startswith("ttt_") or k in ("seed", "val_docs", "beta1", "beta2", "data_path")}
    identity = json.dumps(dict(weights=digest, world=run.world, targets=stream.target_count) | scored_by)
    figures, score = evaluate_ttt(model, stream, s, run, log, output, identity, began)
    if s.ttt_audit:
        figures["audit"] = run.gather(audit(model, stream, s, run, log) if run.rank == 0 else None)[0]
    return figures, score

def main() -> int:
    """Load, train, export, reload, evaluate, report. Returns the exit code."""
    s = Settings.from_env(os.environ)
    run = Runtime(s)
    s, output, log = open_output(s, run)
    describe(s, run, log)
    prepare_sample(s, run)
    path, began, trained, account = Path(s.eval_only or output / "final_model.ptz"), time.monotonic(), None, None
    if s.eval_only:
        model, s, digest = load_model(path, s, run)  # its header decides the vocabulary that the data must have
    stream = load_validation(s, run)
    log(f"validation documents:{len(stream.targets)} targets:{stream.target_count} bytes:{stream.byte_count}")
    if not s.eval_only:
        trained, account = train_and_export(stream, s, run, log, output)
        began = time.monotonic()
        model, s, digest = load_model(path, s, run)
    log(f"evaluating {path}, {'unquantised' if path.suffix == '.pt' else 'quantised'} weights: {model_config(s)}")
    figures, score = evaluate(stream, model, s, digest, began, run, log, output)
    log(f"final_int8_zlib_roundtrip_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if run.rank == 0:
        result = dict(schema_version=1, run_id=s.run_id, seed=s.seed, source_sha256=hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
            settings=asdict(s), overridden=sorted(f.name for f in fields(s) if f.name.upper() in os.environ),
            environment=environment(run), world_size=run.world, quantised=path.suffix != ".pt",
            training=trained, artifact=account, evaluation=figures, val_loss=score.loss, val_bpb=score.bpb)
        write_whole(output / "result.json", lambda f: f.write(json.dumps(result, indent=1).encode()))
    return 3 if account and not account["fits"] else 0

def entry() -> int:
    """Run main() and turn its exceptions into one line and an exit code."""
    try:
        code = main()
    except (UserError, Interrupted, RuntimeError) as e:
        consequence = not isinstance(e, RuntimeError) or any(backend in str(e).lower() for backend in ("gloo", "nccl"))
        if consequence and os.environ.get("RANK", "0") != "0":  # rank 0 says the same, or a rank's end broke a collective:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # leave the last word to the cause
            time.sleep(3)
        if isinstance(e, RuntimeError):
            raise
        print(f"error: {e}" if isinstance(e, UserError) else f"stopped by {e}", file=sys.stderr, flush=True)
        return 2 if isinstance(e, UserError) else 128 + e.number
    if dist.is_initialized():
        dist.destroy_process_group()
    return code

if __name__ == "__main__":
    sys.exit(entry())
