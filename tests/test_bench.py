"""Tests of bench.py on a micro model: that every command runs, survives and says what it is; and that what it predicts
is counted as train_gpt.py works."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import machine
import runs
import speed
import train_gpt as t

PARTS = [name for name in machine.PARTS if name not in ("golden", "ranks")]


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The micro model, a full split of 400 documents, and an empty current folder."""
    for name in t.Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("GOLF_SHARED", raising=False)
    for name, value in runs.environment(
        "", MICRO_BATCH_TOKENS=256, TTT_CHUNK_SIZE=16, TTT_N_EPOCHS=3, OUTPUT_DIR=None, DEVICE=None
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(speed, "FULL_SPLIT_DOCUMENTS", 400)
    monkeypatch.setattr(speed, "FULL_SPLIT_TARGETS", 40_000)
    monkeypatch.setattr(speed, "FULL_SPLIT_LONGEST", 2_000)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Calls bench.py in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bench.py", *map(str, arguments)])
        try:
            code = bench.main()
        except SystemExit as e:  # --help
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def settings() -> t.Run:
    return t.Run(t.Settings.from_env(dict(os.environ) | dict(DEVICE="cpu")))


def shard() -> Path:
    return runs.data() / "fineweb_train_000000.bin"


# ---- Commands


def numbers_after(text: str, words: str) -> float:
    """The number that follows these words."""
    assert words in text, text
    return float(text.partition(words)[2].split()[0].replace(",", "").rstrip(";s"))


def test_train(call):
    code, out, _ = call("train", "--repeats", 1, "--device", "cpu")
    assert code == 0
    assert numbers_after(out, "forward+backward: ") > 0 and numbers_after(out, "training step: ") > 0


def test_ttt_on_real_documents(call):
    code, out, _ = call("ttt", "--repeats", 1, "--epochs", 1, "--shard", shard(), "--documents", 2, "--device", "cpu")
    assert code == 0
    assert "20 documents" in out and numbers_after(out, "recompute on documents of >= 1,000 tokens: ") > 0
    assert out.count("predicted, replay 3 epochs") == 2


def test_predict_needs_no_gpu_and_takes_any_adaptation(call, monkeypatch):
    monkeypatch.setenv("TTT_PROTOCOL", "single_pass")
    monkeypatch.setenv("TTT_LORA_TARGETS", "mlp.fc,attn.proj")
    code, out, _ = call("predict", "--devices", 3)
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("kernels")]
    assert len(lines) == 8 and all("single_pass 3 steps chunk 16 rank 2 mlp.fc,attn.proj" in line for line in lines)
    assert all("3 such devices" in line for line in lines)
    assert "counted" in out and "80 GB:" in out


