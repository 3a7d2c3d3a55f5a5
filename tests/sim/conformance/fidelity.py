"""Runs the sm_90a groups on the GPU and in the simulator, on the same inputs, and compares the results.

    python -m tests.sim.conformance.fidelity OUT

writes OUT/fidelity.json.xz (what the record `h200.json.xz` is made of) and OUT/native.npz (the GPU's results). The GPU's
part runs in processes of its own, started again after a group that breaks its CUDA context; a broken group is recorded with
its error.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.sim.conformance import suite
from tests.sim.conformance.case import Group, compare, digest, problem, run_simulated

PATIENCE = 90  # seconds without a finished group before the GPU's process is ended


def run_native(group: Group) -> list[np.ndarray]:
    """The group's results on the GPU."""
    import cutlass.cute as cute
    import torch
    from cutlass.cute.runtime import from_dlpack

    source, target = group.inputs(0, 0)
    tensors = [torch.zeros(len(data), dtype=torch.uint8, device="cuda") for data in (source, target)]
    for tensor, data in zip(tensors, group.inputs(*(t.data_ptr() for t in tensors)), strict=True):
        tensor.copy_(torch.from_numpy(data))
    views = [from_dlpack(t, assumed_align=16) for t in tensors]
    compiled = cute.compile(group.host(), *views)
    compiled(*views)
    torch.cuda.synchronize()
    return group.outputs(tensors[1].cpu().numpy())


def work(kind: str, out: Path) -> None:
    """Run every group that has no result yet."""
    if kind == "simulated":
        from dsv4lab import sim

        sim.enable("sm_90a")
    for index, group in enumerate(suite.every("sm_90a")):
        done, failed = out / f"{index}.npz", out / f"{index}.error"
        if done.exists() or failed.exists():
            continue
        failed.write_text("ended the process")
        start = time.perf_counter()
        try:
            results = run_native(group) if kind == "native" else run_simulated(group)
        except Exception as error:
            failed.write_text(f"{type(error).__name__}: {error}")
            if kind == "native" and "CUDA" in failed.read_text():
                sys.exit(3)
            continue
        np.savez(done, *results)
        failed.unlink()
        print(f"{kind}: {group.name}, {len(group.forms)} forms, {time.perf_counter() - start:.2f} s", flush=True)


def supervise(kind: str, out: Path) -> None:
    """Run `work` in a process, again after a crash or a hang, until every group has a result or an error."""
    out.mkdir(parents=True, exist_ok=True)
    total = len(suite.every("sm_90a"))
    while len(list(out.iterdir())) < total:
        before = len(list(out.iterdir()))
        environment = {**os.environ, "CUTE_DSL_ARCH": "sm_90a", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", __spec__.name, kind, str(out)], env=environment)
        seen, since = before, time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            now = len(list(out.iterdir()))
            if now > seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                process.kill()
                print(f"{kind}: nothing for {PATIENCE} s, process ended", flush=True)
        if len(list(out.iterdir())) == before:
            raise RuntimeError(f"the {kind} process makes no progress; its exit status was {process.returncode}")


def results(out: Path, index: int) -> list[np.ndarray] | str:
    """A group's results, or why there are none."""
    done, failed = out / f"{index}.npz", out / f"{index}.error"
    if not done.exists():
        return failed.read_text() if failed.exists() else "was not run"
    with np.load(done) as data:
        return [data[name] for name in data.files]


def entry(group: Group, index: int, gpu: np.ndarray | str, cpu: np.ndarray | str) -> dict[str, Any]:
    """Whether the GPU and the simulator agree on a form, and how each compares with the expected result."""
    form = group.forms[index]
    known: dict[str, Any] = {"group": group.name, "form": form.label, "bound": form.bound.kind, "reason": form.bound.reason}
    if isinstance(gpu, str) or isinstance(cpu, str):
        known["error"] = f"GPU: {gpu}" if isinstance(gpu, str) else f"simulator: {cpu}"
        return known
    found = compare(cpu, gpu, form.element)
    known |= {"equal": found.equal, "elements": int(gpu.size), "gpu": digest(gpu)}
    for name, result in (("gpu_problem", gpu), ("simulator_problem", cpu)):
        known[name] = problem(form, result)
    if not found.equal:
        known |= {"different": found.different, "only_nan": found.payload, "ulp": found.ulp, "absolute": found.absolute}
        known["relative"] = found.relative
    return known


def record(native: Path, simulated: Path) -> list[dict[str, Any]]:
    """One entry per form."""
    out = []
    for index, group in enumerate(suite.every("sm_90a")):
        gpu, cpu = results(native, index), results(simulated, index)
        for k in range(len(group.forms)):
            out.append(entry(group, k, gpu if isinstance(gpu, str) else gpu[k], cpu if isinstance(cpu, str) else cpu[k]))
    return out


def device() -> str:
    """The GPU and its driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def write(path: Path, where: str, entries: list[dict[str, Any]]) -> None:
    """The record: what it was measured on, then one line per form, without what says nothing."""
    lines = [json.dumps({k: v for k, v in e.items() if v not in ("", None)}) for e in entries]
    text = f'{{"device": {json.dumps(where)}, "forms": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    if len(sys.argv) == 3:
        work(sys.argv[1], Path(sys.argv[2]))
        return
    out = Path(sys.argv[1])
    parts = out / "parts"
    simulator = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __spec__.name, "simulated-all", str(parts / "simulated"), "-"]
    )
    supervise("native", parts / "native")
    simulator.wait()
    entries = record(parts / "native", parts / "simulated")
    write(out / "fidelity.json.xz", device(), entries)
    gpu = {}
    for index, group in enumerate(suite.every("sm_90a")):
        found = results(parts / "native", index)
        if not isinstance(found, str):
            gpu |= {f"{group.name}|{k}": r for k, r in enumerate(found)}
    np.savez_compressed(out / "native.npz", **gpu)  # type: ignore[arg-type]
    equal = sum(e.get("equal", False) for e in entries)
    print(f"{len(entries)} forms, {equal} with equal bits, {sum('error' in e for e in entries)} not run")
    for e in entries:
        if "error" in e:
            print(f"NOT RUN {e['group']}: {e['form']}: {e['error'][:300]}")
        elif e["gpu_problem"] or not e["equal"]:
            print(f"{e['group']}: equal {e['equal']}, ulp {e.get('ulp')}: {(e['gpu_problem'] or e['form'])[:220]}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        supervise("simulated", Path(sys.argv[2]))
    else:
        main()
