"""What vLLM is started with for some runs, and which runs it cannot serve as they were trained: those are refused by name, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ...adapters.stored import CONFIG, read_adapter
from ...common.errors import UserError
from ...common.files import read_json
from ...common.model_parts import part_of
from ...config.plain import to_plain
from ...runs.open import any_config
from ...runs.parents import CHAIN
from ...runs.weights import trained_weights
from .adapter_names import WITHOUT_ADAPTERS, unplaced

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's max_lora_rank may have (config/lora.py of 0.33.0)
TOWERS = "enable_tower_connector_lora"  # vLLM's own key for adapters in the vision part
# Ways to initialise an adapter that leave the base's weights as they are (lora/peft_helper.py of 0.33.0).
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Keys of adapter_config.json that change what an adapter computes, and that vLLM does not read or refuses.
NOT_LOADED = {
    "use_dora": "DoRA", "modules_to_save": "modules that were trained whole (lora.whole, lora.modules_to_save)", "trainable_token_indices": "trained tokens",
    "lora_bias": "a bias of its own (lora.lora_bias)", "alora_invocation_tokens": "activated LoRA", "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA", "use_qalora": "QALoRA", "target_parameters": "expert tensors (lora.target_parameters)", "fan_in_fan_out": "transposed layers",
}  # fmt: skip
OURS = ("model", "tokenizer", "dtype", "seed", "enable_lora", "max_loras", "max_lora_rank", "mm_processor_kwargs", "generation_config", "skip_tokenizer_init", "trust_remote_code")
MERGED = "merge it (mmft merge) and use the merged model: model.path=RUN/merged"


@dataclass
class Plan:
    """adapters: name of a run -> its folder. rank: the largest of them. uneven: name of one whose modules differ in rank or alpha.

    keys: of EngineArgs, as the user gave them.
    """

    adapters: dict[str, Path] = field(default_factory=dict)
    rank: int = 0
    uneven: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)

    def arguments(self, model: Path, dtype: str, seed: int, processor: Mapping[str, Any] | None, trusted: bool) -> dict[str, Any]:
        """Keys of EngineArgs. model: the folder of the weights. processor: settings of the processor (model.processor), its size limits among them."""
        lora = {"enable_lora": True, "max_loras": len(self.adapters), "max_lora_rank": next(r for r in RANKS if r >= self.rank)} if self.adapters else {}
        return {
            "model": str(model), "dtype": dtype, "seed": seed, **lora, **({"mm_processor_kwargs": dict(processor)} if processor else {}),
            "generation_config": "vllm",  # every request brings its own settings
            "trust_remote_code": trusted, "disable_log_stats": True, **self.keys,
        }  # fmt: skip


def plan(paths: Sequence[str], cfg: DictConfig, overrides: list[str], checkpoint: int | None, keys: Any) -> Plan:
    """Check runs for vLLM; no paths: the model of model=... alone. keys: of EngineArgs. Raises UserError."""
    made = Plan(keys=engine_keys(keys))
    asked: Sequence[str | None] = paths or [None]
    for path in asked:
        run, own = any_config(path, cfg, overrides, checkpoint)
        where = "model" if path is None else f"run={path}"
        settings = to_plain(own.model)
        if settings.get("quantization"):
            raise UserError(f"{where}: backend=vllm does not run the weights that model.quantization makes; {MERGED}")
        if settings.get("adapters"):
            raise UserError(f"{where}: it builds on other adapters (model.adapters), which backend=vllm would leave out; {MERGED}")
        if run is None:
            continue
        folder, whole = trained_weights(run, checkpoint)
        if not whole:
            made.rank = max(made.rank, check_adapter(folder, where, TOWERS in made.keys and bool(made.keys[TOWERS])))
            name = run.path.resolve().name
            made.adapters[name] = folder
            config = read_json(folder / CONFIG)
            made.uneven = name if config.get("rank_pattern") or config.get("alpha_pattern") else made.uneven
    return made


def engine_keys(given: Any) -> dict[str, Any]:
    """vllm=... as a dict. Raises UserError."""
    keys = to_plain(given) or {}
    if not isinstance(keys, dict):
        raise UserError(f"vllm={given}: must be keys of vLLM's EngineArgs, as in vllm={{gpu_memory_utilization:0.8}}")
    for key in keys:
        if key in OURS:
            raise UserError(f"vllm.{key}: comes from the run; drop it")
    return keys


def check_adapter(folder: Path, where: str, towers: bool) -> int:
    """The largest rank of an adapter that vLLM computes as it was trained. towers: whether it also adapts the vision part. Raises UserError for another."""
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) not in (None, "LORA"):
        raise UserError(f"{where}: backend=vllm loads LoRA adapters, and this one is of the type {kind}; {MERGED}")
    for key, what in NOT_LOADED.items():
        if config.get(key):
            raise UserError(f"{where}: backend=vllm does not load {what}; {MERGED}")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"{where}: backend=vllm does not load trained biases (lora.bias={config['bias']}); {MERGED}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise UserError(f"{where}: its adapter began by changing the base (lora.init_lora_weights={start}), which backend=vllm would not do; {MERGED}")
    if (folder / CHAIN).is_file():
        raise UserError(f"{where}: its adapter sits on others ({CHAIN}), which backend=vllm would leave out; {MERGED}")
    ranks = read_adapter(folder).ranks
    outside = sorted(name for name in ranks if part_of(name) != "language")
    if outside and not towers:
        raise UserError(
            f"{where}: backend=vllm would ignore its adapter in {len(outside)} modules outside the language model, e.g. {outside[0]};"
            f" {MERGED}, or let vLLM adapt them, too, which it calls experimental: vllm={{{TOWERS}:true}}"
        )
    largest = max(ranks.values(), default=int(config.get("r") or 1))
    if largest > RANKS[-1]:
        raise UserError(f"{where}: its adapter has rank {largest}, and backend=vllm takes {RANKS[-1]} at most; {MERGED}")
    return largest


def check_architecture(config: Any, folders: Mapping[str, Path]) -> None:
    """Raises UserError for a model whose adapters vLLM does not load, or would not find in it. config: of the model."""
    for architecture in getattr(config, "architectures", None) or []:
        for name, folder in folders.items():
            if architecture in WITHOUT_ADAPTERS:
                raise UserError(f"run={name}: vLLM's {architecture} takes no adapters; {MERGED}")
            inside = [module for module in read_adapter(folder).ranks if part_of(module) == "language"]
            if odd := unplaced(architecture, inside):
                raise UserError(f"run={name}: backend=vllm would not find {len(odd)} modules of its adapter in {architecture}, e.g. {odd[0]}; {MERGED}")
