"""Time Hub format -> torch_dist and back at full size, against a plain copy of the same files on the same disk.

Each is timed from process start, with cold page cache, until the files are durable; conversion and export also check
the digests of their input and record those of their output.

    PYTHONPATH=workflow_scripts python benchmarks/conversion.py 4B results/random/4B results/random/conversion
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from record import record

from milepost.checkpoints.manifest import write_manifest
from milepost.common.files import write_json

JOB = {"config": {"conversion": {}}, "code": "benchmark", "upstream": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="a checkpoint in the Hub's format, see random_checkpoint.py")
    parser.add_argument("scratch", type=Path, help="on the same disk; takes three times the checkpoint's size")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.scratch, ignore_errors=True)
    arguments.scratch.mkdir(parents=True)
    files = [str(path.relative_to(arguments.folder)) for path in arguments.folder.rglob("*") if path.is_file()]
    download = arguments.scratch / "download.json"
    write_manifest(download, "download", arguments.folder.absolute(), files, {}, {"repo": "random/weights"})
    size = sum((arguments.folder / name).stat().st_size for name in files)

    torch_dist, hub = arguments.scratch / "torch_dist", arguments.scratch / "hub"
    job = arguments.scratch / "job.json"
    write_json(job, JOB)
    common = ["--job", str(job), "--hub", str(download)]
    to_torch_dist = [*common, "--folder", str(torch_dist), "--manifest", f"{torch_dist}.json"]
    to_hub = [*common, "--weights", f"{torch_dist}.json", "--folder", str(hub), "--manifest", f"{hub}.json"]
    copied, _ = timed(["cp", "-r", str(arguments.folder), str(arguments.scratch / "copy")], arguments.folder)
    shutil.rmtree(arguments.scratch / "copy")
    note = {"bytes": size, "copy_seconds": round(copied, 1)}
    for name, options, source in (("convert", to_torch_dist, arguments.folder), ("export", to_hub, torch_dist)):
        seconds, peak = timed([sys.executable, f"workflow_scripts/{name}.py", *options], source)
        note |= {f"{name}_seconds": round(seconds, 1)}
        record(f"{name}_share_of_copy", arguments.model, copied / seconds, "share", file="conversion", **note)
        record("host_memory_gib", arguments.model, peak, "GiB", file="conversion", stage=name, bytes=size)
    for file in hub.iterdir():
        original = (arguments.folder / file.name).resolve()
        assert subprocess.run(["cmp", file, original], check=False).returncode == 0, file
    shutil.rmtree(arguments.scratch)


def timed(command: list[str], source: Path) -> tuple[float, float]:
    """Seconds until a command's output is durable, and the peak memory in GiB of its largest process."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})  # as in the rules
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"error: {' '.join(command[:3])} failed")
    return seconds, usage.ru_maxrss * 1024 / 2**30


if __name__ == "__main__":
    main()
