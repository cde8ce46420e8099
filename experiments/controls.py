"""Control experiments on iteration 1 of a finished run, each judged like the run itself.

shuffled      the same answers handed to other prompts: instruct must not gain
own-answers   instruct trained on its own answers: what training alone does
true-labels   the right answers instead of the model's own: the upper reference; the prompts' field `answer`
undistilled   thinking rebuilt with the *undistilled* instruct: what interpolation alone does
rounded       the adapter merged by axolotl's default, which rounds every matrix through NF4
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files, places
from thinkswitch_plugin.data.prompts import read_field
from thinkswitch_plugin.data.traces import without_end
from thinkswitch_plugin.engine_args import TEMPLATE_KEY
from thinkswitch_plugin.engines.ask import ask_in_order, asking
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint
from thinkswitch_plugin.judging.figures import summarize
from thinkswitch_plugin.judging.samples import samples_of
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.merging.command import write_merge
from thinkswitch_plugin.merging.config import allow, place_models, set_lambda
from thinkswitch_plugin.recipe import iteration_config
from thinkswitch_plugin.report import header, parts_table, rows
from thinkswitch_plugin.report.tables import interval, percent
from thinkswitch_plugin.run import MODES, Run, locked, open_run, processes
from thinkswitch_plugin.run.checkpoint import Subject
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.table import control_files
from thinkswitch_plugin.training.distil import ENGINE_ENV, adapter_change, require_moved

NAMES = {
    "shuffled": ("instruct", "labels shuffled among prompts"),
    "own-answers": ("instruct", "instruct's own answers"),
    "true-labels": ("instruct", "true labels"),
    "rounded": ("instruct", "adapter merged through NF4 (axolotl's default)"),
    "undistilled": ("thinking", "thinking rebuilt with the undistilled instruct"),
}


def run_control(run: Run, name: str) -> None:
    """Do one control and write `controls/NAME/result.json`.

    Raises `ThinkSwitchError` if iteration 1 is not finished or the control does not apply.
    """
    work.require_finished(run, 1)
    mode, title = NAMES[name]
    start = {role: run.checkpoint(role, 0) for role in MODES}
    if name == "undistilled" and start["instruct"] == start["thinking"]:
        raise ThinkSwitchError(
            f"{run.folder} starts from a hybrid, and a checkpoint interpolated with itself is itself: the control "
            "`undistilled` is iteration 0 of the report."
        )
    here = run.folder / "controls" / name
    with locked(run.folder):
        console.say(f"[control {name}] {title}")
        out = here / mode
        if name in ("shuffled", "own-answers", "true-labels"):
            files.remove(here)  # a control always begins anew
            files.write_jsonl(here / "pairs.jsonl", relabelled(run, name))
            learn(run, here, "answers")  # other answers than the thinking checkpoint's have no distributions
        elif name == "rounded":
            first = run.iteration(1)
            files.remove(here)
            here.mkdir(parents=True)
            files.write_yaml(here / "axolotl.yaml", files.read_yaml(first / "axolotl.yaml"))
            (here / "adapter").symlink_to((first / "adapter").resolve())
            on_cpu = run.recipe.keys.merge_on == "cpu"
            work.merge_adapter(here, run.checkpoint("instruct", 0), out, on_cpu=on_cpu, rounded=True)
        else:
            weight = files.read_json(run.iteration(1) / "rebuild.json")["lambda"]
            config = places.find(run.recipe.keys.rebuild.config)
            merged = place_models(
                set_lambda(allow(files.read_yaml(config), run.recipe.keys.rebuild.may_differ), weight, config),
                start,
            )
            files.write_yaml(here / "merge.yaml", merged)
            files.remove(out)
            write_merge(here / "merge.yaml", out, here / "logs" / "merge.log")
        judge(run, here, mode, title)
        console.say("  `make report` puts it beside the run")


def learn(run: Run, here: Path, loss: str, **more: Any) -> None:
    """Train the starting instruct checkpoint on `here/pairs.jsonl` with a loss, and merge it as `here/instruct`.

    Args:
        loss: as the recipe's key has it, or `on-policy`, which learns from `here/rationales.jsonl`; see `on_policy`.
        more: keys of axolotl on top of the recipe's.
    """
    parent, keys = run.checkpoint("instruct", 0), run.recipe.keys
    by_axolotl = "answers" if loss == "on-policy" else loss
    recipe = replace(run.recipe, keys=keys.model_copy(update={"loss": by_axolotl}), axolotl=run.recipe.axolotl | more)
    learning = replace(run, recipe=recipe)
    if loss == "on-policy":
        about = {"teacher": run.checkpoint("thinking", 0), TEMPLATE_KEY: keys.pair.arguments("thinking")}
        files.write_json(here / "on-policy.json", about)
        config = iteration_config(recipe, base_model=parent, pairs=here / "rationales.jsonl", here=here, seed=run.seed)
        files.write_yaml(here / "axolotl.yaml", config)
        command: list[str | Path] = [sys.executable, "-m", "experiments.on_policy", here]
        processes.run_logged(command, here / "logs" / "train.log", env=ENGINE_ENV, title="on-policy distillation")
        require_moved(adapter_change(here / "adapter"), keys.min_adapter_change, here / "adapter")
    else:
        work.train_adapter(learning, pairs=here / "pairs.jsonl", base_model=parent, here=here)
    work.merge_adapter(here, parent, here / "instruct", on_cpu=keys.merge_on == "cpu")


def judge(run: Run, here: Path, mode: str, title: str, **more: Any) -> None:
    """Evaluate the checkpoint `here/MODE` of a control as the run's own, guard tasks included; write `here/result.json`."""
    name, out, keys = here.name, here / mode, run.recipe.keys
    subject = Subject(str(out), keys.pair.arguments(mode), guards=tuple(keys.evaluation.guard))
    evaluate_checkpoint(subject, here / "eval" / mode, keys, run.engine, log=here / "logs" / f"{name}.log")
    figures = summarize(samples_of(here / "eval" / mode, keys, str(out)))
    beside = Hashes(run.folder).of(run.iteration(1) / mode)  # of any other checkpoint the report leaves it out
    about = {"control": name, "mode": mode, "title": title, "beside": beside, "tasks": keys.evaluation.tasks}
    files.write_json(here / "result.json", {**about, **more, **figures})
    low, high = figures["ci95"]
    console.say(f"  {title}: {100 * figures['mean@k']:.1f} % ({100 * low:.1f}–{100 * high:.1f})")


