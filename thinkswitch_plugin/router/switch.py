"""Ask a pair: the router decides, question by question, whether instruct or thinking answers.

    from thinkswitch_plugin.router.switch import Switch

    switch = Switch.open("runs/arithmetic")
    print(switch.answer("7*3+4*2").answer)

A mode answers in process, one checkpoint in memory at a time, or through a running server with OpenAI's interface.
Each question is asked as the domain asks its own: template, system turn, sampling and budget are the recipe's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.engines import connection, servers
from thinkswitch_plugin.engines.ask import Asker, ask_in_order
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.template import SWITCH
from thinkswitch_plugin.judging import compare
from thinkswitch_plugin.judging.verdict import how_read
from thinkswitch_plugin.router.classifier import Router
from thinkswitch_plugin.router.make_switch import stored_switch
from thinkswitch_plugin.run import MODES, Run, checkpoint, open_run
from thinkswitch_plugin.run.progress import Bar

if TYPE_CHECKING:
    from thinkswitch_plugin.data.batch import Asked
    from thinkswitch_plugin.engines.client import ServedModel
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine
    from thinkswitch_plugin.engines.replies import Unanswered

Question = str | Mapping[str, Any]  # a text, or a row with `question` (`prompt`, `problem`) and other fields


@dataclass(frozen=True)
class Routed:
    """One question, the mode that was asked, and its reply.

    Attributes:
        p_think: the router's probability that thinking is needed.
        reply: None if the server gave no answer to this question; `problem` says why.
    """

    question: str
    mode: str
    p_think: float
    reply: compare.Answer | None
    problem: str | None = None

    @property
    def answer(self) -> str | None:
        """The answer without its trace."""
        return self.reply.answer if self.reply else None

    @property
    def tokens(self) -> int:
        """Generated tokens, the trace's among them."""
        return self.reply.tokens if self.reply else 0

    def row(self) -> dict[str, Any]:
        """A line of the output file."""
        found = {"question": self.question, "mode": self.mode, "p_think": round(self.p_think, 6)}
        if self.reply is None:
            return {**found, "error": self.problem}
        names = ("answer", "trace", "outcome", "tokens", "cut")
        return {**found, **{name: getattr(self.reply, name) for name in names}}


def served_name(
    url: str, mode: str, checkpoints: Mapping[str, str], *, alone: bool, hybrid: bool = False
) -> tuple[str, bool]:
    """The name under which a server answers for a mode, and whether it answers for both.

    Args:
        alone, hybrid: nothing else is asked there, or its one model has both modes, so it needs no particular name.

    Raises `ThinkSwitchError` if no server answers there, or none of its models is the mode's.
    """
    served = connection.served_models(url)
    both = set(MODES) <= set(served)
    name = next((name for name in (mode, checkpoints[mode]) if name in served), None)
    others = {name for other in MODES if other != mode for name in (other, checkpoints[other])}
    if name is None and len(served) == 1 and (hybrid or (alone and served[0] not in others)):
        name = served[0]
    if name is None:
        raise ThinkSwitchError(
            f"The server at {url} serves {', '.join(served) or 'nothing'}; none of these is `{mode}` or "
            f"{checkpoints[mode]}. Start one that is: `make serve MODEL={checkpoints[mode]}` for one mode, "
            "`make export-loras` and `make serve` for both; then run the same command again."
        )
    return name, both


