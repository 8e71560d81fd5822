"""``make demo``, the first thing that anybody runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The demo's work folder. Nothing that it holds is left running, whatever the test does."""
    wanted = tmp_path / "demo"
    yield wanted
    demo(wanted, "down")


def command(folder: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "demo", "--folder", str(folder), *args]


def demo(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *args), check=False, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def left_running(folder: Path) -> list[str]:
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def shown(output: str) -> set[tuple[str, str, str]]:
    """The function, id and success of each row of ``salt_returns`` in what the demo printed."""
    return set(re.findall(r"^\d{20}  (\S+) +(\S+) +([01])  ", output, re.MULTILINE))


def test_the_demo_shows_a_row_of_every_kind_of_job_and_leaves_nothing_running(folder: Path) -> None:
    done = demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown(done.stdout) >= {
        ("test.ping", "alpha", "1"),
        ("test.ping", "beta", "1"),
        ("state.apply", "alpha", "0"),
        ("test.ping,test.echo", "alpha", "1"),
        ("test.ping,test.echo", "beta", "1"),
        ("runner.test.arg", "demo_master", "1"),
        ("test.outputter", "beta", "1"),
    }
    for option, value in (("batch_size", "200"), ("flush_interval", "0.5")):
        assert re.search(rf"\b{option}:\s+-+\s+source:\s+pillar\s+value:\s+{value}\n", done.stdout)
    assert left_running(folder) == []


def test_the_demo_stays_up_until_another_process_takes_it_down(folder: Path) -> None:
    first = demo(folder, "up")
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"-c {folder}/salt/etc mysql_jobcache.status" in first.stdout
    running = left_running(folder)
    again = demo(folder, "up")
    assert (again.returncode, "already up" in again.stdout) == (0, True)
    assert demo(folder).returncode == 1  # it would stop what somebody wants to stay
    assert left_running(folder) == running != []
    assert demo(folder, "down").returncode == 0
    assert left_running(folder) == []
    assert "not up" in demo(folder, "down").stdout


def test_an_interrupted_demo_leaves_nothing_running(folder: Path) -> None:
    with subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "salt-master" in line:  # it runs, and so does the database; the minions are starting
                process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
    assert left_running(folder) == []
