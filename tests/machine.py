"""`bench.py machine`: what a machine can do with train_gpt.py, in minutes.

Parts follow one another; one that fails costs a line, not the rest. Every row is measured, counted or predicted, and
all rows are kept in a JSON file, which is written anew after each part."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import speed
from speed import seconds_of, t

DEVICES = 1, 8, 16  # that predictions are made for
FORM = 1  # of the JSON file
PATHS = "GOLF_SHARED", "DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR", "EVAL_ONLY"  # variables with them
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # of golden figures, relative


class Skip(Exception):
    """Why a part has nothing to do here."""


class Row(NamedTuple):
    part: str
    kind: str  # measured, counted or predicted
    name: str
    value: float | int | str | bool
    unit: str = ""
    note: str = ""


def shown(value: float | int | str | bool) -> str:
    """As a reader wants it: figures with four digits that count."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


class Machine:
    """A run, what parts have found, and the account of it. `limit` seconds: no part begins later, and no measurement
    repeats for longer than a sixtieth of it."""

    def __init__(self, run: t.Run, shard: Path | None, limit: float, path: Path):
        self.run, self.shard, self.limit, self.path = run, shard, limit, path
        self.most = limit / 60
        self.began = time.perf_counter()
        self.rows, self.failed, self.skipped, self.seconds = [], [], [], {}
        self.part = ""
        self.ceilings = None
        self.model = None  # that adapts
        self.steps = {}  # MeasuredSteps by protocol
        self.mixture = None  # seconds on the full split, predicted

    def row(self, kind: str, name: str, value, unit: str = "", note: str = ""):
        """Print a figure and keep it."""
        value = value.item() if isinstance(value, (np.generic, torch.Tensor)) else value
        self.rows.append(Row(self.part, kind, name, value, unit, note))
        t.say(f"{kind:9}  {name}: {shown(value)}{unit and ' '}{unit}{note and f'  ({note})'}")

    def attempt(self, name: str, part: Callable[[Machine], None]):
        """Do one part, whatever it raises."""
        self.part = name
        began = time.perf_counter()
        if began - self.began > self.limit:
            self.skip(name, f"{self.limit:g} seconds are over")
            self.write()
            return
        try:
            part(self)
        except Skip as e:
            self.skip(name, str(e))
        except Exception as e:  # the next part goes on
            what = f"{type(e).__name__}: {' '.join(str(e).split())}"
            frame = traceback.extract_tb(e.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
            self.failed.append(dict(part=name, error=self.anonymous(what)[:220], where=where))
            t.say(f"failed     {name}: {what[:220]} ({where})")
        self.seconds[name] = time.perf_counter() - began
        gc.collect()
        if self.run.cuda:
            with contextlib.suppress(RuntimeError):  # a device that is lost
                torch.cuda.empty_cache()
        self.write()

    def skip(self, name: str, why: str):
        self.skipped.append(dict(part=name, why=why))
        t.say(f"skipped    {name}: {why}")

    def anonymous(self, text: str) -> str:
        """The text with base names alone of its paths, and without the names of host and user."""
        own = (Path.home(), Path.cwd(), tempfile.gettempdir(), self.shard, *map(os.environ.get, PATHS))
        for path in sorted({str(path) for path in own if path}, key=len, reverse=True):  # they may have spaces
            if path != os.sep:
                text = text.replace(path + os.sep, "").replace(path, os.path.basename(path))
        text = re.sub(r"""(?<=['"])([/~.]|[A-Za-z]:)[^'"]*[/\\]""", "", text)  # in quotes: with spaces, too
        text = re.sub(r"""[^\s'"=:,()]*[/\\]""", "", re.sub(r"(?<!\w)[A-Za-z]:\\", "", text))
        for name in (platform.node(), Path.home().name):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text) if name else text
        return text

    def write(self):
        """The JSON file: no path, no name of a user or a host is in it."""
        paths = ("data_path", "tokenizer_path", "output_dir", "eval_only", "run_id")
        settings = {name: value for name, value in asdict(self.run.s).items() if name not in paths}
        content = dict(form=FORM, made=time.strftime("%Y-%m-%d"), source_sha256=t.SOURCE_SHA256, settings=settings)
        content |= dict(environment=t.environment(self.run), real_text=bool(self.shard))
        content |= dict(rows=[row._asdict() for row in self.rows], failed=self.failed, skipped=self.skipped)
        content |= dict(seconds=self.seconds, seconds_in_all=time.perf_counter() - self.began)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    @contextlib.contextmanager
    def peak_memory(self, name: str):
        """Rows of what a piece of work takes at most: of the GPU's memory, or of the process, up to now."""
        if self.run.cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.run.cuda:
            self.row("measured", f"peak memory, {name}", torch.cuda.max_memory_allocated() / 2**30, "GiB", "allocated")
            return
        with contextlib.suppress(ImportError):  # Windows has none
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            self.row("measured", f"peak memory, up to {name}", peak / 2**30, "GiB", "resident, of the process")


