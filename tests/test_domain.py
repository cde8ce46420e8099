from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from thinkswitch_plugin import domain, files
from thinkswitch_plugin.args import PromptKeys, SamplingKeys
from thinkswitch_plugin.errors import ThinkSwitchError

Write = Callable[[str, Sequence[object]], Path]


def keys(path: Path, **more: object) -> PromptKeys:
    return PromptKeys.model_validate({"path": str(path), "count": 2, **more})


def test_fresh_prompts_move_on_and_others_stay(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": f"q{i}"} for i in range(5)])
    assert [t for _, t in domain.prompts_of_iteration(keys(path), 0, 2)] == ["q0", "q1"]
    assert [t for _, t in domain.prompts_of_iteration(keys(path, fresh=True), 0, 2)] == ["q2", "q3"]
    with pytest.raises(ThinkSwitchError, match="has only 5 prompts; iteration 3 needs 6"):
        domain.prompts_of_iteration(keys(path, fresh=True), 0, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"question": "b"}], r"p\.jsonl, line 2: `prompt` is missing"),
        ([{"prompt": "a"}, {"prompt": 3}], "line 2: `prompt` is missing, empty or not text"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "line 2: the id 'x' occurs twice"),
        (["text"], "line 1: expected a JSON object, found str"),
    ],
)
def test_a_bad_prompt_row_is_named(write_jsonl: Write, rows: Sequence[object], message: str) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        domain.prompts_of_iteration(keys(write_jsonl("p.jsonl", rows)), 0, 1)


def test_a_request_for_every_sample_in_openais_batch_format(tmp_path: Path) -> None:
    out = tmp_path / "requests.jsonl"
    sampling = SamplingKeys(samples=2, temperature=0.6, top_p=0.95, top_k=20, max_tokens=99)
    asked = PromptKeys.model_validate({"path": "-", "template": "Q: {prompt}", "system": "Be brief."})
    count = domain.write_requests(
        out, [("a", "1+1"), ("b", "2+2")], model="m", opened=True, keys=asked, sampling=sampling, seed=3
    )
    rows = [row for _, row in files.read_jsonl(out)]
    assert count == 4 and [r["custom_id"] for r in rows] == ["a-s0", "a-s1", "b-s0", "b-s1"]
    assert rows[1]["body"] == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: 1+1"}],
        "temperature": 0.6,
        "max_tokens": 99,
        "seed": 7,
        "top_p": 0.95,
        "top_k": 20,
        "metadata": {"prompt_id": "a", "trace": "opened"},
    }
    assert (rows[1]["method"], rows[1]["url"]) == ("POST", "/v1/chat/completions")
