"""Test-time training against a loop written with nn.Linear, autograd and torch.optim.Adam, and what it must not depend
on."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import Traced, batch_of, loaded, random_model, run_of, small, stream_of
from recorded import Graphs
from test_model import reference

MODES = [(protocol, context) for protocol in ("replay", "single_pass") for context in ("cached", "recompute")]
every_mode = pytest.mark.parametrize("protocol, context", MODES, ids=["-".join(mode) for mode in MODES])


def nll_of(batch):
    """NLL of every figure and document, (1 + figures, B) float64; each must be complete."""
    nll = torch.from_numpy(batch.totals())
    assert nll.isfinite().all()
    return nll


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda d: -lengths[d])


def chunks_of(tokens, s):
    """(first target, end) of each chunk of a document."""
    return [(i, min(i + s.ttt_chunk_size, len(tokens) - 1)) for i in range(0, len(tokens) - 1, s.ttt_chunk_size)]


def within(s):
    """A chunk sees itself and the last TTT_EVAL_SEQ_LEN - TTT_CHUNK_SIZE tokens before it."""
    size = s.ttt_chunk_size
    return lambda i, j: j >= i // size * size - (s.ttt_eval_seq_len - size)


# ---- The arithmetic


def shapes_of(s):
    """Inputs and outputs of every linear layer of a block, as SPEC section 5 names them, in its order."""
    d, kv_dim, hidden = s.model_dim, s.model_dim // s.num_heads * s.num_kv_heads, int(s.mlp_mult * s.model_dim)
    shapes = {"c_q": (d, d), "c_k": (d, kv_dim), "c_v": (d, kv_dim), "attn.proj": (d, d)}
    return shapes | {"mlp.fc": (d, hidden), "mlp.proj": (hidden, d)}


class Alone:
    """One document adapted in float64: layers of nn.Linear adapters, torch's own Adam, keys and values by hand."""

    def __init__(self, model, s, tokens, document):
        self.state, self.s, self.tokens = model.state_dict(), s, tokens
        r = s.ttt_lora_rank
        drawn = torch.from_numpy(train_gpt.draw_lora_a(s, document)).double()
        self.lora = []
        for _ in range(s.num_layers):
            self.lora.append({})
            for name, (inputs, outputs) in shapes_of(s).items():
                if name not in s.ttt_lora_targets.split(","):
                    continue
                down, up = (torch.nn.Linear(*x, bias=False, dtype=torch.float64) for x in ((inputs, r), (r, outputs)))
                down.weight.data[:] = drawn[: r * inputs].view(r, inputs)
                up.weight.data[:] = 0.0
                drawn = drawn[r * inputs :]
                self.lora[-1][name] = down.weight, up.weight
        assert not len(drawn)
        self.start = self.flat()
        self.weights = [weight for layer in self.lora for pair in layer.values() for weight in pair]
        options = dict(betas=(0.9, 0.95), eps=1e-10, weight_decay=s.ttt_weight_decay)
        self.adam = torch.optim.AdamW(self.weights, **options)
        self.figures = [[]]
        past = None
        for begin, end in chunks_of(tokens, s):  # without adaptation, always after the cached context
            nll, past = reference(self.state, s, tokens[begin:end], tokens[begin + 1 : end + 1], None, past, within(s))
            self.figures[0] += nll.tolist()

    def forward(self, begin, end, past):
        s, tokens = self.s, self.tokens
        if s.ttt_context == "cached":
            window = tokens[begin:end], tokens[begin + 1 : end + 1]
            return reference(self.state, s, *window, self.lora, past, within(s))
        first = max(0, end - s.ttt_eval_seq_len)
        nll, _ = reference(self.state, s, tokens[first:end], tokens[first + 1 : end + 1], self.lora)
        return nll[begin - first :], None

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
            self.figures[1] += self.forward(begin, end, past)[0].tolist()
            if (begin, end) != chunks[-1]:
                for epoch in range(self.s.ttt_n_epochs):
                    self.learn(self.forward(begin, end, past)[0], epoch)
                past = self.append(past, self.forward(begin, end, past)[1])

    def flat(self):
        """The adapters laid out as every A, layer by layer, then every B."""
        pairs = [pair for layer in self.lora for pair in layer.values()]
        return torch.cat([pair[i].detach().flatten() for i in (0, 1) for pair in pairs])


