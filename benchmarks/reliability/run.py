"""Run the reliability trials: ``python benchmarks/reliability/run.py [--quick] [--only R1,R6] --out FOLDER``.

What has a file of that size already is not run again (``--again`` does). One line per trial as it ends, then the table.
Ends with 1 where a trial broke or a planted defect was not seen; a missed figure is a result and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# before numpy: threads of their own would make every trial of two cores wait for itself
for _name, _value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability import frame

from gradsift.manifest import write_json_atomic


def file_of(folder: Path, name: str) -> Path:
    """Name a trial's file."""
    return folder / f"r{int(name[1:]):02d}.json"


def kept(folder: Path, name: str, full: bool) -> Mapping[str, Any] | None:
    """Read a trial's file; None where there is none, it broke, or it is of quick size and full is wanted."""
    path = file_of(folder, name)
    record = json.loads(path.read_bytes()) if path.is_file() else None
    if record is None or "error" in record or (full and record["size"] != "full"):
        return None
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked and print the table."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--child"]:
        _, name, size, defect, out = given
        frame.child(name, size == "full", defect, Path(out))
        return 0
    parser = argparse.ArgumentParser(description="The reliability trials R1 to R27")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials' files")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, not minutes")
    parser.add_argument("--only", help="R1,R6")
    parser.add_argument("--again", action="store_true", help="run also what is there")
    parser.add_argument("--show", action="store_true", help="run nothing, print the table from the files")
    options = parser.parse_args(given)
    wanted = options.only.split(",") if options.only else frame.names()
    unknown = sorted(set(wanted) - set(frame.names()))
    if unknown:
        parser.error(f"no such trial: {', '.join(unknown)}")
    records = []
    for name in wanted:
        record = kept(options.out, name, not options.quick and not options.show)
        if not options.show and (record is None or options.again):
            size = " --quick" if options.quick else ""
            command = f"python benchmarks/reliability/run.py{size} --only {name} --out {options.out}"
            record = frame.record_of(frame.load(name), not options.quick, command)
            options.out.mkdir(parents=True, exist_ok=True)
            write_json_atomic(file_of(options.out, name), dict(record))
            print(frame.short_line(record), flush=True)
        if record is not None:
            records.append(record)
    print(f"\n{frame.table(records)}")
    met = sum(record["met"] for record in records)
    num_planted = sum(len(record["planted"]) for record in records)
    num_seen = sum(found["seen"] for record in records for found in record["planted"])
    print(f"\n{met} of {len(records)} trials met; {num_seen} of {num_planted} planted defects seen to fail")
    return 0 if all(frame.sound_record(record) for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
