from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from m2f2cli.errors import M2F2Error, UsageError
from m2f2cli.files import atomic_write
from m2f2cli.inference.recordfile import Job, RecordFile, Tally
from m2f2cli.inference.sources import Source
from m2f2cli.records import Detection
from tests.detections import EXAMPLE


def paths_in(file: Path) -> list[str]:
    return [json.loads(line)["path"] for line in file.read_bytes().splitlines()]


def fill(file: Path, record: Detection, names: list[str]) -> None:
    with RecordFile(file) as log:
        for name in names:
            if name not in log.done:
                log.append(replace(record, path=name))


def test_a_second_run_adds_only_what_is_missing(tmp_path: Path, record: Detection) -> None:
    file = tmp_path / "deep" / "out.jsonl"
    fill(file, record, ["a", "b"])
    fill(file, record, ["a", "b", "c"])
    assert paths_in(file) == ["a", "b", "c"]


def test_records_from_before_kinds_were_named_are_read_and_resumed(
    tmp_path: Path, record: Detection
) -> None:
    file = tmp_path / "out.jsonl"
    old = record.to_dict()
    for part in (old, *old["faces"]):
        del part["forgery"]
    file.write_text(json.dumps(old | {"path": "a"}) + "\n")
    assert Detection.from_dict(old) == record
    fill(file, record, ["a", "b"])
    assert paths_in(file) == ["a", "b"]
    assert "forgery" not in json.loads(file.read_text().splitlines()[0])


def test_the_counts_tell_the_kinds_of_forgery_of_both_runs(
    tmp_path: Path, record: Detection
) -> None:
    named = replace(record, forgery="generated")
    sources = [Source(name, "image", PurePosixPath(name)) for name in ("a", "b", "c")]
    file = tmp_path / "out.jsonl"
    for some, kind in ((sources[:1], "generated"), (sources, "swapped or edited")):
        job = Job(
            some,
            run=lambda left, kind=kind: (
                replace(named, path=source.path, forgery=kind) for source in left
            ),
            settings=lambda: record.settings,
            output=file,
        )
        assert list(job.run())
    assert job.tally.forgeries == {"generated": 1, "swapped or edited": 2}
    assert job.tally.sentence() == (
        "3 judged: 3 fake (1 generated, 2 swapped or edited), 0 real, 0 uncertain "
        "(1 of them recorded earlier)."
    )


@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_resuming_after_a_cut_anywhere_gives_each_item_once(
    tmp_path_factory: pytest.TempPathFactory, record: Detection, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("cut") / "out.jsonl"
    names = ["a", "b", "ü", "d"]
    fill(file, record, names)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    fill(file, record, names)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "content", ["hello\n", "[1]\n", '{"a": 1}\n', "no newline", '{"path": 3}\n']
)
def test_a_foreign_file_is_left_alone(tmp_path: Path, record: Detection, content: str) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match="not a record file"):
        RecordFile(file)
    assert file.read_text() == content


@pytest.mark.parametrize(
    "change", [{"threshold": 0.9}, {"model_fingerprint": "sha256:other"}, {"faces_mode": "none"}]
)
def test_other_settings_are_refused_and_nothing_is_touched(
    tmp_path: Path, record: Detection, change: dict[str, object]
) -> None:
    file = tmp_path / "out.jsonl"
    fill(file, record, ["a"])
    with file.open("ab") as cut:
        cut.write(b'{"schema_version": 1, "pa')
    before = file.read_bytes()
    other = replace(record, path="b", settings=replace(record.settings, **change))
    with pytest.raises(UsageError, match=next(iter(change))), RecordFile(file) as log:
        log.append(other)
    assert file.read_bytes() == before


def test_another_name_for_the_same_model_resumes(tmp_path: Path, record: Detection) -> None:
    file = tmp_path / "out.jsonl"
    fill(file, record, ["a"])
    fill(file, replace(record, settings=replace(record.settings, model="./lite")), ["b"])
    assert paths_in(file) == ["a", "b"]


def test_overwrite_waits_for_the_first_record(tmp_path: Path, record: Detection) -> None:
    file = tmp_path / "out.jsonl"
    fill(file, record, ["a"])
    RecordFile(file, overwrite=True).close()
    assert paths_in(file) == ["a"]
    with RecordFile(file, overwrite=True) as log:
        log.append(replace(record, path="b"))
    assert paths_in(file) == ["b"]


