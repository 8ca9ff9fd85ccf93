"""`Compressor`: batches, the cache, room, and how little memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_python
from utils.checkpoint.settings import ON_CPU, EncoderSettings
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.errors import PromptError

MEMORY = "<|memory_start|>{}<|memory_end|>"
TEXTS = [
    "Explain " + MEMORY.format("def f(): return 1" * 5),
    "no memory",
    MEMORY.format("x") + MEMORY.format("x") + "twice",
    MEMORY.format("a longer memory of several windows. " * 4),
]


@pytest.mark.parametrize("layout", ["code-llava", "lclm"])
def test_order_and_batches_change_nothing(layout: str, checkpoints: dict[str, Path]) -> None:
    compressor = Compressor.load(checkpoints[layout], settings=ON_CPU)
    prompts = [compressor.parse_raw(text) for text in TEXTS]
    alone = [compressor.compress([prompt])[0] for prompt in prompts]
    small = Compressor.load(checkpoints[layout], settings=EncoderSettings(device="cpu", batch_tokens=8))
    for together in (compressor.compress(prompts), compressor.compress(prompts[::-1])[::-1], small.compress(prompts)):
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.values_TD, other.values_TD, atol=1e-5, rtol=0)
            assert (one.spans, one.stats) == (other.spans, other.stats)


@pytest.mark.parametrize("layout", ["code-llava", "lclm"])
def test_the_cache_gives_the_same_latents(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path) as cache:
        compressor = Compressor.load(checkpoints[layout], settings=ON_CPU, cache=cache)
        prompts = [compressor.parse_raw(text) for text in TEXTS]
        fresh = compressor.compress(prompts)
        again, once_more = compressor.compress(prompts), compressor.compress(prompts)
        for prompt, one, other, third in zip(prompts, fresh, again, once_more, strict=True):
            # Equal windows of one call may differ in rounding; the cache keeps one of them.
            torch.testing.assert_close(one.values_TD, other.values_TD, atol=1e-5, rtol=0)
            assert torch.equal(other.values_TD, third.values_TD)
            assert other.stats.cached_tokens == prompt.memory_tokens
        # Another chunk size is another latent.
        wider = compressor.compress([compressor.parse_raw(TEXTS[3], 8)])[0]
        assert wider.stats.cached_tokens == 0
        # A span that begins alike shares its first windows only.
        longer = compressor.compress([compressor.parse_raw(TEXTS[3].replace("<|memory_end|>", "more<|memory_end|>"))])[
            0
        ]
        window = compressor.files.config.window
        memory_tokens = prompts[3].memory_tokens
        assert longer.stats.cached_tokens == memory_tokens // window * window


def test_another_checkpoint_finds_nothing_in_the_cache(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path) as cache:
        cached = []
        for layout, dtype in (("lclm", "auto"), ("code-llava", "auto"), ("lclm", "bfloat16"), ("lclm", "auto")):
            compressor = Compressor.load(
                checkpoints[layout], settings=EncoderSettings(device="cpu", dtype=dtype), cache=cache
            )
            cached.append(compressor.compress([compressor.parse_raw(TEXTS[0])])[0].stats.cached_tokens)
    assert cached == [0, 0, 0, 85]


def test_chunk_sizes_in_one_prompt(checkpoints: dict[str, Path]) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    both = compressor.compress([compressor.parse_raw(TEXTS[2], [1, 32])])[0]
    assert both.spans == ((1, 2), (4, 5))
    with pytest.raises(PromptError, match="3 chunk sizes for 2 memory spans"):
        compressor.parse_raw(TEXTS[2], [1, 2, 4])


def test_a_prompt_without_room(checkpoints: dict[str, Path]) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    long = compressor.parse_raw("x" * 513)
    with pytest.raises(PromptError, match=r"prompt 1.* 513 .* 512 "):
        compressor.compress([compressor.parse_raw("x"), long])


def test_provenance_says_what_made_the_latents(checkpoints: dict[str, Path]) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    facts = compressor.compress([compressor.parse_raw("x")])[0].provenance
    assert facts["fingerprint"] == compressor.files.fingerprint
    assert facts["config"]["encoder_window_size"] == 32
    assert facts["encoder_dtype"] == "float32"


# The peak of this program itself: getrusage would count what the parent held when it started us.
STATUS = Path("/proc/self/status")
PEAK = "peak = [x for x in open('/proc/self/status') if x.startswith('VmHWM')][0].split()[1]; print(int(peak) * 1024)"
BARE = "import torch, transformers\nfrom transformers import AutoModel, AutoTokenizer, AutoModelForCausalLM\n"
COMPRESS = (
    "import sys, io, contextlib\n"
    "from general import step1_raw_text\n"
    "with contextlib.redirect_stdout(io.StringIO()):\n"
    "    assert step1_raw_text.main(sys.argv[1:]) == 0\n"
)


def peak_bytes(code: str, *argv: str) -> int:
    done = run_python("-c", f"{code}\n{PEAK}", *argv)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak from /proc")
def test_resident_memory(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Encoder, table, and at most 300 MB more than the libraries themselves."""
    from utils.checkpoint.load import load_embedding_table, load_memory_encoder
    from utils.checkpoint.locate import find_checkpoint

    files = find_checkpoint()
    encoder = load_memory_encoder(files, ON_CPU)
    table = load_embedding_table(files)
    known = sum(p.numel() * p.element_size() for p in encoder.parameters()) + table.numel() * table.element_size()
    (tmp_path / "code.py").write_text("value = 1\n" * 2000)
    argv = ["--memory", str(tmp_path / "code.py"), "--output", str(tmp_path / "rows.npy"), "--no-cache"]
    bare = peak_bytes(BARE)
    assert bare > 100e6
    extra = peak_bytes(COMPRESS, *argv) - bare
    record_property("extra_mb", round((extra - known) / 1e6))
    print(f"peak over bare imports {extra / 1e6:.0f} MB, encoder and table {known / 1e6:.0f} MB")
    assert extra <= known + 300e6
