"""Several machines: launchers that share nothing end as one with the same ranks does, refuse to differ, and die
together.

Each machine is a folder with data and results of its own; a rank is a fork of the tests' server with the environment
that torchrun gives it. In one test torchrun's agent starts them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import runs
from runs import train_gpt

WIDE = dict(MODEL_DIM=96, ITERATIONS=6, TRAIN_BATCH_TOKENS=96 * 8, MICRO_BATCH_TOKENS=96, TTT_BATCH_SIZE=3)
TARGETS = sum(runs.LENGTHS) - 1


def machines(folder: Path, count: int = 2) -> tuple[list[Path], list[dict]]:
    """Folders of results, and settings, of machines that share nothing."""
    homes = [folder / f"machine {i}" for i in range(count)]
    each = [runs.machine(home) for home in homes]
    return [home / "run" for home in homes], each


def figures(run: runs.Run) -> list:
    """Every figure of result.json, to the last bit, and the last line."""
    evaluation = run.result["evaluation"]
    found = [
        figure["val_bpb"] for name, figure in evaluation.items() if isinstance(figure, dict) and "val_bpb" in figure
    ]
    return [*found, *(figure["val_loss"] for figure in evaluation.get("curve", ())), run.lines[-1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[runs.Run], list[runs.Run], tuple]:
    """The whole story with replay and mixture: on two machines, of one rank and of two, and by as many on one."""
    counts, folder = (1, 2), tmp_path_factory.mktemp("trained")
    folders, each = machines(folder)
    apart = runs.launch(folders, list(counts), each, TTT_MIXTURE=1, TTT_MIXTURE_LR=0.03, **WIDE)
    assert runs.codes(apart) == [0] * sum(counts)
    together = runs.ranks(folder / "one", sum(counts), TTT_MIXTURE=1, TTT_MIXTURE_LR=0.03, **WIDE)
    assert runs.codes(together) == [0] * sum(counts)
    return apart, together, counts


def test_two_machines_train_to_the_artifact_and_the_figures_of_one(trained):
    apart, together, counts = trained
    assert {"int5", "int6"} <= together[0].result["artifact"]["kinds"].keys()
    assert apart[0].artifact == together[0].artifact and figures(apart[0]) == figures(together[0])
    assert "mixture" in apart[0].result["evaluation"]["score"]
    for row in apart[0].result["sessions"]:
        assert row["world_size"] == len(row["devices"]) == sum(counts)
    assert not any(run.out or run.err for run in apart[1:])  # one log
    names = {path.name for path in apart[1].folder.iterdir()} if apart[1].folder.exists() else set()
    assert all(name.startswith("console.") for name in names)  # nothing of the run's is left on the second machine


@pytest.mark.parametrize(
    "changes",
    [
        dict(TTT_PROTOCOL="single_pass"),
        dict(TTT_ENABLED=0),
        dict(TTT_CONTEXT="recompute", TTT_LORA_TARGETS="c_k,mlp.fc"),
    ],
    ids=["single_pass", "sliding", "recompute"],
)
def test_two_machines_score_an_artifact_as_one_does(tmp_path, trained, changes):
    apart, together, counts = trained
    folders, each = machines(tmp_path)
    for home, own in zip(folders, each, strict=True):
        own["EVAL_ONLY"] = shutil.copy(apart[0].folder / "final_model.ptz", home.parent)
    first = runs.launch(folders, list(counts), each, **WIDE | changes)
    second = runs.ranks(tmp_path / "one", sum(counts), EVAL_ONLY=each[0]["EVAL_ONLY"], **WIDE | changes)
    assert runs.codes(first) + runs.codes(second) == [0] * 2 * sum(counts)
    assert figures(first[0]) == figures(second[0])


def test_two_machines_stopped_in_training_go_on_to_the_artifact_of_one_that_was_not(tmp_path):
    """One of them is told; the checkpoint is on the other."""
    settings = WIDE | dict(ITERATIONS=14, WARMDOWN_ITERS=8, TRAIN_LOG_EVERY=1, TTT_ENABLED=0)
    folders, each = machines(tmp_path)
    stopped = runs.launch(folders, [1, 1], each, **settings)
    stopped[0].until("step:5/14 train")
    stopped[1].kill(signal.SIGTERM)
    assert runs.codes(stopped) == [143, 143]
    for process in stopped:  # one line a machine
        (line,) = (line for line in process.err.splitlines() if "SIGTERM" in line)
        assert "go on with: RESUME=1 " in line
    again = runs.launch(folders, [1, 1], each, RESUME=1, **settings)
    together = runs.ranks(tmp_path / "one", 2, **settings)
    assert runs.codes(again) + runs.codes(together) == [0] * 4
    assert again[0].artifact == together[0].artifact and figures(again[0]) == figures(together[0])
    assert again[0].result["training"]["resumed"] is True and "step:4/14 train" not in again[0].out


# ---- What ranks must have in common


def another_source() -> None:
    train_gpt.SOURCE_SHA256 = "ab" * 32


def shard_less(home: Path) -> dict:
    own = runs.machine(home)
    (own["DATA_PATH"] / "fineweb_train_000001.bin").unlink()
    return own


def another_token(home: Path) -> dict:
    """In the middle of a shard."""
    return token_in_a_shard(home, 299)


def token_in_a_shard(home: Path, token: int) -> dict:
    own = runs.machine(home)
    path = own["DATA_PATH"] / "fineweb_train_000001.bin"
    tokens = train_gpt.open_shard(path)[:]
    tokens[777] = token
    runs.write_shard(path, tokens)
    return own


def documents_in_another_order(home: Path) -> dict:
    own = runs.machine(home)
    documents = np.split(runs.documents(runs.LENGTHS, 7), np.cumsum(runs.LENGTHS)[:-1])
    runs.write_shard(own["DATA_PATH"] / "fineweb_val_000000.bin", np.concatenate(documents[::-1]))
    return own


def another_tokenizer(home: Path) -> dict:
    """The same but for a field that SentencePiece does not know: number 200, of one byte."""
    own = runs.machine(home)
    with open(own["TOKENIZER_PATH"], "ab") as f:
        f.write(bytes([0xC2, 0x0C, 1, 0]))
    return own


DIFFERENCES = {
    "source": ("source", dict(before=another_source)),
    "seed": ("SEED", dict(SEED=7)),
    "learning rate": ("MATRIX_LR", dict(MATRIX_LR=0.021)),
    "protocol": ("TTT_PROTOCOL", dict(TTT_PROTOCOL="single_pass")),
    "compilation": ("compile", dict(COMPILE=1)),
    "training shard": ("train", shard_less),
    "training token": ("train", another_token),
    "validation order": ("validation", documents_in_another_order),
    "tokenizer": ("tokenizer", another_tokenizer),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_machines_that_differ_are_refused_with_one_line_each_before_training(tmp_path, name):
    word, difference = DIFFERENCES[name]
    folders, each = machines(tmp_path)
    each[1] = difference(folders[1].parent) if callable(difference) else each[1] | difference
    processes = runs.launch(folders, [1, 1], each)
    assert runs.codes(processes) == [2, 2]
    first, second = (runs.user_error(process.err) for process in processes)
    assert first == second and re.search(rf"rank 1 has (data of )?{word} \S+, rank 0 has \S+ — ", first)
    assert "step:" not in processes[0].out and not (folders[0] / "train.log").exists()


def test_other_data_are_found_where_the_launcher_names_no_machines(tmp_path):
    folders, each = machines(tmp_path)
    each[1] = another_token(folders[1].parent)
    processes = runs.launch(folders, [1, 1], [own | dict(GROUP_RANK=None, LOCAL_RANK=None) for own in each])
    assert runs.codes(processes) == [2, 2] and "rank 1 has data of train " in runs.one_error(processes)


def test_each_machine_reads_all_of_its_own_shards_before_training(tmp_path):
    folders, each = machines(tmp_path)
    each[1] = token_in_a_shard(folders[1].parent, 65535)
    processes = runs.launch(folders, [1, 1], each)
    assert runs.codes(processes) == [2, 2]
    for process in processes:
        assert "fineweb_train_000001.bin has token 65535 but VOCAB_SIZE=300" in runs.user_error(process.err)


# ---- Ends


def full_disk_under_scores() -> None:
    """Of the second rank, once it has scored a batch."""

    def add(scores, *arguments, inner=train_gpt.Scores.add):
        if scores.run.ranks.rank == 1 and scores.stream.target_count == TARGETS:
            raise OSError(28, "No space left on device", str(scores.path))
        inner(scores, *arguments)

    train_gpt.Scores.add = add


def test_what_fails_on_one_machine_is_told_on_each_with_how_to_go_on_there(tmp_path, whole):
    folders, each = machines(tmp_path)
    for home, own in zip(folders, each, strict=True):
        own["EVAL_ONLY"] = shutil.copy(whole.folder / "final_model.ptz", home.parent)
    processes = runs.launch(folders, [1, 1], each, before=full_disk_under_scores, **EVALUATION)
    assert runs.codes(processes) == [2, 2]
    first, second = (runs.user_error(process.err) for process in processes)
    assert first.startswith("error: rank 1: cannot use ") and second.startswith("error: cannot use ")
    for line, own in zip((first, second), each, strict=True):
        what, _, command = line.partition(", and go on with: ")
        assert ".bin: No space left" in what
        assert str(own["DATA_PATH"]) in command and "RESUME=1" in command


def stuck_in_the_second(patience: float) -> None:
    """Each rank adapts to one batch and takes for ever for the next; who is silent for `patience` seconds is dead."""
    train_gpt.PATIENCE, train_gpt.GRACE = patience, 3.0
    calls = itertools.count()

    def adapt(batch, *arguments, inner=train_gpt.DocumentBatch.adapt, **named):
        real = batch.stream.target_count == TARGETS  # not the preflight's
        while real and next(calls):
            time.sleep(0.05)
        inner(batch, *arguments, **named)
        if real:
            print("adapted", flush=True)

    train_gpt.DocumentBatch.adapt = adapt


EVALUATION = dict(TTT_BATCH_SIZE=1, TTT_N_EPOCHS=2, EVAL_MAX_SECONDS=0)
VICTIMS = dict(killed=([2], signal.SIGKILL), first_killed=([0], signal.SIGKILL), told=([1, 2], signal.SIGTERM))
VICTIMS |= dict(hangs=([1], signal.SIGSTOP), first_hangs=([0], signal.SIGSTOP))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    return runs.run(tmp_path_factory.mktemp("whole"), **EVALUATION)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, whole) -> dict:
    """Two machines, of one and two ranks, in the evaluation: something happens to the VICTIMS. What became of all, by
    name: processes, the others' codes, and the seconds that it took. Side by side, since they mostly wait."""
    found = {}
    scoring = EVALUATION | dict(EVAL_ONLY=whole.folder / "final_model.ptz")
    for name in VICTIMS:
        folders, each = machines(tmp_path_factory.mktemp(name))
        processes = runs.launch(folders, [1, 2], each, before=partial(stuck_in_the_second, 6.0), **scoring)
        found[name] = dict(processes=processes, folders=folders, each=each, scoring=scoring)
    for end in found.values():
        for process in end["processes"]:
            process.until("adapted", 240)
    for name, (victims, number) in VICTIMS.items():
        for rank in victims:
            found[name]["processes"][rank].kill(number)
    began = time.monotonic()
    while time.monotonic() < began + 100:
        for name, end in found.items():
            others = [
                process
                for rank, process in enumerate(end["processes"])
                if name == "told" or rank not in VICTIMS[name][0]
            ]
            if "seconds" not in end and not any(process.process.is_alive() for process in others):
                end.update(seconds=time.monotonic() - began, codes=[process.wait() for process in others])
        time.sleep(0.1)
        if all("seconds" in end for end in found.values()):
            break
    for end in found.values():
        for process in end["processes"]:
            process.kill()
            process.wait()
    return found


