"""Ask a pair: the router decides, question by question, whether instruct or thinking answers.

    from thinkswitch_plugin.router.switch import Switch

    switch = Switch.open("runs/arithmetic")
    print(switch.answer("7*3+4*2").answer)

A mode is asked in process by transformers, one checkpoint in memory at a time, or through a running server with
OpenAI's interface. Each question is asked as the domain asks its own: template, system turn, sampling and budget
are those of the recipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, ThinkSwitchKeys
from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.engines import connection, servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.template import SWITCH
from thinkswitch_plugin.judging import compare
from thinkswitch_plugin.router.classifier import Router
from thinkswitch_plugin.router.make_switch import stored_switch
from thinkswitch_plugin.run import MODES, Run, checkpoint, open_run
from thinkswitch_plugin.run.progress import Bar

if TYPE_CHECKING:
    from thinkswitch_plugin.engines.client import Unanswered
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine

Question = str | Mapping[str, Any]  # a text, or a row with `question` (`prompt`, `problem`) and other fields
STDIN = "-"


@dataclass(frozen=True)
class Routed:
    """One question, who was asked, and what it said.

    Attributes:
        p_think: the router's probability that thinking is needed.
        said: None where the server gave no answer to this question; `problem` says why.
    """

    question: str
    mode: str
    p_think: float
    said: compare.Answer | None
    problem: str | None = None

    @property
    def answer(self) -> str | None:
        """The answer without its trace."""
        return self.said.answer if self.said else None

    @property
    def tokens(self) -> int:
        """Generated tokens, the trace's among them."""
        return self.said.tokens if self.said else 0

    def row(self) -> dict[str, Any]:
        """A line of the output file."""
        found = {"question": self.question, "mode": self.mode, "p_think": round(self.p_think, 6)}
        if self.said is None:
            return {**found, "error": self.problem}
        said = self.said
        return {
            **found,
            "answer": said.answer,
            "trace": said.trace,
            "outcome": said.outcome,
            "tokens": said.tokens,
            "cut": said.cut,
        }


class Speaker(Protocol):
    """Whoever answers for a mode."""

    def prepare(self, mode: str) -> None:
        """Load what the mode needs; its time is no answer's."""

    def ask(self, mode: str, bodies: Sequence[dict[str, Any]], bar: Bar) -> list[dict[str, Any] | Unanswered]:
        """Chat completions for these request bodies, in order."""


class InProcess:
    """Both checkpoints by transformers; the one that was asked last stays in memory."""

    def __init__(self, checkpoints: Mapping[str, str], batch: int) -> None:
        self.checkpoints, self.batch = checkpoints, batch
        self.mode: str | None = None
        self.engine: EmbeddedEngine | None = None

    def prepare(self, mode: str) -> None:
        """Load the mode's checkpoint. Raises `ThinkSwitchError` if it or its weights are not there."""
        from thinkswitch_plugin.engines.embedded import EmbeddedEngine, free_memory

        if self.engine is not None and self.mode == mode:
            return
        folder = Path(self.checkpoints[mode])
        if not (folder / "config.json").is_file():
            raise ThinkSwitchError(f"There is no {mode} checkpoint {folder}; `make iterate` makes it.")
        checkpoint.require_weights(folder)
        self.engine = None  # before the other one takes its memory
        free_memory()
        self.engine, self.mode = EmbeddedEngine(folder), mode

    def ask(self, mode: str, bodies: Sequence[dict[str, Any]], bar: Bar) -> list[dict[str, Any] | Unanswered]:
        """Answer in batches."""
        import torch

        self.prepare(mode)
        assert self.engine is not None
        torch.manual_seed(bodies[0]["seed"])
        found: list[dict[str, Any] | Unanswered] = []
        for _, reply in self.engine.stream([{"body": body} for body in bodies], self.batch):
            found.append(reply)
            bar.update()
        return found


class Served:
    """One mode through a running server."""

    def __init__(self, url: str, model: str, keys: EngineKeys, *, both: bool) -> None:
        """Args: both: the server answers for both modes, and its chat template chooses by `enable_thinking`."""
        self.server, self.model, self.keys, self.both = servers.connect(url, model), model, keys, both

    def prepare(self, mode: str) -> None:
        """Nothing: the server runs."""

    def ask(self, mode: str, bodies: Sequence[dict[str, Any]], bar: Bar) -> list[dict[str, Any] | Unanswered]:
        """Answer many at once. Raises `ThinkSwitchError` if the server goes away."""
        from thinkswitch_plugin.engines.client import ask_all

        extra = {"chat_template_kwargs": {SWITCH: mode == "thinking"}} if self.both else {}
        return ask_all(self.server, self.model, [{**body, **extra} for body in bodies], self.keys, bar.update)


