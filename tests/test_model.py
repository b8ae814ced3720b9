"""The model against a plain float64 re-implementation of its description."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, random_tokens, run_of, small


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def int32(n):
    return (n + 2**31) % 2**32 - 2**31


def rotated(y, position, base):
    """y (T, heads, width) under RoPE, halves layout."""
    half = y.shape[-1] // 2
    frequency = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = (position[:, None] * frequency)[:, None]
    first, second = y[..., :half], y[..., half:]
    return torch.cat((first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()), -1)


def reference(state, s, ids, targets, lora=None, past=None, visible=None):
    """NLL of each target of one sequence, float64, and what it leaves to later tokens: (id, embedding, keys, values).

    ids, targets: lists of ints. state: any float tensors by name. lora: per layer (A, B) by linear layer, which add
    (alpha / r) x A' B' to its output. past: what earlier tokens left. visible(i, j), for tensors: may the query at
    position i see the key at position j <= i?"""
    w = {name: tensor.double() for name, tensor in state.items()}
    d, heads, kv_heads, width = s.model_dim, s.num_heads, s.num_kv_heads, s.model_dim // s.num_heads
    nothing = [torch.zeros(0, kv_heads, width, dtype=torch.float64)] * s.num_layers
    before_id, before_x, past_k, past_v = past or (None, torch.zeros(1, d, dtype=torch.float64), nothing, nothing)

    last_row = s.bigram_vocab_size - 1
    hashes = [
        last_row if before is None else int32(int32(36313 * token) ^ int32(27191 * before)) % last_row
        for before, token in zip([before_id, *ids[:-1]], ids, strict=True)
    ]
    bigram = w["bigram.embed.weight"][hashes]
    if "bigram.proj.weight" in w:
        bigram = bigram @ w["bigram.proj.weight"].T
    embedded = rms(w["tok_emb.weight"][ids] + w["bigram.scale"] * bigram)
    gate = 1 / (1 + torch.exp(-w["smear.gate"]))
    x = x0 = (1 - gate) * embedded + gate * torch.cat((before_x, embedded[:-1]))

    first = len(past_k[0])
    position = torch.arange(first, first + len(ids), dtype=torch.float64)
    i, j = torch.arange(first, first + len(ids))[:, None], torch.arange(first + len(ids))
    mask = (j <= i) & (visible(i, j) if visible else True)
    pushed, keys, values = [], [], []
    factor = (s.ttt_lora_alpha or s.ttt_lora_rank) / s.ttt_lora_rank
    for layer in range(s.num_layers):
        if layer >= s.num_layers // 2 and pushed:
            x = x + w["skip_weights"][layer - s.num_layers // 2] * pushed.pop()
        prefix = f"blocks.{layer}."
        of = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}

        def linear(name, x, of=of, adapters=lora[layer] if lora else {}):
            y = x @ of[f"{name}.weight"].T
            if (adapter := name.replace("attn.c_", "c_")) in adapters:
                a, b = adapters[adapter]
                y = y + factor * (x @ a.T @ b.T)
            return y

        x = of["resid_mix"][0] * x + of["resid_mix"][1] * x0
        y = rms(x)
        q, k, v = linear("attn.c_q", y), linear("attn.c_k", y), linear("attn.c_v", y)
        q = rotated(rms(q.view(-1, heads, width)), position, s.rope_base) * of["attn.q_gain"][:, None]
        k = torch.cat((past_k[layer], rotated(rms(k.view(-1, kv_heads, width)), position, s.rope_base)))
        v = torch.cat((past_v[layer], v.view(-1, kv_heads, width)))
        keys.append(k.detach())
        values.append(v.detach())
        out = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = (q[:, h] @ k[:, group].T / math.sqrt(width)).masked_fill(~mask, -math.inf)
            out.append(torch.softmax(scores, -1) @ v[:, group])
        x = x + of["attn_scale"] * linear("attn.proj", torch.cat(out, -1))
        hidden = linear("mlp.fc", rms(x)).clamp_min(0) ** 2
        x = x + of["mlp_scale"] * linear("mlp.proj", hidden)
        if layer < s.num_layers // 2:
            pushed.append(x)
    head = w["tok_emb.weight"] if s.tie_embeddings else w["lm_head.weight"]
    logits = s.logit_softcap * torch.tanh(rms(x) @ head.T / s.logit_softcap)
    nll = torch.logsumexp(logits, -1) - logits[range(len(ids)), targets]
    return nll, (ids[-1], embedded[-1:].detach(), keys, values)


def score(model, tokens):
    ids = torch.as_tensor(tokens).long()[None]
    return model(ids[:, :-1], ids[:, 1:])[0]


CONFIGS = st.builds(
    lambda layers, heads, group, width, **more: dict(
        num_layers=layers, num_heads=heads * group, num_kv_heads=heads, model_dim=heads * group * width, **more
    ),
    st.integers(2, 5),
    st.sampled_from((1, 2)),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((8, 10, 12)),
    tie_embeddings=st.booleans(),
    bigram_dim=st.sampled_from((4, 24)),
    bigram_vocab_size=st.integers(2, 20_000),
    vocab_size=st.sampled_from((300, 1024, 65_536)),
    mlp_mult=st.sampled_from((1.0, 2.5, 3.0)),
    rope_base=st.sampled_from((100.0, 1e4)),
    logit_softcap=st.sampled_from((2.0, 30.0)),
)


@settings(deadline=None, max_examples=25)
@given(CONFIGS, st.integers(0, 99), st.integers(2, 24))
def test_the_forward_pass_is_the_described_arithmetic(config, seed, length):
    config["bigram_dim"] = config["model_dim"] if config["bigram_dim"] == 4 else config["bigram_dim"]
    s = small(**config)
    model = random_model(s, seed)
    tokens = np.random.default_rng(seed).integers(s.vocab_size, size=length).tolist()
    assert ("bigram.proj.weight" in model.state_dict()) == (s.bigram_dim != s.model_dim)
    expected, _ = reference(model.state_dict(), s, tokens[:-1], tokens[1:])
    torch.testing.assert_close(score(model, tokens).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ids", ([65_530, 65_535], [59_139, 1], [1, 59_138, 59_139, 2], [65_535] * 4), ids=str)
def test_the_bigram_hash_wraps_around_in_32_bits(ids):
    """59,139 is the first token whose product with 36,313 does not fit."""
    s = small(vocab_size=65_536, bigram_vocab_size=10_240)
    model, tokens = random_model(s), [*ids, 7]
    model.bigram.scale.fill_(5.0)  # so that another row of the table is another score
    expected, _ = reference(model.state_dict(), s, tokens[:-1], tokens[1:])
    torch.testing.assert_close(score(model, tokens).double(), expected, rtol=1e-4, atol=1e-4)


def names_of(s):
    matrices = "attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"
    layer = [*(f"{name}.weight" for name in matrices), "attn.q_gain", "attn_scale", "mlp_scale", "resid_mix"]
    names = {"tok_emb.weight", "bigram.embed.weight", "bigram.scale", "smear.gate", "skip_weights"}
    names |= {f"blocks.{i}.{name}" for i in range(s.num_layers) for name in layer}
    if s.bigram_dim != s.model_dim:
        names.add("bigram.proj.weight")
    if not s.tie_embeddings:
        names.add("lm_head.weight")
    return names


@pytest.mark.parametrize("layers", (2, 5))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_initial_values_and_names_are_those_described(tied, layers):
    s = small(tie_embeddings=tied, num_layers=layers, model_dim=64, vocab_size=1024, qk_gain_init=1.25)
    state = train_gpt.GPT(s).state_dict()
    assert set(state) == names_of(s)
    assert state["skip_weights"].shape == (layers // 2, 64)
    constant = {
        r"bigram\.embed|attn\.proj|mlp\.proj|lm_head|smear": 0.0,
        r"bigram\.scale": 0.05,
        r"skip|attn_scale|mlp_scale": 1.0,
        "q_gain": 1.25,
    }
    for name, w in state.items():
        assert w.dtype == torch.float32
        value = next((value for pattern, value in constant.items() if re.search(pattern, name)), None)
        if value is not None:
            assert w.eq(torch.tensor(value)).all(), name
        elif name == "tok_emb.weight":
            std = 0.005 if tied else 1.0
            assert w.std().item() == pytest.approx(std, rel=0.03) and abs(w.mean().item()) < 0.02 * std
        elif name.endswith("resid_mix"):
            assert w[0].eq(1).all() and w[1].eq(0).all()
        else:  # orthogonal rows or columns, whichever are fewer
            gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            size = 1 / math.sqrt(2 * layers) if name == "bigram.proj.weight" else 1.0
            torch.testing.assert_close(gram, size**2 * torch.eye(len(gram)), rtol=0, atol=1e-5)


GOLDEN = dict(
    vocab_size=1024, num_layers=10, model_dim=128, num_heads=4, num_kv_heads=2, bigram_vocab_size=512, bigram_dim=32
)


@pytest.mark.parametrize(
    "changes", (dict(preset="tiny"), GOLDEN, dict(bigram_dim=32)), ids=("tiny", "golden", "without_projection")
)
def test_the_bigram_table_moves_within_two_steps(run, changes):
    s = train_gpt.Settings.from_env({"PRESET": "tiny"}) if "preset" in changes else small(**changes)
    torch.manual_seed(0)
    model = train_gpt.GPT(s)
    optimizer, table = train_gpt.Optimizer(model, run_of(run, s)), model.bigram.embed.weight
    tokens = torch.from_numpy(random_tokens(s, 65))
    touched = []
    for step in range(2):
        score(model, tokens).mean().backward()
        optimizer.step(step, 1.0)
        touched.append((table.abs().sum(1) > 0).sum().item())
    assert touched[-1] > 10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 62), st.integers(0, 9))
def test_a_later_token_changes_no_bit_of_an_earlier_score(t, seed):
    s = small(num_layers=4)
    model, tokens = random_model(s, seed), torch.from_numpy(random_tokens(s, 64, seed))
    changed = torch.cat((tokens[: t + 1], 1 + (tokens[t + 1 :] + 7) % (s.vocab_size - 1)))
    before, after = score(model, tokens), score(model, changed)
    assert before[:t].equal(after[:t])  # target i is token i + 1
    assert not before[t:].equal(after[t:])


def test_a_score_does_not_depend_on_the_rest_of_the_batch():
    s = small()
    model, rows = random_model(s), torch.from_numpy(random_tokens(s, 4 * 33)).view(4, 33)
    together = model(rows[:, :-1], rows[:, 1:])
    torch.testing.assert_close(together, torch.stack([score(model, row) for row in rows]), rtol=1e-5, atol=1e-5)


def test_bf16_compute_stays_near_float32_and_carries_its_stream_in_bf16():
    s = small(model_dim=64, num_layers=4)
    exact, rough = random_model(s), random_model(s, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    seen = []
    for block in rough.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, args[1].dtype, out.dtype)))
    tokens = random_tokens(s, 65)
    a, b = score(exact, tokens), score(rough, tokens)
    assert b.dtype == torch.float32
    assert set(sum(seen, ())) == {torch.bfloat16}
    assert (a - b).abs().mean() < 0.05 * a.std() and a.mean().item() == pytest.approx(b.mean().item(), rel=0.01)
    rough.requires_grad_(True)
    score(rough, tokens).mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in rough.parameters())


def test_rope_turns_by_float32_angles_in_bf16_too():
    """bfloat16 counts to 256 in steps of one, and from 1,024 in steps of eight."""
    position = torch.tensor([0, 1, 257, 1027, 2047])
    angle = position[:, None, None].double() * 10_000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    for found, expected in zip(
        train_gpt.rotary(position, 64, 10_000.0, torch.bfloat16), (angle.cos(), angle.sin()), strict=True
    ):
        assert found.dtype == torch.bfloat16 and (found.double() - expected).abs().max() < 2**-8


def test_logits_near_the_cap_are_told_apart_in_bf16_too():
    """Of their roundings only that of the product remains, which the tanh flattens there: its own would not be."""
    s = small(logit_softcap=30.0)
    model = random_model(s, dtype=torch.bfloat16)
    model.tok_emb.weight.mul_(60)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 50, s.model_dim, generator=g).bfloat16()
    found = model.logits(x)
    normed = torch.nn.functional.rms_norm(x, (s.model_dim,), eps=train_gpt.RMS_EPS).double()
    inner = normed @ (model.tok_emb.weight / 30).bfloat16().double().T
    off = (found.double() - 30 * inner.tanh()).abs()
    assert found.dtype == torch.float32 and (inner.abs() > 1.5).any()
    assert (off <= 30 * inner.cosh() ** -2 * (inner.abs() * 2**-8 + 1e-3) + 1e-3).all()


def test_a_fresh_bf16_model_is_not_swamped_by_the_norms_epsilon():
    """bfloat16's own epsilon is 300 times the mean square of a fresh tied embedding; float32's is the default."""
    s = small(model_dim=64, vocab_size=1024)
    torch.manual_seed(0)
    exact, rough = train_gpt.GPT(s), train_gpt.GPT(s, torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    ids = torch.arange(40)[None]
    bonus = [math.log(1024) - model(ids, ids).mean().item() for model in (exact, rough)]  # a token's own embedding
    assert bonus[0] > 0.2 and bonus[1] == pytest.approx(bonus[0], rel=0.03)


def test_the_loss_at_the_start_is_that_of_a_uniform_guess():
    s = small(vocab_size=1024)
    assert score(train_gpt.GPT(s), random_tokens(s, 65)).mean().item() == pytest.approx(math.log(1024), rel=0.01)


def test_the_cap_bounds_the_loss_of_saturated_logits():
    s = small(logit_softcap=3.0)
    model, tokens = random_model(s), random_tokens(s, 200).tolist()
    model.tok_emb.weight.mul_(20)
    nll = score(model, tokens)
    expected, _ = reference(model.state_dict(), s, tokens[:-1], tokens[1:])
    torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-4)
    largest = 6 + math.log(300)  # one logit at -3, all others at 3
    assert 0.9 * largest < nll.max() <= largest


# ---- The kernels of attention


@pytest.mark.parametrize(
    "capability, head_dim, built, dtype, expected",
    (
        (None, 64, True, torch.float32, "flash"),  # a CPU, whose flash kernel takes any width
        (None, 12, True, torch.float32, "flash"),
        ((9, 0), 64, True, torch.bfloat16, "flash"),
        ((8, 9), 128, True, torch.bfloat16, "flash"),
        ((8, 0), 256, True, torch.bfloat16, "flash"),
        ((8, 0), 264, True, torch.bfloat16, "plain"),  # wider than the kernels are built for
        ((9, 0), 12, True, torch.bfloat16, "plain"),
        ((9, 0), 64, False, torch.bfloat16, "plain"),
        ((7, 5), 64, True, torch.float32, "plain"),
        ((7, 0), 64, True, torch.float32, "plain"),
    ),
    ids=str,
)
def test_the_dtype_and_the_attention_of_a_device(capability, head_dim, built, dtype, expected):
    assert train_gpt.compute_dtype(capability) == dtype
    assert train_gpt.attention_backend(capability, head_dim, dtype, built) == expected


def test_a_run_takes_up_the_attention_of_the_width_that_it_is_given(run, monkeypatch):
    """As EVAL_ONLY does, whose file's header fixes the model."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    other = run_of(run, small(model_dim=32, num_heads=4))
    other.cuda, other.capability, other.dtype = True, (9, 0), torch.bfloat16
    assert other.attention == "flash"
    assert other.using(num_heads=2, model_dim=24).attention == "plain"
    other.cuda = False
    assert other.using(num_heads=2, model_dim=24).attention == "flash"


