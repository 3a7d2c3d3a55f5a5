"""The command line, as a user meets it: exit statuses, one clear line for an error, streamed text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import dsv4lab
from dsv4lab import cli
from dsv4lab.formats import NVFP4
from dsv4lab.lab import machine, runner
from dsv4lab.lab.pairing import render_notebook
from dsv4lab.model.checkpoint import open_checkpoint


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one passing and one failing notebook, which the commands take for the repository's."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "01_good.ipynb").write_text(render_notebook('# %% tags=["parameters"]\nsteps = 1\n\n# %%\nassert steps == 1\n'))
    (folder / "02_bad.ipynb").write_text(render_notebook("# %%\nassert 1 == 2\n"))
    monkeypatch.setitem(runner.run_notebooks.__kwdefaults__, "directory", folder)
    return folder


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that cannot be carried out; returns its one line on stderr."""
    assert cli.main(list(argv)) == cli.USAGE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"dsv4lab {argv[0]}: ")
    return lines[0]


def test_run_and_report_tell_good_from_bad(notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["run", "good", "--output", out]) == cli.OK
    assert cli.main(["report", "--output", out]) == cli.OK
    assert cli.main(["run", "--output", out, "--jobs", "2", "--device", "cpu", "-p", "steps=1"]) == cli.FELL_SHORT
    assert cli.main(["report", "--output", out]) == cli.FELL_SHORT
    shown = capsys.readouterr().out
    assert "1 of 2 notebooks passed" in shown and str(tmp_path / "out" / "report.html") in shown
    assert "cell 1 `assert 1 == 2`: AssertionError" in shown


def test_bad_requests_get_one_line_and_status_2(
    notebooks: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'tour' is none of: 01_good, 02_bad" in failure(capsys, "run", "tour")
    assert "no parameter 'steps'" in failure(capsys, "run", "bad", "good", "-p", "steps=2")
    assert "name=value" in failure(capsys, "run", "-p", "steps")
    assert "jobs must be >= 1" in failure(capsys, "run", "--jobs", "0")
    assert "no executed notebooks" in failure(capsys, "report", "--output", str(tmp_path))
    assert "not found" in failure(capsys, "generate", "x", "--checkpoint", str(tmp_path / "none"))
    assert "temperature must be >= 0" in failure(
        capsys, "generate", "x", "--checkpoint", str(tiny_checkpoint), "--temperature", "-1"
    )
    assert "--no-bos" in failure(capsys, "generate", "", "--no-bos", "--checkpoint", str(tiny_checkpoint))
    text = tmp_path / "text"
    text.write_text("x")
    extra = ["--layout", "bf16", "--calibrate", str(text)]
    assert "--layout nvfp4" in failure(capsys, "quantize", str(tiny_checkpoint), str(tmp_path / "q"), *extra)
    assert "got " + str(text) in failure(capsys, "quantize", str(tiny_checkpoint), str(text), "--calibrate", str(text))
    if not torch.cuda.is_available():
        assert "no CUDA device" in failure(capsys, "run", "--device", "cuda")


def test_debug_shows_the_traceback(notebooks: Path) -> None:
    with pytest.raises(ValueError, match="is none of"):
        cli.main(["run", "tour", "--debug"])


def test_generate_streams_what_the_model_gives(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dsv4lab.load(tiny_checkpoint)
    assert model.tokenizer is not None
    prompt = [model.tokenizer.bos_id, *model.tokenizer.encode("def ")]
    wanted = model.tokenizer.decode(model.generate(prompt, max_new_tokens=12).tolist(), skip_special=True)
    plain = ["generate", "def ", "--checkpoint", str(tiny_checkpoint), "--max-new-tokens", "12", "--device", "cpu"]
    assert cli.main(plain) == cli.OK
    assert capsys.readouterr().out == f"def {wanted}\n"
    assert cli.main([*plain, "--drafts", "1", "--stats"]) == cli.OK
    shown = capsys.readouterr()
    assert shown.out == f"def {wanted}\n"
    assert "5 prompt tokens, 12 new in" in shown.err and "draft 1:" in shown.err


def test_generate_shows_nothing_of_what_it_refuses(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "def ", "--checkpoint", str(tiny_checkpoint), "--top-p", "0"]) == cli.USAGE
    shown = capsys.readouterr()
    assert not shown.out and "top_p must be" in shown.err


def test_generate_leaves_the_dtype_to_the_device(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.dtype | None]] = []

    def load(path: Path, device: torch.device, dtype: torch.dtype | None, **how: object) -> object:
        asked.append((device.type, dtype))
        raise ValueError("far enough")

    monkeypatch.setattr(dsv4lab, "load", load)
    monkeypatch.setattr(machine, "resolve_device", lambda device: torch.device("cuda"))
    for extra in ([], ["--dtype", "float32"]):
        assert cli.main(["generate", "x", "--checkpoint", str(tiny_checkpoint), *extra]) == cli.USAGE
    assert asked == [("cuda", None), ("cuda", torch.float32)]  # None: see `model.loading.default_dtype`


