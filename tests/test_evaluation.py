"""Byte counts, documents, and the standard and sliding evaluations against windows run one by one."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, random_tokens, run_of, small
from test_model import reference

BOS = 1


def documents_by_hand(tokens):
    """(start, targets) of each document: from each BOS to the next inclusive; what precedes the first is one, too."""
    bounds = [i for i, token in enumerate(tokens) if token == BOS and 0 < i < len(tokens) - 1]
    bounds = [0, *bounds, len(tokens) - 1]
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=2, max_size=40))
def test_documents_divide_the_targets(tokens):
    starts, targets = train_gpt.find_documents(np.array(tokens, np.uint16))
    assert list(zip(starts.tolist(), targets.tolist(), strict=True)) == documents_by_hand(tokens)
    scored = [start + i for start, count in zip(starts, targets, strict=True) for i in range(count)]
    assert scored == list(range(len(tokens) - 1))  # each target once, in order
    assert starts.dtype == targets.dtype == np.int64


@pytest.mark.parametrize(
    "tokens, expected",
    (
        ([5, 6, 7], [(0, 2)]),  # no BOS
        ([5, 6, 1, 7, 8], [(0, 2), (2, 2)]),  # tokens before the first
        ([1, 5, 6, 1], [(0, 3)]),  # a lone last BOS is a target, not a document
        ([1, 1, 1, 5], [(0, 1), (1, 1), (2, 1)]),  # documents of one target
        ([5, 1], [(0, 1)]),
    ),
)
def test_documents_at_the_edges(tokens, expected):
    starts, targets = train_gpt.find_documents(np.array(tokens, np.uint16))
    assert list(zip(starts, targets, strict=True)) == expected


@pytest.fixture(scope="module")
def tokenizer(shared):
    return train_gpt.load_tokenizer(str(shared / "fineweb" / "fineweb_1024_bpe.model"), 1024)


def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(tokenizer):
    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1), min_size=1, max_size=3
        )
    )
    def check(texts):
        documents = [tokenizer.encode(text) for text in texts]
        tokens = [token for ids in documents for token in (BOS, *ids)]
        expected = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
        assert train_gpt.target_bytes(tokenizer, np.array(tokens)).sum() == expected

    check()


def test_bytes_of_each_kind_of_piece(tokenizer):
    piece = {tokenizer.id_to_piece(i): i for i in range(1024)}
    control, byte = piece["<s>"], piece["<0x41>"]
    assert control == BOS and tokenizer.is_control(control) and tokenizer.is_byte(byte)
    word = max((p for p in piece if p.startswith("▁") and p.isascii() is False), key=len)
    inside = max((p for p in piece if "▁" not in p and not p.startswith("<")), key=len)
    unknown = tokenizer.unk_id()
    letters = len(word.lstrip("▁"))
    pairs = [
        (control, piece[word], letters),
        (unknown, piece[word], letters),
        (byte, piece[word], letters + 1),
        (piece[word], piece[word], letters + 1),
        (control, byte, 1),
        (byte, byte, 1),
        (byte, control, 0),
        (byte, unknown, 0),
        (byte, piece[inside], len(inside.encode())),
        (control, piece[inside], len(inside.encode())),
    ]
    for before, target, expected in pairs:
        assert train_gpt.target_bytes(tokenizer, np.array([before, target])).tolist() == [expected], (before, target)


@pytest.mark.parametrize("count", (0, 1, 3, 625))
def test_val_docs_takes_the_first_documents_whole(shared, run, count):
    paths = dict(data_path=shared / "fineweb", tokenizer_path=shared / "fineweb" / "fineweb_1024_bpe.model")
    runs = [run_of(run, small(vocab_size=1024, val_docs=n, **paths)) for n in (0, count)]
    whole, first = map(train_gpt.load_validation, runs)
    n = count or 625
    assert len(first.lengths) == n and (first.lengths == whole.lengths[:n]).all()
    assert first.target_count == whole.lengths[:n].sum() and first.byte_count == whole.document_bytes[:n].sum()
    assert first.tokens.equal(whole.tokens[: first.target_count + 1])
    assert whole.byte_count == whole.document_bytes.sum() == 1_684_897
    if count == 625:
        with pytest.raises(train_gpt.UserError, match="VAL_DOCS=626"):
            train_gpt.load_validation(run_of(run, small(vocab_size=1024, val_docs=626, **paths)))


def by_hand(model, s, tokens, bytes_, start_of):
    """Nats, targets and bytes where each target is scored alone, at the end of its window from `start_of(target)`."""
    windows = {}
    total = [0.0, 0, 0]
    for t in range(len(tokens) - 1):
        start = start_of(t)
        if start not in windows:
            part = tokens[start : start + s.train_seq_len + 1].tolist()
            windows[start] = reference(model.state_dict(), s, part[:-1], part[1:])[0]
        total = [total[0] + windows[start][t - start].item(), total[1] + 1, total[2] + int(bytes_[t])]
    return total


@pytest.mark.parametrize("world", (1, 2, 3, 8))
def test_a_validation_batch_is_that_of_all_ranks_together(run, world):
    """The most whole rows of each rank that VAL_BATCH_SIZE tokens leave room for; one at least."""
    for size in (7, 16, 100, 1000):
        here = run_of(run, small(val_batch_size=size, train_seq_len=16, train_batch_tokens=16))
        here.ranks = train_gpt.Ranks()
        here.ranks.world = world
        rows = here.most("validation_rows")
        assert rows >= 1 and (rows == 1 or rows * world * 16 <= size) and (rows + 1) * world * 16 > size


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 70), st.integers(4, 24), st.integers(1, 24), st.integers(1, 7), st.integers(0, 9))
def test_each_mode_scores_every_target_once_in_its_own_window(run, length, size, stride, batch, seed):
    stride = min(stride, size)
    s = small(
        num_layers=2,
        train_seq_len=size,
        train_batch_tokens=size,
        eval_stride=stride,
        eval_batch_seqs=batch,
        val_batch_size=batch * size,
    )
    model, tokens = random_model(s, seed), random_tokens(s, length, seed)
    bytes_ = np.random.default_rng(seed).integers(0, 9, length - 1)
    stream = train_gpt.Stream(tokens, bytes_, run.device)

    def row_of(t):
        return t // size * size

    def window_of(t):
        return 0 if t < size else ((t - size) // stride + 1) * stride

    for evaluate, start_of in ((train_gpt.evaluate_standard, row_of), (train_gpt.evaluate_sliding, window_of)):
        nll, targets, total_bytes = by_hand(model, s, tokens, bytes_, start_of)
        score = evaluate(model, stream, run_of(run, s))
        assert (score.targets, score.bytes) == (targets, total_bytes) == (length - 1, bytes_.sum())
        assert score.nll == pytest.approx(nll, rel=1e-5)
        assert score.loss == pytest.approx(nll / targets, rel=1e-5)
        if total_bytes:
            assert score.bpb == pytest.approx(nll / math.log(2) / total_bytes, rel=1e-5)


def test_a_stride_of_the_whole_window_is_the_standard_evaluation(run):
    s = small(eval_stride=32)
    model, tokens = random_model(s), random_tokens(s, 205)
    stream = train_gpt.Stream(tokens, np.ones(204, np.int16), run.device)
    standard = train_gpt.evaluate_standard(model, stream, run_of(run, s))
    sliding = train_gpt.evaluate_sliding(model, stream, run_of(run, s))
    assert standard.nll == pytest.approx(sliding.nll, rel=1e-6)


def test_more_context_does_not_depend_on_how_windows_are_batched(run):
    tokens = random_tokens(small(), 300)
    stream = train_gpt.Stream(tokens, np.ones(299, np.int16), run.device)
    variants = [small(eval_batch_seqs=n) for n in (1, 4, 100)]
    scores = [train_gpt.evaluate_sliding(random_model(s), stream, run_of(run, s)).nll for s in variants]
    assert scores[1:] == pytest.approx(scores[:-1], rel=1e-6)


@pytest.mark.parametrize(
    "windows, covers",
    (
        ([(0, 16, 0), (16, 8, 0)], True),
        ([(0, 16, 0), (8, 16, 8)], True),
        ([(0, 16, 0), (16, 7, 0)], False),
        ([(0, 16, 0), (16, 8, 0), (8, 16, 15)], False),
        ([(0, 16, 0), (16, 8, 1)], False),
    ),
    ids=("whole", "overlapping", "one_short", "one_twice", "one_skipped"),
)
def test_a_score_that_misses_or_repeats_a_target_is_refused(run, windows, covers):
    s = small()
    bytes_ = np.arange(24)
    stream = train_gpt.Stream(random_tokens(s, 25), bytes_, run.device)
    nll, sums = train_gpt.score_windows(random_model(s), stream, torch.tensor(windows).unbind(1), 16)
    for row, (start, length, skip) in zip(sums, windows, strict=True):
        assert row[1:].tolist() == [length - skip, bytes_[start + skip : start + length].sum()]
    assert sums[:, 0].tolist() == pytest.approx(nll.sum(1).tolist())
    total, targets, byte_count = sums.sum(0).tolist()
    score = train_gpt.Score(total, int(targets), int(byte_count))
    with contextlib.nullcontext() if covers else pytest.raises(RuntimeError):
        assert score.checked(stream) == score


@pytest.mark.parametrize("evaluate", (train_gpt.evaluate_standard, train_gpt.evaluate_sliding))
def test_an_evaluation_that_does_not_cover_its_stream_is_refused(run, evaluate):
    stream = train_gpt.Stream(random_tokens(run.s, 100), np.ones(99, np.int16), run.device)
    stream.byte_count = 100
    with pytest.raises(RuntimeError, match="scored 99 targets and 99 bytes"):
        evaluate(random_model(run.s), stream, run)


def test_a_score_with_other_bytes_is_refused(run):
    stream = train_gpt.Stream(np.array([1, 2, 3]), np.array([2, 5]), run.device)
    assert train_gpt.Score(1.0, 2, 7).checked(stream) == (1.0, 2, 7)
    for targets, bytes_ in ((2, 6), (1, 7), (3, 7)):
        with pytest.raises(RuntimeError):
            train_gpt.Score(1.0, targets, bytes_).checked(stream)


def test_sums_are_kept_in_float64(run):
    """A float32 accumulator stops counting at 2^24 and loses what is small beside it."""
    count, value = 40_000, 1 + 2.0**-20
    stream = train_gpt.Stream(np.ones(count + 1, np.int64), np.full(count, 999), run.device)

    def constant(ids, targets, *_):
        return torch.full(ids.shape, value)

    score = train_gpt.evaluate_standard(constant, stream, run)
    assert score == (count * value, count, 999 * count)
