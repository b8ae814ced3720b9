"""Muon, AdamW, clipping and the schedule against plain loops and torch's own optimisers."""

import math
import os
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
import train_gpt
from conftest import run_of, small
from plain import MUON, Loop


def random_gradients(model, step):
    """Of very different sizes from step to step, so that clipping and the order of operations show."""
    g = torch.Generator().manual_seed(step)
    size = (1e-4, 3.0, 1e-3, 0.1, 5e-4)[step % 5]
    return {name: size * torch.randn(p.shape, generator=g) for name, p in model.named_parameters()}


def moments(optimizer, parameter):
    """The part of `optimizer.m` that belongs to a parameter."""
    start = (parameter.data_ptr() - optimizer.weights.data_ptr()) // 4
    return optimizer.m[start : start + parameter.numel()].view(parameter.shape)


HOT = dict(
    num_layers=3,  # shares of a stack need padding
    weight_decay=0.3,
    muon_momentum_warmup_start=0.3,
    muon_momentum=0.9,
    muon_momentum_warmup_steps=3,
    scalar_lr=0.013,
    tied_embed_lr=0.031,
    embed_lr=0.6,
    head_lr=0.008,
    matrix_lr=0.027,
    beta1=0.8,
    beta2=0.9,
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "changes",
    (
        dict(),
        dict(tie_embeddings=False),
        dict(bigram_dim=32, num_layers=2),
        dict(mlp_mult=0.5, num_layers=5),
        dict(grad_clip_norm=0),
        dict(muon_backend_steps=3, num_kv_heads=4),
        dict(muon_momentum_warmup_steps=0),
    ),
    ids=str,
)
def test_five_steps_equal_a_loop_over_the_parameters(run, changes, dtype):
    s = small(**HOT | changes)
    torch.manual_seed(1)
    model = train_gpt.GPT(s)
    here = run_of(run, s)
    here.dtype = dtype
    loop, optimizer = Loop(model, s, dtype), train_gpt.Optimizer(model, here)
    for step, multiplier in enumerate((1.0, 0.7, 1.0, 0.2, 0.5)):
        gradients = random_gradients(model, step)
        before = {name: w.detach().clone() for name, w in loop.weights.items()}
        for name, p in model.named_parameters():
            p.grad.add_(gradients[name])
        norm, expected_norm = optimizer.step(step, multiplier), loop.step(gradients, step, multiplier)
        if expected_norm is not None:
            assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
        errors = {True: [], False: []}
        for name, p in model.named_parameters():
            expected = loop.weights[name].detach()
            assert p.grad.eq(0).all() and not expected.equal(before[name])
            off = (p - expected).norm() - 2.0**-22 * expected.norm()  # each of the two may round a weight twice
            errors[name in loop.muon].append((off / (expected - before[name]).norm()).clamp_min(0).item())
            if name in loop.muon:
                assert (moments(optimizer, p) - loop.muon[name]).norm() < 1e-5 * loop.muon[name].norm()
        assert max(errors[False]) < 1e-4
        # a bf16 rounding that falls the other way is amplified by the iteration, in a few matrices
        largest, mean = (0.2, 0.02) if dtype == torch.bfloat16 else (1e-3, 1e-4)
        assert max(errors[True]) < largest and sum(errors[True]) / len(errors[True]) < mean
    untied = [name for name, _ in model.named_parameters() if name == "lm_head.weight"]
    assert len(loop.muon) + len(loop.others) == len(loop.weights) and len(untied) == (not s.tie_embeddings)


def test_the_default_table_has_the_described_rates():
    """By the values of the specification, not by those of the settings."""
    for tied in (True, False):
        s = train_gpt.Settings.from_env({"TIE_EMBEDDINGS": str(int(tied))})
        with torch.device("meta"):
            names = [name for name, _ in train_gpt.GPT(s).named_parameters()]
        for name in names:
            if re.fullmatch(MUON, name):
                expected = "muon", 0.02, 0.04
            elif name in ("tok_emb.weight", "bigram.embed.weight"):
                expected = "adam", 0.03 if tied else 0.6, 0.04
            elif name == "lm_head.weight":
                expected = "adam", 0.008, 0.0
            else:
                expected = "adam", 0.02, 0.04
            assert train_gpt.recipe(name, s) == expected, name
    assert (s.muon_momentum, s.muon_momentum_warmup_start, s.muon_momentum_warmup_steps) == (0.99, 0.92, 1500)
    assert (s.beta1, s.beta2, s.adam_eps, s.grad_clip_norm) == (0.9, 0.95, 1e-8, 0.3)


