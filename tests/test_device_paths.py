"""What a GPU runs, as far as a CPU can run it: compiled graphs, bf16 compute, and both together.

Graphs are captured, differentiated and checked as on a GPU, but executed by torch's own kernels (tests/strict.py);
one test generates code with Inductor. Compiled figures must equal eager ones, a stage compiles nothing after its
warm-up, and no graph may break: each would be paid for in the seconds of the run."""

import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config

import train_gpt
from conftest import batch_of, random_model, run_of, small, stream_of

CHUNK, WINDOW = 16, 64  # of the small settings: a context is full after three chunks
LENGTHS = [84, 70, 40, 33, 5]  # targets: up to six chunks; the longest goes on alone, one has a single chunk
ALL = list(range(len(LENGTHS)))
FLAGS = ("use_duck_shape", "backed_size_oblivious")  # of torch, for the whole process


# ---- All contact with the names and signatures of train_gpt.py ------------------------------------------------------
class Trainer:
    """A fresh model with its optimiser, compiled or not, on one batch of two micro-batches of three rows."""

    def __init__(self, s, run, compiled: bool):
        self.s, self.run, self.steps = s, compiling(run, s, compiled), 0
        torch.manual_seed(0)
        self.model = train_gpt.GPT(s)
        self.optimizer = train_gpt.Optimizer(self.model, self.run)
        self.forward = self.run.compiled(self.model, dynamic=False)
        size = (6, s.train_seq_len + 1)
        tokens = torch.randint(2, s.vocab_size, size, generator=torch.Generator().manual_seed(0))
        self.micro_batches = list(zip(tokens[:, :-1].split(3), tokens[:, 1:].split(3), strict=True))

    def step(self) -> Tensor:
        """One training step: its loss."""
        loss = train_gpt.forward_backward(self.forward, self.micro_batches, 1 / len(self.micro_batches))
        self.optimizer.step(self.steps, 1.0)
        self.steps += 1
        return loss

    def validate(self) -> Tensor:
        """The loss of the standard evaluation: batches of three rows, the last batch and its last row not full."""
        return torch.tensor(train_gpt.evaluate_standard(self.forward, stream_of(self.s, [150, 7]), self.run).loss)

    def slide(self) -> Tensor:
        """The loss of the sliding window: batches of three windows, the last batch and its last window not full."""
        return torch.tensor(train_gpt.evaluate_sliding(self.forward, stream_of(self.s, [90, 7]), self.run).loss)


class Evaluation:
    """Test-time training of one frozen model, compiled or not."""

    def __init__(self, s, run, compiled: bool, dtype: torch.dtype = torch.float32, folder=None):
        self.s, self.run = s, compiling(run, s, compiled, folder)
        self.run.dtype = dtype
        self.state = random_model(s).state_dict()
        self.model = train_gpt.scoring_model(self.run)
        train_gpt.load_weights(self.model, self.state, "random", self.run)

    def warm_up(self) -> None:
        """The preflight of an evaluation of a file."""
        path = self.run.folder / "weights.pt"
        torch.save(self.state, path)
        run = self.run.using(eval_only=str(path))
        train_gpt.preflight(None, self.model, run)

    def score(self, documents: list[int]) -> Tensor:
        """NLL of every figure and document, plain first, from one batch. The adapters stay float32."""
        batch = batch_of(self.model, stream_of(self.s, LENGTHS), documents, self.run)
        adapters = batch.adapters
        assert {x.dtype for x in (adapters.flat, adapters.m, adapters.v)} == {torch.float32}
        return torch.from_numpy(batch.totals())


def compiling(run, s, compiled: bool, folder=None):
    """The run with settings `s`, compiled or not."""
    other = run_of(run, s, folder)
    other.compile = compiled
    return other


