"""`thinkswitch export-gguf`: the checkpoints of an iteration as GGUF, by llama.cpp's converter, and Modelfiles for Ollama.

iter-1/gguf/instruct.gguf, thinking.gguf                 for llama.cpp, Ollama, LM Studio; the chat template is in them
iter-1/gguf/Modelfile.instruct, Modelfile.thinking       ollama create NAME -f Modelfile.thinking
"""

from __future__ import annotations

import sys
from pathlib import Path

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.modelfile import modelfile
from thinkswitch_plugin.loop.work import require_finished
from thinkswitch_plugin.run import MODES, Run, checkpoint, locked, processes

SCRIPT = "convert_hf_to_gguf.py"
UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


def export_gguf(run: Run, llama_cpp: Path, *, iteration: int | None, only: str, outtype: str) -> None:
    """Convert the checkpoints of an iteration and write a Modelfile for each.

    Args:
        llama_cpp: the folder that holds llama.cpp's `convert_hf_to_gguf.py`.
        iteration: whose checkpoints; None is the last one of the run.
        only: one mode; empty is both.
        outtype: the converter's name for the type of the weights.

    Raises:
        ThinkSwitchError: no converter there, the iteration is not finished, or the converter does not know the checkpoint.
    """
    k = run.iterations if iteration is None else iteration
    if not (llama_cpp / SCRIPT).is_file():
        raise ThinkSwitchError(
            f"{llama_cpp} has no {SCRIPT}; name the folder of a llama.cpp checkout by --llama-cpp, or get the converter "
            "from the package index by `make setup-gguf`."
        )
    require_finished(run, k)
    out = run.iteration(k) / "gguf"
    with locked(run.folder):
        for mode in (only,) if only else MODES:
            folder, weights = Path(run.checkpoint(mode, k)), out / f"{mode}.gguf"
            checkpoint.require_plain(folder)
            text = modelfile(weights.name, folder, mode, run.recipe.keys)
            files.require_space(out, files.size(folder), "the export of a GGUF")
            convert(llama_cpp / SCRIPT, folder, weights, outtype)
            files.write_text(out / f"Modelfile.{mode}", text)
            console.say(f"  {weights} ({files.size(weights) / 1e6:,.1f} MB), Modelfile.{mode}")


def convert(script: Path, folder: Path, weights: Path, outtype: str) -> None:
    """Run the converter on one checkpoint. Raises `ThinkSwitchError` if it fails."""
    partial, log = files.temporary_sibling(weights), weights.parent / "logs" / f"{weights.stem}.log"
    weights.parent.mkdir(parents=True, exist_ok=True)
    files.remove(log)
    try:
        processes.run_logged(
            [sys.executable, script, folder, "--outfile", partial, "--outtype", outtype], log, title=SCRIPT
        )
        files.put_in_place(partial, weights)
    except ThinkSwitchError:
        if UNKNOWN_TOKENIZER in processes.tail(log):
            raise ThinkSwitchError(
                f"llama.cpp does not know the tokenizer of {folder}, so there can be no GGUF of it (see {log}); a newer "
                "llama.cpp may: --llama-cpp."
            ) from None
        raise
    finally:
        files.remove(partial)
