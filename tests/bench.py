"""Measures what train_gpt.py can do on a machine, and predicts what others would.

    python tests/bench.py machine                 # type this first: everything, in minutes, kept in a JSON file
    python tests/bench.py COMMAND --help          # what a command measures

The model and every other setting come from the environment, as for train_gpt.py. PRESET defaults to `record` on CUDA
and to `tiny` on a CPU, the latter with the record's window of 2,048 tokens. Tokens are synthetic (random ids,
log-normal document lengths like FineWeb's) unless a shard is given. Figures are medians after a warm-up."""

from __future__ import annotations

import argparse
import inspect
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

import speed
from machine import PARTS, describe_protocol, measure_machine
from plain import Loop
from speed import seconds_of, t

FIELDS = t.Settings.__dataclass_fields__


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, as train_gpt.py's are."""

    def error(self, message: str):
        raise t.UserError(f"{' '.join(message.split())} — see {self.prog} --help")


def at_least(low: int):
    """A type for argparse: whole numbers from `low` on."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    number.__name__ = "whole number"
    return number


def parser_of_all() -> argparse.ArgumentParser:
    """One command for each function below, whose docstring is its help."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(work, *options: str):
        text = inspect.getdoc(work)
        raw = argparse.RawDescriptionHelpFormatter
        name = work.__name__.removeprefix("bench_")
        added = commands.add_parser(name, help=text.split("\n")[0], description=text, formatter_class=raw)
        added.set_defaults(work=work)
        for option in options:
            flag, how = OPTIONS[option]
            added.add_argument(flag, **how)

    command(bench_machine, "device", "shard", "json", "limit", "parts")
    command(bench_train, "device", "shard", "repeats", "profile")
    command(bench_ttt, "device", "shard", "repeats", "profile", "documents", "epochs")
    command(bench_predict, "shard", "devices", "host")
    command(bench_mixture, "targets")
    command(bench_pack, "repeats")
    command(bench_curve, "device", "text", "steps")
    command(bench_export, "device", "run", "rows", "picture", "try")
    return parser


OPTIONS = {
    "device": ("--device", dict(choices=("cpu", "cuda"), help="default: CUDA if there is one")),
    "shard": ("--shard", dict(type=Path, help="real documents, from this shard")),
    "text": ("--shard", dict(type=Path, required=True, help="the text to train on")),
    "json": ("--json", dict(type=Path, help="the file to write; default: machine_DEVICE_DATE.json in this folder")),
    "limit": (
        "--limit",
        dict(type=at_least(1), default=0, help="seconds after which no part begins; default 300, on a CPU 180"),
    ),
    "parts": ("--parts", dict(nargs="+", choices=PARTS, default=[], help="only these; default: all of them, in order")),
    "repeats": ("--repeats", dict(type=at_least(1), default=5, help="of a measurement; default 5")),
    "profile": ("--profile", dict(action="store_true", help="also print torch.profiler's table of a step")),
    "documents": ("--documents", dict(type=at_least(1), nargs="*", default=[], help="sizes of batches to compare")),
    "epochs": ("--epochs", dict(type=at_least(1), default=2, help="per repetition; default 2")),
    "devices": ("--devices", dict(type=at_least(1), default=8, help="default 8")),
    "host": (
        "--host-ms",
        dict(type=float, default=10.0, help="a step's on the host, launched kernel by kernel; default 10"),
    ),
    "targets": (
        "--targets",
        dict(type=at_least(2), default=speed.FULL_SPLIT_TARGETS, help="default: the full split's"),
    ),
    "steps": ("--steps", dict(type=at_least(20), default=200, help="default 200")),
    "run": ("--run", dict(type=Path, required=True, help="a finished run's folder")),
    "rows": ("--rows", dict(type=at_least(1), default=64, help="validation rows to score; default 64")),
    "picture": ("--picture", dict(type=Path, help="draw loss against bytes into this file (needs matplotlib)")),
    "try": ("--try", dict(dest="tries", action="append", default=[], help="settings, space separated; repeatable")),
}


