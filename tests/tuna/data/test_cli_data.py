"""Laws of the command line: what it counts and writes is what the library does; user errors end with 2, untraced."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tuna import __version__
from tuna.cli import main
from tuna.cli.data import record_stats
from tuna.console.preview import best_and_worst
from tuna.data.records import Record, read_records
from tuna.data.tokenization import token_stats, tokenize_records
from tuna.models.loading import load_tokenizer
from tuna_kernels import available_backends
from tuna_kernels.versions import release

DEMO = str(resources.files("tuna.data").joinpath("examples/ranked_demo.jsonl"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two good records, two bad ones."""
    rows: list[Any] = [
        {"prompt": "p [bold]x[/nope]", "responses": ["good", "bad"], "scores": [1, 0]},
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": ["a", "a", ""], "ranks": [1, 1, 1]},
        {"prompt": "p", "responses": []},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validate_reports_every_problem_and_exits_with_1(capsys: pytest.CaptureFixture[str], mixed: Path) -> None:
    code, out, _ = run(capsys, "data", "validate", str(mixed))
    assert code == 1
    assert f"left out: {mixed} line 2: 2 responses need 'scores'" in out
    assert f"left out: {mixed} line 4: responses must not be empty" in out
    assert "(1) good" in out and "(0) bad" in out and "[bold]" in out  # data is no mark-up
    code, out, _ = run(capsys, "data", "validate", str(mixed), "--json")
    found = json.loads(out)
    assert code == 1
    assert [problem["line"] for problem in found["problems"]] == [2, 4]
    assert found["records"] == 2 and found["tied_records"] == found["unranked_records"] == 1
    assert found["responses_per_record"] == {"2": 1, "3": 1}
    assert found["duplicate_responses"] == found["empty_responses"] == 1


def test_validate_of_sound_data_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "validate", DEMO, "--show", "2")
    assert code == 0
    assert "demo-01" in out and "demo-02" in out and "demo-03" not in out
    assert "left out" not in out


def test_best_and_worst_are_shown_of_ranked_records_only() -> None:
    records = [
        Record(id="single", prompt="p", responses=["x"]),
        Record(id="ranked", prompt="p", responses=["x", "y", "z"], ranks=[2, 1, 3]),
    ]
    table = best_and_worst(records, 3)
    assert [[str(cell) for cell in column.cells] for column in table.columns] == [
        ["ranked"],
        ["p"],
        ["(rank 1) y"],
        ["(rank 3) z"],
    ]


def test_statistics_of_no_records_are_zero() -> None:
    assert record_stats([])["records"] == 0


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_convert_writes_what_the_library_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n')
    target = tmp_path / "out" / f"data.{suffix}"
    code, out, _ = run(capsys, "data", "convert", str(source), str(target))
    assert (code, out) == (0, f"{target}: 1 records, 0 left out\n")
    assert read_records(target, format="tuna").records == read_records(source).records


def test_convert_fails_or_skips_as_told(capsys: pytest.CaptureFixture[str], mixed: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    code, out, err = run(capsys, "data", "convert", str(mixed), str(target))
    assert code == 2 and not target.exists() and out == ""
    assert err.startswith("error: 2 records cannot be used") and f"{mixed} line 4" in err
    code, out, err = run(capsys, "data", "convert", str(mixed), str(target), "--on-bad", "skip")
    assert code == 0 and "2 records, 2 left out" in out and f"{mixed} line 4" in err
    assert len(read_records(target).records) == 2


def test_stats_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "tiny", "--template", "chat", "--max-length", "96", "--batch-groups", "4")
    code, out, _ = run(capsys, "data", "stats", DEMO, *flags, "--json")
    assert code == 0
    found = json.loads(out)
    items, problems = tokenize_records(
        read_records(DEMO).records, load_tokenizer("tiny"), template="chat", max_length=96, on_bad="skip"
    )
    wanted = token_stats(items, batch_groups=4)
    for name in ("padded", "unpadded", "prompt_shared", "tree", "cut_responses", "prompt_tokens"):
        assert found["tokens"][name] == getattr(wanted, name)
    assert found["problems"] == [str(problem) for problem in problems]
    assert wanted.cut_responses > 0 and found["records"] == 60

    code, out, _ = run(capsys, "data", "stats", DEMO, *flags)
    assert code == 0
    assert f"{wanted.padded:,}" in out and f"{wanted.tree:,}" in out
    saved = 1 - wanted.tree / wanted.unpadded
    assert f"{saved:.1%}" in out


def test_stats_without_a_model_count_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "stats", DEMO, "--json")
    assert code == 0 and json.loads(out)["tokens"] is None
    assert "Tokens" not in run(capsys, "data", "stats", DEMO)[1]


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found["tuna"] == __version__
    assert release(found["packages"]["torch"]) == release(torch.__version__)  # one may say which CUDA it is for
    assert found["backends"] == available_backends()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    code, out, _ = run(capsys, "info")
    assert code == 0 and all(name in out for name in available_backends())


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "stats", "absent.jsonl"), "error: no such file or folder: absent.jsonl"),
        (("data", "validate", DEMO, "--format", "csv"), "error: --format = 'csv' is unknown"),
        (("data", "convert", DEMO, "out.csv"), "error: out.csv: unknown file type; the suffix must be one of"),
        (("data", "stats", DEMO, "--model", "./absent"), "error: no model folder './absent'"),
        (("data", "stats", DEMO, "--model", "tiny", "--template", "x"), "error: --template = 'x' must be 'none'"),
        (("data", "stats", DEMO, "--on-bad", "x"), "Invalid value for '--on-bad'"),
        (("data", "stats"), "Missing argument"),
        (("dtaa",), "No such command 'dtaa'"),
    ],
)
def test_user_errors_end_with_2_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_the_traceback_is_there_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        main(["data", "stats", "absent.jsonl"])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"tuna {__version__}\n", "")
    code, out, _ = run(capsys, "data", "-h")
    assert code == 0 and all(name in out for name in ("validate", "convert", "stats"))


def test_importing_tuna_and_its_command_line_is_light() -> None:
    check = "import sys, {}; sys.exit(' '.join({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    for module in ("tuna", "tuna.data.records", "tuna.cli"):
        done = subprocess.run([sys.executable, "-c", check.format(module)], capture_output=True, text=True, check=False)
        assert done.stderr.strip() == "", f"import {module} loads {done.stderr.strip()}"


def test_python_m_tuna_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tuna", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"tuna {__version__}\n")
