"""Rows from a file or the hub: evaluation sets, training prompts, and PubMedQA's official halves."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, StringConstraints, ValidationError

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "THINKSWITCH_DATA"
SUFFIXES = (".jsonl", ".csv", ".parquet")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
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
        # Arrow's own file: its threads would still let go of one of Python's while the interpreter ends, and abort.
        with pyarrow.OSFile(str(path)) as handle:
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


class AimeRow(BaseModel):
    """What the AIME task reads of a row."""

    problem: Text
    answer: StrictInt | Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[+-]?\d+$")]


class PubMedQAContext(BaseModel):
    """The paragraphs of an abstract."""

    contexts: Annotated[list[Text], Field(min_length=1)]


class PubMedQARow(BaseModel):
    """What the PubMedQA tasks read of a row."""

    pubid: StrictInt | Text
    question: Text
    context: PubMedQAContext
    final_decision: Literal["yes", "no", "maybe"]


def evaluation_rows(file_name: str, hub: str, config: str | None, shape: type[BaseModel], name: str) -> Dataset:
    """An evaluation set from THINKSWITCH_DATA where that is set, else from the hub.

    Args:
        shape: what every row must hold; other columns are kept.
        name: the column that tells one question from another.

    Raises `ThinkSwitchError` naming what is missing, or the row and field that is wrong.
    """
    from datasets import Dataset
    from pyarrow import ArrowInvalid, ArrowTypeError

    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        rows = load_hub(hub, config, "train", None)[0]
        check_rows(((f"{hub}, row {n}", row) for n, row in enumerate(rows, 1)), hub, shape, name)
        return rows
    for suffix in SUFFIXES:
        path = Path(folder) / f"{file_name}{suffix}"
        if path.exists():
            unit = "line" if suffix == ".jsonl" else "row"
            found = [(f"{path}, {unit} {n}", row) for n, row in read_file(path)]
            check_rows(found, str(path), shape, name)
            try:
                return Dataset.from_list([row for _, row in found])
            except (ArrowInvalid, ArrowTypeError) as error:
                raise ThinkSwitchError(f"{path}: a column holds values of different types: {error}.") from None
    raise ThinkSwitchError(f"{DATA_VARIABLE}={folder} holds no {file_name} as {', '.join(SUFFIXES)}.")


def check_rows(rows: Iterable[tuple[str, dict[str, Any]]], source: str, shape: type[BaseModel], name: str) -> None:
    """Raise `ThinkSwitchError` for the first row that cannot be asked and judged, for a question twice, or for no row.

    Args:
        rows: (where it stands, row).
    """
    seen: dict[str, str] = {}
    for where, row in rows:
        try:
            shape.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"][:2] if part not in ("int", "str"))
            reason = "is missing" if first["type"] == "missing" else f"cannot be used ({first['msg']})"
            raise ThinkSwitchError(f"{where}: `{at}` {reason}; the file needs the columns of the hub's set.") from None
        before = seen.setdefault(str(row[name]), where)
        if before != where:
            raise ThinkSwitchError(f"{where}: the same `{name}` as in {before.rpartition(', ')[2]}; remove one.")
    if not seen:
        raise ThinkSwitchError(f"{source} holds no rows.")


def aime_rows() -> Dataset:
    """AIME 2026: 30 problems."""
    return evaluation_rows("aime_2026", "MathArena/aime_2026", None, AimeRow, "problem")


def pubmedqa_rows() -> Dataset:
    """All labelled rows of PubMedQA."""
    return evaluation_rows("pubmedqa", "qiaojin/PubMedQA", "pqa_labeled", PubMedQARow, "pubid")


def pubmedqa_half(half: str) -> Dataset:
    """The rows of PubMedQA's official `test` half, or of the other one (`train`), in the set's order.

    A set of another size than the official 1,000 rows has no halves: all of it is the
    test set, and there is no training half.
    """
    rows = pubmedqa_rows()
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
