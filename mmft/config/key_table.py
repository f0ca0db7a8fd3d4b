"""Which keys of TrainingArguments, LoraConfig, GenerationConfig and BitsAndBytesConfig act in mmft.

effective: the key changes weights, answers or behaviour, and a test sets it (tests/config/test_key_table.py). managed: mmft sets it, and
names the key to use instead. unsupported: refused with the reason. A key of an installed library that is in no list is refused, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ..common.errors import UserError

# section -> its class, and the package that defines it
CLASSES = {
    "trainer": ("TrainingArguments", "transformers"), "lora": ("LoraConfig", "peft"),
    "generation": ("GenerationConfig", "transformers"), "model.quantization": ("BitsAndBytesConfig", "transformers"),
}  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


EFFECTIVE = {
    "trainer": _names("""
        per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
        optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps average_tokens_across_devices
        max_grad_norm label_smoothing_factor bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
        gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha torch_empty_cache_steps logging_strategy
        logging_steps logging_first_step include_num_input_tokens_seen log_level eval_strategy eval_steps eval_delay
        per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_total_limit load_best_model_at_end
        metric_for_best_model greater_is_better full_determinism use_cpu accelerator_config dataloader_drop_last
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics
        torch_compile torch_compile_backend torch_compile_mode"""),
    "lora": _names("""
        r target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save init_lora_weights
        layers_to_transform layers_pattern rank_pattern alpha_pattern trainable_token_indices use_dora lora_bias target_parameters
        eva_config corda_config lora_ga_config"""),
    "generation": _names("""
        max_length max_new_tokens min_length min_new_tokens early_stopping max_time do_sample num_beams cache_implementation
        temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_eos_token_id
        remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
        watermarking_config"""),
    "model.quantization": _names("""
        load_in_8bit load_in_4bit llm_int8_threshold llm_int8_skip_modules bnb_4bit_compute_dtype bnb_4bit_quant_type
        bnb_4bit_use_double_quant bnb_4bit_quant_storage"""),
}

_LOGGER = "logger=... chooses where a run is logged"
_RUN = "run_dir=... and name=... name the run"
MANAGED = {
    "trainer": {
        "output_dir": "output_dir=... is a key of the top level", "seed": "seed=... is a key of the top level", "data_seed": "seed=... is a key of the top level",
        "report_to": _LOGGER, "project": _LOGGER, "trackio_space_id": _LOGGER, "trackio_bucket_id": _LOGGER, "trackio_static_space_id": _LOGGER,
        "run_name": "name=... is a key of the top level", "remove_unused_columns": "the collator chooses what the model gets", "label_names": "the collator makes the labels",
        "hub_token": "log in with `hf auth login`; a secret must not be saved with the run",
        "do_train": "`mmft train` trains", "do_eval": "trainer.eval_strategy=... and evaluation.split=... choose evaluations", "do_predict": "`mmft predict` answers",
        "resume_from_checkpoint": "`mmft resume run=DIR` continues a run", "restore_callback_states_from_checkpoint": "`mmft resume run=DIR` restores them",
        "ignore_data_skip": "`mmft resume run=DIR` continues with the next batch", "enable_jit_checkpoint": "a signal saves a checkpoint without it",
        "local_rank": "torchrun sets it", "disable_tqdm": "the progress bar is shown on a terminal only",
    },
    "lora": {
        "task_type": "model=... decides it", "peft_type": "the group lora makes LoRA adapters", "auto_mapping": "model=... decides it", "peft_version": "peft writes it",
        "base_model_name_or_path": "model.path=... names the base model", "revision": "model.revision=... names its revision",
        "inference_mode": "`mmft train` trains, the other verbs do not",
    },
    "generation": {
        "eos_token_id": "the collator knows the model's end tokens", "pad_token_id": "the tokenizer's padding token is used", "use_cache": "answers are always generated with the cache",
        "num_return_sequences": "one text is kept for each prompt", "return_dict_in_generate": "one text is kept for each prompt",
    },
    "model.quantization": {},
}  # fmt: skip

_EVALUATE = "mmft measures the loss and the answers itself; evaluation.* has the keys for that"
_UPLOAD = "checkpoints are not uploaded; `mmft merge run=DIR push=ORG/NAME` uploads the result"
_FIRST_PROCESS = "the first process alone writes the run directory and the log"
_ASSISTANT = "mmft loads no assistant model, and assisted generation gives the same answers"
_HUB_CODE = "transformers moved this to code on a hub, which mmft does not run"
_OUTPUTS = "mmft keeps only the text of an answer"
_ENCODER_DECODER = "acts only in encoder-decoder models and at the first token"
_BASE_CHANGED = "replaces the base weights, which later verbs would take for the original"
UNSUPPORTED = {
    "trainer": {
        "use_liger_kernel": "its fused loss is not mmft's loss; mmft has its own rewrites (model.rewrites=auto)", "liger_kernel_config": "trainer.use_liger_kernel is not supported",
        "use_cache": "training computes whole sequences and uses no cache", "bf16_full_eval": _EVALUATE, "fp16_full_eval": _EVALUATE, "prediction_loss_only": _EVALUATE,
        "eval_do_concat_batches": _EVALUATE, "eval_use_gather_object": _EVALUATE, "eval_accumulation_steps": _EVALUATE, "include_for_metrics": _EVALUATE,
        "batch_eval_metrics": _EVALUATE, "push_to_hub": _UPLOAD, "hub_private_repo": _UPLOAD, "hub_model_id": _UPLOAD, "hub_strategy": _UPLOAD, "hub_always_push": _UPLOAD,
        "hub_revision": _UPLOAD, "log_on_each_node": _FIRST_PROCESS, "log_level_replica": _FIRST_PROCESS, "save_on_each_node": _FIRST_PROCESS,
        "logging_nan_inf_filter": "trainer.nonfinite=stop|skip decides what happens at a NaN, and a NaN loss is never logged as 0",
        "optim_target_modules": "acts with the optimizers galore_* and apollo_* only", "auto_find_batch_size": "a run that is out of memory says which batch size to use",
        "ddp_static_graph": "which layers take part can change between steps",
        "length_column_name": "lengths are measured with the collator", "parallelism_config": "sequences and layers are not spread over processes; trainer.fsdp spreads weights",
    },
    "lora": {
        "fan_in_fan_out": "is for GPT-2's Conv1D layers; only Linear layers are adapted", "megatron_config": "is for Megatron models", "megatron_core": "is for Megatron models",
        "velora_config": "was not tested with mmft's training",
        "alora_invocation_tokens": "such an adapter acts after these tokens only, which mmft does not put into prompts", "use_qalora": "peft implements it for GPTQ layers only",
        "qalora_group_size": "lora.use_qalora is not supported", "monteclora_config": "its regularisation loss is not part of mmft's loss",
        "runtime_config": "acts on the initialisation on a GPU only and changes no result",
        "use_bdlora": "is for serving with block-diagonal adapters", "arrow_config": "routes between several adapters; a run trains one", "kasa_config": _BASE_CHANGED, "loftq_config": "is for a base that is quantised here and now; model.quantization says how many bits it has",
        "ensure_weight_tying": "was not tested with tied layers",
        "layer_replication": "changes the base model's layers",
    },
    "generation": {
        "stop_strings": "transformers needs the tokenizer for it, which mmft does not pass", "token_healing": "transformers needs the tokenizer for it, which mmft does not pass",
        "use_mtp": "needs a model with multi-token prediction", "guidance_scale": "its unconditional prompt has no place for the image", "cache_config": "acts with cache_implementation=quantized only, which needs optimum-quanto",
        "max_cache_len": "transformers chooses the length of a static cache", "compile_config": "must be an object of transformers, which a config cannot hold",
        "disable_compile": "acts with a static cache on a GPU only", "continuous_batching_config": "mmft does not use transformers' continuous batching",
        "prefill_chunk_size": "would split the image tokens of a prompt", "output_attentions": _OUTPUTS, "output_hidden_states": _OUTPUTS, "output_scores": _OUTPUTS, "output_logits": _OUTPUTS,
        "bos_token_id": "acts on empty prompts only", "forced_bos_token_id": _ENCODER_DECODER, "decoder_start_token_id": _ENCODER_DECODER,
        **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
                         "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"), _ASSISTANT),
        **dict.fromkeys(("low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids"), _HUB_CODE),
    },
    "model.quantization": {
        "llm_int8_enable_fp32_cpu_offload": "the model is loaded on one device", "llm_int8_has_fp16_weight": "keeps the weights in 16 bit, which model.dtype=fp16 does",
    },
}  # fmt: skip

# Values of effective keys that are not supported: key -> first letters of the value -> reason.
UNSUPPORTED_VALUES: dict[str, dict[str, str]] = {
    "trainer.optim": {"galore": "needs the package galore-torch, and was not tested on adapters", "apollo": "needs the package apollo-torch, and was not tested on adapters"},
    "lora.init_lora_weights": {"mica": "was not tested"},
    "generation.cache_implementation": {"quantized": "needs optimum-quanto, and was not tested"},
}
# Values that need a package: key -> first letters of the value -> (module, package to install). "": any value.
PACKAGES: dict[str, dict[str, tuple[str, str]]] = {
    "trainer.optim": {
        "lomo": ("lomo_optim", "lomo-optim"), "adalomo": ("lomo_optim", "lomo-optim"),
        "grokadamw": ("grokadamw", "grokadamw"), "schedule_free": ("schedulefree", "schedulefree"), "stable_adamw": ("optimi", "torch-optimi"),
        "adamw_torch_4bit": ("torchao", "torchao"), "adamw_torch_8bit": ("torchao", "torchao"), "adamw_anyprecision": ("torchdistx", "torchdistx"),
        "adamw_torch_xla": ("torch_xla", "torch-xla"), "adamw_torch_npu": ("torch_npu", "torch-npu"),
    },
    "trainer.deepspeed": {"": ("deepspeed", "deepspeed")},
}  # fmt: skip
OFF: tuple[object, ...] = (None, False, "", [], {})  # values that ask for nothing


def status(section: str, key: str) -> tuple[str, str]:
    """("effective" | "managed" | "unsupported" | "unknown", what a user should know) of a library's key."""
    if key in EFFECTIVE[section]:
        return "effective", "; ".join(_notes(f"{section}.{key}"))
    if key in MANAGED[section]:
        return "managed", MANAGED[section][key]
    if key in UNSUPPORTED[section]:
        return "unsupported", UNSUPPORTED[section][key]
    return "unknown", ""