def default_path(run: t.Run) -> Path:
    """A name that says which device and which day, in the current folder; never one that is taken."""
    device = re.sub(r"[^a-z0-9]+", "-", t.environment(run)["device"].lower()).strip("-")
    stem = f"machine_{device}_{time.strftime('%Y-%m-%d')}"
    number = 1
    while (path := Path(stem + (f"_{number}" if number > 1 else "") + ".json")).exists():
        number += 1
    return path


def measure_machine(run: t.Run, shard: Path | None, limit: float, path: Path | None, chosen: list[str]) -> int:
    """All parts, or those chosen. Returns 1 if one failed. Raises UserError, OSError before the first one begins."""
    if shard:
        speed.tokens_of(shard, run)
    machine = Machine(run, shard, limit or (300.0 if run.cuda else 180.0), path or default_path(run))
    machine.write()
    try:
        for name in chosen or PARTS:
            machine.attempt(name, PARTS[name])
    except KeyboardInterrupt:
        machine.skip(machine.part, "interrupted, and all after it")
        machine.write()
        raise
    finally:
        t.say(f"{time.perf_counter() - machine.began:.0f} seconds; all of it is in {machine.path}")
    return 1 if machine.failed else 0


# ---- Parts: the device


def describe_device(m: Machine):
    found = t.environment(m.run)
    m.row(
        "measured",
        "device",
        found["device"] if m.run.cuda else name_of_processor(),
        "",
        f"torch {found['torch']}, Python {found['python']}",
    )
    m.row("counted", "cores", os.cpu_count() or 0, "", f"torch uses {found['threads']} threads")
    if m.run.cuda:
        major, minor = torch.cuda.get_device_capability()
        m.row("measured", "compute capability", f"{major}.{minor}")
        free, total = torch.cuda.mem_get_info()
        m.row("measured", "memory", total / 2**30, "GiB", f"{free / 2**30:.1f} free")
        m.row("counted", "devices", torch.cuda.device_count())
    elif hasattr(os, "getloadavg"):
        m.row("measured", "load of the last minute", os.getloadavg()[0], "", "figures suffer where others compute, too")
    m.row("counted", "computes in", found["dtype"], "", f"attention {found['attention']}, compiled {found['compile']}")
    s = m.run.s
    with torch.device("meta"):
        weights = sum(p.numel() for p in t.GPT(s).parameters())
    m.row("counted", "model", weights, "weights", f"PRESET={s.preset}, {s.num_layers} layers of {s.model_dim}")


