"""Python in processes of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from utils.files import PROJECT_ROOT


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this interpreter to its end, in the project's folder unless `cwd` names another."""
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": PROJECT_ROOT, "timeout": 600, **options}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def traced(*arguments: object, **options: Any) -> tuple[str, set[str]]:
    """Run this interpreter; what it prints, and the packages that it imports."""
    done = run_python("-X", "importtime", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout, {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


def start_python(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start this interpreter in the project's folder, with pipes and a process group of its own.

    It has one thread, as the tests' own process has: with another number, results may round otherwise.
    """
    command, environment = [sys.executable, *map(str, arguments)], {"OMP_NUM_THREADS": "1", **environment}
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        command, cwd=PROJECT_ROOT, env={**os.environ, **environment}, text=True, start_new_session=True, **pipes
    )


def wait_until(holds: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Wait for what a process is to do; an `OSError` says "not yet". Fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, f"nothing came of {process.args} in {seconds} s"
        with contextlib.suppress(OSError):
            if holds():
                return
        time.sleep(0.02)
    raise AssertionError(f"{process.args} ended before: {process.communicate()[1]}")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
