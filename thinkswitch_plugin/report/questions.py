"""Every question of a run with what each checkpoint answered, in compressed blocks for the page.

A block is base64(gzip(JSON)) of at most 100 questions; the page opens one when it is needed:

    [{"prompt": "7*3+4*2", "gold": "9", "checkpoints": [
        {"line": 13, "correct": [true], "found": ["9"], "tokens": [19], "truncated": [false],
         "texts": [{"trace": "7*3=1\\n…", "answer": "9"}]}, …]}, …]

and the index, packed in the same way, says of all questions what a list and its filters need. Rows are read
one at a time by their place in the samples file, so memory does not grow with the length of the texts.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from thinkswitch_plugin import files
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.rows import rows_by_key
from thinkswitch_plugin.data.traces import LENGTH
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample
from thinkswitch_plugin.judging.samples import Row, newest, read_rows
from thinkswitch_plugin.report.build import Evaluation

BLOCK = 100  # questions
START = 140  # characters of a prompt that the list shows
TEXT_BUDGET = 40_000_000  # characters of completions in the whole page
PROMPT_BUDGET = 20_000_000
LONGEST, SHORTEST = 20_000, 400  # characters of one text
Found = tuple[files.Line, dict[str, Any]] | None  # a question's line and its row


@dataclass(frozen=True)
class Limits:
    """How much of every question the page shows; the rule is stated in the page.

    Attributes:
        samples: completions shown of a question and checkpoint, the first ones.
        completion: characters of one completion.
        prompt: characters of one prompt.
    """

    samples: int
    completion: int
    prompt: int

    @classmethod
    def of(cls, questions: int, checkpoints: int, k: int) -> Limits:
        """What fits into the budgets: as many samples as can have `SHORTEST` characters each, but one."""
        each = TEXT_BUDGET // max(1, questions * checkpoints)
        samples = max(1, min(k, each // SHORTEST))
        return cls(
            samples,
            max(SHORTEST, min(LONGEST, each // samples)),
            max(SHORTEST, min(LONGEST, PROMPT_BUDGET // max(1, questions))),
        )


@dataclass
class Questions:
    """The questions of a run; iterate over `blocks()` first, then take `index()`."""

    judged: Sequence[Evaluation]
    folder: Path  # of the run; files are named as seen from there
    limits: Limits = field(init=False)
    doc_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.doc_ids = list(dict.fromkeys(s.doc_id for e in self.judged for s in e.samples))
        self.k = max(len(s.correct) for e in self.judged for s in e.samples)
        self.limits = Limits.of(len(self.doc_ids), len(self.judged), self.k)
        self._starts: list[str] = []
        self._golds: list[str] = []
        self._by_id = [{s.doc_id: s for s in e.samples} for e in self.judged]

    def blocks(self) -> Iterator[str]:
        """The packed blocks, in order. Raises `ThinkSwitchError` if a samples file is not what was graded."""
        with ExitStack() as stack:
            rows = [stack.enter_context(rows_by_key(e.path, lambda _, row: row.get("doc_id"))) for e in self.judged]
            prompts = Prompts(self.judged[0].path.parent)
            for start in range(0, len(self.doc_ids), BLOCK):
                group = self.doc_ids[start : start + BLOCK]
                yield pack([self._question(doc_id, [get(doc_id) for get in rows], prompts) for doc_id in group])

    def _question(self, doc_id: int, found: Sequence[Found], prompts: Prompts) -> dict[str, Any]:
        checkpoints: list[dict[str, Any] | None] = []
        prompt, gold = "", ""
        for line, e, samples in zip(found, self.judged, self._by_id, strict=True):
            sample = samples.get(doc_id)
            if (sample is None) != (line is None):
                raise ThinkSwitchError(
                    f"{e.path}: not the questions that were graded; delete {e.path.parent} and run `make iterate`."
                )
            if line is None or sample is None:
                checkpoints.append(None)
                continue
            where, row = line[0], Row.of(line[1], str(line[0]))
            prompt, gold = prompt or prompts.of(row), gold or row.gold
            checkpoints.append({"line": where.number, **self._checkpoint(row, sample, e.how)})
        self._starts.append(" ".join(prompt[: 4 * START].split())[:START])
        self._golds.append(shorten(gold, START))
        limit = self.limits.prompt
        return {"prompt": shorten(prompt, limit), "gold": shorten(gold, limit), "checkpoints": checkpoints}

    def _checkpoint(self, row: Row, sample: Sample, how: Asked) -> dict[str, Any]:
        shown = zip(row.texts, sample.truncated, strict=True)
        return {
            "correct": sample.correct,
            "found": [text if text is None else shorten(text, SHORTEST) for text in sample.found],
            "tokens": sample.tokens,
            "truncated": sample.truncated,
            "texts": [self._text(text, how, cut) for text, cut in itertools.islice(shown, self.limits.samples)],
        }

    def _text(self, text: str, how: Asked, cut: bool) -> dict[str, str | None]:
        done = how.split({"content": text}, LENGTH if cut else None)
        limit = self.limits.completion
        answer = None if done.answer is None else shorten(done.answer, limit // 2)
        rest = limit - len(answer or "")
        return {"trace": None if done.trace is None else shorten(done.trace, rest), "answer": answer}

    def index(self) -> str:
        """What the list and the filters need of all questions, packed; after `blocks()`."""
        return pack(
            {
                "block": BLOCK,
                "id": self.doc_ids,
                "start": self._starts,
                "gold": self._golds,
                "checkpoints": [
                    {
                        "iteration": e.iteration,
                        "mode": e.mode,
                        "file": os.path.relpath(e.path, self.folder),
                        # One letter a question: right, wrong, or not asked; then what its filters need.
                        "verdict": self._letters(samples, lambda sample: sample.vote, "-"),
                        "truncated": self._letters(samples, lambda sample: any(sample.truncated)),
                        "unread": self._letters(samples, lambda sample: not sample.answered),
                        "right": None
                        if self.k == 1
                        else [sum(s.correct) if (s := samples.get(n)) else None for n in self.doc_ids],
                    }
                    for e, samples in zip(self.judged, self._by_id, strict=True)
                ],
                "k": self.k,
            }
        )

    def _letters(self, samples: dict[int, Sample], shown: Callable[[Sample], bool], none: str = "0") -> str:
        return "".join(str(int(shown(samples[n]))) if n in samples else none for n in self.doc_ids)


class Prompts:
    """The text of a question, without the markup of the chat format if it can be removed."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: where lm-eval's results file lies, which names the task's template."""
        configs = files.read_json(newest(folder, "results_*.json")).get("configs") or {}
        config = next((c for c in configs.values() if isinstance(c, dict)), {})
        text = config.get("doc_to_text")
        # Rendered as by lm-eval; the result is used only if it occurs in the text that was sent.
        environment = SandboxedEnvironment(keep_trailing_newline=True)
        try:
            self._template = environment.from_string(text) if isinstance(text, str) else None
        except (TemplateError, RecursionError):
            self._template = None

    def of(self, row: Row) -> str:
        """The prompt of one row of a samples file."""
        sent = sent_text(row.sent)
        if self._template is not None:
            try:
                text = self._template.render(row.doc)
            except Exception:  # a template may compute anything with a row
                return sent
            if text.strip() and text.strip() in sent:
                return text.strip()
        return sent


