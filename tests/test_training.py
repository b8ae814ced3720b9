"""Which weights training ends with: the average of the warmdown, and no trace of the warm-up."""

import numpy as np
import pytest
import torch

import train_gpt
from conftest import random_tokens, run_of, small, stream_of

STEPS = dict(iterations=24, warmdown_iters=20, max_wallclock_seconds=0, val_loss_every=0, warmup_steps=3)
STEPS |= dict(calibration_tokens=64)


def trainer_of(run, folder=None, **changes):
    s = small(**STEPS | changes)
    return train_gpt.Trainer([random_tokens(s, 3000).astype(np.uint16)], "data", run_of(run, s, folder))


def flat(trainer):
    return torch.cat([w.flatten() for w in trainer.state_dict().values()])


@pytest.fixture(scope="module")
def weights(run):
    """The weights after each of the 24 steps, by the number of completed steps, of training that averages nothing."""
    trainer = trainer_of(run, swa_enabled=False)
    after = {}
    for step in range(1, 25):
        trainer.train_step()
        after[step] = flat(trainer)
    return after


def trained(run, folder, **changes):
    trainer = trainer_of(run, folder, **changes)
    trainer.train(stream_of(trainer.run.s, [40, 20]))
    return trainer


@pytest.mark.parametrize(
    "start, every, sampled",
    (  # after n steps the last multiplier was (25 - n) / 20
        (0.5, 3, [18, 21, 24]),  # 0.5 after step 15 is not below 0.5
        (0.5, 1, range(16, 25)),
        (0.35, 4, [20, 24]),
        (1.0, 5, [10, 15, 20]),  # 1 until step 5
    ),
)
def test_the_final_model_is_the_mean_of_what_swa_samples(run, tmp_path, weights, start, every, sampled):
    final = flat(trained(run, tmp_path, swa_start_frac=start, swa_every=every))
    expected = torch.stack([weights[step] for step in sampled]).mean(0)
    step_size = (weights[24] - weights[23]).norm()
    assert (final - expected).norm() < 1e-2 * step_size
    for other in range(1, 25):  # one checkpoint more or less would show
        changed = set(sampled) ^ {other}
        mean = torch.stack([weights[step] for step in changed]).mean(0)
        assert (mean - expected).norm() > 0.1 * step_size, other


@pytest.mark.parametrize(
    "changes",
    (dict(swa_every=25), dict(swa_every=23), dict(swa_enabled=False, swa_every=2)),
    ids=("none", "one", "switched_off"),
)
def test_fewer_than_two_samples_leave_the_last_weights_and_a_line(run, tmp_path, monkeypatch, weights, changes):
    lines = []
    monkeypatch.setattr(train_gpt.Run, "log", lambda run, line, console=True: lines.append(line))
    assert flat(trained(run, tmp_path, **changes)).equal(weights[24])
    (line,) = (line for line in lines if line.startswith("swa:"))
    assert "the last weights are final" in line


def test_the_log_says_how_many_checkpoints_were_averaged(run, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(train_gpt.Run, "log", lambda run, line, console=True: lines.append(line))
    trainer = trained(run, tmp_path, swa_start_frac=0.5, swa_every=3)
    assert any(line.startswith("swa: 3 checkpoints") for line in lines) and trainer.account()["averaged"] == 3


def test_warm_up_steps_train_nothing(run):
    cold, warm = trainer_of(run), trainer_of(run)
    before = flat(warm)
    warm.warm_up()
    assert flat(warm).equal(before) and warm.step == 0
    for _ in range(3):
        assert warm.train_step().equal(cold.train_step())
    assert flat(warm).equal(flat(cold)) and not flat(warm).equal(before)


class Clock:
    """Goes on by a second with every training step, by 100 with every validation and by 30 with every checkpoint."""

    def __init__(self, monkeypatch):
        self.now, step, validate = 1000.0, train_gpt.Trainer.train_step, train_gpt.evaluate_standard
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(train_gpt.Trainer, "train_step", self.taking(1.0, step))
        monkeypatch.setattr(train_gpt, "evaluate_standard", self.taking(100.0, validate))
        monkeypatch.setattr(train_gpt.Trainer, "save", self.taking(30.0, train_gpt.Trainer.save))

    def taking(self, seconds, work):
        def later(*arguments):
            self.now += seconds
            return work(*arguments)

        return later


def test_validation_takes_nothing_of_the_training_time(run, tmp_path, monkeypatch):
    """Neither from the clock that is shown nor from the limit: 24 steps of a second, or the 10 that fit into 10.5 s."""
    for limit, steps in ((0, 24), (10.5, 10)):
        trainer = trainer_of(run, tmp_path, val_loss_every=2, max_wallclock_seconds=limit)
        with monkeypatch.context() as patched:
            Clock(patched)
            trainer.train(stream_of(trainer.run.s, [40, 20]))
        assert (trainer.step, trainer.elapsed) == (steps, steps)


def test_a_checkpoint_between_two_steps_takes_training_time_but_the_last_takes_none(run, tmp_path, monkeypatch):
    """3 steps and 30 s, then 3 steps and 30 s: no step of 11 s on average fits into 75."""
    trainer = trainer_of(run, tmp_path, checkpoint_every=3, max_wallclock_seconds=75)
    Clock(monkeypatch)
    trainer.train(stream_of(trainer.run.s, [40, 20]))
    assert (trainer.step, trainer.elapsed) == (6, 66)


@pytest.mark.parametrize(
    "limit, step, elapsed, expected",
    (  # 24 steps in all; the preflight's took 2 s
        (0, 0, 0.0, 48),
        (0, 6, 18.0, 54),
        (100, 0, 0.0, 48),
        (10, 0, 0.0, 10),
        (40, 6, 18.0, 22),
        (100, 20, 60.0, 12),
    ),
)
def test_what_is_left_of_training_ends_with_the_steps_or_the_seconds_whichever_is_first(
    run, limit, step, elapsed, expected
):
    trainer = trainer_of(run, max_wallclock_seconds=limit)
    trainer.step_seconds, trainer.step, trainer.elapsed = 2.0, step, elapsed
    assert trainer.seconds_left() == pytest.approx(expected)
