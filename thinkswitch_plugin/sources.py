"""Rows from a file or the hub: evaluation sets, training prompts, and PubMedQA's official halves."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "THINKSWITCH_DATA"
SUFFIXES = (".jsonl", ".csv", ".parquet")
PUBMEDQA_ROWS, PUBMEDQA_SUBSET = 1000, 30
# sha256 of the sorted test ids, one a line: proof that the split below is the official one.
PUBMEDQA_TEST_SHA256 = "406e3b89eff577ed38571eca5a5819734a6f49ac0437d171b6c64e5c3cd195f8"


def read_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) of a JSONL, CSV or Parquet file.

    Raises `ThinkSwitchError` naming the file, and the line where there is one.
    """
    if path.suffix not in SUFFIXES:
        raise ThinkSwitchError(f"{path}: use a file that ends in {', '.join(SUFFIXES)}.")
    if path.suffix == ".jsonl":
        yield from files.read_jsonl(path)
        return
    import pyarrow
    from pyarrow import csv, parquet

    try:
        with path.open("rb") as handle:
            if path.suffix == ".csv":
                # A quoted text may go on over several lines.
                table = csv.read_csv(handle, parse_options=csv.ParseOptions(newlines_in_values=True))
            else:
                table = parquet.read_table(handle)
    except pyarrow.ArrowException as error:
        raise ThinkSwitchError(
            f"{path} is no {path.suffix[1:].upper()} file: {str(error).splitlines()[0][:200].rstrip('.')}."
        ) from None
    except UnicodeDecodeError:
        raise ThinkSwitchError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise files.unreadable(path, error) from None
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def load_hub(name: str, config: str | None, split: str, revision: str | None) -> tuple[Dataset, str]:
    """A hub dataset and the commit it was resolved to.

    Raises `ThinkSwitchError` if the hub cannot be reached or has no such set.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        commit = revision if revision and len(revision) == 40 else HfApi().dataset_info(name, revision=revision).sha
        return load_dataset(name, config, split=split, revision=commit), str(commit)
    except Exception as error:  # the hub's client raises many types; all mean that there is no data
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ThinkSwitchError(
            f"The dataset {name} cannot be fetched from the hub: {reason.rstrip('.')}; check its name, the network and your access to it."
        ) from None


def evaluation_rows(file_name: str, hub: str, config: str | None) -> Dataset:
    """An evaluation set from THINKSWITCH_DATA where that is set, else from the hub.

    Raises `ThinkSwitchError` naming what is missing.
    """
    from datasets import Dataset

    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return load_hub(hub, config, "train", None)[0]
    for suffix in SUFFIXES:
        path = Path(folder) / f"{file_name}{suffix}"
        if path.is_file():
            return Dataset.from_list([row for _, row in read_file(path)])
    raise ThinkSwitchError(f"{DATA_VARIABLE}={folder} holds no {file_name} as {', '.join(SUFFIXES)}.")


def pubmedqa_rows() -> Dataset:
    """All labelled rows of PubMedQA."""
    return evaluation_rows("pubmedqa", "qiaojin/PubMedQA", "pqa_labeled")


def pubmedqa_half(half: str) -> Dataset:
    """The rows of PubMedQA's official `test` half, or of the other one (`train`), in the set's order.

    A set of another size than the official 1,000 rows has no halves: all of it is the
    test set, and there is no training half.
    """
    rows = pubmedqa_rows()
    for column in ("pubid", "question", "context", "final_decision"):
        if column not in rows.column_names:
            raise ThinkSwitchError(f"PubMedQA's rows have no column `{column}`; they have {rows.column_names}.")
    test = pubmedqa_test_ids(zip((str(i) for i in rows["pubid"]), rows["final_decision"], strict=True))
    chosen = [n for n, pubid in enumerate(rows["pubid"]) if (str(pubid) in test) == (half == "test")]
    return rows.select(chosen)


def pubmedqa_test_ids(labelled: Iterable[tuple[str, str]]) -> set[str]:
    """The official test ids, worked out by the published rule from (id, decision) in the set's order.

    The authors (pubmedqa/pubmedqa, preprocess/split_dataset.py) shuffle the ids of each decision, in the
    order yes, no, maybe, with Python's generator seeded 0, and take the second half of each.
    Raises `ThinkSwitchError` if 1,000 rows do not give the published ids.
    """
    by_decision: dict[str, list[str]] = {"yes": [], "no": [], "maybe": []}
    for pubid, decision in labelled:
        if decision not in by_decision:
            raise ThinkSwitchError(f"PubMedQA row {pubid}: `final_decision` is {decision!r}; use yes, no or maybe.")
        by_decision[decision].append(pubid)
    total = sum(len(ids) for ids in by_decision.values())
    if total != PUBMEDQA_ROWS:
        return {pubid for ids in by_decision.values() for pubid in ids}
    generator = random.Random(0)
    test: set[str] = set()
    for ids in by_decision.values():
        generator.shuffle(ids)
        test.update(ids[math.ceil(len(ids) / 2) :])
    if hashlib.sha256("\n".join(sorted(test)).encode()).hexdigest() != PUBMEDQA_TEST_SHA256:
        raise ThinkSwitchError(
            "PubMedQA's rows are not in their published order, so the official test half cannot be told; "
            "use the file as it comes from qiaojin/PubMedQA, config pqa_labeled."
        )
    return test


def pubmedqa_subset() -> Dataset:
    """The fixed 30 questions: those of the test half whose ids have the smallest sha256."""
    rows = pubmedqa_half("test")
    order = sorted(range(len(rows)), key=lambda n: hashlib.sha256(str(rows[n]["pubid"]).encode()).hexdigest())
    return rows.select(sorted(order[:PUBMEDQA_SUBSET]))
