"""Invariants for every input, however damaged: checked by hypothesis in the tests and by `make fuzz`.

Each check processes one input and raises `AssertionError` if an invariant is violated. The only
exception that is allowed is a `ThinkSwitchError` of one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from thinkswitch_plugin import recipe
from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.args import AnswerKeys, PromptKeys
from thinkswitch_plugin.data import answers, prompts, traces
from thinkswitch_plugin.data.pairs import PairReport, build_pairs
from thinkswitch_plugin.errors import ThinkSwitchError

SECRET = "SECRET"  # occurs only inside traces
CLOSINGS = ("</think>", "</ Think >", "<|end_of_thought|>", "[/THINK]", "</reasoning>", "<channel|>", "＜/think＞")
OPENINGS = ("<think>", "<THINKING>", "<|begin_of_thought|>", "[think]", "<seed:think>", "&lt;think&gt;")
CONTROL = ("<|im_end|>", "<|im_start|>assistant\n", "[INST]", "<｜end▁of▁sentence｜>", "<end_of_turn>")
FILLERS = (
    "5",
    " ",
    "\n",
    "\u2028",
    "the answer is 7",
    "<",
    ">",
    "</",
    "think",
    "[",
    "\x00",
    "é",
    "👍",
    "\ufeff",
    "**no**",
)


def check_split(pieces: Sequence[str], opened: bool, cut: bool) -> None:
    """`pieces` are fillers, tags and SECRETs; only what follows the last closing tag can be an answer."""
    closed = [n for n, piece in enumerate(pieces) if piece in CLOSINGS]
    after = "".join(pieces[closed[-1] + 1 :] if closed else pieces)
    done = traces.split("".join(pieces), opened=opened, cut=cut)
    if done.answer is not None:
        assert done.answer == traces.without_end(after).strip(), (done, after)
    if done.complete:
        assert done.answer and not traces.has_tag(done.answer) and not cut
        assert len(closed) <= 1 and not any(piece in OPENINGS for piece in (pieces[closed[-1] :] if closed else pieces))
        assert closed or not opened
    assert done.complete or done.outcome.value != "complete"


def check_answer(kind: str, text: str) -> None:
    """An answer is None or a normal form, which reads as itself unless right answers are of another form."""
    found = answers.extract(kind, text)
    assert found is None or (isinstance(found, str) and found == found.strip() and found), (kind, text, found)
    if found is not None and KINDS[kind].right is None:
        assert answers.gold(kind, found) == found, (kind, text, found)
    assert answers.majority([found, None, found]) == found


def check_pairs(samples: Sequence[tuple[str, int]], lines: Sequence[Any], selection: str, folder: Path) -> None:
    """Pairs from one request a sample (prompt, number) and any lines: counts add up, order kept, no trace."""
    requests, generations = folder / "requests.jsonl", folder / "generations.jsonl"
    ids = [f"{prompt}-s{number}" for prompt, number in samples]
    requests.write_bytes(
        b"".join(
            orjson.dumps(
                {
                    "custom_id": custom_id,
                    "body": {
                        "messages": [{"role": "user", "content": "q"}],
                        "metadata": {"prompt_id": prompt, "trace": "opened"},
                    },
                }
            )
            + b"\n"
            for (prompt, _), custom_id in zip(samples, ids, strict=True)
        )
    )
    generations.write_bytes(b"".join(line if isinstance(line, bytes) else orjson.dumps(line) + b"\n" for line in lines))
    report = PairReport()
    try:
        keys = AnswerKeys.model_validate({"selection": selection, "kind": "integer"})
        rows = list(build_pairs(requests, generations, keys=keys, report=report))
    except ThinkSwitchError as error:
        assert one_sentence(error) and ("generations.jsonl, line " in str(error) or "requests.jsonl" in str(error))
        return
    assert report.kept == len(rows) and report.samples == len(ids)
    assert report.kept + sum(report.dropped.values()) == report.samples, report
    places = [ids.index(row["custom_id"]) for row in rows]
    assert places == sorted(set(places))
    for row in rows:
        text = row["messages"][-1]["content"]
        assert text and SECRET not in text and not traces.has_tag(text) and not traces.control_token(text), text


def check_recipe(data: bytes, folder: Path) -> bool:
    """A recipe is read, or refused in one sentence that names the file; whether it was read."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        found = recipe.load_recipe(path)
    except ThinkSwitchError as error:
        assert one_sentence(error) and "recipe.yaml" in str(error), str(error)
        return False
    assert found.keys.domain and "thinkswitch" not in found.axolotl
    return True


def check_prompts(data: bytes, template: str, folder: Path) -> bool:
    """Prompts are read, one a line, in order, each with its own id; or refused in one sentence."""
    path = folder / "prompts.jsonl"
    path.write_bytes(data)
    try:
        found, _ = prompts.read_prompts(PromptKeys(path=str(path), template=template), 0)  # type: ignore[call-arg]
    except ThinkSwitchError as error:
        assert one_sentence(error) and ("prompts.jsonl" in str(error) or "template" in str(error)), str(error)
        return False
    assert len(found) == sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert len({prompt_id for prompt_id, _ in found}) == len(found)
    assert all(text.strip() and not traces.control_token(text) for _, text in found)
    return True


def one_sentence(error: ThinkSwitchError) -> bool:
    """Whether a message is one line of a length that can be read."""
    return 0 < len(str(error)) < 1000 and "\n" not in str(error)
