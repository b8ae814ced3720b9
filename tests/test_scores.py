"""The table of what is scored: merged in any order, kept through kills; and what is computed from it: the mixture and
the sums by position, against loops."""

import io
import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, run_of, small, stream_of
from train_gpt import ADAPTED, PLAIN, UNSCORED

LENGTHS = [40, 130, 16, 1, 90, 33]


def scores_of(run, folder, lengths=(3, 2, 1), **changes):
    """The table of a stream of documents with these numbers of targets, in the folder."""
    folder.mkdir(exist_ok=True)
    s = small(**dict(ttt_n_epochs=2, resume=True) | changes)
    return train_gpt.Scores("tag", stream_of(s, list(lengths)), run_of(run, s, folder))


# ---- Merging

ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 3),  # figure: without adaptation, adapted, two epochs
        st.integers(0, 2),  # document
        st.integers(0, 4),  # targets that a deadline cut off
        st.sampled_from((0.5, 2.0, 7.0, math.inf)),
        st.integers(0, 2),  # rank
    ),
    max_size=12,
)


def add(scores, figure, document, cut, value):
    """What a rank keeps of one document: its first targets' NLL, or an epoch's sum."""
    count = int(scores.stream.lengths[document])
    nll = np.full(count if figure < 2 else 1, value)
    if figure < 2:
        nll[max(0, count - cut) :] = UNSCORED
    scores.add(figure, np.array([document]), [nll])


@settings(deadline=None, max_examples=40)
@given(ENTRIES, st.randoms())
def test_what_ranks_and_sessions_know_merges_in_any_order_to_the_worse_of_two_numbers(
    run, tmp_path_factory, entries, random
):
    expected = [np.full(6, UNSCORED), np.full(6, UNSCORED), np.full(3, UNSCORED), np.full(3, UNSCORED)]
    starts, lengths = [0, 3, 5], [3, 2, 1]
    for figure, document, cut, value, _ in entries:
        if figure < 2:
            at = slice(starts[document], starts[document] + max(0, lengths[document] - cut))
        else:
            at = slice(document, document + 1)
        expected[figure][at] = np.maximum(expected[figure][at], value)
    shuffled = list(entries)
    random.shuffle(shuffled)
    for order in (entries, shuffled):
        folder = tmp_path_factory.mktemp("scores")
        for rank in range(3):
            mine = [entry for entry in order if entry[4] == rank]
            for session in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):
                scores = scores_of(run, folder)
                for entry in session:
                    add(scores, *entry[:4])
                scores.file.close()
        merged = scores_of(run, folder)
        assert [row.tolist() for row in (*merged.targets, *merged.epochs)] == [row.tolist() for row in expected]
        for row in (PLAIN, ADAPTED):
            for total, a, n in zip(merged.of_documents(merged.targets[row]), starts, lengths, strict=True):
                nll = expected[row][a : a + n]
                assert total == (UNSCORED if (nll == UNSCORED).any() else nll.sum())
        merged.remove()
        assert not list(folder.iterdir())


def test_a_file_that_is_cut_off_anywhere_costs_only_what_came_after(run, tmp_path):
    scores = scores_of(run, tmp_path)
    ends, tables = [0], [[UNSCORED] * 6]
    for document in (2, 0, 1):
        add(scores, PLAIN, document, 0, 2.0)
        ends.append(scores.path.stat().st_size)
        tables.append(scores.targets[PLAIN].tolist())
    content = scores.path.read_bytes()
    near = {end + off for end in ends for off in (-1, 0, 1)}
    for length in sorted({*near, *range(0, len(content), 5)} & {*range(len(content))}):
        scores.path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends[1:])
        again = scores_of(run, tmp_path)
        assert again.targets[PLAIN].tolist() == tables[whole], length
        again.file.close()
        again.path.unlink()
    add(scores_of(run, tmp_path), ADAPTED, 1, 0, 1.0)  # by a session that goes on
    again = scores_of(run, tmp_path)
    assert again.targets[ADAPTED].tolist() == [UNSCORED] * 3 + [1.0] * 2 + [UNSCORED]
    fresh = scores_of(run, tmp_path, resume=False)
    assert (fresh.targets == UNSCORED).all() and not fresh.path.stat().st_size


