"""CUDA graphs on a CPU: what is launched while a graph is captured is not done, but done again with each replay.

A replay repeats the recorded operators on the recorded tensors. Whatever else a captured function read when it was
recorded (a number of the host, a tensor that has been replaced since) stays as it was then, as in a real graph; reading
a value back to the host while a graph is captured is refused, as there. Streams and events do nothing.

    graphs = Graphs(monkeypatch)  # torch.cuda.CUDAGraph and its like
    ...
    graphs.captured, graphs.replayed
"""

import contextlib
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values: object) -> list[int]:
    """Which memory the tensors in `values` lie in."""
    return [x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)]


class Recorder(TorchDispatchMode):
    """Notes every operator; undo() gives the tensors that were there before their old values."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.operators, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        assert name not in self.READS, f"{name} reads from the device while a graph is captured"
        kwargs = kwargs or {}
        arguments = operator._schema.arguments
        passed = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs  # `out` is one, too
        writes = [
            passed[argument.name]
            for argument in arguments
            if argument.name in passed and argument.alias_info is not None and argument.alias_info.is_write
        ]
        for x in writes:
            (memory,) = storages(x)
            if memory not in self.own and memory not in self.before:
                self.before[memory] = x, x.untyped_storage().clone()
        result = operator(*args, **kwargs)
        given = storages((args, kwargs))
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and storages(x)[0] not in given]
        self.own.update(storages(new))
        if writes or new:  # not a view
            self.operators.append((operator, args, kwargs, result if new else None))
        return result

    def undo(self):
        for x, content in self.before.values():
            x.untyped_storage().copy_(content)

    def again(self):
        with torch.no_grad():
            for operator, args, kwargs, result in self.operators:
                repeated = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(repeated), strict=result is not None):
                    if result is not None and isinstance(old, Tensor):
                        old.copy_(new)


class Graphs:
    """Stands for what torch.cuda has of graphs, streams, events and memory, and counts. While `free` bytes of `total`
    are not occupied, what the allocator `keeps` is not among them until empty_cache()."""

    def __init__(self, monkeypatch):
        self.captured = self.replayed = self.emptied = 0
        self.free, self.total, self.keeps = 80 << 30, 80 << 30, 0
        self.capturing = False
        counts = self

        class CUDAGraph:
            def capture_begin(self, *args, **kwargs):
                self.recorder = Recorder()
                self.recorder.__enter__()
                counts.capturing = True

            def capture_end(self):
                self.recorder.__exit__(None, None, None)
                self.recorder.undo()
                counts.capturing = False
                counts.captured += 1

            def replay(self):
                self.recorder.again()
                counts.replayed += 1

        def empty_cache():
            assert not self.capturing, "memory is freed while a graph is captured"
            self.free, self.keeps, self.emptied = self.free + self.keeps, 0, self.emptied + 1

        def idle(*args, **kwargs):
            return SimpleNamespace(wait_stream=idle, record=idle, synchronize=idle)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.keeps)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
        for name in (
            "Stream",
            "current_stream",
            "Event",
            "graph_pool_handle",
            "set_per_process_memory_fraction",
            "reset_peak_memory_stats",
        ):
            monkeypatch.setattr(torch.cuda, name, idle)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