def gradients_in_growing_contexts(s, run, compiled: bool) -> list[Tensor]:
    """What one block's adapters get from chunks of two documents after contexts of one, two and three chunks."""
    model = random_model(s)
    if compiled:
        model.compile_regions()
        del model.blocks[0].after  # what comes after attention stays eager: half of the seconds
    adapters = train_gpt.Adapters(2, run_of(run, s))
    adapters.begin(np.stack([train_gpt.draw_lora_a(s, d) for d in range(2)]))
    adapters.flat.add_(0.01)  # no branch is silent
    generator = torch.Generator().manual_seed(0)
    head_dim = s.model_dim // s.num_heads
    ring = torch.randn(2, 2, s.num_kv_heads, WINDOW, head_dim, generator=generator)
    gradients = []
    for context in (CHUNK, 2 * CHUNK, 3 * CHUNK):
        leaf, layers = adapters.layers(2)
        x = torch.randn(2, CHUNK, s.model_dim, generator=generator).requires_grad_()
        rope = train_gpt.rotary(torch.arange(context, context + CHUNK), head_dim, s.rope_base, torch.float32)
        kv = ring[..., -context - CHUNK :, :].clone()  # the chunk's own, to be written, come last
        y = model.blocks[0](x, x.view_as(x), rope, layers[0], kv)
        gradients.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    return gradients


# ---- Fixtures -------------------------------------------------------------------------------------------------------
@pytest.fixture
def compiler() -> Iterator[None]:
    """A compiler that remembers nothing; what the script tells torch about compilation is taken back afterwards."""
    import torch._dynamo  # seconds, as for strict.py: for the process alone that runs these tests

    kept = {name: getattr(shape_config, name) for name in FLAGS}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else the rest would run uncompiled, unnoticed
        yield
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(shape_config, name, value)


@pytest.fixture
def graphs(compiler) -> Iterator[Callable[[], int]]:
    """Within, everything is compiled by the strict backend; the fixture counts the graphs so far and refuses breaks."""

    def count() -> int:
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    from strict import strictly

    with strictly():
        yield count


# ---- The backend itself ---------------------------------------------------------------------------------------------
def test_the_strict_backend_refuses_a_saved_activation_of_other_strides(compiler, monkeypatch):
    """The fault that it exists for: torch freezes the strides of an activation whose size it leaves dynamic. From 2.15
    on it does so only for a backend that reports them as numbers."""

    import strict

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (torch.cat((x, y), dim=1).sin() * 2).cos().sum()

    def gradients(function: Callable, size: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(size)
        inputs = [torch.randn(3, n, 4, generator=generator, requires_grad=True) for n in (size, 5)]
        return torch.autograd.grad(function(*inputs), inputs)

    for frozen in (False, True):
        torch._dynamo.reset()
        shape_config.backed_size_oblivious = frozen
        if frozen:
            monkeypatch.setattr(strict, "NUMBERS", True)
        compiled = torch.compile(f, backend=strict.strict, dynamic=True)
        torch.testing.assert_close(gradients(compiled, 7), gradients(f, 7))
        if frozen:
            with pytest.raises(AssertionError, match="expected size .* stride"):
                gradients(compiled, 9)
        else:
            torch.testing.assert_close(gradients(compiled, 9), gradients(f, 9))


# ---- Training and the evaluations without adaptation ----------------------------------------------------------------
def test_compiled_training_and_evaluation_equal_eager_and_compile_once(run, graphs):
    s = small(num_layers=2, eval_batch_seqs=3)  # as many windows as rows of the validation: they share a graph
    results = []
    for compiled in (False, True):
        trainer = Trainer(s, run, compiled)
        stages = [trainer.step, trainer.validate, trainer.slide]
        figures = [stage() for stage in stages]
        warm = graphs()
        assert (warm > 0) == compiled
        figures += [stage() for _ in range(2) for stage in stages]
        assert graphs() == warm
        results.append(torch.stack(figures).double())
    eager, compiled = results
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)
    assert eager[2 * len(stages)] < eager[0]  # it learns


