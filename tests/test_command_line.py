"""`python train_gpt.py` and `torchrun … train_gpt.py` from outside: files, log, result.json, settings, exit codes."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import runs
import tools
from runs import train_gpt

UserError, Settings = train_gpt.UserError, train_gpt.Settings
N = r"-?\d+\.\d{8}"  # figures have 8 decimals
SCORE = rf"val_loss:({N}) val_bpb:({N})"
TIME = r"train_time:\d+ms step_avg:\d+\.\d+ms"


def command(folder: Path, launcher=(sys.executable,), **settings_) -> subprocess.CompletedProcess:
    """The command as a user types it."""
    env = dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1") | runs.environment(folder, **settings_)
    typed = [*launcher, str(runs.ROOT / "train_gpt.py")]
    return subprocess.run(typed, env=env, capture_output=True, text=True, timeout=120)


def torchrun(folder: Path, **settings_) -> subprocess.CompletedProcess:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return command(folder, launcher, **settings_)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> runs.Run:
    """A whole run with every default of the protocol."""
    return runs.run(tmp_path_factory.mktemp("reference"), SEED=5, TTT_N_EPOCHS=3)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> list[runs.Run]:
    """The same 20 steps at the record's learning rates on one rank and on two, side by side.

    One rank takes two micro-steps, so that both add up the same gradients; in another order a last bit would grow past
    1e-4 through Muon's bf16."""
    settings_ = dict(ITERATIONS=20, WARMDOWN_ITERS=10, TRAIN_LOG_EVERY=1, MICRO_BATCH_TOKENS=128)
    two = runs.ranks(tmp_path_factory.mktemp("two"), **settings_)
    one = runs.run(tmp_path_factory.mktemp("one"), **settings_)
    assert runs.codes(two) == [0, 0]
    return [one, two[0]]


# ---- A run from end to end


def test_the_plain_command_ends_with_code_0_and_the_line_that_the_fields_tools_read(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"final_int8_zlib_roundtrip_exact {SCORE}", last)


