"""Labels for the switch of a pair: does instruct's answer agree with the thinking checkpoint's?

    iter-2/switch/instruct/requests.jsonl, generations.jsonl, key.json   what was asked and answered; the same
    iter-2/switch/thinking/…                                              files for the other mode
    iter-2/switch/labels.jsonl    {"prompt_id": "p01024", "prompt": "6+3*3-2", "label": "pre", "instruct": "1",
                                   "reference": "5", "reference_from": "majority", "tokens": {…}}

`post` says that answering at once suffices, `pre` that thinking is needed. No gold answer is read: the thinking
checkpoint's majority answer counts as right, so what both get wrong alike counts as sufficient.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.data import answers, batch
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.data.prompts import ask_in_mode, read_prompts
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.verdict import final_answers
from thinkswitch_plugin.run import MODES, Run
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once

FEWEST = 50  # unseen prompts; with fewer the trained ones are taken too
CAUTION = (
    "The pair was trained on {trained}, so instruct does better on them than on new ones: the labels flatter instruct, "
    "and the router thinks too rarely. Add prompts to the recipe's source to have unseen ones."
)
Prompts = list[tuple[str, str]]  # (id, text)
Answers = dict[str, list[tuple[str | None, int]]]  # by prompt id: final answer and tokens of every sample


@dataclass(frozen=True)
class Labels:
    """Prompts, as the user turn holds them, and what each needs; `source` says where they come from."""

    prompts: list[str]
    labels: list[Format]
    source: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What `switch.json` holds of them."""
        counts: dict[str, int] = {label: self.labels.count(label) for label in (POST, PRE)}
        return {**self.source, "prompts": len(self.labels), **counts}

    @property
    def needs_thinking(self) -> list[bool]:
        """True where the label is `pre`."""
        return [label == PRE for label in self.labels]

    def first(self, count: int | None) -> Labels:
        """The first so many, or all."""
        return replace(self, prompts=self.prompts[:count], labels=self.labels[:count])


def label_of(instruct: str | None, thinking: Sequence[str | None]) -> tuple[Format | None, str | None]:
    """The label of one prompt and its reference, from the final answers of both checkpoints.

    The reference is the thinking checkpoint's majority answer; without one there is no label.
    """
    reference = answers.majority(thinking)
    if reference is None:
        return None, None
    return (POST if instruct == reference else PRE), reference


