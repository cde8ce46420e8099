"""`make compare QUESTION="…"`: instruct before, instruct after and thinking answer one question, side by side.

One checkpoint is in memory at a time. The question is asked as the domain asks its own: template, system turn,
sampling and budget are those of the recipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.console import printable
from thinkswitch_plugin.data import prompts, traces
from thinkswitch_plugin.data.batch import Asked, tokens_of
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.ask import ask_in_order, asking
from thinkswitch_plugin.engines.generate import context_length, room_for
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.verdict import how_read
from thinkswitch_plugin.recipe import recipe_of
from thinkswitch_plugin.run import MODES, Run, checkpoint, open_run, settings_file
from thinkswitch_plugin.run.checkpoint import Subject
from thinkswitch_plugin.run.folder import of_run
from thinkswitch_plugin.run.progress import Bar

SHOWN_TRACE = (500, 200)  # characters of a trace that are shown, of its start and of its end
NO_ANSWER = {
    traces.Outcome.UNCLOSED: "(no answer: the trace never ended)",
    traces.Outcome.EMPTY: "(no answer: nothing after the trace)",
}


@dataclass(frozen=True)
class Answer:
    """What one checkpoint answered; the fields of `OUT=`'s JSON.

    Attributes:
        tokens, trace_tokens: generated in all, and those of the trace.
        seconds: for the answer, without loading the checkpoint.
        cut: the token limit came first.
    """

    title: str
    checkpoint: str
    trace: str | None
    answer: str | None
    outcome: traces.Outcome
    tokens: int
    trace_tokens: int
    seconds: float
    cut: bool


def compare(
    folder: Path,
    question: str,
    *,
    iteration: int | None = None,
    engine: str = "auto",
    overlays: Sequence[str] = (),
    out: Path | None = None,
    **others: str,
) -> list[Answer]:
    """Ask the checkpoints of a run, print their answers side by side, and return them.

    Args:
        folder: the run, RUNS/DOMAIN; there need not be one where both checkpoints are given.
        iteration: whose checkpoints; None is the last one that has both.
        engine: `embedded` (transformers in process), `vllm`, or the URL of a server; `auto` is in process, or vLLM
            with the recipe's options if the recipe needs a GPU and vLLM is installed.
        out: write the answers there too, as JSON.
        others: `instruct` and `thinking`, other checkpoints (folders or hub ids) in place of the iteration's.

    Raises:
        ThinkSwitchError: no run, no such iteration, weights that were pruned, a question that cannot be asked.
    """
    instruct, thinking = (of_run(folder, others.get(mode, ""), mode, iteration) for mode in MODES)
    run = open_run(folder) if settings_file(folder).is_file() else None
    if run is None and not (instruct and thinking):
        raise ThinkSwitchError(
            f"{folder} is not a run folder; run `make iterate DOMAIN={folder.name}` first, "
            "or give two checkpoints: INSTRUCT=folder THINKING=folder."
        )
    recipe = run.recipe if run else recipe_of(folder.name, overlays)
    text, empty = prompts.as_asked(recipe.keys.prompts, question)
    asked = {
        title: Subject(name, recipe.keys.pair.arguments(title.split()[0]))
        for title, name in columns(run, iteration, instruct, thinking).items()
    }
    if empty:
        console.say(f"  the domain's template is asked with nothing for {', '.join(empty)}")
    # A model that needs a GPU may fit on it only as the recipe's options have vLLM round it.
    chosen = "embedded" if engine == "auto" and not recipe.keys.needs.gpu_gb else servers.choose(engine)
    answers = []
    with Bar(len(asked), "compare", unit="answer") as bar:
        for title, subject in asked.items():
            bar.note(title)
            bar.update(0)
            answers.append(ask(title, subject, text, recipe.keys, chosen, run.seed if run else 0, folder / "logs"))
            bar.update()
    show(question, answers)
    if out is not None:
        files.write_json(out, {"question": question, "asked": text, "answers": [asdict(a) for a in answers]})
    return answers


def columns(run: Run | None, iteration: int | None, instruct: str, thinking: str) -> dict[str, str]:
    """The checkpoint folders to ask, by the titles of their columns, which begin with the mode.

    Raises `ThinkSwitchError` if one of them is not there.
    """
    found: dict[str, str] = {}
    if run is not None:
        found["instruct before (iteration 0)"] = run.checkpoint("instruct", 0)
        if not (instruct and thinking):
            k = last_finished(run) if iteration is None else iteration
            if k > 0 and not instruct:
                found[f"instruct after (iteration {k})"] = run.checkpoint("instruct", k)
            if not thinking:
                found[f"thinking (iteration {k})"] = run.checkpoint("thinking", k)
        for name in found.values():
            if not (Path(name) / "config.json").is_file():
                raise ThinkSwitchError(
                    f"{run.folder} has no checkpoint {name}; `make status` shows what is done, `make iterate` makes it."
                )
            checkpoint.require_weights(Path(name))
    for title, name in (("instruct", instruct), ("thinking", thinking)):
        if name:
            found[f"{title} ({name})"] = str(checkpoint.resolve(name, None, title)[0])
    return found


def last_finished(run: Run) -> int:
    """The last iteration that has both checkpoints, with their weights. Raises `ThinkSwitchError` if none has."""
    for k in range(run.iterations, 0, -1):
        if all(any((run.iteration(k) / mode).glob("*.safetensors")) for mode in MODES):
            return k
    raise ThinkSwitchError(
        f"{run.folder} has no finished iteration yet; run `make iterate DOMAIN={run.recipe.keys.domain}` first, "
        "or compare the starting pair by ITERATION=0."
    )


def ask(title: str, subject: Subject, text: str, keys: ThinkSwitchKeys, engine: str, seed: int, logs: Path) -> Answer:
    """One checkpoint's answer to one prompt. Raises `ThinkSwitchError` if it cannot be had."""
    from transformers import AutoTokenizer, set_seed

    name = subject.name
    tokenizer = AutoTokenizer.from_pretrained(name)
    how = how_read(tokenizer, keys.convention, subject.arguments)
    body = prompts.request_body(name, prompts.messages(keys.prompts, text), keys.sampling, seed) | how.fields()
    prompt = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, tokenize=False, **subject.arguments
    )
    length, limit = len(tokenizer.encode(prompt, add_special_tokens=False)), context_length(name)
    if length >= limit:
        raise ThinkSwitchError(
            f"the question has {length:,} tokens, and {name} reads up to {limit:,}; ask a shorter one."
        )
    room = room_for(name, body["max_tokens"])
    with asking(engine, name, keys.engine, log=logs / "compare.log", max_len=room) as asker:
        if engine == "embedded":
            set_seed(seed)
        started = time.monotonic()
        (reply,) = ask_in_order(asker, [body])
        seconds = time.monotonic() - started
    if isinstance(reply, Unanswered):
        raise ThinkSwitchError(
            f"{name} gave no answer through {engine}: {reply}; leave ENGINE= out to ask it in process."
        )
    return read_reply(title, name, reply, seconds, tokenizer, how)


