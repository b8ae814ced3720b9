"""CUDA graphs of test-time training, by their stand-in on a CPU: what a run does when one cannot be recorded, when
memory is short, and when replay and eager steps differ. That replay gives eager figures is shown in test_ttt.py."""

import io
import math
import re

import numpy as np
import pytest
import torch

import train_gpt
from conftest import Traced, random_model, run_of, small, stream_of
from recorded import Graphs

LENGTHS = [100, 70, 40, 33]
GIB = 1 << 30


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    """The stand-in, and what else a run asks of a GPU."""
    stand_in = Graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    return stand_in


@pytest.fixture
def graphed(run, graphs) -> train_gpt.Run:
    """A run that believes it has a GPU, with graphs accepted and a log to read."""
    s = small(num_layers=2, ttt_n_epochs=2, ttt_batch_size=4)
    other = run_of(run, s)
    other.cuda = other.graphs = True
    other.event, other.log_file = torch.cuda.Event(), io.StringIO()
    return other


def test_adapters_that_do_not_move_differ_by_nothing():
    """As at TTT_LORA_LR=0."""
    still = np.ones(3), torch.zeros(2, 4), 0.1
    assert train_gpt.differences(still, still) == (0, 0)


def batches(graphed, run):
    """A batch that records graphs and one that does not, and the stream that both read."""
    model, stream = random_model(graphed.s), stream_of(graphed.s, LENGTHS)
    found = [Traced(model, stream, len(LENGTHS), each) for each in (graphed, run_of(run, graphed.s))]
    for batch in found:
        batch.load(np.arange(len(LENGTHS)))
    return found


def failing_step(batch, graphs, error: BaseException, count: int):
    """_step() that raises in the middle of the capture with this number, from 0."""

    def step(shape, inner=batch._step):
        inner(shape)
        if graphs.capturing and graphs.captured == count:
            raise error

    return step


def test_a_capture_that_fails_leaves_eager_steps_and_the_figures_as_they_are(run, graphed, graphs, monkeypatch):
    batch, eager = batches(graphed, run)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 20.00 MiB")
    monkeypatch.setattr(batch, "_step", failing_step(batch, graphs, error, 2))
    np.testing.assert_allclose(batch.read().figures, eager.read().figures, rtol=2e-5)
    assert graphs.captured == 3 and not graphs.capturing  # the third was ended, too, and no other one begun
    account = batch.account_of_graphs()
    assert account["recorded"] == 2 and account["shapes"] > 4
    assert graphs.replayed > 2  # what had been recorded goes on
    (note,) = re.findall("note: .*", graphed.log_file.getvalue())
    assert "ChunkStep" in note and "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB" in note


def test_an_interruption_in_a_capture_ends_the_capture_and_the_run(run, graphed, graphs, monkeypatch):
    batch, _ = batches(graphed, run)
    error = train_gpt.Interrupted(143, "stopped by SIGTERM")
    monkeypatch.setattr(batch, "_step", failing_step(batch, graphs, error, 0))
    with pytest.raises(train_gpt.Interrupted):
        batch.read()
    assert not graphs.capturing and batch.recording


@pytest.mark.parametrize(
    "free, keeps, recorded, emptied",
    (
        (60, 0, True, 1),  # plenty: before the first capture only, for nothing is given back within one
        (1, 60, True, 1),  # as after training, which leaves most of the device to the allocator
        (1, 2, False, None),
    ),
    ids=("plenty", "kept_by_the_allocator", "a_full_device"),
)
def test_a_graph_is_recorded_where_there_is_room(run, graphed, graphs, free, keeps, recorded, emptied):
    batch, eager = batches(graphed, run)
    graphs.free, graphs.keeps = free * GIB, keeps * GIB
    np.testing.assert_allclose(batch.read().figures, eager.read().figures, rtol=2e-5)
    assert (graphs.captured > 0) == (graphs.replayed > 0) == recorded
    assert emptied in (None, graphs.emptied)
    assert bool(batch.account_of_graphs()["recorded"]) == recorded


def test_what_graphs_take_beside_tensors_is_accounted_for(run, graphed, graphs, monkeypatch):
    """As on a GPU: each graph takes 24 MiB that are not the allocator's, until the device is full."""
    batch, eager = batches(graphed, run)
    monkeypatch.setattr(train_gpt.DocumentBatch, "_record", occupying(graphs, 24 << 20))
    np.testing.assert_allclose(batch.read().figures, eager.read().figures, rtol=2e-5)
    account = batch.account_of_graphs()
    assert account["recorded"] == graphs.captured > 2
    assert account["bytes_beside_tensors"] == graphs.captured * 24 << 20