def test_predict_takes_replay_and_the_recommendation_where_nothing_is_set(call, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TTT_")]:
        monkeypatch.delenv(name)
    code, out, _ = call("predict")
    assert code == 0
    assert out.count("replay 50 epochs chunk 256 rank 8 c_q,c_v,") == 8
    assert out.count("single_pass 5 steps chunk 64 rank 32 6 targets mixture of 3,") == 8


def short_of_memory(monkeypatch, largest: int) -> None:
    """As on a GPU that has room for so many rows or documents at once."""
    work, step = t.forward_backward, t.DocumentBatch._run_step

    def forward_backward(model, batch, scale):
        if max(len(x) for x, _ in batch) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return work(model, batch, scale)

    def run_step(self, chunk, n, cached, **asked):
        if n > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        step(self, chunk, n, cached, **asked)

    monkeypatch.setattr(t, "forward_backward", forward_backward)
    monkeypatch.setattr(t.DocumentBatch, "_run_step", run_step)


def halve(most: int, work, run: t.Run) -> int:
    """most_that_fit() without a GPU."""
    while most > 1:
        try:
            work(most)
            return most
        except torch.OutOfMemoryError:
            most //= 2
    return most


@pytest.mark.parametrize(
    "largest, arguments",
    [
        (4, ("train", "--repeats", 1, "--device", "cpu")),
        (4, ("curve", "--shard", "train.bin", "--steps", 20, "--device", "cpu")),
        (2, ("ttt", "--repeats", 1, "--epochs", 1, "--device", "cpu", "--shard", "val.bin")),
    ],
)
def test_what_is_computed_at_once_is_what_fits(call, monkeypatch, largest, arguments):
    runs.write_shard(Path("train.bin"), runs.documents([90] * 40, 0))
    runs.write_shard(Path("val.bin"), runs.documents([90, 70, 30, 20], 0))
    train = bench.curve

    def train_a_step(run: t.Run, *others, **named) -> np.ndarray:
        return np.resize(train(run.using(iterations=1), *others, **named), run.s.iterations)

    monkeypatch.setattr(bench, "curve", train_a_step)
    monkeypatch.setattr(bench, "show_ceilings", lambda run: 1e9)
    short_of_memory(monkeypatch, largest)
    code, _, err = call(*arguments)
    assert code == 2 and "out of memory: CUDA" in runs.user_error(err)
    assert "MICRO_BATCH_TOKENS" in err and "TTT_BATCH_SIZE" in err
    monkeypatch.setattr(speed, "most_that_fit", halve)
    code, _, err = call(*arguments)
    assert code == 0, err


def test_pack_and_mixture(call):
    code, out, _ = call("pack", "--repeats", 1)
    assert code == 0 and numbers_after(out, "ratio ") > 0
    code, out, _ = call("mixture", "--targets", 5000)
    assert code == 0 and "5,000 targets" in out


def test_curve(call):
    code, out, _ = call("curve", "--shard", shard(), "--steps", 20, "--device", "cpu")
    assert code == 0
    assert numbers_after(out, "mean |ours - plain| ") < numbers_after(out, "mean |ours - another seed| ")


def test_export_of_a_finished_run(call, settings, tmp_path):
    run = settings.using(bigram_vocab_size=2048)  # large enough to be quantised
    model = t.GPT(run.s)
    speed.randomise(model)
    torch.save(dict(identity=run.s.of(t.TrainSettings), step=3), tmp_path / "checkpoint.pt")
    torch.save(model.state_dict(), tmp_path / "final_model.pt")
    tries = "--try", "QUANTIZER=nearest", "--try", "QUANTIZER=gptq STRETCH=2"
    code, out, err = call("export", "--run", tmp_path, "--rows", 4, "--device", "cpu", *tries)
    assert code == 0, err
    fine, coarse = (numbers_after(out, f"{words}: codes ") for words in ("nearest", "STRETCH=2"))
    assert 0 < coarse < fine


@pytest.mark.parametrize("name", ["machine", "train", "ttt", "predict", "mixture", "pack", "curve", "export"])
def test_each_command_says_what_it_measures(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    own = getattr(bench, f"bench_{name}").__doc__.split("\n")[0]
    assert own in out and f"bench.py {name}" in out
    assert ("--try" in out) == (name == "export") and ("--host-ms" in out) == (name == "predict")
    assert own in " ".join(call("--help")[1].split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "COMMAND"),
        (("speed",), "speed"),
        (("train", "--epochs", "3"), "--epochs"),
        (("train", "--repeats", "0"), "below 1"),
        (("train", "--device", "cpu", "--shard", "nowhere.bin"), "nowhere.bin"),
        (("ttt", "--device", "cpu", "--shard", "large.bin"), "has token 400 but VOCAB_SIZE=300"),
        (("machine", "--device", "cpu", "--shard", "large.bin"), "has token 400 but VOCAB_SIZE=300"),
        (("machine", "--device", "cpu", "--json", "nowhere/m.json"), "nowhere"),
        (("machine", "--parts", "engine"), "engine"),
        (("curve",), "--shard"),
        (("export", "--run", "nowhere"), "nowhere"),
        (("export", "--run", "nowhere", "--try", "QUANTISER=gptq"), "QUANTISER"),
        (("export", "--run", "nowhere", "--try", "STRETCH=much"), "STRETCH"),
        (("export", "--run", ".", "--device", "cpu"), "checkpoint.pt is damaged"),
    ],
)
def test_mistakes_are_one_line(call, arguments, words):
    runs.write_shard(Path("large.bin"), [1, 5, 400, 1, 7])
    Path("checkpoint.pt").write_bytes(b"no checkpoint")
    code, _, err = call(*arguments)
    assert code == 2
    assert words in runs.user_error(err) and len(err.splitlines()) == 1


