"""Damaged files and full disks: what is damaged is made anew or one clear error, what was finished stays."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.campaign.figures import Figures
from tests.campaign.jobs import JOBS, Job, Tools, complaints, is_same
from tests.campaign.kills import finish, restart, start, undisturbed
from utils.errors import CodeLlavaError


def run(work: Path, tools: Tools, name: str, count: int, seed: int) -> Figures:
    """Damage what a job has written, one file a time; then read it, and run the job again.

    Args:
        work: An empty folder.
        tools: What jobs use.
        name: Of the job.
        count: Damages.
        seed: Of files and damages.
    """
    job, figures, chance = JOBS[name], Figures(f"damage: {name}"), random.Random(f"damage {name} {seed}")
    folder, good = work / name, work / "good"
    reference, _, _ = undisturbed(job, folder, tools)
    shutil.copytree(folder, good)
    wanted = job.read(folder) if job.read is not None else None
    for number in range(count):
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        what = damage(job, folder, chance)
        where = f"{name}, seed {seed}, damage {number} ({what})"
        refused = False
        if job.read is not None:
            try:
                if not is_same(job.read(folder), wanted):
                    figures.failures.append(f"{where}: read, and something else")
            except (CodeLlavaError, OSError):
                refused = True
            except Exception as error:
                figures.failures.append(f"{where}: its reader met {type(error).__name__}: {error}")
        outcome = start(job, folder, tools)
        wrong = [complaint] if (complaint := outcome.complaint()) else []
        if outcome.code != 0:
            figures.add("an error of the command")
        elif not (found := list(complaints(job, folder, reference, at_end=True))):
            figures.add("made whole again")
        else:
            # What the command need not look at, its reader does.
            figures.add("an error of the reader")
            wrong += [] if refused else found
        figures.failures += [f"{where}: {x}" for x in wrong]
    return figures


def damage(job: Job, folder: Path, chance: random.Random) -> str:
    """Do something to one file that the job has written; returns what."""
    files = sorted({path for pattern in job.outputs for path in folder.glob(pattern) if path.is_file()})
    path = chance.choice([path for path in files if not path.name.endswith((".lock", ".pid"))])
    data = bytearray(path.read_bytes())
    kind = chance.choice(["cut", "bits", "bits", "zeros", "empty", "longer", "gone", "another", "random", "folder"])
    if kind in ("cut", "bits", "zeros") and not data:
        kind = "longer"
    if kind == "bits" and any(path in folder.glob(pattern) for pattern in job.unchecked):
        kind = "cut"
    if kind == "cut":
        data = data[: chance.randrange(len(data))]
    elif kind == "bits":
        for _ in range(chance.choice([1, 1, 8])):
            # Headers are short: half of the time, near the beginning.
            data[chance.randrange(min(len(data), chance.choice([200, len(data)])))] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        begin = chance.randrange(len(data))
        data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    elif kind == "empty":
        data = bytearray()
    elif kind == "longer":
        data += chance.randbytes(chance.randint(1, 100))
    elif kind == "another":
        data = bytearray(chance.choice(files).read_bytes())
    elif kind == "random":
        data = bytearray(chance.randbytes(len(data)))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(data)
    return f"{path.relative_to(folder)}: {kind}"


def run_on_full_disks(work: Path, tools: Tools, name: str, count: int, seed: int) -> Figures:
    """Run a job where files may not grow beyond some size, then once with room.

    Args:
        work: An empty folder.
        tools: What jobs use.
        name: Of the job.
        count: Disks.
        seed: Of the sizes.
    """
    job, figures, chance = JOBS[name], Figures(f"full disk: {name}"), random.Random(f"disk {name} {seed}")
    folder = work / name
    reference, files, _ = undisturbed(job, folder, tools)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        restart(job, folder, tools)
        room = int(largest ** chance.uniform(0, 1))
        where = f"{name}, seed {seed}, disk {number} of {room} bytes a file"
        outcome = start(job, folder, tools, file_limit=room)
        figures.add("went through" if outcome.code == 0 else "one clear error")
        wrong = [complaint] if (complaint := outcome.complaint()) else []
        # A full disk may take the latent cache away: a warning, and the work goes on.
        wrong += complaints(job, folder, reference, at_end=outcome.code == 0 and "cache" not in outcome.output)
        figures.failures += [f"{where}: {x}" for x in [*wrong, *finish(job, folder, tools, reference, files)]]
    return figures
