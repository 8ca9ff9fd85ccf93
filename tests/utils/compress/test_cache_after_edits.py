"""After an edit in one of several files only that file's windows from the edit on are encoded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.compress.prompt_embeds import PromptEmbeds
from utils.model.markers import wrap

WINDOW = 32  # tokens of the tiny checkpoint's windows; a token is a byte
FILES = [f"# file {number}\n" + f"value_{number} = {number}\n" * 12 for number in range(4)]


@pytest.mark.parametrize("edit_at", [0, 40, 100])
def test_only_windows_from_the_edit_on(checkpoints: dict[str, Path], tmp_path: Path, edit_at: int) -> None:
    with LatentCache.open(tmp_path) as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)

        def compress(files: list[str], with_: Compressor = compressor) -> PromptEmbeds:
            text = "\n".join(wrap(file) for file in files)
            return with_.compress([with_.parse_raw(text)])[0]

        assert compress(FILES).stats.cached_tokens == 0
        edited = [*FILES]
        edited[2] = FILES[2][:edit_at] + "X" + FILES[2][edit_at:]
        misses = cache.stats().misses
        after = compress(edited)
        first_changed = edit_at // WINDOW * WINDOW
        encoded = len(edited[2]) - first_changed
        assert after.stats.memory_tokens - after.stats.cached_tokens == encoded
        assert cache.stats().misses - misses == -(-encoded // WINDOW)
        without_cache = compress(edited, Compressor.load(checkpoints["lclm"], settings=ON_CPU))
        torch.testing.assert_close(after.values_TD, without_cache.values_TD, atol=1e-5, rtol=0)
        again = compress(edited)
        assert again.stats.cached_tokens == again.stats.memory_tokens
        assert torch.equal(again.values_TD, after.values_TD)
