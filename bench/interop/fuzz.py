"""Many mutated checkpoints, opened in every way: nothing but our own errors, nothing outside the folder, no pickle.

    PYTHONPATH=src:tests python bench/interop/fuzz.py COUNT OUT

Every mutant is read by its reader and inspected; one in eight is also loaded as a model and converted. Memory is capped
at 1.5 GB above what is in use at the start, so an allocation that a file does not justify is an error too. Writes
OUT/fuzz.json and prints each finding with its seed.
"""

import collections
import json
import logging
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from mutants import Mutants, Watch, probe
from transformers.utils import logging as transformers_logging

import lowbit

_ROOM_BYTES = 1_500_000_000


def main(count: int, out: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers_logging.set_verbosity_error()
    findings: dict[str, int] = collections.Counter()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mutants, watch = Mutants(folder), Watch()
        sound = [*mutants.bases, mutants.gguf]
        for base in sound[:-1]:
            lowbit.load(base)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _ROOM_BYTES, now + _ROOM_BYTES))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        place = folder / "work" / "mutant"
        for seed in range(count):
            shutil.rmtree(place.parent, ignore_errors=True)
            place.mkdir(parents=True)
            path = mutants.write(random.Random(seed), place)
            watch.seen, watch.allowed = (
                [],
                (
                    str(place.parent),
                    sys.prefix,
                    sys.base_prefix,
                    f"{tempfile.gettempdir()}/lowbit-",
                    "/usr/lib",
                    "/proc",
                    "/dev",
                ),
            )
            try:
                probe(path, seed % 8 == 0)
            except Exception as error:  # what the fuzzer is for
                frame = traceback.extract_tb(error.__traceback__)[-1]
                key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} {str(error)[:100]}"
                findings[key] += 1
                if findings[key] == 1:
                    print(f"seed {seed}: {key}", flush=True)
                    traceback.print_exc(limit=-6)
            watch.allowed = ()
            outside = [item for item in watch.seen if not item.endswith((".py", ".pyc", ".so"))]
            if outside:
                findings[f"outside: {outside[0]}"] += 1
                print(f"seed {seed}: outside {outside[:3]}", flush=True)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    row = {
        "mutants": count,
        "findings": dict(findings),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_grown_MB": round(grown * 1024 / 1e6, 1),
        "torch": torch.__version__,
    }
    (out / "fuzz.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
