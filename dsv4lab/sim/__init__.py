"""Run compiled CuTeDSL kernels on the CPU: no GPU, no CUDA driver, the real PTX, against ordinary torch CPU tensors.

    from dsv4lab import sim

    sim.enable("sm_90a")                     # CuTeDSL now compiles for Hopper and launches into the simulator
    sim.run(host_function, a, b, c)          # compile, intercept the launch, execute the PTX; results are in the tensors
    add = sim.compile(host_function, a, b, c)
    print(sim.describe(add.capture(a, b, c)[0]))  # or only look: grid, parameters, TMA descriptors
    sim.trace(add, a, b, c).timeline()       # or keep a log of everything, see `dsv4lab.sim.tracing`

Nothing happens at import. `enable` (which the other functions call where needed) sets the environment variables that CuTeDSL
reads and a few hooks in its Python code; see `dsv4lab.sim.session` for which, and for how functions compiled earlier behave.
"""

from dsv4lab.sim.api import (
    Compiled,
    Executed,
    capture,
    compile,
    describe,
    execute,
    resources,
    run,
    simulating,
    tensor_maps,
    trace,
)
from dsv4lab.sim.contract import ContractError
from dsv4lab.sim.cubin import CubinError, Resources
from dsv4lab.sim.descriptor import TensorMap
from dsv4lab.sim.errors import SimulatorError
from dsv4lab.sim.exploration import Exploration, Finding, explore
from dsv4lab.sim.hosting import Host
from dsv4lab.sim.machine import Checks, Stats
from dsv4lab.sim.observe import Observer
from dsv4lab.sim.program import Kernel, Launch
from dsv4lab.sim.ptx import ParseError
from dsv4lab.sim.recorder import Recorder
from dsv4lab.sim.session import CaptureError, disable, doctor, enable
from dsv4lab.sim.shim import ShimError
from dsv4lab.sim.tensor_core import IssuedProduct, TensorCore
from dsv4lab.sim.timeline import Timeline, Timing
from dsv4lab.sim.tracing import Trace

__all__ = [
    "CaptureError",
    "Checks",
    "Compiled",
    "ContractError",
    "CubinError",
    "Executed",
    "Exploration",
    "Finding",
    "Host",
    "IssuedProduct",
    "Kernel",
    "Launch",
    "Observer",
    "ParseError",
    "Recorder",
    "Resources",
    "ShimError",
    "SimulatorError",
    "Stats",
    "TensorCore",
    "TensorMap",
    "Timeline",
    "Timing",
    "Trace",
    "capture",
    "compile",
    "describe",
    "disable",
    "doctor",
    "enable",
    "execute",
    "explore",
    "resources",
    "run",
    "simulating",
    "tensor_maps",
    "trace",
]
