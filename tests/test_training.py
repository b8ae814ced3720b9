"""The training loop as a whole: what the final weights are made of."""

import pytest
import torch
from runs import micro

import train_gpt


# ---- All contact with the names and signatures of train_gpt.py ------------------------------------------------------
def trained(run, folder, monkeypatch, **changes):
    """The weights after each step of a micro run, and the final ones."""
    s = micro(OUTPUT_DIR=folder, WARMUP_STEPS=0, VAL_LOSS_EVERY=0, **changes)
    torch.manual_seed(0)
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, s, run)
    after, step = [], optimizer.step

    def record(*arguments):
        norm = step(*arguments)
        after.append(optimizer.weights.clone())
        return norm

    monkeypatch.setattr(optimizer, "step", record)
    stream = train_gpt.load_validation(s, run)
    train_gpt.train(model, optimizer, stream, s, run, train_gpt.Log(), folder)
    return after, optimizer.weights


@pytest.mark.parametrize(
    "start, every, enabled, averaged",
    (
        # 20 steps; the multiplier of step k, counted from 0, is (20 - k) / 10 once that is below 1
        (0.35, 1, 1, [18, 19, 20]),  # 0.3 of step 17 is the first below 0.35
        (0.5, 1, 1, [17, 18, 19, 20]),  # 0.5 of step 15 is not below 0.5
        (0.85, 3, 1, [15, 18]),  # not 12: its multiplier was 0.9
        (0.95, 4, 1, [12, 16, 20]),
        (0.35, 19, 1, [20]),  # one sample, of step 19, is too few: the last weights
        (0.35, 15, 1, [20]),  # no sample
        (0.95, 4, 0, [20]),
    ),
)
def test_the_final_weights_are_the_mean_of_exactly_the_steps_that_swa_names(
    run, tmp_path, monkeypatch, start, every, enabled, averaged
):
    """After a step whose multiplier was below SWA_START_FRAC, when the completed steps divide by SWA_EVERY."""
    swa = {"SWA_START_FRAC": start, "SWA_EVERY": every, "SWA_ENABLED": enabled}
    after, final = trained(run, tmp_path, monkeypatch, ITERATIONS=20, WARMDOWN_ITERS=10, **swa)
    assert len(after) == 20
    expected = torch.stack([after[completed - 1] for completed in averaged]).mean(0)
    torch.testing.assert_close(final, expected, rtol=1e-6, atol=1e-8)
    others = [weights for completed, weights in enumerate(after, 1) if completed not in averaged]
    assert min((weights - expected).abs().max() for weights in others) > 1e-5  # each step moves the weights
