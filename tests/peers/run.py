"""Drives `tests/peers/run.sh`: starts the workers of both sides, lets them make steps in turn, prints a table of medians.

    python tests/peers/run.py BINARY [options of run.sh]

Each row has three processes, which take turns: this project's (`ours.rs`), PyTorch as installed, and PyTorch tuned (both
`torch_worker.py`). Tuned is the allocator of the C library told to keep freed memory and to ask for pages of 2 MiB, as ours
does, and batch norms folded into the convolutions of networks that only infer. A worker times its own steps, so neither pipes nor this program are counted. Peak
memory is that of the whole process, interpreter and libraries included, which does one row's work and nothing else; the JSON has
what it held before the model was made, which is much for a PyTorch built with CUDA. PyTorch is channels last; `--formats` adds
a fourth process with PyTorch tuned and channels first, which goes into the JSON, and the table's footer says where it is the
faster one. Settings of allocators, threads and instruction sets in the
environment reach no worker.

Exit status: 0 done, 1 a row failed, 2 wrong usage or no PyTorch.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {
    "efficientnet_b0-train": "EfficientNet-B0, forward + backward",
    "mobilenetv3_large_100-train": "MobileNetV3-Large, forward + backward",
    "resnet18-train": "ResNet-18, forward + backward",
    "resnet50-eval": "ResNet-50, inference",
    "efficientnet_b0-eval": "EfficientNet-B0, inference",
    "vit_tiny_patch16_224-train": "ViT-Tiny, forward + backward",
    "vit_tiny_patch16_224-eval": "ViT-Tiny, inference",
    "xcit_tiny_12_p16_224-train": "XCiT-Tiny-12, forward + backward",
    "xcit_tiny_12_p16_224-eval": "XCiT-Tiny-12, inference",
    "disco-step": "DisCo step, EfficientNet-B0, teacher cached on both sides",
    "disco-live": "DisCo step, EfficientNet-B0, PyTorch runs the ResNet-50 teacher, ours has its cached embeddings",
}
OURS, INSTALLED, TUNED, CONTIGUOUS = "ours", "installed", "tuned", "tuned-contiguous"
ISAS = ("portable", "avx2", "avx512")
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
    # Since glibc 2.35. PyTorch's own THP_MEM_ALLOC_ENABLE takes a sixth more memory and no less time, measured on `efficientnet_b0-train`.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Variables that would change what "as installed" and "tuned" mean, by how they begin.
KEPT_OUT = (
    *("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_CPU_CAPABILITY", "RAYON_"),
)
HERE = Path(__file__).resolve().parent
# Idle threads of OpenMP spin for some milliseconds after their work: each turn starts when they have gone to sleep.
SETTLE_SECONDS = 0.2
# A share of the processor time that is worth a warning.
NOTABLE_SHARE = 0.05


class PeerError(Exception):
    """A worker failed; the message is its own."""


class Unavailable(Exception):
    """A worker knows no such network."""


def say(text):
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A process that makes a step when asked to."""

    def __init__(self, name, command, environment):
        self.name, self.times, self.log = name, [], tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        try:
            self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
        except OSError as error:
            raise PeerError(f"cannot start {self.name}: {error}") from error

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = [line.strip() for line in self.log if line.strip()]
            errors = [line for line in said if line.startswith("error:")] or said[-1:] or ["it says nothing"]
            raise PeerError(f"{self.name} stopped with status {self.process.returncode}: {errors[-1]}")
        return line.strip()

    def introduce(self):
        """What the worker says when its model is ready."""
        try:
            self.about = json.loads(self.read())
        except ValueError as error:
            raise PeerError(f"{self.name} does not introduce itself: {error}") from error
        if "unavailable" in self.about:
            raise Unavailable(self.about["unavailable"])

    def step(self):
        """Milliseconds of one step."""
        try:
            self.process.stdin.write("step\n")
        except OSError:
            pass  # reading tells what happened
        answer = self.read()
        try:
            return float(answer)
        except ValueError as error:
            raise PeerError(f"{self.name} answers `{answer}` to a step") from error

    def processor_seconds(self):
        """Processor time of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self):
        """The most memory that the process has held at once."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024

    def stop(self):
        """Ends the process; a worker also ends when its input does."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def results(self, batch):
        """For the JSON."""
        median, least = statistics.median(self.times), min(self.times)
        return {
            "per_second": round(batch / median * 1e3, 2),
            "median_ms": round(median, 3),
            "min_ms": round(least, 3),
            "times_ms": [round(time, 3) for time in self.times],
            "peak_mib": round(self.peak_mib(), 1),
            **self.about,
        }


def command_of(side, row, options):
    """The command and the environment of a worker."""
    flags = ["--row", row, "--threads", str(options.threads), "--batch", str(options.batch), "--size", str(options.size)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_OUT)}
    environment.update({name: str(options.threads) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")})
    if side == OURS:
        return [str(options.binary), *flags, *(["--isa", options.isa] if options.isa else [])], environment
    if side in (TUNED, CONTIGUOUS):
        environment.update(TUNED_ALLOCATOR)
        flags.append("--fold")
    if side == CONTIGUOUS:
        flags.append("--contiguous")
    return [options.python, str(HERE / "torch_worker.py"), *flags], environment


def machine_seconds():
    """Processor time of all programs on the machine."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:10])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def turn(worker, others, settle):
    """One step of a worker while the others wait.

    Returns its milliseconds and the seconds of wall time, of processor time of the waiting workers, and of other programs.
    """
    time.sleep(settle)
    own, waiting, machine = worker.processor_seconds(), sum(w.processor_seconds() for w in others), machine_seconds()
    start = time.monotonic()
    milliseconds = worker.step()
    wall = time.monotonic() - start
    own = worker.processor_seconds() - own
    waiting = sum(w.processor_seconds() for w in others) - waiting
    return milliseconds, wall, waiting, max(0.0, machine_seconds() - machine - own - waiting)


