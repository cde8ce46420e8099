"""Rows from a file or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError, first_line, not_fetched

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".csv", ".parquet")


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
        raise ThinkSwitchError(f"{path} is not a {path.suffix[1:].upper()} file: {first_line(error)}.") from None
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
        raise not_fetched(f"The dataset {name}", error) from None