def test_a_wrong_setting_is_one_line(call, monkeypatch):
    monkeypatch.setenv("TTT_CHUNK_SIZE", "0")
    for command in ("predict", "pack"):
        code, _, err = call(command)
        assert code == 2 and "TTT_CHUNK_SIZE=0" in runs.user_error(err)


# ---- machine


def account(path: str = "m.json") -> dict:
    return json.loads(Path(path).read_text())


def test_machine_measures_everything_and_keeps_it(call):
    code, out, err = call("machine", "--device", "cpu", "--limit", 600, "--json", "m.json", "--parts", *PARTS)
    assert (code, err) == (0, ""), out
    kept = account()
    assert kept["failed"] == [] and [row["part"] for row in kept["skipped"]] == ["graphs"]
    assert (kept["form"], kept["source_sha256"], kept["real_text"]) == (machine.FORM, t.SOURCE_SHA256, False)
    assert kept["environment"]["device_type"] == "cpu" and kept["settings"]["num_layers"] == 2
    assert {row["part"] for row in kept["rows"]} == {*PARTS} - {"graphs"}
    for row in kept["rows"]:
        assert row["kind"] in ("measured", "counted", "predicted")
        assert isinstance(row["value"], (str, bool)) or math.isfinite(row["value"])
        assert f"{row['kind']:9}  {row['name']}: " in out
    assert sum("NOT" in row["note"] for row in kept["rows"]) == 0
    found = {row["name"]: row["value"] for row in kept["rows"]}
    predicted = [row["name"] for row in kept["rows"] if row["kind"] == "predicted"]
    for devices in ("1 such device", "8 such devices", "16 such devices"):
        assert sum(name.endswith(devices) for name in predicted) == 3  # training, replay, single_pass
    evaluations = [found[name] for name in predicted if name.startswith("full split, replay")]
    assert evaluations == sorted(evaluations, reverse=True)
    text = json.dumps(kept)
    assert not any(word in text for word in (str(Path.home()), os.getcwd(), str(runs.data()), os.uname().nodename))


def test_its_checks_find_what_is_planted(call, monkeypatch):
    adapt, keep = t.DocumentBatch.adapt, t.DocumentBatch._push

    def adapt_twice(batch, *arguments, **named):
        adapt(batch, *arguments, **named)
        batch.adapters.begin = lambda a: None
        adapt(batch, *arguments, **named)
        del batch.adapters.begin

    def forget(batch, n, width):
        keep(batch, n, width)
        batch.kv[:n] *= 0.5

    monkeypatch.setattr(t.DocumentBatch, "adapt", adapt_twice)
    monkeypatch.setattr(t.DocumentBatch, "_push", forget)
    call("machine", "--device", "cpu", "--json", "m.json", "--parts", "contexts", "causality")
    assert account()["failed"] == []
    found = [(row["name"], "NOT" in row["note"]) for row in account()["rows"]]
    assert found == [
        ("cached against recompute, no learning, difference", True),
        ("change of earlier targets, no adaptation", False),
        ("change of earlier targets, epoch 1", True),
        ("change of earlier targets, no adaptation", False),
        ("change of earlier targets, single_pass", True),
    ]


def test_a_part_that_fails_is_one_line_and_the_next_goes_on(call, monkeypatch):
    def fail(m):
        m.row("measured", "before it failed", 1.5)
        raise RuntimeError("the kernel\nis gone")

    monkeypatch.setitem(machine.PARTS, "training", fail)
    code, out, _ = call("machine", "--device", "cpu", "--json", "m.json", "--parts", "training", "mixture")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("failed")]
    assert "training: RuntimeError: the kernel is gone" in line and "Traceback" not in out
    kept = account()
    (failed,) = kept["failed"]
    assert failed["part"] == "training" and failed["where"].endswith("in fail")
    assert [row["part"] for row in kept["rows"]] == ["training", "mixture", "mixture", "mixture"]