def agree(workers):
    """Both sides must compute the same thing, by its size and shape, on as many threads."""
    for what in ("parameters", "output", "threads"):
        found = {worker.name: worker.about.get(what) for worker in workers}
        if len({json.dumps(value) for value in found.values()}) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in found.items())
            raise PeerError(f"the sides differ in `{what}`: {listed}")


def run_row(row, sides, options):
    """Times one row; the result goes into the JSON."""
    workers, result = [], {"row": row, "work": ROWS[row], "sides": {}}
    try:
        for together in [sides] if options.smoke else [[side] for side in sides]:
            started = []
            for side in together:
                started.append(Worker(side, *command_of(side, row, options)))
                workers.append(started[-1])
            for worker in started:
                try:
                    worker.introduce()
                except Unavailable as error:
                    workers.remove(worker)
                    worker.stop()
                    result["sides"][worker.name] = {"unavailable": str(error)}
        agree(workers)
        wall = waiting = others = 0.0
        for index in range(options.rounds + 1):
            # There and back, so that no side always follows the same other one.
            for worker in workers if index % 2 == 0 else reversed(workers):
                others_here = [other for other in workers if other is not worker]
                milliseconds, *seconds = turn(worker, others_here, 0 if options.smoke else SETTLE_SECONDS)
                if index > 0:  # the first is the warm-up
                    worker.times.append(milliseconds)
                    wall, waiting, others = (a + b for a, b in zip((wall, waiting, others), seconds))
        result["sides"].update({worker.name: worker.results(options.batch) for worker in workers})
        if "median_ms" in result["sides"].get(CONTIGUOUS, {}):
            result["better_memory_format"] = min(
                ("channels_last", TUNED), ("contiguous", CONTIGUOUS), key=lambda pair: result["sides"][pair[1]]["median_ms"]
            )[0]
        if wall > 0:
            result["waiting_share"] = round(waiting / wall / os.cpu_count(), 4)
            result["others_share"] = round(others / wall / os.cpu_count(), 4)
    except PeerError as error:
        result["failed"] = str(error)
    finally:
        for worker in workers:
            worker.stop()
    return result


