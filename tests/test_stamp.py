"""Work that is done once: what makes it run again, where it resumes, and what a kill leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thinkswitch_plugin import files
from thinkswitch_plugin.run.stamp import begun_path, folder_once, once, stored


def test_a_step_is_done_once_gone_on_with_after_a_kill_and_redone_when_its_key_changes(tmp_path: Path) -> None:
    stamp, out = tmp_path / "step.json", tmp_path / "out"
    told: list[bool] = []

    def work(resume: bool) -> dict[str, Any]:
        told.append(resume)
        if len(told) == 1:
            out.write_text("half")
            raise KeyboardInterrupt  # a kill
        out.write_text("whole")
        return {"n": len(told)}

    with pytest.raises(KeyboardInterrupt):
        once(stamp, {"a": 1}, (out,), work)
    assert stored(stamp, {"a": 1}, (out,)) is None and out.read_text() == "half"
    assert once(stamp, {"a": 1}, (out,), work)["n"] == 2
    assert once(stamp, {"a": 1}, (out,), work)["n"] == 2  # not done again
    assert once(stamp, {"a": 2}, (out,), work)["n"] == 3
    out.unlink()
    assert once(stamp, {"a": 2}, (out,), work)["n"] == 4
    stamp.unlink()
    once(stamp, {"a": 2}, (out,), work)
    assert told == [False, True, False, True, True]


def test_what_an_attempt_with_another_key_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("of another key")
    files.temporary_sibling(out).mkdir()
    found = []
    once(tmp_path / "s.json", {"a": 1}, (out,), lambda _: found.append(list(tmp_path.glob("*out*"))) or {})
    assert found == [[]]


def test_work_that_always_begins_anew_finds_nothing_of_a_killed_attempt(tmp_path: Path) -> None:
    stamp, out, beside = tmp_path / "s.json", tmp_path / "out", tmp_path / "scratch"
    found: list[bool] = []

    def work(resumes: bool) -> dict[str, Any]:
        found.append(resumes or out.exists() or beside.exists())
        out.touch()
        beside.touch()
        if len(found) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        once(stamp, {"a": 1}, (out,), work, scratch=(beside,), part=None)
    assert once(stamp, {"a": 1}, (out,), work, scratch=(beside,), part=None)["a"] == 1
    assert found == [False, False] and not begun_path(stamp).exists()


def test_only_the_part_of_the_key_that_half_an_output_depends_on_decides_what_is_continued(tmp_path: Path) -> None:
    stamp, out = tmp_path / "s.json", tmp_path / "out"
    told: list[bool] = []

    def killed(resumes: bool) -> None:
        told.append(resumes)
        out.touch()
        raise KeyboardInterrupt

    for key in ({"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2}):
        with pytest.raises(KeyboardInterrupt):
            once(stamp, key, (out,), killed, part=lambda key: key["a"])
    assert told == [False, True, False]


def test_a_damaged_stamp_or_one_without_a_part_of_the_key_counts_as_none(tmp_path: Path) -> None:
    stamp = tmp_path / "s.json"
    assert stored(stamp, {"a": None}) is None
    for text in (b'{"a": 1', b"[]", b'{"b": 1}', b'{"a": 2}'):
        stamp.write_bytes(text)
        assert stored(stamp, {"a": 1}) is None and stored(stamp, {"a": None}) is None
    files.write_json(stamp, {"a": 1, "seconds": 2.5})
    assert stored(stamp, {"a": 1}) == {"a": 1, "seconds": 2.5}


def test_a_folder_is_there_whole_with_its_stamp_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "made"

    def build(text: str) -> Any:
        def write(building: Path) -> dict[str, Any]:
            (building / "out").write_text(text)
            if text == "half":
                raise KeyboardInterrupt
            return {"text": text}

        return write

    assert folder_once(folder, "s.json", {"a": 1}, build("first"))["text"] == "first"
    assert folder_once(folder, "s.json", {"a": 1}, build("never"))["text"] == "first"
    with pytest.raises(KeyboardInterrupt):
        folder_once(folder, "s.json", {"a": 2}, build("half"))
    assert (folder / "out").read_text() == "first" and stored(folder / "s.json", {"a": 1}) is not None
    assert folder_once(folder, "s.json", {"a": 2}, build("second"))["text"] == "second"
    (folder / "out").unlink()
    assert folder_once(folder, "s.json", {"a": 2}, build("third"), (folder / "out",))["text"] == "third"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["made", "out", "s.json"]
