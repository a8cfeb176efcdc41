"""Everything that has to be known of a GPU, in minutes: correct, fast, and a model that learns. See gpu.md beside this.

    python -m benchmarks.gpu --data build/gpu-data.npz --out DIR [--device cuda|cpu] [--minutes 9]

Each part is a process with a time limit of its own, so that none can take another's time or memory. What it finds is
written to DIR/results.jsonl as it comes, a JSON line each; DIR/PART.log has what it said beside. No part needs Ray, a
network, or more than torch, numpy, transformers, safetensors and tiktoken.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# Shares of the time, in the order in which they run; what a part leaves is shared out among the others.
PARTS = {"correct": 0.35, "learn": 0.24, "record": 0.11, "probe": 0.05, "step": 0.25}
ON_A_CPU = {"correct": 0.55, "learn": 0.13, "record": 0.13, "probe": 0.07, "step": 0.12}
GRACE = 0.12  # of a part's limit, by which its work ends before it is killed
RESERVE = 5.0  # seconds of the whole for starting and ending
RESULTS = "results.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--data", type=Path, default=Path("build/gpu-data.npz"), help="`benchmarks.on_gpu.carried`")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments)
        return
    if wrong := set(arguments.parts.split(",")) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(wrong))}; choose from {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part is ended then too
    sys.exit(run_all(arguments))


def run_part(arguments: argparse.Namespace) -> None:
    """In a process of its own."""
    os.environ["RAYBERT_TEST_DEVICE"] = arguments.device
    deadline = time.monotonic() + arguments.seconds
    import torch

    from benchmarks.on_gpu import correct, learn, probe, step
    from benchmarks.on_gpu.parts import Order

    work = {
        "correct": correct.run,
        "learn": learn.original,
        "record": learn.record,
        "probe": probe.run,
        "step": step.run,
    }
    device = torch.device(arguments.device)
    work[arguments.part](Order(arguments.part, device, arguments.out, arguments.data, deadline))


def run_all(arguments: argparse.Namespace) -> int:
    """All parts. Returns the exit code."""
    begun, shares = time.monotonic(), ON_A_CPU if arguments.device == "cpu" else PARTS
    end = begun + 60 * arguments.minutes - RESERVE
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in (RESULTS, "curve.json", "curve.png"):
        (arguments.out / old).unlink(missing_ok=True)
    tell(arguments.out, {"part": "about", **about(arguments.device)})
    if not arguments.data.exists():
        arguments.data = small_data(arguments.out)
    parts = arguments.parts.split(",")
    failed = []
    for number, part in enumerate(parts):
        share = shares[part] / sum(shares[name] for name in parts[number:])
        limit = max(1.0, (end - time.monotonic()) * share)
        ended = run_limited(part, limit, arguments)
        tell(arguments.out, {"part": part, "ended": ended, "limit_s": round(limit, 1)})
        failed += [part] if ended["how"] == "failed" else []
    found = summary(arguments.out, time.monotonic() - begun, failed)
    tell(arguments.out, found)
    return exit_code(found)


def exit_code(found: dict[str, Any]) -> int:
    """Of a summary: 0 when every part ended well with a result, every test ran and passed, and nothing failed.

    Of `step` one shape is enough: time may leave out the others.
    """
    wrong = ("failed", "tests_failed", "tests_not_run", "curves_without_step", "steps_failed")
    without_any = found["steps_without_ratio"] and "ratio" not in found
    return 1 if without_any or any(found[name] for name in wrong) else 0


def run_limited(part: str, limit: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a part, write its lines down as they come, and end it with all its processes when its time is up."""
    start = time.monotonic()
    options = {"part": part, "seconds": limit * (1 - GRACE), "device": arguments.device}
    options |= {"out": arguments.out, "data": arguments.data}
    command = [sys.executable, "-m", "benchmarks.gpu", *(f"--{name}={value}" for name, value in options.items())]
    with (arguments.out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        timer = threading.Timer(limit, kill, (process,))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    write(arguments.out, line.rstrip("\n"))
            code = process.wait()
        finally:
            out_of_time = not timer.is_alive()
            timer.cancel()
            kill(process)
    how = "stopped at its limit" if out_of_time and code else "failed" if code else "done"
    last = (arguments.out / f"{part}.log").read_text().strip().splitlines()[-1:] if how == "failed" else []
    return {"how": how, "seconds": round(time.monotonic() - start, 1), **({"error": last[0][:400]} if last else {})}


def kill(process: subprocess.Popen[str]) -> None:
    """End a part and all that it started. They are in a session of their own, which Ctrl-C does not reach."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def small_data(out: Path) -> Path:
    """A file of a million tokens, where the folder of texts is at hand and none was made."""
    from benchmarks.on_gpu.carried import make

    path = out / "small-data.npz"
    size = make(path, most_tokens=1_000_000)
    tell(out, {"part": "about", "data": f"{path}: a small file, made now, of {size:,} bytes"})
    return path


def about(device: str) -> dict[str, Any]:
    import torch

    from benchmarks.common import machine

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; with --device cpu the same parts run on a CPU, with tiny models")
    found: dict[str, Any] = {"device": device, "machine": machine(), "torch": torch.__version__}
    if device == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return found


def summary(out: Path, seconds: float, failed: list[str]) -> dict[str, Any]:
    """The last line, with the names that all benchmarks have; figures that were not measured are left out."""
    lines = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    of_shapes = [line for line in lines if line["part"] == "step" and "size" in line]
    steps = [line for line in of_shapes if "ours" in line]
    newest = list({(line["size"], line["T"]): line for line in steps}.values())  # in the order of the shapes
    first = next((line for line in newest if "ratio" in line), newest[0] if newest else {})
    named = ("ours", "peer", "ratio", "limit", "mfu", "size", "T", "ours_is", "peer_is", "peer_ways")
    found = {name: first[name] for name in named if name in first}
    if "mfu" in found:
        found["share_of_limit"] = found["mfu"]
    tests = [line for line in lines if line["part"] == "correct" and "test" in line]
    ends = [line for line in lines if line["part"] in ("learn", "record") and "pooler" in line]
    found |= {"tests": len(tests), "tests_failed": [line["test"] for line in tests if not line["ok"]]}
    found["tests_not_run"] = not_run(lines)
    found["steps_failed"] = [f"{line['side']} {line['way']} {shape(line)}" for line in of_shapes if "failed" in line]
    found["steps_without_ratio"] = without_ratio(lines)
    trained = {line["part"] for line in lines if line.get("step", 0) > 0}
    curves = {line["part"] for line in lines if line["part"] in ("learn", "record")}
    found["curves_without_step"] = sorted(curves - trained)
    for line in ends:
        found |= {f"{line['recipe']}_pooler": line["pooler"], f"{line['recipe']}_steps": line["steps"]}
    return {
        "part": "summary",
        "name": "gpu",
        "unit": "real tokens/s",
        **found,
        "machine": next(line["machine"] for line in lines if "machine" in line),
        "failed": failed,
        "seconds": round(seconds, 1),
    }


def shape(line: dict[str, Any]) -> str:
    return f"{line['size']} T={line['T']}"


def without_ratio(lines: list[dict[str, Any]]) -> list[str]:
    """Shapes of the part `step` that lack a side; "all" where the part ended before it had any."""
    of_step = [line for line in lines if line["part"] == "step"]
    shapes = {shape(line) for line in of_step if "size" in line}
    lacking = shapes - {shape(line) for line in of_step if "ratio" in line}
    return sorted(lacking) if shapes or not of_step else ["all"]


def not_run(lines: list[dict[str, Any]]) -> list[str]:
    """Tests that were planned and have no result; "all" where the part ended before it had a plan."""
    correct = [line for line in lines if line["part"] == "correct"]
    planned = next((line["planned"] for line in correct if "planned" in line), ["all"] if correct else [])
    done = {line["test"] for line in correct if "test" in line}
    return [name for name in planned if name not in done]


def tell(out: Path, found: dict[str, Any]) -> None:
    write(out, json.dumps(found))


def write(out: Path, line: str) -> None:
    with (out / RESULTS).open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