def served_name(url: str, mode: str, checkpoints: Mapping[str, str], *, alone: bool) -> tuple[str, bool]:
    """The name under which a server answers for a mode, and whether it answers for both.

    Args:
        alone: nothing else is asked there, so a server of one model needs no particular name.

    Raises `ThinkSwitchError` if no server answers there, or none of its models is the mode's.
    """
    served = connection.served_models(url)
    both = set(MODES) <= set(served)
    name = next((name for name in (mode, checkpoints[mode]) if name in served), None)
    others = {name for other in MODES if other != mode for name in (other, checkpoints[other])}
    if name is None and alone and len(served) == 1 and served[0] not in others:
        (name,) = served
    if name is None:
        raise ThinkSwitchError(
            f"The server at {url} serves {', '.join(served) or 'nothing'}; none of these is `{mode}` or "
            f"{checkpoints[mode]}. Start one that is: `make serve MODEL={checkpoints[mode]}` for one mode, "
            "`make export-loras` and `make serve` for both; then run the same command again."
        )
    return name, both


class Switch:
    """A finished pair behind its router."""

    def __init__(
        self,
        run: Run,
        checkpoints: Mapping[str, str],
        router: Router,
        threshold: float,
        speakers: Mapping[str, Speaker],
    ) -> None:
        self.run, self.checkpoints, self.router = run, checkpoints, router
        self.threshold, self.speakers = threshold, speakers
        self._tokenizers: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        run: str | Path,
        *,
        iteration: int | None = None,
        threshold: float | None = None,
        url: str = "",
        instruct_url: str = "",
        thinking_url: str = "",
    ) -> Switch:
        """The switch of a run.

        Args:
            run: its folder, RUNS/DOMAIN.
            iteration: whose pair and router; None is the last one that has a router.
            threshold: think where p(think) is at least this; None is the default that `make switch` chose.
            url: a running server that answers for both modes, such as `make serve ITER=2` starts.
            instruct_url, thinking_url: a running server for one mode; a mode without one is asked in process.

        Raises:
            ThinkSwitchError: no run, no router yet, no server there, or one that serves something else.
        """
        if url and (instruct_url or thinking_url):
            raise ThinkSwitchError("Give either one address for both modes, or one of each mode.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ThinkSwitchError(f"The threshold {threshold:g} is no probability; use a number from 0 to 1.")
        opened = open_run(Path(run))
        k = last_with_router(opened) if iteration is None else iteration
        router, default = stored_switch(opened, k)
        keys = opened.recipe.keys
        checkpoints = {mode: opened.checkpoint(mode, k) for mode in MODES}
        addresses = {"instruct": instruct_url or url, "thinking": thinking_url or url}
        here = InProcess(checkpoints, keys.engine.concurrency)
        speakers: dict[str, Speaker] = {}
        for mode, address in addresses.items():
            speakers[mode] = here
            if address:
                chosen = servers.choose(address)
                name, both = served_name(chosen, mode, checkpoints, alone=len(set(addresses.values())) == 2)
                speakers[mode] = Served(chosen, name, keys.engine, both=both)
        return cls(opened, checkpoints, router, default if threshold is None else threshold, speakers)

    @property
    def keys(self) -> ThinkSwitchKeys:
        """The recipe's keys."""
        return self.run.recipe.keys

    def p_think(self, question: Question) -> float:
        """The probability that a question needs thinking; no checkpoint is asked."""
        return float(self.router.p_think([self.asked(question)[1]])[0])

    def answer(self, question: Question) -> Routed:
        """Ask one question. Raises `ThinkSwitchError` if it cannot be asked or is not answered."""
        (found,) = self.answer_all([question])
        if found.said is None:
            raise ThinkSwitchError(f"The server gave no answer to this question: {found.problem}.")
        return found

    def answer_all(self, questions: Iterable[Question]) -> list[Routed]:
        """Ask many questions, in order; all of one mode before those of the other.

        Raises `ThinkSwitchError` if one cannot be asked, or a server goes away; a question that a server refuses
        is in the result with its `problem`.
        """
        asked = [self.asked(question) for question in questions]
        p = self.router.p_think([text for _, text in asked])
        think = p >= self.threshold
        found: dict[int, Routed] = {}
        with Bar(len(asked), "answer", unit="answer") as bar:
            for mode in MODES:
                numbers = [i for i in range(len(asked)) if bool(think[i]) == (mode == "thinking")]
                for i, said in zip(numbers, self._ask(mode, [asked[i][1] for i in numbers], bar), strict=True):
                    routed = Routed(asked[i][0], mode, float(p[i]), None)
                    found[i] = (
                        replace(routed, said=said)
                        if isinstance(said, compare.Answer)
                        else replace(routed, problem=str(said))
                    )
        return [found[i] for i in range(len(asked))]

    def asked(self, question: Question) -> tuple[str, str]:
        """A question as it was given, and as the domain's template asks it."""
        row = {"question": question} if isinstance(question, str) else dict(question)
        name = next((name for name in ("question", *prompts.QUESTION_FIELDS) if name in row), None)
        text = row.pop(name) if name else None
        if not isinstance(text, str) or not text.strip():
            raise ThinkSwitchError("there is no question: it is missing, empty or not text.")
        return text, prompts.as_asked(self.keys.prompts, text, row)[0]

    def _ask(self, mode: str, texts: Sequence[str], bar: Bar) -> list[compare.Answer | Unanswered]:
        if not texts:
            return []
        bar.note(mode)
        name = self.checkpoints[mode]
        bodies = [
            prompts.request_body(name, prompts.messages(self.keys.prompts, text), self.keys.sampling, self.run.seed)
            for text in texts
        ]
        self.speakers[mode].prepare(mode)
        started = time.monotonic()
        replies = self.speakers[mode].ask(mode, bodies, bar)
        seconds = (time.monotonic() - started) / len(replies)
        tokenizer = self._tokenizer(mode)
        return [
            compare.read_reply(mode, name, reply, seconds, tokenizer) if isinstance(reply, dict) else reply
            for reply in replies
        ]

    def _tokenizer(self, mode: str) -> Any:
        if mode not in self._tokenizers:
            from transformers import AutoTokenizer

            self._tokenizers[mode] = AutoTokenizer.from_pretrained(self.checkpoints[mode])
        return self._tokenizers[mode]


def last_with_router(run: Run) -> int:
    """The last iteration that has a router, or where there is none the last finished one, for the sentence."""
    routers = (k for k in range(run.iterations, -1, -1) if (run.iteration(k) / "switch" / "router.skops").is_file())
    found = next(routers, None)
    return compare.last_finished(run) if found is None else found


def answer_one(switch: Switch, question: str) -> Routed:
    """Ask one question and print the answer, who gave it, p(think) and tokens."""
    found = switch.answer(question)
    sign = "≥" if found.mode == "thinking" else "<"
    title = f"{found.mode} (p(think) = {found.p_think:.3f} {sign} {switch.threshold:.3f})"
    assert found.said is not None
    compare.show(question, [replace(found.said, title=title)])
    return found


def answer_file(switch: Switch, source: str, out: Path | None) -> list[Routed]:
    """Ask every row of a JSONL file, or of the standard input; write one row each, in the same order.

    A row holds `question` (or `prompt`, `problem`), further fields of the domain's template, and an `id` if it
    likes. The counts go to the standard error, so that the standard output is JSONL and nothing else.

    Raises `ThinkSwitchError` naming the line of a row that cannot be asked.
    """
    path = Path("/dev/stdin") if source == STDIN else Path(source)
    rows = []
    for number, row in files.read_jsonl(path):
        try:
            switch.asked(row)
        except ThinkSwitchError as problem:
            where = "standard input" if source == STDIN else str(path)
            raise ThinkSwitchError(f"{where}, line {number}: {problem}") from None
        rows.append(row)
    if not rows:
        raise ThinkSwitchError(f'{source} holds no questions; write one a line: {{"question": "…"}}')
    found = switch.answer_all(rows)
    lines = [
        files.dumps_line({**({"id": row["id"]} if "id" in row else {}), **routed.row()})
        for row, routed in zip(rows, found, strict=True)
    ]
    if out is None:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.flush()
    else:
        with files.atomic_file(out) as handle:
            handle.writelines(lines)
    print(counts(found), file=sys.stderr, flush=True)
    return found


def counts(found: Sequence[Routed]) -> str:
    """How many questions each mode answered, and with how many tokens, in one line."""
    parts = []
    for mode in MODES:
        of_mode = [one for one in found if one.mode == mode]
        parts.append(f"{len(of_mode)} by {mode} ({sum(one.tokens for one in of_mode):,} tokens)")
    failed = sum(one.said is None for one in found)
    text = (
        f"{len(found)} questions: {', '.join(parts)}, {sum(o.tokens for o in found) / len(found):.1f} tokens a question"
    )
    return text + (f"; {failed} not answered" if failed else "")