@pytest.mark.parametrize("clip", (0, 0.3))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf, 1e30), ids=str)  # 1e30 has no square in float32
@pytest.mark.parametrize("name", ("tok_emb.weight", "blocks.1.mlp.fc.weight", "smear.gate"))
def test_a_step_without_a_finite_norm_changes_nothing_and_is_counted(run, name, value, clip):
    s = small(**HOT | dict(grad_clip_norm=clip))
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, run_of(run, s))

    def advance(step, planted=None):
        for p, g in zip(model.parameters(), random_gradients(model, step).values(), strict=True):
            p.grad.copy_(g)
        if planted is not None:
            model.get_parameter(name).grad.view(-1)[:1] = planted
        return optimizer.step(step, 0.7)

    def buffers():
        return {name: tensor.clone() for name, tensor in optimizer.state.items() if name != "skipped"}

    advance(0)
    before = buffers()
    for count in (1, 2):
        assert not advance(count, value).isfinite()
        assert all(tensor.equal(before[name]) for name, tensor in buffers().items())
        assert optimizer.grads.eq(0).all() and optimizer.skipped.tolist() == [count, count]
    advance(3)
    assert optimizer.skipped.tolist() == [2, 0]
    after = buffers()
    for part, tensor in before.items():
        optimizer.state[part].copy_(tensor)
    advance(3)
    assert all(tensor.equal(after[name]) and tensor.isfinite().all() for name, tensor in buffers().items())
    for _ in range(train_gpt.MOST_SKIPPED):
        advance(3, value)
    advance(3)
    assert optimizer.skipped[1] >= train_gpt.MOST_SKIPPED  # who looks only now still sees it


@pytest.mark.parametrize("size", (1e-3, 10.0), ids=("below_the_limit", "above_it"))
def test_clipping_equals_torchs(run, size):
    s = small(grad_clip_norm=0.3, beta1=0.5)
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, run_of(run, s))
    gradients = {name: size * torch.randn(p.shape) / 100 for name, p in model.named_parameters()}
    copies = []
    for name, p in model.named_parameters():
        p.grad.copy_(gradients[name])
        copies.append(torch.nn.Parameter(torch.zeros_like(p)))
        copies[-1].grad = gradients[name].clone()
    expected = torch.nn.utils.clip_grad_norm_(copies, 0.3)
    assert optimizer.step(0, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), copy in zip(model.named_parameters(), copies, strict=True):
        share = 1.0 if re.fullmatch(MUON, name) else 0.5  # first moments of the first step: g, or (1 - beta1) g
        torch.testing.assert_close(moments(optimizer, p), share * copy.grad, rtol=1e-4, atol=1e-9)


def test_the_optimiser_owns_every_parameter_once(run):
    s = small(tie_embeddings=False)
    model = train_gpt.GPT(s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train_gpt.Optimizer(model, run_of(run, s))
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    optimizer.weights.zero_()
    for i, p in enumerate(model.parameters()):
        assert p.eq(0).all()  # no other parameter wrote here
        p.data.fill_(i + 1)
    assert (optimizer.weights > 0).sum() == sum(p.numel() for p in model.parameters())


def test_restore_undoes_steps_bit_for_bit(run):
    s = small()
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, run_of(run, s))

    def advance(steps):
        for step in steps:
            for name, g in random_gradients(model, step).items():
                model.get_parameter(name).grad.copy_(g)
            optimizer.step(step, 1.0)
        return optimizer.weights.clone()

    advance(range(2))
    saved = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    first = advance(range(2, 4))
    assert optimizer.grads.eq(0).all()  # after a step
    for name, tensor in saved.items():
        optimizer.state[name].copy_(tensor)
    assert advance(range(2, 4)).equal(first)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(4, 48),
    st.floats(2, 4),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from((1e-6, 1.0, 1e4)),
)
def test_newton_schulz_orthogonalises(short, ratio, tall, count, seed, size):
    shape = (count, int(short * ratio), short) if tall else (count, short, int(short * ratio))
    g = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = train_gpt.newton_schulz(g, 5)
    assert x.shape == g.shape and x.dtype == torch.bfloat16
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    values = torch.linalg.svdvals(x.double())
    assert values.max() < 1.25 and values.min() > 0.6
    toward = (x.double() * (u @ vt)).sum((1, 2)) / short  # the polar factor is the goal, not just any orthogonal matrix
    assert (toward > 0.65).all() and (toward < 1.2).all()