@pytest.mark.parametrize("name", ["killed", "first_killed", "hangs", "first_hangs"])
def test_a_rank_that_dies_or_hangs_in_the_evaluation_ends_all_others_within_a_minute(ended, name):
    end = ended[name]
    assert end["codes"] == [1, 1] and end["seconds"] < 60
    said = [line for process in end["processes"] for line in process.err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2 and all(
        "dead or out of reach" in line and " — go on with: RESUME=1 " in line for line in said
    )
    assert not any("Traceback" in process.err for process in end["processes"])
    print(f"figure: {name}: the others ended in {end['seconds']:.0f} s, where silence is death after 6 s")


def test_sigterm_to_one_machine_ends_the_other_too_with_one_line_each(ended):
    end = ended["told"]
    assert end["codes"] == [143] * 3 and end["seconds"] < 60
    for machine in (end["processes"][:1], end["processes"][1:]):
        lines = [line for process in machine for line in process.err.splitlines() if "SIGTERM" in line]
        assert len(lines) == 1 and "go on with: RESUME=1 " in lines[0], lines
    print(f"figure: SIGTERM to one of two machines ended both in {end['seconds']:.0f} s")


def announce() -> None:
    def adapt(batch, *arguments, inner=train_gpt.DocumentBatch.adapt, **named):
        inner(batch, *arguments, **named)
        if batch.stream.target_count == TARGETS:
            print("adapted", flush=True)

    train_gpt.DocumentBatch.adapt = adapt


@pytest.mark.parametrize("name", ["killed", "first_killed", "told"])
def test_what_was_scored_before_is_kept_and_goes_on_to_the_same_digits(ended, whole, name):
    end = ended[name]
    again = runs.launch(end["folders"], [2, 1], end["each"], before=announce, RESUME=1, **end["scoring"])
    assert runs.codes(again) == [0, 0, 0]
    assert figures(again[0]) == figures(whole)
    assert sum(process.out.count("adapted\n") for process in again) == 2 * len(runs.LENGTHS) - 3
    assert not list(end["folders"][0].glob("scores_*")) and not list(end["folders"][1].glob("scores_*"))


def soon() -> None:
    """Timers of ten seconds wait for one."""
    train_gpt.threading.Timer = lambda seconds, *rest, inner=threading.Timer: inner(seconds / 10, *rest)


def test_a_rank_without_its_peers_says_for_whom_it_waits_and_ends_on_a_signal(tmp_path):
    place = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    started = [runs.Run(tmp_path / str(i), before=soon, RANK=i, MASTER_PORT=runs.free_port(), **place) for i in (0, 1)]
    for alone in started:
        alone.until("wait", 60)
        assert "WORLD_SIZE=2" in alone.out or "of 2" in alone.out
        alone.kill(signal.SIGINT)
        assert alone.wait(20) == 130 and "Traceback" not in alone.err


# ---- torchrun


def dies_once() -> None:
    def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
        if number == 7 and self.run.ranks.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, number, multiplier)

    train_gpt.Optimizer.step = step


