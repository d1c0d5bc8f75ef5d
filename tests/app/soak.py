"""The long form of test_load.py: `make soak`, or `python tests/app/soak.py --visitors 50 --minutes 10`.

Starts the app on this machine, lets visitors call it until the time is up, and compares every answer with the
same request drawn alone. Ends with 1 where an answer was lost or mixed up, or the server grew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from app_tools import running
from load_tools import Record, compare, storm, visiting

#: Growth of the server's memory from the second quarter of the time to the last one that passes as flat.
_MOST_GROWTH = 64 * 2**20


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--burst", type=int, default=4, help="calls that a visitor makes at once")
    parser.add_argument("--kinds", type=int, default=24, help="how many different calls there are")
    options = parser.parse_args()
    record = Record()
    with tempfile.TemporaryDirectory(prefix="mole-soak-") as folder, running(Path(folder)) as server:
        with visiting(server.url) as client:
            client.predict(prompt="a zorin boot", steps=1, api_name="/compose")
        with record.watching(server.process.pid, 1.0):
            storm(
                server.url,
                record,
                visitors=options.visitors,
                burst=options.burst,
                kinds=options.kinds,
                seconds=60 * options.minutes,
            )
        wrong = compare(server.url, record.answers)
        said = server.said
    kinds = len({asked for asked, *_ in record.answers})
    print(
        f"{options.visitors} visitors, {options.minutes:g} minutes: {len(record.answers)} answers to"
        f" {kinds} different calls, {len(record.refused)} calls without one, {len(wrong)} wrong"
    )
    problems = [*record.refused[:10], *wrong[:10], *_grown(record.sizes)]
    problems += [] if record.answers else ["no call was answered: this says nothing"]
    problems += ["the server logged an error"] if "Traceback" in said else []
    for problem in problems:
        print(f"- {problem}")
    print("NOT as it should be" if problems else "Nothing lost, nothing mixed; threads and memory flat")
    return bool(problems)


def _grown(sizes: Sequence[tuple[float, int, int]]) -> list[str]:
    """Whether threads or memory went up while the load stayed the same."""
    quarter = max(len(sizes) // 4, 1)
    early, late = sizes[quarter : 2 * quarter] or sizes, sizes[-quarter:]
    threads = [median(size[1] for size in part) for part in (early, late)]
    memory = [median(size[2] for size in part) for part in (early, late)]
    megabytes = [size / 2**20 for size in memory]
    print(f"threads {threads[0]:g} to {threads[1]:g}; memory {megabytes[0]:.0f} to {megabytes[1]:.0f} MB")
    problems = []
    if threads[1] > threads[0] + 4:
        problems.append(f"threads went up from {threads[0]:g} to {threads[1]:g}")
    if memory[1] > memory[0] + _MOST_GROWTH:
        problems.append(f"memory went up by {(memory[1] - memory[0]) / 2**20:.0f} MB")
    return problems


if __name__ == "__main__":
    sys.exit(main())