def test_newton_schulz_of_nothing_is_nothing():
    assert train_gpt.newton_schulz(torch.zeros(2, 8, 4)).eq(0).all()


def plan(**changes):
    return small(iterations=1000, warmdown_iters=100, max_wallclock_seconds=0, **changes)


@pytest.mark.parametrize(
    "step, expected", ((0, 1), (500, 1), (900, 1), (925, 0.75), (950, 0.5), (999, 0.01), (1000, 0))
)
def test_the_iteration_rule(step, expected):
    for elapsed in (0.0, 1e6):
        assert train_gpt.lr_multiplier(step, elapsed, plan()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, elapsed, expected",
    (
        (1, 0.1, 1),  # 59.9 s left of a warmdown of 10 s
        (500, 50.0, 1),
        (550, 55.0, 0.5),
        (599, 59.9, 0.01),
        (600, 60.0, 0),
        (610, 61.0, 0),  # 0.1 s per step
        (10, 30.0, 0.1),  # 3 s per step: warmdown of 300 s, in it from the start
        (960, 9.6, 0.4),  # 10 ms per step: iterations end first
        (975, 59.0, min(0.25, 1 / (100 * 59 / 975))),
    ),
)
def test_the_wall_clock_rule_and_the_smaller_of_both(step, elapsed, expected):
    s = small(iterations=1000, warmdown_iters=100, max_wallclock_seconds=60)
    assert train_gpt.lr_multiplier(step, elapsed, s) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(
    st.integers(0, 10_000), st.floats(0, 1e5), st.integers(0, 5000), st.integers(0, 5000), st.sampled_from((0, 1, 600))
)
def test_the_multiplier_stays_between_0_and_1(step, elapsed, iterations, warmdown, seconds):
    s = small(iterations=iterations, warmdown_iters=warmdown, max_wallclock_seconds=seconds)
    assert 0 <= train_gpt.lr_multiplier(step, elapsed, s) <= 1


def three_steps_of_a_rank() -> None:
    """In a process of its own, which ends with them: each rank has a part of the gradients, and keeps what it gets."""
    torch.set_num_threads(1)
    s = small(**HOT)
    ranks = train_gpt.Ranks()
    ranks.join(os.environ)
    run = train_gpt.Run(s, ranks)
    ranks.connect(run.device)
    torch.manual_seed(1)
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, run)
    for step in range(3):
        for name, g in random_gradients(model, step).items():
            mine = torch.arange(g.numel()).view(g.shape) % ranks.world == ranks.rank  # these add up to g
            model.get_parameter(name).grad.copy_(torch.where(mine, g, 0.0))
        norm = optimizer.step(step, 0.8)
    torch.save(optimizer.state | dict(norm=norm), f"{os.environ['OUTPUT_DIR']}/rank{ranks.rank}")
    ranks.leave()
    sys.exit(0)


@pytest.mark.parametrize("world", (2,))
def test_ranks_that_share_the_work_end_where_one_alone_does(run, tmp_path, world):
    s = small(**HOT)  # 3 layers: stacks of 6, 6, 3, 3 and 1 matrices
    torch.manual_seed(1)
    model = train_gpt.GPT(s)
    optimizer = train_gpt.Optimizer(model, run_of(run, s))
    start = optimizer.weights.clone()
    ranks = runs.ranks(tmp_path, world, before=three_steps_of_a_rank)
    for step in range(3):
        for name, g in random_gradients(model, step).items():
            model.get_parameter(name).grad.copy_(g)
        norm = optimizer.step(step, 0.8)
    assert runs.codes(ranks) == [0] * world
    first, *others = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(world))
    for other in others:
        assert all(other[name].equal(first[name]) for name in first)
    assert first["norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert (first["weights"] - optimizer.weights).norm() < 3e-3 * (optimizer.weights - start).norm()
    torch.testing.assert_close(first["m"], optimizer.m, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(first["v"], optimizer.v, rtol=1e-5, atol=1e-8)