def name_of_processor() -> str:
    """As the system calls it, or its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_ceilings(m: Machine):
    m.ceilings = speed.Ceilings.measure(m.run, m.most)
    m.row("measured", "matrix product", m.ceilings.flops / 1e12, "TFLOP/s", str(m.run.dtype).split(".")[1])
    m.row("measured", "copy", m.ceilings.copy / 1e9, "GB/s", "read and written")


# ---- Parts: training


def measure_training(m: Machine):
    """A micro-batch's forward and backward pass and the optimiser's step; from them a step of the whole batch."""
    run, s = m.run, m.run.s
    torch.manual_seed(s.seed)
    model = t.GPT(s, run.dtype, run.attention).to(run.device)
    optimizer = t.Optimizer(model, run)
    forward = run.compiled(model, dynamic=False)
    with m.peak_memory("training"):
        began = time.perf_counter()
        wanted = min(run.most("training_rows"), s.train_batch_tokens // s.train_seq_len)
        if not run.cuda:  # rows that fit the time: memory is not what is short
            row = seconds_of(run, lambda: t.forward_backward(forward, speed.micro_batch(m.shard, 1, run), 1.0), 1)
            wanted = min(wanted, max(1, int(m.most / row)))
        rows = speed.most_that_fit(
            wanted, lambda n: t.forward_backward(forward, speed.micro_batch(m.shard, n, run), 1.0), run
        )
        batch = speed.micro_batch(m.shard, rows, run)
        optimizer.step(0, 1e-6)
        run.wait()
        m.row("measured", "first training step", time.perf_counter() - began, "s", "compilation included")
        gradients = seconds_of(run, lambda: t.forward_backward(forward, batch, 1.0), 5, most=m.most)
        update = seconds_of(run, lambda: optimizer.step(1, 1e-6), 5, most=m.most)
    tokens = rows * s.train_seq_len
    flop = 3 * tokens * speed.flop_per_token(s, s.train_seq_len / 2)
    m.row("measured", "training", tokens / gradients, "tokens/s", f"forward and backward, {rows} rows at once")
    if m.ceilings:
        m.row("measured", "share of the matrix product", 100 * flop / gradients / m.ceilings.flops, "%")
    m.row("measured", "optimiser step", 1000 * update, "ms")
    for devices in DEVICES:
        step = s.train_batch_tokens / devices / tokens * gradients + update
        steps = min(int(speed.BUDGET / step), s.iterations)
        note = f"{step * 1000:.1f} ms a step of {s.train_batch_tokens:,} tokens, without communication"
        m.row("predicted", f"steps in ten minutes, {count_of(devices, 'such device')}", steps, "", note)


def measure_export(m: Machine):
    """Calibration, GPTQ and packing of random weights."""
    run, s = m.run, m.run.s
    model = t.GPT(s, run.dtype, run.attention)
    speed.randomise(model)
    model = model.to(run.device)
    state = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    tokens = speed.tokens_of(m.shard, run) if m.shard else rng.integers(0, s.vocab_size, s.train_batch_tokens + 1)
    loader = t.BatchLoader([tokens], run)
    row = seconds_of(run, lambda: t.calibrate(model, loader, 0, s.train_seq_len, run), 3, most=m.most)
    rows = t.ceil_div(s.calibration_tokens, s.train_seq_len)
    m.row("predicted", "calibration", rows * row, "s", f"{s.calibration_tokens:,} tokens, by a row's measured seconds")
    hessians = t.calibrate(model, loader, 0, s.train_seq_len, run)
    began = time.perf_counter()
    tensors = t.quantize_model(state, s, hessians)
    run.wait()
    quantised = time.perf_counter()
    blob, _ = t.pack(tensors, s)
    packed = time.perf_counter()
    m.row("measured", "quantising", quantised - began, "s", s.quantizer)
    note = f"{len(blob):,} bytes of random weights; both once for each of the 1 to 8 steps tried to fit the cap"
    m.row("measured", "packing", packed - quantised, "s", note)
    t.unpack(blob)
    m.row("measured", "unpacking", time.perf_counter() - packed, "s")


# ---- Parts: test-time training


def adapting_model(m: Machine) -> t.GPT:
    """Random weights, compiled as the evaluation compiles them."""
    if m.model is None:
        m.model = t.scoring_model(m.run)
        speed.randomise(m.model)
    return m.model


def compare_graphs(m: Machine):
    """Whether steps recorded as CUDA graphs compute what eager ones do; if so, later parts record them."""
    if not m.run.cuda:
        raise Skip("there is no GPU")
    small = m.run.using(ttt_n_epochs=2, ttt_protocol="replay", ttt_context="cached")
    small = small.using(ttt_batch_size=speed.largest_batch(adapting_model(m), small))
    began = time.perf_counter()
    equal = t.rehearse_adaptation(adapting_model(m), small)
    m.row("measured", "CUDA graphs equal eager steps", equal)
    m.row("measured", "compilation of test-time training", time.perf_counter() - began, "s", "rehearsal included")
    m.run.graphs = equal
    speed.randomise(m.model)


def count_of(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def measure_protocol(m: Machine, name: str, **changes):
    """Seconds of single steps, cached and recompute."""
    run = m.run.using(ttt_context="cached", **changes)
    s = run.s
    chunk = s.ttt_chunk_size
    with m.peak_memory(name):
        size = speed.largest_batch(adapting_model(m), run)
        steps = m.steps[name] = speed.time_steps(adapting_model(m), size, run, 5, m.most)
    for documents, short, full in ((size, "batch", "batch_full"), (1, "one", "one_full")):
        for where, corner in (("at full context", full), ("without context", short)):
            rate = documents * chunk / getattr(steps.train, corner)
            what = f"{name}, {count_of(documents, 'document')} {where}, cached"
            m.row("measured", what, rate, "token-epochs/s", "one training step")
    if m.ceilings:
        flop = 2 * size * chunk * speed.flop_per_token(s, s.ttt_eval_seq_len - chunk)  # no gradients of weights
        share = 100 * flop / steps.train.batch_full / m.ceilings.flops
        m.row("measured", f"{name}, share of the matrix product", share, "%", "of the training step at full context")
    if steps.recording:
        m.row("measured", f"{name}, a new shape", steps.recording, "s", "an eager step and a recorded one")
    recompute = run.using(ttt_context="recompute")
    for documents in (speed.largest_batch(adapting_model(m), recompute), 1):
        batch, last = speed.batch_at_full_context(adapting_model(m), documents, recompute)
        seconds = seconds_of(run, speed.step_of(batch, last, documents, True, cached=False), 3, most=m.most)
        what = f"{name}, {count_of(documents, 'document')} at full context, recompute"
        m.row("measured", what, documents * chunk / seconds, "token-epochs/s", "one training step")


def measure_replay(m: Machine):
    measure_protocol(m, "replay", ttt_protocol="replay")


def measure_recommended(m: Machine):
    measure_protocol(m, "single_pass", **speed.RECOMMENDED)


def measure_mixture(m: Machine):
    """Of few targets that have the longest document, and of more in shorter ones: the full split has both."""
    longest = speed.FULL_SPLIT_LONGEST
    few, more = 2 * longest, 10 * longest
    turns = speed.mixture_seconds(few, longest, few // 1240)
    m.row("measured", f"mixture of {few:,} targets", turns, "s", f"one document of {longest:,}")
    rest = speed.mixture_seconds(more, longest // 40, more // 1240)
    m.row("measured", f"mixture of {more:,} targets", rest, "s", f"none above {longest // 40:,}")
    m.mixture = turns + rest / more * (speed.FULL_SPLIT_TARGETS - few)
    m.row("predicted", "mixture of the full split", m.mixture, "s")


def predict_evaluations(m: Machine):
    """The full split's seconds on some such devices, by the seconds of steps."""
    if not m.steps:
        raise Skip("no protocol was measured")
    lengths = speed.draw_documents(speed.lengths_of(m.shard), "pareto")
    for name, steps in m.steps.items():
        run = m.run.using(**asdict(steps.s)).using(ttt_batch_size=steps.documents if m.run.cuda else 0)
        plan = speed.Plan.of(steps, lengths, run)
        what = f"{name}, drawing a document's adapters"
        m.row("measured", what, 1000 * steps.drawing, "ms", "on the host, in each pass")
        for devices in DEVICES:
            found = plan.forecast(devices)
            mixed = steps.s.ttt_mixture and m.mixture is not None
            found.all += m.mixture if mixed else 0.0
            inside = "inside" if found.inside else "OVER"
            note = f"{inside} the {speed.BUDGET:.0f} s; slowest of {found.balance:.2f} of the mean"
            if steps.s.ttt_mixture and not mixed:
                note += "; mixing is not in it"
            if name == "replay":  # at the deadline its later epochs are cut, not the score
                note = f"{inside} the {speed.BUDGET:.0f} s; its score, epoch 1, is complete after {found.score:,.0f}"
            m.row(
                "predicted",
                f"full split, {describe_protocol(steps.s)}, {count_of(devices, 'such device')}",
                found.all,
                "s",
                note,
            )


