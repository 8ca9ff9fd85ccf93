"""The latent cache: exact rows, keys, limits, damage, many processes, the command."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.compress import latent_cache, latent_files
from utils.compress.latent_cache import LatentCache, parse_size, window_key
from utils.errors import ConfigError
from utils.flags import open_cache

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


def entry_files(folder: Path) -> list[Path]:
    """All files of a cache, the least recently written first."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)


def modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (folder, *folder.rglob("*"))}


def use(cache: LatentCache, number: int) -> None:
    """Put, or find again the same rows, as a compressor does."""
    (rows,) = get(cache, number)
    if rows is None:
        put(cache, number)
    else:
        assert torch.equal(rows, rows_of(number))


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


@settings(max_examples=30)
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


ENTRY = 5 * PAGE  # 128 × 64 × bfloat16 and a header


def test_the_least_recently_used_leave_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_files, "TOUCH_INTERVAL_S", 0.0)
    with LatentCache.open(tmp_path, size_limit_bytes=10 * ENTRY) as cache:
        for number in range(10):
            put(cache, number, num_latents=128)
        assert cache.stats().num_entries == 10
        get(cache, 0, 1)
        put(cache, 10, num_latents=128)
        kept = [number for number in range(11) if get(cache, number)[0] is not None]
        assert kept == [0, 1, 4, 5, 6, 7, 8, 9, 10]
        assert cache.stats().size_bytes <= 10 * ENTRY


def test_a_hit_writes_a_time_stamp_once_a_minute_at_most(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    (file,) = entry_files(tmp_path)
    written = file.stat().st_mtime_ns
    get(cache, 1)
    assert file.stat().st_mtime_ns == written
    for age_s in (100, -100):  # a clock that was put back
        os.utime(file, ns=(0, written - age_s * 10**9))
        get(cache, 1)
        assert abs(file.stat().st_mtime_ns - written) < 30 * 10**9
    os.utime(file, ns=(0, 0))
    cache.verify()
    assert file.stat().st_mtime_ns == 0


def test_the_size_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_files, "SAMPLED_ENTRIES", 20)
    limit = 20 * ENTRY
    caches = [LatentCache.open(tmp_path, size_limit_bytes=limit) for _ in range(2)]
    for start in range(0, 80, 4):
        put(caches[start // 4 % 2], *range(start, start + 4), num_latents=128)
        assert caches[0].stats().size_bytes <= 1.25 * limit  # the other one's writes are met a little later
    assert 0.5 * limit < caches[0].stats().size_bytes
    assert all(rows is not None for rows in get(caches[0], *range(76, 80)))


def test_more_than_the_limit_at_once_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LatentCache.open(tmp_path, size_limit_bytes=3 * ENTRY + PAGE) as cache:
        put(cache, *range(5), num_latents=128)
        assert cache.stats().num_entries == 3
        assert "2 of 5 windows were not cached" in caplog.text
    with (
        LatentCache.open(tmp_path / "strict", size_limit_bytes=PAGE, strict=True) as cache,
        pytest.raises(ConfigError, match="--cache-dir"),
    ):
        put(cache, 1, num_latents=128)


def test_prune_and_clear_give_room_back(cache: LatentCache, tmp_path: Path) -> None:
    for number in range(20):
        put(cache, number, num_latents=128)
    assert cache.prune(5 * ENTRY) == 15
    assert cache.stats().num_entries == len(entry_files(tmp_path)) == 5
    assert torch.equal(get(cache, 19)[0], rows_of(19, 128))
    cache.clear()
    assert entry_files(tmp_path) == []
    assert cache.stats().num_entries == cache.stats().size_bytes == 0
    assert get(cache, 19) == [None]
    put(cache, 1)
    assert get(cache, 1)[0] is not None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def replace_shard(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("a file")


def link_shard(path: Path) -> None:
    other = path.parents[3] / "linked"
    path.parent.rename(other)
    path.parent.symlink_to(other)
    flip(path)


DAMAGE = {
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "header only": lambda path: os.truncate(path, 16),
    "cut": lambda path: os.truncate(path, 40),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "folder": make_folder,
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "dangling link": lambda path: (path.unlink(), path.symlink_to(path.with_name("nothing"))),
    "link to another": lambda path: (path.unlink(), path.symlink_to(path.parents[3] / "other")),
    "file for a folder": replace_shard,
    "link for a folder": link_shard,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_a_miss_reported_once_and_mended(
    cache: LatentCache, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache, 1)
    (tmp_path / "other").write_bytes(b"not to be changed")
    DAMAGE[damage](entry_files(tmp_path / "cache")[0])
    assert get(cache, 1, 1) == [None, None]
    assert len(caplog.records) == 1
    assert cache.stats().corrupt >= 1
    put(cache, 1)
    assert torch.equal(get(cache, 1)[0], rows_of(1))
    assert len(caplog.records) == 1
    assert (tmp_path / "other").read_bytes() == b"not to be changed"
    assert not any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))


def test_a_value_of_another_key_is_damage(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    put(cache, 2)
    one, two = entry_files(tmp_path)
    shutil.copyfile(one, two)
    assert get(cache, 2) == [None]


def test_verify_finds_and_removes_what_is_corrupt(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1, 2, 3)
    flip(entry_files(tmp_path)[1])
    assert cache.verify() == (3, 1)
    assert cache.verify() == (2, 0)
    assert sum(rows is None for rows in get(cache, 1, 2, 3)) == 1


def test_garbage_anywhere_is_no_wrong_row_and_no_crash(tmp_path: Path) -> None:
    random = Random(0)
    for _ in range(20):
        with LatentCache.open(tmp_path) as cache:
            put(cache, *range(5))
            for file in random.sample(entry_files(tmp_path), 3):
                data = bytearray(file.read_bytes())
                place = random.choice([random.randrange(20), random.randrange(len(data))])
                data[place : place + random.choice([0, 1, 8])] = random.randbytes(random.choice([0, 1, 4, 100]))
                file.write_bytes(data)
            for number, rows in enumerate(get(cache, *range(5))):
                assert rows is None or torch.equal(rows, rows_of(number))


def test_a_full_disk_is_a_warning_and_no_caching(
    cache: LatentCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache, 1)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PAGE, old_limit[1]))
    try:
        put(cache, 2, num_latents=4096)
        put(cache, 3, num_latents=4096)
        assert get(cache, 2, 3) == [None, None]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    assert len(entry_files(tmp_path)) == 1  # half files are gone
    put(cache, 2, num_latents=4096)
    assert torch.equal(get(cache, 2)[0], rows_of(2, 4096))
    assert torch.equal(get(cache, 1)[0], rows_of(1))


def test_too_many_open_files_damage_nothing(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    old_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, old_limit[1]))
    try:
        found = get(cache, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old_limit)
    assert found == [None]
    assert torch.equal(get(cache, 1)[0], rows_of(1))


