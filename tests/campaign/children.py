"""Commands in children of a process that has imported everything: a start costs milliseconds, so many can be killed.

outcome = run_command("utils.corpus.__main__", ["src", "--output", "out"], kill=lambda seconds: seconds > 0.1)
outcome.code                  # -9
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

COMMANDS = (
    "general.step1_raw_text",
    "utils.corpus.__main__",
    "utils.training.train",
    "utils.checkpoint.convert.__main__",
    "utils.checkpoint.describe",
    "ruler.__main__",
)
# What these import late.
_LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors.torch", "openai", "nltk", "wonderwords", "sqlite3",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "utils.compress.compressor", "utils.corpus.run", "utils.training.loop", "utils.training.export",
    "utils.checkpoint.convert.conversion", "ruler.answering.predict", "ruler.generation.prepare",
)  # fmt: skip
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Exit code; negative: the signal that ended it.
        output: What it wrote to both streams.
        seconds: How long it ran.
    """

    code: int
    output: str
    seconds: float

    @property
    def was_killed(self) -> bool:
        """Whether the signal came before the end."""
        return self.code == -signal.SIGKILL

    def complaint(self) -> str | None:
        """What is wrong with this as the end of a command that was let run: done, or one error line."""
        if "Traceback" in self.output or self.code not in (0, 1):
            return f"ended with {self.code}: {self.output[-1500:]}"
        if self.code == 1 and sum(line.startswith("error: ") for line in self.output.splitlines()) != 1:
            return f"expected one error line: {self.output[-1500:]}"
        return None


def run_command(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    kill: Callable[[float], bool] | None = None,
    file_limit: int | None = None,
    timeout_s: float = 300,
) -> Outcome:
    """Run a module's `main` in a child.

    Args:
        module: It has `main(argv) -> int`.
        arguments: Its argv.
        environment: Further variables.
        kill: Asked all the time with the seconds since the start; True ends the child's process group with SIGKILL.
        file_limit: Bytes that a file may have; more fails as on a full disk.
        timeout_s: A child that runs longer is killed, which its `Outcome` shows as -9.
    """
    _context.set_forkserver_preload([*_LIBRARIES, *COMMANDS])
    reader, writer = _context.Pipe(duplex=False)
    child = _context.Process(target=_child, args=(module, list(arguments), dict(environment or {}), file_limit, writer))
    child.start()
    writer.close()
    said = bytearray()
    listener = threading.Thread(target=_listen, args=(reader, said), daemon=True)
    listener.start()
    began = time.monotonic()
    assert child.pid is not None
    while child.is_alive():
        seconds = time.monotonic() - began
        if (kill is not None and kill(seconds)) or seconds > timeout_s:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            # It may not have made its own group yet.
            child.kill()
            break
        time.sleep(0.0005 if kill is not None else 0.01)
    child.join()
    seconds = time.monotonic() - began
    listener.join(5)
    assert child.exitcode is not None
    return Outcome(code=child.exitcode, output=said.decode(errors="replace"), seconds=seconds)


def _listen(reader: Connection, said: bytearray) -> None:
    with contextlib.suppress(OSError):
        while block := os.read(reader.fileno(), 1 << 16):
            said.extend(block)


def _child(
    module: str, arguments: list[str], environment: dict[str, str], file_limit: int | None, writer: Connection
) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(writer.fileno(), number)
        # The server's own was made for what stood there before, such as a file.
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
    writer.close()
    os.environ |= environment
    tempfile.tempdir = None  # read TMPDIR again
    if file_limit is not None:
        # Else the signal ends the process. A file that may not grow gives an error, as a full disk does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    torch.set_num_threads(1)
    sys.exit(importlib.import_module(module).main(arguments))
