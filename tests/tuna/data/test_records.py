"""Laws of records: what is written is read back; what is bad is named by file and place; scores go up, ranks down."""

from __future__ import annotations

import json
import string
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tuna.data.formats import FORMATS
from tuna.data.problems import BadRecords
from tuna.data.records import Message, Record, read_records, write_records

GOOD = {"prompt": "2 + 2?", "responses": ["4", "5"], "scores": [1, 0]}


def lines(path: Path, *rows: Any, end: str = "\n") -> Path:
    path.write_text("".join(json.dumps(row) + end for row in rows), encoding="utf-8", newline="")
    return path


# Any Unicode text but lone surrogates, which no file in UTF-8 can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = texts.filter(lambda text: text.strip())
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def records(draw: st.DrawFn) -> Record:
    responses = draw(st.lists(texts, min_size=1, max_size=5))
    count = len(responses)
    judged = draw(st.sampled_from(["scores", "ranks"] if count > 1 else ["scores", "ranks", "none"]))
    fields: dict[str, Any] = {"id": draw(st.text(string.printable, min_size=1, max_size=12)), "responses": responses}
    if judged == "scores":
        fields["scores"] = draw(st.lists(finite, min_size=count, max_size=count))
    elif judged == "ranks":
        first = draw(st.integers(0, 1))
        rest = draw(st.lists(st.integers(first, first + count - 1), min_size=count - 1, max_size=count - 1))
        fields["ranks"] = draw(st.permutations([first, *rest]))
    if draw(st.booleans()):
        return Record(prompt=draw(filled), **fields)
    turns = draw(st.lists(st.builds(Message, role=filled, content=texts), max_size=2))
    return Record(messages=[*turns, Message(role="user", content=draw(texts))], **fields)


record_lists = st.lists(records(), max_size=6, unique_by=lambda record: record.id)


# ---- one record


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "exactly one of 'prompt' and 'messages'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "both 'prompt' and 'messages' are given"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": None, "messages": []}, "'messages' is empty"),
        ({"prompt": None, "messages": [{"role": "assistant", "content": "x"}]}, "is the assistant's"),
        ({"responses": []}, "responses"),
        ({"responses": "4"}, "responses"),
        ({"scores": None}, r"2 responses need 'scores' \(higher is better\) or 'ranks'"),
        ({"ranks": [0, 1]}, "both 'scores' and 'ranks'"),
        ({"scores": [1]}, "'scores' has 1 values for 2 responses"),
        ({"scores": [1, float("nan")]}, r"scores\[1\] = nan is not a finite number"),
        ({"scores": [1, float("inf")]}, r"scores\[1\] = inf"),
        ({"scores": ["1", "2"]}, "scores"),
        ({"scores": [True, False]}, "scores"),
        ({"scores": None, "ranks": [0]}, "'ranks' has 1 values for 2 responses"),
        ({"scores": None, "ranks": [0, 0.5]}, "ranks"),
        ({"scores": None, "ranks": [2, 3]}, "must count from 0 or 1"),
        ({"scores": None, "ranks": [9, 0]}, "belong in 'scores'"),
        ({"id": ""}, "id"),
        ({"prompt": "\ud83d"}, "half of a surrogate pair"),
        ({"responses": ["a", "\ude00"]}, "half of a surrogate pair"),
    ],
)
def test_a_broken_rule_is_an_error_in_plain_words(change: dict[str, Any], reason: str) -> None:
    Record(id="a", **GOOD)  # the rule is what breaks, nothing else
    with pytest.raises(ValidationError, match=reason):
        Record.model_validate({"id": "a", **GOOD, **change})


@given(records())
def test_rank_0_has_the_highest_score_or_the_lowest_rank(record: Record) -> None:
    ranks = record.dense_ranks()
    assert sorted(set(ranks)) == list(range(max(ranks) + 1))
    value = record.scores or [-rank for rank in record.ranks or [0] * len(record.responses)]
    for i, one in enumerate(value):
        for j, other in enumerate(value):
            assert (one > other) == (ranks[i] < ranks[j])
    assert value[record.best()] == max(value)
    assert value[record.worst()] == min(value)


def test_whole_floats_are_ranks() -> None:
    assert Record(id="a", prompt="p", responses=["x", "y"], ranks=[2.0, 1.0]).ranks == [2, 1]