def saved(*arrays):
    content = io.BytesIO()
    for array in arrays:
        np.save(content, array)
    return content.getvalue()


ROWS = np.array([[0, 0, 3]])
DAMAGED = {
    "text": b"no array at all",
    "zeros": bytes(500),
    "one array": saved(ROWS),
    "numbers that are text": saved(ROWS, np.array(["a", "b", "c"])),
    "a document that there is not": saved(np.array([[0, 7, 3]]), np.ones(3)),
    "a figure that there is not": saved(np.array([[9, 0, 1]]), np.ones(1)),
    "more targets than the document has": saved(np.array([[0, 0, 9]]), np.ones(9)),
    "rows of another width": saved(np.array([[0, 0]]), np.ones(3)),
    "rows of fractions": saved(np.array([[0.0, 0.0, 3.0]]), np.ones(3)),
    "no rows": saved(np.zeros((0, 3), int), np.ones(0)),
    "a pickle": saved(np.array([{}], dtype=object), np.ones(3)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_costs_its_own_scores_and_nothing_else(run, tmp_path, name):
    good = scores_of(run, tmp_path)
    add(good, PLAIN, 2, 0, 2.0)
    good.file.close()
    (tmp_path / "scores_tag_1.bin").write_bytes(DAMAGED[name])
    (tmp_path / "scores_other_1.bin").write_bytes(good.path.read_bytes().replace(b"tag", b"tag"))
    again = scores_of(run, tmp_path)
    assert again.targets[PLAIN].tolist() == [UNSCORED] * 5 + [2.0] and (again.targets[ADAPTED] == UNSCORED).all()
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["scores_other_1.bin"]  # another evaluation's stays


def test_a_disk_that_is_full_is_a_users_error(run, tmp_path):
    scores = scores_of(run, tmp_path)
    scores.file.close()
    if not train_gpt.os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    scores.file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(train_gpt.UserError, match="scores_tag_0_.*bin: No space left on device — "):
        add(scores, PLAIN, 0, 0, 2.0)


def test_nan_is_the_worst_of_numbers_and_never_taken_for_nothing_scored(run):
    """In a document's sum and in single targets, whatever merged with it."""
    s = small()
    batch = train_gpt.DocumentBatch(random_model(s), stream_of(s, [20, 9]), 2, run_of(run, s))
    batch.load(np.array([0, 1]))
    batch.adapt(2)
    batch.epochs[1][1] = math.nan
    assert batch.epoch_nll()[1, 1] == math.inf and np.isfinite(batch.epoch_nll()[0]).all()
    batch.nll[1, 4] = math.nan
    nll = batch.target_nll()[1]
    assert nll[4] == math.inf and np.isfinite(np.delete(nll, 4)).all()
    batch.adapt(2, deadline=0.0)
    assert (batch.epoch_nll() == UNSCORED).all() and (batch.target_nll()[0] == UNSCORED).all()


# ---- A mixture of two predictions


def slowly(parts, share):
    """Fixed share of one document, one target after another, as SPEC section 5 writes it for two parts, on
    probabilities: float64, to which numpy's longdouble gives some more exponent."""
    k = len(parts)
    weights, nll = np.full(k, 1 / k, np.longdouble), []
    for row in zip(*parts, strict=True):
        probabilities = np.exp(-np.array(row, np.longdouble))
        p = weights @ probabilities
        nll.append(float(-np.log(p)))
        weights = (1 - share) * weights * probabilities / p + share / k
    return nll


NLL = st.one_of(st.floats(0, 20, width=32), st.sampled_from((0.0, 1e-6, 50.0, 300.0)))
ROWS = st.sampled_from((2, 3)).flatmap(
    lambda k: st.lists(st.lists(st.tuples(*[NLL] * k), min_size=1, max_size=30), min_size=1, max_size=5)
)


def mixed(documents, share):
    """The mixture's NLL of documents, each a list of one NLL of each part, one after another."""
    lengths = np.array([len(rows) for rows in documents])
    parts = np.array([row for rows in documents for row in rows], np.float32).T
    nll = train_gpt.mixture(parts, np.cumsum(lengths) - lengths, lengths, share)
    assert nll.dtype == np.float64 and nll.shape == (lengths.sum(),)
    return np.split(nll, np.cumsum(lengths)[:-1])


@settings(deadline=None, max_examples=150)
@given(ROWS, st.sampled_from((1e-6, 0.01, 0.1, 0.5, 1.0)), st.randoms())
def test_a_mixture_is_fixed_share_within_its_bound_whatever_the_order_of_documents(documents, share, random):
    found = mixed(documents, share)
    for nll, rows in zip(found, documents, strict=True):
        parts = np.array(rows, np.float32).astype(float).T
        np.testing.assert_allclose(nll, slowly(parts, share), rtol=1e-9, atol=1e-9)
        n, total, k = len(rows), nll.sum(), len(parts)
        for part in parts:  # never more behind any than the theorem allows
            bound = math.log(k) + n * math.log(1 / (1 - share * (k - 1) / k))
            assert total <= part.sum() + bound + 1e-9 * (1 + part.sum())
        assert (nll >= parts.min(0) - 1e-12).all() and (nll <= parts.max(0) + 1e-12).all()
    order = list(range(len(documents)))
    random.shuffle(order)
    for place, nll in zip(order, mixed([documents[i] for i in order], share), strict=True):
        assert nll.tolist() == found[place].tolist()  # bit by bit


def test_a_later_target_changes_no_earlier_one_of_a_mixture():
    rng = np.random.default_rng(0)
    pairs = rng.exponential(3.0, (50, 2)).astype(np.float32).tolist()
    for t in (0, 1, 20, 48):
        changed = pairs[: t + 1] + (np.array(pairs[t + 1 :]) + 1).tolist()
        before, after = mixed([pairs], 0.1)[0], mixed([changed], 0.1)[0]
        assert before[: t + 1].tolist() == after[: t + 1].tolist() and (before[t + 1 :] != after[t + 1 :]).all()


def test_predictions_that_float64_cannot_tell_from_certainty_or_from_nothing():
    """e^-5000 is 0: what is common to both is taken out first. An infinite loss of one is the other's prediction."""
    (nll,) = mixed([[(5000.0, 5001.0), (5001.0, 5000.0), (math.inf, 2.0), (2.0, math.inf), (0.0, 0.0)]], 0.1)
    assert nll[0] == pytest.approx(5000 - math.log(0.5 + 0.5 * math.exp(-1)), abs=1e-9) and np.isfinite(nll).all()
    assert nll[2] > 2.0 and nll[4] == pytest.approx(0, abs=1e-12)


def the_mixture_of(kept, figures, stream, share):
    """What the run must say of its mixture, from NLL of every target."""
    known = np.where(kept.targets == UNSCORED, kept.targets[PLAIN], kept.targets).astype(float)
    spans = [slice(a, a + n) for a, n in zip(stream.starts, stream.lengths, strict=True)]
    nll = [sum(slowly(known[:, span], share)) for span in spans]
    assert figures["mixture"]["val_loss"] == pytest.approx(sum(nll) / stream.target_count, rel=1e-9)
    assert figures["mixture"]["share"] == share and figures["mixture"]["backward_looking"] is True
    assert figures["score"] == "mixture"
    return np.array(nll)


def test_each_adapted_part_is_what_its_learning_rate_alone_gives(run, tmp_path):
    """The third part under TTT_MIXTURE_LR is the adaptation of TTT_LORA_LR, were it that; the second stays."""
    shown = {}
    for name, changes in dict(low=dict(ttt_lora_lr=0.01), high=dict(ttt_lora_lr=0.1), both=BOTH).items():
        s = small(ttt_mixture=True, ttt_protocol="single_pass", **changes)
        (tmp_path / name).mkdir()
        here = run_of(run, s, tmp_path / name)
        arguments = random_model(s), stream_of(s, LENGTHS), here, "tag", time.perf_counter()
        figures, _, scores = train_gpt.evaluate_documents(*arguments)
        shown[name] = figures["mixture"]["parts"], scores.targets
    parts, targets = shown["both"]
    assert list(parts) == ["no_adaptation", "single_pass", "single_pass_at_0.1"]
    assert (
        parts["single_pass"] == shown["low"][0]["single_pass"] and (targets[ADAPTED] == shown["low"][1][ADAPTED]).all()
    )
    assert parts["single_pass_at_0.1"] == shown["high"][0]["single_pass"]
    assert (targets[2] == shown["high"][1][ADAPTED]).all() and (targets[2] != targets[ADAPTED]).any()


BOTH = dict(ttt_lora_lr=0.01, ttt_mixture_lr=0.1)


@pytest.mark.parametrize("rates", (dict(ttt_lora_lr=0.05), BOTH), ids=("one rate", "two rates"))
@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_the_mixture_is_the_score_and_does_not_depend_on_batches_or_a_resume(run, tmp_path, protocol, rates):
    s = small(ttt_mixture=True, ttt_protocol=protocol, **rates)
    model, stream = random_model(s), stream_of(s, LENGTHS)
    kept = {}
    for name, size in (("three", 3), ("all", 9)):
        (tmp_path / name).mkdir()
        here = run_of(run, replace(s, ttt_batch_size=size), tmp_path / name)
        figures, score, scores = train_gpt.evaluate_documents(model, stream, here, "tag", time.perf_counter())
        by_document = the_mixture_of(scores, figures, stream, s.ttt_mixture_share)
        assert score.loss == figures["mixture"]["val_loss"] and score.targets == sum(LENGTHS)
        scores.file.close()
        with np.load(tmp_path / name / "ttt_documents.npz") as arrays:
            kept[name] = arrays["nll_mixture"]
        np.testing.assert_allclose(kept[name], by_document, rtol=1e-9)
    np.testing.assert_allclose(kept["all"], kept["three"], rtol=1e-5)
    again = run_of(run, replace(s, ttt_batch_size=3, resume=True), tmp_path / "three")  # its scores are still there
    figures, score, scores = train_gpt.evaluate_documents(model, stream, again, "tag", time.perf_counter())
    assert score.nll == kept["three"].sum()


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_where_a_deadline_cuts_off_the_prediction_without_adaptation_mixes_with_itself(
    run, tmp_path, monkeypatch, protocol
):
    s = small(ttt_mixture=True, ttt_protocol=protocol, **BOTH, eval_max_seconds=5, ttt_batch_size=2)
    model, stream = random_model(s), stream_of(s, [100, 70, 40])
    now, step = [1000.0], train_gpt.Adapters.step

    def ticking(adapters, *arguments):
        now[0] += 1.0
        return step(adapters, *arguments)

    monkeypatch.setattr(train_gpt.Adapters, "step", ticking)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    figures, score, scores = train_gpt.evaluate_documents(model, stream, run_of(run, s, tmp_path), "tag", now[0])
    adapted = scores.targets[ADAPTED] != UNSCORED
    begun = np.add.reduceat(adapted, stream.starts)
    assert 0 < begun[0] < 100 and begun[2] == 0 and figures["mixture"]["lacking"] >= 2  # cut off in the middle
    nll = the_mixture_of(scores, figures, stream, s.ttt_mixture_share)
    assert nll[2] == pytest.approx(figures_of(scores, stream)[2], rel=1e-9)  # p0 alone
    assert score.nll == pytest.approx(nll.sum(), rel=1e-12)
    missing = np.logical_or.reduceat((scores.targets == UNSCORED).any(0), stream.starts)
    with np.load(tmp_path / "ttt_documents.npz") as arrays:  # a document that lacks one part lacks the score
        assert ((arrays["figures_finished"] == 0) == missing).all()
    assert figures["mixture"]["lacking"] == missing.sum()
    whole = [np.add.reduceat(row.astype(float), stream.starts) for row in scores.targets]
    whole = [np.where(np.isfinite(row), row, whole[0]).sum() for row in whole]
    parts = [bpb * math.log(2) * stream.byte_count for bpb in figures["mixture"]["parts"].values()]
    assert parts == pytest.approx(whole, rel=1e-6)  # by whole documents, as every other figure


def test_a_deadline_between_the_parts_of_a_mixture_leaves_no_half_scored_document(run, tmp_path, monkeypatch):
    s = small(ttt_mixture=True, ttt_protocol="single_pass", **BOTH, eval_max_seconds=5)
    model, stream = random_model(s), stream_of(s, [100, 70, 40])
    adapt = train_gpt.DocumentBatch.adapt

    def late(batch, epochs, deadline, a=None, part=0):
        return adapt(batch, epochs, math.inf if part == 0 else 0.0, a, part)

    monkeypatch.setattr(train_gpt.DocumentBatch, "adapt", late)
    figures, _, scores = train_gpt.evaluate_documents(
        model, stream, run_of(run, s, tmp_path), "tag", time.perf_counter()
    )
    assert (scores.targets[ADAPTED] != UNSCORED).all() and (scores.targets[2] == UNSCORED).all()
    assert figures["mixture"]["lacking"] == 3 and figures["backward_looking"]["lacking"] == 0
    with np.load(tmp_path / "ttt_documents.npz") as arrays:
        assert arrays["figures_finished"].tolist() == [0, 0, 0]


def figures_of(scores, stream):
    return np.add.reduceat(scores.targets[PLAIN].astype(float), stream.starts)


# ---- By position in the document


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 9))
def test_sums_by_position_are_those_of_a_loop(lengths, seed):
    stream = stream_of(small(), lengths, seed)
    rng = np.random.default_rng(seed)
    nll = {name: rng.exponential(2.0, sum(lengths)).astype(np.float32) for name in ("one", "other")}
    found = train_gpt.by_position(nll, stream)
    ends = [64]
    while ends[-1] < max(lengths):
        ends.append(2 * ends[-1])
    spans = [(a, min(b, max(lengths))) for a, b in itertools.pairwise([0, *ends])]
    assert list(found["ends"]) == [b for _, b in spans] and list(found["figures"]) == list(nll)
    bytes_ = stream.bytes.numpy()
    for i, (a, b) in enumerate(spans):
        where = [start + t for start, n in zip(stream.starts, lengths, strict=True) for t in range(a, min(b, n))]
        assert found["targets"][i] == len(where) and found["bytes"][i] == bytes_[where].sum()
        for row, values in zip(found["nll"], nll.values(), strict=True):
            assert row[i] == pytest.approx(values[where].astype(float).sum(), rel=1e-9, abs=1e-9)


def test_positions_are_kept_of_both_predictions_and_the_mixture_and_add_up_to_their_figures(run, tmp_path):
    s = small(ttt_mixture=True, ttt_protocol="single_pass")
    model, stream = random_model(s), stream_of(s, LENGTHS)
    figures, *_ = train_gpt.evaluate_documents(model, stream, run_of(run, s, tmp_path), "tag", time.perf_counter())
    with np.load(tmp_path / "ttt_positions.npz") as kept:
        assert list(kept["figures"]) == ["no_adaptation", "single_pass", "mixture"]
        assert kept["targets"].sum() == sum(LENGTHS) and kept["bytes"].sum() == stream.byte_count
        losses = [figures[name]["val_loss"] for name in ("no_adaptation", "backward_looking", "mixture")]
        assert (kept["nll"].sum(1) / sum(LENGTHS)).tolist() == pytest.approx(losses, rel=1e-6)
