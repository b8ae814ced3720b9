"""What bench.py and machine.py share: timing, ceilings, counted work, and predictions of an evaluation's seconds.

Every figure is one of three: measured (by a clock on this machine), counted (bytes, shapes, targets), or predicted
(computed from the other two, or from rates that H100 assumes)."""

from __future__ import annotations

import heapq
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

FULL_SPLIT_DOCUMENTS = 50_000
FULL_SPLIT_TARGETS = 62_021_845
FULL_SPLIT_LONGEST = 160_000  # by the Pareto tail of draw_documents()
BUDGET = 600.0  # seconds, of training and of evaluation
RECOMMENDED = dict(
    ttt_protocol="single_pass",
    ttt_n_epochs=5,
    ttt_chunk_size=64,
    ttt_lora_rank=32,
    ttt_lora_targets=",".join(t.LORA_TARGETS),
    ttt_lora_lr=0.003,
    ttt_weight_decay=0.5,
    ttt_mixture=True,
    ttt_mixture_lr=0.01,
    ttt_mixture_share=0.03,
)


# ---- Measuring


def seconds_of(run: t.Run, work: Callable, repeats: int, warm: int = 1, most: float = float("inf")) -> float:
    """Median wall seconds of `work()`, the device idle before and after, after `warm` calls that do not count. No more
    calls are begun than fit `most` seconds, but one that counts."""
    times = []
    began = time.perf_counter()
    for number in range(warm + max(repeats, 1)):
        if times and time.perf_counter() - began > most:
            break
        run.wait()
        call = time.perf_counter()
        work()
        run.wait()
        if number >= warm:
            times.append(time.perf_counter() - call)
    return statistics.median(times)


def most_that_fit(most: int, work: Callable[[int], object], run: t.Run) -> int:
    """As the script's preflight finds it; on a CPU, which does not say when memory is short, all."""
    if not run.cuda:
        return most
    with torch.compiler.set_stance("force_eager"):
        return t.most_that_fits(most, work, run)


class Ceilings(NamedTuple):
    """The device's own rates: FLOP/s of a matrix product in the model's dtype, bytes/s of a copy, read and written."""

    flops: float
    copy: float

    @classmethod
    def measure(cls, run: t.Run, most: float = float("inf")) -> Ceilings:
        n = 8192 if run.cuda else 1024
        a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
        product = seconds_of(run, lambda: a @ b, 10, most=most)
        source = torch.empty(1 << 28 if run.cuda else 1 << 24, device=run.device)
        target = torch.empty_like(source)
        copy = seconds_of(run, lambda: target.copy_(source), 10, most=most)
        return cls(2 * n**3 / product, 2 * source.nbytes / copy)


def flop_per_token(s: t.Settings, context: float) -> float:
    """Multiply-adds of a forward pass, doubled: matrices, head, and attention over `context` keys on average."""
    with torch.device("meta"):
        parameters = dict(t.GPT(s).named_parameters())
    tables = ("emb.weight", "embed.weight")
    matrices = sum(p.numel() for name, p in parameters.items() if p.ndim == 2 and not name.endswith(tables))
    head = s.vocab_size * s.model_dim if s.tie_embeddings else 0
    return 2 * (matrices + head + 2 * s.num_layers * s.model_dim * context)


