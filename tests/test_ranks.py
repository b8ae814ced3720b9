"""Several machines: launchers that share nothing end as one with the same ranks does, refuse to differ, and die
together.

Each machine is a folder with data and results of its own; a rank is a fork of the tests' server with the environment
that torchrun gives it. Two tests use torchrun itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import runs
from runs import train_gpt

WIDE = dict(MODEL_DIM=96, ITERATIONS=6, TRAIN_BATCH_TOKENS=96 * 8, MICRO_BATCH_TOKENS=96, TTT_N_EPOCHS=2)
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


@pytest.fixture(scope="module", params=[(1, 1), (1, 2)], ids=["1+1", "1+2"])
def trained(request, tmp_path_factory) -> tuple[list[runs.Run], list[runs.Run], tuple]:
    """The whole story with replay and mixture: on two machines, and by as many ranks on one."""
    counts, folder = request.param, tmp_path_factory.mktemp("trained")
    folders, each = machines(folder)
    apart = runs.launch(folders, list(counts), each, TTT_MIXTURE=1, **WIDE)
    assert runs.codes(apart) == [0] * sum(counts)
    together = runs.ranks(folder / "one", sum(counts), TTT_MIXTURE=1, **WIDE)
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


# ---- What ranks must have in common


def another_source() -> None:
    train_gpt.SOURCE_SHA256 = "ab" * 32


def shard_less(home: Path) -> dict:
    own = runs.machine(home)
    (own["DATA_PATH"] / "fineweb_train_000001.bin").unlink()
    return own


def documents_in_another_order(home: Path) -> dict:
    own = runs.machine(home)
    documents = np.split(runs.documents(runs.LENGTHS, 7), np.cumsum(runs.LENGTHS)[:-1])
    runs.write_shard(own["DATA_PATH"] / "fineweb_val_000000.bin", np.concatenate(documents[::-1]))
    return own


def another_tokenizer(home: Path) -> dict:
    """Of the same pieces: only its normalisation rules differ."""
    from sentencepiece import sentencepiece_model_pb2

    own = runs.machine(home)
    path = own["TOKENIZER_PATH"]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    model.trainer_spec.model_prefix = "another"
    path.write_bytes(model.SerializeToString())
    return own


DIFFERENCES = {
    "source": ("source", dict(before=another_source)),
    "seed": ("SEED", dict(SEED=7)),
    "learning rate": ("MATRIX_LR", dict(MATRIX_LR=0.021)),
    "protocol": ("TTT_PROTOCOL", dict(TTT_PROTOCOL="single_pass")),
    "compilation": ("compile", dict(COMPILE=1)),
    "training shard": ("train", shard_less),
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


def test_machines_that_score_different_weights_are_refused(tmp_path, trained):
    """Each has a file of its own; only the first one's is read, and that is what all score."""
    apart, _, _ = trained
    folders, each = machines(tmp_path)
    for home, own in zip(folders, each, strict=True):
        own["EVAL_ONLY"] = shutil.copy(apart[0].folder / "final_model.ptz", home.parent)
    Path(each[1]["EVAL_ONLY"]).write_bytes(b"of another run")
    settings = WIDE | dict(TTT_ENABLED=0)
    processes = runs.launch(folders, [1, 1], each, **settings)
    assert runs.codes(processes) == [0, 0]
    assert processes[0].result["weights_sha256"] == apart[0].result["weights_sha256"]


# ---- Ends


def slow(seconds: float, patience: float = 45.0) -> None:
    """Every batch that is adapted takes so much longer; a rank that is silent for `patience` is dead."""
    train_gpt.PATIENCE = patience
    adapt = train_gpt.DocumentBatch.adapt

    def slowly(batch, *arguments):
        deadline = time.monotonic() + seconds * (batch.stream.target_count == TARGETS)
        while time.monotonic() < deadline:
            time.sleep(0.05)
        adapt(batch, *arguments)
        if batch.stream.target_count == TARGETS:
            print("adapted", *batch.documents, flush=True)

    train_gpt.DocumentBatch.adapt = slowly


EVALUATION = dict(TTT_BATCH_SIZE=1, TTT_N_EPOCHS=2, EVAL_MAX_SECONDS=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    return runs.run(tmp_path_factory.mktemp("whole"), **EVALUATION)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, whole) -> dict:
    """Two machines of two ranks each in the evaluation, side by side: a rank killed, the first rank killed, a machine
    told to end, a rank that hangs. What became of them by name: processes, codes and the seconds that it took."""
    wounds = dict(killed=(3, signal.SIGKILL), first_killed=(0, signal.SIGKILL), told=(2, signal.SIGTERM))
    wounds |= dict(hangs=(1, signal.SIGSTOP), first_hangs=(0, signal.SIGSTOP))
    found = {}
    for name, (victim, number) in wounds.items():
        folders, each = machines(tmp_path_factory.mktemp(name))
        processes = runs.launch(
            folders,
            [2, 2],
            each,
            before=partial(slow, 1.0, 10.0),
            EVAL_ONLY=whole.folder / "final_model.ptz",
            **EVALUATION,
        )
        for process in (processes[0], processes[3]):
            process.until("adapted ", 120)
        began = time.monotonic()
        victims = [victim, 3] if name == "told" else [victim]
        for rank in victims:
            processes[rank].kill(number)
        codes = {rank: process.wait() for rank, process in enumerate(processes) if rank != victim or name == "told"}
        seconds = time.monotonic() - began
        processes[victim].kill()
        processes[victim].wait()
        found[name] = dict(processes=processes, codes=codes, seconds=seconds, folders=folders, each=each)
    return found


