"""`thinkswitch merge CONFIG OUT`: mergekit-yaml with our method and more checks; OUT appears whole or not at all.

Every local checkpoint of the config is checked first, from its headers. The merge goes to
a folder beside OUT that takes the name at the end. NaN or infinity in an input is found
while it is merged, from the sums of our method or in what is about to be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import mergekit.merge
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from pydantic import ValidationError

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError, first_fault
from thinkswitch_plugin.merging.architecture import architecture, expected, require_covered, shortened
from thinkswitch_plugin.merging.compatibility import Allowances, align_compatible
from thinkswitch_plugin.merging.config import read_config, without_ours
from thinkswitch_plugin.merging.kernel import all_finite, non_finite
from thinkswitch_plugin.merging.layout import Aligned
from thinkswitch_plugin.merging.mergekit_private import NonFiniteOutputError, checked, planning_for, use_layout
from thinkswitch_plugin.merging.method import register
from thinkswitch_plugin.merging.settings import adopt, layers_of, require_known
from thinkswitch_plugin.merging.tensors import list_tensors, reading, require_unquantised
from thinkswitch_plugin.run.checkpoint import require_plain


@click.command("thinkswitch merge", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(path_type=Path))
@click.argument("out_path", type=click.Path(path_type=Path))
@add_merge_options  # type: ignore[untyped-decorator]
def command(merge_options: MergeOptions, config_file: Path, out_path: Path) -> None:
    """Merge as mergekit-yaml does, with the method `thinkswitch` and with checks before and after."""
    merge_options.apply_global_options()
    merge(config_file, out_path, merge_options)


def merge(config_file: Path, out: Path, options: MergeOptions) -> None:
    """Run a mergekit config.

    Args:
        config_file: any mergekit YAML, which may have `may_differ`; model folders are relative to the current folder.
        out: the checkpoint folder to make; it may exist only if it is empty.
        options: mergekit-yaml's own.

    Raises:
        ThinkSwitchError: the config, a checkpoint or OUT is not fit, or mergekit stopped; nothing is at OUT.
    """
    values = read_config(config_file)
    if not options.safe_serialization:
        raise ThinkSwitchError("ThinkSwitch writes safetensors only; leave --no-safe-serialization out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ThinkSwitchError(f"{out} exists already; delete it or name another folder.")
    register()
    known = {method.spec.name for method in registry.registered_methods()}
    if (method := values["merge_method"]) not in known:
        raise ThinkSwitchError(
            f"{config_file}: mergekit has no `merge_method` {method!r}; it has {', '.join(sorted(known))}."
        )
    config, chosen = _parsed(values, config_file)
    checkpoints = local_checkpoints(config)
    aligned = _check(config, checkpoints, options, chosen)
    for folder in checkpoints:
        require_known(folder)
    needed = expected(config, checkpoints, aligned)  # mergekit changes the config while it plans
    say_carried(aligned)
    partial = files.temporary_sibling(out)
    try:
        files.remove(partial)
        # mergekit writes the folder's own name into the model card.
        built = partial / out.name
        built.mkdir(parents=True)
        with checked(aligned), planning_for(architecture(config, options, aligned)):
            use_layout(config, aligned)
            mergekit.merge.run_merge(
                config, str(built), options=options, config_source=config_file.read_text(encoding="utf-8")
            )
        adopt(built, chosen)
        require_covered(needed, list_tensors(built), config_file)
        if out.is_dir():
            out.rmdir()
        for made in partial.iterdir():
            made.replace(out.with_name(made.name))
    except ThinkSwitchError:
        raise
    except NonFiniteOutputError as error:
        raise ThinkSwitchError(blame(error.name, checkpoints, config_file)) from error
    except OSError as error:
        raise ThinkSwitchError(f"{config_file}: the merge into {out} failed: {error}.") from error
    except Exception as error:
        raise ThinkSwitchError(f"{config_file}: mergekit stopped: {sentence(error)}") from error
    finally:
        files.remove(partial)


def _parsed(values: dict[str, Any], path: Path) -> tuple[MergeConfiguration, dict[str, Path]]:
    own, chosen = without_ours(values)
    try:
        return MergeConfiguration.model_validate(own), chosen
    except ValidationError as error:
        raise ThinkSwitchError(f"{path}: {first_fault(error)}") from None
    except RuntimeError as error:
        raise ThinkSwitchError(f"{path}: {sentence(error)}") from None


def local_checkpoints(config: MergeConfiguration) -> list[Path]:
    """The folders that the config names, the base first; hub ids and adapters are left to mergekit."""
    base = [config.base_model] if config.base_model else []
    others = sorted((model for model in config.referenced_models() if model not in base), key=str)
    found = []
    for model in (*base, *others):
        folder = Path(model.model.path)
        if model.lora is None and folder.is_dir():
            found.append(folder)
        elif model.model.path.startswith((".", "/")) and not folder.is_dir():
            raise ThinkSwitchError(f"{folder} does not exist; the merge config names it as a model: correct the path.")
    return found


def _check(
    config: MergeConfiguration, checkpoints: list[Path], options: MergeOptions, may_differ: Mapping[str, Path]
) -> Aligned | None:
    """The checkpoints in one layout; None if mergekit alone knows what must match."""
    for folder in checkpoints:
        require_plain(folder)
        require_unquantised(folder)
    safe = [folder for folder in checkpoints if not any(folder.glob("pytorch_model*"))]
    for folder in safe:
        list_tensors(folder)
    slices = _slices(config)
    if _stacked(slices) or not safe:
        return None  # layers put together from unlike places
    whole = not slices or _is_whole(slices, safe[0])
    aligned = align_compatible(
        safe,
        Allowances(
            architecture=not whole or options.allow_crimes,
            vocabulary=bool(config.tokenizer_source or config.tokenizer or options.unsafe_truncate_embeddings),
            dtype=config.dtype is not None,
            may_differ=tuple(may_differ),
        ),
    )
    return aligned if len(safe) == len(checkpoints) else None


def is_tensor_by_tensor(config: MergeConfiguration, checkpoints: Sequence[Path]) -> bool:
    """Whether a merge has the tensors and the vocabulary of its checkpoints, each made of those of the same name."""
    slices = _slices(config)
    own = config.modules or config.tokenizer_source or config.tokenizer or _stacked(slices) or not checkpoints
    return not own and (not slices or _is_whole(slices, checkpoints[0]))


def _slices(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    return [piece for part in (config, *(config.modules or {}).values()) for piece in part.slices or []]


def _stacked(slices: Sequence[OutputSliceDefinition]) -> bool:
    return any(len({source.layer_range for source in s.sources}) != 1 or len(s.sources) == 1 for s in slices)


def _is_whole(slices: Sequence[OutputSliceDefinition], checkpoint: Path) -> bool:
    """Whether slices take every layer of a checkpoint, once and in order."""
    ranges = [tuple(piece.sources[0].layer_range) for piece in slices]
    edges = [0, *(end for _, end in ranges)]
    return [start for start, _ in ranges] == edges[:-1] and edges[-1] == layers_of(checkpoint)


def say_carried(aligned: Aligned | None) -> None:
    """Tell the user of tensors that are copied, since only some of the checkpoints hold them."""
    if aligned and aligned.carried:
        owners = sorted({str(info.file.parent) for stored in aligned.carried.values() for info in stored.parts})
        console.say(
            f"  copied from {', '.join(owners)}, since only some of the checkpoints have them and transformers does not load "
            f"them: {shortened(sorted(aligned.carried))} ({len(aligned.carried)} in all)"
        )


def blame(name: str, checkpoints: list[Path], config_file: Path | str) -> str:
    """Which input brought NaN or infinity into an output: the tensor of that name first, then all others."""
    held = [(folder, info) for folder in checkpoints for info in list_tensors(folder).values()]
    with reading() as read:
        for folder, info in sorted(held, key=lambda entry: entry[1].name != name):
            if not all_finite(read(info)):
                return non_finite(folder, info.name)
    return (
        f"{config_file}: merging makes NaN or infinity in the tensor {name} though every input is finite; "
        "use smaller weights or a wider dtype."
    )


def sentence(error: Exception) -> str:
    """The message of an engine's exception, as the end of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300].rstrip('.')}. (THINKSWITCH_DEBUG=1 shows where.)"
