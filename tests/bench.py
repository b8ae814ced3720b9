"""Measures what the specification sets figures for: training, test-time training and packing.

    python tests/bench.py train|ttt|pack|curve [--device cpu|cuda] [--shard FILE] [--repeats N] [--profile]

The model and every other setting come from the environment, as for train_gpt.py; PRESET defaults to `record` on CUDA and
`tiny` on a CPU, the latter with the record's window of 2,048 tokens. Tokens are synthetic (random ids, log-normal document lengths like FineWeb's) unless a shard is given.
Medians of several repetitions after a warm-up; the hardware's own ceilings are measured first. `--profile` adds torch.profiler's
table of where a step's time goes. `curve` trains twice from the same weights on the same batches (--shard is needed): as
train_gpt.py does, and with the optimiser written out one parameter at a time and nothing compiled; and a third time from other
weights, to tell what difference the seed alone makes.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
FULL_SPLIT_TOKENS, GPUS, BUDGET = 62_021_845, 8, 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=("train", "ttt", "pack", "curve"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    parser.add_argument("--shard", type=Path, help="take real documents from this shard")
    parser.add_argument("--documents", type=int, nargs="*", default=[], help="sizes of ttt batches to compare; none: as train_gpt.py chooses")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per repetition of ttt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="steps of curve")
    parser.add_argument("--profile", action="store_true", help="also print torch.profiler's table of a step")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    import train_gpt as t

    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        sys.exit("error: no CUDA device — leave --device out or choose cpu")
    s = t.Settings.from_env({"PRESET": "record" if cuda else "tiny", "TTT_EVAL_SEQ_LEN": "2048"} | dict(os.environ))
    run = t.Runtime(s)
    torch.manual_seed(s.seed)
    print(" ".join(f"{k}:{v}" for k, v in t.environment(run).items()))
    {"train": bench_train, "ttt": bench_ttt, "pack": bench_pack, "curve": bench_curve}[args.work](t, torch, s, run, args)


def seconds_of(run, work, repeats: int) -> float:
    """Median wall seconds of `work()`, the device idle before and after, one warm-up not counted (0 repeats: the warm-up itself)."""
    times = []
    for _ in range(repeats + 1):
        run.synchronize()
        began = time.perf_counter()
        work()
        run.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def show_profile(torch, run, work) -> None:
    """The operators that take most time, by their own time on the device."""
    from torch.profiler import ProfilerActivity, profile

    cuda = run.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as table:
        work()
        run.synchronize()
    rows = {(row.key, row.count): row.self_device_time_total if cuda else row.self_cpu_time_total for row in table.key_averages()}
    for (name, count), own in sorted(rows.items(), key=lambda row: -row[1])[:14]:
        print(f"  {100 * own / sum(rows.values()):5.1f}%  {own / 1000:9.2f} ms  {count:6d} calls  {name[:70]}")


def ceilings(torch, run) -> float:
    """Print the device's dense matrix and copy rates; return FLOP/s of the dtype that the model computes in."""
    n = 8192 if run.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    flops = 2 * n**3 / seconds_of(run, lambda: a @ b, 10)
    source = torch.empty((1 << 28) if run.device.type == "cuda" else (1 << 24), device=run.device)
    target = torch.empty_like(source)
    copy = 8 * source.numel() / seconds_of(run, lambda: target.copy_(source), 10)
    print(f"ceiling dense {str(run.dtype).split('.')[1]}: {flops / 1e12:.2f} TFLOP/s  copy: {copy / 1e9:.1f} GB/s")
    return flops


