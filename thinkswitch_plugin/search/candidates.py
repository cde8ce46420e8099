"""Evaluate merge configs one after the other with lm-eval: what a sweep and an ablation share.

A candidate is a merge config that is never published. It lives only in memory: one engine
answers for all candidates, and is given the weights of each in turn (`merging/holding.py`).
Its folder holds lm-eval's own samples file and

    candidate.json   {"settings": {…}, "seconds": 1.6, "figures": {"mean@k": …}, "questions": {…}}

which is written last, so a candidate is done or it is not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.conventions import as_metadata
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import Sampling, batch_size, evaluate, quiet, uses_server
from thinkswitch_plugin.judging.figures import Sample, interval, pass_at_k, summarize
from thinkswitch_plugin.judging.samples import samples_of
from thinkswitch_plugin.judging.verdict import how_read
from thinkswitch_plugin.merging.vocabulary import renamed_tokens, write_with_names
from thinkswitch_plugin.run import locked
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.progress import Bar
from thinkswitch_plugin.run.stamp import folder_once, stored
from thinkswitch_plugin.search.pair import Pair, Template

if TYPE_CHECKING:
    from thinkswitch_plugin.engines.ask import Asker
    from thinkswitch_plugin.merging.holding import MergeJob

STAMP = "candidate.json"
ELSEWHERE = ".tasks"  # where the machines of a cluster write


@dataclass(frozen=True)
class Candidate:
    """One merge config with real folders in it, and how it is sampled.

    Args:
        name: its folder under the work folder.
        config: what mergekit is given.
        identity: the same config with roles for folders, so that moving a run changes nothing.
    """

    name: str
    config: dict[str, Any]
    identity: dict[str, Any]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Bench:
    """What all candidates of one job share.

    Args:
        work: the folder of the job; candidates' folders lie in it.
        mode: whose tokenizer and chat template all candidates get; the folder `template` holds them.
        inputs: role → hash of every checkpoint that is merged.
        task: hash of every file that the lm-eval task is made of.
    """

    pair: Pair
    work: Path
    mode: Template
    template: Path
    inputs: dict[str, str]
    task: dict[str, str | None]

    @property
    def keys(self) -> ThinkSwitchKeys:
        """The recipe's."""
        return self.pair.keys

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the chat template."""
        return self.keys.pair.arguments(self.mode)

    @property
    def served(self) -> bool:
        """Whether vLLM answers, not transformers in process."""
        return uses_server(self.keys.evaluation, self.pair.engine)

    @property
    def log(self) -> Path:
        """Where lm-eval's output goes."""
        return self.work / "logs" / "lm_eval.log"

    @property
    def job(self) -> MergeJob:
        """What holds the candidates needs to know."""
        from thinkswitch_plugin.merging.holding import MergeJob

        return MergeJob(
            skeleton=self.pair.roles["thinking"],
            template=self.template,
            keys=self.keys.engine,
            work=self.work,
            log=self.log.with_name("vllm.log"),
            batch=batch_size(self.keys.evaluation, self.keys.engine),
            seed=self.pair.seed,
        )

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        """Everything a candidate's figures depend on; if one changes, it is evaluated again."""
        return {
            "config": candidate.identity,
            "inputs": self.inputs,
            "sampling": asdict(candidate.sampling),
            "template": self.mode,
            "evaluation": self.keys.evaluation.changing_figures(),
            "task": self.task,
            "answer": self.keys.answers.kind,
            **as_metadata(self.keys.convention),
            **self.keys.pair.asked_with(self.mode),
            "server": self.served,
            "seed": self.pair.seed,
        }


@contextmanager
def bench_of(pair: Pair, work: Path, mode: Template, used: Sequence[str]) -> Iterator[Bench]:
    """What all candidates of one job share, with the pair's folder locked.

    Args:
        used: the roles whose checkpoints the candidates are made of.
    """
    with locked(pair.home):
        hashes = Hashes(pair.home)
        inputs = {name: str(hashes.of(pair.roles[name])) for name in sorted(set(used))}
        task = pair.task_hashes(hashes)
        hashes.save()
        yield Bench(pair, work, mode, _tokenizer(pair, mode, work / "tokenizer"), inputs, task)


def _tokenizer(pair: Pair, mode: Template, folder: Path) -> Path:
    """A folder with the tokenizer and chat template of all candidates, which must be able to write a trace."""
    source, thinking = pair.roles[mode], pair.roles["thinking"]
    if not renamed_tokens(source, thinking):
        return source
    with files.atomic_folder(folder) as building:
        write_with_names(source, thinking, building)
    return folder


def finished(bench: Bench, candidate: Candidate) -> dict[str, Any] | None:
    """What is stored of a candidate, if it was evaluated with the same settings."""
    return stored(bench.work / candidate.name / STAMP, {"settings": bench.settings(candidate)})


