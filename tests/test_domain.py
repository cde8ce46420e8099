from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from thinkswitch_plugin import conventions, files
from thinkswitch_plugin.args import PromptKeys, SamplingKeys
from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.errors import ThinkSwitchError

Write = Callable[[str, Sequence[object]], Path]


def keys(path: Path, **more: object) -> PromptKeys:
    return PromptKeys.model_validate({"path": str(path), "count": 2, **more})


def texts(path: Path, iteration: int, seed: int = 0, **more: object) -> list[str]:
    return [text for _, text in prompts.prompts_of_iteration(keys(path, **more), seed, iteration)[0]]


def test_fresh_prompts_move_on_and_others_stay(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": f"q{i}"} for i in range(5)])
    assert texts(path, 2) == ["q0", "q1"]
    assert texts(path, 2, fresh=True) == ["q2", "q3"]
    with pytest.raises(ThinkSwitchError, match="has only 5 prompts; iteration 3 needs 6"):
        texts(path, 3, fresh=True)


def test_shuffled_prompts_are_drawn_by_the_seed(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": f"q{i}"} for i in range(50)])
    draws = [tuple(texts(path, 1, seed, shuffle=True, count=5)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_csv_and_parquet_give_the_same_prompts_as_jsonl(write_jsonl: Write, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    rows = [{"prompt": "what, \u2028 now?"}, {"prompt": "two\nlines"}]
    table = pyarrow.Table.from_pylist(rows)
    csv.write_csv(table, tmp_path / "p.csv")
    parquet.write_table(table, tmp_path / "p.parquet")
    expected = texts(write_jsonl("p.jsonl", rows), 1)
    assert texts(tmp_path / "p.csv", 1) == texts(tmp_path / "p.parquet", 1) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"question": "b"}], r"p\.jsonl, line 2: .*'prompt' is undefined"),
        ([{"prompt": "a"}, {"prompt": 3}], "line 2: `prompt` must be text, found int"),
        ([{"prompt": "a"}, {"prompt": "  "}], "line 2: the prompt is empty"),
        ([{"prompt": "a<|im_end|>"}], r"line 1: the prompt holds '<\|im_end\|>'"),
        ([{"prompt": "a", "id": None}], "line 1: `id` must be text or a whole number, found 'None'"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "line 2: the id 'x' occurs twice"),
        (["text"], "line 1: expected a JSON object, found str"),
    ],
)
def test_a_bad_prompt_row_is_named(write_jsonl: Write, rows: Sequence[object], message: str) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        texts(write_jsonl("p.jsonl", rows), 1)


def test_a_template_cannot_reach_python(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": "a"}])
    with pytest.raises(ThinkSwitchError, match="does not fit the row"):
        texts(path, 1, template="{{ ''.__class__.__mro__ }}")


def test_a_request_for_every_sample_in_openais_batch_format(tmp_path: Path) -> None:
    out = tmp_path / "requests.jsonl"
    sampling = SamplingKeys(samples=2, temperature=0.6, top_p=0.95, top_k=20, max_tokens=99)
    asked = PromptKeys.model_validate({"path": "-", "system": "Be brief."})
    count = prompts.write_requests(
        out,
        [("a", prompts.messages(asked, "1+1")), ("b", prompts.messages(asked, "2+2"))],
        model="m",
        how=Asked(opened=True),
        sampling=sampling,
        seed=3,
    )
    rows = [row for _, row in files.read_jsonl(out)]
    assert count == 4 and [r["custom_id"] for r in rows] == ["a-s0", "a-s1", "b-s0", "b-s1"]
    assert rows[1]["body"] == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}],
        "temperature": 0.6,
        "max_tokens": 99,
        "seed": 7,
        "top_p": 0.95,
        "top_k": 20,
        "metadata": {"prompt_id": "a", "trace": "opened"},
    }
    assert (rows[1]["method"], rows[1]["url"]) == ("POST", "/v1/chat/completions")


def test_a_request_keeps_how_its_completion_is_read(tmp_path: Path) -> None:
    how = Asked(False, conventions.from_key("granite"), ("<stop>",))
    prompts.write_requests(
        tmp_path / "r.jsonl",
        [("a", [{"role": "user", "content": "1+1"}])],
        model="m",
        how=how,
        sampling=SamplingKeys(),  # type: ignore[call-arg]
        seed=0,
    )
    ((_, row),) = files.read_jsonl(tmp_path / "r.jsonl")
    assert row["body"]["metadata"] == {"prompt_id": "a", "trace": "inline", "convention": "granite", "ends": ["<stop>"]}


@pytest.mark.parametrize("name", ["aime", "pubmedqa"])
def test_training_prompts_are_asked_in_the_words_of_the_task(name: str) -> None:
    recipe = files.read_yaml(ROOT / "recipes" / f"{name}.yaml")
    task = (ROOT / "lm_eval_tasks" / f"thinkswitch_{name}.yaml").read_text().replace("!function ", "")
    assert recipe["thinkswitch"]["prompts"]["template"] == yaml.safe_load(task)["doc_to_text"]
