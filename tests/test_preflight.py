"""The preflight: what would fail late fails before training step 0, outside both budgets, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

import runs
from runs import train_gpt

FILES = [
    name for name in train_gpt.FILES if name not in ("train.log", "sessions.json")
]  # those that a run writes whole
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> runs.Run:
    """A whole run; its process notes what is in its folder when training begins."""
    return runs.run(tmp_path_factory.mktemp("reference"), before=list_the_folder_before_training)


def list_the_folder_before_training() -> None:
    def train(trainer, stream, inner=train_gpt.Trainer.train):
        print("folder:", *sorted(path.name for path in trainer.run.folder.iterdir()), flush=True)
        return inner(trainer, stream)

    train_gpt.Trainer.train = train


# ---- A fault in a later stage


def plant(place: str) -> None:
    """Make a function or a method of the script raise."""

    def fault(*_, **__):
        raise RuntimeError("the planted fault")

    owner, _, name = place.rpartition(".")
    assert callable(getattr(owner := getattr(train_gpt, owner) if owner else train_gpt, name))
    setattr(owner, name, fault)


LATE = (
    ("evaluate_standard", {}), ("Trainer.save", {}), ("calibrate", {}), ("gptq", dict(MODEL_DIM=96)),
    ("nearest", dict(MODEL_DIM=96, QUANTIZER="nearest")), ("pack", {}), ("unpack", {}), ("make_artifact", {}),
    ("load_weights", {}), ("DocumentBatch.score", {}), ("Adapters.step", {}), ("DocumentBatch._push", {}),
    ("by_position", {}),
    ("DocumentBatch.adapt", dict(TTT_PROTOCOL="single_pass")), ("Scores.add", {}), ("time_spent", {}),
    ("evaluate_sliding", dict(TTT_ENABLED=0)), ("mixture", dict(TTT_MIXTURE=1)), ("Scores.remove", {}),
)  # fmt: skip


@pytest.mark.parametrize("place, settings", LATE, ids=[place for place, _ in LATE])
def test_a_fault_in_any_later_stage_ends_the_run_before_step_0(tmp_path, place, settings):
    done = runs.run(tmp_path, 1, before=functools.partial(plant, place), **settings)
    assert done.err.splitlines()[-1] == "RuntimeError: the planted fault"
    assert "model parameters" in done.out and "\nstep:" not in done.out and "preflight " not in done.out
    assert not any((tmp_path / name).exists() for name in FILES)


EVALUATION = [place for place in LATE if place[0] in ("Adapters.step", "evaluate_sliding", "Scores.remove")]


@pytest.mark.parametrize("place, settings", EVALUATION, ids=[place for place, _ in EVALUATION])
def test_a_fault_in_an_evaluation_alone_ends_it_before_the_load(tmp_path, reference, place, settings):
    artifact = reference.folder / "final_model.ptz"
    done = runs.run(tmp_path, 1, before=functools.partial(plant, place), EVAL_ONLY=artifact, **settings)
    assert done.err.splitlines()[-1] == "RuntimeError: the planted fault"
    assert "validation documents" in done.out and "evaluating" not in done.out


# ---- A fault of the folder


def test_a_folder_that_cannot_be_made_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        done = runs.run(tmp_path / "consoles", 2, OUTPUT_DIR=path)
        message = runs.user_error(done.err)
        assert f"cannot use {path}: " in message and "Traceback" not in done.err


def fill_the_disk(name: str) -> None:
    """The disk is full for one file."""

    def write(run, file, content, inner=train_gpt.Run.write):
        if file == name:
            (run.folder / f"{name}.tmp").symlink_to("/dev/full")
        inner(run, file, content)

    train_gpt.Run.write = write


@needs_full
@pytest.mark.parametrize("name", FILES)
def test_a_disk_too_full_for_any_file_of_the_run_ends_it_before_step_0(tmp_path, name):
    done = runs.run(tmp_path, 2, before=functools.partial(fill_the_disk, name))
    message = runs.user_error(done.err)
    assert f"{name} (" in message and "No space left" in message and "Traceback" not in done.err
    assert "\nstep:" not in done.out and not any((tmp_path / name).exists() for name in FILES)


@needs_full
@pytest.mark.parametrize("name", ["final_model.ptz", "result.json"])
def test_a_full_disk_ends_every_rank_with_one_line(tmp_path, name):
    processes = runs.ranks(tmp_path, before=functools.partial(fill_the_disk, name))
    assert runs.codes(processes) == [2, 2]
    assert name in runs.one_error(processes) and "\nstep:" not in processes[0].out


# ---- What it costs and leaves


def test_seconds_per_stage_are_in_the_log_and_in_result_json(reference):
    stages = ["training", "validation", "export", "evaluation"]
    seconds = reference.result["preflight"]
    assert list(seconds) == stages and all(isinstance(value, float) and 0 < value < 60 for value in seconds.values())
    (line,) = (line for line in reference.lines if line.startswith("preflight "))
    assert line == "preflight " + " ".join(f"{stage}:{seconds[stage]:.1f}s" for stage in stages)
    assert line in reference.log.splitlines()
    order = [reference.out.index(text) for text in ("model parameters", "warmup_step:1/1", line, "step:0/12 val_loss")]
    assert order == sorted(order)


def test_before_each_stage_a_line_says_how_long_it_will_take(tmp_path):
    lines = runs.run(tmp_path, WARMUP_STEPS=3).lines
    before = lines.index("preflight: every stage to come, once and in small")
    (expected,) = (line for line in lines if line.startswith("expected seconds of what follows: "))
    names = re.findall(r"(\w+):(\d+\.\d+)", expected)
    assert [name for name, _ in names] == ["training", "export", "evaluation_kernel_by_kernel"]
    assert all(0 < float(seconds) < 60 for _, seconds in names)
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step:0/"))
    assert before < lines.index(expected) < first_step
    # VAL_LOSS_EVERY=6 of 12 steps: once in between, neither before the first step nor after the last.
    assert sum(bool(re.fullmatch(r"about \d+s of training left", line)) for line in lines) == 1


def test_nothing_is_left_of_it_when_training_begins(reference):
    (line,) = (line for line in reference.lines if line.startswith("folder:"))
    assert [name for name in line.split()[1:] if not name.startswith("console.")] == ["sessions.json", "train.log"]
    names = {path.name for path in reference.folder.iterdir() if not path.name.startswith("console.")}
    assert names == set(train_gpt.FILES)


def test_two_ranks_leave_nothing_either(tmp_path):
    processes = runs.ranks(tmp_path, ITERATIONS=1, TTT_N_EPOCHS=1)
    assert runs.codes(processes) == [0, 0]
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("console.")} == set(train_gpt.FILES)


def test_it_trains_nothing_and_shows_none_of_its_own_figures(tmp_path, reference):
    """Whatever the number of its steps; and the log has every figure of the run once."""
    done = runs.run(tmp_path, WARMUP_STEPS=4)
    assert done.artifact == reference.artifact and done.lines[-1] == reference.lines[-1]
    for figure in ("no_adaptation val", "ttt_epoch:1/2", "ttt_epoch:2/2", "final_ttt_exact", "export model_bytes"):
        assert reference.log.count(f"\n{figure}") == 1


def test_it_gives_the_weights_and_moments_back_to_the_last_bit(tmp_path):
    """Two runs with the same preflight would agree on weights that it has rounded for its own artifact."""
    run = runs.alone(tmp_path)
    trainer = train_gpt.Trainer(train_gpt.open_shards("train", run), "", run)
    before = {name: tensor.clone() for name, tensor in trainer.tensors.items()}
    train_gpt.preflight(trainer, train_gpt.scoring_model(run), run)
    for name, tensor in trainer.tensors.items():
        assert tensor.equal(before[name]), name
    assert (trainer.step, trainer.averaged, trainer.elapsed, trainer.finished) == (0, 0, 0.0, False)


def slow_preflight() -> None:
    """Every adaptation of the preflight takes half a second more."""

    def adapt(batch, *arguments, inner=train_gpt.DocumentBatch.adapt, **named):
        time.sleep(0.5 * batch.run.folder.name.startswith("preflight_"))
        inner(batch, *arguments, **named)

    train_gpt.DocumentBatch.adapt = adapt


def test_of_an_evaluation_alone_it_comes_before_the_load_and_outside_the_budget(tmp_path, reference):
    settings = dict(EVAL_ONLY=reference.folder / "final_model.ptz", EVAL_MAX_SECONDS=20)
    done = runs.run(tmp_path, before=slow_preflight, **settings)
    seconds = done.result["preflight"]
    assert list(seconds) == ["evaluation"] and seconds["evaluation"] >= 0.5
    assert 0 <= done.out.index("preflight evaluation:") < done.out.index("evaluating ")
    report = done.result["evaluation"]
    assert report["seconds"] >= report["no_adaptation"]["seconds"] + report["backward_looking"]["seconds"] > 0
    assert report["within_budget"] is True and done.lines[-1] == reference.lines[-1]
    quick = runs.run(tmp_path / "quick", before=slow_preflight, **settings | dict(EVAL_MAX_SECONDS=0.4))
    assert quick.result["evaluation"]["seconds"] < quick.result["preflight"]["evaluation"]


def test_after_training_has_finished_a_resumed_run_rehearses_only_what_is_left(tmp_path, reference):
    for name in ("checkpoint.pt", "train.log"):
        (tmp_path / name).write_bytes((reference.folder / name).read_bytes())
    done = runs.run(tmp_path, RESUME=1)
    assert list(done.result["preflight"]) == ["export", "evaluation"] and done.lines[-1] == reference.lines[-1]


def sigterm_in_the_preflight() -> None:
    def score(batch, inner=train_gpt.DocumentBatch.score):
        assert batch.run.folder.name.startswith("preflight_")
        os.kill(os.getpid(), signal.SIGTERM)
        inner(batch)

    train_gpt.DocumentBatch.score = score


def test_a_signal_in_the_preflight_ends_the_run_and_the_same_command_with_resume_starts_it(tmp_path, reference):
    stopped = runs.run(tmp_path, 143, before=sigterm_in_the_preflight)
    assert "SIGTERM" in stopped.err and "Traceback" not in stopped.err and "\nstep:" not in stopped.out
    again = runs.run(tmp_path, RESUME=1)
    assert again.artifact == reference.artifact and again.lines[-1] == reference.lines[-1]
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("console.")}
    assert names == set(train_gpt.FILES)


# ---- DEVICE


def too_old_a_driver() -> None:
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    torch.cuda.init = init


def test_device_cuda_without_a_gpu_is_one_line_with_the_reason_and_code_2(tmp_path):
    done = runs.run(tmp_path, 2, before=too_old_a_driver, DEVICE="cuda")
    (line,) = done.err.splitlines()
    assert line == runs.user_error(done.err) and f"DEVICE=cuda, torch {torch.__version__}: " in line
    assert "driver on your system is too old (found version 11040). Please update it." in line
    assert not done.out and not (tmp_path / "train.log").exists()


def test_it_is_so_by_default_and_whatever_torchs_own_reason_is(tmp_path):
    done = runs.run(tmp_path, 2, DEVICE=None, CUDA_VISIBLE_DEVICES="")
    (line,) = done.err.splitlines()
    assert line == runs.user_error(done.err) and re.search(r"DEVICE=cuda, torch \S+: \w.{10,} — ", line)


def test_device_auto_goes_on_without_a_gpu_and_logs_why(tmp_path):
    done = runs.run(tmp_path, before=too_old_a_driver, DEVICE="auto", ITERATIONS=1, TTT_ENABLED=0)
    assert "on the CPU: The NVIDIA driver on your system is too old" in done.log
    assert done.result["environment"]["device_type"] == "cpu" and done.result["settings"]["device"] == "auto"


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_gpt.choose_device("cuda", 1) == (torch.device("cuda", 1), "")
    assert train_gpt.choose_device("cpu", 1) == (torch.device("cpu"), "DEVICE=cpu")
    with pytest.raises(
        train_gpt.UserError, match=r"DEVICE=cuda.* there are 2 GPUs, too few for the ranks here \(LOCAL_RANK=2\) — "
    ):
        train_gpt.choose_device("cuda", 2)
    too_few = (torch.device("cpu"), "there are 2 GPUs, too few for the ranks here (LOCAL_RANK=2)")
    assert train_gpt.choose_device("auto", 2) == too_few
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    device, _ = train_gpt.choose_device("auto", 0)
    assert device == torch.device("cpu")  # no rank takes a GPU where there are too few for all


# ---- What fits


@pytest.mark.parametrize("most, room", [(48, 48), (48, 47), (48, 5), (128, 1), (1, 9)])
def test_what_fits_is_found_by_halving_and_leaves_a_tenth_of_the_memory(monkeypatch, most, room):
    """A card that has room for so many at once, played on the CPU."""
    shares, tried = [], []
    monkeypatch.setattr(train_gpt.gc, "collect", lambda: None)  # of a test's process, a second
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 80))  # others have 20 of it
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def work(n):
        tried.append((n, shares[-1]))
        if n > room:
            raise torch.OutOfMemoryError("planted")

    found = train_gpt.most_that_fits(most, work, runs.alone())
    halves = [most >> i for i in range(most.bit_length())]
    assert found == next(n for n in halves if n <= room)
    assert tried == [(n, 0.9 * 60 / 80) for n in halves[: halves.index(found) + 1]] and shares[-1] == 1.0


class Together:
    """Two ranks that are threads, whose maximum waits for both."""

    def __init__(self):
        self.values, self.both = {}, threading.Barrier(2, timeout=20)

    def rank(self, number):
        ranks = train_gpt.Ranks()

        def largest(values):
            self.values[number] = values
            self.both.wait()
            return np.max([self.values[0], self.values[1]], axis=0)

        ranks.rank, ranks.world, ranks.max = number, 2, largest
        return ranks


def test_what_fits_on_one_rank_but_not_on_another_does_not_fit(monkeypatch):
    """All compute the same number at once, that of the rank with the least room."""
    for name in ("set_per_process_memory_fraction", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    together, found = Together(), {}

    def find(number, room):
        def work(n):
            if n > room:
                raise torch.OutOfMemoryError("planted")

        run = train_gpt.Run(runs.alone().s, together.rank(number))
        found[number] = train_gpt.most_that_fits(48, work, run)

    threads = [threading.Thread(target=find, args=place) for place in ((0, 30), (1, 13))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 12, 1: 12}


def test_where_a_single_row_does_not_fit_the_error_says_so(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(train_gpt.gc, "collect", lambda: None)
    run = runs.alone()
    run.ranks.stage = train_gpt.MEMORY["training_rows"]

    def work(n):
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError):
        train_gpt.most_that_fits(4, work, run)
    assert shares == [0.9, 1.0]
    assert run.ranks.stage[0] == "training, one at a time" and "NUM_LAYERS" in run.ranks.stage[1]


@pytest.mark.parametrize(
    "settings", [{}, dict(TTT_PROTOCOL="single_pass", TTT_CONTEXT="recompute"), dict(TTT_ENABLED=0)]
)
def test_what_is_tried_is_what_the_stages_compute_and_changes_nothing(monkeypatch, settings):
    """Every try runs, at the most and at one, and what is found is what the stages then use."""
    run = runs.alone(MICRO_BATCH_TOKENS=0, TTT_BATCH_SIZE=0, TRAIN_BATCH_TOKENS=32 * 48, EVAL_BATCH_SEQS=7, **settings)
    monkeypatch.setattr(train_gpt, "most_that_fits", lambda most, work, run: (work(most), work(1), 2)[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    trainer = train_gpt.Trainer(train_gpt.open_shards("train", run), "", run)
    before = trainer.state_dict()
    run.sessions = [dict(stage="training", ended="killed", seconds=1.0)]  # as of a run that goes on
    small = run.using()
    small.sessions = []
    run.fits = train_gpt.find_what_fits(trainer, train_gpt.scoring_model(run), small)
    last = "documents" if run.s.ttt_enabled else "sliding_windows"
    assert run.fits == dict.fromkeys(("training_rows", "validation_rows", last), 2)
    assert trainer.loader.micro_rows == 2 and [len(x) for x, _ in trainer.loader.batch(0)] == [2] * 24
    assert len(train_gpt.batch_documents(train_gpt.np.full(40, 9), run)[0]) == (2 if run.s.ttt_enabled else 4)
    assert not trainer.optimizer.grads.any()
    assert all(torch.equal(now, then) for now, then in zip(trainer.state_dict().values(), before.values(), strict=True))


def test_what_is_tried_has_room_for_the_scores_of_the_longest_document(monkeypatch):
    """Of each document of a batch: one of millions of targets costs gigabytes."""
    run, rooms = runs.alone(TTT_BATCH_SIZE=3), []
    run.longest = 5_000

    def load(batch, documents, inner=train_gpt.DocumentBatch.load):
        rooms.append(batch.nll.shape)
        return inner(batch, documents)

    monkeypatch.setattr(train_gpt, "most_that_fits", lambda most, work, run: work(most) or 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(train_gpt.DocumentBatch, "load", load)
    train_gpt.find_what_fits(None, train_gpt.scoring_model(run), run)
    assert rooms[-1][0] == 3 and rooms[-1][1] >= 5_000


def run_out_of_memory(owner: str, name: str) -> None:
    """From the end of the preflight on, which has no log."""
    inner = getattr(getattr(train_gpt, owner), name)

    def late(self, *arguments, **named):
        if self.run.log_file:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return inner(self, *arguments, **named)

    setattr(getattr(train_gpt, owner), name, late)


@pytest.mark.parametrize(
    "owner, name, stage, limit",
    [
        ("Trainer", "train_step", "training", "MICRO_BATCH_TOKENS"),
        ("DocumentBatch", "adapt", "test-time training", "TTT_BATCH_SIZE"),
    ],
)
def test_out_of_memory_later_is_one_line_that_says_how_to_go_on(tmp_path, owner, name, stage, limit):
    done = runs.run(tmp_path, 2, before=functools.partial(run_out_of_memory, owner, name))
    error = runs.user_error(done.err)
    assert f"error: out of memory in {stage}: CUDA out of memory. Tried to allocate 20 GiB — set {limit} lower" in error
    assert f", and go on with: RESUME=1 OUTPUT_DIR={tmp_path}" in error