@torch.no_grad()
def randomise(model: t.GPT, seed: int = 0):
    """Weights under which every parameter matters: at their initial values many branches are silent."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {"attn_scale", "mlp_scale", "skip_weights", "q_gain"}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith(("emb.weight", "embed.weight")):
            noise *= 0.3
        elif name.endswith(".weight"):
            noise *= p.shape[1] ** -0.5
        else:
            noise = 0.1 * noise + (1.0 if name.split(".")[-1] in fresh else 0.0)
        if name.endswith("resid_mix"):
            noise[0] += 1.0
        p.copy_(noise)


# ---- Documents


def lengths_of(shard: Path | None) -> np.ndarray:
    """Targets of a shard's documents, or of 625 whose lengths are log-normal, like FineWeb's."""
    if shard:
        return t.find_documents(t.open_shard(shard)[:])[1]
    drawn = np.random.default_rng(0).lognormal(np.log(640), 1.058, 625)
    return np.maximum(drawn, 2).astype(np.int64)


def tokens_of(shard: Path, run: t.Run) -> np.ndarray:
    """Raises UserError if a token is not in the vocabulary."""
    tokens = t.open_shard(shard)[:]
    if tokens.max() >= run.s.vocab_size:
        what = f"{shard} has token {tokens.max()} but VOCAB_SIZE={run.s.vocab_size}"
        raise t.UserError(f"{what} — use a shard of the vocabulary")
    return tokens


def micro_batch(shard: Path | None, rows: int, run: t.Run) -> list:
    """One of so many rows, of the shard's tokens or random ones."""
    s = run.s
    count = rows * s.train_seq_len
    tokens = tokens_of(shard, run) if shard else np.random.default_rng(0).integers(0, s.vocab_size, count + 1)
    return t.BatchLoader([tokens], run.using(train_batch_tokens=count, micro_batch_tokens=count)).batch(0)


def stream_of(shard: Path | None, run: t.Run) -> t.Stream:
    """Its documents, or random tokens in 625 documents."""
    if not shard:
        return t.synthetic_stream(lengths_of(None), run)
    tokens = tokens_of(shard, run)
    return t.Stream(tokens, np.ones(len(tokens) - 1, np.int16), run.device)


def draw_documents(sample: np.ndarray, tail: str) -> np.ndarray:
    """Lengths of the full split's documents, longest first, drawn from the sample's and scaled to its targets.

    Hundreds of documents do not show the longest of tens of thousands: "pareto" continues their tail with index 1.9."""
    drawn = np.random.default_rng(0).choice(sample, FULL_SPLIT_DOCUMENTS).astype(float)
    drawn = -np.sort(-np.maximum(drawn * FULL_SPLIT_TARGETS / drawn.sum(), 2).astype(np.int64))
    if tail == "pareto":
        drawn[:25] = drawn[25] * (50 / np.arange(1, 26)) ** (1 / 1.9)
    return drawn


def mixture_seconds(targets: int, longest: int, documents: int) -> float:
    """Seconds that t.mixture() takes, one call of the three parts that are recommended, on so many targets, the longest
    document's among them."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(640), 1.058, documents)
    lengths = np.maximum(drawn * (targets - longest) / drawn.sum(), 1).astype(np.int64)
    lengths[0] += targets - longest - lengths.sum()
    lengths = np.insert(lengths, documents // 2, longest)
    nll = np.empty((3, targets), np.float32)
    nll[0] = rng.exponential(2.0, targets)
    for other in nll[1:]:
        other[:] = np.abs(nll[0] + rng.normal(0.0, 0.2, targets))
    began = time.perf_counter()
    t.mixture(nll, np.cumsum(lengths) - lengths, lengths, 0.1)
    return time.perf_counter() - began


# ---- Seconds of steps


class Corners(NamedTuple):
    """Seconds of a step of one document and of a batch, without context and with a full one."""

    one: float
    one_full: float
    batch: float
    batch_full: float


@dataclass
class MeasuredSteps:
    """Seconds of steps, linear in the documents and in the context."""

    s: t.Settings
    documents: int  # of a batch
    train: Corners
    forward: Corners  # without adaptation
    recording: float = 0.0  # of a shape that is new, where steps are recorded as CUDA graphs
    drawing: float = 0.0  # of a document's adapters before each pass, on the host

    def seconds(self, train: bool, documents: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Of steps of so many documents, (n,), after so many tokens of context, (n,)."""
        corners = self.train if train else self.forward
        share = context / max(self.s.ttt_eval_seq_len - self.s.ttt_chunk_size, 1)
        more = (documents - 1) / max(self.documents - 1, 1)
        short = corners.one + more * (corners.batch - corners.one)
        full = corners.one_full + more * (corners.batch_full - corners.one_full)
        return (1 - share) * short + share * full


def step_of(batch: t.DocumentBatch, chunk: int, documents: int, train: bool, cached: bool = True) -> Callable:
    """A step as adapt() takes it: one that trains, or one that scores and keeps its keys and values."""
    asked = dict(train=True) if train else dict(score=True)
    if batch.run.s.ttt_protocol == "replay":
        asked["score"] = True
    if cached and (not train or "score" in asked):
        asked["keep"] = True
    return lambda: batch._run_step(chunk, documents, cached, **asked)


