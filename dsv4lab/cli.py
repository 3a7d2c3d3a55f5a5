"""The command line: `dsv4lab doctor | run | report | publish | sim | generate | quantize | bench`.

Heavy imports wait until a command needs them, so that `dsv4lab --help` answers at once. Exit status: 0 done, 1 something
fell short, 2 the request could not be carried out (one message on stderr; `--debug` shows the traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dsv4lab import __version__

if TYPE_CHECKING:
    from dsv4lab.model.engine import Completion

OK, FELL_SHORT, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class CommandError(Exception):
    """A request that cannot be carried out as given; the message is all the user needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    hangs_up = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL  # nohup's stays
    ends = [signal.SIGTERM] + [signal.SIGHUP] * hangs_up
    previous = {end: signal.signal(end, _terminate) for end in ends}
    try:
        status = int(options.command(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ndsv4lab: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output is gone (`| head`); stdout must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if options.debug:
            raise
        print(f"dsv4lab {options.name}: {_message(error)}", file=sys.stderr)
        return USAGE
    finally:
        for end, handler in previous.items():
            signal.signal(end, handler)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise SystemExit(TERMINATED)  # unwinds, so that running notebooks are killed and recorded


def _message(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, CommandError | ValueError | TypeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsv4lab", description="A workbench for DeepSeek-V4 inference kernels.")
    parser.add_argument("--version", action="version", version=f"dsv4lab {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(command=run)
        return added

    command("doctor", _doctor, "say what this machine can run and what is missing")

    run = command("run", _run, "execute notebooks headless")
    run.add_argument("names", nargs="*", metavar="NAME", help="notebooks, such as 01_tour or tour; all by default")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where models and kernels run")
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="set a notebook parameter")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)")
    run.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds a notebook may take (default 900)")
    _add_output(run)

    _add_output(command("report", _report, "write one page and one JSON about the executed notebooks"))

    publish = command("publish", _publish, "write executed notebooks compactly, to be kept in the repository")
    publish.add_argument("src", type=Path, metavar="SRC", help="folder of executed notebooks")
    publish.add_argument("dst", type=Path, metavar="DST", help="folder to write, such as executed/h200; replaced")
    publish.add_argument("--budget", type=int, required=True, metavar="BYTES", help="of the whole folder")
    publish.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="notebooks to keep beside index and report of all"
    )
    publish.add_argument("--pictures", type=int, metavar="N", help="of each notebook keep the first N; all by default")

    sim = command("sim", _sim, "run a CuTeDSL script written for a GPU on the CPU, and check its kernels")
    sim.add_argument("--arch", choices=("sm_90a", "sm_100a"), default="sm_90a", help="what to compile for (default sm_90a)")
    sim.add_argument("--schedule", default="eager", metavar="S", help="of each launch: eager (default), lazy or random:SEED")
    sim.add_argument("--explore", type=int, metavar="N", help="run each launch eager, lazy and with N random schedules instead")
    sim.add_argument("--skip", action="append", default=[], metavar="CHECK", help="leave a check out: races is the slow one")
    sim.add_argument("--multiprocessors", type=int, metavar="N", help="that the script is told of; by default the real GPU's")
    sim.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    sim.add_argument("--ptx", type=Path, metavar="DIR", help="write the PTX of every launched kernel there")
    sim.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file; all that follows are its own arguments")
    sim.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")

    generate = command("generate", _generate, "continue a prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue, or with --chat to answer")
    generate.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint directory; the nano model by default")
    generate.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="tokens to make at most (default 40)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of total mass P"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.add_argument("--chat", action="store_true", help="treat the prompt as a user's message")
    generate.add_argument("--no-bos", action="store_true", help="do not put the begin-of-sequence token before the prompt")
    generate.add_argument("--drafts", type=int, default=0, metavar="N", help="tokens the MTP block drafts ahead (default 0)")
    generate.add_argument("--numerics", choices=("exact", "official", "w4a4"), help="by default what the checkpoint calls for")
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    generate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations; by default bfloat16 on a GPU, which its kernels take, and float32 on the CPU",
    )
    generate.add_argument("--stats", action="store_true", help="print counts and rates on stderr")

    quantize = command("quantize", _quantize, "convert a checkpoint to another layout")
    quantize.add_argument("src", type=Path, metavar="SRC", help="a checkpoint directory in any known layout")
    quantize.add_argument("dst", type=Path, metavar="DST", help="where to write; must not exist or be empty")
    quantize.add_argument("--layout", choices=("nvfp4", "official", "bf16"), default="nvfp4", help="(default nvfp4)")
    quantize.add_argument("--calibrate", type=Path, metavar="TEXTFILE", help="measure activation ranges on this text (nvfp4)")

    bench = command("bench", _bench, "measure the kernels on this machine's GPU")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="after --: benchmarks/run.py's own, such as -- --help"
    )
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of executed notebooks (default executed/local)")


def _doctor(options: argparse.Namespace) -> int:
    from dsv4lab.lab import doctor

    findings = doctor.examine()
    print(doctor.table(findings))
    return OK if doctor.healthy(findings) else FELL_SHORT