def by_torchrun(*arguments: str) -> None:
    """Instead of a run: torchrun with these arguments, whose ranks are forks of it."""
    dies_once()
    train_gpt.GRACE = 1.0

    def rank(entry=train_gpt.entry) -> None:
        sys.exit(entry())

    def torchrun() -> int:
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        multiprocessing.current_process().daemon = False  # may have children
        config, _, _ = config_from_args(parse_args([*arguments, "--start-method=fork", "train_gpt.py"]))
        elastic_launch(config, rank)()
        return 0

    train_gpt.entry = torchrun


def test_torchrun_starts_all_again_and_they_go_on_from_the_checkpoint(tmp_path):
    arguments = "--nproc_per_node=2", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    settings = dict(CHECKPOINT_EVERY=3, TRAIN_LOG_EVERY=1, TTT_ENABLED=0)
    job = runs.Run(tmp_path / "run", before=partial(by_torchrun, *arguments), **settings)
    together = runs.ranks(tmp_path / "one", **settings)
    assert runs.codes(together) == [0, 0]
    assert job.wait(240) == 0, job.err[-3000:]
    assert job.out.count("final_int8_zlib_roundtrip_exact") == 1  # two ranks write one log
    log = job.log
    assert "resumed from" in log and "at step 6" in log and "world_size:2" in log
    assert job.artifact == together[0].artifact
    assert log.splitlines()[-1] == together[0].lines[-1]
