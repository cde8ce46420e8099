"""The axolotl plugin: the `thinkswitch:` keys, the perception module, the adapter's seed, and guards against silent failures.

`thinkswitch.perception` trains a perception module beside the adapter:

    lora_modules_to_save: [perception]
    merge_method: legacy              # axolotl's default leaves the module out
    lr_groups:                        # optional: a learning rate of its own
      - name: perception
        modules: [perception]
        lr: 0.003
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from transformers import TrainerCallback, set_seed

from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.environment import without_gpu_kernels
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.checkpoint import MODULE
from thinkswitch_plugin.training.distil import TRAINER_STATE, change, require_moved
from thinkswitch_plugin.training.reach import require_reach


class KeepLog(TrainerCallback):  # type: ignore[misc]
    """Writes `trainer_state.json` beside the adapter, as the trainer does only for its checkpoints."""

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write it once, after the last step."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state.save_to_json(str(folder / TRAINER_STATE))


class ThinkSwitchPlugin(BasePlugin):  # type: ignore[misc]
    """`plugins: [thinkswitch_plugin.ThinkSwitchPlugin]` in a recipe."""

    def get_input_args(self) -> str:
        """Where axolotl finds the pydantic keys that this plugin adds."""
        return "thinkswitch_plugin.args.ThinkSwitchArgs"

    def register(self, cfg: Any) -> None:
        """Refuse what would lose a perception module: axolotl's default merge calls no other hook.

        Checkpoints that hold a module are made known here, before axolotl reads the base model's config.
        """
        without_gpu_kernels()
        if isinstance(cfg.get("thinkswitch"), dict) and cfg["thinkswitch"].get("perception") is not None:
            import thinkswitch_plugin.perception.model  # noqa: F401

            require_kept(cfg)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Leave the datasets to axolotl; but where there is no accelerator, it would put the model of rank n on number n."""
        if cfg.device == "cpu" and cfg.world_size > 1:
            cfg.device_map = None

    def pre_model_load(self, cfg: Any) -> None:
        """Seed the adapter's initial weights; refuse a perception module that could not be trained or saved.

        Evaluation during 4-bit training on a CPU is refused too, and a LoRA that leaves out a mixture's experts.

        axolotl seeds only its trainer, which is built after the adapter. And one forward pass without
        gradients repacks bitsandbytes' weights on a CPU: the adapter then silently learns nothing.
        """
        if cfg.seed is not None:
            set_seed(int(cfg.seed))
        evaluates = cfg.val_set_size or cfg.test_datasets
        if cfg.load_in_4bit and evaluates and not torch.cuda.is_available():
            raise ThinkSwitchError(
                "4-bit training on a CPU does not survive an evaluation pass: "
                "set `val_set_size: 0` and remove `test_datasets`."
            )
        if (cfg.thinkswitch or {}).get("loss") == "distribution" and not cfg.kd_trainer:
            raise ThinkSwitchError(
                "`thinkswitch.loss: distribution` is learnt by axolotl's KD trainer, which this config does not use; train with "
                "the `axolotl.yaml` of an iteration, or add its `kd_…` keys and its plugin to this one."
            )
        require_reach(cfg, cfg.base_model)
        if keys := perception_keys(cfg):
            from thinkswitch_plugin.perception.markers import find_markers

            require_kept(cfg)
            find_markers(load_tokenizer(cfg), keys.tokens)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Attach the perception module: before the adapter, which is to hold a trained copy of it."""
        if keys := perception_keys(cfg):
            from thinkswitch_plugin.perception.model import attach

            attach(model, keys, load_tokenizer(cfg))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Keep the trainer's log beside the adapter, for the loss in the report; pad all columns of KD on one side.

        Every token of a step counts the same, whichever process has it: axolotl takes the mean over processes of their means.

        Raises `ThinkSwitchError` if several processes would train side by side on the same rows.
        """
        if cfg.world_size > trainer.accelerator.num_processes:
            raise ThinkSwitchError(
                f"{cfg.world_size} processes were started, but accelerate knows of {trainer.accelerator.num_processes}, so each "
                "would learn from the same rows; on CPUs, set ACCELERATE_USE_CPU=true."
            )
        if cfg.kd_trainer:  # its collator pads the columns of distributions on the right, whatever the tokenizer does
            trainer.data_collator.tokenizer.padding_side = "right"
        elif cfg.world_size > 1:
            trainer.args.average_tokens_across_devices = True
        return [KeepLog()]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Stop with an error if the adapter did not move."""
        if cfg.adapter not in ("lora", "qlora"):
            return
        matrices = {
            # gathers a matrix that FSDP2 has spread over processes
            name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
        moved = change(matrices, cfg.lora_alpha / cfg.lora_r, cfg.output_dir)
        minimum = (cfg.thinkswitch or {}).get("min_adapter_change", 1e-4)
        require_moved(moved, float(minimum), cfg.output_dir)


def perception_keys(cfg: Any) -> PerceptionKeys | None:
    """`thinkswitch.perception` of axolotl's checked config; None where there is no perception module."""
    values = (cfg.thinkswitch or {}).get("perception")
    return None if values is None else PerceptionKeys.model_validate(dict(values))


def require_kept(cfg: Any) -> None:
    """Raise `ThinkSwitchError` if a perception module would not be saved with the adapter, or lost in its merge."""
    if not cfg.get("adapter"):
        return
    if MODULE not in (cfg.get("lora_modules_to_save") or []):
        raise ThinkSwitchError(
            f"`thinkswitch.perception` needs `lora_modules_to_save: [{MODULE}]`; without it the module is neither "
            "trained nor saved."
        )
    if cfg.get("merge_method") != "legacy":
        raise ThinkSwitchError(
            "`thinkswitch.perception` needs `merge_method: legacy`; axolotl's default leaves the module out of the "
            "merged checkpoint without a word."
        )