def _run(options: argparse.Namespace) -> int:
    from dsv4lab.lab import machine, notebooks, runner

    machine.resolve_device(options.device)
    output = options.output or runner.EXECUTED
    outcomes = runner.run_notebooks(
        options.names,
        output=output,
        device=options.device,
        parameters=notebooks.parse_assignments(options.parameter),
        jobs=options.jobs,
        timeout_s=options.timeout,
    )
    passed = sum(outcome.status == runner.PASSED for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} notebooks passed; executed notebooks are in {output}")
    return OK if passed == len(outcomes) else FELL_SHORT


def _report(options: argparse.Namespace) -> int:
    from dsv4lab.lab import report, runner

    written = report.write_report(options.output or runner.EXECUTED)
    print(f"{written.num_passed} of {written.num_run} executed notebooks passed")
    print(f"report: {written.page}")
    print(f"data:   {written.data}")
    return OK if written.passed else FELL_SHORT


def _publish(options: argparse.Namespace) -> int:
    from dsv4lab.lab import publish

    written = publish.publish(options.src, options.dst, budget=options.budget, most=options.pictures, only=options.only)
    print(written)
    return OK if written.passed else FELL_SHORT


def _sim(options: argparse.Namespace) -> int:
    from dsv4lab.sim import script

    if not options.script.is_file():
        raise CommandError(f"SCRIPT must be a file, got {options.script}")
    checks = script.checks_without(options.skip, races=True)
    script.plan(options.schedule, options.explore)
    status = script.restart(options.argv)
    if status is not None:
        return status
    outcome = script.run_script(
        options.script,
        options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments,
        arch=options.arch,
        schedule=options.schedule,
        explore=options.explore,
        checks=checks,
        multiprocessors=options.multiprocessors,
    )
    print(outcome)
    script.write(outcome, summary=options.json, ptx=options.ptx)
    return OK if outcome.ok else FELL_SHORT


def _generate(options: argparse.Namespace) -> int:
    import torch

    import dsv4lab
    from dsv4lab.lab.machine import resolve_device
    from dsv4lab.model.chat import encode_messages

    device = resolve_device(options.device)
    path = options.checkpoint or dsv4lab.nano()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = dsv4lab.load(path, device, dtype, numerics=options.numerics, progress=sys.stderr.isatty())
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CommandError(f"{path} has no tokenizer.json")
    if options.chat:
        text = encode_messages([{"role": "user", "content": options.prompt}], mode="chat")
        ids = tokenizer.encode(text, allow_special=True)
    else:
        ids = ([] if options.no_bos else [tokenizer.bos_id]) + tokenizer.encode(options.prompt)
    if not ids:
        raise CommandError("PROMPT must not be empty together with --no-bos")
    decoder = tokenizer.stream(skip_special=True)
    begun = [] if options.chat else [options.prompt]  # shown with the first token, when all arguments have been taken

    def show(_: int, token: int) -> None:
        print(*begun, decoder.push(token), sep="", end="", flush=True)
        begun.clear()

    start = time.perf_counter()
    (completion,) = model.complete(
        [ids],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        num_drafts=options.drafts,
        on_token=show,
    )
    print(*begun, decoder.finish(), sep="")
    if options.stats:
        print(_stats(len(ids), completion, time.perf_counter() - start), file=sys.stderr)
    return OK


def _stats(prompt_len: int, completion: Completion, seconds: float) -> str:
    count = len(completion.ids)
    rate = f"{count / seconds:.1f} token/s" if seconds > 0 else ""
    lines = [
        f"{prompt_len} prompt tokens, {count} new in {completion.steps} steps and {seconds:.2f} s ({rate}); {completion.finish}"
    ]
    for place, share in enumerate(completion.acceptance, start=1):
        lines.append(f"draft {place}: {share:.0%} of {completion.drafted[place - 1]} accepted")
    return "\n".join(lines)


def _quantize(options: argparse.Namespace) -> int:
    from dsv4lab.model.checkpoint import quantize_checkpoint
    from dsv4lab.model.checkpoint.writer import check_destination

    input_amax = None
    if options.calibrate is not None:
        if options.layout != "nvfp4":
            raise CommandError(f"--calibrate is for --layout nvfp4, got {options.layout}")
        check_destination(options.dst)  # before the minutes of calibration
        input_amax = _calibrate(options.src, options.calibrate, options.layout)
    quantize_checkpoint(options.src, options.dst, layout=options.layout, progress=True, input_amax=input_amax)
    print(f"wrote {options.dst} ({options.layout})")
    return OK


def _bench(options: argparse.Namespace) -> int:
    """In a process of its own, which a broken CUDA context may take with it."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.is_file():
        raise CommandError(f"benchmarks are part of a checkout of the repository, got none at {script}")
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    return subprocess.run([sys.executable, str(script), *arguments]).returncode


def _calibrate(src: Path, text_file: Path, layout: str) -> dict[str, float]:
    import dsv4lab
    from dsv4lab.lab.calibrate import measure_input_amax

    text = text_file.read_text(encoding="utf-8")
    model = dsv4lab.load(src, numerics="exact", progress=sys.stderr.isatty())
    if model.tokenizer is None:
        raise CommandError(f"{src} has no tokenizer.json, which --calibrate needs")
    return measure_input_amax(model, model.tokenizer.encode(text), layout=layout, progress=True)


if __name__ == "__main__":
    sys.exit(main())
