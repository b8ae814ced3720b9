"""Measures what the specification sets figures for: training, test-time training and packing.

    python tests/bench.py train|ttt|predict|pack|curve|export [--device cpu|cuda] [--shard FILE] [--profile]

The model and every other setting come from the environment, as for train_gpt.py; PRESET defaults to `record` on CUDA
and to `tiny` on a CPU, the latter with the record's window of 2,048 tokens. Tokens are synthetic (random ids,
log-normal document lengths like FineWeb's) unless a shard is given. Medians of several repetitions after a warm-up; the
hardware's own ceilings are measured first. `--profile` adds torch.profiler's table of where a step's time goes.

`curve` trains three times on the same batches of --shard: as train_gpt.py does; from the same weights with the
optimiser written out one parameter at a time and nothing compiled; and from other weights, to tell what a seed changes.

`ttt` times single steps and simulates the evaluation of the full split on eight such devices: its documents are drawn
from the sample's lengths, with the sample's own tail or a Pareto one, and each rank takes the costliest batch that is
left. What comes out is a prediction. `predict` does the same without a GPU, by an H100's seconds as `Gpu` assumes them
and the host's as --host-ms gives them.

`export --run FOLDER` quantises a finished run's weights in as many ways as there are --try, each settings like
"QUANT_SIGMAS=4.0,5.6 QUANTIZER=nearest" (STRETCH=1.2 stretches the steps), and prints bytes and the loss in bits per
byte against the float weights on --rows rows of validation text, with a 95% interval by bootstrap over rows.
"""

import argparse
import heapq
import io
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zstandard

from plain import Loop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

FULL_SPLIT_DOCUMENTS = 50_000
FULL_SPLIT_TOKENS = 62_021_845
FIELDS = t.Settings.__dataclass_fields__
GPUS = 8
BUDGET = 600.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=("train", "ttt", "predict", "pack", "curve", "export"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    parser.add_argument("--shard", type=Path, help="take real documents from this shard")
    parser.add_argument("--documents", type=int, nargs="*", default=[], help="sizes of ttt batches to compare")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per repetition of ttt")
    parser.add_argument(
        "--host-ms", type=float, nargs="*", default=[0.02, 5.0, 10.0], help="predict: a step's on the host"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="steps of curve")
    parser.add_argument("--profile", action="store_true", help="also print torch.profiler's table of a step")
    parser.add_argument("--run", type=Path, help="export: a finished run's folder")
    parser.add_argument("--rows", type=int, default=64, help="export: validation rows to score")
    parser.add_argument(
        "--picture", type=Path, help="export: draw loss against bytes into this file (needs matplotlib)"
    )
    parser.add_argument("--try", dest="tries", action="append", default=[], help="export: settings, space separated")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = dict(PRESET="record") if device == "cuda" else dict(PRESET="tiny", TTT_EVAL_SEQ_LEN="2048")
    try:
        run = t.Run(t.Settings.from_env(preset | os.environ | dict(DEVICE=device)))
        print(" ".join(f"{k}:{v}" for k, v in t.environment(run).items()))
        torch.manual_seed(run.s.seed)
        work = dict(train=bench_train, ttt=bench_ttt, predict=bench_predict, pack=bench_pack, curve=bench_curve)
        (work | dict(export=bench_export))[args.work](run, args)
    except t.UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        sys.exit(f"error: {t.system_says(e)}")


# ---- Measuring


def seconds_of(run: t.Run, work, repeats: int) -> float:
    """Median wall seconds of `work()`, the device idle before and after, one warm-up not counted (0: itself)."""
    times = []
    for _ in range(repeats + 1):
        run.wait()
        began = time.perf_counter()
        work()
        run.wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def show_profile(run: t.Run, work) -> None:
    """The operators that take most time, by their own time on the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if run.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as table:
        work()
        run.wait()
    own = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    rows = sorted(table.key_averages(), key=lambda row: -getattr(row, own))
    total = sum(getattr(row, own) for row in rows)
    for row in rows[:14]:
        microseconds = getattr(row, own)
        share = 100 * microseconds / total
        print(f"  {share:5.1f}%  {microseconds / 1000:9.2f} ms  {row.count:6d} calls  {row.key[:70]}")


def ceilings(run: t.Run) -> float:
    """Print the device's dense matrix and copy rates; return FLOP/s of the dtype that the model computes in."""
    n = 8192 if run.cuda else 1024
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    flops = 2 * n**3 / seconds_of(run, lambda: a @ b, 10)
    source = torch.empty(1 << 28 if run.cuda else 1 << 24, device=run.device)
    target = torch.empty_like(source)
    copy = 8 * source.numel() / seconds_of(run, lambda: target.copy_(source), 10)
    print(f"ceiling dense {str(run.dtype).split('.')[1]}: {flops / 1e12:.2f} TFLOP/s  copy: {copy / 1e9:.1f} GB/s")
    return flops


def flop_per_token(model: t.GPT, s: t.Settings, context: float) -> float:
    """Multiply-adds of a forward pass, doubled: matrices, head, and attention over `context` keys on average."""
    tables = ("emb.weight", "embed.weight")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(tables))
    head = s.vocab_size * s.model_dim if s.tie_embeddings else 0
    return 2 * (matrices + head + 2 * s.num_layers * s.model_dim * context)


