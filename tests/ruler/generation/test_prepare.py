"""`prepare`: datasets in folders, resumed where they were cut off, refused where another one lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ruler.__main__ import main
from ruler.generation.generate import generate_rows
from ruler.generation.prepare import DatasetJob, prepare_datasets
from ruler.layout import read_dataset
from ruler.RULER.scripts.data.prepare import main as reference_main
from tests.support.ruler_recipes import recipe, reference_folder
from utils.errors import DatasetError


def job(folder: Path, task: str = "niah_single_1", length: int = 700, **values: object) -> DatasetJob:
    return DatasetJob(recipe=recipe(task, length, **values), folder=folder / task)


def test_dataset_says_where_it_comes_from(tmp_path: Path) -> None:
    (prepared,), errors = prepare_datasets([job(tmp_path, "niah_single_2", 1200)])
    manifest, rows = read_dataset(tmp_path / "niah_single_2")
    assert not errors
    assert prepared.num_rows == len(rows) == manifest["num_rows"] == 5
    assert manifest["data"]["words"]["wonderwords"] == "3.0.1"
    assert len(manifest["data"]["PaulGrahamEssays.json"]["sha256"]) == 64
    assert manifest["tokenizer"]["name"] == "tokenizer.json"
    assert str(reference_folder()) not in json.dumps(manifest)
    assert sorted(path.name for path in (tmp_path / "niah_single_2").iterdir()) == ["manifest.json", "validation.jsonl"]


def test_a_complete_dataset_is_left_alone(tmp_path: Path) -> None:
    prepare_datasets([job(tmp_path)])
    before = (tmp_path / "niah_single_1/validation.jsonl").stat().st_mtime_ns
    (again,), _ = prepare_datasets([job(tmp_path)])
    assert not again.made
    assert (tmp_path / "niah_single_1/validation.jsonl").stat().st_mtime_ns == before


def test_another_dataset_in_the_way_is_refused(tmp_path: Path) -> None:
    prepare_datasets([job(tmp_path)])
    with pytest.raises(DatasetError, match="holds another dataset: seed is 42, wanted 43"):
        prepare_datasets([job(tmp_path, seed=43)])
    (made,), _ = prepare_datasets([job(tmp_path, seed=43)], overwrite=True)
    assert made.made
    (tmp_path / "niah_single_1/manifest.json").unlink()
    with pytest.raises(DatasetError, match="not written by this program"):
        prepare_datasets([job(tmp_path)])


def test_rows_changed_by_hand_are_noticed(tmp_path: Path) -> None:
    prepare_datasets([job(tmp_path)])
    path = tmp_path / "niah_single_1/validation.jsonl"
    path.write_text(path.read_text().replace("grass", "glass"))
    with pytest.raises(DatasetError, match="not the file its manifest describes"):
        prepare_datasets([job(tmp_path)])


@pytest.mark.slow
def test_finished_units_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A balanced run that fails in its third unit resumes with the two it has."""
    wanted = job(tmp_path, num_samples=40, mode="balanced")
    expected, _ = prepare_datasets([job(tmp_path / "undisturbed", num_samples=40, mode="balanced")])
    made = []

    def generate(recipe_, start=0, stop=None):
        made.append(start)
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate_rows(recipe_, start, stop)

    monkeypatch.setattr("ruler.generation.prepare.generate_rows", generate)
    with pytest.raises(KeyboardInterrupt):
        prepare_datasets([wanted], num_workers=1)
    prepare_datasets([wanted], num_workers=1)
    assert made == [0, 16, 32, 32]
    rows = (tmp_path / "niah_single_1/validation.jsonl").read_bytes()
    assert rows == Path(expected[0].path).read_bytes()


def test_one_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    prepared, errors = prepare_datasets([job(tmp_path, "qa_2", 300), job(tmp_path)], num_workers=1)
    assert [item.task for item in prepared] == ["niah_single_1"]
    assert "does not fit into 300 tokens" in str(errors["qa_2 @ 300"])
    (again,), errors = prepare_datasets([job(tmp_path, "qa_2", errors["qa_2 @ 300"].needed)], num_workers=1)
    assert (again.task, errors) == ("qa_2", {})


@pytest.mark.slow
def test_command_with_worker_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wonderwords")
    tokenizer = str(reference_folder() / "tokenizer.json")
    flags = ["prepare", "--output-dir", str(tmp_path), "--tasks", "niah_single_1,vt", "--lengths", "1k,2048"]
    flags += ["--tokenizer-path", tokenizer, "--num-samples", "3", "--workers", "2"]
    assert main([*flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(item["max_seq_length"], item["task"]) for item in result["datasets"]] == [
        (1024, "niah_single_1"), (1024, "vt"), (2048, "niah_single_1"), (2048, "vt"),
    ]  # fmt: skip
    assert len(read_dataset(tmp_path / "2048" / "vt")[1]) == 3
    assert main(flags) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "nih"], "unknown task 'nih'"),
        (["--lengths", "4x"], "'4x' is not a length"),
        (["--template", "nope"], "unknown template 'nope'"),
        (["--template", "tokenizer"], "has no chat template"),
        (["--data-dir", "nowhere"], "data folder nowhere does not exist"),
        (["--tokenizer-path", "no/such/one"], "no tokenizer at no/such/one"),
        (["--num-samples", "0"], "num_samples must be 1 or more"),
        (["--lengths", "60"], "does not fit into 60 tokens"),
        (["--lengths", "60", "--tasks", "vt,cwe"], "2 of 2 datasets were not made (a length of "),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    common = ["prepare", "--output-dir", str(tmp_path), "--tokenizer-path", str(reference_folder() / "tokenizer.json")]
    assert main([*common, "--tasks", "vt", "--num-samples", "1", "--workers", "1", *flags]) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error


def test_a_missing_data_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"squad\.json does not exist: fetch it \(python -m ruler\.fetch_data"):
        prepare_datasets([job(tmp_path, "qa_1", data_dir=str(tmp_path))])


def test_reference_flags_and_chunks(tmp_path: Path) -> None:
    """Chunks of a question set are its questions in order; every chunk has a seed of its own."""
    common = [
        "--benchmark",
        "synthetic",
        "--task",
        "qa_1",
        "--tokenizer_path",
        str(reference_folder() / "tokenizer.json"),
    ]
    common += ["--tokenizer_type", "hf", "--max_seq_length", "1500", "--model_template_type", "base"]
    common += ["--num_samples", "5", "--random_seed", "42", "--data_dir", str(reference_folder())]
    assert reference_main([*common, "--save_dir", str(tmp_path / "all")]) == 0
    everything = read_dataset(tmp_path / "all/qa_1")[1]
    chunks = []
    for chunk in range(2):
        flags = ["--save_dir", str(tmp_path / str(chunk)), "--chunk_idx", str(chunk), "--chunk_amount", "2"]
        assert reference_main([*common, *flags]) == 0
        manifest, rows = read_dataset(tmp_path / str(chunk) / "qa_1")
        assert manifest["seed"] == 42 + chunk
        chunks.append(rows)
    assert [len(rows) for rows in chunks] == [3, 2]
    questions = [row["input"].rpartition("Question: ")[2] for row in everything]
    assert [row["input"].rpartition("Question: ")[2] for rows in chunks for row in rows] == questions
