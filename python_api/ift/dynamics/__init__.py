"""Learning dynamics: what fine-tuning does to the answers that it does not train on.

docs/dynamics.md has the mathematics, the protocol and what each curve means.
"""

from ift.dynamics.callback import ProbeCallback
from ift.dynamics.evaluate import Measurement, ProbeEvaluator
from ift.dynamics.guard import ValleyGuard
from ift.dynamics.heatmap import HeatMap, heat_map, kernel_norms
from ift.dynamics.monitor import SqueezeMonitor
from ift.dynamics.probes import Probe, build_probe_set, read_probes, sampler, write_probes

__all__ = [
    "HeatMap",
    "Measurement",
    "Probe",
    "ProbeCallback",
    "ProbeEvaluator",
    "SqueezeMonitor",
    "ValleyGuard",
    "build_probe_set",
    "heat_map",
    "kernel_norms",
    "read_probes",
    "sampler",
    "write_probes",
]