def asked_texts(samples: Path) -> dict[int, str]:
    """What each question of one of lm-eval's samples files said to the model, by doc_id, in the order of the file."""
    prompts = Prompts(samples.parent)
    return {row.doc_id: prompts.of(row) for row in read_rows(samples)}


def sent_text(sent: Any) -> str:
    """What lm-eval sent: rendered text, or the messages of a chat, which it keeps as JSON in a list."""
    if isinstance(sent, list) and sent:
        sent = sent[0]
    if isinstance(sent, str) and sent.startswith("[{"):
        try:
            messages = orjson.loads(sent)
            return "\n\n".join(str(message["content"]) for message in messages)
        except (orjson.JSONDecodeError, TypeError, KeyError):
            return sent
    return str(sent)


def shorten(text: str, limit: int) -> str:
    """A text of at most about `limit` characters: its start and its end, and how much was left out between."""
    if len(text) <= limit:
        return text
    start = limit * 3 // 5
    end = limit - start
    return f"{text[:start]}\n[… {len(text) - limit:,} characters left out …]\n{text[-end:]}"


def pack(value: Any) -> str:
    """base64(gzip(JSON)): letters that can stand inside a `<script>` element whatever the texts hold."""
    return base64.b64encode(gzip.compress(orjson.dumps(value), compresslevel=6, mtime=0)).decode("ascii")