def moved_like(alone, adapters):
    """How far the reference's adapters moved; the batch's must have gone the same way to 2%."""
    moved = (alone.flat() - alone.start).norm()
    assert (adapters.flat[0] - alone.flat()).norm() <= 0.02 * moved
    return moved


@every_mode
@pytest.mark.parametrize(
    "size, window, targets, decay", ((16, 64, 41, 0), (16, 27, 70, 3), (8, 8, 27, 0), (16, 64, 9, 0)), ids=str
)
def test_adaptation_equals_a_loop_with_torchs_adam(run, protocol, context, size, window, targets, decay):
    changes = dict(ttt_protocol=protocol, ttt_context=context, ttt_chunk_size=size, ttt_eval_seq_len=window)
    changes |= dict(ttt_weight_decay=decay)
    s = small(num_layers=2, ttt_n_epochs=3, **changes)
    model, stream = random_model(s), stream_of(s, [5, targets])
    alone = Alone(model, s, stream.tokens[5:].tolist(), 1)
    getattr(alone, protocol)()
    batch = batch_of(model, stream, [1], run_of(run, s))
    assert batch.figures.shape == (4 if protocol == "replay" else 2, 1, targets)
    expected = torch.tensor(alone.figures, dtype=torch.float64)
    torch.testing.assert_close(batch.figures[:, 0], expected, rtol=5e-4, atol=5e-4)
    assert (moved_like(alone, batch.adapters) > 0.1) == (protocol == "replay" or targets > size)


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_gradients_as_small_as_1e_10_still_move_the_adapters_as_adams_epsilon_lets_them(run, protocol):
    """An epsilon of 1e-8, torch's own, would hold them where they are."""
    s = small(num_layers=2, ttt_protocol=protocol, ttt_n_epochs=3)
    model, stream = random_model(s), stream_of(s, [41])
    for block in model.blocks:
        block.attn.proj.weight.mul_(1e-8)
    alone = Alone(model, s, stream.tokens.tolist(), 0)
    getattr(alone, protocol)()
    sizes = torch.cat([p.grad.flatten().abs() for p in alone.weights])
    assert 1e-11 < sizes.median() < 1e-9
    assert moved_like(alone, batch_of(model, stream, [0], run_of(run, s)).adapters) > 0.1


@pytest.mark.parametrize("compiled", (False, True))
def test_only_what_is_trained_on_or_compiled_keeps_what_a_backward_pass_asks_for(run, compiled):
    s = small(ttt_protocol="single_pass")
    run, asked = run_of(run, s), []
    run.compile, run.compiled = compiled, lambda function, **_: function
    batch = loaded(model := random_model(s), stream_of(s, [40]), [0], run)
    model.register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    launch = batch._launch
    batch._launch = lambda step: asked.append(step.train) or launch(step)
    batch.read()
    trained, enabled = asked[::2], asked[1::2]
    assert {*trained} == {False, True} and enabled == [compiled or train for train in trained]


@every_mode
def test_each_figure_scores_each_target_once(run, protocol, context):
    """A target that is scored twice counts once, by what is scored last; one that is not scored is UNSCORED."""
    s, lengths = small(ttt_protocol=protocol, ttt_context=context), [1, 16, 17, 100, 48, 2, 33]
    stream, order, asked = stream_of(s, lengths), longest_first(lengths), []
    batch = loaded(random_model(s), stream, order, run_of(run, s))
    launch = batch._launch
    batch._launch = lambda step: asked.append((step, int(batch.position))) or launch(step)
    batch.read()
    assert len(batch.rows) == 1 + s.ttt_figures == (3 if protocol == "replay" else 2)
    assert all(np.isfinite(nll).all() for row in batch.rows for nll in row)
    scored = np.zeros(len(lengths), int)
    for step, begin in asked:
        if step.score:
            for row in range(step.documents):
                scored[row] += min(begin + 16, lengths[order[row]]) - begin
    assert scored.tolist() == [len(batch.rows) * lengths[d] for d in order]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 20), st.integers(0, 50), st.integers(1, 90), st.integers(0, 9))