def test_a_file_nothing_was_written_to_does_not_appear(tmp_path: Path) -> None:
    RecordFile(tmp_path / "out.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_mix(tmp_path: Path, record: Detection) -> None:
    with RecordFile(tmp_path / "out.jsonl"), pytest.raises(M2F2Error, match="Another process"):
        RecordFile(tmp_path / "out.jsonl")


def test_a_write_that_fails_half_way_is_taken_back(tmp_path: Path, record: Detection) -> None:
    """The file-size limit cuts the second line short, as a full disk does."""
    file = tmp_path / "out.jsonl"
    line = len(json.dumps(record.to_dict())) + 1
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with RecordFile(file) as log:
            log.append(record)
            resource.setrlimit(resource.RLIMIT_FSIZE, (line + line // 2, old[1]))
            with pytest.raises(M2F2Error, match="Cannot write"):
                log.append(replace(record, path="b"))
            assert file.read_bytes().endswith(b"}\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            log.append(replace(record, path="c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert paths_in(file) == [record.path, "c"]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(M2F2Error, match="Cannot write"):
        RecordFile(tmp_path / "file" / "out.jsonl")
    os.mkdir(tmp_path / "out.jsonl")
    with pytest.raises(M2F2Error, match="Cannot write"):
        RecordFile(tmp_path / "out.jsonl")


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")
def test_a_file_removed_during_the_run_is_an_error(tmp_path: Path, record: Detection) -> None:
    file = tmp_path / "out.jsonl"
    log = RecordFile(file)
    log.append(record)
    file.unlink()
    with pytest.raises(M2F2Error, match="was removed, moved or replaced during the run"):
        log.append(replace(record, path="b"))
    with pytest.raises(M2F2Error, match="was removed, moved or replaced during the run"):
        log.close()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be moved there")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_moved_during_the_run_is_an_error(
    tmp_path: Path, record: Detection, replaced: bool
) -> None:
    file = tmp_path / "out.jsonl"
    log = RecordFile(file)
    log.append(record)
    file.rename(tmp_path / "synced.jsonl")
    if replaced:
        file.write_text("")
    with pytest.raises(M2F2Error, match="was removed, moved or replaced"):
        log.append(replace(record, path="b"))
    with pytest.raises(M2F2Error, match="was removed, moved or replaced"):
        log.close()
    assert paths_in(tmp_path / "synced.jsonl") == [record.path]


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "out.jsonl"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file = Path("/dev/full")
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="is not a regular file"):
        RecordFile(file)
    with pytest.raises(UsageError, match="is not a regular file"):
        atomic_write(file, b"")


@pytest.mark.parametrize(
    "change",
    [{"status": ["ok"]}, {"status": "fine"}, {"verdict": {"fake": 1}}, {"verdict": 1},
     {"path": None}, {"schema_version": [1]}],
)  # fmt: skip
def test_a_record_of_other_types_is_refused(
    tmp_path: Path, record: Detection, change: dict[str, object]
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text(json.dumps(record.to_dict() | change) + "\n")
    with pytest.raises(UsageError):
        RecordFile(file)


def test_a_deep_line_is_no_record(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"[" * 200_000 + b"\n")
    with pytest.raises(UsageError, match="not a record file"):
        RecordFile(file)


@hypothesis_settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_resumed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, record: Detection, data: st.DataObject
) -> None:
    """Of a line's values any may be anything, and any byte may be another."""
    row = record.to_dict()
    values = st.sampled_from(
        [None, True, -1, 1e308, "", "\ud800", "a\0b", [], [[1]], {}, {"a": {}}, 10**400, [None]]
    )
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), max_size=3)):
        row[key] = data.draw(values)
    line = bytearray(json.dumps(row).encode() + b"\n")
    for place in data.draw(st.lists(st.integers(0, len(line) - 1), max_size=3)):
        line[place] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "out.jsonl"
    file.write_bytes(line)
    with suppress(M2F2Error), RecordFile(file) as log:
        log.append(replace(record, path="new"))
        tally = Tally()
        for _, verdict, _ in log.done.values():
            tally.count(verdict)
        assert tally.sentence()


def test_a_blank_line_at_the_end_is_no_fault(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path) as log:
        log.append(replace(EXAMPLE, path="a.jpg"))
    path.write_bytes(path.read_bytes() + b"\n")
    with RecordFile(path) as log:
        log.append(replace(EXAMPLE, path="b.jpg"))
    with RecordFile(path) as log:
        assert list(log.done) == ["a.jpg", "b.jpg"]
