"""``python -m demo``: start a site, run real jobs, show the rows that the engine wrote, stop it again.

``up`` leaves it running, with the commands to play with; ``down`` stops it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import pymysql

from demo.lab import ENGINE, JOBS, TUNING, Lab
from tests.support.salt import BIN

ROOT: Final = Path(__file__).resolve().parent.parent
TABLES: Final = {
    "jids": ("jid", "load"),
    "salt_returns": ("jid", "fun", "id", "success", "alter_time", "return"),
}


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("up", "down"), help="nothing: start, show and stop")
    parser.add_argument("--folder", type=Path, default=ROOT / ".local" / "demo", help="default: %(default)s")
    arguments = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)  # as Ctrl-C: the lab is stopped first
    command, folder = arguments.command, arguments.folder.resolve()
    try:
        return down(folder) if command == "down" else up(folder, stay=command == "up")
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, OSError, subprocess.SubprocessError, pymysql.Error) as error:
        print(f"\nThe demo failed: {error}\n\nThe logs are in {folder}.", file=sys.stderr)
        return 1


def up(folder: Path, *, stay: bool) -> int:
    """Start, run jobs and show the rows; stop at the end, unless the lab is to stay."""
    if Lab(folder).running:
        print("The demo is already up; `make demo-down` stops it.")
        return 0 if stay else 1
    lab = Lab.fresh(folder)
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(stop, lab)
        steps = plan(lab)
        for number, (what, work) in enumerate(steps, start=1):
            with timed(f"[{number:2}/{len(steps)}] {what}"):
                work()
        show(lab)
        if stay:
            cleaning.pop_all()
    if stay:
        further(lab)
    else:
        print(f"The logs are in {folder}. `make demo-up` does the same and leaves it running, to look further.")
    return 0


def down(folder: Path) -> int:
    """Stop a lab that another process started."""
    lab = Lab(folder)
    if lab.running:
        stop(lab)
    else:
        print("The demo is not up.")
    return 0


def stop(lab: Lab) -> None:
    """Stop the lab; signals can wait until that is done."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # whoever read our output may be gone: `make demo | head`
        print("\nStopping everything.", flush=True)
    lab.stop()


def plan(lab: Lab) -> list[tuple[str, Callable[[], object]]]:
    """What is done, in order, and how each step is called."""
    tuning = ", ".join(f"{name}: {value}" for name, value in TUNING.items())
    return [
        ("Starting MariaDB", lab.start_database),
        (f"Starting salt-master with the engine {ENGINE}", lab.start_master),
        ("Starting two minions, alpha and beta", lab.start_minions),
        (f"Tuning by pillar: {tuning}", lab.tune),
        *(
            (shlex.join([job.program, *job.args]), functools.partial(lab.run, job.program, *job.args, fails=job.fails))
            for job in JOBS
        ),
        (f"salt-run {ENGINE}.flush", functools.partial(lab.run, "salt-run", f"{ENGINE}.flush")),
    ]


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say at once what is being done, and afterwards how long it took."""
    print(f"{what:<66}", end="", flush=True)
    began = time.monotonic()
    outcome = "  not done"
    try:
        yield
        outcome = f"{time.monotonic() - began:5.1f} s"
    finally:
        print(outcome, flush=True)


def show(lab: Lab) -> None:
    """The rows of the tables, then what the engine says of itself."""
    for table in TABLES:
        print(f"\n{select(table)}\n")
        print_table(TABLES[table], lab.query(select(table)))
    print(f"\nsalt-run {ENGINE}.status\n")
    colour = ["--force-color"] if sys.stdout.isatty() else []
    print(lab.run("salt-run", *colour, f"{ENGINE}.status"), end="")


def select(table: str) -> str:
    """The query that gives a table's rows in the order of the jobs."""
    return f"SELECT {', '.join(f'`{column}`' for column in TABLES[table])} FROM {table} ORDER BY jid"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, cut to the terminal's width; the last column has what the others leave."""
    terminal = shutil.get_terminal_size((120, 24)).columns
    limit = max(20, terminal // 5)  # a jid has 20 digits
    lines = []
    for row in (columns, *rows):
        *cells, last = (f"{value:%F %T}" if isinstance(value, datetime) else str(value) for value in row)
        lines.append([*(cut(cell, limit) for cell in cells), last])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        text = "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True))
        print(cut(text.rstrip(), terminal))


def cut(text: str, width: int) -> str:
    """The text, or its beginning and dots."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def further(lab: Lab) -> None:
    """The commands to play with while the lab is up."""
    master, beta = lab.master.config_dir, lab.minions[-1].config_dir
    commands = {
        "Run jobs": f"{BIN}/salt -c {master} '*' test.ping",
        "Run one on the minion itself": f"{BIN}/salt-call -c {beta} test.version",
        "Ask the engine": f"{BIN}/salt-run -c {master} {ENGINE}.status",
        "Read the jobs as Salt does": f"{BIN}/salt-run -c {master} jobs.list_jobs ext_source={ENGINE}",
        "Look into the tables": f"mariadb --no-defaults --user=root --socket={lab.mariadb.socket} salt",
        f"Tune it: edit {lab.pillar}/tuning.sls, then": f"{BIN}/salt-run -c {master} {ENGINE}.reload",
        "See the master's log": f"tail -f {lab.master.log_file}",
        "Stop it": "make demo-down",
    }
    for what, command in commands.items():
        print(f"\n# {what}\n{command}")


if __name__ == "__main__":
    sys.exit(main())
