"""Export both modes as LoRAs of one base, compare them with the full checkpoints, and show what is lost.

iter-1/export/rank-64/{instruct,thinking}/   PEFT adapters with tokenizer, chat template and card
iter-1/export/rank-64/{instruct,thinking}.json   what they were made of and what is lost
iter-1/export/rank-64/eval/…                 lm-eval's results and samples of base + adapter, and the figures
iter-1/export/full/…                         the full checkpoints, if the run has not evaluated them so
iter-1/export/chat_template.jinja            one template for both modes
iter-1/export/export.json .md                the base, every rank, the scores, the rank that serves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import is_local, resolve_seed
from thinkswitch_plugin.engines.servers import MAX_LORA_RANKS, adapter_rank
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.extract import WEIGHTS, cut, extract, losses, require_extractable, require_plain_name
from thinkswitch_plugin.export.table import figures_row, keeps, markdown
from thinkswitch_plugin.export.template import chat_template, combined_template
from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint, uses_server
from thinkswitch_plugin.judging.figures import summarize
from thinkswitch_plugin.judging.samples import samples_of
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.report import cards
from thinkswitch_plugin.run import MODES, checkpoint, locked, open_run
from thinkswitch_plugin.run.hashes import CARD, Hashes
from thinkswitch_plugin.run.stamp import once, record, stored
from thinkswitch_plugin.search import pair as search
from thinkswitch_plugin.search.pair import Pair, PairOptions, few_questions, write_results


@dataclass(frozen=True)
class Base:
    """The checkpoint that both adapters belong to: its public name, and its local folder."""

    name: str
    folder: Path
    revision: str | None


def parse_ranks(text: str) -> list[int]:
    """`8 16 32` as numbers in order. Raises `ThinkSwitchError` for what no server takes."""
    words = text.replace(",", " ").split()
    largest = MAX_LORA_RANKS[-1]
    if not words or not all(word.isascii() and word.isdigit() and 0 < int(word) <= largest for word in words):
        raise ThinkSwitchError(f"RANK={text}: give whole numbers from 1 to {largest}, the largest rank vLLM serves.")
    return sorted({int(word) for word in words})


def find_pair(wanted: PairOptions) -> Pair:
    """The two checkpoints to export: those an iteration of a run ended with, or any two (both given).

    Raises `ThinkSwitchError` as `search.find_pair` does, or if only one of the two is given.
    """
    if bool(wanted.instruct) != bool(wanted.thinking):
        raise ThinkSwitchError("Give both checkpoints, INSTRUCT=folder THINKING=folder, or neither for those of a run.")
    subject = search.find_pair(wanted)
    if not subject.of_run:
        return subject
    # A sweep is about what thinking is rebuilt from; an export about what came of it.
    made = open_run(wanted.folder).made("thinking", wanted.iteration)
    return replace(subject, roles={**subject.roles, "thinking": made})


def find_base(subject: Pair, given: str) -> Base:
    """The base: the starting instruct checkpoint, one of the pair's by its role, or any folder or hub id.

    Raises `ThinkSwitchError` if there is none.
    """
    start = subject.home / "iter-0" / "pair.json"
    if not given and subject.of_run:
        found = files.read_json(start)["instruct"]
        return Base(found["name"], Path(found["path"]), found["revision"])
    if given in subject.roles and given != "base":
        return Base(str(subject.roles[given]), subject.roles[given], None)
    pair = subject.keys.pair
    names = {"": (resolve_seed(pair.instruct, subject.seed), pair.revision_instruct)}
    if pair.base:
        names["base"] = (resolve_seed(pair.base, subject.seed), None)
    name, revision = names.get(given, (given, None))
    folder, commit = checkpoint.resolve(name, revision, "base")
    return Base(name, folder, commit)


def export(subject: Pair, base: Base, ranks: Sequence[int]) -> dict[str, Any]:
    """Write and evaluate the adapters of every rank; return what `export.json` holds.

    What is there already and made of the same checkpoints is kept. A mode whose checkpoint is the base itself
    needs no adapter.

    Raises:
        ThinkSwitchError: the three checkpoints do not match, mergekit cannot extract adapters from them, an engine
            failed, the disk is too full.
    """
    out = subject.out / "export"
    modes = {mode: subject.roles[mode] for mode in MODES}
    for folder in (base.folder, *modes.values(), out):
        require_plain_name(folder)
    for folder in modes.values():
        require_compatible(base.folder, folder)
    adapted = [mode for mode in MODES if modes[mode].resolve() != base.folder.resolve()]
    if not adapted:
        raise ThinkSwitchError("Both checkpoints are the base itself; there is nothing to export.")
    for mode in adapted:
        require_extractable(base.folder, modes[mode])
    with locked(subject.home):
        template = combined_template(modes["instruct"], modes["thinking"], subject.keys.pair.chat_template_kwargs)
        files.write_text(out / "chat_template.jinja", template)
        hashes = Hashes(subject.home)
        checkpoints = {str(path): str(hashes.of(path)) for path in (base.folder, *modes.values())}
        job = Job(subject, base, out, checkpoints, subject.task_hashes(hashes))
        hashes.save()
        result = subject.described() | job.result(adapted, ranks)
        write_results(out / "export.json", result)
        lines = markdown(result)
        files.write_text(out / "export.md", "\n".join([*lines, ""]))
    console.say("\n".join(lines))
    console.say(f"  {out / 'export.json'}, export.md; serve both: make serve, or the command in docs/serving.md")
    return result


@dataclass(frozen=True)
class Job:
    """One export: the pair, its base, where the files go, and the hashes of the checkpoints and the task's files by their paths."""

    subject: Pair
    base: Base
    out: Path
    hashes: dict[str, str]
    task: dict[str, str | None]

    def result(self, adapted: Sequence[str], ranks: Sequence[int]) -> dict[str, Any]:
        """The full checkpoints and the adapters of these modes at every rank, and the smallest rank that does as they do."""
        full = {mode: self.figures(mode) for mode in MODES}
        rows = {mode: self.adapters(mode, ranks) for mode in adapted}
        every: list[dict[str, Any]] = []
        for rank, *made in zip(ranks, *rows.values(), strict=True):
            one = dict(zip(rows, made, strict=True))
            kept = {mode: keeps(full[mode], row["figures"], mode) for mode, row in one.items()}
            every.append({"rank": rank, "kept": kept, **one})
        enough = [row["rank"] for row in every if all(row["kept"].values())]
        weights = {mode: self.subject.roles[mode].glob("*.safetensors") for mode in MODES}
        return {
            "base": {"name": self.base.name, "path": str(self.base.folder), "revision": self.base.revision},
            "full": full,
            "full_bytes": {mode: sum(map(files.size, shards)) for mode, shards in weights.items()},
            "ranks": every,
            "rank": enough[0] if enough else ranks[-1],
            "kept": bool(enough),
        }

    def adapters(self, mode: str, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of a mode's adapter at every rank, making and evaluating what is not there yet."""
        self.make(mode, [rank for rank in ranks if stored(*self.stamp(mode, rank)) is None])
        rows = []
        for rank in ranks:
            made, figures = files.read_json(self.stamp(mode, rank)[0]), self.figures(mode, rank)
            self.write_card(mode, Path(made["path"]), made, figures)
            rows.append({**{key: v for key, v in made.items() if key != "made_of"}, "figures": figures})
        return rows

    def made_of(self, mode: str, rank: int | None) -> dict[str, Any]:
        """What a mode's adapter depends on; without a rank, what its full checkpoint is."""
        whole = {"checkpoint": self.hashes[str(self.subject.roles[mode])]}
        return {**whole, "base": self.hashes[str(self.base.folder)], "rank": rank} if rank else whole

    def stamp(self, mode: str, rank: int) -> tuple[Path, dict[str, Any], tuple[Path]]:
        """An adapter's stamp, its key and its folder."""
        adapter = self.out / f"rank-{rank}" / mode
        return adapter.with_suffix(".json"), {"made_of": self.made_of(mode, rank)}, (adapter,)

    def make(self, mode: str, ranks: Sequence[int]) -> None:
        """Make the adapters of these ranks: the largest is extracted, a smaller one is its leading part."""
        from transformers import AutoTokenizer

        if not ranks:
            return
        source = self.subject.roles[mode]
        # Two factors of a matrix are seldom larger than it, so an adapter stays below the checkpoint.
        files.require_space(self.out, files.size(source), "the export of adapters")
        template = chat_template(AutoTokenizer.from_pretrained(source), source)
        stamps = [self.stamp(mode, rank) for rank in ranks]
        largest = files.temporary_sibling(self.out / f"extracted-{mode}")
        files.remove(largest)
        try:
            log = self.out / "logs" / f"extract-{mode}.log"
            seconds = extract(self.base.folder, source, largest, ranks[-1], log)
            for rank, (stamp, _, (adapter,)) in zip(ranks, stamps, strict=True):
                stamp.unlink(missing_ok=True)
                with files.atomic_folder(adapter) as folder:
                    cut(largest, folder, rank, base=self.base.name, revision=self.base.revision)
                    checkpoint.adopt_mode(source, folder)
                    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        finally:
            files.remove(largest)
        lost = losses(self.base.folder, source, [adapter for _, _, (adapter,) in stamps])
        for (stamp, key, (adapter,)), loss in zip(stamps, lost, strict=True):
            found = {
                "path": str(adapter),
                "largest_rank": adapter_rank(adapter),
                "bytes": files.size(adapter / WEIGHTS),
            }
            record(stamp, key, {**found, "seconds_of_extraction": round(seconds, 2), **loss})

    def figures(self, mode: str, rank: int | None = None) -> dict[str, Any]:
        """The figures of a mode's full checkpoint, or of base and adapter, by lm-eval; those stored if nothing has changed.

        A full checkpoint that its run has evaluated in the same way is not evaluated again.
        """
        subject, keys = self.subject, self.subject.keys
        model = str(subject.roles[mode])
        if subject.of_run and rank is None:
            run = open_run(subject.home)
            judged = run.iteration(subject.iteration or 0) / "eval" / mode
            if judged.is_dir() and run.recipe.keys.evaluation == keys.evaluation:
                return summarize(samples_of(judged, keys, model))
        place = self.out / (f"rank-{rank}" if rank else "full")
        judged = place / "eval" / f"{mode}{few_questions(subject)}"

        def evaluate(resumes: bool) -> dict[str, Any]:
            asked = str(self.base.folder) if rank else model
            evaluate_checkpoint(
                checkpoint.Subject(asked, keys.pair.arguments(mode), place / mode if rank else None),
                judged,
                keys,
                subject.engine,
                log=self.out / "logs" / f"{place.name}-{mode}.log",
                resume=resumes,
            )
            return {"figures": summarize(samples_of(judged, keys, model))}

        settings = {
            "made_of": self.made_of(mode, rank),
            "evaluation": keys.evaluation.changing_figures(),
            "task": self.task,
            "data": subject.data,
            **keys.pair.asked_with(mode),
            "answer": keys.answers.kind,
            "server": uses_server(keys.evaluation, subject.engine),
        }
        store = judged.with_name(f"{judged.name}.json")
        return dict(once(store, {"settings": settings}, (judged,), evaluate)["figures"])

    def write_card(self, mode: str, adapter: Path, made: dict[str, Any], figures: dict[str, Any]) -> None:
        """Write the model card of an adapter."""
        from huggingface_hub import ModelCardData

        source, keys, base = self.subject.roles[mode], self.subject.keys, self.base
        accuracy, interval, _, ratio = figures_row(figures)
        on_hub = not is_local(base.name)
        data = ModelCardData(
            base_model=base.name if on_hub else None,
            base_model_relation="adapter" if on_hub else None,
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["thinkswitch", keys.domain, "lora", "mergekit"],
            model_name=f"thinkswitch-{keys.domain}-{mode}-lora",
            eval_results=cards.eval_results(keys.evaluation.task, figures),
        )
        left_out = f"{100 * made['left_out']:.2f} % of the squared difference"
        facts = {
            "Base": f"`{base.name}`" + (f" at {base.revision}" if base.revision else ""),
            "Extracted from": f"`{source}` (sha256 {self.hashes[str(source)][:16]}…) by mergekit-extract-lora",
            "Rank": made["largest_rank"],
            "Relative error of the difference": f"{made['error']:.4f}",
            "Left as the base has it": f"norms, embeddings and output layer: {left_out}",
            f"mean@{figures['k']} of {figures['n']} questions, base and adapter": f"{accuracy} ({interval})",
            "Think ratio": ratio,
        }
        about = f"The {mode} mode of a pair made by [ThinkSwitch](https://arxiv.org/abs/2606.01080), for its base."
        files.write_text(
            adapter / CARD, str(cards.compose(data, f"{keys.domain}: {mode} mode as a LoRA", about, facts))
        )
