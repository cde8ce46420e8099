from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conftest import ROOT
from thinkswitch_plugin.args import PromptKeys
from thinkswitch_plugin.data import contamination
from thinkswitch_plugin.data.prompts import read_prompts
from thinkswitch_plugin.errors import ThinkSwitchError

SHARED = Path("../shared/data/pubmedqa")
real_rows = pytest.mark.skipif(not SHARED.is_dir(), reason="the real PubMedQA rows are not here")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions beside the task files."""
    monkeypatch.syspath_prepend(str(ROOT / "lm_eval_tasks"))
    import thinkswitch_tasks

    yield thinkswitch_tasks
    sys.modules.pop("thinkswitch_tasks", None)


def test_a_set_of_another_size_is_all_test(sources: Any) -> None:
    assert sources.pubmedqa_test_ids([("1", "yes"), ("2", "no")]) == {"1", "2"}


def test_a_thousand_rows_that_are_not_the_official_ones_are_refused(sources: Any) -> None:
    with pytest.raises(ThinkSwitchError, match="not in their published order"):
        sources.pubmedqa_test_ids((str(i), "yes") for i in range(1000))


def test_a_missing_local_file_is_named(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(ThinkSwitchError, match="holds no aime_2026"):
        sources.aime_rows()


@real_rows
def test_the_test_half_is_the_official_one_and_no_training_prompt_is_in_it(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pubmedqa.jsonl").symlink_to((SHARED / "pqa_labeled.jsonl").resolve())
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    official = set(orjson.loads((SHARED / "test_ground_truth.json").read_bytes()))
    assert {str(i) for i in sources.pubmedqa_half("test")["pubid"]} == official
    subset = sources.pubmedqa_subset()
    assert len(subset) == 30 and {str(i) for i in subset["pubid"]} < official

    template = "{{context.contexts | join('\n')}}\n\nQuestion: {{question}}"
    keys = PromptKeys.model_validate(
        {
            "path": str(tmp_path / "pubmedqa.jsonl"),
            "id": "pubid",
            "outside": "thinkswitch_pubmedqa_full",
            "template": template,
        }
    )
    prompts, _ = read_prompts(keys, 0)
    assert len(prompts) == 500 and not {i for i, _ in prompts} & official
    questions = contamination.evaluation_questions("thinkswitch_pubmedqa_full")
    assert len(questions) == 500
    assert contamination.overlaps(prompts, questions, n=13, share=0.2) == []
    planted = [*prompts[:3], ("planted", questions[17].split("Question:")[0] + "What do you think?")]
    (found,) = contamination.overlaps(planted, questions, n=13, share=0.2)
    assert (found.prompt_id, found.question) == ("planted", 17)