def evaluate_all(bench: Bench, candidates: Sequence[Candidate], title: str) -> list[dict[str, Any]]:
    """Evaluate every candidate that is not evaluated yet; return what is stored of each, in order.

    Raises `ThinkSwitchError` if a merge or an evaluation fails; what is done stays done.
    """
    waiting = [candidate for candidate in candidates if finished(bench, candidate) is None]
    if waiting and bench.pair.cluster:
        _evaluate_in_cluster(bench, waiting, title)
    elif waiting:
        from thinkswitch_plugin.merging.holding import holding

        bar = Bar(len(candidates), title, initial=len(candidates) - len(waiting), unit="candidate")
        with holding("vllm" if bench.served else "embedded", bench.job) as holder:
            for candidate in waiting:

                def build(building: Path, candidate: Candidate = candidate) -> dict[str, Any]:
                    with quiet(bench.log):  # the candidates have a bar of their own
                        answer(bench, candidate, building, holder.hold(candidate.config))
                    samples = samples_of(building, bench.keys, str(bench.template))
                    return {"figures": figures(samples), "questions": by_question(samples)}

                folder_once(bench.work / candidate.name, STAMP, {"settings": bench.settings(candidate)}, build)
                bar.update(1)
        bar.close()
    return [files.read_json(bench.work / c.name / STAMP) for c in candidates]


def _evaluate_in_cluster(bench: Bench, candidates: Sequence[Candidate], title: str) -> None:
    """Have each candidate evaluated on some machine, and put what that wrote in its place."""
    from thinkswitch_plugin.run import cluster

    def put_in_place(name: str, folder: Path) -> None:
        (bench.work / name).parent.mkdir(parents=True, exist_ok=True)
        files.put_in_place(folder, bench.work / name)

    left = {candidate.name: (bench, candidate) for candidate in candidates}
    for candidate in candidates:  # what machines finished for a command that was killed
        for folder in (bench.work / ELSEWHERE).glob(f"*/{candidate.name}"):
            if candidate.name in left and stored(folder / STAMP, {"settings": bench.settings(candidate)}):
                put_in_place(candidate.name, folder)
                del left[candidate.name]
    cluster.scatter(bench.pair.cluster, evaluate_elsewhere, left, put_in_place, title)
    files.remove(bench.work / ELSEWHERE)


def evaluate_elsewhere(bench: Bench, candidate: Candidate) -> Path:
    """Evaluate one candidate in a folder of its own, which another attempt on a lost machine does not share."""
    from thinkswitch_plugin.run import cluster

    here = replace(bench.pair, cluster="")
    own = replace(bench, pair=here, work=bench.work / ELSEWHERE / uuid.uuid4().hex)
    try:
        evaluate_all(own, [candidate], candidate.name)
    except ThinkSwitchError as error:
        raise cluster.with_log(error, own.log) from None
    return own.work / candidate.name


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """`evaluation.summarize`, with Pass@k at the paper's k and intervals for Pass@k and Vote@k.

    Pass@k and Vote@k are right or wrong a question, so their intervals are Wilson's;
    Pass at a k below the number of samples is an estimate, bootstrapped over questions.
    """
    found = summarize(samples)
    k = found["k"]
    passed = {
        str(j): [pass_at_k(k, sum(s.correct), j) for s in samples] for j in sorted({1, 8, 32, 64, k}) if 1 < j <= k
    }
    return {
        **found,
        "pass_ci95": interval([float(any(s.correct)) for s in samples], 1),
        "vote_ci95": interval([float(s.vote) for s in samples], 1),
        "pass": {j: sum(values) / len(values) for j, values in passed.items()},
        "pass_at_ci95": {j: interval(values, k) for j, values in passed.items()},
    }


def by_question(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Per question: mean score, mean tokens, closed traces and whole completions (for paired statistics)."""
    k = len(samples[0].correct)
    return {
        "doc_id": [s.doc_id for s in samples],
        "score": [sum(s.correct) / k for s in samples],
        "tokens": [sum(s.tokens) / k for s in samples],
        "closed": [s.closed for s in samples],
        "whole": [s.whole for s in samples],
    }


def answer(bench: Bench, candidate: Candidate, out: Path, engine: Asker) -> None:
    """Have an engine that holds a candidate answer the task's questions."""
    from transformers import AutoTokenizer

    from thinkswitch_plugin.judging.model import ThinkSwitchLM

    tokenizer = AutoTokenizer.from_pretrained(bench.template)
    how, name = how_read(tokenizer, bench.keys.convention, bench.arguments), Path(candidate.name).name
    lm = ThinkSwitchLM(out, name, engine, bench.keys.engine, tokenizer, how, bench.log)
    evaluate(lm, bench.keys.evaluation, candidate.sampling, name=name)
