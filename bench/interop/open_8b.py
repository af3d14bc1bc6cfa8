"""Opening a published-size checkpoint: memory and speed of convert and inspect on the shapes of Llama-3-8B in 4 bits.

    PYTHONPATH=src python bench/interop/open_8b.py WORK OUT

Makes WORK/source (make_8b.py), then times `cp`, `lowbit convert` to compressed-tensors with and without the second
decoding, to AWQ, `lowbit inspect`, and `cp` again between them, each in a process of its own that finds nothing of the
source in memory. MB/s counts the source's bytes once, up to the end of a sync; load is what the
machine had to do beside. Writes OUT/open_8b.json.
This process imports nothing big: a child's peak memory counts its parent's at the fork.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def evict(folder: Path) -> None:
    """Have the files of `folder` read from disk the next time; programs stay in memory, cp's and Python's alike."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path, size: int) -> dict[str, Any]:
    """Seconds (with sync), peak memory and MB/s of a process that reads `source` from disk."""
    evict(source)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command} ended with {status}")
    row = {"seconds": round(seconds, 1), "MB_per_s": round(size / seconds / 1e6, 1)}
    return row | {
        "peak_MB": round(usage.ru_maxrss * 1024 / 1e6),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def main(work: Path, out: Path) -> None:
    source, target = work / "source", work / "out"
    if not (source / "config.json").is_file():
        subprocess.run([sys.executable, str(Path(__file__).with_name("make_8b.py")), str(source)], check=True)
    size = sum(path.stat().st_size for path in source.iterdir())
    lowbit = [sys.executable, "-W", "ignore", "-m", "lowbit"]
    convert = [*lowbit, "convert", str(source), "-o", str(target), "--format"]
    copy = ["cp", "-r", str(source), str(target)]
    commands = {
        "cp": copy,
        "convert to compressed-tensors": [*convert, "compressed-tensors"],
        "cp again": copy,
        "inspect": [*lowbit, "inspect", str(source)],
        "convert to compressed-tensors, not verified": [*convert, "compressed-tensors", "--no-verify"],
        "cp at last": copy,
        "convert to awq": [*convert, "awq"],
    }
    rows: dict[str, Any] = {"bytes": size, "cores": os.cpu_count(), "rows": {}}
    for name, command in commands.items():
        rows["rows"][name] = timed(command, source, size) | {"load": os.getloadavg()[0]}
        print(name, rows["rows"][name], flush=True)
        (out / "open_8b.json").write_text(json.dumps(rows, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