def test_best_and_worst_differ_where_any_two_ranks_do() -> None:
    tied = Record(id="a", prompt="p", responses=["x", "y", "z"], scores=[1, 1, 0])
    assert (tied.best(), tied.worst()) == (0, 2)
    level = Record(id="a", prompt="p", responses=["x", "y"], scores=[1, 1])
    assert (level.best(), level.worst(), level.dense_ranks()) == (0, 1, [0, 0])


# ---- write, then read


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_what_is_written_is_read_back(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / f"data{suffix}"

    @settings(max_examples=40, deadline=None)
    @given(record_lists)
    def check(given_records: list[Record]) -> None:
        write_records(path, given_records)
        assert read_records(path).records == given_records

    check()


@settings(max_examples=10, deadline=None)
@given(record_lists)
def test_dicts_records_and_datasets_read_the_same(given_records: list[Record]) -> None:
    import datasets

    rows = [record.model_dump(exclude_none=True) for record in given_records]
    assert read_records(rows).records == given_records
    assert read_records(iter(given_records)).records == given_records
    if rows:  # a dataset has every column in every row, with None where a field is absent
        columns = [record.model_dump() for record in given_records]
        assert read_records(datasets.Dataset.from_list(columns)).records == given_records


def test_a_saved_dataset_folder_is_read(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": str(i), **GOOD} for i in range(3)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    wanted = read_records(rows).records
    assert read_records(tmp_path / "plain").records == wanted
    assert read_records(str(tmp_path / "one")).records == wanted
    assert read_records(tmp_path / "two" / "test").records == wanted
    with pytest.raises(ValueError, match=r"several splits; give one of them: .*two/train, .*two/test"):
        read_records(tmp_path / "two")
    with pytest.raises(ValueError, match="one of its splits: train, test"):
        read_records(datasets.DatasetDict(train=data, test=data))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_records(path, [Record(id="old", **GOOD)])
    before = path.read_bytes()

    def breaks() -> Any:
        yield Record(id="new", **GOOD)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_records(path, breaks())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_unknown_suffixes_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "new" / "data.json", [])
    assert read_records(tmp_path / "new" / "data.json").records == []
    with pytest.raises(ValueError, match=r"data\.csv: .*\.jsonl"):
        write_records(tmp_path / "data.csv", [])
    with pytest.raises(ValueError, match=r"data\.csv: .*\.parquet"):
        lines(tmp_path / "data.csv", GOOD)
        read_records(tmp_path / "data.csv")


# ---- the ways files come


def test_windows_files_read_the_same(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"id": "a", **GOOD}, {"id": "b", **GOOD}, end="\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.id for record in read_records(path).records] == ["a", "b"]
    document = tmp_path / "data.json"
    document.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(read_records(document).records) == 1


def test_line_separators_inside_texts_do_not_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\r\nfour"
    write_records(tmp_path / "data.jsonl", [Record(id="a", prompt=text, responses=[text])])
    assert read_records(tmp_path / "data.jsonl").records[0].responses == [text]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
def test_json_documents(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(wrap([GOOD, GOOD]), indent=2))
    assert [record.id for record in read_records(path).records] == ["data-0", "data-1"]


def test_lines_in_a_json_file_and_an_array_in_a_jsonl_file(tmp_path: Path) -> None:
    assert len(read_records(lines(tmp_path / "lines.json", GOOD, GOOD)).records) == 2
    assert len(read_records(lines(tmp_path / "one.json", GOOD)).records) == 1
    (tmp_path / "array.jsonl").write_text(json.dumps([GOOD, GOOD], indent=1))
    assert len(read_records(tmp_path / "array.jsonl").records) == 2


def test_empty_files_hold_no_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text("")
        assert read_records(tmp_path / name).records == []


# ---- what is bad


def test_problems_name_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'{"prompt": "p", "responses": ["x"]}\n'
        b'{"prompt": "p", "responses": ["x"]\n'
        b'{"prompt": "\xff", "responses": ["x"]}\n'
        b"\n"
        b'{"prompt": "p", "responses": ["x", 7], "scores": [1, NaN]}\n'
        b"17\n" + b"[" * 100_000 + b"\n"
    )
    found = read_records(path, on_bad="skip")
    assert [record.id for record in found.records] == ["data-1"]
    assert [(p.file, p.line, p.unit) for p in found.problems] == [(str(path), n, "line") for n in (2, 3, 5, 6, 7)]
    reasons = [problem.reason for problem in found.problems]
    assert "not valid JSON" in reasons[0] and "not UTF-8" in reasons[1]
    assert reasons[2] == "responses[1] must be text, not 7"
    assert reasons[3] == "a record must be an object with named fields, not a number"
    assert str(found.problems[2]) == f"{path} line 5: responses[1] must be text, not 7"
    with pytest.raises(BadRecords, match="5 records cannot be used") as caught:
        read_records(path)
    assert caught.value.problems == found.problems


