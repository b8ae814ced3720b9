"""`python train_gpt.py` and `torchrun … train_gpt.py` from outside: files, log, result.json, settings, exit codes (SPEC section 6)."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import train_gpt

UserError, Settings = train_gpt.UserError, train_gpt.Settings
N = r"-?\d+\.\d{8}"  # figures have 8 decimals
SCORE = rf"val_loss:({N}) val_bpb:({N})"
TIME = r"train_time:\d+ms step_avg:\d+\.\d+ms"


def command(folder: Path, launcher=(sys.executable,), **settings_) -> subprocess.CompletedProcess:
    """The command as a user types it."""
    env = dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1") | runs.environment(folder, **settings_)
    return subprocess.run([*launcher, str(runs.ROOT / "train_gpt.py")], env=env, capture_output=True, text=True, timeout=120)


def torchrun(folder: Path, **settings_) -> subprocess.CompletedProcess:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return command(folder, launcher, **settings_)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> runs.Run:
    """A whole run with every default of the protocol and an audit."""
    return runs.run(tmp_path_factory.mktemp("reference"), TTT_AUDIT=2, SEED=5)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> list[runs.Run]:
    """The same 20 steps at the record's learning rates on one rank and on two, side by side. One rank takes two micro-steps, so
    that both add up the same gradients; in another order a last bit would grow past 1e-4 through Muon's bf16."""
    settings_ = dict(ITERATIONS=20, WARMDOWN_ITERS=10, TRAIN_LOG_EVERY=1, TTT_AUDIT=1, MICRO_BATCH_TOKENS=128)
    two = runs.ranks(tmp_path_factory.mktemp("two"), **settings_)
    one = runs.run(tmp_path_factory.mktemp("one"), **settings_)
    assert [process.wait() for process in two] == [0, 0], two[0].err + two[1].err
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
    assert promised <= names <= promised | {"checkpoint.pt"}
    state = torch.load(reference.folder / "final_model.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_log_lines_keep_the_forms_and_the_order_that_tools_of_the_field_parse(reference):
    train, val = rf"step:\d+/12 train_loss:{N} {TIME}", rf"step:\d+/12 {SCORE} {TIME}"
    epochs = "".join(rf"ttt_epoch:{e}/3 {SCORE}\n" for e in (1, 2, 3))
    order = rf"(?s).*^{val}\n.*^{train}\n.*^{val}\n.*^no_adaptation {SCORE}\n{epochs}.*^final_ttt_exact protocol:replay "
    order += rf"context:cached backward_looking_val_bpb:{N} last_epoch_val_bpb:{N}\n.*^final_int8_zlib_roundtrip_exact {SCORE}\Z"
    assert re.match(order, reference.out.strip(), re.MULTILINE)
    steps = [line for line in reference.lines if line.startswith("step:")]
    assert all(re.fullmatch(f"{train}|{val}", line) for line in steps) and steps[-1].startswith("step:12/12 val_loss")


def test_the_console_and_train_log_say_the_same_and_the_log_holds_the_source(reference):
    assert runs.ROOT.joinpath("train_gpt.py").read_text() in reference.log
    kept = iter(reference.log.splitlines())
    assert all(line in kept for line in reference.lines)  # in this order


def test_the_last_line_is_the_backward_looking_figure_not_the_last_epoch(reference):
    (_, last), first, (backward, last_epoch) = (
        reference.figures(name)[0] for name in ("final_int8_zlib", "ttt_epoch:1/", "final_ttt_exact")
    )
    assert last == backward == first[1] and last_epoch == reference.figures("ttt_epoch:3/")[0][1] != backward


def test_result_json_names_run_seed_source_settings_and_versions(reference):
    result = reference.result
    assert result["schema_version"] == 1 and result["seed"] == 5 and result["world_size"] == 1 and result["quantised"] is True
    assert result["source_sha256"] == hashlib.sha256((runs.ROOT / "train_gpt.py").read_bytes()).hexdigest()
    assert result["settings"]["ttt_n_epochs"] == 3 and "ttt_n_epochs" in result["overridden"]
    assert {"python", "torch", "threads"} <= result["environment"].keys()
    assert result["training"]["steps"] == 12 and result["training"]["resumed"] is False
    account = result["artifact"]
    assert account["model_bytes"] == len(reference.artifact) and account["fits"] is True
    assert account["total_bytes"] == account["model_bytes"] + (runs.ROOT / "train_gpt.py").stat().st_size


def test_every_figure_of_result_json_says_how_it_was_made_and_covers_every_target(reference):
    evaluation, targets = reference.result["evaluation"], sum(runs.LENGTHS) - 1
    curve = evaluation["curve"]
    for figure in (evaluation["no_adaptation"], evaluation["backward_looking"], evaluation["last_epoch"], *curve):
        assert {"protocol", "context", "backward_looking", "val_loss", "val_bpb", "bytes"} <= figure.keys()
        assert figure["targets"] == targets and figure["bytes"] == curve[0]["bytes"]
        assert figure["val_bpb"] == pytest.approx(figure["val_loss"] * targets / math.log(2) / figure["bytes"], rel=1e-12)
    assert [figure["backward_looking"] for figure in curve] == [True, False, False]
    assert evaluation["within_budget"] is True and evaluation["unfinished_documents"] == []
    assert reference.result["val_bpb"] == pytest.approx(evaluation["backward_looking"]["val_bpb"], rel=1e-12)


def test_the_audit_shows_no_leak_in_backward_looking_figures_and_one_in_the_last_epoch(reference):
    rows = reference.result["evaluation"]["audit"]
    assert len({row["document"] for row in rows}) == 2
    assert all(row["change"] == 0 for row in rows if row["backward_looking"])
    assert all(row["change"] > 0 for row in rows if not row["backward_looking"])


def test_the_figures_per_document_add_up_to_those_of_the_log(reference):
    kept = np.load(reference.folder / "ttt_documents.npz")
    assert kept["index"].tolist() == list(range(len(runs.LENGTHS)))
    assert kept["targets"].tolist() == runs.LENGTHS[:-1] + [runs.LENGTHS[-1] - 1]
    rows = [kept["nll_no_adaptation"], *kept["nll_per_epoch"]]
    printed = reference.figures("no_adaptation") + reference.figures("ttt_epoch:")
    for nll, (loss, bpb) in zip(rows, printed, strict=True):
        assert nll.sum() / kept["targets"].sum() == pytest.approx(loss, abs=1e-8)
        assert nll.sum() / math.log(2) / kept["bytes"].sum() == pytest.approx(bpb, abs=1e-8)


def test_without_ttt_the_sliding_window_is_the_final_figure(tmp_path):
    done = runs.run(tmp_path, TTT_ENABLED=0)
    assert "ttt" not in done.lines[-1] and not any(line.startswith(("no_adaptation", "ttt_epoch")) for line in done.lines)
    assert done.lines[-2].removeprefix("final_sliding_exact") == done.lines[-1].removeprefix("final_int8_zlib_roundtrip_exact")
    assert done.result["evaluation"]["sliding"]["targets"] == sum(runs.LENGTHS) - 1


def test_single_pass_prints_the_same_figure_as_backward_looking_and_last(tmp_path, reference):
    done = runs.run(tmp_path, EVAL_ONLY=reference.folder / "final_model.ptz", TTT_PROTOCOL="single_pass", TTT_CONTEXT="recompute")
    (figures,) = done.figures("final_ttt_exact protocol:single_pass context:recompute")
    assert figures[0] == figures[1] == done.figures("final_int8_zlib")[0][1] and not done.figures("ttt_epoch:")


# ---- EVAL_ONLY


def test_an_artifact_alone_gives_the_same_figures_without_training_shards_or_model_settings(tmp_path, reference):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fineweb_val_000000.bin").symlink_to(runs.data() / "fineweb_val_000000.bin")
    unset = dict.fromkeys("NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT BIGRAM_VOCAB_SIZE BIGRAM_DIM VOCAB_SIZE".split())
    artifact = reference.folder / "final_model.ptz"
    done = runs.run(tmp_path / "out", EVAL_ONLY=artifact, DATA_PATH=tmp_path / "data", SEED=5, **unset)
    names = ("no_adaptation", "ttt_epoch", "final_")
    assert [x for x in done.lines if x.startswith(names)] == [x for x in reference.lines if x.startswith(names)]
    assert done.result["training"] is None and done.result["quantised"] is True


def test_a_state_dict_is_scored_as_it_is_and_labelled_unquantised(tmp_path, reference):
    done = runs.run(tmp_path, EVAL_ONLY=reference.folder / "final_model.pt", SEED=5)
    assert done.result["quantised"] is False and "unquantised" in done.out
    trained = reference.figures("step:12/12 val_loss")[0][1]  # standard rows, but the same weights
    assert done.figures("no_adaptation")[0][1] == pytest.approx(trained, rel=0.01)


def test_a_variable_that_contradicts_the_artifact_is_an_error_naming_both_values(tmp_path, reference):
    done = runs.run(tmp_path, 2, EVAL_ONLY=reference.folder / "final_model.ptz", MODEL_DIM=32)
    message = runs.user_error(done.err)
    assert "MODEL_DIM=32" in message and "16" in message


@pytest.mark.parametrize("suffix", [".ptz", ".pt"])
def test_eval_only_of_a_missing_or_damaged_file_is_a_one_line_error(tmp_path, suffix, monkeypatch):
    runtime = one_process(monkeypatch)
    for content in (None, b"", b"\x80\x04garbage" * 99):
        path = tmp_path / f"model{suffix}"
        if content is not None:
            path.write_bytes(content)
        assert str(path) in error_of(lambda path=path: train_gpt.load_model(path, runs.micro(), runtime))


# ---- Several ranks


def test_two_ranks_train_as_one_does(one_and_two):
    one, two = (run.figures("step:") for run in one_and_two)
    assert len(one) == len(two) > 20
    assert np.allclose([row[0] for row in one], [row[0] for row in two], rtol=0, atol=1e-6)


def test_two_ranks_end_with_the_figures_of_one(one_and_two):
    one, two = (run.figures("no_adaptation") + run.figures("ttt_epoch") for run in one_and_two)
    assert np.allclose(one, two, rtol=1e-5)


def test_a_documents_score_does_not_depend_on_the_world_size(tmp_path, one_and_two):
    artifact = one_and_two[0].folder / "final_model.ptz"
    two = runs.ranks(tmp_path, EVAL_ONLY=artifact, TTT_BATCH_SIZE=3)
    assert [process.wait() for process in two] == [0, 0], two[0].err
    one = np.load(one_and_two[0].folder / "ttt_documents.npz")
    other = np.load(tmp_path / "ttt_documents.npz")
    for name in ("nll_no_adaptation", "nll_per_epoch"):
        assert np.allclose(one[name], other[name], rtol=1e-5)


def test_torchrun_with_two_ranks_writes_one_log(tmp_path):
    done = torchrun(tmp_path, TTT_N_EPOCHS=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("final_int8_zlib_roundtrip_exact") == 1
    assert "world_size:2" in (tmp_path / "train.log").read_text()


# ---- Settings


def one_process(monkeypatch) -> train_gpt.Runtime:
    """A Runtime of this process that leaves its signal handlers alone."""
    monkeypatch.setattr(train_gpt.signal, "signal", lambda *_: None)
    return train_gpt.Runtime(runs.micro())


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
        ("ITERATIONS", "many", "int from 0 up"), ("ITERATIONS", "", "int"), ("ITERATIONS", "1.5", "int"), ("ITERATIONS", "-1", "from 0"),
        ("NUM_LAYERS", "1", "from 2 to 256"), ("MATRIX_LR", "nan", "float from 0"), ("MATRIX_LR", "inf", "float"), ("BETA1", "1", "to 0.999"),
        ("MATRIX_LR", "0,02", "float"), ("RESUME", "yes", "0 or 1"), ("RESUME", "2", "0 or 1"), ("COMPILE", "7", "one of"),
        ("TTT_PROTOCOL", "Replay", "replay, single_pass"), ("PRESET", "small", "record, tiny"), ("PRUNE_FRACTION", "0.5", "to 0.15"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_variable_value_and_what_is_allowed(variable, value, allowed):
    message = error_of(lambda: Settings.from_env({variable: value}))
    assert f"{variable}={value} " in message and allowed in message


@given(st.sampled_from([f.upper() for f in Settings.__dataclass_fields__]), st.text(st.characters(codec=None, exclude_characters="\0")))
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


@given(st.dictionaries(st.sampled_from(NUMBERS), st.one_of(st.integers(0, 70), st.sampled_from([-1, 0.5, 1e-30, 2**31, 10**30, 1e300]))))
@settings(max_examples=600, deadline=None)
def test_no_combination_of_numbers_raises_anything_but_a_user_error(values):
    try:
        Settings.from_env({name.upper(): str(value) for name, value in values.items()})
    except UserError as e:
        assert " — " in str(e)


@pytest.mark.parametrize(
    "values",
    [
        dict(MODEL_DIM=100, NUM_HEADS=8), dict(NUM_HEADS=8, NUM_KV_HEADS=3), dict(TRAIN_BATCH_TOKENS=1000, TRAIN_SEQ_LEN=300),
        dict(MICRO_BATCH_TOKENS=100, TRAIN_SEQ_LEN=256), dict(EVAL_STRIDE=4096, TRAIN_SEQ_LEN=2048),
        dict(TTT_CHUNK_SIZE=512, TTT_EVAL_SEQ_LEN=256), dict(MODEL_DIM=24, NUM_HEADS=8),
    ],
)  # fmt: skip
def test_values_that_clash_are_refused_naming_both(values):
    message = error_of(lambda: Settings.from_env({name: str(value) for name, value in values.items()}))
    assert all(f"{name}={value}" in message for name, value in values.items())


def test_rows_that_do_not_divide_by_the_world_size_are_refused_naming_both(tmp_path):
    processes = runs.ranks(tmp_path, TRAIN_BATCH_TOKENS=32 * 7)
    assert [process.wait() for process in processes] == [2, 2]
    message = runs.user_error(processes[0].err)
    assert "TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN=7" in message and "WORLD_SIZE=2" in message


def test_misspelt_variables_are_reported_at_the_start(tmp_path):
    done = runs.run(tmp_path, 2, ITERATION=5, TTT_EPOCHS=1, DATA_PATH=tmp_path)
    assert "ITERATION is not a setting" in done.out and "did you mean ITERATIONS?" in done.out
    assert "TTT_EPOCHS is not a setting" in done.out and "did you mean TTT_N_EPOCHS?" in done.out


def test_the_variables_of_shells_and_launchers_are_not_reported_as_misspelt():
    usual = "PATH HOME LANG TERM SHELL USER PWD RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT"
    usual += " OMP_NUM_THREADS CUDA_VISIBLE_DEVICES PYTHONPATH TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS NCCL_DEBUG TMPDIR"
    assert train_gpt.misspelt(dict.fromkeys(usual.split(), "1")) == []


def test_documented_defaults_are_the_specifications():
    s = Settings.from_env({})
    assert (s.iterations, s.train_batch_tokens, s.train_seq_len, s.matrix_lr, s.seed) == (20000, 786432, 2048, 0.02, 42)
    assert (s.max_wallclock_seconds, s.eval_max_seconds, s.ttt_n_epochs, s.artifact_max_bytes) == (600, 600, 50, 16_000_000)


def test_tiny_is_a_preset_that_single_variables_override():
    s = Settings.from_env(dict(PRESET="tiny", MODEL_DIM="64"))
    assert s.model_dim == 64 and s.num_layers < 10 and s.iterations < 20000


# ---- Data and tokenizer that cannot be used, through the real process


def test_a_missing_shard_folder_ends_with_code_2_and_one_line(tmp_path):
    done = command(tmp_path / "out", DATA_PATH=tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in runs.user_error(done.stderr)


def test_under_torchrun_a_bad_shard_is_reported_once_and_before_training(tmp_path):
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5, 299, 300])
    done = torchrun(tmp_path / "out", DATA_PATH=tmp_path)
    assert done.returncode != 0 and "token 300" in runs.user_error(done.stderr) and "VOCAB_SIZE=300" in done.stderr
    assert "step:" not in done.stdout
