"""The latent cache: exact rows, keys, limits, damage, many processes, the command."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import ConfigError
from utils.inference import latent_cache, latent_store
from utils.inference.latent_cache import LatentCache, parse_size, window_key

IDS = st.lists(st.integers(0, 2**31), max_size=6)
PAGE = 4096


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LatentCache]:
    with LatentCache.open(tmp_path / "cache") as opened:
        yield opened


def key_of(number: int) -> bytes:
    return window_key(b"test", [], [number], [])


def rows_of(number: int, num_latents: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num_latents, 64, generator=torch.Generator().manual_seed(number)).to(dtype)


def put(cache: LatentCache, *numbers: int, num_latents: int = 8) -> None:
    cache.put_many([key_of(n) for n in numbers], [rows_of(n, num_latents) for n in numbers])


def get(cache: LatentCache, *numbers: int) -> list[torch.Tensor | None]:
    return cache.get_many([key_of(n) for n in numbers])


def data_file(cache: LatentCache) -> Path:
    return Path(cache.stats().path) / "v2" / "latents.sqlite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hit_is_bit_identical(cache: LatentCache, dtype: torch.dtype) -> None:
    special = torch.tensor([[0.0, -0.0, 1e-7, 65504.0], [1.0, -1.0, 3.14159, 1e-3]], dtype=dtype)
    cache.put_many([b"k" * 32], [special.T])  # not contiguous
    (found,) = cache.get_many([b"k" * 32])
    assert found is not None
    assert found.dtype == dtype
    assert found.shape == (4, 2)
    assert torch.equal(found.view(torch.uint8), special.T.contiguous().view(torch.uint8))
    found.zero_()  # the caller owns its copy
    assert torch.equal(cache.get_many([b"k" * 32])[0], special.T)


def test_hits_and_misses_keep_their_places(cache: LatentCache) -> None:
    put(cache, 1, 3)
    found = get(cache, 0, 1, 2, 3, 1)
    assert [rows is not None for rows in found] == [False, True, False, True, True]
    assert torch.equal(found[3], rows_of(3))
    assert (cache.stats().hits, cache.stats().misses) == (3, 2)
    assert cache.get_many([]) == []


def test_putting_again_keeps_the_first_rows(cache: LatentCache) -> None:
    put(cache, 1)
    cache.put_many([key_of(1)], [rows_of(2)])
    assert torch.equal(get(cache, 1)[0], rows_of(1))
    assert cache.stats().num_entries == 1


def test_entries_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    with LatentCache.open(tmp_path) as first:
        put(first, 1)
    with LatentCache.open(tmp_path) as second:
        assert torch.equal(get(second, 1)[0], rows_of(1))


def test_one_process_may_open_a_cache_twice(tmp_path: Path) -> None:
    first, second = LatentCache.open(tmp_path), LatentCache.open(tmp_path / ".." / tmp_path.name)
    put(first, 1)
    first.close()
    first.close()
    assert get(second, 1)[0] is not None
    second.close()


@given(parts=st.tuples(IDS, IDS, IDS), others=st.tuples(IDS, IDS, IDS), namespace=st.binary(max_size=3))
def test_keys_differ_when_any_part_differs(parts: tuple, others: tuple, namespace: bytes) -> None:
    key = window_key(namespace, *parts)
    assert len(key) == 32
    assert key == window_key(namespace, *map(tuple, parts))
    assert (key == window_key(namespace, *others)) == (parts == others)
    assert key != window_key(namespace + b"x", *parts)


def test_context_is_part_of_the_key() -> None:
    windows = [([1], [2], []), ([], [1, 2], []), ([], [1], [2]), ([1, 2], [], []), ([], [2, 1], [])]
    assert len({window_key(b"n", *window) for window in windows}) == len(windows)


def test_the_least_recently_used_leave_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "TOUCH_INTERVAL_S", 0.0)
    # The empty tables take 5 pages, an entry of 128 × 64 × bfloat16 a little over 4.
    with LatentCache.open(tmp_path, size_limit_bytes=55 * PAGE) as cache:
        for number in range(10):
            put(cache, number, num_latents=128)
        assert cache.stats().num_entries == 10
        get(cache, 0, 1)
        put(cache, 10, num_latents=128)
        kept = [number for number in range(11) if get(cache, number)[0] is not None]
        assert kept[:2] == [0, 1]
        assert kept[-1] == 10
        assert 2 not in kept
        assert cache.stats().size_bytes <= 55 * PAGE


def test_the_file_stays_near_its_limit(tmp_path: Path) -> None:
    limit = 40 * 5 * PAGE
    with LatentCache.open(tmp_path, size_limit_bytes=limit) as cache:
        for start in range(0, 400, 8):
            put(cache, *range(start, start + 8), num_latents=128)
        stats = cache.stats()
        assert 0.5 * limit < stats.size_bytes <= limit
        assert stats.file_bytes < 2 * limit
        assert all(rows is not None for rows in get(cache, *range(392, 400)))


def test_more_than_the_limit_at_once_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LatentCache.open(tmp_path, size_limit_bytes=24 * PAGE) as cache:
        put(cache, *range(5), num_latents=128)
        assert cache.stats().num_entries == 3
        assert "2 of 5 windows were not cached" in caplog.text


def test_prune_and_clear_give_room_back(cache: LatentCache) -> None:
    for number in range(20):
        put(cache, number, num_latents=128)
    before = data_file(cache).stat().st_size
    assert cache.prune(26 * PAGE) == 15
    assert cache.stats().num_entries == 5
    assert data_file(cache).stat().st_size < before / 2
    assert torch.equal(get(cache, 19)[0], rows_of(19, 128))
    cache.clear()
    assert cache.stats().num_entries == 0
    assert get(cache, 19) == [None]
    put(cache, 1)
    assert get(cache, 1)[0] is not None


def flip(path: Path, content: bytes) -> None:
    """Change one byte in the middle of where `content` lies in a file, which may be in several pieces."""
    data = bytearray(path.read_bytes())
    middle = len(content) // 2
    position = data.index(content[middle : middle + 32])
    with path.open("r+b") as stream:
        stream.seek(position)
        stream.write(bytes([data[position] ^ 1]))


def test_a_flipped_bit_is_a_miss_reported_once_and_repaired(
    cache: LatentCache, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache, 1, 2, 3, num_latents=128)
    for number in (1, 2):
        flip(data_file(cache), rows_of(number, 128).view(torch.uint8).numpy().tobytes())
    cache._store.forget_pages()
    assert get(cache, 1)[0] is None
    assert get(cache, 2, 3)[0] is None
    assert torch.equal(get(cache, 3)[0], rows_of(3, 128))
    assert cache.stats().corrupt == 2
    assert len([record for record in caplog.records if "checksum" in record.message]) == 1
    put(cache, 1, num_latents=128)
    assert torch.equal(get(cache, 1)[0], rows_of(1, 128))


def test_verify_finds_and_removes_what_is_corrupt(cache: LatentCache) -> None:
    put(cache, 1, 2, 3, num_latents=128)
    flip(data_file(cache), rows_of(2, 128).view(torch.uint8).numpy().tobytes())
    assert cache.verify() == (3, 1)
    assert cache.verify() == (2, 0)
    assert get(cache, 2) == [None]


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "zeros inside"])
@pytest.mark.parametrize("while_open", [False, True])
def test_a_damaged_file_is_replaced(
    tmp_path: Path, damage: str, while_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LatentCache.open(tmp_path)
    put(cache, *range(20), num_latents=128)
    path = data_file(cache)
    if not while_open:
        cache.close()
    with path.open("r+b") as stream:
        if damage == "garbage":
            stream.write(b"\xa5" * 3 * PAGE)
        elif damage == "zeros inside":
            size = path.stat().st_size
            stream.seek(2 * PAGE)
            stream.write(bytes(size - 2 * PAGE))
        else:
            stream.truncate(PAGE * 6 if damage == "cut" else 0)
    if not while_open:
        cache = LatentCache.open(tmp_path)
    found = [get(cache, number)[0] for number in range(20)]
    assert all(rows is None or torch.equal(rows, rows_of(number, 128)) for number, rows in enumerate(found))
    if while_open:  # the process may still hold the pages in memory
        assert "damaged" in caplog.text or all(rows is not None for rows in found)
    elif damage != "empty":  # to SQLite an empty file is a new one
        assert "damaged" in caplog.text
    put(cache, *range(20), num_latents=128)
    assert all(torch.equal(rows, rows_of(number, 128)) for number, rows in enumerate(get(cache, *range(20))))
    cache.close()
    assert_sound_or_missing(tmp_path)


def assert_sound_or_missing(folder: Path) -> None:
    """A process that opens the cache anew finds the right rows or none, and can fill it again."""
    with LatentCache.open(folder) as cache:
        for _ in range(2):  # the second time after damage that only writing met
            found = [get(cache, number)[0] for number in range(20)]
            assert all(rows is None or torch.equal(rows, rows_of(number, 128)) for number, rows in enumerate(found))
            put(cache, *range(20), num_latents=128)
        assert all(torch.equal(rows, rows_of(number, 128)) for number, rows in enumerate(get(cache, *range(20))))


@pytest.mark.parametrize("seed", range(40))
def test_garbage_anywhere_is_no_wrong_row_and_no_crash(tmp_path: Path, seed: int) -> None:
    with LatentCache.open(tmp_path) as cache:
        for number in range(20):  # one by one, so that ids and pages are used again
            put(cache, number, num_latents=128)
        cache._store.delete([key_of(number) for number in range(0, 20, 3)])
        put(cache, *range(15), num_latents=128)
        path = data_file(cache)
    random = Random(seed)
    with path.open("r+b") as stream:
        for _ in range(random.choice([1, 3, 30])):
            # Search trees are a few pages among many: half of the garbage goes to the first pages, which are theirs.
            page = random.randrange(random.choice([6, path.stat().st_size // PAGE]))
            stream.seek(page * PAGE + random.choice([0, 0, random.randrange(PAGE)]))
            stream.write(random.randbytes(random.choice([1, 4, 8, 100, PAGE])))
    assert_sound_or_missing(tmp_path)


def test_a_full_disk_is_a_warning_and_no_caching(cache: LatentCache, caplog: pytest.LogCaptureFixture) -> None:
    put(cache, 1)
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (data_file(cache).stat().st_size + PAGE, old_limit[1]))
    try:
        put(cache, 2, num_latents=4096)
        put(cache, 3, num_latents=4096)
        assert get(cache, 2, 3) == [None, None]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    put(cache, 2, num_latents=4096)
    assert torch.equal(get(cache, 2)[0], rows_of(2, 4096))
    assert torch.equal(get(cache, 1)[0], rows_of(1))


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--no-cache"):
        LatentCache.open(tmp_path / "file")
    with pytest.raises(ConfigError, match="size limit"):
        LatentCache.open(tmp_path / "cache", size_limit_bytes=0)


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_LLAVA_CACHE_DIR", str(tmp_path / "elsewhere"))
    with LatentCache.open() as cache:
        assert cache.stats().path == str(tmp_path / "elsewhere")


def test_threads_share_one_cache(cache: LatentCache) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in range(seed, seed + 20):
            put(cache, number)
            (rows,) = get(cache, number)
            if rows is None or not torch.equal(rows, rows_of(number)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.stats().num_entries == 55


def _use_after_fork(cache: LatentCache) -> int:
    (rows,) = get(cache, 1)
    put(cache, 2)
    return int(rows is not None and torch.equal(rows, rows_of(1)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_and_its_parent_both_go_on(cache: LatentCache) -> None:
    put(cache, 1)
    child = os.fork()
    if child == 0:
        os._exit(40 + _use_after_fork(cache))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41
    assert torch.equal(get(cache, 2)[0], rows_of(2))


def _hammer(path: str, seed: int) -> None:
    logging.disable()
    with LatentCache.open(path, size_limit_bytes=60 * PAGE) as cache:
        for round_number in range(300):
            number = (seed * 7 + round_number) % 40
            (rows,) = get(cache, number)
            if rows is None:
                put(cache, number, num_latents=100)
            elif not torch.equal(rows, rows_of(number, 100)):
                os._exit(9)
            if seed == 0 and round_number % 20 == 10:
                cache.clear() if round_number > 20 else cache.prune(10 * PAGE)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(str(tmp_path), seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    time.sleep(0.1)
    workers[-1].kill()  # in the middle of whatever it does
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers[:-1]] == [0, 0, 0]
    with LatentCache.open(tmp_path) as cache:
        assert cache.verify()[1] == 0
        assert cache.stats().size_bytes <= 60 * PAGE


@pytest.mark.parametrize(
    ("text", "size"),
    [("10", 10), ("1K", 1024), ("1.5M", 3 << 19), ("4GiB", 4 << 30), ("2gb", 2 << 30), ("1t", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_command(cache: LatentCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: str, *args: str) -> tuple[int, dict]:
        code = latent_cache.main([command, "--cache-dir", str(tmp_path / "cache"), "--json", *args])
        return code, json.loads(capsys.readouterr().out)

    put(cache, 1, 2, 3, num_latents=128)
    code, shown = run("show")
    assert (code, shown["num_entries"], shown["size_bytes"]) == (0, 3, 17 * PAGE)
    flip(data_file(cache), rows_of(2, 128).view(torch.uint8).numpy().tobytes())
    code, verified = run("verify")
    assert (code, verified["checked"], verified["corrupt"], verified["num_entries"]) == (3, 3, 1, 2)
    assert run("prune", "--max-size", "40K")[1]["evicted"] == 1
    assert run("clear")[1]["removed"] == 1
    assert cache.stats().num_entries == 0


def test_a_lock_held_too_long_is_one_clear_error(
    cache: LatentCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_store, "LOCK_TIMEOUT_S", 0.01)
    monkeypatch.setattr(LatentCache, "open", lambda path: cache)
    with (tmp_path / "cache" / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert latent_cache.main(["show", "--cache-dir", str(tmp_path / "cache")]) == 1
    assert "another process has held" in capsys.readouterr().err


def test_command_from_a_shell(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)  # this process has the cache open
    command = [sys.executable, "-m", "utils.inference.latent_cache"]
    shown = subprocess.run([*command, "show", "--cache-dir", tmp_path / "cache"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "num entries  1\n" in shown.stdout
    wrong = subprocess.run([*command, "prune", "--max-size", "much"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "'much' is not a size" in wrong.stderr