def test_the_ring_holds_exactly_the_last_tokens_of_the_window(run, size, window, targets, seed):
    """Whether the window is no multiple of the chunk, shorter than it, or nothing."""
    s = small(num_layers=3, ttt_chunk_size=size, ttt_eval_seq_len=max(2, size + window))
    model, stream = random_model(s, seed), stream_of(s, [targets, max(1, targets // 2)], seed)
    batch = loaded(model, stream, [0, 1], run_of(run, s))
    batch.score()
    found = batch.target_nll()
    for d, count in enumerate(stream.lengths):
        nll = torch.from_numpy(found[d])
        tokens = stream.tokens[stream.starts[d] : stream.starts[d] + count + 1].tolist()
        expected, _ = reference(model.state_dict(), s, tokens[:-1], tokens[1:], visible=within(s))
        torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_at_rate_zero_every_way_of_scoring_a_document_that_fits_agrees(run, protocol):
    s = small(ttt_lora_lr=0, ttt_protocol=protocol)
    model, stream = random_model(s), stream_of(s, [64, 49, 16, 3])
    documents = [stream.tokens[a : a + n + 1].tolist() for a, n in zip(stream.starts, stream.lengths, strict=True)]
    whole = torch.stack([reference(model.state_dict(), s, ids[:-1], ids[1:])[0].sum() for ids in documents])
    for context in ("cached", "recompute"):
        for figure in nll_of(batch_of(model, stream, [0, 1, 2, 3], run_of(run, replace(s, ttt_context=context)))):
            torch.testing.assert_close(figure, whole, rtol=1e-5, atol=0)


def test_at_rate_zero_longer_documents_score_as_without_adaptation(run):
    s = small(ttt_lora_lr=0)
    model, stream = random_model(s), stream_of(s, [200, 150])
    for protocol in ("replay", "single_pass"):
        plain, *adapted = nll_of(batch_of(model, stream, [0, 1], run_of(run, replace(s, ttt_protocol=protocol))))
        for figure in adapted:
            torch.testing.assert_close(figure, plain, rtol=1e-5, atol=0)


# ---- What a score does not depend on

LENGTHS = [40, 100, 16, 1, 70, 33, 17, 49, 64]


@every_mode
def test_a_documents_score_is_the_same_alone_and_in_any_batch(run, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3)
    model, stream, order = random_model(s), stream_of(s, LENGTHS), longest_first(LENGTHS)[:8]
    together = nll_of(batch_of(model, stream, order, run_of(run, s)))
    for row, d in enumerate(order):
        alone = nll_of(batch_of(model, stream, [d], run_of(run, s)))
        torch.testing.assert_close(together[:, row], alone[:, 0], rtol=1e-5, atol=0)


def test_documents_that_do_not_come_longest_first_are_refused(run):
    s = small()
    with pytest.raises(ValueError, match="longest first"):
        loaded(random_model(s), stream_of(s, [20, 40]), [0, 1], run_of(run, s))


class Watched(train_gpt.Adapters):
    """Adapters that remember their rows, and each document's step counts, after every step since they began."""

    def begin(self, a):
        super().begin(a)
        self.history = [self.flat.clone()]
        self.counts = [[] for _ in range(len(self.flat))]

    def step(self, gradient, lr):
        super().step(gradient, lr)
        self.history.append(self.flat.clone())
        for document in range(len(gradient)):
            self.counts[document].append(int(self.steps[document]))


@every_mode
def test_nothing_of_a_finished_document_moves_while_longer_ones_go_on(run, monkeypatch, protocol, context):
    """Adam's momentum would move it without any gradient."""
    lengths, epochs = [90, 41, 16, 5], 2
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=epochs)
    monkeypatch.setattr(train_gpt, "Adapters", Watched)
    adapters = batch_of(random_model(s), stream_of(s, lengths), [0, 1, 2, 3], run_of(run, s)).adapters
    for row, length in enumerate(lengths):
        chunks = -(-length // 16)
        steps = epochs * (chunks if protocol == "replay" else chunks - 1)
        assert adapters.counts[row] == list(range(1, steps + 1)) and adapters.steps[row] == steps
        moves = [not before[row].equal(after[row]) for before, after in itertools.pairwise(adapters.history)]
        if protocol == "replay":
            expected = [chunk < chunks for _ in range(epochs) for chunk in range(6)]
        else:
            expected = [chunk + 1 < chunks for chunk in range(5) for _ in range(epochs)]
        assert moves == expected


class Backwards(train_gpt.Ranks):
    """A rank that takes the work from its end."""

    def queue(self, items):
        yield from enumerate(items[::-1], 1)


def evaluated(model, stream, run, began=None):
    """Figures, the Score, and the table of the evaluation that a run would make."""
    began = time.perf_counter() if began is None else began
    figures, score, scores = train_gpt.evaluate_documents(model, stream, run, "tag", began)
    scores.remove()
    assert not list(run.folder.glob("scores_*"))
    return figures, score, scores


@every_mode
def test_totals_do_not_depend_on_batch_size_or_order(run, tmp_path, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=2)
    model, stream = random_model(s), stream_of(s, LENGTHS)

    def evaluate(name, batch_size, reverse=False):
        (tmp_path / name).mkdir()
        other = run_of(run, replace(s, ttt_batch_size=batch_size), tmp_path / name)
        if reverse:
            other.ranks = Backwards()
        report, score, _ = evaluated(model, stream, other)
        assert score.bpb == report["backward_looking"]["val_bpb"]
        with np.load(tmp_path / name / "ttt_documents.npz") as kept:
            return report, {key: kept[key] for key in kept}

    report, kept = evaluate("two", 2)
    assert kept["index"].tolist() == list(range(9)) and kept["targets"].tolist() == LENGTHS
    assert kept["bytes"].tolist() == stream.document_bytes.tolist()
    assert (kept["figures_finished"] == s.ttt_figures).all()
    for figure in (report["no_adaptation"], report["backward_looking"], report["last_epoch"]):
        assert (figure["targets"], figure["bytes"], figure["lacking"]) == (sum(LENGTHS), stream.byte_count, 0)
        bits = figure["val_loss"] * figure["targets"] / math.log(2)
        assert figure["val_bpb"] == pytest.approx(bits / figure["bytes"])
    losses = [report[name]["val_loss"] * sum(LENGTHS) for name in ("no_adaptation", "backward_looking", "last_epoch")]
    rows = kept["nll_no_adaptation"], kept["nll_per_epoch"][0], kept["nll_per_epoch"][-1]
    assert losses == pytest.approx([row.sum() for row in rows])
    for other in (evaluate("all", 20), evaluate("backwards", 3, reverse=True)):
        for name in ("nll_no_adaptation", "nll_per_epoch"):
            np.testing.assert_allclose(other[1][name], kept[name], rtol=1e-5)
        assert other[0]["last_epoch"]["val_bpb"] == pytest.approx(report["last_epoch"]["val_bpb"], rel=1e-5)


def test_adapters_are_drawn_by_seed_and_document_alone():
    s = small(num_layers=3, ttt_lora_rank=8, ttt_lora_targets="mlp.proj,c_q,mlp.fc")
    a = train_gpt.draw_lora_a(s, 3)
    assert a.shape == (3 * 8 * (32 + 32 + 96),) and a.dtype == np.float32
    assert (a == train_gpt.draw_lora_a(replace(s, ttt_lora_targets="c_q,mlp.fc,mlp.proj"), 3)).all()
    for other in (train_gpt.draw_lora_a(s, 4), train_gpt.draw_lora_a(replace(s, seed=7), 3)):
        assert (a != other).mean() > 0.99
    of_layers = a.reshape(3, -1)
    for part, inputs in zip(np.split(of_layers, [8 * 32, 8 * 64], axis=1), (32, 32, 96), strict=True):
        bound = inputs**-0.5
        assert abs(part).max() <= bound and abs(part).max() > 0.95 * bound and abs(part.mean()) < 0.1 * bound
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.05)


# ---- The same buffers for other documents, and the same steps for other chunks


def both_passes(batch, documents):
    """The NLL of every target of these documents, by figure."""
    batch.load(np.array(documents))
    return batch.read().figures.numpy()


@every_mode
def test_a_batch_that_takes_up_other_documents_scores_them_as_a_fresh_one_does(run, monkeypatch, protocol, context):
    """Bit by bit; also fewer than before, and after documents that were longer, shorter or cut off in the middle."""
    s = small(num_layers=2, ttt_protocol=protocol, ttt_context=context, ttt_eval_seq_len=32)
    model, stream, run = random_model(s), stream_of(s, LENGTHS), run_of(run, s)
    batch = Traced(model, stream, 3, run)

    def scored_as_afresh(documents):
        fresh = Traced(model, stream, len(documents), run)
        return np.array_equal(both_passes(batch, documents), both_passes(fresh, documents), equal_nan=True)

    for documents in ([7, 0, 5], [6, 2, 3], [7, 0], [2]):
        assert scored_as_afresh(documents)
    clock = Clock(monkeypatch)
    batch.load(np.array([1, 4]))
    batch.adapt(2, clock.now + 2.5)  # is cut off
    assert (batch.target_nll()[1] == train_gpt.UNSCORED).any()
    assert scored_as_afresh([5, 2])
    with pytest.raises(ValueError, match="longest first"):
        batch.load(np.array([5, 1]))


@every_mode
def test_steps_that_a_graph_replays_give_the_figures_of_steps_launched_one_by_one(run, monkeypatch, protocol, context):
    """All that differs from chunk to chunk or from batch to batch must reach a step through the device's tensors."""
    s = small(num_layers=2, ttt_protocol=protocol, ttt_context=context, ttt_eval_seq_len=40)
    model, stream, graphs = random_model(s), stream_of(s, LENGTHS), Graphs(monkeypatch)
    plain, graphed = run_of(run, s), run_of(run, s)
    graphed.cuda = graphed.graphs = graphed.compile = True  # compiled code has one width for all chunks
    graphed.event, graphed.compiled = torch.cuda.Event(), lambda function, **_: function
    batches = [np.array(documents) for documents in ([7, 0], [5, 6], [0], [7, 0])]
    batch, steps = Traced(model, stream, 2, graphed), []
    monkeypatch.setattr(batch, "_step", lambda step, inner=batch._step: steps.append(step) or inner(step))
    for documents in batches:
        expected = both_passes(Traced(model, stream, 2, plain), documents)
        np.testing.assert_allclose(both_passes(batch, documents), expected, rtol=2e-5)
    assert max(steps.count(step) for step in steps) == 2  # launched once, recorded once, and replayed ever after
    assert graphs.captured == len(steps) - len(set(steps)) and graphs.replayed > 1.5 * graphs.captured


# ---- No later token reaches an earlier score


def changes_before(model, lengths, run):
    """For documents of these lengths, each changed after a random token t: the largest change of any NLL of a target up
    to t, by figure, (1 + figures, documents)."""
    rng = np.random.default_rng(run.s.seed)
    one = stream_of(run.s, lengths)
    spans = zip(one.starts, one.lengths, strict=True)
    tokens = np.concatenate([one.tokens[start : start + count + 1].numpy() for start, count in spans])
    starts = one.starts + np.arange(len(lengths))  # a document's last target is not the next one's first token here
    at = rng.integers(1, lengths)
    other = rng.integers(train_gpt.BOS + 1, run.s.vocab_size - 1, len(tokens))
    other += other >= tokens  # never what stood there, never BOS
    index = np.arange(len(tokens)) - np.repeat(starts, one.lengths + 1)
    changed = np.where(index > np.repeat(at, one.lengths + 1), other, tokens)
    streams = (
        train_gpt.Stream(each, np.zeros(len(each) - 1, np.int16), torch.device("cpu"), (starts, one.lengths))
        for each in (tokens, changed)
    )
    before, after = (batch_of(model, each, np.arange(len(lengths)), run).figures for each in streams)
    return torch.stack([(after - before)[:, row, :t].abs().amax(1) for row, t in enumerate(at)], 1)


@every_mode
def test_no_later_token_reaches_an_earlier_score_but_in_replays_later_epochs(run, protocol, context):
    s = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3)
    for seed in range(2):
        changes = changes_before(random_model(s), [100, 70, 48, 33], run_of(run, replace(s, seed=seed)))
        assert not changes[:2].any()  # without adaptation, and what is backward-looking: not by a last bit
        assert (changes[2:] > 0).all()


def test_a_model_that_looks_ahead_would_be_caught(run, monkeypatch):
    def ahead(q, k, v, kv, backend):
        kv[:, 0, :, -k.size(2) :], kv[:, 1, :, -v.size(2) :] = k.detach(), v.detach()
        before = kv[..., : -k.size(2), :]
        keys, values = torch.cat((before[:, 0], k), 2), torch.cat((before[:, 1], v), 2)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    monkeypatch.setattr(train_gpt, "attend", ahead)
    s = small(ttt_protocol="single_pass")
    assert (changes_before(random_model(s), [70, 60, 50], run_of(run, s)).amax(1) > 0).all()


# ---- The deadline


class Clock:
    """Stands still but for a tick with every Adam step."""

    def __init__(self, monkeypatch, tick=1.0):
        self.now = 1000.0
        step = train_gpt.Adapters.step

        def ticking(adapters, *args):
            self.now += tick
            return step(adapters, *args)

        monkeypatch.setattr(train_gpt.Adapters, "step", ticking)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@every_mode
def test_a_document_cut_off_keeps_the_figures_that_it_has_finished(run, monkeypatch, protocol, context):
    s, order = small(ttt_protocol=protocol, ttt_context=context, ttt_n_epochs=3), [0, 1, 2]  # of 7, 3 and 2 chunks
    lengths = [100, 40, 20]
    model, stream, clock = random_model(s), stream_of(s, lengths), Clock(monkeypatch)
    whole = batch_of(model, stream, order, run_of(run, s))
    if protocol == "replay":  # after so many steps two epochs of 7, and of the last one two, three or six
        cuts = {16: ([2], [0, 1]), 17: ([2, 1], [0]), 20: ([2, 1], [0]), 7: ([], [0, 1, 2]), 0: ([], [0, 1, 2])}
        sums = {count: min(count // 7, 3) for count in cuts}  # whole epochs of all documents
    else:  # 3 steps a chunk
        cuts = {4: ([2], [0, 1]), 3: ([], [0, 1, 2]), 7: ([2, 1], [0]), 17: ([2, 1], [0]), 0: ([], [0, 1, 2])}
        sums = dict.fromkeys(cuts, 0)
    for count, (done, cut) in cuts.items():
        batch = batch_of(model, stream, order, run_of(run, s), deadline=clock.now + count - 0.5)
        nll, full = batch.totals(), whole.totals()
        at = 1 + sums[count]
        assert (nll[:at] == full[:at]).all() and (nll[at, done] == full[at, done]).all(), count  # bit by bit
        assert (nll[at, cut] == train_gpt.UNSCORED).all() and (nll[at + 1 :] == train_gpt.UNSCORED).all(), count
        chunks = min(count, 7) if protocol == "replay" else -(-count // 3)  # scored for the first figure
        for known, all_of_it in zip(batch.rows[1], whole.rows[1], strict=True):
            end = min(len(known), 16 * chunks)
            assert (known[:end] == all_of_it[:end]).all() and (known[end:] == train_gpt.UNSCORED).all(), count


@pytest.mark.parametrize("budget, margin", [(5, 0.5), (10, 1), (20, 2), (40, 2)])
@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_the_evaluation_stops_a_tenth_of_its_budget_or_two_seconds_before_its_end(
    run, tmp_path, monkeypatch, protocol, budget, margin
):
    s = small(num_layers=2, ttt_protocol=protocol, ttt_n_epochs=99, eval_max_seconds=budget, ttt_batch_size=2)
    model, stream = random_model(s), stream_of(s, [40, 40])
    clock = Clock(monkeypatch, 0.5)
    report, _, _ = evaluated(model, stream, run_of(run, s, tmp_path), clock.now)
    assert report["seconds"] == budget - margin  # the first step that would begin later does not
    assert report["within_budget"] is True and report["last_epoch"]["lacking"] == 2


def test_each_figure_says_how_many_documents_it_lacks_and_takes_their_plain_score(run, tmp_path, monkeypatch):
    s = small(ttt_n_epochs=4, eval_max_seconds=25, ttt_batch_size=2)  # 23 steps
    lengths = [40, 30, 20, 10]
    model, stream = random_model(s), stream_of(s, lengths)
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
    whole, _, _ = evaluated(model, stream, run_of(run, replace(s, eval_max_seconds=0), tmp_path / "whole"))
    lines = []
    other = run_of(run, s, tmp_path / "cut")
    other.log = lambda line, console=True: lines.append(line)
    clock = Clock(monkeypatch)
    cut, score, _ = evaluated(model, stream, other, clock.now)
    # 3 + 2 for the score, 12 for the epochs of documents of 40 and 30, 6 left: three of those of 20 and 10
    assert [figure["lacking"] for figure in cut["curve"]] == [0, 0, 0, 2]
    assert [figure["lacking"] for figure in whole["curve"]] == [0, 0, 0, 0] and whole["within_budget"] is True
    assert cut["backward_looking"] == cut["curve"][0] and cut["last_epoch"] == cut["curve"][-1]
    assert any("first_lacks:0" in line and "last_lacks:2" in line for line in lines)
    one, other = (np.load(tmp_path / name / "ttt_documents.npz") for name in ("cut", "whole"))
    assert one["figures_finished"].tolist() == [4, 4, 3, 3]
    for row, epoch in zip(one["nll_per_epoch"], other["nll_per_epoch"], strict=True):
        assert row[:2].tolist() == epoch[:2].tolist()
    assert (one["nll_per_epoch"][:3] == other["nll_per_epoch"][:3]).all()
    assert (one["nll_per_epoch"][3, 2:] == one["nll_no_adaptation"][2:]).all()
    assert score.nll == one["nll_per_epoch"][0].sum() and score.targets == sum(lengths)


def test_epochs_that_a_deadline_cut_off_are_made_up_for_by_a_resume_with_more_time(run, tmp_path, monkeypatch):
    """Also those of a document that has some of them: the figures end as if there had been time from the start."""
    s = small(ttt_n_epochs=4, eval_max_seconds=25, ttt_batch_size=2)  # as above
    model, stream = random_model(s), stream_of(s, [40, 30, 20, 10])
    (tmp_path / "whole").mkdir()
    whole, _, _ = evaluated(model, stream, run_of(run, replace(s, eval_max_seconds=0), tmp_path / "whole"))
    with monkeypatch.context() as patched:
        now = Clock(patched).now
        cut, _, kept = train_gpt.evaluate_documents(model, stream, run_of(run, s, tmp_path), "tag", now)
    kept.file.close()
    again, _, _ = evaluated(model, stream, run_of(run, replace(s, eval_max_seconds=0, resume=True), tmp_path))
    assert [figure["lacking"] for figure in cut["curve"]] == [0, 0, 0, 2]
    assert [figure["val_loss"] for figure in again["curve"]] == [figure["val_loss"] for figure in whole["curve"]]
    assert [figure["lacking"] for figure in again["curve"]] == [0, 0, 0, 0]


def test_if_the_plain_pass_alone_exceeds_the_budget_every_figure_is_the_plain_one(run, tmp_path):
    s = small(eval_max_seconds=1e-9)
    model, stream = random_model(s), stream_of(s, [100, 40, 20])
    report, _, _ = evaluated(model, stream, run_of(run, s, tmp_path))
    assert report["within_budget"] is False
    for figure in report["curve"]:
        assert (figure["targets"], figure["bytes"], figure["lacking"]) == (160, stream.byte_count, 3)
        assert figure["val_loss"] == report["no_adaptation"]["val_loss"]


# ---- The plan


def cost_by_hand(targets, size, floor):
    """Tokens of a batch's chunk steps one after another, none cheaper than the floor."""
    chunks = range(-(-max(targets) // size))
    return sum(max(floor, sum(min(size, max(0, t - c * size)) for t in targets)) for c in chunks)


def ranks_of(s, world, device):
    run = train_gpt.Run(replace(s, device="cpu"))
    run.ranks.world, run.device, run.cuda = world, torch.device(device), device == "cuda"
    return run


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=200),
    st.integers(1, 8),
    st.integers(0, 9),
    st.sampled_from(("cpu", "cuda")),
)
def test_every_document_is_in_one_batch_and_the_costliest_batches_come_first(lengths, world, batch_size, device):
    s = small(ttt_batch_size=batch_size)
    batches = train_gpt.batch_documents(np.array(lengths), ranks_of(s, world, device))
    alone = train_gpt.batch_documents(np.array(lengths), ranks_of(s, 1, device))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in alone]  # of any number of ranks
    assert sorted(d for batch in batches for d in batch.tolist()) == list(range(len(lengths)))
    of_batches = [[lengths[d] for d in batch] for batch in batches]
    for inside in of_batches:
        assert inside == sorted(inside, reverse=True) and len(inside) <= (batch_size or 10**9)
    ends = sorted((max(inside), min(inside)) for inside in of_batches)  # of like length: no batch reaches into another
    assert all(longest <= shortest for (longest, _), (_, shortest) in itertools.pairwise(ends))
    costs = [train_gpt.batch_cost(np.array(inside), s, train_gpt.STEP_FLOOR[device]) for inside in of_batches]
    assert costs == sorted(costs, reverse=True)


def test_eight_ranks_share_the_real_lengths_evenly(shared):
    tokens = train_gpt.open_shard(shared / "fineweb" / "fineweb_val_000000.bin")
    _, targets = train_gpt.find_documents(tokens[:])
    jitter = np.random.default_rng(0).uniform(0.8, 1.25, (80, len(targets)))  # 50,000 documents, as the split has
    targets = np.maximum(1, targets * jitter).astype(np.int64).ravel()
    targets[777] = 18_743  # the longest document of the whole split
    ranks = ranks_of(train_gpt.Settings.from_env({}), 8, "cuda")
    batches = train_gpt.batch_documents(targets, ranks)
    floor = train_gpt.STEP_FLOOR["cuda"]
    predicted, plain = np.zeros((2, 8))
    for batch in batches:  # each goes to the rank that is free first
        rank = predicted.argmin()
        predicted[rank] += train_gpt.batch_cost(targets[batch], ranks.s, floor)
        plain[rank] += cost_by_hand(targets[batch].tolist(), 256, floor)
    assert predicted.max() < 1.03 * predicted.mean()
    assert plain.max() < 1.05 * plain.mean()  # without the weight of attention, which the plan counts as well
    assert any(777 in batch for batch in batches[:8])
