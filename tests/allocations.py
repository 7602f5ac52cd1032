"""Memory that torch's CPU allocator hands out, read from its profiler: that sees every tensor, also
those that an operator makes and frees inside."""

from torch.profiler import ProfilerActivity, profile

from ift_kernels import backends

MIB = 1 << 20


class Allocations:
    """Bytes alive over a ``with`` block, from what was alive at its start."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        results = self.profile.profiler.kineto_results.events()
        events = [e for e in results if e.name() == "[memory]"]
        assert error[0] or events, "the profiler saw no allocation at all"
        self.peak = self.alive = self.largest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.alive += event.nbytes()
            self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, event.nbytes())
        self.products = sum(e.name() in ("aten::mm", "aten::addmm_") for e in results)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def allowed(h, workspace):
    """The workspace, a quarter more for what vendor products round up, and vectors of tokens.

    The reference is written to be read: its epilogues make a dozen temporaries of a tile in fp32.
    """
    slack = 1.25 if backends.requested() == "cpu" else 12
    return slack * workspace + 64 * 8 * h.target.numel() + MIB // 4
