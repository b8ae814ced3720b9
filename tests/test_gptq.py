"""Rounding by GPTQ against the paper's own iteration in float64, and the Hessians that it is given."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
import train_gpt
from conftest import random_model, random_tokens, run_of, small

LIMIT = train_gpt.LIMITS


def by_elimination(weight, step, hessian, limit):
    """Frantar et al. 2022, section 3: one weight of every row after another, with the whole inverse Hessian.

    Each rounding error is made up for by the weights still to come; then the column leaves the inverse by a step of
    Gaussian elimination. Returns codes, and which of them no rounding boundary up to there can have decided."""
    w, step = weight.double().numpy().copy(), step.double().numpy()[:, 0]
    h = hessian.float().double().numpy()
    order = np.argsort(-h.diagonal(), kind="stable")
    inverse = np.linalg.inv(h + max(0.01 * h.diagonal().mean(), 1e-8) * np.eye(len(h)))
    codes, sure = np.zeros(w.shape), np.zeros(w.shape, bool)
    certain = np.ones(len(w), bool)
    for i, j in enumerate(order):
        exact = w[:, j] / step
        codes[:, j] = np.clip(np.round(exact), -limit - 1, limit)
        certain &= abs(abs(exact - np.floor(exact)) - 0.5) > 1e-3
        sure[:, j] = certain
        error = (w[:, j] - codes[:, j] * step) / inverse[j, j]
        rest = order[i + 1 :]
        w[:, rest] -= error[:, None] * inverse[j, rest]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, sure


def correlated(cols, seed, samples=None, mixing=0.8):
    """Inputs (samples, cols) float64 of very different sizes, correlated with their neighbours."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples or 3 * cols, cols, generator=g, dtype=torch.float64)
    for j in range(1, cols):
        x[:, j] += mixing * x[:, j - 1]
    return x * torch.exp(0.7 * torch.randn(cols, generator=g, dtype=torch.float64))