def main() -> int:
    """The exit code: 2 and one line for a user's mistake."""
    try:
        args = parser_of_all().parse_args()
        for line in t.misspelt(os.environ):
            t.say(line)
        return args.work(args) or 0
    except t.UserError as e:
        t.say(f"error: {e}", "stderr")
    except OSError as e:
        t.say(f"error: {t.system_says(e)}", "stderr")
    except (RuntimeError, MemoryError) as e:
        lacks_memory = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)
        if not lacks_memory:
            raise
        what = " ".join(str(e).split())[:120]
        t.say(f"error: out of memory: {what} — set MICRO_BATCH_TOKENS, TTT_BATCH_SIZE or --documents lower", "stderr")
    except KeyboardInterrupt:
        return 130
    return 2


def run_of(args) -> t.Run:
    """A run on the device asked for, described."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = dict(PRESET="record") if device == "cuda" else dict(PRESET="tiny", TTT_EVAL_SEQ_LEN="2048")
    run = t.Run(t.Settings.from_env(preset | os.environ | dict(DEVICE=device)))
    t.say(t.pairs(t.environment(run)))
    torch.manual_seed(run.s.seed)
    return run


def bench_machine(args):
    """What this machine can do with train_gpt.py: type this first.

    Device and ceilings; training; test-time training by replay and by the recommended single_pass, cached and
    recompute, for a batch and for one document; memory; export; and from these the steps in ten minutes and the
    seconds of the full validation split on 1, 8 and 16 such devices. Then whether it computes what it should: CUDA
    graphs against eager steps, golden figures (GOLF_SHARED names their folder), cached against recompute, no score
    that knows later text, one rank against two.

    Each row is measured, counted or predicted. A part that fails costs a line; the exit code is then 1. All rows are
    kept in a JSON file without paths or names, to be sent on; Ctrl-C leaves what there is by then."""
    return measure_machine(run_of(args), args.shard, args.limit, args.json, args.parts)


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


def report(run: t.Run, label: str, tokens: float, seconds: float, flop: float, ceiling: float) -> float:
    """Print one measurement; return tokens/s."""
    share = f"{flop / seconds / 1e12:.3f} model TFLOP/s ({100 * flop / seconds / ceiling:.1f}% of the ceiling)"
    peak = f" peak_memory:{torch.cuda.max_memory_allocated() / 1e9:.2f}GB" if run.cuda else ""
    print(f"{label}: {tokens / seconds:,.0f} tokens/s  {seconds * 1000:.1f} ms  {share}{peak}")
    return tokens / seconds


def show_ceilings(run: t.Run) -> float:
    """Returns FLOP/s of a matrix product in the dtype that the model computes in."""
    flops, copy = speed.Ceilings.measure(run)
    dtype = str(run.dtype).split(".")[1]
    print(f"ceiling dense {dtype}: {flops / 1e12:.2f} TFLOP/s  copy: {copy / 1e9:.1f} GB/s")
    return flops


# ---- Training


def bench_train(args):
    """Tokens per second of training: one rank's micro-batch, the largest that settings allow and that fits.

    Forward and backward pass, the optimiser's step, and both; model FLOP/s and their share of a matrix product's,
    which is measured first; on CUDA the peak of allocated memory."""
    run = run_of(args)
    s = run.s
    ceiling = show_ceilings(run)
    model = t.GPT(s, run.dtype, run.attention).to(run.device)
    optimizer = t.Optimizer(model, run)
    forward = run.compiled(model, dynamic=False)
    rows = rows_that_fit(forward, args.shard, run)
    count = rows * s.train_seq_len
    batch = speed.micro_batch(args.shard, rows, run)

    def gradients():
        t.forward_backward(forward, batch, 1 / len(batch))

    def step():
        gradients()
        optimizer.step(1, 1e-6)

    print(f"first step (compilation included): {seconds_of(run, step, 1, warm=0):.1f} s")
    flop = 3 * count * speed.flop_per_token(s, s.train_seq_len / 2)
    report(run, "forward+backward", count, seconds_of(run, gradients, args.repeats), flop, ceiling)
    optimizer.grads.zero_()
    print(f"optimiser step: {1000 * seconds_of(run, lambda: optimizer.step(1, 1e-6), args.repeats):.2f} ms")
    report(run, "training step", count, seconds_of(run, step, args.repeats), flop, ceiling)
    if args.profile:
        show_profile(run, step)


def rows_that_fit(forward, shard: Path | None, run: t.Run) -> int:
    """Of a micro-batch: as many as settings say, or what of that fits."""

    def work(rows: int):
        t.forward_backward(forward, speed.micro_batch(shard, rows, run), 1.0)

    most = min(run.most("training_rows"), run.s.train_batch_tokens // run.s.train_seq_len)
    return speed.most_that_fit(most, work, run)


def bench_curve(args):
    """Losses of the same batches by three trainings: does a faster path learn the same?

    As train_gpt.py trains; from the same weights with the optimiser written out one parameter at a time and nothing
    compiled; and from other weights, to tell what a seed changes. Means of 20 steps, in nats."""
    run = run_of(args)
    run = run.using(iterations=args.steps, warmdown_iters=args.steps // 2)
    model = t.GPT(run.s, run.dtype, run.attention).to(run.device)
    optimizer = t.Optimizer(model, run)  # takes memory, too
    run.fits = dict(training_rows=rows_that_fit(model, args.shard, run))
    del model, optimizer
    loader = t.BatchLoader([speed.tokens_of(args.shard, run)], run)
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
    optimizer = Loop(model, run.s, run.dtype) if plain else t.Optimizer(model, run)
    losses = []
    for p in model.parameters() if plain else ():
        p.grad = torch.zeros_like(p)
    for step in range(run.s.iterations):
        batch = loader.batch(step)
        losses.append(t.forward_backward(forward, batch, 1 / len(batch)))
        multiplier = t.lr_multiplier(step, 0.0, run.s)
        if plain:
            optimizer.step({name: p.grad for name, p in model.named_parameters()}, step, multiplier)
            model.load_state_dict(optimizer.weights)
            model.zero_grad(set_to_none=False)
        else:
            optimizer.step(step, multiplier)
    return torch.stack(losses).cpu().numpy()


# ---- Test-time training


def bench_ttt(args):
    """Token-epochs per second of replay, cached and recompute, on documents of real or FineWeb-like lengths.

    First a batch of documents of at least 1,000 tokens in both contexts, then batches of the sizes in --documents,
    then single steps, then the whole sample; from the steps' seconds the full split's on eight such devices, whose
    documents are drawn from the sample's lengths, with the sample's own tail or a Pareto one: that is a prediction."""
    run = run_of(args)
    epochs = run.s.ttt_n_epochs
    run = run.using(ttt_protocol="replay", ttt_n_epochs=args.epochs)
    ceiling = show_ceilings(run)
    model = t.scoring_model(run)
    contexts = (run.using(ttt_context=context) for context in ("cached", "recompute"))  # one batch is for both
    run.fits = dict(documents=min(speed.largest_batch(model, one) for one in contexts))
    if run.cuda:
        run.graphs = t.rehearse_adaptation(model, run)
        print(f"CUDA graphs equal eager steps: {run.graphs}")
    speed.randomise(model)
    stream = speed.stream_of(args.shard, run)
    batches = t.batch_documents(stream.lengths, run)
    compare_batches(model, stream, batches, ceiling, run, args)
    size = run.most("documents")
    cost = speed.time_steps(model, size, run, args.repeats)
    for kind, corners in (("training", cost.train), ("plain", cost.forward)):
        figures = " ".join(f"{name}:{value:.5f}" for name, value in corners._asdict().items())
        print(f"seconds of a {kind} step, batch of {size}: {figures}")
    predicted = sum(
        times * cost.seconds(train, n, c).sum()
        for batch in batches
        for train, n, c, times in speed.steps_of_pass("score", stream.lengths[batch], run.s)
    )
    measured = sum(adaptation_seconds(model, stream, batch, run, 1) for batch in batches) / args.epochs
    rate = int(stream.lengths.sum()) / measured
    print(f"ttt {run.s.ttt_context}, {len(stream.lengths)} documents: {rate:,.0f} scored token-epochs/s, ", end="")
    print(f"{measured:.1f} s an epoch where the steps' seconds predict {predicted:.1f}")
    cost.s = run.s
    for tail in ("sample", "pareto"):
        show_forecast(cost, speed.draw_documents(stream.lengths, tail), tail, run.using(ttt_n_epochs=epochs), 8)


def adaptation_seconds(model, stream, documents: np.ndarray, run: t.Run, repeats: int) -> float:
    """Of all epochs of one batch."""
    batch = t.DocumentBatch(model, stream, len(documents), run)
    batch.load(documents)
    return seconds_of(run, lambda: batch.adapt(run.s.ttt_n_epochs), repeats, warm=2 if run.graphs else int(run.compile))


def compare_batches(model, stream, batches: list[np.ndarray], ceiling: float, run: t.Run, args):
    """Cached and recompute, and other sizes of a batch, on documents of at least 1,000 tokens."""

    def measure(documents, run):
        lengths = stream.lengths[documents]
        scored = int(lengths.sum()) * args.epochs
        context = min(float((lengths**2).sum() / lengths.sum() / 2), run.s.ttt_eval_seq_len)  # keys per query
        flop = 2 * scored * speed.flop_per_token(run.s, context)  # the backward pass has no weight gradients
        sizes = f"{len(documents)} documents of {lengths.min()}-{lengths.max()} tokens"
        seconds = adaptation_seconds(model, stream, documents, run, args.repeats)
        return report(run, f"ttt {run.s.ttt_context}, {sizes}", scored, seconds, flop, ceiling)

    long = [batch for batch in batches if stream.lengths[batch].min() >= 1000]
    typical = long[len(long) // 2] if long else batches[0]
    cached, recompute = (measure(typical, run.using(ttt_context=context)) for context in ("cached", "recompute"))
    print(f"cached / recompute on documents of >= 1,000 tokens: {cached / recompute:.2f}")
    if args.profile:
        show_profile(run, lambda: adaptation_seconds(model, stream, typical, run, 1))
    order = np.argsort(-stream.lengths, kind="stable")
    begin = int(np.searchsorted(-stream.lengths[order], -stream.lengths[typical].max()))
    for size in args.documents:
        measure(order[begin : begin + size], run)


def show_forecast(cost, lengths: np.ndarray, tail: str, run: t.Run, devices: int) -> speed.Forecast:
    found = speed.Plan.of(cost, lengths, run).forecast(devices)
    text = f"predicted, {describe_protocol(run.s)}, {len(lengths):,} documents, {tail} tail, longest {lengths.max():,}"
    text += f", {devices} such devices: slowest rank {found.all:,.0f} s, {found.balance:.3f} of the mean"
    text += f"; the score after {found.score:,.0f} s; longest batch {found.longest:,.1f} s"
    if cost.recording:
        text += f"; {found.shapes:,} graphs on a rank"
    print(f"{text}; budget {speed.BUDGET:.0f} s")
    return found


def bench_predict(args):
    """The evaluation of the full split on eight H100, predicted. Nothing is measured, and no GPU is needed.

    By the seconds of steps that speed.H100 assumes (no GPU was measured) and scales by counted work: replay of 50
    epochs and the recommended single_pass; or, if the environment sets a TTT_ variable, what it says instead. With
    the sample's tail of lengths and a Pareto one; with kernels as assumed and half as slow again; with steps recorded
    as CUDA graphs, and launched kernel by kernel. Then the memory of a document, counted, and the batch that fits.
    What the host does besides is not in it: drawing every document's adapters before each pass, which `machine`
    measures; mixing, which `mixture` measures; and merging."""
    own = {name for name in os.environ if name.startswith("TTT_") and name.lower() in FIELDS}
    base = t.Run(t.Settings.from_env(dict(PRESET="record") | os.environ | dict(DEVICE="cpu")))
    runs = [base] if own else [base, base.using(**speed.RECOMMENDED)]
    lengths = speed.lengths_of(args.shard)
    for run in runs:
        for tail in ("sample", "pareto"):
            drawn = speed.draw_documents(lengths, tail)
            for slower in (1.0, 1.5):
                for graphs in (True, False):
                    host = args.host_ms / 1e3
                    modes = dict(recording=2 * host) if graphs else dict(host=host)
                    print(f"kernels x{slower:g}, {'graphs' if graphs else 'eager'}: ", end="")
                    cost = speed.H100(run.s, slower=slower, **modes)
                    show_forecast(cost, drawn, tail, speed.planned(run), args.devices)
        show_memory(run)


def show_memory(run: t.Run):
    """Of a document, and how many fit."""
    found = speed.memory_of_document(run)
    total = sum(found.values())
    parts = " ".join(f"{name}:{value / 2**20:.1f}" for name, value in found.items())
    print(f"counted, {describe_protocol(run.s)}: {total / 2**20:.1f} MiB a document: {parts}")
    fits = (f"{size} GB: {speed.documents_that_fit(size * 1e9, total, run.s)}" for size in (80, 24, 16))
    print(f"predicted, documents side by side in {', '.join(fits)} (an eighth stays free)")


def bench_mixture(args):
    """Seconds that the mixture of three predictions takes, on the full split's targets, on this machine.

    One call on random NLL: 50,000 documents of log-normal lengths, one of 160,000 targets among them. Two threads,
    one run, no warm-up; it takes about 4 GB of memory."""
    longest = min(speed.FULL_SPLIT_LONGEST, args.targets // 2)
    documents = max(1, speed.FULL_SPLIT_DOCUMENTS * args.targets // speed.FULL_SPLIT_TARGETS)
    began = time.process_time()
    seconds = speed.mixture_seconds(args.targets, longest, documents)
    cpu = time.process_time() - began
    print(f"measured, mixture of {args.targets:,} targets, longest document {longest:,}: {seconds:.1f} s ", end="")
    print(f"(with the making of the input {cpu:.1f} s of one core)")


# ---- Packing


def bench_pack(args):
    """Seconds and bytes of the artifact of Gaussian weights, beside torch.save and zstd-22 of the same tensors.

    Quantising to the nearest code and packing, then unpacking; bytes, bits per weight and entropy by kind. On the
    CPU, whose work it is."""
    args.device = "cpu"
    run = run_of(args)
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


def bench_export(args):
    """Bytes of a finished run's weights quantised in several ways, and what each costs in bits per byte.

    Each --try is settings like "QUANT_SIGMAS=4.0,5.6 QUANTIZER=nearest" (STRETCH=1.2 stretches the steps); without
    one, both quantizers. The loss is against the float weights on --rows rows of validation text, with a 95% interval
    by bootstrap over rows. DATA_PATH and TOKENIZER_PATH are the run's, as for train_gpt.py."""
    tries = [parse_try(line) for line in args.tries or ["QUANTIZER=nearest", "QUANTIZER=gptq"]]
    run, step, state = finished_run(args)
    score = row_scorer(run, args.rows)
    plain = score(state)
    nats, _, bytes_ = plain.sum(0)
    print(f"float: {nats / np.log(2) / bytes_:.5f} bpb of {bytes_:.0f} bytes of text")
    points = []
    hessians = {}  # by the number of calibration tokens
    for line, stretch, changes in tries:
        s = run.using(**changes).s
        if s.quantizer == "gptq" and s.calibration_tokens not in hessians:
            hessians[s.calibration_tokens] = calibration(run, state, step, s.calibration_tokens)
        began = time.perf_counter()
        tensors = t.quantize_model(
            state, s, hessians.get(s.calibration_tokens) if s.quantizer == "gptq" else None, stretch
        )
        blob, kinds = t.pack(tensors, s)
        seconds = time.perf_counter() - began
        rows = score({name: tensor.restored() for name, tensor in tensors.items()})
        loss, low, high = change_of_loss(rows, plain)
        present = [kind for kind in t.LIMITS if kind in kinds]
        codes = sum(kinds[kind]["bytes"] for kind in present)
        bits = " ".join(f"{k}:{kinds[k]['bits_per_weight']:.3f}/{kinds[k]['entropy']:.3f}" for k in present)
        print(f"{line}: codes {codes:,} file {len(blob):,} loss {loss:+.5f} ({low:+.5f} to {high:+.5f}) ", end="")
        print(f"bits/entropy {bits} {seconds:.1f} s", flush=True)
        points.append((s.quantizer, s.quant_sigmas, codes, loss, low, high))
    if args.picture:
        draw_export(points, args.picture)


