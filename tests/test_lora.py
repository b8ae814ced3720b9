"""Adapters on any linear layer, against LoRA written out plainly in float64 with torch's own Adam (test_ttt.Alone).
That compiled ones give the figures of these, all layers at once, is shown in test_device_paths.py."""

import pytest
import torch

import train_gpt
from conftest import batch_of, random_model, run_of, small, stream_of
from test_ttt import Alone, moved_like, shapes_of

SIX = ("c_q", "c_k", "c_v", "attn.proj", "mlp.fc", "mlp.proj")
ALL = ",".join(SIX)
CONTEXTS = ("cached", "recompute")
CASES = [*((name, 0) for name in SIX), (ALL, 0), (ALL, 7.0), ("mlp.proj,c_k", 1.0), ("c_v,c_q", 9.5)]


def settings_of(targets, alpha, context, **changes):
    """Rank 4, a window that is full after one chunk, and steps so large that adapters matter."""
    changes = dict(ttt_n_epochs=3, ttt_eval_seq_len=27, ttt_lora_lr=0.03) | changes
    return small(num_layers=2, ttt_lora_targets=targets, ttt_lora_alpha=alpha, ttt_context=context, **changes)


def compare(run, s, model, stream):
    """The batch's NLL of every target, and its adapters, are the reference's; returns those NLL."""
    alone = Alone(model, s, stream.tokens[5:].tolist(), 1)
    getattr(alone, s.ttt_protocol)()
    batch = batch_of(model, stream, [1], run)
    expected = torch.tensor(alone.figures, dtype=torch.float64)
    torch.testing.assert_close(batch.figures[:, 0], expected, rtol=1e-3, atol=1e-3)
    assert moved_like(alone, batch.adapters) > 0.1
    assert (expected[1] - expected[0]).abs().max() > 0.05  # it can tell
    return expected


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("targets, alpha", CASES, ids=str)
def test_any_layers_adapters_are_those_written_out(run, targets, alpha, context):
    s = settings_of(targets, alpha, context)
    compare(run_of(run, s), s, random_model(s), stream_of(s, [5, 41]))


@pytest.mark.parametrize("context", CONTEXTS)
def test_all_layers_adapt_in_a_single_pass_as_written_out(run, context):
    s = settings_of(ALL, 3.0, context, ttt_protocol="single_pass", ttt_weight_decay=0.5)
    compare(run_of(run, s), s, random_model(s), stream_of(s, [5, 41]))


def test_other_targets_or_another_alpha_are_other_figures(run):
    """Else all of the above might compare one and the same."""
    found = []
    for targets, alpha in CASES:
        s = settings_of(targets, alpha, "cached")
        found.append(batch_of(random_model(s), stream_of(s, [5, 41]), [1], run_of(run, s)).totals()[-1, 0])
    assert len({round(nll, 2) for nll in found}) == len(CASES)


@pytest.mark.parametrize("name", SIX)
def test_shapes_are_those_of_the_layers(name):
    s = small(ttt_lora_targets=name, mlp_mult=2.5)
    (found,) = train_gpt.lora_shapes(s).values()
    block = train_gpt.GPT(s).blocks[0]
    layer = block.get_submodule(name if "." in name else f"attn.{name}")
    assert found == (layer.in_features, layer.out_features) == shapes_of(s)[name]


@pytest.mark.parametrize("value", ("", "c_q,", "q", "c_q c_v", "attn.c_q", "lm_head", "c_q,,c_v", "mlp", "mlp_fc"))
def test_a_layer_that_there_is_not_is_refused_naming_those_that_there_are(value):
    with pytest.raises(train_gpt.UserError, match=r"TTT_LORA_TARGETS=.* — .*attn\\\.proj"):
        train_gpt.Settings.from_env({"TTT_LORA_TARGETS": value})
