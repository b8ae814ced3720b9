"""Test-time training against a loop written with nn.Linear, autograd and torch.optim.Adam, and what it must not depend on."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, small, stream_of
from test_model import reference

MODES = [(protocol, context) for protocol in ("replay", "single_pass") for context in ("cached", "recompute")]
every_mode = pytest.mark.parametrize("protocol, context", MODES, ids=["-".join(mode) for mode in MODES])
quiet = lambda *_, **__: None


def batch_of(model, stream, documents, s, run, adapters=None, plain=False, **more):
    """The batch after its pass."""
    batch = train_gpt.DocumentBatch(model, stream, np.array(documents), s, run, trace=True, **more)
    if plain:
        batch.plain(adapters_of(s, documents))
    else:
        batch.adapt(adapters or adapters_of(s, documents))
    return batch


def adapters_of(s, documents, kind=train_gpt.Adapters):
    return kind(np.stack([train_gpt.draw_lora_a(s, d) for d in documents]), s, torch.device("cpu"))


def chunks_of(tokens, s):
    """(first target, end) of each chunk of a document."""
    return [(i, min(i + s.ttt_chunk_size, len(tokens) - 1)) for i in range(0, len(tokens) - 1, s.ttt_chunk_size)]


def within(s):
    """A chunk sees itself and the last TTT_EVAL_SEQ_LEN - TTT_CHUNK_SIZE tokens before it."""
    size = s.ttt_chunk_size
    return lambda i, j: j >= i // size * size - (s.ttt_eval_seq_len - size)


class Alone:
    """One document adapted in float64: layers of nn.Linear adapters, one torch.optim.Adam, keys and values kept by hand."""
    def __init__(self, model, s, tokens, document):
        self.state, self.s, self.tokens = model.state_dict(), s, tokens
        r, kv_dim = s.ttt_lora_rank, s.model_dim // s.num_heads * s.num_kv_heads
        a = torch.from_numpy(train_gpt.draw_lora_a(s, document)).double()
        self.lora = []
        for layer in range(s.num_layers):
            linears = [torch.nn.Linear(*shape, bias=False, dtype=torch.float64)
                       for shape in ((s.model_dim, r), (r, s.model_dim), (s.model_dim, r), (r, kv_dim))]
            for linear, start in zip(linears, (a[layer, :r], 0.0, a[layer, r:], 0.0)):
                linear.weight.data[:] = start
            self.lora.append([linear.weight for linear in linears])
        self.adam = torch.optim.Adam(sum(self.lora, []), betas=(0.9, 0.95), eps=1e-10)
        self.figures = []

    def forward(self, begin, end, past):
        s, tokens = self.s, self.tokens
        if s.ttt_context == "cached":
            return reference(self.state, s, tokens[begin:end], tokens[begin + 1 : end + 1], self.lora, past, within(s))
        first = max(0, end - s.ttt_eval_seq_len)
        return reference(self.state, s, tokens[first:end], tokens[first + 1 : end + 1], self.lora)[0][begin - first :], None

    def append(self, past, present):
        """The whole history: what is too old is masked, not dropped."""
        return present if self.s.ttt_context == "cached" else None

    def learn(self, nll, epoch):
        s = self.s
        self.adam.param_groups[0]["lr"] = s.ttt_lora_lr * 0.5 * (1 + math.cos(math.pi * epoch / s.ttt_n_epochs))
        self.adam.zero_grad()
        nll.mean().backward()
        self.adam.step()

    def replay(self):
        for epoch in range(self.s.ttt_n_epochs):
            past, scores = None, []
            for begin, end in chunks_of(self.tokens, self.s):
                nll, present = self.forward(begin, end, past)
                scores += nll.tolist()
                past = self.append(past, present)
                self.learn(nll, epoch)
            self.figures.append(scores)

    def single_pass(self):
        past, chunks = None, chunks_of(self.tokens, self.s)
        self.figures.append([])
        for begin, end in chunks:
            self.figures[0] += self.forward(begin, end, past)[0].tolist()
            if (begin, end) != chunks[-1]:
                for epoch in range(self.s.ttt_n_epochs):
                    self.learn(self.forward(begin, end, past)[0], epoch)
                past = self.append(past, self.forward(begin, end, past)[1])

    def flat(self):
        """The adapters laid out as A (Q's rows above V's), B of Q, B of V, each by layer."""
        parts = [torch.cat((a_q, a_v)) for a_q, _, a_v, _ in self.lora], [b for _, b, _, _ in self.lora], [b for _, _, _, b in self.lora]
        return torch.cat([torch.stack(part).flatten() for part in parts]).detach()


@every_mode
@pytest.mark.parametrize("size, window, targets", ((16, 64, 41), (16, 27, 70), (8, 8, 27), (16, 64, 9)), ids=str)
def test_adaptation_equals_a_loop_with_torchs_adam(run, protocol, context, size, window, targets):
    s = small(num_layers=2, ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3, ttt_chunk_size=size, ttt_eval_seq_len=window)
    model, stream = random_model(s), stream_of(s, [5, targets])
    alone = Alone(model, s, stream.tokens[5:].tolist(), 1)
    getattr(alone, protocol)()
    adapters = adapters_of(s, [1])
    batch = batch_of(model, stream, [1], s, run, adapters)
    assert batch.nll.shape == (3 if protocol == "replay" else 1, 1, targets)
    torch.testing.assert_close(batch.nll[:, 0].double(), torch.tensor(alone.figures, dtype=torch.float64), rtol=5e-4, atol=5e-4)
    moved = (alone.flat() - adapters_of(s, [1]).flat[0]).norm()
    assert (adapters.flat[0] - alone.flat()).norm() <= 0.02 * moved
    assert (moved > 0.1) == (protocol == "replay" or targets > size)


@every_mode
def test_each_figure_scores_each_target_once(run, protocol, context):
    s, lengths = small(ttt_protocol=protocol, ttt_context=context), [1, 16, 17, 100, 48, 2, 33]
    stream = stream_of(s, lengths)
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    for batch in (batch_of(random_model(s), stream, order, s, run), batch_of(random_model(s), stream, order, s, run, plain=True)):
        for figure in range(len(batch.sums)):
            assert batch.sums[figure, :, 1].tolist() == [lengths[d] for d in order]
            assert batch.sums[figure, :, 2].tolist() == [stream.document_bytes[d] for d in order]
            for row, d in enumerate(order):
                assert batch.nll[figure, row, : lengths[d]].isfinite().all() and batch.nll[figure, row, lengths[d] :].isnan().all()
                assert batch.nll[figure, row, : lengths[d]].sum().item() == pytest.approx(batch.sums[figure, row, 0].item(), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20), st.integers(0, 50), st.integers(1, 90), st.integers(0, 9))
def test_the_ring_holds_exactly_the_last_tokens_of_the_window(run, size, window, targets, seed):
    """Whether the window is no multiple of the chunk, shorter than it, or nothing."""
    s = small(num_layers=3, ttt_chunk_size=size, ttt_eval_seq_len=max(2, size + window))
    model, stream = random_model(s, seed), stream_of(s, [targets, max(1, targets // 2)], seed)
    batch = batch_of(model, stream, [0, 1], s, run, plain=True)
    for d, count in enumerate(stream.targets):
        tokens = stream.tokens[stream.starts[d] : stream.starts[d] + count + 1].tolist()
        expected, _ = reference(model.state_dict(), s, tokens[:-1], tokens[1:], visible=within(s))
        torch.testing.assert_close(batch.nll[0, d, :count].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_at_rate_zero_every_way_of_scoring_a_document_that_fits_agrees(run, protocol):
    s = small(ttt_lora_lr=0, ttt_protocol=protocol)
    model, stream = random_model(s), stream_of(s, [64, 49, 16, 3])
    plain = batch_of(model, stream, [0, 1, 2, 3], s, run, plain=True).sums[0, :, 0]
    whole = torch.stack([reference(model.state_dict(), s, ids[:-1], ids[1:])[0].sum() for ids in (
        stream.tokens[a : a + n + 1].tolist() for a, n in zip(stream.starts, stream.targets))])
    torch.testing.assert_close(plain, whole, rtol=1e-5, atol=0)
    for context in ("cached", "recompute"):
        for figure in batch_of(model, stream, [0, 1, 2, 3], replace(s, ttt_context=context), run).sums[:, :, 0]:
            torch.testing.assert_close(figure, plain, rtol=1e-5, atol=0)


def test_at_rate_zero_longer_documents_score_as_without_adaptation(run):
    s = small(ttt_lora_lr=0)
    model, stream = random_model(s), stream_of(s, [200, 150])
    plain = batch_of(model, stream, [0, 1], s, run, plain=True).sums[0, :, 0]
    for protocol in ("replay", "single_pass"):
        for figure in batch_of(model, stream, [0, 1], replace(s, ttt_protocol=protocol), run).sums[:, :, 0]:
            torch.testing.assert_close(figure, plain, rtol=1e-5, atol=0)


LENGTHS = [40, 130, 16, 1, 90, 33, 17, 64, 88]


@every_mode
def test_a_documents_score_is_the_same_alone_and_in_any_batch(run, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3)
    model, stream = random_model(s), stream_of(s, LENGTHS)
    order = sorted(range(9), key=lambda d: -LENGTHS[d])
    together = batch_of(model, stream, order[:8], s, run).sums
    for row, d in enumerate(order[:8]):
        alone = batch_of(model, stream, [d], s, run).sums[:, 0]
        torch.testing.assert_close(together[:, row], alone, rtol=1e-5, atol=0)


class Watched(train_gpt.Adapters):
    """Adapters that remember their rows, and each document's step counts, after every step."""
    def __init__(self, *args):
        super().__init__(*args)
        self.history, self.counts = [self.flat.clone()], [[] for _ in range(len(self.flat))]

    def step(self, gradient, count, lr, adam):
        super().step(gradient, count, lr, adam)
        self.history.append(self.flat.clone())
        for document, n in enumerate(count.tolist()):
            self.counts[document].append(n)