def occupying(graphs: Graphs, size: int):
    """_record() after which less is free."""

    def record(batch, step, inner=train_gpt.DocumentBatch._record):
        graph = inner(batch, step)
        graphs.free -= size * bool(graph)
        return graph

    return record


def test_graphs_stop_before_they_fill_the_device(run, graphed, graphs, monkeypatch):
    batch, eager = batches(graphed, run)
    monkeypatch.setattr(train_gpt.DocumentBatch, "_record", occupying(graphs, 30 * GIB))
    np.testing.assert_allclose(batch.read().figures, eager.read().figures, rtol=2e-5)
    assert graphs.captured == 3 and graphs.free >= -10 * GIB  # 80, 50, 20 GiB free; below 4 none is begun


def test_the_log_says_how_near_graphs_are_what_is_free_and_how_long_it_will_take(graphed, graphs, tmp_path):
    graphs.free, graphs.keeps = 60 * GIB, 12 * GIB
    model = evaluation(graphed, tmp_path)
    run = graphed
    stream = rehearsed(model, run)
    log = run.log_file.getvalue()
    assert "memory free:72.0 of 80.0 GiB, kept by the allocator:0.0" in log
    near = re.search(r"graphs against eager steps: nll:(\S+) movement:(\S+) movement_of_a_repeat:(\S+) \(", log)
    assert [float(x) for x in near.groups()] == [0.0, pytest.approx(0.0, abs=1e-3), 0.0]
    assert run.graphs and "note:" not in log
    train_gpt.score_file(model, stream, run)
    log = run.log_file.getvalue()
    names = r"evaluation_kernel_by_kernel:(\S+) evaluation_graphs:(\S+)"
    predicted = re.search(f"expected seconds of what follows: {names}", log)
    assert all(float(x) > 0 for x in predicted.groups())
    assert int(re.search(r"CUDA graphs shapes:\d+ recorded:(\d+) ", log)[1]) > 2


def rehearsed(model: train_gpt.GPT, run: train_gpt.Run) -> train_gpt.Stream:
    """What main() does before an evaluation, and of which text."""
    stream = stream_of(run.s, LENGTHS)
    train_gpt.describe_what_follows(None, stream, train_gpt.preflight(None, model, run), run)
    return stream


def evaluation(run: train_gpt.Run, folder) -> train_gpt.GPT:
    """A model to evaluate, whose file the run names."""
    run.folder = folder
    run.s = train_gpt.replace(run.s, eval_only=str(folder / "weights.pt"))
    torch.save(random_model(run.s).state_dict(), run.s.eval_only)
    return train_gpt.scoring_model(run)


@pytest.mark.parametrize("wrong", [6.0, math.nan])
def test_graphs_that_adapt_otherwise_than_eager_steps_are_refused(graphed, graphs, tmp_path, monkeypatch, wrong):
    """A learning rate that the host changes in one of seven steps: a graph keeps it as it was. Or it is no number."""
    calls = []

    def step(adapters, gradient, lr, inner=train_gpt.Adapters.step):
        calls.append(1)
        amiss = graphs.capturing if math.isnan(wrong) else len(calls) % 7 == 6
        inner(adapters, gradient, lr * (wrong if amiss else 1.0))

    monkeypatch.setattr(train_gpt.Adapters, "step", step)
    model = evaluation(graphed, tmp_path)
    rehearsed(model, graphed)
    log = graphed.log_file.getvalue()
    assert not float(re.search(r" movement:(\S+)", log)[1]) <= 0.1
    assert not graphed.graphs and "every step is launched kernel by kernel" in log


def test_windows_are_moved_to_the_device_at_once(run, monkeypatch):
    """A copy from the host waits for all that the device has still to do."""
    s = small()
    copies = []
    monkeypatch.setattr(torch, "from_numpy", lambda x, inner=torch.from_numpy: copies.append(x) or inner(x))
    model, stream = random_model(s), stream_of(s, [300])
    copies.clear()
    train_gpt.evaluate_sliding(model, stream, run_of(run, s))
    windows = 1 + -(-(300 - s.train_seq_len) // s.eval_stride)
    assert len(copies) == 1 and windows > 2 * s.eval_batch_seqs