def read_reply(title: str, name: str, reply: dict[str, Any], seconds: float, tokenizer: Any, how: Asked) -> Answer:
    """A chat completion of the checkpoint `name`, split as it was asked."""
    choice = reply["choices"][0]
    done = how.split(choice["message"], choice.get("finish_reason"))
    return Answer(
        title=title,
        checkpoint=name,
        trace=done.trace,
        answer=done.answer,
        outcome=done.outcome,
        tokens=tokens_of(reply),
        trace_tokens=len(tokenizer.encode(done.trace, add_special_tokens=False)) if done.trace else 0,
        seconds=round(seconds, 3),
        cut=choice.get("finish_reason") == traces.LENGTH,
    )


def show(question: str, answers: Sequence[Answer]) -> None:
    """The answers side by side on a terminal, else one below the other as plain text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = Console()
    if not sys.stdout.isatty() or terminal.is_dumb_terminal:
        console.say(f"question: {printable(question)}")
        for found in answers:
            trace = f"\n  trace ({found.trace_tokens} tokens): {shortened(found.trace)}" if found.trace else ""
            console.say(f"\n{found.title}: {cost(found)}{trace}\n  answer: {answer_text(found)}")
        return
    shown = Table(title=Text(printable(question)), expand=True)
    cells = []
    for found in answers:
        shown.add_column(Text(found.title), ratio=1, overflow="fold")
        trace = f"trace ({found.trace_tokens} tokens)\n{shortened(found.trace)}\n\n" if found.trace else ""
        cells.append(Text.assemble((trace, "dim"), (answer_text(found), "bold")))
    shown.add_row(*cells, end_section=True)
    shown.add_row(*(Text(cost(found)) for found in answers))
    terminal.print(shown)


def cost(found: Answer) -> str:
    """Tokens and time of an answer."""
    return f"{found.tokens} tokens, {found.seconds:.2f} s" + (", cut by the token limit" if found.cut else "")


def answer_text(found: Answer) -> str:
    """The answer as it is shown."""
    return NO_ANSWER.get(found.outcome, "(no answer)") if found.answer is None else printable(found.answer)


def shortened(trace: str) -> str:
    """A trace as it is shown: whole if short, else its start and its end."""
    head, tail = SHOWN_TRACE
    text = printable(trace)
    return text if len(text) <= head + tail else f"{text[:head].rstrip()} […] {text[-tail:].lstrip()}"