def test_its_file_has_no_path_or_name_of_what_failed(call, monkeypatch, tmp_path):
    folder = tmp_path / "my texts"
    monkeypatch.setenv("GOLF_SHARED", str(folder))
    names = "/home/b o b/c.bin", "~/carol/d.bin", r"C:\Users\d a n\e.bin"

    def fail(m):
        raise RuntimeError(f"{folder} has no {folder}/x.bin, {', '.join(map(repr, names))} or /home/erin/f.bin")

    monkeypatch.setitem(machine.PARTS, "training", fail)
    code, out, _ = call("machine", "--device", "cpu", "--json", "m.json", "--parts", "golden", "training")
    assert code == 1 and str(folder) in out
    found = [row["error"] for row in account()["failed"]]
    assert found[0].startswith("FileNotFoundError: ") and "inputs.py" in found[0]
    assert found[1] == "RuntimeError: my texts has no x.bin, 'c.bin', 'd.bin', 'e.bin' or f.bin"


def test_what_a_prediction_leaves_out_is_said(call):
    call("machine", "--device", "cpu", "--json", "m.json", "--parts", "single_pass", "predictions")
    rows = {row["name"]: row for row in account()["rows"] if row["part"] == "predictions"}
    notes = [row["note"] for name, row in rows.items() if name.startswith("full split, single_pass")]
    assert len(notes) == 3 and all("mixing is not in it" in note for note in notes)
    assert rows["single_pass, drawing a document's adapters"]["value"] > 0


def test_no_part_begins_after_the_limit_and_an_interruption_keeps_what_there_is(call, monkeypatch):
    def take_long(m):
        m.began -= m.limit

    def stop(m):
        raise KeyboardInterrupt

    monkeypatch.setitem(machine.PARTS, "training", take_long)
    arguments = "machine", "--device", "cpu", "--json", "m.json", "--parts", "device", "training", "mixture"
    assert call(*arguments)[0] == 0
    assert [row["part"] for row in account()["skipped"]] == ["mixture"]
    monkeypatch.setitem(machine.PARTS, "training", stop)
    assert call(*arguments)[0] == 130
    assert {row["part"] for row in account()["rows"]} == {"device"}
    assert [row["part"] for row in account()["skipped"]] == ["training"]


def test_its_file_never_replaces_another_day_s(call):
    for _ in range(2):
        assert call("machine", "--device", "cpu", "--parts", "device")[0] == 0
    assert len(list(Path().glob("machine_*.json"))) == 2


def test_golden_figures(shared, settings):
    """The first two; test_golden.py has them all."""
    m = machine.Machine(settings, None, 60.0, Path("m.json"))
    for name, found, expected in itertools.islice(machine.golden_figures(m, shared, torch.float32), 2):
        assert found == pytest.approx(expected, rel=1e-3), name


# ---- What predictions count


@pytest.mark.parametrize("protocol", ["replay", "single_pass"])
def test_a_pass_has_the_steps_that_a_batch_takes(settings, monkeypatch, protocol):
    run = settings.using(ttt_protocol=protocol)
    lengths = np.array([90, 70, 64, 33, 17, 16, 1])
    stream = t.synthetic_stream(lengths, run)
    batch = t.DocumentBatch(speed_model(run), stream, len(lengths), run)
    taken = []
    step = t.DocumentBatch._step
    monkeypatch.setattr(t.DocumentBatch, "_step", lambda self, s: (taken.append(s), step(self, s))[1])
    for label in speed.Plan.of(speed.H100(run.s), lengths, run).passes:
        batch.load(np.arange(len(lengths)))
        taken.clear()
        t.score_batch(label, batch, NoScores(), math.inf)
        counted = Counter()
        for train, documents, context, times in speed.steps_of_pass(label, lengths, run.s):
            for n, c in zip(documents.tolist(), context.tolist(), strict=True):
                counted[train, n, c] += times
        counted = Counter({shape: times for shape, times in counted.items() if shape[1]})
        assert counted == Counter((s.train, s.documents, s.context) for s in taken), label


class NoScores:
    targets = [None, None]  # rows of them

    def add(self, *_):
        pass