def parse_try(line: str) -> tuple[str, float, dict]:
    """The line, its STRETCH and its settings. Raises UserError."""
    changes = {}
    for pair in line.split():
        name, _, value = pair.partition("=")
        if name != "STRETCH" and name.lower() not in FIELDS:
            raise t.UserError(f"--try {pair}: no setting — write NAME=VALUE with a setting's name, or STRETCH=1.2")
        changes[name] = value
    try:
        stretch = float(changes.pop("STRETCH", 1))
    except ValueError as e:
        raise t.UserError(f"--try {line}: STRETCH is no number — write one, such as 1.2") from e
    return line, stretch, {name.lower(): t.parse_setting(FIELDS[name.lower()], x) for name, x in changes.items()}


def finished_run(args) -> tuple[t.Run, int, dict]:
    """The run with its training's settings, the steps it took, its float32 state dict. Raises UserError, OSError."""
    path = args.run / "checkpoint.pt"
    content = io.BytesIO(path.read_bytes())
    run = run_of(args)
    try:
        kept = torch.load(content, map_location="cpu", weights_only=True)
        names = t.TrainSettings.__dataclass_fields__
        trained = {name: value for name, value in kept["identity"].items() if name in names}
        step = int(kept["step"])
    except Exception as e:  # damage makes torch.load raise many kinds
        raise t.UserError(f"{path} is damaged ({type(e).__name__}) — name another run") from e
    run = run.using(**trained)
    return run, step, t.read_weights(args.run / "final_model.pt", run).state