def batch_at_full_context(model: t.GPT, documents: int, run: t.Run) -> tuple[t.DocumentBatch, int]:
    """So many loaded synthetic documents, scored once, and the first of their chunks that has a full context."""
    s = run.s
    last = t.ceil_div(s.ttt_eval_seq_len, s.ttt_chunk_size)
    stream = t.synthetic_stream([(last + 1) * s.ttt_chunk_size] * documents, run)
    batch = t.DocumentBatch(model, stream, documents, run)
    batch.load(np.arange(documents))
    batch.score()  # fills the cache
    batch.adapters.begin(np.stack([t.draw_lora_a(s, i) for i in range(documents)]))
    batch.lr.fill_(s.ttt_lora_lr)
    return batch, last


def largest_batch(model: t.GPT, run: t.Run) -> int:
    """Documents side by side: the run's own number, or as many as fit."""

    def work(size: int):
        batch, last = batch_at_full_context(model, size, run)
        step_of(batch, last, size, True, cached=run.s.ttt_context == "cached")()

    return most_that_fit(run.most("documents"), work, run)


def time_steps(model: t.GPT, documents: int, run: t.Run, repeats: int, most: float = float("inf")) -> MeasuredSteps:
    """Time single steps on synthetic documents; `most` seconds for each of the eight."""
    found = {True: {}, False: {}}
    warm = 3 if run.graphs else 1  # a shape's first step is eager, its second is recorded
    for name, size in (("one", 1), ("batch", documents)):
        batch, last = batch_at_full_context(model, size, run)
        for suffix, chunk in (("", 0), ("_full", last)):
            for train in (True, False):
                step = step_of(batch, chunk, size, train)
                found[train][name + suffix] = seconds_of(run, step, repeats, warm, most)
    steps = MeasuredSteps(run.s, documents, Corners(**found[True]), Corners(**found[False]))
    if run.graphs and documents > 2:  # nobody has seen this shape
        step = step_of(batch, last, documents - 1, True)
        steps.recording = 2 * seconds_of(run, step, 2, warm=0)
    steps.drawing = seconds_of(run, lambda: t.draw_lora_a(run.s, 0), repeats)
    return steps


@dataclass
class H100:
    """Seconds of steps on one H100. ASSUMED, +-50%: no GPU was measured.

    Assumed for 64 documents of the record model, chunks of 256, rank 8 on Q and V: a training step takes 18.5 ms at a
    full context of 1,792 and 9.6 ms without, of which 1.1 ms do not shrink with the documents; and 2.5 ms at least, as
    long as its kernels take one after another, however small. A third of each without training.

    For other settings these are scaled by counted work. The 1.1 and 2.5 ms by the number of kernels (KERNELS). What
    grows with the context by queries times keys. The rest by tokens; but at `bandwidth`: adapters' own traffic by
    token, 12 bytes for each input and output, and by document, 54 bytes for each of their numbers: casts 6, forward 2,
    backward 4, gradients cast 6 and joined 8, Adam 28."""

    s: t.Settings
    host: float = 2e-5  # seconds of a step on the host, which is one step ahead at most
    slower: float = 1.0  # factor on all of the GPU's
    recording: float = 0.0  # seconds of a shape that is new, recorded as a graph
    drawing: float = 0.0  # seconds of a document's adapters before each pass, on the host
    full: float = 18.5e-3
    first: float = 9.6e-3
    fixed: float = 1.1e-3
    least: float = 2.5e-3
    bandwidth: float = 3.35e12

    def __post_init__(self):
        assumed = t.Settings()
        tokens = 64 * assumed.ttt_chunk_size
        token = (self.first - self.fixed) / tokens
        token -= self._adapters_by_token(assumed) + self._adapters_by_document(assumed) / assumed.ttt_chunk_size
        self.token = token * flop_per_token(self.s, 0) / flop_per_token(assumed, 0)
        window = assumed.ttt_eval_seq_len - assumed.ttt_chunk_size
        width = self.s.num_layers * self.s.model_dim / (assumed.num_layers * assumed.model_dim)
        self.key = (self.full - self.first) / tokens / window * width  # of one query and one key
        self.kernels = kernels_of(self.s) / kernels_of(assumed)

    def _adapters_by_token(self, s: t.Settings) -> float:
        return 12 * s.num_layers * sum(map(sum, t.lora_shapes(s).values())) / self.bandwidth

    def _adapters_by_document(self, s: t.Settings, bytes_: int = 54) -> float:
        return bytes_ * adapter_numbers(s) / self.bandwidth

    def seconds(self, train: bool, documents: np.ndarray, context: np.ndarray) -> np.ndarray:
        share = 1.0 if train else 1 / 3
        of_token = self.token + self._adapters_by_token(self.s) + self.key * context
        of_document = share * self.s.ttt_chunk_size * of_token
        of_document = of_document + self._adapters_by_document(self.s, 54 if train else 8)
        least, fixed = (share * self.kernels * x for x in (self.least, self.fixed))
        return np.maximum(self.slower * np.maximum(least, documents * of_document + fixed), self.host)