def test_a_failure_lists_the_first_few_and_counts_the_rest() -> None:
    with pytest.raises(BadRecords) as caught:
        read_records([{"prompt": "p", "responses": []} for _ in range(9)])
    message = str(caught.value).splitlines()
    assert message[0].startswith("9 records cannot be used")
    assert message[1:6] == [f"  index {i}: responses must not be empty" for i in range(5)]
    assert message[6:] == ["  … and 4 more"]


def test_arrays_and_parquet_are_named_by_index(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD, {**GOOD, "scores": [1.0]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.json", "data.parquet"):
        (problem,) = read_records(tmp_path / name, on_bad="skip").problems
        assert str(problem) == f"{tmp_path / name} index 1: 'scores' has 1 values for 2 responses"


def test_broken_files_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[\n{"prompt": "p"},\n{"prompt"}]')
    with pytest.raises(ValueError, match=r"data\.json line 3: not valid JSON"):
        read_records(tmp_path / "data.json", on_bad="skip")
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ValueError, match=r"number\.json: neither a list"):
        read_records(tmp_path / "number.json")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"data\.parquet: not a Parquet file"):
        read_records(tmp_path / "data.parquet")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8 text \(byte 3\)"):
        read_records(tmp_path / "latin.json")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent\.jsonl"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="not a folder saved by datasets"):
        read_records(tmp_path)


def test_sources_of_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="source is a int"):
        read_records(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass one of its splits: train"):
        read_records({"train": []})


def test_ids_are_given_or_made_and_unique(tmp_path: Path) -> None:
    path = lines(tmp_path / "mine.jsonl", GOOD, {"id": 7, **GOOD}, {"id": "7", **GOOD}, {"id": None, **GOOD})
    found = read_records(path, on_bad="skip")
    assert [record.id for record in found.records] == ["mine-1", "7", "mine-4"]
    assert [str(problem) for problem in found.problems] == [f"{path} line 3: duplicate id '7', first at line 2"]


def test_unknown_names_and_shapes_list_the_known_ones(tmp_path: Path) -> None:
    for bad in ({"format": "alpaca"}, {"on_bad": "ignore"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} = '{next(iter(bad.values()))}'"):
            read_records([GOOD], **bad)
    path = lines(tmp_path / "data.jsonl", {"question_id": 1, "turns": ["x"]})
    with pytest.raises(ValueError, match=r"data\.jsonl: no record has a known format .*question_id, turns") as caught:
        read_records(path)
    assert all(f"  {name}: " in str(caught.value) for name in FORMATS)


def test_one_odd_record_does_not_hide_the_shape_of_the_rest() -> None:
    found = read_records([{"note": "header"}, GOOD, GOOD], on_bad="skip")
    assert len(found.records) == 2
    assert [problem.line for problem in found.problems] == [0]


# ---- the examples shipped


def test_the_shipped_examples_are_sound() -> None:
    found = read_records(str(resources.files("tuna.data").joinpath("examples/ranked_demo.jsonl")))
    assert len(found.records) == 60
    assert len({record.prompt for record in found.records}) == 60
    longest_first = 0
    for record in found.records:
        assert record.prompt is not None and 8 <= len(record.prompt.split()) <= 60
        assert len(set(record.responses)) == 4
        assert all(5 <= len(response.split()) <= 80 for response in record.responses)
        assert max(record.dense_ranks()) >= 2
        longest_first += max(record.responses, key=len) == record.responses[record.best()]
    # Were the best response mostly the longest (or never), its length would give it away.
    assert 10 <= longest_first <= 30