def row_scorer(run: t.Run, count: int) -> Callable[[dict], np.ndarray]:
    """A function from a state dict to NLL, targets and bytes of each validation row, (rows, 3) float64."""
    s = run.s
    model, stream = t.GPT(s, run.dtype, run.attention).to(run.device), t.load_validation(run)
    windows = t.overlapping(stream, s.train_seq_len, s.train_seq_len)[:count]

    @torch.no_grad()
    def score(weights: dict) -> np.ndarray:
        t.load_weights(model, weights, "the run", run)
        rows = (torch.from_numpy(row).to(run.device).unbind(1) for row in np.split(windows, len(windows)))
        return torch.cat([t.score_windows(model, stream, row, s.train_seq_len)[1] for row in rows]).cpu().numpy()

    return score


def calibration(run: t.Run, state: dict, step: int, tokens: int) -> dict:
    """Hessians as the run's export had them."""
    model = t.GPT(run.s, run.dtype, run.attention).to(run.device)
    t.load_weights(model, state, "the run", run)
    loader = t.BatchLoader(t.open_shards("train", run), run)
    return t.calibrate(model, loader, step * run.s.train_batch_tokens, tokens, run)


def change_of_loss(rows: np.ndarray, plain: np.ndarray) -> tuple[float, float, float]:
    """Bits per byte more than `plain`, and a 95% interval by bootstrap over rows."""
    change, bytes_ = rows[:, 0] - plain[:, 0], rows[:, 2]
    drawn = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    bpb = change[drawn].sum(1) / np.log(2) / bytes_[drawn].sum(1)
    low, high = np.quantile(bpb, (0.025, 0.975))
    return float(change.sum() / np.log(2) / bytes_.sum()), float(low), float(high)


def draw_export(points: list[tuple], path: Path) -> None:
    """Loss against bytes of codes, with intervals; steps by row maximum and by k * rms apart."""
    try:
        import matplotlib
    except ImportError as e:
        raise t.UserError("--picture needs matplotlib — pip install matplotlib") from e
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
    sys.exit(main())