def test_flash_does_not_take_float32_on_a_gpu():
    assert train_gpt.attention_backend((9, 0), 64, torch.float32) == "plain"


@pytest.mark.parametrize("capability", ((6, 1), (5, 0)), ids=str)
def test_a_gpu_that_is_too_old_is_one_line(capability):
    with pytest.raises(train_gpt.UserError, match=rf"{capability[0]}\.{capability[1]}, below 7.0 — .*DEVICE=cpu"):
        train_gpt.compute_dtype(capability)


@pytest.fixture(params=("flash", "plain"))
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "all"))
@pytest.mark.parametrize("heads, kv_heads, width", ((2, 2, 8), (4, 2, 12), (6, 1, 3)), ids=str)
def test_flash_gives_the_output_and_the_log_sum_exp_that_are_written_out(causal, heads, kv_heads, width):
    """The latter is what joins the chunk's softmax to the context's; no public function returns it."""
    g = torch.Generator().manual_seed(0)
    shapes = (heads, 7), (kv_heads, 7 if causal else 10), (kv_heads, 7 if causal else 10)
    q, k, v = (torch.randn(2, *shape, width, generator=g, dtype=torch.float64) for shape in shapes)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(heads // kv_heads, 1)) / math.sqrt(width)
    if causal:
        scores.masked_fill_(torch.arange(7) > torch.arange(7)[:, None], -math.inf)
    expected = torch.softmax(scores, -1) @ v.repeat_interleave(heads // kv_heads, 1)
    y, lse, _ = train_gpt.flash(q, k, v, causal)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_plain_attention_of_bf16_is_as_exact_as_its_inputs():
    """Scores and sums are float32: the output is off by one rounding to bf16, 2**-9, and float32's noise."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 300, 16, generator=g).bfloat16().requires_grad_() for n in (4, 2, 2))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y, expected = train_gpt.attend(q, k, v, None, "plain"), explicit(*wide, wide[1][:, :, :0], wide[2][:, :, :0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-8, atol=1e-5)
    gradients = torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), wide)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_plain_attention_keeps_no_scores_for_the_backward_pass():
    """In training they would be 134 MB for each row of 2,048 tokens and each layer."""
    q, k, v, _ = attention_inputs(4, 2, 50, 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        train_gpt.attend(q, k, v, None, "plain").sum()
    assert max(kept) <= q.numel()


# ---- Attention into the cache


def explicit(q, k, v, context_keys, context_values):
    """Each query's softmax over the whole context and the chunk up to itself, one head at a time."""
    keys, values = torch.cat((context_keys, k), 2), torch.cat((context_values, v), 2)
    context, group, heads = context_keys.shape[2], q.shape[1] // k.shape[1], []
    seen = torch.arange(keys.shape[2]) <= context + torch.arange(q.shape[2])[:, None]
    for h in range(q.shape[1]):
        scores = q[:, h] @ keys[:, h // group].mT / math.sqrt(q.shape[3])
        heads.append(torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ values[:, h // group])
    return torch.stack(heads, 1)


def attention_inputs(heads, kv_heads, tokens, context, seed=0):
    """q, k, v that need gradients, and a cache (B, 2, kv heads, context + T, head_dim) with garbage in the last."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, n, tokens, 4) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v, torch.randn(2, 2, kv_heads, context + tokens, 4, generator=g, dtype=torch.float64)


SHAPES = pytest.mark.parametrize("heads, kv_heads", ((2, 2), (4, 2), (3, 1)), ids=str)
CONTEXTS = pytest.mark.parametrize("tokens, context", ((5, 0), (5, 3), (3, 7), (1, 4)), ids=str)


@SHAPES
@CONTEXTS
def test_attention_into_the_cache_is_softmax_over_context_and_chunk(backend, heads, kv_heads, tokens, context):
    q, k, v, kv = attention_inputs(heads, kv_heads, tokens, context)
    before = kv[..., :context, :].clone()
    actual, expected = train_gpt.attend(q, k, v, kv, backend), explicit(q, k, v, before[:, 0], before[:, 1])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert kv[..., :context, :].equal(before) and kv[:, 0, :, context:].equal(k) and kv[:, 1, :, context:].equal(v)
    assert not kv.requires_grad
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    if not context:
        torch.testing.assert_close(train_gpt.attend(q, k, v, None, backend), expected, rtol=1e-12, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("tokens, context", ((3, 0), (3, 2), (2, 5)), ids=str)
def test_its_gradients_are_those_of_finite_differences(backend, heads, kv_heads, tokens, context):
    q, k, v, kv = attention_inputs(heads, kv_heads, tokens, context)
    function = lambda q, k, v: train_gpt.attend(q, k, v, kv.clone(), backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


def test_layers_that_share_one_cache_do_not_disturb_each_others_gradients():
    """A layer writes its keys between another one's forward and backward, into the same tensor."""
    q, k, v, kv = attention_inputs(4, 2, 3, 5)
    cache = torch.stack((kv, 2 * kv), 1)
    context = cache[..., :5, :].clone()
    y = train_gpt.attend(q, k, v, cache[:, 0])
    actual = train_gpt.attend(y, k.sin(), v, cache[:, 1])
    expected = explicit(q, k, v, context[:, 0, 0], context[:, 0, 1])
    expected = explicit(expected, k.sin(), v, context[:, 1, 0], context[:, 1, 1])
    ours, theirs = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