@every_mode
def test_nothing_of_a_finished_document_moves_while_longer_ones_go_on(run, protocol, context):
    """Adam's momentum would move it without any gradient."""
    lengths, epochs = [90, 41, 16, 5], 2
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=epochs)
    adapters = adapters_of(s, range(4), Watched)
    batch_of(random_model(s), stream_of(s, lengths), [0, 1, 2, 3], s, run, adapters)
    for row, length in enumerate(lengths):
        chunks = -(-length // 16)
        steps = epochs * (chunks if protocol == "replay" else chunks - 1)
        assert adapters.counts[row] == list(range(1, steps + 1))
        moves = [not before[row].equal(after[row]) for before, after in zip(adapters.history, adapters.history[1:])]
        if protocol == "replay":
            expected = [chunk < chunks for _ in range(epochs) for chunk in range(6)]
        else:
            expected = [chunk + 1 < chunks for chunk in range(5) for _ in range(epochs)]
        assert moves == expected


@every_mode
def test_totals_do_not_depend_on_batch_size_or_order(run, tmp_path, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=2)
    model, stream = random_model(s), stream_of(s, LENGTHS)

    def evaluate(name, batch_size, reverse=False):
        (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if reverse:
                plan = train_gpt.plan_batches
                patch.setattr(train_gpt, "plan_batches", lambda *args: [rank[::-1] for rank in plan(*args)])
            report, score = train_gpt.evaluate_ttt(model, stream, replace(s, ttt_batch_size=batch_size), run, quiet, tmp_path / name, name, 0.0)
            assert score.bpb == report["backward_looking"]["val_bpb"]
        with np.load(tmp_path / name / "ttt_documents.npz") as kept:
            return report, {key: kept[key] for key in kept}
    report, kept = evaluate("one", 1)
    assert kept["index"].tolist() == list(range(9)) and kept["targets"].tolist() == LENGTHS
    assert kept["bytes"].tolist() == stream.document_bytes.tolist()
    for figure in (report["no_adaptation"], report["backward_looking"], report["last_epoch"]):
        assert (figure["targets"], figure["bytes"]) == (sum(LENGTHS), stream.byte_count)
        assert figure["val_bpb"] == pytest.approx(figure["val_loss"] * figure["targets"] / figure["bytes"] / math.log(2))
    assert report["no_adaptation"]["val_loss"] * sum(LENGTHS) == pytest.approx(kept["nll_no_adaptation"].sum())
    assert report["backward_looking"]["val_loss"] * sum(LENGTHS) == pytest.approx(kept["nll_per_epoch"][0].sum())
    assert report["last_epoch"]["val_loss"] * sum(LENGTHS) == pytest.approx(kept["nll_per_epoch"][-1].sum())
    for other in (evaluate("three", 3), evaluate("all", 20), evaluate("backwards", 2, reverse=True)):
        for name in ("nll_no_adaptation", "nll_per_epoch"):
            np.testing.assert_allclose(other[1][name], kept[name], rtol=1e-5)
        assert other[0]["last_epoch"]["val_bpb"] == pytest.approx(report["last_epoch"]["val_bpb"], rel=1e-5)


def test_adapters_are_drawn_by_seed_and_document_alone():
    s = small(ttt_lora_rank=8)
    a, bound = train_gpt.draw_lora_a(s, 3), 32**-0.5
    assert a.shape == (3, 16, 32) and a.dtype == np.float32
    assert (a == train_gpt.draw_lora_a(s, 3)).all()
    for other in (train_gpt.draw_lora_a(s, 4), train_gpt.draw_lora_a(replace(s, seed=7), 3)):
        assert (a != other).mean() > 0.99
    assert abs(a).max() <= bound and abs(a).max() > 0.95 * bound and abs(a.mean()) < 0.1 * bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@every_mode
def test_the_audit_finds_no_leak_but_in_replays_last_epoch(run, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3, ttt_audit=3)
    stream = stream_of(s, [70, 33, 16, 100, 5, 48])
    rows = train_gpt.audit(random_model(s), stream, s, run, quiet)
    figures = {"no_adaptation", "epoch_1", "last_epoch_3"} if protocol == "replay" else {"no_adaptation", "single_pass"}
    assert {row["figure"] for row in rows} == figures and len({row["document"] for row in rows}) == 3
    for row in rows:
        assert row["targets"] == stream.targets[row["document"]] > 16 and 0 < row["t"] < row["targets"]
        leaks = row["figure"] == "last_epoch_3"
        assert row["backward_looking"] != leaks and row["repeat"] == 0
        assert row["change"] > 0 if leaks else row["change"] == 0, row


def test_the_audit_catches_a_model_that_looks_ahead(run, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attend(q, k, v, enable_gqa=True))
    s = small(ttt_protocol="single_pass", ttt_audit=3)
    rows = train_gpt.audit(random_model(s), stream_of(s, [70, 60, 50]), s, run, quiet)
    assert all(any(row["change"] > 0 for row in rows if row["figure"] == figure) for figure in ("no_adaptation", "single_pass"))


@every_mode
def test_documents_unfinished_at_the_deadline_count_without_adaptation(run, tmp_path, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context)
    model, stream = random_model(s), stream_of(s, [100, 40, 20])
    order, calls = [0, 1, 2], iter(range(10**6))
    stop_after = {"replay": 12, "single_pass": 5}[protocol]  # in the last epoch after 5 chunks; in the third chunk's second step
    complete = batch_of(model, stream, order, s, run)
    batch = train_gpt.DocumentBatch(model, stream, np.array(order), s, run)
    finished = batch.adapt(adapters_of(s, order), lambda: next(calls) >= stop_after)
    assert finished.tolist() == [False, True, True]
    torch.testing.assert_close(batch.sums[:, 1:], complete.sums[:, 1:], rtol=1e-6, atol=0)
    report, _ = train_gpt.evaluate_ttt(model, stream, replace(s, eval_max_seconds=1e-9), run, quiet, tmp_path, "x", 0.0)
    assert report["unfinished_documents"] == order and report["within_budget"] is False
    for figure in (report["backward_looking"], report["last_epoch"]):
        assert (figure["targets"], figure["bytes"]) == (160, stream.byte_count)
        assert figure["val_loss"] == report["no_adaptation"]["val_loss"]


def cost_by_hand(targets, size, floor):
    """Tokens of a batch's chunk steps one after another, none cheaper than the floor."""
    return sum(max(floor, sum(min(size, max(0, t - c * size)) for t in targets)) for c in range(-(-max(targets) // size)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200), st.integers(1, 8), st.integers(0, 9), st.sampled_from(("cpu", "cuda")))
def test_every_document_is_planned_once_and_long_ones_first(lengths, world, batch_size, device):
    ranks = SimpleNamespace(world=world, rank=0, device=torch.device(device))
    s = small(ttt_batch_size=batch_size)
    plan = train_gpt.plan_batches(np.array(lengths), s, ranks)
    assert len(plan) == world
    assert sorted(d for rank in plan for batch in rank for d in batch.tolist()) == list(range(len(lengths)))
    for rank in plan:
        for batch in rank:
            inside = [lengths[d] for d in batch]
            assert inside == sorted(inside, reverse=True) and len(inside) <= (batch_size or 10**9)
        costs = [train_gpt.batch_cost(np.array([lengths[d] for d in batch]), s, train_gpt.STEP_FLOOR[device]) for batch in rank]
        assert costs == sorted(costs, reverse=True)


def test_eight_ranks_share_the_real_lengths_evenly(shared):
    tokens = train_gpt.open_shard(shared / "fineweb" / "fineweb_val_000000.bin")
    _, targets = train_gpt.find_documents(np.asarray(tokens))
    jitter = np.random.default_rng(0).uniform(0.8, 1.25, (20, len(targets)))
    targets = np.maximum(1, targets * jitter).astype(np.int64).ravel()
    targets[777] = 18_743  # the longest document of the whole split
    s = train_gpt.Settings.from_env({})
    plan = train_gpt.plan_batches(targets, s, SimpleNamespace(world=8, rank=0, device=torch.device("cuda")))
    floor = train_gpt.STEP_FLOOR["cuda"]
    predicted, plain = (np.array([sum(map(cost, rank)) for rank in plan]) for cost in (
        lambda batch: train_gpt.batch_cost(targets[batch], s, floor), lambda batch: cost_by_hand(targets[batch].tolist(), 256, floor)))
    assert predicted.max() < 1.03 * predicted.mean()
    assert plain.max() < 1.05 * plain.mean()  # without the weight of attention, which the plan counts as well
    assert any(777 in rank[0] for rank in plan)