def test_sampling_follows_its_seed(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        argv = [
            "generate",
            "x",
            "--checkpoint",
            str(tiny_checkpoint),
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--numerics",
            "exact",
            "--device",
            "cpu",
        ]
        assert cli.main([*argv, "--max-new-tokens", "8"]) == cli.OK
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_quantize_writes_calibrated_nvfp4_that_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return [i * i for i in range(40)]\n")
    target = tmp_path / "nvfp4"
    assert cli.main(["quantize", str(tiny_checkpoint), str(target), "--calibrate", str(text)]) == cli.OK
    weights = {
        name: value for name, value in open_checkpoint(target).items(progress=False) if getattr(value, "format", None) is NVFP4
    }
    scales = {name: float(w.input_scale) for name, w in weights.items() if w.input_scale is not None}
    for part in ("attn.wq_a", "attn.wo_b", "ffn.shared_experts.w2", "ffn.experts."):
        assert any(part in name for name in scales), part
    assert any(name.startswith("mtp.0.") for name in scales)
    assert len(set(scales.values())) > len(scales) // 2  # measured a matrix, not one constant
    generate = ["generate", "x", "--checkpoint", str(target), "--max-new-tokens", "2", "--numerics", "w4a4", "--device", "cpu"]
    assert cli.main(generate) == cli.OK
    assert cli.main(["quantize", str(tiny_checkpoint), str(target), "--calibrate", str(text)]) == cli.USAGE


def test_bench_runs_the_benchmarks_of_the_checkout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--", "--list", "--quick", "--only", "quantizers"]) == cli.OK
    assert "quantizers quantize_nvfp4" in capfd.readouterr().out
    assert cli.main(["bench", "--", "--only", "nothing"]) == cli.FELL_SHORT
    monkeypatch.setattr(cli, "__file__", "/nowhere/dsv4lab/cli.py")
    assert cli.main(["bench"]) == cli.USAGE


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.TERMINATED)])
def test_interrupted_runs_exit_as_shells_expect(tmp_path: Path, how: signal.Signals, status: int) -> None:
    (tmp_path / "01_hang.ipynb").write_text(
        render_notebook("# %%\nimport os\nopen('started', 'w').write(str(os.getpid()))\nwhile True:\n    pass\n")
    )
    code = (
        "import pathlib, sys; from dsv4lab import cli; from dsv4lab.lab import runner\n"
        "runner.run_notebooks.__kwdefaults__['directory'] = pathlib.Path(sys.argv[1])\n"
        "sys.exit(cli.main(['run', '--output', sys.argv[1] + '/out']))"
    )
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs, such as this, may not do
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    deadline = time.monotonic() + 40
    started = tmp_path / "started"
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)  # far longer than it takes, for a machine whose cores are all busy
    assert process.returncode == status
    assert "Traceback" not in err
    kernel = int(started.read_text())
    # dead, though whoever adopted it may not have collected it yet
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE
    executed = json.loads((tmp_path / "out" / "01_hang.ipynb").read_text())
    assert executed["metadata"]["dsv4lab"]["status"] == "stopped"


def test_help_is_quick_and_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -X importtime -m dsv4lab.cli --help 2>&1 >/dev/null | grep -cE ' (torch|papermill|matplotlib)$'",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "0"
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m dsv4lab.cli doctor | head -n 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in piped.stderr and "Python" in piped.stdout