def relabelled(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """The pairs of iteration 1 with other answers."""
    rows_ = [row for _, row in files.read_jsonl(run.iteration(1) / "pairs.jsonl")]
    for row in rows_:
        row.pop("logprobs", None)  # of the answer that is replaced
    if name == "shuffled":
        labels = [row["messages"][-1]["content"] for row in rows_]
        random.Random(run.seed).shuffle(labels)
    elif name == "own-answers":
        labels = own_answers(run, [row["custom_id"] for row in rows_])
    else:
        labels = true_labels(run, rows_)
    if empty := sum(not label.strip() for label in labels):
        console.say(f"  {empty} of {len(labels)} answers are empty and left out")
    for row, label in zip(rows_, labels, strict=True):
        if not label.strip():
            continue
        messages = [*row["messages"][:-1], {"role": "assistant", "content": label}]
        yield {**row, "messages": messages}


def true_labels(run: Run, pairs: Sequence[dict[str, Any]]) -> list[str]:
    """The right answer to each of these pairs of iteration 1. Raises `ThinkSwitchError` if one is not known."""
    if run.recipe.keys.pair.demo is True:
        from thinkswitch_plugin.demo import task

        return [task.answer(row["messages"][0]["content"]) for row in pairs]
    known = read_field(run.recipe.keys.prompts, run.seed, "answer")
    if lost := next((row["prompt_id"] for row in pairs if row["prompt_id"] not in known), None):
        raise ThinkSwitchError(
            f"The prompts no longer hold {lost}, which iteration 1 was trained on; run `make iterate` first."
        )
    return [known[row["prompt_id"]] for row in pairs]


def own_answers(run: Run, wanted: list[str]) -> list[str]:
    """What the starting instruct checkpoint answers to these requests of iteration 1, greedily.

    Raises `ThinkSwitchError` if one of them is not answered.
    """
    model, requests = run.checkpoint("instruct", 0), run.iteration(1) / "requests.jsonl"
    asked = {"model": model, "temperature": 0, TEMPLATE_KEY: run.recipe.keys.pair.arguments("instruct")}
    bodies = {row["custom_id"]: row["body"] | asked for _, row in files.read_jsonl(requests)}
    log = run.folder / "controls" / "own-answers" / "logs" / "generate.log"
    with asking(run.engine, model, run.recipe.keys.engine, log=log) as asker:
        replies = ask_in_order(asker, [bodies[one] for one in wanted])
    if unanswered := next((reply for reply in replies if isinstance(reply, Unanswered)), None):
        raise ThinkSwitchError(f"{model} gave no answer through {run.engine}: {unanswered}.")
    said = [str(reply["choices"][0]["message"]["content"]) for reply in replies if isinstance(reply, dict)]
    return [without_end(text) for text in said]


def over_seeds(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each checkpoint that every run evaluated: mean, standard deviation and range over the runs."""
    found = []
    for k in range(min(len(report["iterations"]) for report in reports)):
        for mode in MODES:
            scores, tokens = ([report["iterations"][k][mode][of] for report in reports] for of in ("mean@k", "tokens"))
            spread = f"{percent(statistics.mean(scores))} ± {100 * statistics.stdev(scores):.1f}"
            reach = interval([min(scores), max(scores)])
            found.append(
                [str(k), mode, spread, reach, f"{statistics.mean(tokens):.1f} ± {statistics.stdev(tokens):.1f}"]
            )
    return found


def print_over_seeds(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One table of means for each domain, the key, that several runs have."""
    for domain, several in reports.items():
        if len(several) > 1:
            seeds = ", ".join(str(report["seed"]) for report in several)
            console.say(f"### {domain}: mean ± standard deviation over the seeds {seeds}\n")
            names = ["iteration", "checkpoint", "accuracy", "lowest–highest", "tokens"]
            console.say("\n".join(console.table(names, over_seeds(several))) + "\n")


def print_results(folders: list[Path]) -> None:
    """The headline table of every run, the mean over the seeds of a domain, and one table of all controls, as Markdown."""
    controls = []
    reports: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        run = open_run(folder)
        report = files.read_json(folder / "report.json")
        reports.setdefault(run.recipe.keys.domain, []).append(report)
        n = report["iterations"][0]["instruct"]["n"]
        console.say(f"### Seed {report['seed']}, {n} held-out questions, engine {report['engine']}\n")
        console.say("\n".join(console.table(header(report), rows(report))) + "\n")
        if (parts := parts_table(report)).rows:
            console.say("\n".join(console.table(parts.header, parts.rows)) + "\n")
        for path in control_files(run):
            found = files.read_json(path)
            mode = found["mode"]
            zero, one = (report["iterations"][k][mode]["mean@k"] for k in (0, 1))
            low, high = (100 * v for v in found["ci95"])
            controls.append(
                [
                    str(run.seed),
                    found["title"],
                    mode,
                    f"{100 * zero:.1f} %",
                    f"{100 * one:.1f} %",
                    f"{100 * found['mean@k']:.1f} % ({low:.1f}–{high:.1f})",
                    f"{found['think_ratio']:.3f}",
                    f"{found['tokens']:.1f}",
                ]
            )
    print_over_seeds(reports)
    if controls:
        console.say("### Controls\n")
        names = [
            "seed",
            "control",
            "checkpoint",
            "iteration 0",
            "iteration 1",
            "control's accuracy (95 %)",
            "think ratio",
            "tokens",
        ]
        console.say("\n".join(console.table(names, controls)))
