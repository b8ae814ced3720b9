"""A torch.compile backend as quick as `aot_eager` that refuses what Inductor's generated code would refuse.

Inductor compiles a graph for the sizes and strides of its inputs, as numbers or as expressions in the symbols of
dynamic sizes, and the generated code asserts them at each call. The inputs of a backward graph are the activations that
the forward saved: no guard protects them, so a wrong expression there is an AssertionError in the middle of a run.
`aot_eager` hides it twice: it runs any strides, and it never tells autograd which strides the forward's outputs have,
which is what makes autograd fix the backward's strides in the first place.

`strict` does both as Inductor does, and executes the graphs by torch's own kernels. It sees every activation that the
default partition saves (Inductor saves fewer). It does not see wrong code, nor layouts that Inductor itself chooses.

    with strictly():  # every torch.compile and nn.Module.compile inside
        ...
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import sympy
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._C._dynamo.guards import assert_size_stride
from torch._guards import TracingContext
from torch._inductor.utils import set_tracing_context_output_strides

# Until torch 2.14 Inductor reported the strides of a forward's outputs as the numbers of the call that is compiled.
NUMBERS = "evaluate_symexpr" in inspect.getsource(set_tracing_context_output_strides)


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size or stride as the compiler knows it: a number, or symbols that stand for dynamic sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def today(size: int | torch.SymInt) -> int:
    """The value that a size or stride has in the call that is being compiled."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def facets(value: object) -> list:
    """The sizes and strides of a tensor, a size itself, nothing of anything else."""
    if isinstance(value, Tensor):
        return [*value.shape, *value.stride()]
    return [value] if isinstance(value, (int, torch.SymInt)) else []


def checked(graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
    """The graph, executed by torch's kernels once each tensor it is given has the sizes and strides of `inputs`.

    Symbols take the values that the call's own sizes give them. Raises AssertionError, as Inductor's code does."""
    compiled_for = [[expression(x) for x in facets(value)] for value in inputs]

    @functools.cache  # steps repeat their sizes; sympy is slow
    def numbers(symbols: tuple[tuple[sympy.Symbol, int], ...]) -> list[list[int]]:
        values = dict(symbols)
        return [[int(x.xreplace(values)) for x in expressions] for expressions in compiled_for]

    def call(*arguments):
        symbols = {}
        for expressions, argument in zip(compiled_for, arguments, strict=True):
            for x, value in zip(expressions, facets(argument), strict=True):
                if x.is_Symbol:
                    symbols.setdefault(x, value)
        for i, (expected, argument) in enumerate(zip(numbers(tuple(symbols.items())), arguments, strict=True)):
            if isinstance(argument, Tensor) and argument.numel():
                rank = argument.dim()
                assert_size_stride(argument, tuple(expected[:rank]), tuple(expected[rank:]), f"input {i}")
        return graph.forward(*arguments)

    return make_boxed_func(call)


def forward(graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
    """Compile a forward graph: report the strides of its outputs, and check its inputs."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        (outputs,) = graph.graph.output_node().args
        values = [getattr(node, "meta", {}).get("val") for node in outputs]
        reported = today if NUMBERS else lambda stride: stride
        strides = [tuple(map(reported, value.stride())) if isinstance(value, Tensor) else None for value in values]
        context.output_strides.extend(strides)
    return checked(graph, inputs)


def strict(graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
    """The backend."""
    from torch._dynamo.backends.common import aot_autograd  # seconds, which only those who compile shall pay

    return aot_autograd(fw_compiler=forward, bw_compiler=checked)(graph, inputs)


@contextlib.contextmanager
def strictly(backend: object = strict) -> Iterator[None]:
    """Within, torch.compile and nn.Module.compile use `backend`."""
    with (
        mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)),
        mock.patch.object(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend)),
    ):
        yield
