"""Rebuild the thinking checkpoint with mergekit, and check that it still thinks.

The config used, with the real folders and λ in it, is kept as `iter-k/merge.yaml`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from thinkswitch_plugin import checkpoint, console, files
from thinkswitch_plugin.args import EngineKeys, RebuildKeys
from thinkswitch_plugin.engines import choose, has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.generate import generate
from thinkswitch_plugin.merging.compatibility import Allowances, require_compatible
from thinkswitch_plugin.merging.config import allow, place_models, set_lambda
from thinkswitch_plugin.merging.similarity import similarity
from thinkswitch_plugin.pairs import completion_of
from thinkswitch_plugin.traces import Outcome

SMALL_SET = 100  # up to so many prompts, one may fail to think without failing the check


def asked_ids(requests: Path, limit: int | None = None) -> list[str]:
    """The ids of the first `limit` requests."""
    return [row["custom_id"] for _, row in itertools.islice(files.read_jsonl(requests), limit)]


def think_ratio(requests: Path, generations: Path, ids: Sequence[str]) -> tuple[int, int]:
    """(completions with a closed trace, completions that were not cut), of the requests with these ids."""
    wanted = set(ids)
    opened: dict[str, bool] = {}
    for _, row in files.read_jsonl(requests):
        if row["custom_id"] in wanted:
            opened[row["custom_id"]] = (row["body"].get("metadata") or {}).get("trace") == "opened"
    closed = whole = 0
    for _, row in files.read_jsonl(generations):
        if row.get("custom_id") not in opened or row.get("error"):
            continue
        done = completion_of(row, opened=opened[row["custom_id"]])
        if row["response"]["body"]["choices"][0].get("finish_reason") == "length":
            continue
        whole += 1
        closed += done.closed_trace and done.outcome is not Outcome.FAILED
    return closed, whole


def still_thinks(closed: int, whole: int, asked: int, *, needed: float, whole_share: float) -> bool:
    """Whether a share of closed traces is enough, with one prompt of tolerance on small sets.

    Cut completions are counted apart; a checkpoint that is cut far more often has not shown
    that it ends its traces, so at least half of the original's share must be whole.

    Args:
        closed, whole, asked: completions with a closed trace, not cut, and all.
        needed: share of closed traces among the whole ones.
        whole_share: share of the original's completions that were whole.
    """
    tolerance = 1 if whole <= SMALL_SET else 0
    return whole > 0 and whole >= 0.5 * whole_share * asked and closed + tolerance >= needed * whole


def merge(config: Path, out: Path, log: Path) -> None:
    """Run mergekit on a config, through `thinkswitch merge`, which knows our method too."""
    command: list[str | Path] = [
        Path(sys.executable).with_name("thinkswitch"),
        "merge",
        config,
        out,
        "--copy-tokenizer",
        "--lazy-unpickle",
    ]
    if has_cuda():
        command.append("--cuda")
    console.run_logged(command, log, title="mergekit")


def rebuild_thinking(
    *,
    instruct: Path,
    anchor: Path,
    keys: RebuildKeys,
    out: Path,
    merge_yaml: Path,
    reference: Path,
    reference_requests: Path,
    requests: Path,
    engine: str,
    engine_keys: EngineKeys,
    retry_max_tokens: int | None = None,
    logs: Path,
    cards: Callable[[Path, str], None],
) -> dict[str, Any]:
    """Interpolate, measure the think ratio on training prompts, and accept or raise λ.

    Args:
        instruct, anchor: the two checkpoints; the anchor is a thinking one.
        reference, reference_requests: what the *original* thinking checkpoint answered;
            its think ratio is the measure.
        requests: the training prompts to try the candidate on (no labels needed).
        retry_max_tokens: as the reference was asked, what was cut is asked again with this budget.

    Returns:
        What `rebuild.json` holds: method, λ, every λ tried with its think ratio, σ, angles.

    Raises:
        ThinkSwitchError: the pair does not match, or no λ of the list keeps the checkpoint thinking.
    """
    require_compatible(instruct, anchor, Allowances(may_differ=tuple(keys.may_differ)))
    nearness = similarity(instruct, anchor)
    config_path = Path(keys.config)
    template = allow(files.read_yaml(config_path), keys.may_differ)
    roles = {"instruct": str(instruct), "thinking": str(anchor)}
    # The original on the very requests that a candidate answers, where it was asked them: prompts differ in how
    # many of their traces the token limit cuts.
    known, tried_on = asked_ids(reference_requests), asked_ids(requests, keys.check_prompts)
    same = tried_on if set(tried_on) <= set(known) else known
    closed_before, whole_before = think_ratio(reference_requests, reference, same)
    if not whole_before:
        same = known
        closed_before, whole_before = think_ratio(reference_requests, reference, same)
    baseline = closed_before / whole_before if whole_before else 0.0
    # A server of the user's own does not serve a candidate.
    judge = choose("auto") if engine.startswith("http") else engine
    tried: list[dict[str, Any]] = []
    candidates = [keys.lambda_, *(step for step in keys.lambda_steps if step > keys.lambda_)]
    candidate = files.temporary_sibling(out)
    for weight in candidates:
        config = place_models(set_lambda(template, weight, config_path), roles)
        text = yaml.safe_dump(config, sort_keys=False)
        files.write_yaml(merge_yaml, config, header=f"λ = {weight:g}. Runs by itself: thinkswitch merge THIS_FILE OUT")
        files.remove(candidate)
        merge(merge_yaml, candidate, logs / "merge.log")
        checkpoint.adopt_mode(anchor, candidate)
        answers = logs / f"check-lambda-{weight:g}.jsonl"  # a killed attempt's answers count: the merge repeats
        generate(
            requests,
            answers,
            str(candidate),
            judge,
            engine_keys,
            limit=keys.check_prompts,
            retry_max_tokens=retry_max_tokens,
            log=logs / "check.log",
            title=f"check λ={weight:g}",
        )
        closed, whole = think_ratio(requests, answers, tried_on)
        asked = sum(1 for _ in files.read_jsonl(answers))
        ratio = closed / whole if whole else 0.0
        tried.append({"lambda": weight, "think_ratio": ratio, "prompts": asked, "cut": asked - whole})
        console.say(f"  λ {weight:g}: think ratio {ratio:.3f} on {asked} training prompts (original {baseline:.3f})")
        needed, whole_share = keys.min_think_ratio * baseline, whole_before / len(same)
        if still_thinks(closed, whole, asked, needed=needed, whole_share=whole_share):
            cards(candidate, text)
            files.put_in_place(candidate, out)
            return {
                "method": template["merge_method"],
                "lambda": weight,
                "anchor": str(anchor),
                "think_ratio": ratio,
                "think_ratio_original": baseline,
                "tried": tried,
                **nearness,
            }
    files.remove(candidate)
    shown = ", ".join(f"{t['lambda']:g} → {t['think_ratio']:.2f}, {t['cut']} of {t['prompts']} cut" for t in tried)
    raise ThinkSwitchError(
        f"No λ keeps the rebuilt checkpoint thinking (λ → think ratio of what was not cut: {shown}; the "
        f"original has {baseline:.2f}, {len(same) - whole_before} of {len(same)} cut). The last good pair is kept; raise "
        "`thinkswitch.rebuild.lambda`, add to `lambda_steps`, or train less; where the token limit cut most, raise "
        "`thinkswitch.sampling.max_tokens`."
    )