def report(run: t.Run, label: str, tokens: float, seconds: float, flop: float, ceiling: float) -> float:
    """Print one measurement; return tokens/s."""
    share = f"{flop / seconds / 1e12:.3f} model TFLOP/s ({100 * flop / seconds / ceiling:.1f}% of the ceiling)"
    peak = f" peak_memory:{torch.cuda.max_memory_allocated() / 1e9:.2f}GB" if run.cuda else ""
    print(f"{label}: {tokens / seconds:,.0f} tokens/s  {seconds * 1000:.1f} ms  {share}{peak}")
    return tokens / seconds


# ---- Training


def bench_train(run: t.Run, args) -> None:
    """One rank's micro-batch of the largest size: forward, backward, and the whole optimiser step."""
    s = run.s
    ceiling = ceilings(run)
    model = t.GPT(s, run.dtype, run.attention).to(run.device)
    optimizer = t.Optimizer(model, run)
    forward = run.compiled(model, dynamic=False)
    rows = max(1, min(s.micro_batch_tokens, s.train_batch_tokens) // s.train_seq_len)
    if args.shard:
        tokens = t.open_shard(args.shard)
    else:
        tokens = np.random.default_rng(0).integers(0, s.vocab_size, rows * s.train_seq_len + 1)
    batch = t.BatchLoader([tokens], run.using(train_batch_tokens=rows * s.train_seq_len)).batch(0)

    def gradients():
        t.forward_backward(forward, batch, 1 / len(batch))

    def step():
        gradients()
        optimizer.step(1, 1e-6)

    first = seconds_of(run, step, 0)
    print(f"first step (compilation included): {first:.1f} s")
    flop = 3 * rows * s.train_seq_len * flop_per_token(model, s, s.train_seq_len / 2)
    seconds = seconds_of(run, gradients, args.repeats)
    report(run, "forward+backward", rows * s.train_seq_len, seconds, flop, ceiling)
    optimizer.grads.zero_()
    print(f"optimiser step: {1000 * seconds_of(run, lambda: optimizer.step(1, 1e-6), args.repeats):.2f} ms")
    report(run, "training step", rows * s.train_seq_len, seconds_of(run, step, args.repeats), flop, ceiling)
    if args.profile:
        show_profile(run, step)


def bench_curve(run: t.Run, args) -> None:
    """Losses of --steps optimiser steps: train_gpt.py's path, the plain one, and train_gpt.py's from another seed."""
    if not args.shard:
        sys.exit("error: curve needs real text — give --shard")
    run = run.using(iterations=args.steps, warmdown_iters=args.steps // 2)
    loader = t.BatchLoader([t.open_shard(args.shard)], run)
    ours = curve(run, loader, run.s.seed)
    plain = curve(run, loader, run.s.seed, plain=True)
    other = curve(run, loader, run.s.seed + 1)
    print("step: ours, plain, another seed: training loss in nats, mean of the last 20 steps")
    for step in range(20, args.steps + 1, 20):
        means = (f"{losses[step - 20 : step].mean():.5f}" for losses in (ours, plain, other))
        print(f"{step:5d}  " + "  ".join(means))
    for label, losses in (("plain", plain), ("another seed", other)):
        difference = np.abs(ours - losses)
        print(f"mean |ours - {label}| {difference.mean():.5f}, of the last 20 {difference[-20:].mean():.5f}")


def curve(run: t.Run, loader: t.BatchLoader, seed: int, plain: bool = False) -> np.ndarray:
    """Training loss of each step, (ITERATIONS,)."""
    torch.manual_seed(seed)
    model = t.GPT(run.s, run.dtype, run.attention).to(run.device)
    forward = model if plain else run.compiled(model, dynamic=False)
    optimizer = Loop(model, run.s) if plain else t.Optimizer(model, run)
    losses = []
    for step in range(run.s.iterations):
        batch = loader.batch(step)
        losses.append(t.forward_backward(forward, batch, 1 / len(batch)))
        multiplier = t.lr_multiplier(step, 0.0, run.s)
        if plain:
            optimizer.step({name: p.grad for name, p in model.named_parameters()}, step, multiplier)
            model.load_state_dict(optimizer.weights)
            model.zero_grad()
        else:
            optimizer.step(step, multiplier)
    return torch.stack(losses).cpu().numpy()


# ---- Test-time training


def sample_stream(run: t.Run, shard: Path | None, device: torch.device) -> t.Stream:
    """Real documents, or 625 of FineWeb-like lengths."""
    if shard:
        tokens = np.array(t.open_shard(shard))
        return t.Stream(tokens, np.ones(len(tokens) - 1, np.int16), device)
    lengths = np.random.default_rng(0).lognormal(np.log(640), 1.058, 625)
    return t.synthetic_stream(np.maximum(lengths, 2).astype(np.int64), run)


def bench_ttt(run: t.Run, args) -> None:
    """Replay on documents of real or FineWeb-like lengths, cached and recompute; the full split's seconds from them."""
    epochs = run.s.ttt_n_epochs
    run = run.using(ttt_protocol="replay", ttt_n_epochs=args.epochs)
    ceiling = ceilings(run)
    model = t.scoring_model(run)
    t.load_weights(model, t.GPT(run.s).state_dict(), "a fresh model", run)
    stream = sample_stream(run, args.shard, run.device)
    batches = t.batch_documents(stream.lengths, run)

    def adapt(documents, run=run):
        batch = t.DocumentBatch(model, stream, len(documents), run)
        batch.load(documents)
        batch.adapt(run.s.ttt_n_epochs)

    def measure(documents, run=run):
        lengths = stream.lengths[documents]
        scored = int(lengths.sum()) * args.epochs
        context = min(float((lengths**2).sum() / lengths.sum() / 2), run.s.ttt_eval_seq_len)  # keys per query
        flop = 2 * scored * flop_per_token(model, run.s, context)  # the backward pass has no weight gradients
        sizes = f"{len(documents)} documents of {lengths.min()}-{lengths.max()} tokens"
        seconds = seconds_of(run, lambda: adapt(documents, run), args.repeats)
        return report(run, f"ttt {run.s.ttt_context}, {sizes}", scored, seconds, flop, ceiling)

    long = [batch for batch in batches if stream.lengths[batch].min() >= 1000]
    typical = long[len(long) // 2] if long else batches[0]
    print(f"first pass (compilation included): {seconds_of(run, lambda: adapt(typical), 0):.1f} s")
    cached, recompute = (measure(typical, run.using(ttt_context=context)) for context in ("cached", "recompute"))
    print(f"cached / recompute on documents of >= 1,000 tokens: {cached / recompute:.2f}")
    if args.profile:
        show_profile(run, lambda: adapt(typical))
    longest_first = longest_order(stream.lengths)
    begin = int(np.searchsorted(-stream.lengths[longest_first], -stream.lengths[typical].max()))
    for size in args.documents:
        measure(longest_first[begin : begin + size])
    cost = time_steps(model, run, args.repeats)
    print("seconds of a step: " + " ".join(f"{name}:{value:.5f}" for name, value in vars(cost).items()))
    whole_sample = sum(epoch(cost, stream.lengths[batch], run.s) for batch in batches)
    repeats = 1 if run.cuda else 0
    measured = sum(seconds_of(run, lambda b=batch: adapt(b), repeats) for batch in batches) / args.epochs
    rate = int(stream.lengths.sum()) / measured
    print(f"ttt {run.s.ttt_context}, {len(stream.lengths)} documents: {rate:,.0f} scored token-epochs/s, ", end="")
    print(f"{measured:.1f} s an epoch where the steps' seconds predict {whole_sample:.1f}")
    for tail in ("sample", "pareto"):
        simulate(cost, draw_documents(stream.lengths, tail), tail, run.using(ttt_n_epochs=epochs))


def longest_order(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(-lengths, kind="stable")


@dataclass
class StepSeconds:
    """Seconds of one training step and of one plain step, linear in the documents and in their share of the context."""

    one: float  # document without context
    one_full: float  # with a full context
    batch: float  # BATCH documents without context
    batch_full: float
    plain_share: float  # of such a step's seconds, scored without adaptation
    documents: int  # BATCH

    def steps(self, alive: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Seconds of steps with so many documents alive and such a share of the context."""
        more = (alive - 1) / max(self.documents - 1, 1)
        return (1 - share) * (self.one + more * (self.batch - self.one)) + share * (
            self.one_full + more * (self.batch_full - self.one_full)
        )


def epoch(cost, lengths: np.ndarray, s: t.Settings) -> float:
    """Seconds of an epoch of one batch, whose documents come longest first."""
    chunks = np.arange(-(-int(lengths[0]) // s.ttt_chunk_size))
    alive = (-(-lengths[:, None] // s.ttt_chunk_size) > chunks).sum(0)
    window = s.ttt_eval_seq_len - s.ttt_chunk_size
    return float(cost.steps(alive, np.minimum(chunks * s.ttt_chunk_size, window) / max(window, 1)).sum())


@dataclass
class Gpu:
    """Seconds of one training step on one H100. ASSUMED, +-50%: no GPU was measured.

    20.2 ms for 64 documents at full context and 9.6 ms without were the estimate for a version that concatenated cache
    and chunk and differentiated by every key. Of the former, 0.8 ms went with the concatenation (268 MB a layer, read
    and written) and 0.9 ms with gradients expanded to all query heads (4.7 MB per document and layer, less what the
    second kernel's output adds), both at 3.35 TB/s."""

    host: float = 0.0  # seconds of a step; the host is one step ahead at most
    slower: float = 1.0  # factor on all of the GPU's
    full: float = 18.5e-3
    first: float = 9.6e-3
    fixed: float = 1.1e-3  # of both, what does not shrink with the documents
    least: float = 2.5e-3  # a step's kernels one after another, however small
    documents: int = 64
    plain_share: float = 1 / 3  # of a training step's time, for one without adaptation

    def steps(self, alive: np.ndarray, share: np.ndarray) -> np.ndarray:
        per_document = (self.first - self.fixed + (self.full - self.first) * share) / self.documents
        return np.maximum(self.slower * np.maximum(self.least, alive * per_document + self.fixed), self.host)


def bench_predict(run: t.Run, args) -> None:
    """The evaluation of the full split on eight H100, by the seconds that Gpu assumes."""
    run = run.using()
    run.device = torch.device("cuda")  # whose batches are planned; nothing runs on it
    lengths = sample_stream(run.using(), args.shard, torch.device("cpu")).lengths
    for tail in ("sample", "pareto"):
        drawn = draw_documents(lengths, tail)
        for host in args.host_ms:
            for slower in (1.0, 1.5):
                print(f"host {host:g} ms, GPU x{slower:g}: ", end="")
                simulate(Gpu(host / 1e3, slower), drawn, tail, run)


def time_steps(model: t.GPT, run: t.Run, repeats: int) -> StepSeconds:
    """Time single steps on synthetic documents."""
    s, size = run.s, run.s.ttt_batch_size or t.TTT_BATCH[run.device.type]
    last = -(-s.ttt_eval_seq_len // s.ttt_chunk_size)  # the first chunk with a full context
    found = {}
    for name, documents in (("one", 1), ("batch", size)):
        stream = t.synthetic_stream([(last + 1) * s.ttt_chunk_size] * documents, run)
        batch = t.DocumentBatch(model, stream, documents, run)
        batch.load(np.arange(documents))
        batch.score()  # fills the cache
        for suffix, chunk in (("", 0), ("_full", last)):

            def step(batch=batch, chunk=chunk, documents=documents, train=True):
                batch._run_step(chunk, documents, True, score=True, train=train)

            found[name + suffix] = seconds_of(run, step, repeats)
    found["plain_share"] = seconds_of(run, lambda: step(train=False), repeats) / found["batch_full"]
    return StepSeconds(**found, documents=size)


def draw_documents(sample: np.ndarray, tail: str) -> np.ndarray:
    """Lengths of the full split's documents, drawn from the sample's and scaled to its tokens.

    Hundreds of documents do not show the longest of tens of thousands: "pareto" continues their tail with index 1.9."""
    drawn = np.random.default_rng(0).choice(sample, FULL_SPLIT_DOCUMENTS).astype(float)
    drawn = -np.sort(-np.maximum(drawn * FULL_SPLIT_TOKENS / drawn.sum(), 2).astype(np.int64))
    if tail == "pareto":
        drawn[:25] = drawn[25] * (50 / np.arange(1, 26)) ** (1 / 1.9)
    return drawn


def simulate(cost: StepSeconds, lengths: np.ndarray, tail: str, run: t.Run) -> None:
    """Predict the evaluation of documents on GPUS ranks that take batches from one queue, by the seconds of steps."""
    s, free, longest = run.s, [0.0] * GPUS, 0.0
    epochs = 1 + s.ttt_n_epochs * (s.ttt_n_epochs > 1)  # replay runs the first again after the score
    batches = t.batch_documents(lengths, run)
    for batch in batches:
        seconds = (epochs + cost.plain_share) * epoch(cost, lengths[batch], s)
        longest = max(longest, seconds)
        heapq.heappush(free, heapq.heappop(free) + seconds)
    print(
        f"predicted, {len(lengths):,} documents, {tail} tail, longest {lengths.max():,}, {GPUS} such devices: ", end=""
    )
    print(f"slowest rank {max(free):,.0f} s, {max(free) / np.mean(free):.3f} of the mean; ", end="")
    print(f"longest batch {longest:,.0f} s; budget {BUDGET:.0f} s")


# ---- Packing


def bench_pack(run: t.Run, args) -> None:
    """Seconds and bytes of the export of Gaussian weights, beside torch.save and zstd-22 of the same tensors."""
    state = {}
    for name, w in t.GPT(run.s).state_dict().items():
        state[name] = torch.randn_like(w) * w.shape[-1] ** -0.5 if w.ndim == 2 else w
    stored = t.quantize_model(state, run.s)
    blob, account = t.pack(stored, run.s)
    seconds = seconds_of(run, lambda: t.pack(t.quantize_model(state, run.s), run.s), args.repeats)
    unpacking = seconds_of(run, lambda: t.unpack(blob), args.repeats)
    saved = io.BytesIO()
    torch.save({name: tuple(tensor) for name, tensor in stored.items()}, saved)
    reference = len(zstandard.ZstdCompressor(level=22).compress(saved.getvalue()))
    weights = sum(w.numel() for w in state.values())
    print(f"pack: {weights:,} weights, {len(blob):,} bytes, {seconds:.2f} s; unpack: {unpacking:.2f} s")
    for kind, row in account.items():
        print(f"  {kind}: {row}")
    print(f"torch.save + zstd-22 of the same tensors: {reference:,} bytes; ratio {len(blob) / reference:.4f}")


def bench_export(run: t.Run, args) -> None:
    """Bytes of a run's weights quantised in several ways, and what each costs in bits per byte."""
    if not args.run:
        sys.exit("error: export needs a finished run — give --run FOLDER")
    kept = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    names = t.TrainSettings.__dataclass_fields__
    run = run.using(**{name: value for name, value in kept["identity"].items() if name in names})
    s, state = run.s, torch.load(args.run / "final_model.pt", map_location="cpu", weights_only=True)
    model, stream = t.GPT(s, run.dtype, run.attention).to(run.device), t.load_validation(run)
    loader = t.BatchLoader(t.open_shards("train", run), run)
    windows = t.overlapping(stream, s.train_seq_len, s.train_seq_len)[: args.rows]

    @torch.no_grad()
    def score(weights) -> np.ndarray:
        t.load_weights(model, weights, "the run", run)
        rows = (torch.from_numpy(row).to(run.device) for row in np.split(windows, len(windows)))
        return (
            torch.cat([t.score_windows(model, stream, row.unbind(1), s.train_seq_len)[1] for row in rows]).cpu().numpy()
        )

    plain = score(state)
    print(
        f"float: {plain[:, 0].sum() / np.log(2) / plain[:, 2].sum():.5f} bpb of {plain[:, 2].sum():.0f} bytes of text"
    )
    hessians, points = {}, []
    for line in args.tries or ["QUANTIZER=nearest", "QUANTIZER=gptq"]:
        env = dict(pair.split("=") for pair in line.split())
        stretch = float(env.pop("STRETCH", 1))
        changed = run.using(
            **{name.lower(): t.parse_setting(FIELDS[name.lower()], value) for name, value in env.items()}
        ).s
        tokens = changed.calibration_tokens
        if changed.quantizer == "gptq" and tokens not in hessians:
            t.load_weights(model, state, "the run", run)
            hessians = {tokens: t.calibrate(model, loader, kept["step"] * s.train_batch_tokens, tokens, run)}
        began = time.perf_counter()
        tensors = t.quantize_model(
            state, changed, hessians.get(tokens) if changed.quantizer == "gptq" else None, stretch
        )
        blob, kinds = t.pack(tensors, changed)
        seconds = time.perf_counter() - began
        rows = score({name: tensor.restored() for name, tensor in tensors.items()})
        change, drawn = rows[:, 0] - plain[:, 0], np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
        bpb = change[drawn].sum(1) / np.log(2) / rows[:, 2][drawn].sum(1)
        low, high = np.quantile(bpb, (0.025, 0.975))
        codes = sum(kinds[kind]["bytes"] for kind in t.LIMITS if kind in kinds)
        bits = " ".join(
            f"{k}:{kinds[k]['bits_per_weight']:.3f}/{kinds[k]['entropy']:.3f}" for k in t.LIMITS if k in kinds
        )
        loss = change.sum() / np.log(2) / rows[:, 2].sum()
        print(f"{line}: codes {codes:,} file {len(blob):,} loss {loss:+.5f} ({low:+.5f} to {high:+.5f}) ", end="")
        print(f"bits/entropy {bits} {seconds:.1f} s", flush=True)
        points.append((changed.quantizer, changed.quant_sigmas, codes, loss, low, high))
    if args.picture:
        draw_export(points, args.picture)


def draw_export(points: list[tuple], path: Path) -> None:
    """Loss against bytes of codes, with intervals; steps by row maximum and by k * rms apart."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for quantizer, color in (("nearest", "tab:orange"), ("gptq", "tab:blue")):
        for by_rms, marker in ((False, "s"), (True, "o")):
            chosen = [point[2:] for point in points if point[0] == quantizer and (point[1] != "0") == by_rms]
            if chosen:
                size, loss, low, high = np.array(chosen).T
                label = f"{quantizer}, steps by {'k · rms(row)' if by_rms else 'max|row|'}"
                axes.errorbar(
                    size / 1e3, loss, (loss - low, high - loss), fmt=marker, color=color, capsize=2, label=label
                )
    axes.axhline(0, color="tab:gray", linewidth=0.6)
    axes.set(xlabel="codes in the artifact, kB", ylabel="loss against float, bits per byte")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
