"""What a GPU runs, as far as a CPU can run it: bf16 compute, captured graphs, and both together.

Graphs are captured and differentiated as on a GPU but executed by torch's own kernels (backend `aot_eager`): generating code would
take minutes and is PyTorch's to test."""
import functools

import numpy as np
import pytest
import torch
from torch import nn

import train_gpt
from conftest import random_model, small, stream_of

LENGTHS = [100, 90, 70, 40, 33, 16, 5]  # up to seven chunks, then one document alone


@pytest.fixture
def graphs(run, monkeypatch):
    """Turn compilation on; the fixture counts captured graphs and graph breaks."""
    import torch._dynamo
    from torch._dynamo.utils import counters
    from torch.fx.experimental import _config

    kept = {name: getattr(_config, name) for name in ("use_duck_shape", "backed_size_oblivious")}
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(run, "compile", True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else the rest would run uncompiled, unnoticed
        yield lambda: (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(_config, name, value)


def adapted(model, s, run, documents, adam=None):
    """NLL of every figure and document, plain first, from one batch."""
    batch = train_gpt.DocumentBatch(model, stream_of(s, LENGTHS), np.array(documents), s, run, adam)
    fresh = lambda: train_gpt.Adapters(np.stack([train_gpt.draw_lora_a(s, d) for d in documents]), s, run.device)
    batch.plain(fresh())
    plain = batch.sums[:, :, 0].clone()
    batch.adapt(adapters := fresh())
    assert {x.dtype for x in (adapters.flat, adapters.m, adapters.v)} == {torch.float32}
    return torch.cat((plain, batch.sums[:, :, 0]))


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_compiled_test_time_training_scores_as_eager_does_with_few_graphs(run, graphs, protocol):
    """The number of graphs is the compile time that the 600 seconds pay for: none may come back unnoticed."""
    s, documents = small(ttt_protocol=protocol, ttt_n_epochs=3), list(range(len(LENGTHS)))
    model = random_model(s).requires_grad_(False)
    run.compile = False
    expected = adapted(model, s, run, documents)
    run.compile = True
    assert graphs() == (0, {})
    train_gpt.warm_up_ttt(model, s, run, len(documents))
    warm, breaks = graphs()
    torch.testing.assert_close(adapted(model, s, run, documents, run.compiled(train_gpt.adam_, dynamic=True)), expected, rtol=1e-5, atol=0)
    assert 5 <= warm <= 9 and not breaks
    assert graphs() == (warm, {})  # the warm-up on synthetic tokens has met every shape


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_compiled_training_step_compiles_once_and_equals_the_eager_one(run, graphs, dtype):
    s = small(num_layers=2)
    tokens = torch.randint(2, s.vocab_size, (4, s.train_seq_len + 1), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = train_gpt.GPT(s, dtype)
        run.compile = compiled
        optimizer, forward = train_gpt.Optimizer(model, s, run), run.compiled(model, dynamic=False)
        losses, counts = [], []
        for step in range(3):
            losses.append(train_gpt.forward_backward(forward, [(tokens[:, :-1], tokens[:, 1:])], 1.0))
            optimizer.step(step, 1.0)
            counts.append(graphs()[0])
        assert counts[0] == counts[2] and (counts[0] > 0) == compiled
        results.append(torch.stack(losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4 if dtype == torch.float32 else 5e-3, atol=0)
    assert results[0][-1] < results[0][0] and not graphs()[1]


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_test_time_training_in_bf16_stays_near_float32_and_apart_from_its_batch(run, protocol):
    """On a GPU a document's score may move by 1e-3 with its batch. The adapters themselves stay float32."""
    s = small(ttt_protocol=protocol, ttt_n_epochs=3)
    exact, rough = (random_model(s, dtype=dtype).requires_grad_(False) for dtype in (torch.float32, torch.bfloat16))
    together, expected = (adapted(model, s, run, list(range(len(LENGTHS)))) for model in (rough, exact))
    torch.testing.assert_close(together, expected, rtol=1e-2, atol=0)
    for d in range(len(LENGTHS)):
        torch.testing.assert_close(adapted(rough, s, run, [d])[:, 0], together[:, d], rtol=1e-3, atol=0)
