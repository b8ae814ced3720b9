"""What the file tells a user unasked: settings spelt wrongly, a warmdown that the run is too short for, and --help's
text."""

import re
import time

import numpy as np
import pytest
import torch

import runs
import train_gpt
from conftest import batch_of, random_model, stream_of


@pytest.mark.parametrize(
    "name, meant",
    [
        ("TTT_LR", "TTT_LORA_LR or TTT_MIXTURE_LR"), ("NUM_ITERATIONS", "ITERATIONS"), ("iterations", "ITERATIONS"),
        ("BATCH_SIZE", "TTT_BATCH_SIZE or VAL_BATCH_SIZE"), ("ttt_lora_rnk", "TTT_LORA_RANK"),
    ],
)  # fmt: skip
def test_a_setting_is_found_by_its_words_in_either_case(name, meant):
    assert train_gpt.misspelt({name: "1"}) == [f"warning: {name} is not a setting — did you mean {meant}?"]


def test_variables_with_words_of_other_programs_or_one_word_alone_are_left_in_peace():
    usual = "RUN_ID TORCHELASTIC_RUN_ID WANDB_RUN_ID CUDA_DEVICE_ORDER TORCH_COMPILE_DEBUG PATH DEVICE DIR LR"
    usual += " LOCAL_RANK WORLD_SIZE XDG_DATA_DIRS PIP_CACHE_DIR SLURM_JOB_ID NVIDIA_VISIBLE_DEVICES http_proxy _"
    assert train_gpt.misspelt(dict.fromkeys(usual.split(), "1")) == []


def test_help_names_every_setting_with_what_the_environment_would_be_told():
    usage, model, training, session = train_gpt.help_text().split("\n\n")
    assert usage.startswith("usage: [NAME=value ...] python train_gpt.py")
    groups = [group.splitlines() for group in (model, training, session)]
    assert [heading for heading, *_ in groups] == ["The model:", "Its training:", "This session:"]
    lines = [line for _, *lines in groups for line in lines]
    assert groups[1][1].startswith("SEED=") and groups[2][1].startswith("PRESET=")
    usual, tiny = (train_gpt.Settings.from_env({"PRESET": preset}) for preset in ("record", "tiny"))
    assert len(lines) == len(vars(usual))
    for line, (name, value) in zip(lines, vars(usual).items(), strict=True):
        shown = int(value) if isinstance(value, bool) else value
        small = getattr(tiny, name)
        differs = small != value and name != "preset"
        assert line.startswith(f"{name.upper()}={shown}" + f" (tiny: {small})" * differs + ": ")
        assert re.search(r"; (one of|int from|float from|printable text like) ", line)
    with pytest.raises(train_gpt.UserError) as refused:
        train_gpt.Settings.from_env({"NUM_LAYERS": "1"})
    (line,) = (line for line in lines if line.startswith("NUM_LAYERS="))
    assert line.endswith("; int from 2 to 256") and "int from 2 to 256" in str(refused.value)


@pytest.mark.parametrize("warmdown, noted", ((1000, True), (1, False)))
def test_a_warmdown_longer_than_the_run_is_noted_with_the_share_of_the_peak(monkeypatch, tmp_path, warmdown, noted):
    changes = dict(MAX_WALLCLOCK_SECONDS=2, WARMDOWN_ITERS=warmdown, ITERATIONS=1000, WARMUP_STEPS=4)
    s = train_gpt.Settings.from_env(runs.environment(tmp_path, **changes))
    run = train_gpt.Run(train_gpt.replace(s, output_dir=str(tmp_path), quantizer="nearest"))
    lines = []
    monkeypatch.setattr(train_gpt.Run, "log", lambda run, line, console=True: lines.append(line))
    trainer = train_gpt.Trainer([np.arange(3000, dtype=np.uint16) % 300], "data", run)
    waits = iter((0.5, 0.05, 0.05, 0.05))  # the first step compiles
    monkeypatch.setattr(trainer, "train_step", lambda: time.sleep(next(waits)) or torch.zeros(()))
    trainer.warm_up()
    trainer.reserve()
    notes = [line for line in lines if "warmdown" in line]
    assert len(notes) == noted
    for line in notes:  # 2 s of steps of 0.05 s, or a little more
        steps, share, better = re.search(r"about (\d+) steps.* ([\d.]+)% .*WARMDOWN_ITERS=(\d+)", line).groups()
        assert 0 < int(steps) <= 40
        assert float(share) == pytest.approx(int(steps) / 10, abs=1)
        assert int(better) == pytest.approx(int(steps) * 3500 / (600 / 0.0894), abs=1)


@pytest.mark.parametrize("silent, said", [(29, False), (31, True)])
def test_half_a_minute_of_silence_in_an_evaluation_ends_with_a_line(monkeypatch, tmp_path, capsys, silent, said):
    run = runs.alone(tmp_path)
    run.log_file = open(tmp_path / "log", "w")  # noqa: SIM115 - the run's
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run.log("the last line")
    now[0] += silent
    batch = batch_of(random_model(run.s), stream_of(run.s, [40]), [0], run)
    batch.score()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("part ")]
    assert lines == ["part 1 reading 1: chunk 1 of 2"] * said


def test_the_score_is_said_as_soon_as_it_is_known(tmp_path):
    done = runs.run(tmp_path / "replay")
    (line,) = re.findall(r"every document .* has it \(epoch 1: (.*) bits per byte, (.*) without adaptation\)", done.log)
    evaluation = done.result["evaluation"]
    known = (evaluation[name]["val_bpb"] for name in ("backward_looking", "no_adaptation"))
    assert line == tuple(f"{value:.4f}" for value in known)
    assert done.out.index(line[0]) < done.out.index("replay: batch 1")
