"""Runnable examples; from the root of a checkout: ``python -m examples.demo``."""

import os

# Before torch is imported: otherwise its profiler and allocator talk between the progress bars.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