def speed_model(run: t.Run) -> t.GPT:
    model = t.scoring_model(run)
    speed.randomise(model)
    return model


def test_the_assumed_seconds_are_those_of_the_assumed_settings():
    cost = speed.H100(t.Settings(), host=0.0)

    def seconds(train, documents, context):
        return cost.seconds(train, np.array([documents]), np.array([context]))[0]

    assert [seconds(True, 64, 1792), seconds(True, 64, 0)] == pytest.approx([18.5e-3, 9.6e-3])
    assert seconds(True, 1, 0) == pytest.approx(2.5e-3)
    assert seconds(False, 1, 0) == pytest.approx(2.5e-3 / 3)
    slower = speed.H100(t.Settings(), slower=1.5, host=0.5)
    assert slower.seconds(True, np.array([1]), np.array([0]))[0] == 0.5
    more = speed.H100(t.Settings(**speed.RECOMMENDED))
    tokens = np.array([64]), np.array([0])
    assert more.seconds(True, *tokens)[0] > cost.seconds(True, *tokens)[0] / 4  # a quarter of the tokens


class OneSecond:
    """A cost of one second for each step, of `recording` for each new shape, of `drawing` for a document in a pass."""

    def __init__(self, recording: float = 0.0, drawing: float = 0.0):
        self.recording, self.drawing = recording, drawing

    def seconds(self, train, documents, context):
        return np.ones(len(documents))


def test_a_forecast_is_what_ranks_would_take(settings):
    run = settings.using(ttt_n_epochs=3, ttt_batch_size=1)
    lengths = np.array([64, 32, 16, 16])  # chunks of 16: 4, 2, 1, 1 steps a pass; 1 + 1 + 3 passes
    plan = speed.Plan.of(OneSecond(), lengths, run)
    alone = plan.forecast(1)
    assert (alone.all, alone.score, alone.balance, alone.longest) == (40, 16, 1, 12)
    two = plan.forecast(2)  # 4 | 2 1 1, the same again, then 12 | 6 3 3
    assert (two.all, two.score) == (20, 8)
    recorded = speed.Plan.of(OneSecond(10.0), lengths, run).forecast(1)
    assert (recorded.shapes, recorded.all) == (12, 160)  # one document, four contexts, three passes
    drawn = speed.Plan.of(OneSecond(drawing=5.0), lengths, run).forecast(1)
    assert (drawn.score, drawn.all) == (16 + 4 * 5, 40 + 2 * 4 * 5)  # none without adaptation
    assert alone.inside and not speed.Plan.of(OneSecond(10.0), lengths * 100, run).forecast(1).inside


def test_the_full_split_is_drawn_with_its_targets():
    sample = speed.lengths_of(None)
    drawn = speed.draw_documents(sample, "sample")
    assert len(drawn) == 400 and drawn.sum() == pytest.approx(40_000, rel=0.02) and (np.diff(drawn) <= 0).all()
    assert speed.draw_documents(sample, "pareto")[0] > drawn[0]


@pytest.mark.parametrize("targets", ["c_q,c_v", ",".join(t.LORA_TARGETS)])
def test_memory_is_that_of_the_tensors(settings, targets):
    run = settings.using(ttt_lora_targets=targets)
    found = speed.memory_of_document(run)
    stream = t.synthetic_stream([20], run)
    batch = t.DocumentBatch(speed_model(run), stream, 3, run)
    assert len(t.DocumentBatch(speed_model(run), stream, 1, run).kv) == 1  # without a companion, as nothing is compiled
    assert found["adapters"] == batch.adapters.flat[0].nbytes
    assert found["moments"] == batch.adapters.m[0].nbytes + batch.adapters.v[0].nbytes
    assert found["keys_and_values"] == batch.kv[0].nbytes / 2  # here in float32
    size = run.s.ttt_chunk_size
    both, one = (speed.bytes_saved(run, n, size) for n in (2, 1))
    assert found["saved_for_backward"] == pytest.approx(both - one, rel=0.01)
    fit = speed.documents_that_fit(8e9, sum(found.values()), run.s)
    assert 0.5 * 8e9 < fit * sum(found.values()) < 8e9