def describe_protocol(s: t.Settings) -> str:
    """Test-time training in a few words."""
    steps = f"replay {s.ttt_n_epochs} epochs" if s.ttt_protocol == "replay" else f"single_pass {s.ttt_n_epochs} steps"
    targets = s.ttt_lora_targets if s.ttt_lora_targets.count(",") < 3 else f"{len(t.lora_shapes(s))} targets"
    mixture = f" mixture of {1 + len(s.ttt_rates)}" if s.ttt_mixture else ""
    return f"{steps} chunk {s.ttt_chunk_size} rank {s.ttt_lora_rank} {targets}{mixture}"


# ---- Parts: is it right?


def golden_module(folder: Path):
    """golden/inputs.py, which makes weights and adapters from names."""
    spec = importlib.util.spec_from_file_location("golden_inputs", folder / "golden" / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_run(m: Machine, inputs, dtype: torch.dtype, **changes) -> t.Run:
    """With the settings of the golden figures, nothing compiled."""
    settings = dict(ttt_chunk_size=64, ttt_eval_seq_len=256, ttt_lora_rank=8, ttt_lora_lr=0.001, ttt_n_epochs=4)
    settings |= dict(ttt_lora_targets="c_q,c_v", ttt_lora_alpha=0.0, ttt_weight_decay=0.0, ttt_protocol="replay")
    run = m.run.using(**inputs.CONFIG, **(settings | changes))
    run.compile = run.graphs = False
    run.dtype = dtype
    return run


def golden_documents(run: t.Run, model: t.GPT, inputs, tokens: np.ndarray, documents: list[dict], adapt=True):
    """Mean NLL of the documents, (figures, documents), or without adaptation, (1, documents)."""
    targets = sum(document["targets"] for document in documents)
    stream = t.Stream(tokens[: targets + 1], np.ones(targets, np.int16), run.device)
    order = np.argsort(-stream.lengths, kind="stable")
    batch = t.DocumentBatch(model, stream, len(order), run)
    batch.load(order)
    if adapt:
        s = run.s
        names = [(layer, target) for layer in range(s.num_layers) for target in "qv"]
        a = [[inputs.lora_a(7, *name, int(d), s.ttt_lora_rank, s.model_dim) for name in names] for d in order]
        batch.adapt(s.ttt_n_epochs, a=np.array(a).reshape(len(order), -1))
    else:
        batch.score()
    if adapt and batch.epochs:
        found = batch.epoch_nll()
    else:
        found = np.array([[nll.sum(dtype=np.float64) for nll in batch.target_nll()]])
    return (found / stream.lengths[order])[:, np.argsort(order)]


def golden_figures(m: Machine, folder: Path, dtype: torch.dtype):
    """Yields name, what was found, what was expected."""
    inputs = golden_module(folder)
    expected = json.loads((folder / "golden" / "expected.json").read_text())
    tokens = t.open_shard(folder / "fineweb" / "fineweb_val_000000.bin")[:]
    run = golden_run(m, inputs, dtype)
    model = t.scoring_model(run)
    t.load_weights(model, {name: torch.from_numpy(w) for name, w in inputs.weights().items()}, "golden", run)
    first, end = expected["forward"]["tokens"]
    ids = torch.from_numpy(tokens[first:end].astype(np.int64))[None].to(run.device)
    with torch.no_grad():
        yield "forward", model(ids[:, :-1], ids[:, 1:]).double().mean().item(), expected["forward"]["mean_nll"]
    documents = expected["ttt_cached"]["docs"]

    def known(name):
        return np.array([document[name] for document in documents])

    arguments = model, inputs, tokens, documents
    yield "no adaptation", golden_documents(run, *arguments, adapt=False)[0], known("no_adaptation_val_loss")
    yield "replay, 4 epochs", golden_documents(run, *arguments), known("replay_epochs_4_val_loss").T
    single = golden_run(m, inputs, dtype, ttt_protocol="single_pass", ttt_n_epochs=3)
    yield "single_pass, 3 steps", golden_documents(single, *arguments)[0], known("single_pass_epochs_3_val_loss")
    documents = expected["ttt_replay"]["docs"]
    recompute = golden_run(m, inputs, dtype, ttt_context="recompute", ttt_n_epochs=1)
    yield "recompute, epoch 1", golden_documents(recompute, *arguments), known("epochs_1_val_loss").T


def compare_golden(m: Machine):
    """Figures that an independent implementation computed, in float32 and, where the model computes in it, bf16."""
    if not os.environ.get("GOLF_SHARED"):
        raise Skip("GOLF_SHARED does not name the folder with golden/ and fineweb/")
    folder = Path(os.environ["GOLF_SHARED"])
    for dtype in dict.fromkeys((torch.float32, m.run.dtype)):
        for name, found, expected in golden_figures(m, folder, dtype):
            differ = float(np.max(np.abs(found - expected) / np.abs(expected)))
            limit = TOLERANCE[dtype]
            note = f"relative; {'within' if differ <= limit else 'NOT WITHIN'} {limit:g}"
            m.row("measured", f"golden {name}, {str(dtype).split('.')[1]}, difference", differ, "", note)


def documents_of_random_text(run: t.Run, lengths: list[int], seed: int = 0) -> t.Stream:
    """Longest first."""
    tokens = np.random.default_rng(seed).zipf(1.3, sum(lengths) + 1).clip(1, run.s.vocab_size - 2) + 1
    ends = np.cumsum(lengths)
    return t.Stream(tokens, np.ones(ends[-1], np.int16), run.device, (ends - lengths, np.array(lengths)))


def scored(m: Machine, stream: t.Stream, run: t.Run) -> list[list[np.ndarray]]:
    """NLL of every target of each document: without adaptation, and the adapted score."""
    batch = t.DocumentBatch(adapting_model(m), stream, len(stream.lengths), run)
    batch.load(np.arange(len(stream.lengths)))
    batch.score()
    plain = batch.target_nll()
    batch.adapt(1)
    return [plain, batch.target_nll()]


def compare_contexts(m: Machine):
    """At a learning rate of 0, cached keys and values and a window of one's own are the same, but for rounding."""
    s = m.run.s
    lengths = [s.ttt_eval_seq_len, s.ttt_eval_seq_len // 2 + 1, s.ttt_chunk_size // 2 + 1]
    found = []
    for context in ("cached", "recompute"):
        run = m.run.using(ttt_context=context, ttt_lora_lr=0.0, ttt_protocol="replay", ttt_n_epochs=1)
        found.append([nll.sum(dtype=np.float64) for nll in scored(m, documents_of_random_text(run, lengths), run)[1]])
    differ = float(np.max(np.abs(np.subtract(*found)) / found[0]))
    limit = TOLERANCE[m.run.dtype]
    note = f"relative, of a document's NLL; {'within' if differ <= limit else 'NOT WITHIN'} {limit:g}"
    m.row("measured", "cached against recompute, no learning, difference", differ, "", note)


def check_causality(m: Machine):
    """Other tokens after t in one document, an unchanged repeat beside it: does an earlier target's NLL move?"""
    for protocol, more in (("replay", {}), ("single_pass", dict(ttt_n_epochs=2))):
        run = m.run.using(ttt_protocol=protocol, **more)
        size = run.s.ttt_chunk_size
        stream = documents_of_random_text(run, [4 * size + size // 2, 3 * size, size + 1])
        at = 2 * size + size // 2 + size % 7  # inside a chunk of the first document
        before = scored(m, stream, run)
        repeats = [scored(m, stream, run) for _ in range(2)]
        later = stream.tokens[at + 1 : int(stream.lengths[0]) + 1]
        later.copy_((later - 1) % (run.s.vocab_size - 2) + 2)  # another token each, no BOS
        changed = scored(m, stream, run)
        for row, figure in enumerate(("no adaptation", "epoch 1" if protocol == "replay" else "single_pass")):
            old, new = before[row][0], changed[row][0]
            repeat = max(float(np.abs(old - other[row][0])[:at].max()) for other in repeats)
            change = float(np.abs(old - new)[:at].max())
            after = float(np.abs(old - new)[at:].max())
            verdict = "causal" if change <= repeat else "NOT causal"
            note = f"{verdict}: an unchanged repeat {repeat:.3g}, later targets {after:.3g} nats"
            m.row("measured", f"change of earlier targets, {figure}", change, "nats", note)


def compare_ranks(m: Machine):
    """The same small run by one process and by two, on a GPU each where there are two."""
    if m.run.cuda and torch.cuda.device_count() < 2:
        raise Skip("there is one GPU")
    with tempfile.TemporaryDirectory() as folder:
        found = [small_run(m, Path(folder) / str(ranks), ranks) for ranks in (1, 2)]
    for name in ("no_adaptation", "backward_looking"):
        one, two = (result["evaluation"][name]["val_bpb"] for result in found)
        note = f"relative; {one:.8f} and {two:.8f} bpb after {found[0]['training']['steps']} steps"
        m.row("measured", f"one rank against two, {name}, difference", abs(one - two) / one, "", note)


def small_run(m: Machine, folder: Path, ranks: int) -> dict:
    """The result of train_gpt.py with a small model on the bundled sample. Raises RuntimeError with its last words."""
    names = {name.upper() for name in t.Settings.__dataclass_fields__}
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= dict(PRESET="tiny", DEVICE=m.run.device.type, OUTPUT_DIR=str(folder), COMPILE="0", NUM_LAYERS="2")
    env |= dict(ITERATIONS="4", WARMUP_STEPS="1", VAL_LOSS_EVERY="0", VAL_DOCS="3", TTT_N_EPOCHS="1")
    env |= dict(TRAIN_BATCH_TOKENS="2048", CALIBRATION_TOKENS="2048")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, str(t.SOURCE)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=m.limit)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}: {(errors or ['no word'])[0]}")
    return json.loads((folder / "result.json").read_text())


PARTS = {
    "device": describe_device,
    "ceilings": measure_ceilings,
    "training": measure_training,
    "graphs": compare_graphs,
    "replay": measure_replay,
    "single_pass": measure_recommended,
    "mixture": measure_mixture,
    "predictions": predict_evaluations,
    "export": measure_export,
    "golden": compare_golden,
    "contexts": compare_contexts,
    "causality": check_causality,
    "ranks": compare_ranks,
}
