"""`thinkswitch judge RUN`: a judge model compares the answers of a checkpoint with those of iteration 0, question by question.

For domains without right answers. The judge is any model on an OpenAI-compatible server, or a checkpoint. It sees the answers
that the evaluation stored, without their traces, once in each order: only an answer that is preferred in both orders wins
(Zheng et al. 2023, arXiv 2306.05685, section 3.4).

    iter-1/judge/instruct/requests.jsonl, generations.jsonl   what the judge was asked, and its answers
    iter-1/judge/instruct/judge.json                          {"won": ["q00003", …], "lost": […], "tied": […], …}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch, traces
from thinkswitch_plugin.engine_args import identity
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import samples
from thinkswitch_plugin.judging.paired import LEVEL, MORE, NOISE, p_value
from thinkswitch_plugin.judging.verdict import convention_read
from thinkswitch_plugin.run import Run, locked
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once

PROMPT = """Two assistants answered the same question. Decide which answer is better: correct, helpful and complete. \
Neither the order of the answers nor their length is a reason to prefer one.

[Question]
{question}

[Answer of assistant A]
{a}

[Answer of assistant B]
{b}

Explain your decision in a few sentences. Then end with [[A]] if A is better, [[B]] if B is better, or [[C]] for a tie."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
ORDERS = {"new-first": {"A": 1, "B": -1, "C": 0}, "old-first": {"A": -1, "B": 1, "C": 0}}
MAX_TOKENS = 4096  # room for the trace of a judge that thinks
NO_ANSWER = "(no answer)"


def judge_run(run: Run, judge: str, engine: str, *, mode: str, iteration: int, limit: int | None) -> dict[str, Any]:
    """Compare the answers of one checkpoint of an iteration with those of iteration 0, print the result and return it.

    Args:
        judge: the name under which the server has the judge; or a checkpoint, if the engine is not a server.
        limit: use only the first N questions.

    Raises `ThinkSwitchError`: an evaluation is missing, or the judge gives no answers.
    """
    here, now, before = (run.iteration(k) for k in (iteration, iteration, 0))
    here = here / "judge" / mode
    stored = [samples.samples_file(k / "eval" / mode, run.recipe.keys.evaluation.task) for k in (now, before)]
    scratch = requests, generations = here / "requests.jsonl", here / "generations.jsonl"
    keys = EngineKeys.model_validate({"concurrency": run.recipe.keys.engine.concurrency})

    def work(_: bool) -> dict[str, Any]:
        new, old = (dict(answers(run, k / "eval" / mode)) for k in (now, before))
        shared = [name for name in new if name in old][:limit]
        if not shared:
            raise ThinkSwitchError(f"The evaluations of {mode} have no question in common; run `make iterate` again.")
        same = [name for name in shared if new[name] == old[name]]
        rows = [row for name in shared if name not in same for row in asked(judge, name, new[name], old[name])]
        files.write_jsonl(requests, rows)
        if rows:
            generate(requests, generations, judge, servers.choose(engine), keys, log=here / "judge.log", title="judge")
        return result(shared, same, verdicts(generations) if rows else {})

    hashes = Hashes(run.folder)
    asked_how = {"engine": identity(servers.choose(engine)), "max_tokens": MAX_TOKENS, "trace": run.recipe.keys.trace}
    key = {
        "judge": judge,
        "limit": limit,
        "prompt": PROMPT,
        **asked_how,
        "answers": [hashes.of(path) for path in stored],
    }
    with locked(run.folder):
        found = once(here / "judge.json", key, (requests,), work, scratch=scratch)
    console.say(f"  {mode} of iteration {iteration} against iteration 0, by {judge}: {found['sentence']}")
    return found


def answers(run: Run, folder: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """The id of each question of an evaluation, with the question and the first answer to it, without its trace."""
    path = samples.samples_file(folder, run.recipe.keys.evaluation.task)
    ends_of = samples.as_stored(folder, path)
    requests = {row["custom_id"]: row for _, row in batch.read_requests(folder / samples.REQUESTS)}
    convention = convention_read(run.recipe.keys.convention)
    for row in samples.read_rows(path):
        request = requests[samples.question_id(row.doc_id, 0)]
        done = batch.asked(request, convention).split({"content": row.texts[0]}, ends_of(row)[0].finish_reason)
        yield f"q{row.doc_id:05}", (request["body"]["messages"][-1]["content"], done.answer or NO_ANSWER)


def asked(judge: str, name: str, new: tuple[str, str], old: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """The two requests for one question: the new answer first, and the old answer first."""
    for order, (a, b) in zip(ORDERS, ((new, old), (old, new)), strict=True):
        content = PROMPT.format(question=new[0], a=a[1], b=b[1])
        turns = [{"role": "user", "content": content}]
        body = {"model": judge, "messages": turns, "temperature": 0, "max_tokens": MAX_TOKENS}
        yield batch.request(f"{name}-{order}", body)


def verdicts(generations: Path) -> dict[str, int]:
    """By request: 1 if the judge prefers the new answer, -1 for the old one, 0 for a tie. Unreadable ones are missing."""
    found = {}
    for name, line in batch.read_stored(generations, torn_end=True):
        body = batch.completion_body(line)
        choice = body["choices"][0] if body else {}
        whole = body and traces.finished(choice.get("finish_reason"))  # a trace that was cut may weigh anything
        named = VERDICT.findall(str(choice["message"].get("content"))) if whole else []
        if named:  # the last one: a judge that thinks may weigh others before
            found[name] = next(values for order, values in ORDERS.items() if name.endswith(order))[named[-1]]
    return found


def result(shared: list[str], same: list[str], by_request: dict[str, int]) -> dict[str, Any]:
    """The questions that were won, lost and tied (`same` without asking), and all of it as a `sentence`."""
    from scipy.stats import binomtest

    found: dict[str, Any] = {"won": [], "lost": [], "tied": list(same), "disagree": [], "unread": []}
    for name in shared:
        if name in same:
            continue
        both = [by_request.get(f"{name}-{order}") for order in ORDERS]
        if None in both:
            found["unread"].append(name)
        elif both[0] == both[1] != 0:
            found["won" if both[0] == 1 else "lost"].append(name)
        else:
            found["tied"].append(name)
            found["disagree"] += [name] if both[0] != both[1] else []
    won, lost, tied, disagree, unread = (len(names) for names in found.values())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    text = f"preferred on {won} of {len(shared)} questions, not preferred on {lost}, tied on {tied}"
    text += f" ({len(same)} with equal answers, {disagree} on which the two orders disagree)"
    text += f", {unread} left out without a verdict" if unread else ""
    return {**found, "p": p, "sentence": f"{text}; sign test {p_value(p)}: {MORE if p < LEVEL else NOISE}."}