def test_a_run_leaves_exactly_the_promised_files_whole(reference):
    names = {path.name for path in reference.folder.iterdir() if not path.name.startswith("console.")}
    promised = {"train.log", "final_model.pt", "final_model.ptz", "result.json", "ttt_documents.npz"}
    assert names == promised | {"checkpoint.pt", "ttt_positions.npz", "sessions.json"} == set(train_gpt.FILES)
    state = torch.load(reference.folder / "final_model.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_log_lines_keep_the_forms_and_the_order_that_tools_of_the_field_parse(reference):
    train, val = rf"step:\d+/12 train_loss:{N} {TIME}", rf"step:\d+/12 {SCORE} {TIME}"
    epochs = "".join(rf"ttt_epoch:{e}/3 {SCORE}\n" for e in (1, 2, 3))
    ttt = rf"final_ttt_exact protocol:replay context:cached backward_looking_val_bpb:{N} last_epoch_val_bpb:{N}"
    order = rf"(?s).*^{val}\n.*^{train}\n.*^{val}\n.*^no_adaptation {SCORE}\n{epochs}.*^{ttt}\n"
    order += rf".*^final_int8_zlib_roundtrip_exact {SCORE}\Z"
    assert re.match(order, reference.log.strip(), re.MULTILINE)
    shown = [line for line in reference.lines if line.startswith("ttt_epoch:")]
    assert [line.split()[0] for line in shown] == ["ttt_epoch:1/3", "ttt_epoch:3/3"]  # and every tenth
    steps = [line for line in reference.lines if line.startswith("step:")]
    assert all(re.fullmatch(f"{train}|{val}", line) for line in steps) and steps[-1].startswith("step:12/12 val_loss")


def test_the_console_and_train_log_say_the_same_and_the_log_holds_the_source(reference):
    assert runs.ROOT.joinpath("train_gpt.py").read_text() in reference.log
    kept = iter(reference.log.splitlines())
    assert all(line in kept for line in reference.lines)  # in this order


def test_the_last_line_is_the_backward_looking_figure_not_the_last_epoch(reference):
    names = "final_int8_zlib", "ttt_epoch:1/", "ttt_epoch:3/", "final_ttt_exact"
    (_, last), (_, first), (_, third), (backward, last_epoch) = (reference.figures(name)[0] for name in names)
    assert last == backward == first and last_epoch == third != backward


def test_result_json_names_run_seed_source_settings_and_versions(reference):
    result = reference.result
    source = (runs.ROOT / "train_gpt.py").read_bytes()
    assert (result["schema_version"], result["seed"], result["world_size"], result["quantised"]) == (3, 5, 1, True)
    assert result["source_sha256"] == hashlib.sha256(source).hexdigest() and result["source_bytes"] == len(source)
    assert result["run_id"] and f"RUN_ID={result['run_id']}" in reference.log
    assert result["settings"]["ttt_n_epochs"] == 3 and "ttt_n_epochs" in result["overridden"]
    assert "eval_max_seconds" in result["settings"] and "eval_max_seconds" not in result["overridden"]
    assert {"python", "torch", "threads", "device", "dtype", "compile"} <= result["environment"].keys()
    assert result["training"]["steps"] == 12 and result["training"]["resumed"] is False
    assert all(re.fullmatch("[0-9a-f]{64}", result["data"][split]) for split in ("train", "validation"))
    stages = [(row["stage"], row["world_size"], row["ended"]) for row in result["sessions"]]
    assert stages == [("training", 1, "finished"), ("evaluation", 1, "finished")]
    assert all(row["seconds"] > 0 and row["devices"] == [platform.machine()] for row in result["sessions"])
    assert result["evaluation"]["at_least"] is False
    account = result["artifact"]
    assert account["model_bytes"] == len(reference.artifact) and account["fits"] is True and account["stretch"] == 1
    assert account["total_bytes"] == account["model_bytes"] + len(source) and account["code_bytes"] == len(source)
    assert account["sha256"] == result["weights_sha256"] == hashlib.sha256(reference.artifact).hexdigest()


def test_every_figure_of_result_json_says_how_it_was_made_and_covers_every_target(reference):
    evaluation, targets = reference.result["evaluation"], sum(runs.LENGTHS) - 1
    curve = evaluation["curve"]
    for figure in (evaluation["no_adaptation"], evaluation["backward_looking"], evaluation["last_epoch"], *curve):
        assert {"protocol", "context", "backward_looking", "val_loss", "val_bpb", "bytes", "seconds"} <= figure.keys()
        assert figure["targets"] == targets and figure["bytes"] == curve[0]["bytes"] and figure["lacking"] == 0
        bits = figure["val_loss"] * targets / math.log(2)
        assert figure["val_bpb"] == pytest.approx(bits / figure["bytes"], rel=1e-12)
    assert [figure["backward_looking"] for figure in curve] == [True, False, False]
    assert [figure["epoch"] for figure in curve] == [1, 2, 3] and evaluation["documents"] == len(runs.LENGTHS)
    assert evaluation["backward_looking"] == curve[0] and evaluation["last_epoch"] == curve[-1]
    assert evaluation["within_budget"] is True and 0 < evaluation["seconds"] < 600
    assert reference.result["val_bpb"] == pytest.approx(evaluation["backward_looking"]["val_bpb"], rel=1e-12)


def test_the_figures_per_document_add_up_to_those_of_the_log(reference):
    kept = np.load(reference.folder / "ttt_documents.npz")
    assert kept["index"].tolist() == list(range(len(runs.LENGTHS)))
    assert kept["targets"].tolist() == runs.LENGTHS[:-1] + [runs.LENGTHS[-1] - 1]
    assert kept["figures_finished"].tolist() == [3] * len(runs.LENGTHS)
    rows = [kept["nll_no_adaptation"], *kept["nll_per_epoch"]]
    printed = reference.figures("no_adaptation val") + reference.figures("ttt_epoch:")
    for nll, (loss, bpb) in zip(rows, printed, strict=True):
        assert nll.sum() / kept["targets"].sum() == pytest.approx(loss, abs=1e-8)
        assert nll.sum() / math.log(2) / kept["bytes"].sum() == pytest.approx(bpb, abs=1e-8)


def what_comes_next(run: runs.Run, copy: Path) -> list[str]:
    """Names of the tools that its last lines advise, each called as they say but on a copy of the run's folder."""
    shutil.copytree(run.folder, copy)
    (line,) = (line for line in run.lines if line.startswith("next: "))
    names = []
    for words in map(shlex.split, line.removeprefix("next: ").split("; ")):
        assert shutil.which(words[0])
        names.append(Path(words[1]).stem)
        arguments = [word.replace(str(run.folder), str(copy)) for word in words[2:]]
        assert tools.call(importlib.import_module(names[-1]), *arguments).code == 0
    return names


def test_what_it_says_to_type_next_works(tmp_path, reference):
    assert what_comes_next(reference, tmp_path / "copy") == ["audit", "plot"]
    assert (tmp_path / "copy" / "picture.png").exists()


def test_without_ttt_the_sliding_window_is_the_final_figure(tmp_path):
    done = runs.run(tmp_path / "run", TTT_ENABLED=0)
    assert what_comes_next(done, tmp_path / "copy") == ["plot"]
    ttt = [line for line in done.lines if line.startswith(("no_adaptation", "ttt_epoch", "final_ttt"))]
    (sliding,) = (line for line in done.lines if line.startswith("final_sliding_exact "))
    last = done.lines[-1]
    assert not ttt
    assert sliding.removeprefix("final_sliding_exact") == last.removeprefix("final_int8_zlib_roundtrip_exact")
    figure = done.result["evaluation"]["sliding"]
    assert figure["targets"] == sum(runs.LENGTHS) - 1 and figure["backward_looking"] is True
    assert done.result["evaluation"]["within_budget"] is True and figure["val_bpb"] == done.result["val_bpb"]


def test_single_pass_prints_the_same_figure_as_backward_looking_and_last(tmp_path, reference):
    protocol = dict(TTT_PROTOCOL="single_pass", TTT_CONTEXT="recompute")
    done = runs.run(tmp_path, EVAL_ONLY=reference.folder / "final_model.ptz", **protocol)
    (figures,) = done.figures("final_ttt_exact protocol:single_pass context:recompute")
    assert figures[0] == figures[1] == done.figures("final_int8_zlib")[0][1] and not done.figures("ttt_epoch:")


# ---- The export

WIDE = dict(MODEL_DIM=96, ITERATIONS=6, TTT_ENABLED=0)  # matrices of more than 8,192 numbers, which are quantised


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> runs.Run:
    return runs.run(tmp_path_factory.mktemp("wide"), **WIDE)


def standard_bpb(path: Path) -> float:
    """The standard evaluation of a file of weights, row by row, on the validation tokens."""
    run = runs.alone(**WIDE)
    stream = train_gpt.load_validation(run)
    s, state, _ = train_gpt.read_weights(path, run)
    model = train_gpt.GPT(s)
    model.load_state_dict(state)
    tokens, total = stream.tokens.long(), 0.0
    for start in range(0, stream.target_count, s.train_seq_len):
        row = tokens[None, start : start + s.train_seq_len + 1]
        with torch.no_grad():
            total += model(row[:, :-1], row[:, 1:]).double().sum().item()
    return total / math.log(2) / stream.byte_count


def test_what_quantisation_costs_is_the_standard_score_of_both_files(wide):
    found = {name: standard_bpb(wide.folder / f"final_model.{name}") for name in ("pt", "ptz")}
    (printed,) = wide.figures("export val_bpb")
    assert printed == pytest.approx([found["pt"], found["ptz"]], rel=1e-6) and found["pt"] != found["ptz"]
    kept = wide.result["artifact"]["val_bpb"]
    assert [kept["float"], kept["artifact"]] == pytest.approx(printed, abs=1e-8)
    assert wide.figures("step:6/6 val_loss")[0][1] == pytest.approx(found["pt"], rel=0.02)  # before averaging


def test_under_a_cap_that_binds_the_artifact_comes_within_half_a_percent_of_it(tmp_path, wide):
    free = wide.result["artifact"]
    for share in (0.97, 0.8):
        cap = free["code_bytes"] + int(share * free["model_bytes"])
        done = runs.run(tmp_path / str(share), ARTIFACT_MAX_BYTES=cap, **WIDE)
        account = done.result["artifact"]
        total = len(done.artifact) + len(train_gpt.SOURCE_BYTES)
        assert total == account["total_bytes"] and 0.995 * cap <= total <= cap and account["fits"] is True
        assert account["stretch"] > 1 == free["stretch"]
        print(f"figure: {total} bytes under a cap of {cap}, steps stretched by {account['stretch']:.3f}")


# ---- EVAL_ONLY


def test_an_artifact_alone_gives_the_same_figures_without_training_shards_or_model_settings(tmp_path, reference):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fineweb_val_000000.bin").symlink_to(runs.data() / "fineweb_val_000000.bin")
    shape = "NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT BIGRAM_VOCAB_SIZE BIGRAM_DIM VOCAB_SIZE"
    unset = dict.fromkeys(shape.split())
    artifact = reference.folder / "final_model.ptz"
    done = runs.run(tmp_path / "out", EVAL_ONLY=artifact, DATA_PATH=tmp_path / "data", SEED=5, TTT_N_EPOCHS=3, **unset)
    names = ("no_adaptation val", "ttt_epoch", "final_")
    kept = ([x for x in run.log.splitlines() if x.startswith(names)] for run in (done, reference))
    assert next(kept) == next(kept)
    assert done.result["training"] is None and done.result["artifact"] is None and done.result["quantised"] is True
    assert done.result["data"] == reference.result["data"] | dict(train=None)
    assert done.result["weights_sha256"] == reference.result["weights_sha256"]


def test_an_artifact_in_its_runs_folder_is_scored_as_that_run_did_where_the_environment_is_silent(tmp_path, reference):
    """Data, tokenizer and all settings of the evaluation; what the environment says goes before."""
    silent = dict.fromkeys([*runs.MICRO, "DATA_PATH", "TOKENIZER_PATH"]) | dict(DEVICE="cpu")
    silent["EVAL_ONLY"] = reference.folder / "final_model.ptz"
    done = runs.run(tmp_path / "silent", **silent)
    assert done.lines[-1] == reference.lines[-1]
    kinds = "train_seq_len", "eval_s", "eval_b", "eval_m", "val_", "ttt_", "data_path", "tokenizer_path", "seed", "beta"
    for name, value in reference.result["settings"].items():
        if name.startswith(kinds):
            assert done.result["settings"][name] == value, name
    floats = runs.run(tmp_path / "floats", **silent | dict(EVAL_ONLY=reference.folder / "final_model.pt"))
    assert floats.result["settings"]["model_dim"] == runs.MICRO["MODEL_DIM"]  # which no header tells
    said = dict(TTT_ENABLED=0, TRAIN_SEQ_LEN=24, VAL_DOCS=5)
    done = runs.run(tmp_path / "said", **silent | said)
    assert {name: int(done.result["settings"][name.lower()]) for name in said} == said
    assert done.result["evaluation"]["sliding"]["targets"] == sum(runs.LENGTHS[:5])


def test_relative_paths_of_a_run_are_found_from_anywhere(tmp_path, reference, monkeypatch):
    """From a folder above the run's, where it may have been started."""
    result = reference.result
    result["settings"] |= dict(data_path="data/mine", tokenizer_path="nowhere.model")
    for folder in ("project/data/mine", "project/runs/mine", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "project/runs/mine/result.json").write_text(json.dumps(result))
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(reference.folder / "final_model.ptz", tmp_path / "project/runs/mine")
    found = train_gpt.settings_beside("../project/runs/mine/final_model.ptz")["settings"]
    assert found["DATA_PATH"] == str(tmp_path / "project/data/mine") and found["TOKENIZER_PATH"] == "nowhere.model"


def test_a_result_beside_other_weights_than_its_own_says_nothing_of_them(tmp_path, reference):
    for name in ("final_model.ptz", "final_model.pt"):
        assert train_gpt.settings_beside(str(reference.folder / name))
        shutil.copy(reference.folder / "result.json", tmp_path)
        with open(shutil.copy(reference.folder / name, tmp_path), "ab") as f:
            f.write(b"0")
        assert not train_gpt.settings_beside(str(tmp_path / name))
    foreign = shutil.copy(reference.folder / "final_model.pt", tmp_path / "final_model.pt")
    (tmp_path / "result.json").write_text(json.dumps(reference.result | dict(artifact=None)))
    done = runs.run(tmp_path / "scored", EVAL_ONLY=foreign, TTT_ENABLED=0)
    assert f"note: no result.json of {foreign} beside it" in done.out


def test_a_program_is_called_by_its_name_only_where_that_leads_to_it(tmp_path, monkeypatch):
    """A virtual environment need not be active."""
    here = Path(sys.executable).parent
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setenv("PATH", f"{here}")
    assert train_gpt.python() == "python"
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    for path in (f"{tmp_path}:{here}", "/nowhere"):
        monkeypatch.setenv("PATH", path)
        assert train_gpt.python() == str(here / "python")
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python3")
    assert train_gpt.python() == "'/opt/my python/bin/python3'"


def test_data_with_a_tokenizer_of_its_own_is_read_by_that(tmp_path):
    done = runs.run(tmp_path, TOKENIZER_PATH=None, PRESET="tiny", ITERATIONS=1, TTT_ENABLED=0)
    assert done.result["settings"]["tokenizer_path"] == str(runs.data() / "tokenizer.model")
    assert f"TOKENIZER_PATH={runs.data() / 'tokenizer.model'}" in done.out  # of tiny the bundled one is usual


def test_a_package_that_is_missing_is_one_line(tmp_path):
    (tmp_path / "sentencepiece.py").write_text("raise ModuleNotFoundError('No module', name='sentencepiece')")
    done = command(tmp_path / "out", PYTHONPATH=tmp_path)
    assert done.returncode == 2 and "has no sentencepiece — install" in runs.user_error(done.stderr)


def test_a_state_dict_is_scored_as_it_is_and_labelled_unquantised(tmp_path, reference):
    done = runs.run(tmp_path, EVAL_ONLY=reference.folder / "final_model.pt", SEED=5)
    assert done.result["quantised"] is False and "unquantised" in done.out
    trained = reference.figures("step:12/12 val_loss")[0][1]  # standard rows, but the same weights
    assert done.figures("no_adaptation val")[0][1] == pytest.approx(trained, rel=0.01)


def test_a_variable_that_contradicts_the_artifact_is_an_error_naming_both_values(tmp_path, reference):
    done = runs.run(tmp_path, 2, EVAL_ONLY=reference.folder / "final_model.ptz", MODEL_DIM=32)
    message = runs.user_error(done.err)
    assert "MODEL_DIM=32" in message and "16" in message


@pytest.mark.parametrize("suffix", [".ptz", ".pt"])
def test_eval_only_of_a_missing_or_damaged_file_is_a_one_line_error(tmp_path, suffix):
    run = runs.alone()
    path = tmp_path / f"model{suffix}"
    for content in (b"", b"\x80\x04garbage" * 99):
        path.write_bytes(content)
        assert str(path) in error_of(lambda path=path: train_gpt.read_weights(path, run))
    for folder in (".", "/"):
        assert f"EVAL_ONLY={folder} is no file" in runs.user_error(runs.run(tmp_path, 2, EVAL_ONLY=folder).err)
    path.unlink()
    missing = runs.run(tmp_path / "out", 2, EVAL_ONLY=path, DEVICE="cuda")  # which is looked for later
    assert f"cannot use {path}: No such file" in runs.user_error(missing.err)


# ---- A folder belongs to one run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but the tests' consoles: what it holds and when it was written."""
    files = [path for path in folder.iterdir() if not path.name.startswith("console.")]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("name", train_gpt.FILES)
def test_a_folder_with_any_file_of_another_run_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("another run's")
    before = contents(tmp_path)
    message = error_of(lambda: train_gpt.open_folder(runs.alone(tmp_path)))
    assert (
        f"OUTPUT_DIR={tmp_path} " in message
        and name in message
        and ("RESUME=1" in message) == (name not in ("result.json", "final_model.ptz"))
    )
    assert contents(tmp_path) == before


def test_neither_a_second_run_nor_an_evaluation_gets_into_a_finished_runs_folder(tmp_path, reference):
    """Not of its own artifact either, nor with RESUME=1."""
    folder = shutil.copytree(reference.folder, tmp_path / "run")
    before = contents(folder)
    others = [dict(SEED=6), dict(ITERATIONS=3), dict(TTT_ENABLED=0), dict(DATA_PATH=tmp_path / "nowhere")]
    evaluations = [dict(EVAL_ONLY=folder / "final_model.ptz", RESUME=resume) for resume in (0, 1)]
    for settings_ in others + evaluations:
        done = runs.run(folder, 2, **settings_)
        message = runs.user_error(done.err)
        assert contents(folder) == before
        assert "OUTPUT_DIR" in message or "DATA_PATH" in settings_


def in_folder(folder: Path, before=None) -> None:
    """The run of a user who stands in a folder of their own."""
    os.chdir(folder)
    if before:
        before()


def test_a_run_without_a_name_makes_a_folder_of_its_own_and_a_resume_must_name_it(tmp_path):
    unnamed = dict(OUTPUT_DIR=None, ITERATIONS=1, TTT_ENABLED=0, before=functools.partial(in_folder, tmp_path))
    refused = runs.run(tmp_path / "no run yet", 2, RESUME=1, **unnamed)
    assert "OUTPUT_DIR to the run's folder" in runs.user_error(refused.err)
    pair = [runs.Run(tmp_path / name, **unnamed) for name in ("one", "other")]  # at the same time
    assert runs.codes(pair) == [0, 0]
    stem = f"{time.strftime('%Y-%m-%d')}_record_seed42"
    made = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert made == [stem, f"{stem}_2"] or time.strftime("%Y-%m-%d") not in stem  # midnight
    for name in made:
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert result["run_id"] == name
    refused = runs.run(tmp_path / "refused", 2, RESUME=1, **unnamed)
    assert all(f"OUTPUT_DIR=runs/{name}" in runs.user_error(refused.err) for name in made)
    named = runs.run(tmp_path / "named", RUN_ID="mine", **unnamed)
    assert (tmp_path / "runs" / "mine" / "result.json").exists() and "RUN_ID=mine" in named.out


def test_folders_of_one_day_are_numbered_from_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.alone("", SEED=2)
    made = [train_gpt.choose_folder(run) for _ in range(12)]
    assert made == [made[0], *(f"{made[0]}_{number}" for number in range(2, 13))]
    assert made[0].startswith("runs/20") and made[0].endswith("_record_seed2")
    assert {*made} == {*map(str, Path("runs").iterdir())}


def test_a_folder_in_use_is_refused_also_to_a_resume_and_to_one_of_two_starts_at_once(tmp_path):
    endless = dict(OUTPUT_DIR=tmp_path / "run", ITERATIONS=100_000, VAL_LOSS_EVERY=0)
    alive = [runs.Run(tmp_path / name, **endless) for name in ("one", "other")]
    while all(run.process.is_alive() for run in alive):
        time.sleep(0.02)
    (loser,) = (run for run in alive if not run.process.is_alive())
    (winner,) = (run for run in alive if run is not loser)
    assert loser.wait() == 2
    winner.until("step:5/")
    runs.user_error(loser.err)
    second = runs.run(tmp_path / "second", 2, RESUME=1, **endless)
    assert f"OUTPUT_DIR={tmp_path / 'run'} is in use by a live run" in runs.user_error(second.err)
    winner.kill(signal.SIGTERM)
    assert winner.wait() == 143
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    again = runs.Run(tmp_path / "again", RESUME=1, **endless)
    again.until("resumed from")  # the dead hold nothing
    again.kill()
    again.wait()
    assert before == (tmp_path / "run" / "checkpoint.pt").read_bytes()


# ---- Systems that lack what Linux has

LACKING = {
    "os": "uname fork forkpty getuid geteuid getloadavg sched_getaffinity posix_fallocate setsid killpg getpgid",
    "signal": "SIGHUP SIGKILL SIGSTOP SIGCONT SIGUSR1 pthread_kill sigwait pthread_sigmask",
    "select": "poll epoll",
}


def lack() -> None:
    """What Windows (all of it) and macOS (some) do not have; os.name stays, for Python's own sake."""
    for module, names in LACKING.items():
        for name in names.split():
            if hasattr(sys.modules[module], name):
                delattr(sys.modules[module], name)
    for module in ("resource", "pwd", "grp", "termios"):
        sys.modules[module] = None


def test_nothing_that_other_systems_lack_is_called(tmp_path):
    """Training, export, evaluation; another rank, whose signals and heartbeats it needs; a signal, and going on."""
    done = runs.run(tmp_path / "one", before=lack, SEED=5)
    assert done.result["val_bpb"] > 0
    assert runs.codes(runs.ranks(tmp_path / "two", before=lack)) == [0, 0]
    endless = runs.Run(tmp_path / "stopped", before=lack, ITERATIONS=100_000, VAL_LOSS_EVERY=0)
    endless.until("step:5/")
    endless.kill(signal.SIGTERM)
    assert endless.wait() == 143 and "RESUME=1" in endless.err


def test_a_folder_is_locked_on_windows_too(tmp_path, monkeypatch):
    """By a stand-in for msvcrt that does what its documentation says: a locked byte cannot be locked again."""
    locked = set()

    def locking(descriptor, mode, count):
        assert mode == 2 and count == 1
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in locked:
            raise OSError(36, "Resource deadlock avoided")
        locked.add(place)

    class Windows:
        name, SEEK_END = "nt", os.SEEK_END

    monkeypatch.setitem(sys.modules, "msvcrt", type("msvcrt", (), dict(locking=locking, LK_NBLCK=2)))
    monkeypatch.setattr(train_gpt, "os", Windows)
    with open(tmp_path / "log", "a") as first, open(tmp_path / "log", "a") as second:
        train_gpt.lock(first)
        first.write("a line")
        with pytest.raises(BlockingIOError):
            train_gpt.lock(second)
    assert (tmp_path / "log").read_text() == "a line"  # the byte that is locked is not one of the file's


def run_a_copy_that_is_edited_meanwhile() -> None:
    copy = Path(os.environ["OUTPUT_DIR"]).with_suffix(".py")
    shutil.copy(runs.ROOT / "train_gpt.py", copy)
    spec = importlib.util.spec_from_file_location("edited", copy)
    module = sys.modules["edited"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    copy.write_text(copy.read_text() + "# edited\n")
    train_gpt.entry = module.entry


def test_a_source_edited_while_it_runs_is_recorded_as_it_ran(tmp_path, reference):
    done = runs.run(tmp_path / "run", before=run_a_copy_that_is_edited_meanwhile, ITERATIONS=1, TTT_ENABLED=0)
    for name in ("source_sha256", "source_bytes"):
        assert done.result[name] == reference.result[name]
    assert "# edited" not in done.log and done.result["artifact"]["code_bytes"] == reference.result["source_bytes"]


# ---- Several ranks


def test_two_ranks_train_as_one_does(one_and_two):
    one, two = (run.figures("step:") for run in one_and_two)
    assert len(one) == len(two) > 20
    assert np.allclose([row[0] for row in one], [row[0] for row in two], rtol=0, atol=1e-6)


def test_two_ranks_end_with_the_figures_of_one(one_and_two):
    one, two = (run.figures("no_adaptation val") + run.figures("ttt_epoch") for run in one_and_two)
    assert np.allclose(one, two, rtol=1e-5)


def test_a_documents_score_does_not_depend_on_the_world_size(tmp_path, one_and_two):
    artifact = one_and_two[0].folder / "final_model.ptz"
    two = runs.ranks(tmp_path, EVAL_ONLY=artifact, TTT_BATCH_SIZE=3)
    assert runs.codes(two) == [0, 0]
    one = np.load(one_and_two[0].folder / "ttt_documents.npz")
    other = np.load(tmp_path / "ttt_documents.npz")
    for name in ("nll_no_adaptation", "nll_per_epoch"):
        assert np.allclose(one[name], other[name], rtol=1e-5)


# ---- Arguments


def with_arguments(arguments: list[str]) -> None:
    train_gpt.entry = functools.partial(train_gpt.entry, arguments)


def test_arguments_are_settings_and_win_over_the_environment(tmp_path):
    arguments = ["--ttt-n-epochs=2", "--SEED=7", "--iterations=1"]
    done = runs.run(tmp_path, before=functools.partial(with_arguments, arguments), SEED=5, TTT_ENABLED=0)
    kept = done.result["settings"]
    assert (kept["ttt_n_epochs"], kept["seed"], kept["iterations"]) == (2, 7, 1)
    assert {"ttt_n_epochs", "seed", "iterations"} <= set(done.result["overridden"])


@pytest.mark.parametrize("argument", ["--resume", "--seed", "seed=3", "SEED=3", "--sede=3", "--", "notes.txt", "-h"])
def test_any_other_argument_is_one_line_that_names_it(monkeypatch, argument):
    """Also a setting without a value, which the environment would take for an empty one."""
    monkeypatch.setattr(os, "environ", before := dict(os.environ))
    message = error_of(lambda: train_gpt.take_arguments([argument]))
    assert message.startswith(argument) and "--help" in message and before == os.environ and "RESUME" not in before


# ---- Settings


def error_of(work) -> str:
    """The text of the UserError that `work` must raise, checked for its form."""
    with pytest.raises(UserError) as caught:
        work()
    text = str(caught.value)
    assert " — " in text and "\n" not in text
    return text


@pytest.mark.parametrize(
    "variable, value, allowed",
    [
        ("ITERATIONS", "many", "int from 0 to 1e+30"), ("ITERATIONS", "", "int"), ("ITERATIONS", "1.5", "int"),
        ("ITERATIONS", "-1", "from 0"), ("NUM_LAYERS", "1", "from 2 to 256"), ("MATRIX_LR", "nan", "float from 0"),
        ("MATRIX_LR", "inf", "float"), ("BETA1", "1", "to 0.999"), ("MATRIX_LR", "0,02", "float"),
        ("RESUME", "yes", "one of 0, 1"), ("RESUME", "2", "one of 0, 1"), ("COMPILE", "7", "one of"),
        ("TTT_PROTOCOL", "Replay", "replay, single_pass"), ("PRESET", "small", "record, tiny"),
        ("PRUNE_FRACTION", "0.5", "to 0.15"), ("DEVICE", "gpu", "cuda, cpu, auto"),
        ("QUANTIZER", "obq", "gptq, nearest"), ("QUANT_SIGMAS", "3.4", "0 or two numbers"),
        ("QUANT_SIGMAS", "0.5,3", "from 1 to 99"), ("QUANT_SIGMAS", "3.4,100", "from 1 to 99"),
        ("QUANT_SIGMAS", "3,4,5", "k5,k6"),
        ("QUANT_SIGMAS", "-3,4", "two"), ("CALIBRATION_TOKENS", "0", "int from 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_variable_value_and_what_is_allowed(variable, value, allowed):
    message = error_of(lambda: Settings.from_env({variable: value}))
    assert f"{variable}={value} " in message and allowed in message


NAMES = [name.upper() for name in Settings.__dataclass_fields__]


@given(st.sampled_from(NAMES), st.text(st.characters(codec=None, exclude_characters="\0")))
@example("PRESET", "two\nlines")
@example("ITERATIONS", "9" * 5000)
@example("SEED", "1e999")
@settings(max_examples=600, deadline=None)
def test_no_value_of_a_variable_raises_anything_but_a_one_line_user_error(name, value):
    try:
        Settings.from_env({name: value})
    except UserError as e:
        assert " — " in str(e) and len(str(e).splitlines()) == 1 and name in str(e)


NUMBERS = sorted(n for n, f in Settings.__dataclass_fields__.items() if type(f.default) in (int, float))


EXTREME = [-1, 0.5, 1e-30, 2**31, 10**30, 1e300]


@given(st.dictionaries(st.sampled_from(NUMBERS), st.one_of(st.integers(0, 70), st.sampled_from(EXTREME))))
@settings(max_examples=600, deadline=None)
def test_no_combination_of_numbers_raises_anything_but_a_user_error(values):
    try:
        Settings.from_env({name.upper(): str(value) for name, value in values.items()})
    except UserError as e:
        assert " — " in str(e)


@pytest.mark.parametrize(
    "values",
    [
        dict(MODEL_DIM=100, NUM_HEADS=8), dict(NUM_HEADS=8, NUM_KV_HEADS=3),
        dict(TRAIN_BATCH_TOKENS=1000, TRAIN_SEQ_LEN=300), dict(MICRO_BATCH_TOKENS=100, TRAIN_SEQ_LEN=256),
        dict(TTT_MIXTURE_LR=0.5, TTT_MIXTURE=0),
        dict(TTT_LORA_TARGETS="c_v,c_q,c_v"),
        dict(TTT_CHUNK_SIZE=512, TTT_EVAL_SEQ_LEN=256), dict(MODEL_DIM=24, NUM_HEADS=8),
    ],
)  # fmt: skip
def test_values_that_clash_are_refused_naming_both(values):
    message = error_of(lambda: Settings.from_env({name: str(value) for name, value in values.items()}))
    assert all(f"{name}={value}" in message for name, value in values.items())


def test_a_stride_of_windows_is_judged_only_where_they_slide():
    values = dict(EVAL_STRIDE="4096", TRAIN_SEQ_LEN="2048")
    assert Settings.from_env(values).eval_stride == 4096
    message = error_of(lambda: Settings.from_env(values | dict(TTT_ENABLED="0")))
    assert "EVAL_STRIDE=4096" in message and "TRAIN_SEQ_LEN=2048" in message


def test_rows_that_do_not_divide_by_the_world_size_are_refused_naming_both(tmp_path):
    processes = runs.ranks(tmp_path, TRAIN_BATCH_TOKENS=32 * 7)
    assert runs.codes(processes) == [2, 2]
    message = runs.one_error(processes)
    assert "TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN=7" in message and "WORLD_SIZE=2" in message


def no_compiler() -> None:
    sys.modules["torch._dynamo"] = None  # to import it raises ImportError


def test_a_run_that_compiles_nothing_does_not_wait_for_the_compilers_import(tmp_path):
    """Two seconds and a half of a core, in each process."""
    assert runs.run(tmp_path, before=no_compiler).lines[-1].startswith("final_int8")


def test_misspelt_variables_are_reported_before_anything_can_fail_for_them(tmp_path):
    lines = [
        "warning: ITERATION is not a setting — did you mean ITERATIONS?",
        "warning: TTT_EPOCHS is not a setting — did you mean TTT_N_EPOCHS?",
    ]
    misspelt = dict(ITERATION=5, TTT_EPOCHS=1)
    done = runs.run(tmp_path / "failed", 2, DATA_PATH=tmp_path, **misspelt)
    assert done.lines == lines
    done = runs.run(tmp_path / "whole", ITERATIONS=1, TTT_ENABLED=0, **misspelt)
    assert done.lines[:2] == lines and all(done.log.count(line) == done.out.count(line) == 2 for line in lines)


def test_the_variables_of_shells_and_launchers_are_not_reported_as_misspelt():
    usual = "PATH HOME LANG TERM SHELL USER PWD RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR"
    usual += " MASTER_PORT OMP_NUM_THREADS CUDA_VISIBLE_DEVICES PYTHONPATH TORCHELASTIC_RUN_ID NCCL_DEBUG TMPDIR"
    usual += " TORCHELASTIC_MAX_RESTARTS"
    assert train_gpt.misspelt(dict.fromkeys(usual.split(), "1")) == []


def test_documented_defaults_are_the_specifications():
    s = Settings.from_env({})
    assert (s.iterations, s.train_batch_tokens, s.train_seq_len, s.matrix_lr, s.seed) == (20000, 786432, 2048, 0.02, 42)
    assert (s.max_wallclock_seconds, s.eval_max_seconds, s.ttt_n_epochs) == (600, 600, 50)
    assert (s.artifact_max_bytes, s.device) == (16_000_000, "cuda")


def test_tiny_is_a_preset_that_single_variables_override():
    s = Settings.from_env(dict(PRESET="tiny", MODEL_DIM="64"))
    assert s.model_dim == 64 and s.num_layers < 10 and s.iterations < 20000 and s.device == "auto"


# ---- Data and tokenizer that cannot be used, through the real process


def test_a_missing_shard_folder_ends_with_code_2_and_one_line(tmp_path):
    done = runs.run(tmp_path / "out", 2, DATA_PATH=tmp_path / "nowhere")
    assert "nowhere" in runs.user_error(done.err)


def test_under_torchrun_ranks_end_with_one_score(tmp_path):
    """torchrun itself, of which other tests make a fork."""
    done = torchrun(tmp_path, ITERATIONS=1, TTT_ENABLED=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final_int8_zlib_roundtrip_exact ") == 1 and "world_size:2" in done.stdout


def test_under_torchrun_a_bad_shard_is_reported_once_and_before_training(tmp_path):
    """torchrun itself: what it makes of a user's error, and that its own lines do not hide ours."""
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5, 299, 300])
    done = torchrun(tmp_path / "out", DATA_PATH=tmp_path)
    assert done.returncode != 0 and "token 300" in runs.user_error(done.stderr) and "VOCAB_SIZE=300" in done.stderr
    assert "step:" not in done.stdout