def ring(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("kind", ["file", "below a file", "ring", "long", "nul", "nobody's home", "layout", "open"])
def test_a_folder_that_cannot_be_used_costs_speed_only(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout" / "v3").symlink_to(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "not_ours").mkdir()
    (tmp_path / "open").chmod(0o777)
    folder = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "ring": ring(tmp_path / "ring"),
        "long": tmp_path / ("x" * 300),
        "nul": tmp_path / "a\0b",
        "nobody's home": "~no-such-user-here/cache",
        "layout": tmp_path / "layout",
        "open": tmp_path / "open",
    }[kind]
    with pytest.raises(ConfigError, match="--no-cache"):
        LatentCache.open(folder)
    assert LatentCache.open_if_usable(folder) is None
    assert len(caplog.records) == 1
    assert latent_cache.main(["show", "--cache-dir", str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_command_goes_on_without_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    flags = argparse.Namespace(no_cache=False, cache_dir=str(tmp_path / "file"))
    assert open_cache(flags) is None
    assert len(caplog.records) == 1


def test_the_limit_is_a_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size limit"):
        LatentCache.open(tmp_path / "cache", size_limit_bytes=0)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
@pytest.mark.parametrize("exists", [False, True])
def test_only_the_user_may_read_it_whatever_the_umask(tmp_path: Path, mask: int, exists: bool) -> None:
    folder = tmp_path / "cache"
    if exists:
        (folder / "v3").mkdir(parents=True)
        for path in (folder, folder / "v3"):
            path.chmod(0o755)
    old = os.umask(mask)
    try:
        with LatentCache.open(folder) as cache:
            put(cache, *range(10))
            assert all(rows is not None for rows in get(cache, *range(10)))
    finally:
        os.umask(old)
    assert modes(folder) == {(True, 0o700), (False, 0o600)}


def test_a_folder_with_other_things_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    tmp_path.chmod(0o755)
    with LatentCache.open(tmp_path) as cache:
        put(cache, 1)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "mine.txt").stat().st_mode) & 0o044
    assert modes(tmp_path / "v3") == {(True, 0o700), (False, 0o600)}


def test_leftovers_of_killed_writers_and_earlier_versions_go(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    (entry,) = entry_files(tmp_path)
    layout = entry.parents[1]
    left, young = layout / ".put-left", layout / ".put-young"
    for path in (left, young):
        path.write_bytes(b"x" * 9999)
    os.utime(left, (0, time.time() - 4000))
    (tmp_path / "cache" / "v2").mkdir()
    for name in ("v2/latents.sqlite", "lock"):
        (tmp_path / "cache" / name).touch()
    with LatentCache.open(tmp_path / "cache"):
        pass
    assert entry_files(tmp_path) == [entry, young]
    os.utime(young, (0, 0))
    cache.prune()
    assert entry_files(tmp_path) == [entry]


def test_the_folder_may_vanish(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    shutil.rmtree(tmp_path / "cache")
    assert get(cache, 1) == [None]
    assert cache.stats().num_entries == 0
    put(cache, 1)
    assert get(cache, 1)[0] is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_only_be_read_is_read(cache: LatentCache, tmp_path: Path) -> None:
    put(cache, 1)
    for path in (tmp_path / "cache").rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    with LatentCache.open(tmp_path / "cache") as reader:
        put(reader, 2)
        assert torch.equal(get(reader, 1)[0], rows_of(1))
    for path in (tmp_path / "cache").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


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
    with LatentCache.open(path, size_limit_bytes=100 * PAGE) as cache:
        for round_number in range(100):
            use(cache, (seed * 7 + round_number) % 140)
            if seed == 0 and round_number % 20 == 10:
                cache.clear() if round_number > 20 else cache.prune(10 * PAGE)
        if cache.stats().corrupt:
            os._exit(9)


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
        assert cache.stats().size_bytes <= 130 * PAGE


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
    assert (code, shown["num_entries"], shown["size_bytes"]) == (0, 3, 3 * ENTRY)
    flip(entry_files(tmp_path)[1])
    code, verified = run("verify")
    assert (code, verified["checked"], verified["corrupt"], verified["num_entries"]) == (3, 3, 1, 2)
    assert run("prune", "--max-size", "20K")[1]["evicted"] == 1
    assert run("clear")[1]["removed"] == 1
    assert cache.stats().num_entries == 0


def test_wrong_sizes_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        latent_cache.main(["prune", "--max-size", "much"])
    assert "'much'" in capsys.readouterr().err
    assert latent_cache.main(["show", "--cache-dir", str(tmp_path), "--max-size", "1G"]) == 1
