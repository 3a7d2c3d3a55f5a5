"""Work on a second stream: done at once on a CPU, beside what follows on a GPU, also inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.kernels._common.aside import Aside, starting


@pytest.mark.parametrize("ahead", [False, True])
def test_work_aside_is_simply_done_on_a_cpu(ahead: bool) -> None:
    aside = Aside(torch.device("cpu"))
    if ahead:
        with starting(torch.device("cpu")), aside.run():
            y = torch.ones(3) * 2
    else:
        with aside.run():
            y = torch.ones(3) * 2
    aside.join()
    assert torch.equal(y, torch.full((3,), 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("used", [True, False])
def test_work_aside_joins_in_a_cuda_graph(ahead: bool, used: bool) -> None:
    """Also where a start is marked that nothing makes use of."""
    x = torch.ones(1 << 20, device="cuda")

    def beside(z: torch.Tensor) -> torch.Tensor:
        if not used:
            return x + 50 + z
        aside = Aside(x.device)
        with aside.run():
            y = x
            for _ in range(50):
                y = y + 1
        aside.join()
        return y + z

    def both() -> torch.Tensor:
        if not ahead:
            return beside(x * 3)
        with starting(x.device):
            return beside(x * 3)

    assert torch.equal(both(), x * 54)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    x.fill_(2.0)
    graph.replay()
    assert torch.equal(out, torch.full_like(out, 58.0))