@pytest.mark.parametrize(
    "attention, dtype, tolerance", (("plain", torch.float32, 1e-4), ("flash", torch.bfloat16, 5e-3)), ids=str
)
def test_a_training_step_is_one_graph_and_has_eager_gradients(run, graphs, attention, dtype, tolerance):
    s = small(num_layers=2)
    model = random_model(s, dtype=dtype, attention=attention).requires_grad_()
    ids = torch.randint(2, s.vocab_size, (2, s.train_seq_len + 1), generator=torch.Generator().manual_seed(0))

    def gradients(forward: Callable) -> tuple[Tensor, ...]:
        loss = forward(ids[:, :-1], ids[:, 1:]).mean()
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    compiled = torch.compile(model, dynamic=False)
    for actual, expected in zip(gradients(compiled), gradients(model), strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()
    assert graphs() == 1


# ---- Test-time training ---------------------------------------------------------------------------------------------
def test_compiled_test_time_training_equals_eager_with_few_graphs(run, graphs, tmp_path):
    """The number of graphs is the compile time that the preflight pays for: none may come back unnoticed. What a single
    document's batch has of its own, and what another protocol or context adds to the first, is part of that number.
    Whether a step scores, trains or does both is not: what is compiled is the same."""
    known, kinds = 0, [("replay", ALL), ("single_pass", ALL), ("single_pass", [0])]
    both = [("cached", *kind) for kind in kinds] + [("recompute", *kind) for kind in kinds[1:]]
    for context, protocol, documents in both:
        s = small(
            ttt_protocol=protocol, ttt_context=context, ttt_chunk_size=CHUNK, ttt_eval_seq_len=3 * CHUNK, num_layers=2,
            ttt_batch_size=len(documents), ttt_lora_targets=",".join(train_gpt.LORA_TARGETS), ttt_lora_alpha=7.0,
        )  # fmt: skip
        batches = [documents] if documents == [0] else [documents, documents[2:], [3]]
        eager = Evaluation(s, run, compiled=False)
        expected = [eager.score(batch) for batch in batches]
        assert graphs() == known
        compiled = Evaluation(s, run, compiled=True, folder=tmp_path)
        compiled.warm_up()
        warm = graphs()
        assert 5 <= warm <= (7 if context == "cached" else 12)
        for batch, figures in zip(batches, expected, strict=True):
            torch.testing.assert_close(compiled.score(batch), figures, rtol=1e-5, atol=0)
            assert graphs() == warm  # the preflight on synthetic tokens has met every shape
        known = warm


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor's C++ needs a compiler")
def test_code_that_inductor_generates_bears_a_context_that_grows(run, compiler):
    """The one test of generated code, of what comes before attention in a block."""
    s = small(num_layers=2, ttt_chunk_size=CHUNK, ttt_eval_seq_len=WINDOW)
    import torch._inductor.utils

    expected = gradients_in_growing_contexts(s, run, compiled=False)
    # no vector code, no optimisation, no pool of compilers, no compiled headers: less to generate and to start
    quick = {
        "compile_threads": 1,
        "cpp_cache_precompile_headers": False,
        "cpp.simdlen": 1,
        "cpp.vec_isa_ok": False,
        "pattern_matcher": False,
        "aot_inductor.debug_compile": True,
    }
    with torch._inductor.utils.fresh_cache(), torch._inductor.config.patch(quick):
        actual = gradients_in_growing_contexts(s, run, compiled=True)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("protocol", ("replay", "single_pass"))
def test_test_time_training_in_bf16_stays_near_float32_and_apart_from_its_batch(run, protocol):
    """On a GPU a document's score may move by 1e-3 with its batch."""
    s = small(ttt_protocol=protocol, ttt_n_epochs=3)
    rough = Evaluation(s, run, compiled=False, dtype=torch.bfloat16)
    together = rough.score(ALL)
    expected = Evaluation(s, run, compiled=False).score(ALL)
    torch.testing.assert_close(together, expected, rtol=1e-2, atol=0)
    for d in range(len(LENGTHS)):
        few = LENGTHS[d] < CHUNK  # the rounding of five targets does not average out
        torch.testing.assert_close(rough.score([d])[:, 0], together[:, d], rtol=3e-3 if few else 1e-3, atol=0)