class Switch:
    """A finished pair behind its router; `served` holds the modes that a running server answers for."""

    def __init__(
        self,
        run: Run,
        checkpoints: Mapping[str, str],
        router: Router,
        threshold: float,
        served: Mapping[str, ServedModel],
    ) -> None:
        self.run, self.checkpoints, self.router = run, checkpoints, router
        self.threshold, self.served = threshold, served
        self._loaded: tuple[str, EmbeddedEngine] | None = None  # the mode that was asked last in process
        self._read_as: dict[str, tuple[Any, Asked]] = {}  # the tokenizer of a mode, and how it is asked

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
            threshold: think if p(think) is at least this; None is the default that `make switch` chose.
            url: a running server that answers for both modes, such as `make serve ITERATION=2` starts.
            instruct_url, thinking_url: a running server for one mode; a mode without one answers in process.

        Raises:
            ThinkSwitchError: no run, no router yet, no server there, or one that serves something else.
        """
        if url and (instruct_url or thinking_url):
            raise ThinkSwitchError("Give either one address for both modes, or one of each mode.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ThinkSwitchError(f"The threshold {threshold:g} is not a probability; use a number from 0 to 1.")
        opened = open_run(Path(run))
        k = last_with_router(opened) if iteration is None else iteration
        router, default = stored_switch(opened, k)
        checkpoints = {mode: opened.checkpoint(mode, k) for mode in MODES}
        addresses = {"instruct": instruct_url or url, "thinking": thinking_url or url}
        served: dict[str, ServedModel] = {}
        for mode, address in addresses.items():
            if address:
                from thinkswitch_plugin.engines.client import ServedModel

                chosen = servers.choose(address)
                keys, alone = opened.recipe.keys, len(set(addresses.values())) == 2
                name, both = served_name(chosen.split(",")[0], mode, checkpoints, alone=alone, hybrid=keys.pair.hybrid)
                fields = {"chat_template_kwargs": {SWITCH: mode == "thinking"}} if both else {}
                served[mode] = ServedModel(servers.connect(chosen, name), name, keys.engine, fields)
        return cls(opened, checkpoints, router, default if threshold is None else threshold, served)

    def p_think(self, question: Question) -> float:
        """The probability that a question needs thinking; no checkpoint is asked."""
        return float(self.router.p_think([self.asked(question)[1]])[0])

    def answer(self, question: Question) -> Routed:
        """Ask one question. Raises `ThinkSwitchError` if it cannot be asked or is not answered."""
        (found,) = self.answer_all([question])
        if found.reply is None:
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
                for i, reply in zip(numbers, self._ask(mode, [asked[i][1] for i in numbers], bar), strict=True):
                    routed = Routed(asked[i][0], mode, float(p[i]), None)
                    answered = isinstance(reply, compare.Answer)
                    found[i] = replace(routed, **({"reply": reply} if answered else {"problem": str(reply)}))
        return [found[i] for i in range(len(asked))]

    def asked(self, question: Question) -> tuple[str, str]:
        """A question as it was given, and as the domain's template asks it."""
        row = {"question": question} if isinstance(question, str) else dict(question)
        name = next((name for name in ("question", *prompts.QUESTION_FIELDS) if name in row), None)
        text = row.pop(name) if name else None
        if not isinstance(text, str) or not text.strip():
            raise ThinkSwitchError("the question is missing, empty or not text.")
        return text, prompts.as_asked(self.run.recipe.keys.prompts, text, row)[0]

    def _ask(self, mode: str, texts: Sequence[str], bar: Bar) -> list[compare.Answer | Unanswered]:
        if not texts:
            return []
        bar.note(mode)
        name, keys, seed = self.checkpoints[mode], self.run.recipe.keys, self.run.seed
        if mode not in self._read_as:
            from transformers import AutoTokenizer

            tokenizer, convention = AutoTokenizer.from_pretrained(name), keys.convention if mode == "thinking" else None
            self._read_as[mode] = tokenizer, how_read(tokenizer, convention, keys.pair.arguments(mode))
        tokenizer, how = self._read_as[mode]
        bodies = [
            prompts.request_body(name, prompts.messages(keys.prompts, text), keys.sampling, seed) | how.fields()
            for text in texts
        ]
        asker: Asker = self.served[mode] if mode in self.served else self.in_process(mode)
        started = time.monotonic()
        replies = ask_in_order(asker, bodies, bar.update)
        seconds = (time.monotonic() - started) / len(replies)
        return [
            compare.read_reply(mode, name, reply, seconds, tokenizer, how) if isinstance(reply, dict) else reply
            for reply in replies
        ]

    def in_process(self, mode: str) -> EmbeddedEngine:
        """The mode's checkpoint in memory, in place of the other one's; seeded."""
        from transformers import set_seed

        from thinkswitch_plugin.engines.embedded import EmbeddedEngine

        if self._loaded is None or self._loaded[0] != mode:
            folder = Path(self.checkpoints[mode])
            if not (folder / "config.json").is_file():
                raise ThinkSwitchError(f"There is no {mode} checkpoint {folder}; `make iterate` makes it.")
            checkpoint.require_weights(folder)
            if self._loaded:
                self._loaded[1].close()
                self._loaded = None
            self._loaded = mode, EmbeddedEngine(folder, batch=self.run.recipe.keys.engine.concurrency)
        set_seed(self.run.seed)
        return self._loaded[1]


def last_with_router(run: Run) -> int:
    """The last iteration that has a router; without one the last finished iteration, for the sentence."""
    routers = (k for k in range(run.iterations, -1, -1) if (run.iteration(k) / "switch" / "router.skops").is_file())
    found = next(routers, None)
    return compare.last_finished(run) if found is None else found