def check(section: str, values: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Refuse keys of a library that do not act, and values that need a missing package. keys: those of the library. Raises UserError."""
    for key, value in values.items():
        name, (kind, text) = f"{section}.{key}", status(section, key)
        if kind == "managed":
            raise UserError(f"{name}: mmft sets this itself; {text}")
        if value in OFF:
            continue
        if kind == "unsupported":
            raise UserError(f"{name}={value}: is not supported: {text}")
        if kind == "unknown" and key in keys:
            raise UserError(f"{name}: is new in the installed {CLASSES[section][1]}, and mmft does not know yet whether it acts; leave it out")
        for start, reason in UNSUPPORTED_VALUES.get(name, {}).items():
            if str(value).startswith(start):
                raise UserError(f"{name}={value}: is not supported: {reason}")
        for start, (module, package) in PACKAGES.get(name, {}).items():
            if str(value).startswith(start) and importlib.util.find_spec(module) is None:
                raise UserError(f"{name}={value if start else '...'}: needs a package that is not installed: pip install {package}")


def _notes(name: str) -> list[str]:
    notes = [f"{value}: not supported ({reason})" for value, reason in UNSUPPORTED_VALUES.get(name, {}).items()]
    return notes + [f"{value + '*' if value else 'it'} needs {package}" for value, (_, package) in PACKAGES.get(name, {}).items()]
