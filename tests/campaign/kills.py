"""SIGKILL at random moments: what was finished stays, the next run goes on, and nothing is left lying about."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.children import Outcome, run_command
from tests.campaign.figures import Figures
from tests.campaign.jobs import JOBS, Finished, Job, Tools, complaints, files_of


def run(work: Path, tools: Tools, name: str, count: int, seed: int) -> Figures:
    """Kill a job so many times, each time somewhere else, and let it end at last.

    Args:
        work: An empty folder.
        tools: What jobs use.
        name: Of the job.
        count: SIGKILLs that must strike.
        seed: Of the moments.
    """
    job, figures, chance = JOBS[name], Figures(f"kill: {name}"), random.Random(f"{name} {seed}")
    folder = work / name
    reference, files, seconds = undisturbed(job, folder, tools)
    restart(job, folder, tools)
    for number in range(20 * count):
        if figures.tried == count:
            break
        at_file = chance.random() < 0.5
        after_s = chance.uniform(0, 0.003 if at_file else seconds)
        strike = at_next_file(folder, after_s) if at_file else (lambda ran_s, wait_s=after_s: ran_s > wait_s)
        outcome = start(job, folder, tools, strike)
        wrong = list(complaints(job, folder, reference, at_end=not outcome.was_killed))
        if not outcome.was_killed:
            wrong += [complaint] if (complaint := outcome.complaint() or _failed(outcome)) else []
            restart(job, folder, tools)
        else:
            figures.add("at a new file" if at_file else "at a random time")
        figures.failures += [f"{name}, seed {seed}, run {number}: {complaint}" for complaint in wrong]
    figures.failures += [
        f"{name}, seed {seed}, at last: {wrong}" for wrong in finish(job, folder, tools, reference, files)
    ]
    return figures


def undisturbed(job: Job, folder: Path, tools: Tools) -> tuple[Finished, set[str], float]:
    """Run a job in peace: what it finishes, the files it leaves, and its seconds."""
    # The first run in a fresh process imports what is not imported yet.
    for _ in range(2):
        restart(job, folder, tools)
        outcome = start(job, folder, tools)
        assert outcome.code == 0, outcome.output
    return job.finished(folder), files_of(folder), outcome.seconds


def restart(job: Job, folder: Path, tools: Tools) -> None:
    """Empty a job's folder and write its inputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.begin(folder, tools)


def start(job: Job, folder: Path, tools: Tools, kill: Callable[[float], bool] | None = None, **limits: int) -> Outcome:
    """Run a job's command once in its folder."""
    environment = job.environment(folder)
    return run_command(job.module, job.arguments(folder, tools), environment=environment, kill=kill, **limits)


def finish(job: Job, folder: Path, tools: Tools, reference: Finished, files: set[str]) -> Iterator[str]:
    """Let a disturbed job run to its end; yields what is then not as it should be."""
    outcome = start(job, folder, tools)
    yield from filter(None, [outcome.complaint() or _failed(outcome)])
    yield from complaints(job, folder, reference, at_end=True)
    if left := files_of(folder) - files:
        yield f"left lying about: {', '.join(sorted(left)[:5])}"


def at_next_file(folder: Path, after_s: float) -> Callable[[float], bool]:
    """Strike shortly after a file or folder appears: in the middle of writing."""
    before, seen_at = _names(folder), -1.0

    def strike(ran_s: float) -> bool:
        nonlocal seen_at
        if seen_at < 0 and not _names(folder) <= before:
            seen_at = ran_s
        return 0 <= seen_at <= ran_s - after_s

    return strike


def _names(folder: Path) -> set[str]:
    return {f"{root}/{name}" for root, folders, files in os.walk(folder) for name in (*folders, *files)}


def _failed(outcome: Outcome) -> str | None:
    return None if outcome.code == 0 else f"ended with {outcome.code}: {outcome.output[-1500:]}"