def large_pages():
    """Who gets pages of 2 MiB from the system: `always`, `madvise` (who asks) or `never`; none where it does not tell."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def machine(options):
    """The processor and what of it is used."""
    model, flags = platform.machine(), set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            model = value
        elif name == "flags":
            flags = set(value.split())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "instruction_sets": [name for name in ("avx2", "avx512f") if name in flags],
        "large_pages": large_pages(),
    }


def commit():
    """The commit that is measured; a plus stands for changes that are not committed."""
    git = lambda *words: subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()
    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def header(report):
    machine, options = report["machine"], report["options"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items()) or "no PyTorch"
    sets = ", ".join(machine["instruction_sets"]) or "neither avx2 nor avx512f"
    alone = f"Ours computes with {options['isa']}, PyTorch with the best instructions of the machine. " if options["isa"] else ""
    rounds = f"medians of {options['rounds']} rounds" if options["rounds"] > 1 else "1 round"
    return (
        f"`{report['command']}` at {report['commit']}: {machine['processor']}, {machine['threads']} of {machine['cores']} cores, {sets}; "
        f"{versions}; f32, batch {options['batch']} at {options['size']} x {options['size']}, {rounds}, alternated.\n"
        f"{alone}PyTorch is eager and channels last; *tuned* has an allocator that keeps freed memory in large pages, and batch norms folded for inference.\n"
        "Speed in images a second (DisCo: samples a second, two views each), and ours as a multiple of PyTorch's;\n"
        "peak memory of the whole process in MiB, ours over the smaller of PyTorch's two, and the same *above* what the processes\n"
        "held before a model was made, so without interpreter and libraries.\n"
    )


HEADINGS = ["", "ours", "PyTorch", "tuned", "x PyTorch", "x tuned", "MiB ours", "MiB PyTorch", "MiB tuned", "MiB ratio", "above"]


def cells(result):
    """One line of the table, after its name."""
    sides = result["sides"]
    if "failed" in result:
        return ["failed", *[""] * (len(HEADINGS) - 2)]

    def value(side, key):
        return sides.get(side, {}).get(key)

    def shown(side, key, form):
        if "unavailable" in sides.get(side, {}):
            return "not available"
        found = value(side, key)
        return format(found, form) if found is not None else "-"

    def ratio(numerator, denominators):
        denominators = [number for number in denominators if number]
        return f"{numerator / min(denominators):.2f}" if numerator and denominators else "-"

    columns = (OURS, INSTALLED, TUNED)
    def above(side):
        return value(side, "peak_mib") - value(side, "idle_mib") if value(side, "peak_mib") else None

    speed, memory = value(OURS, "per_second"), value(OURS, "peak_mib")
    return [
        *(shown(side, "per_second", ".1f") for side in columns),
        *(ratio(speed, [value(side, "per_second")]) for side in columns[1:]),
        *(shown(side, "peak_mib", ".0f") for side in columns),
        ratio(memory, [value(side, "peak_mib") for side in columns[1:]]),
        ratio(above(OURS), [above(side) for side in columns[1:]]),
    ]


def line(fields):
    return f"| {' | '.join(fields)} |"


def footer(report):
    """What of the memory is not the model's, and whether the machine was quiet."""
    held, isas, shares = {}, {}, [result.get("others_share", 0) for result in report["rows"]]
    for result in report["rows"]:
        for side, values in result["sides"].items():
            if "idle_mib" in values:
                held[side] = max(held.get(side, 0), values["idle_mib"])
                isas[side] = values["isa"]
    text = f"Before a model was made the processes held: {', '.join(f'{side} {mib} MiB' for side, mib in held.items()) or '-'}."
    text += f"\nInstruction sets: {', '.join(f'{side} {isa}' for side, isa in isas.items()) or '-'}."
    formats = {result["row"]: result["better_memory_format"] for result in report["rows"] if "better_memory_format" in result}
    if formats:
        faster = [row for row, name in formats.items() if name == "contiguous"]
        text += f"\nPyTorch, tuned, is faster channels first in: {', '.join(faster) or 'no row'}."
    if report["smoke"]:
        text += "\n**Not to be quoted**: a smoke run shows that everything works."
    elif max(shares) > NOTABLE_SHARE:
        text += f"\n**Not to be quoted**: other programs took up to {max(shares):.0%} of the processor time."
    return text