# Kernels of a training step at full context, counted on a driver that runs none, not compiled (compiled code has fewer,
# but a larger share of them is the adapters'): of 10 layers with adapters on Q and V, and of each adapter more.
KERNELS = 1453, 14.2


def kernels_of(s: t.Settings) -> float:
    base, of_adapter = KERNELS
    return (base + of_adapter * 10 * (len(t.lora_shapes(s)) - 2)) * s.num_layers / 10


# ---- Seconds of an evaluation


class StepCounts(NamedTuple):
    """Steps of one kind that a batch takes, (n,) each: documents and tokens of context; all of them `times`."""

    train: bool
    documents: np.ndarray
    context: np.ndarray
    times: int = 1


def steps_of_pass(label: str, lengths: np.ndarray, s: t.Settings) -> list[StepCounts]:
    """What DocumentBatch does in one pass over documents of these lengths, longest first."""
    chunks = np.arange(t.ceil_div(int(lengths[0]), s.ttt_chunk_size))
    ends = np.sort(t.ceil_div(lengths, s.ttt_chunk_size))
    alive = len(ends) - np.searchsorted(ends, chunks, side="right")  # documents that have this chunk
    context = np.minimum(chunks * s.ttt_chunk_size, s.ttt_eval_seq_len - s.ttt_chunk_size)
    if label == "no_adaptation":
        return [StepCounts(False, alive, context)]
    parts = len(s.ttt_rates)  # one after another
    if s.ttt_protocol == "replay":
        return [StepCounts(True, alive, context, parts if label == "score" else s.ttt_n_epochs)]
    longer = alive[1:]  # documents that go on after a chunk
    kept = StepCounts(False, longer, context[:-1], parts)
    trained = StepCounts(True, longer, context[:-1], parts * s.ttt_n_epochs)
    return [StepCounts(False, alive, context, parts), trained, kept]


def shapes_of(label: str, steps: list[StepCounts]) -> set[tuple]:
    """What has a CUDA graph of its own."""
    found = set()
    for number, kind in enumerate(steps):
        found |= {(label, number, *shape) for shape in zip(kind.documents.tolist(), kind.context.tolist(), strict=True)}
    return found


@dataclass
class Forecast:
    """Seconds until the score is complete, and until all is; of the slowest rank against the mean; of the longest
    batch; shapes that a rank records."""

    score: float = 0.0
    all: float = 0.0
    balance: float = 1.0
    longest: float = 0.0
    shapes: int = 0

    @property
    def inside(self) -> bool:
        """Whether all of it is."""
        return self.all <= BUDGET