@pytest.mark.parametrize("name", ["killed", "first_killed", "hangs", "first_hangs"])
def test_a_rank_that_dies_or_hangs_in_the_evaluation_ends_all_others_within_a_minute(ended, name):
    end = ended[name]
    assert set(end["codes"].values()) == {1} and end["seconds"] < 60
    said = [line for process in end["processes"] for line in process.err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2 and all("dead or out of reach" in line for line in said)  # at most one a machine
    assert not any("Traceback" in process.err for process in end["processes"])
    print(f"figure: {name}: the others ended in {end['seconds']:.0f} s")


def test_sigterm_to_one_machine_ends_the_other_too_with_one_line_each(ended):
    end = ended["told"]
    assert set(end["codes"].values()) == {143} and end["seconds"] < 60
    for pair in (end["processes"][:2], end["processes"][2:]):
        lines = [line for process in pair for line in process.err.splitlines() if "SIGTERM" in line]
        assert len(lines) == 1 and "RESUME=1" in lines[0], lines
    print(f"figure: SIGTERM to one of two machines ended both in {end['seconds']:.0f} s")


@pytest.mark.parametrize("name", ["killed", "first_killed", "told", "hangs"])
def test_what_was_scored_before_is_kept_and_goes_on_to_the_same_digits(ended, whole, name):
    end = ended[name]
    done = [line for process in end["processes"] for line in process.lines if line.startswith("adapted ")]
    again = runs.launch(
        end["folders"], [2, 1], end["each"], before=partial(slow, 0.0), RESUME=1,
        EVAL_ONLY=whole.folder / "final_model.ptz", **EVALUATION,
    )  # fmt: skip
    assert runs.codes(again) == [0, 0, 0]
    assert figures(again[0]) == figures(whole)
    once_more = [line for process in again for line in process.lines if line.startswith("adapted ")]
    batches = 2 * len(runs.LENGTHS)  # for the score, and all epochs
    assert len(once_more) <= batches - len(done) + 4  # a batch in work of each rank
    assert not list(end["folders"][0].glob("scores_*")) and not list(end["folders"][1].glob("scores_*"))


def test_a_rank_without_its_peers_says_for_whom_it_waits_and_ends_on_a_signal(tmp_path):
    for rank in (0, 1):
        alone = runs.launch([tmp_path / str(rank)], [1], RANK=rank, WORLD_SIZE=2, MASTER_PORT=runs.free_port())[0]
        alone.until("wait", 60)
        assert "WORLD_SIZE=2" in alone.out or "of 2" in alone.out
        alone.kill(signal.SIGINT)
        assert alone.wait(20) == 130 and "Traceback" not in alone.err


# ---- torchrun


def torchrun(folder: Path, *arguments: str, script: Path = runs.ROOT / "train_gpt.py", **settings) -> subprocess.Popen:
    env = dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1") | runs.environment(folder, **settings)
    typed = [sys.executable, "-m", "torch.distributed.run", *arguments, str(script)]
    with open(folder.with_suffix(".console"), "w") as console:
        return subprocess.Popen(typed, env=env, stdout=console, stderr=console)


DIES_ONCE = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt

def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
    if number == 7 and self.run.ranks.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return inner(self, number, multiplier)

train_gpt.Optimizer.step = step
sys.exit(train_gpt.entry())
"""


def test_torchrun_starts_all_again_and_they_go_on_from_the_checkpoint(tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE.format(root=str(runs.ROOT)))
    arguments = "--standalone", "--nproc_per_node=2", "--max-restarts=2"
    settings = dict(CHECKPOINT_EVERY=3, TRAIN_LOG_EVERY=1, TTT_N_EPOCHS=2)
    job = torchrun(tmp_path / "run", *arguments, script=script, **settings)
    together = runs.ranks(tmp_path / "one", **settings)
    assert runs.codes(together) == [0, 0]
    assert job.wait(240) == 0, (tmp_path / "run.console").read_text()[-3000:]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "resumed from" in log and "at step 6" in log
    assert (tmp_path / "run" / "final_model.ptz").read_bytes() == together[0].artifact
    assert log.splitlines()[-1] == together[0].lines[-1]