def read_labels(path: Path) -> Labels:
    """Labels of a file with rows {"prompt", "label"}, as `make labels` writes them.

    Raises `ThinkSwitchError` naming the line of a broken row.
    """
    rows = []
    for number, row in files.read_jsonl(path):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ThinkSwitchError(f"{path}, line {number}: `prompt` is missing, empty or not text.")
        if row.get("label") not in (PRE, POST):
            raise ThinkSwitchError(
                f"{path}, line {number}: `label` is {row.get('label')!r:.50}; use {POST} (answering at once "
                f"suffices) or {PRE} (thinking is needed)."
            )
        rows.append(row)
    if not rows:
        raise ThinkSwitchError(f"{path} holds no labels.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _labels(rows, {"source": "file", "file": str(path), "sha256": digest})


def _labels(rows: Sequence[dict[str, Any]], source: dict[str, Any]) -> Labels:
    return Labels([row["prompt"] for row in rows], [row["label"] for row in rows], source)


def prompts_to_label(run: Run, k: int) -> tuple[Prompts, set[str]]:
    """Prompts that the pair of iteration k was not trained on, in a drawn order; and the texts that it was.

    If fewer than `FEWEST` are left, all prompts of the source are taken.
    """
    trained = {
        request["body"]["messages"][-1]["content"]
        for j in range(1, k + 1)
        if (path := run.iteration(j) / "requests.jsonl").is_file()
        for _, request in batch.read_requests(path)
    }
    every, _ = read_prompts(run.recipe.keys.prompts, run.seed)
    unseen = [(prompt_id, text) for prompt_id, text in every if text not in trained]
    found = unseen if len(unseen) >= FEWEST else every
    random.Random(f"switch-{run.seed}").shuffle(found)  # so that the first ones are as good as any
    return found, trained


def label_by_agreement(run: Run, k: int, hashes: Hashes, limit: int | None) -> Labels:
    """Ask both checkpoints of iteration k and label every prompt; writes `labels.jsonl`. The run is locked.

    What is answered already, by the same checkpoints and settings, is not asked again.

    Args:
        limit: at most so many prompts.

    Raises:
        ThinkSwitchError: a prompt is an evaluation question, or an engine fails; answers so far are kept.
    """
    from thinkswitch_plugin.data.contamination import require_uncontaminated

    prompts, trained = prompts_to_label(run, k)
    require_uncontaminated(prompts, run.recipe.keys.evaluation)
    asked = prompts[:limit]
    found = {mode: _answers(run, k, mode, prompts, len(asked), hashes) for mode in MODES}
    rows: list[dict[str, Any]] = []
    for prompt_id, text in asked:
        instruct, thinking = (found[mode].get(prompt_id, []) for mode in MODES)
        label, reference = label_of(instruct[0][0] if instruct else None, [answer for answer, _ in thinking])
        if label is not None and instruct:
            tokens = {"instruct": instruct[0][1], "thinking": sum(n for _, n in thinking) / len(thinking)}
            row = {"prompt_id": prompt_id, "prompt": text, "label": label, "instruct": instruct[0][0]}
            rows.append({**row, "reference": reference, "reference_from": "majority", "tokens": tokens})
    if not rows:
        raise ThinkSwitchError(
            f"None of the {len(asked)} label prompts has an answer of both checkpoints that can be read; "
            f"see {run.iteration(k) / 'switch'} and `thinkswitch.answers.kind` of the recipe."
        )
    files.write_jsonl(run.iteration(k) / "switch" / "labels.jsonl", rows)
    seen = sum(row["prompt"] in trained for row in rows)
    source = {"source": "the recipe's prompts", "trained_on": seen, "left_out": len(asked) - len(rows)}
    if seen:
        source["caution"] = CAUTION.format(trained=f"{seen} of the {len(rows)} label prompts")
        console.say(f"  {source['caution']}")
    return _labels(rows, source)


def _answers(run: Run, k: int, mode: str, prompts: Prompts, count: int, hashes: Hashes) -> Answers:
    """What one checkpoint answered to the first `count` prompts; instruct is asked once, thinking for every sample."""
    keys, here, checkpoint = run.recipe.keys, run.iteration(k) / "switch" / mode, run.checkpoint(mode, k)
    samples = keys.sampling.samples if mode == "thinking" else 1
    keys = keys.model_copy(update={"sampling": keys.sampling.model_copy(update={"samples": samples})})
    key = {
        "checkpoint": hashes.of(Path(checkpoint)),
        "prompts": hashlib.sha256(repr(list(prompts)).encode()).hexdigest(),
        "asked_with": keys.prompts.system,
        "sampling": keys.sampling.model_dump(),
        "trace": keys.trace,
        **keys.pair.asked_with(mode),
        "seed": run.seed,
        "engine": run.answering,
    }
    # Answers to other requests are deleted with those; answers to these are continued by their ids.
    requests, answered = here / "requests.jsonl", here / "generations.jsonl"

    def write(_resumes: bool) -> dict[str, Any]:
        return {"requests": ask_in_mode(requests, prompts, checkpoint, mode, keys, run.seed)}

    once(here / "key.json", key, (requests,), write, scratch=(answered,), part=None)
    hashes.save()
    report = generate(
        requests,
        answered,
        checkpoint,
        run.engine,
        keys.engine,
        limit=count * samples,
        log=run.iteration(k) / "logs" / f"switch-{mode}.log",
        title=f"labels: {mode}",
    )
    console.say(f"  {mode}: {report.answered} answered, {report.already_stored} stored before, {report.failed} failed")
    return dict(final_answers(requests, answered, keys.answers.kind))