@dataclass
class Plan:
    """An evaluation's batches, as one device of a kind takes them, and what each pass over each of them costs."""

    passes: tuple
    seconds: dict = field(default_factory=dict)  # by pass: one number for each batch
    shapes: dict = field(default_factory=dict)  # by pass: a set for each batch
    recording: float = 0.0

    @classmethod
    def of(cls, cost, lengths: np.ndarray, run: t.Run) -> Plan:
        replay = run.s.ttt_protocol == "replay" and run.s.ttt_n_epochs > 1
        plan = cls(("no_adaptation", "score", "replay") if replay else ("no_adaptation", "score"))
        plan.recording = cost.recording
        batches = [lengths[documents] for documents in t.batch_documents(lengths, run)]
        for label in plan.passes:
            plan.seconds[label], plan.shapes[label] = [], []
            for batch in batches:
                steps = steps_of_pass(label, batch, run.s)
                sums = (times * cost.seconds(train, n, c).sum() for train, n, c, times in steps)
                drawing = len(batch) * cost.drawing * (label != "no_adaptation")  # once for all parts of a mixture
                plan.seconds[label].append(float(sum(sums)) + drawing)
                plan.shapes[label].append(shapes_of(label, steps) if plan.recording else set())
        return plan

    def forecast(self, devices: int) -> Forecast:
        """Ranks take the costliest batch that is left; they do not wait for one another between passes."""
        found = Forecast()
        free = [(0.0, rank) for rank in range(devices)]
        seen = [set() for _ in free]
        for label in self.passes:
            ends = []
            for number, seconds in enumerate(self.seconds[label]):
                began, rank = heapq.heappop(free)
                new = self.shapes[label][number] - seen[rank]
                seen[rank] |= new
                seconds += len(new) * self.recording
                ends.append(began + seconds)
                found.longest = max(found.longest, seconds)
                heapq.heappush(free, (began + seconds, rank))
            if label == "score":
                found.score = max(ends)
        times = [when for when, _ in free]
        found.all, found.shapes = max(times), max(map(len, seen))
        found.balance = found.all / float(np.mean(times))
        return found


def planned(run: t.Run, device: str = "cuda") -> t.Run:
    """A copy whose batches are planned as on such a device, on which nothing runs."""
    copy = run.using()
    copy.device = torch.device(device)
    return copy


# ---- Memory


def adapter_numbers(s: t.Settings) -> int:
    """Of one document's adapters."""
    return s.num_layers * s.ttt_lora_rank * sum(map(sum, t.lora_shapes(s).values()))


def memory_of_document(run: t.Run) -> dict[str, int]:
    """Counted bytes of one document in test-time training on a GPU with bf16: its adapters, their gradient (and the
    pieces that it is joined from), both moments, keys and values; and what one training step saves for its backward
    pass, not compiled, by the CPU's operators: compiled code and a GPU's save less."""
    s = run.s
    numbers = adapter_numbers(s)
    kv = 2 * s.num_layers * s.num_kv_heads * (s.model_dim // s.num_heads) * s.ttt_eval_seq_len * 2
    found = dict(adapters=4 * numbers, moments=8 * numbers, gradient=8 * numbers, keys_and_values=kv)
    few, more = (
        8,
        16,
    )  # targets: bytes are linear in them and in the documents, so small steps tell what large ones save
    base = bytes_saved(run, 1, few)
    by_target = (bytes_saved(run, 1, more) - base) / (more - few)
    saved = bytes_saved(run, 2, few) - base + by_target * (s.ttt_chunk_size - few)
    return found | dict(saved_for_backward=int(saved))


def bytes_saved(run: t.Run, documents: int, targets: int) -> int:
    """Bytes that autograd saves in a training step of so many documents and targets in bf16, after a context."""
    small = run.using(ttt_chunk_size=targets, ttt_eval_seq_len=2 * targets)
    small.device = torch.device("cpu")
    small.cuda = small.compile = small.graphs = False
    small.dtype = torch.bfloat16
    model = t.scoring_model(small)
    for p in model.parameters():
        p.zero_()  # what is computed does not matter
    batch, last = batch_at_full_context(model, documents, small)
    kept = [*model.parameters(), batch.kv, batch.adapters.flat]
    known = {tensor.untyped_storage().data_ptr() for tensor in kept}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step_of(batch, last, documents, train=True)()
    return sum(saved.values())


def documents_that_fit(memory: float, of_document: int, s: t.Settings) -> int:
    """Documents side by side in `memory` bytes. An eighth stays free, for CUDA graphs; a GiB is taken by context and
    kernels (both assumed); weights are counted."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in t.GPT(s).parameters()) * 4
    return int((memory * 7 / 8 - 2**30 - weights) // of_document)