def matrices(n, rows, cols, kind="int6", seed=0, sigmas="3.0,3.5"):
    """n random matrices with rows of different sizes, their steps and Hessians."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, rows, cols, generator=g) * torch.exp(0.5 * torch.randn(n, rows, 1, generator=g))
    step = torch.stack([train_gpt.row_steps(w, kind, small(quant_sigmas=sigmas)) for w in weight])
    x = [correlated(cols, seed + i) for i in range(n)]
    return weight, step, torch.stack([each.mT @ each / len(each) for each in x])


@pytest.mark.parametrize(
    "n, rows, cols, kind",
    (
        (1, 7, 5, "int5"),
        (2, 3, 1, "int6"),
        (2, 24, 128, "int5"),
        (3, 16, 129, "int6"),
        (1, 12, 256, "int6"),
        (2, 10, 300, "int5"),
    ),
    ids=str,
)
@pytest.mark.parametrize("sigmas", ("0", "2.0,2.5"))
def test_codes_are_those_of_the_papers_iteration(n, rows, cols, kind, sigmas):
    weight, step, hessian = matrices(n, rows, cols, kind, sigmas=sigmas)
    before = [x.clone() for x in (weight, step, hessian)]
    codes = train_gpt.gptq(weight, step, hessian, LIMIT[kind])
    assert all(x.equal(y) for x, y in zip((weight, step, hessian), before, strict=True))
    compared = 0
    for i in range(n):
        expected, sure = by_elimination(weight[i], step[i], hessian[i], LIMIT[kind])
        assert (codes[i].numpy() == expected)[sure].all()
        compared += sure.sum()
        if cols > 1:
            assert (codes[i] != train_gpt.nearest(weight[i], step[i], LIMIT[kind])).any()
    assert compared > 0.5 * weight.numel()


def test_each_matrix_of_a_batch_is_rounded_as_it_is_alone():
    weight, step, hessian = matrices(4, 9, 150)
    together = train_gpt.gptq(weight, step, hessian, 31)
    for i in range(4):
        alone = train_gpt.gptq(weight[i : i + 1], step[i : i + 1], hessian[i : i + 1], 31)
        assert (together[i] != alone[0]).float().mean() < 0.01  # but for boundaries that a last bit decides
        expected, sure = by_elimination(weight[i], step[i], hessian[i], 31)
        assert (together[i].numpy() == expected)[sure].all() and (alone[0].numpy() == expected)[sure].all()


@pytest.mark.parametrize("size", (1e-6, 1.0, 12345.0))
def test_uncorrelated_inputs_of_one_size_leave_every_weight_to_itself(size):
    weight, step, _ = matrices(2, 20, 140, "int5", sigmas="1.5,2.0")
    codes = train_gpt.gptq(weight, step, size * torch.eye(140, dtype=torch.float64).expand(2, -1, -1), 15)
    assert codes.equal(train_gpt.nearest(weight, step, 15))


def test_inputs_that_never_come_do_no_harm():
    """Whole columns of zeros, and no input at all."""
    weight, step, hessian = matrices(2, 20, 40)
    hessian[0, 5:9], hessian[0, :, 5:9], hessian[1] = 0.0, 0.0, 0.0
    codes = train_gpt.gptq(weight, step, hessian, 31)
    nearest = train_gpt.nearest(weight, step, 31)
    assert codes.isfinite().all() and codes[0, :, 5:9].equal(nearest[0, :, 5:9]) and codes[1].equal(nearest[1])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 60),
    st.integers(8, 40),
    st.floats(0.1, 1.5),
    st.sampled_from(("int5", "int6")),
    st.sampled_from(("0", "2.0,3.0", "4.0,5.0")),
    st.integers(0, 999),
)
def test_what_a_layer_computes_changes_no_more_than_by_rounding_to_nearest(cols, rows, mixing, kind, sigmas, seed):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, cols, generator=g), correlated(cols, seed, 4 * cols, mixing)
    step = train_gpt.row_steps(weight, kind, small(quant_sigmas=sigmas))
    codes = train_gpt.gptq(weight[None], step[None], (x.mT @ x / len(x))[None], LIMIT[kind])[0]
    assert codes.equal(codes.round()) and codes.min() >= -LIMIT[kind] - 1 and codes.max() <= LIMIT[kind]

    def change(codes):
        return ((weight - codes * step).double() @ x.mT).norm().item()

    assert change(codes) <= 1.02 * change(train_gpt.nearest(weight, step, LIMIT[kind]))


def test_strongly_correlated_inputs_change_far_less():
    weight, step, hessian = matrices(1, 64, 96, "int5", sigmas="4.0,5.0")

    def change(codes):
        error = (weight - codes * step).double()[0]
        return (error @ hessian[0] * error).sum().sqrt().item()

    ours, plain = change(train_gpt.gptq(weight, step, hessian, 15)), change(train_gpt.nearest(weight, step, 15))
    print(f"figure: the change of a layer's output is {ours / plain:.3f} of that of rounding to nearest")
    assert ours < 0.8 * plain


# ---- Whole models

WIDE = dict(model_dim=96, num_heads=2, num_kv_heads=1, num_layers=2, bigram_dim=8)


def hessians_of(state, seed=0):
    """For every matrix of the blocks."""
    names = [name for name in state if name.startswith("blocks.") and name.endswith(".weight")]
    inputs = {name: correlated(state[name].shape[1], seed + i) for i, name in enumerate(names)}
    return {name: x.mT @ x / len(x) for name, x in inputs.items()}


def test_only_matrices_with_a_hessian_and_of_few_bits_are_rounded_by_it():
    s = small(**WIDE, fp16_keep_name_patterns="1.mlp.fc", quant_sigmas="3.0,4.0", bigram_vocab_size=2000)
    state = random_model(s).state_dict()
    hessians = hessians_of(state)
    plain, ours = train_gpt.quantize_model(state, s), train_gpt.quantize_model(state, s, hessians)
    assert list(ours) == list(state)
    for name, stored in ours.items():
        assert stored.kind == plain[name].kind and stored.values.dtype == plain[name].values.dtype
        assert stored.scale is None or stored.scale.equal(plain[name].scale)
        rounded = name in hessians and stored.kind in ("int5", "int6")
        assert stored.values.equal(plain[name].values) != rounded, name
        if rounded:
            step, limit = stored.scale.float()[:, None], LIMIT[stored.kind]
            weight = train_gpt.prune(state[name], s.prune_fraction)
            expected, sure = by_elimination(weight, step, hessians[name], limit)
            assert (stored.values.numpy() == expected)[sure].all()
    assert {stored.kind for stored in ours.values()} >= {"int5", "int6", "fp16"}
    assert ours["bigram.embed.weight"].kind == "int6"


def test_the_artifact_does_not_depend_on_the_order_of_the_state_dict():
    s = small(**WIDE, quant_sigmas="3.0,4.0")
    state = random_model(s).state_dict()
    hessians = hessians_of(state)
    names = np.random.default_rng(0).permutation(list(state)).tolist()
    blobs = [
        train_gpt.pack(train_gpt.quantize_model({name: state[name] for name in order}, s, given), s)[0]
        for given in (hessians, dict(reversed(hessians.items())))
        for order in (list(state), names)
    ]
    assert len(set(blobs)) == 1


@pytest.mark.parametrize("quantizer", ("nearest", "gptq"))
def test_coarser_steps_make_a_smaller_artifact(quantizer):
    """In k of QUANT_SIGMAS and in the stretch, in bytes and in the entropy of the codes."""
    s = small(**WIDE)
    state = random_model(s).state_dict()
    hessians = hessians_of(state) if quantizer == "gptq" else None

    def sizes(sigmas, stretch):
        tensors = train_gpt.quantize_model(state, small(**WIDE, quant_sigmas=sigmas), hessians, stretch)
        blob, kinds = train_gpt.pack(tensors, s)
        return len(blob), kinds["int5"]["entropy"], kinds["int6"]["entropy"]

    by_sigmas = [sizes(f"{k},{1.3 * k:.2f}", 1.0) for k in (2.0, 2.5, 3.4, 4.2, 6.0, 9.0, 14.0)]
    by_stretch = [sizes("0", stretch) for stretch in (1.0, 1.03, 1.1, 1.5, 2.0, 3.0, 4.0)]
    for falling in (by_sigmas, by_stretch):
        for column in zip(*falling, strict=True):
            assert list(column) == sorted(column, reverse=True) and len(set(column)) == len(column)
    assert abs(sizes("3.0,4.0", 1.5)[0] - sizes("4.5,6.0", 1.0)[0]) < 20  # one and the same, but for fp16's rounding


# ---- Calibration


def inputs_by_hand(state, s, windows):
    """Every linear layer's inputs by its weight's name, (tokens, cols) float64, over windows of a row and one token."""
    model, seen = train_gpt.GPT(s, torch.float64).double().eval(), {}
    model.load_state_dict({name: w.double() for name, w in state.items()})
    for name, module in model.named_modules():
        if isinstance(module, train_gpt.Linear):

            def forward(x, lora=None, name=f"{name}.weight", weight=module.weight):
                seen.setdefault(name, []).append(x.detach().flatten(0, -2).numpy().copy())
                return x @ weight.mT

            module.forward = forward
    with torch.no_grad():
        for window in windows:
            model(window[None, :-1], window[None, 1:])
    return {name: np.concatenate(x) for name, x in seen.items()}


def expected_hessians(state, s, tokens, start, rows):
    """E[x x'] over rows of the endless repetition of `tokens`."""
    size = s.train_seq_len
    windows = [[tokens[(start + row * size + i) % len(tokens)] for i in range(size + 1)] for row in range(rows)]
    inputs = inputs_by_hand(state, s, torch.tensor(windows, dtype=torch.int64))
    assert {len(x) for x in inputs.values()} == {rows * size}
    return {name: x.T @ x / len(x) for name, x in inputs.items() if name != "lm_head.weight"}


def agree(hessians, expected):
    """Whether all are equal but for float32's rounding."""
    assert hessians.keys() == expected.keys()
    assert all(h.dtype == torch.float64 and h.equal(h.mT) for h in hessians.values())
    off = [np.linalg.norm(h.numpy() - expected[name]) / np.linalg.norm(expected[name]) for name, h in hessians.items()]
    return max(off) < 1e-5


def loader_of(run, s, lengths, seed=0):
    """A loader of shards of these lengths, and all their tokens."""
    tokens = random_tokens(s, sum(lengths), seed).astype(np.uint16)
    shards = np.split(tokens, np.cumsum(lengths)[:-1])
    return train_gpt.BatchLoader(shards, run_of(run, s)), tokens.tolist()


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("start, rows", ((0, 1), (500, 5), (64, 3)))
def test_hessians_are_the_mean_products_of_every_linear_layers_inputs(run, start, rows, tied):
    s = small(tie_embeddings=tied)
    model, (loader, tokens) = random_model(s), loader_of(run, s, [100, 333, 150])  # 500 and on wraps around
    hessians = train_gpt.calibrate(model, loader, start, rows * s.train_seq_len, run_of(run, s))
    expected = expected_hessians(model.state_dict(), s, tokens, start, rows)
    assert len(expected) == 6 * s.num_layers + 1 and "bigram.proj.weight" in expected
    assert agree(hessians, expected)
    for other in ((start + 1, rows), (start + 64, rows), (start, rows + 1)):  # it can tell
        assert not agree(hessians, expected_hessians(model.state_dict(), s, tokens, *other))
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("asked, rows", ((1, 1), (64, 2), (65, 3), (200, 7)))
def test_training_ends_with_the_hessians_of_the_final_weights_over_the_tokens_after_the_last_batch(
    run, tmp_path, monkeypatch, asked, rows
):
    changes = dict(iterations=7, warmdown_iters=6, max_wallclock_seconds=0, val_loss_every=0, calibration_tokens=asked)
    s = small(num_layers=2, **changes, swa_start_frac=0.9, swa_every=1)
    tokens = random_tokens(s, 530).astype(np.uint16)  # calibration begins at token 448 and may wrap around
    trainer = train_gpt.Trainer([tokens], "data", run_of(run, s, tmp_path))
    monkeypatch.setattr(train_gpt, "evaluate_standard", lambda *_: None)
    hessians = trainer.train(None)
    assert trainer.step == 7 and trainer.averaged > 2
    state = trainer.state_dict()
    assert agree(hessians, expected_hessians(state, s, tokens.tolist(), 7 * 64, rows))
    for batch in (6, 8):
        assert not agree(hessians, expected_hessians(state, s, tokens.tolist(), batch * 64, rows))
    finished = train_gpt.Trainer([tokens], "data", run_of(run, replace(s, resume=True), tmp_path))
    assert finished.finished and all(h.equal(hessians[name]) for name, h in finished.train(None).items())


def test_rounding_to_nearest_needs_no_hessians(run, tmp_path):
    s = small(quantizer="nearest", iterations=0, val_loss_every=0, max_wallclock_seconds=0)
    trainer = train_gpt.Trainer([random_tokens(s, 300).astype(np.uint16)], "data", run_of(run, s, tmp_path))
    trainer.forward = None  # nothing is computed
    assert trainer.reserve() == {} and math.isfinite(trainer.elapsed)


def test_two_ranks_train_and_calibrate_to_the_very_artifact_of_one(tmp_path):
    """One rank takes two micro-steps, so that both add up the same gradients; the matrices are wide enough for GPTQ."""
    settings_ = dict(MODEL_DIM=96, ITERATIONS=6, MICRO_BATCH_TOKENS=128, CALIBRATION_TOKENS=7 * 32, TTT_ENABLED=0)
    two = runs.ranks(tmp_path / "two", **settings_)
    one = runs.run(tmp_path / "one", **settings_)
    assert [process.wait() for process in two] == [0, 0], two[0].err
    assert {"int5", "int6"} <= one.result["artifact"]["kinds"].keys() and one.artifact == two[0].artifact
    assert one.figures("export val_bpb") == two[0].figures("export val_bpb")