def flop_per_token(model, s, context: float) -> float:
    """Multiply-adds of a forward pass, doubled: matrices, head, and attention over `context` keys on average."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(("emb.weight", "embed.weight")))
    matrices += s.vocab_size * s.model_dim if s.tie_embeddings else 0
    return 2 * (matrices + 2 * s.num_layers * s.model_dim * context)


def report(label: str, tokens: float, seconds: float, flop: float, ceiling: float, torch, run) -> float:
    peak = f" peak_memory:{torch.cuda.max_memory_allocated() / 1e9:.2f}GB" if run.device.type == "cuda" else ""
    print(f"{label}: {tokens / seconds:,.0f} tokens/s  {seconds * 1000:.1f} ms  {flop / seconds / 1e12:.3f} model TFLOP/s "
          f"({100 * flop / seconds / ceiling:.1f}% of the ceiling){peak}")
    return tokens / seconds


def bench_train(t, torch, s, run, args) -> None:
    """One rank's micro-batches of the largest size: forward, backward, and the whole optimiser step."""
    ceiling = ceilings(torch, run)
    model = t.GPT(s, run.dtype).to(run.device)
    optimizer = t.Optimizer(model, s, run)
    rows = max(1, min(s.micro_batch_tokens, s.train_batch_tokens) // s.train_seq_len)
    if args.shard:
        flat = torch.from_numpy(t.open_shard(args.shard)[: rows * s.train_seq_len + 1].astype("int64"))
        batch = (flat[:-1].view(rows, -1), flat[1:].view(rows, -1))
    else:
        batch = tuple(torch.randint(0, s.vocab_size, (rows, s.train_seq_len)) for _ in range(2))
    batch = [tuple(x.to(run.device) for x in batch)]
    forward = run.compiled(model, dynamic=False)
    began = time.perf_counter()
    t.forward_backward(forward, batch, 1.0)
    optimizer.step(0, 1.0)
    run.synchronize()
    print(f"first step (compilation included): {time.perf_counter() - began:.1f} s")
    tokens, flop = rows * s.train_seq_len, 3 * rows * s.train_seq_len * flop_per_token(model, s, s.train_seq_len / 2)
    report("forward+backward", tokens, seconds_of(run, lambda: t.forward_backward(forward, batch, 1.0), args.repeats), flop, ceiling, torch, run)
    optimizer.grads.zero_()
    print(f"optimiser step: {1000 * seconds_of(run, lambda: optimizer.step(1, 1e-6), args.repeats):.2f} ms")

    def step():
        t.forward_backward(forward, batch, 1.0)
        optimizer.step(1, 1e-6)
    report("training step", tokens, seconds_of(run, step, args.repeats), flop, ceiling, torch, run)
    if args.profile:
        show_profile(torch, run, step)


def bench_curve(t, torch, s, run, args) -> None:
    """Losses of --steps optimiser steps: train_gpt.py's path, the plain one, and train_gpt.py's from another seed."""
    import numpy as np
    from plain import Loop

    if not args.shard:
        sys.exit("error: curve needs real text — give --shard")
    s = replace(s, iterations=args.steps, warmdown_iters=args.steps // 2)
    loader, curves = t.BatchLoader([t.open_shard(args.shard)], s, run), []
    for seed, plain in ((s.seed, False), (s.seed, True), (s.seed + 1, False)):
        torch.manual_seed(seed)
        model = t.GPT(s, run.dtype).to(run.device)
        optimizer = Loop(model, s) if plain else t.Optimizer(model, s, run)
        forward = model if plain else run.compiled(model, dynamic=False)
        if plain:
            for name, p in model.named_parameters():
                p.data = optimizer.weights[name].data  # the loop updates them in place
        losses = []
        for step in range(args.steps):
            batch = loader.batch(step)
            losses.append(t.forward_backward(forward, batch, 1 / len(batch)))
            multiplier = t.lr_multiplier(step, 0.0, s)
            if plain:
                optimizer.step({name: p.grad for name, p in model.named_parameters()}, step, multiplier)
                model.zero_grad()
            else:
                optimizer.step(step, multiplier)
        curves.append(torch.stack(losses).cpu().numpy())
    fast, plain, other = curves
    print("step: ours, plain, another seed: training loss in nats, mean of the last 20 steps")
    for step in range(20, args.steps + 1, 20):
        print(f"{step:5d}  " + "  ".join(f"{curve[step - 20 : step].mean():.5f}" for curve in curves))
    print(f"mean |ours - plain| {np.abs(fast - plain).mean():.5f}, of the last 20 {np.abs(fast - plain)[-20:].mean():.5f}; "
          f"mean |ours - another seed| {np.abs(fast - other).mean():.5f}, of the last 20 {np.abs(fast - other)[-20:].mean():.5f}")


def bench_ttt(t, torch, s, run, args) -> None:
    """Replay on documents of real or FineWeb-like lengths, cached and recompute; the full split's seconds from them."""
    import numpy as np

    ceiling, rng = ceilings(torch, run), np.random.default_rng(0)
    model = t.GPT(s, run.dtype).to(run.device).requires_grad_(False)
    if args.shard:
        tokens = np.array(t.open_shard(args.shard))
        _, lengths = t.find_documents(tokens)
    else:
        lengths = np.maximum(rng.lognormal(np.log(640), 1.058, 625), 2).astype(np.int64)
        tokens = rng.integers(t.BOS + 1, s.vocab_size, lengths.sum() + 1)
        tokens[np.concatenate([[0], np.cumsum(lengths)])] = t.BOS
    stream = t.Stream(tokens, np.ones(len(tokens) - 1, np.int16), run.device)
    settings = replace(s, ttt_protocol="replay", ttt_n_epochs=args.epochs)
    one = t.plan_batches(stream.targets, settings, run)[0]
    if run.compile:
        print(f"compile_seconds:{t.warm_up_ttt(model, settings, run, len(one[0])):.1f}")
    adam = run.compiled(t.adam_, dynamic=True)

    def adapt(documents, settings=settings):
        batch = t.DocumentBatch(model, stream, documents, settings, run, adam)
        batch.adapt(t.Adapters(np.stack([t.draw_lora_a(settings, int(d)) for d in documents]), settings, run.device))

    def measure(label, documents, settings=settings):
        scored, lengths = int(stream.targets[documents].sum()) * args.epochs, stream.targets[documents]
        context = float((lengths**2).sum() / lengths.sum() / 2)  # keys that a query sees, on average
        flop = 2 * scored * flop_per_token(model, s, min(context, s.ttt_eval_seq_len))  # no weight gradients in the backward pass
        label = f"{label}, {len(documents)} documents of {lengths.min()}-{lengths.max()} tokens"
        return report(label, scored, seconds_of(run, lambda: adapt(documents, settings), args.repeats), flop, ceiling, torch, run)

    typical = min((b for b in one if stream.targets[b].min() >= 1000), key=lambda b: stream.targets[b].max(), default=one[0])
    rates = [measure(f"ttt {context}", typical, replace(settings, ttt_context=context)) for context in ("cached", "recompute")]
    print(f"cached / recompute on documents of >= 1,000 tokens: {rates[0] / rates[1]:.2f}")
    if args.profile:
        show_profile(torch, run, lambda: adapt(typical))
    longest_first = np.argsort(-stream.targets, kind="stable")
    for size in args.documents:
        first = int(np.searchsorted(-stream.targets[longest_first], -stream.targets[typical].max()))
        measure("ttt cached", longest_first[first : first + size])
    project(t, s, run, stream, one, adapt, args)


def project(t, s, run, stream, batches, adapt, args) -> None:
    """The full split's seconds on GPUS such devices, from one pass over every document of the sample, batch by batch."""
    import numpy as np

    targets, epochs = stream.targets, s.ttt_n_epochs
    seconds = np.array([seconds_of(run, lambda: adapt(b), 1 if run.device.type == "cuda" else 0) for b in batches]) / args.epochs
    rate = int(targets.sum()) / seconds.sum()
    print(f"ttt cached, {len(targets)} documents of all lengths: {rate:,.0f} scored token-epochs/s")
    predicted = np.array([t.batch_cost(targets[b], s, t.STEP_FLOOR[run.device.type]) for b in batches])
    off = seconds / predicted * predicted.sum() / seconds.sum()
    print(f"measured / predicted cost of a batch: {np.quantile(off, 0.05):.2f} to {np.quantile(off, 0.95):.2f} (5% to 95%)")
    print(f"full split, {epochs} epochs, {GPUS} such devices: {epochs * FULL_SPLIT_TOKENS / rate / GPUS:,.0f} s by throughput "
          f"(budget {BUDGET:.0f} s, everything included)")
    longest = int(np.argmax([targets[b].max() for b in batches]))
    print(f"critical path: {epochs * seconds[longest]:,.0f} s, the batch of the longest document, {int(targets.max()):,} tokens = "
          f"{-(-int(targets.max()) // s.ttt_chunk_size)} chunks x {epochs} steps in sequence")


def bench_pack(t, torch, s, run, args) -> None:
    """Seconds and bytes of the export of a model with Gaussian weights, beside torch.save and zstd-22 of the same tensors."""
    import io

    import zstandard

    state = {}
    for name, w in t.GPT(s).state_dict().items():
        state[name] = torch.randn_like(w) * w.shape[-1] ** -0.5 if w.ndim == 2 else w
    config, patterns = t.model_config(s), s.fp16_keep_name_patterns.split(",")
    seconds = seconds_of(run, lambda: t.pack(state, config, s.prune_fraction, patterns), args.repeats)
    blob, account = t.pack(state, config, s.prune_fraction, patterns)
    quantised = {n: t.quantize(t.prune(w, s.prune_fraction), t.kind_of(n, w, patterns)) for n, w in state.items()}
    saved = io.BytesIO()
    torch.save(quantised, saved)
    reference = len(zstandard.ZstdCompressor(level=22).compress(saved.getvalue()))
    weights = sum(w.numel() for w in state.values())
    print(f"pack: {weights:,} weights, {len(blob):,} bytes, {seconds:.2f} s; unpack: {seconds_of(run, lambda: t.unpack(blob), args.repeats):.2f} s")
    for kind, row in account.items():
        print(f"  {kind}: {row}")
    print(f"torch.save + zstd-22 of the same tensors: {reference:,} bytes; ratio {len(blob) / reference:.4f}")


if __name__ == "__main__":
    main()