def write_json(path, report):
    """All of the file or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(report, file, indent=1)
            file.write("\n")
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def torch_versions(python):
    """The versions of torch, timm and torchvision; none where one of them cannot be imported."""
    try:
        found = subprocess.run([python, HERE / "torch_worker.py", "--versions"], capture_output=True, text=True)
        return json.loads(found.stdout) if found.returncode == 0 else None
    except (OSError, ValueError):
        return None


def positive(text):
    """A number for argparse, which turns its errors into wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number of at least 1")
    return int(text)


def arguments():
    parser = argparse.ArgumentParser(prog="tests/peers/run.sh", description="Times whole networks against PyTorch.")
    parser.add_argument("binary", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every time to a file")
    parser.add_argument("--rounds", type=positive, metavar="N", help="steps of each side that are timed [default: 7]")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of each side [default: 2]")
    parser.add_argument("--only", metavar="ROW,...", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--batch", type=positive, metavar="N", help="images in a step [default: 32]")
    parser.add_argument("--size", type=positive, metavar="N", help="sides of an image [default: 224]")
    parser.add_argument("--isa", choices=ISAS, help="instruction set of ours [default: the best of the machine]")
    parser.add_argument("--formats", action="store_true", help="time PyTorch channels first as well, for the JSON")
    parser.add_argument("--smoke", action="store_true", help="1 round, batch 2, size 64, nobody waits for idle threads; ours alone without PyTorch")
    options = parser.parse_args()
    for name, usual, smoke in (("rounds", 7, 1), ("batch", 32, 2), ("size", 224, 64)):
        if getattr(options, name) is None:
            setattr(options, name, smoke if options.smoke else usual)
    if options.batch < 2:
        parser.error("`--batch` must be at least 2: batch norm needs two images")
    options.rows = options.only.split(",") if options.only else list(ROWS)
    for row in options.rows:
        if row not in ROWS:
            parser.error(f"`{row}` is no row, these are: {', '.join(ROWS)}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"`{options.json.parent}` is no directory to write `{options.json.name}` to")
    options.python = os.environ.get("PEER_PYTHON", "python3")
    return options


def main():
    options = arguments()
    versions = torch_versions(options.python)
    if versions is None:
        missing = f"`{options.python}` cannot import torch, torchvision and timm"
        if not options.smoke:
            say(f"error: {missing}: install them (`pip install torch torchvision timm`) and set PEER_PYTHON to that interpreter")
            return 2
        say(f"NOTE: {missing}: this smoke run times ours alone and compares nothing")
    sides = (OURS, INSTALLED, TUNED) if versions else (OURS,)
    if versions and options.formats:
        sides += (CONTIGUOUS,)
    report = {
        "command": shlex.join(["tests/peers/run.sh", *sys.argv[2:]]),
        "commit": commit(),
        "machine": machine(options),
        "versions": versions or {},
        "smoke": options.smoke,
        "options": {name: getattr(options, name) for name in ("rounds", "threads", "batch", "size", "isa")},
        "tuned_allocator": TUNED_ALLOCATOR,
        "rows": [],
    }
    print(header(report))
    print(line(HEADINGS))
    print(line(["---"] + ["---:"] * (len(HEADINGS) - 1)), flush=True)
    for row in options.rows:
        result = run_row(row, sides, options)
        report["rows"].append(result)
        print(line([ROWS[row], *cells(result)]), flush=True)
        if "failed" in result:
            say(f"error: {row}: {result['failed']}")
        if result.get("waiting_share", 0) > NOTABLE_SHARE:
            say(f"warning: {row}: the waiting workers took {result['waiting_share']:.0%} of the processor time")
    print(f"\n{footer(report)}")
    if options.json:
        write_json(options.json, report)
    return 1 if any("failed" in result for result in report["rows"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
