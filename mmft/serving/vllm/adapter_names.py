"""Where vLLM looks for the module of an adapter's tensor. A name that it does not find there is left out without a word.

Read in the source of vLLM 0.33.0: `parse_fine_tuned_lora_name` (lora/utils.py) takes `base_model.model.` off the name and `lora_A.weight` from
its end, and `WeightsMapper` (model_executor/models/utils.py) replaces every prefix that fits, one after another in their order. The prefixes are
`hf_to_vllm_mapper` of the model's class, the place of the language model is `get_mm_mapping` of it. q_proj, k_proj, v_proj and gate_proj, up_proj
are found inside the layers in which vLLM joins them.
"""

from __future__ import annotations

from collections.abc import Iterable

_MODEL_IN_FRONT = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}  # as transformers names parts since 4.52

# architecture -> (prefixes and what replaces them, in their order; what the name of the language model begins with)
ARCHITECTURES: dict[str, tuple[dict[str, str], str]] = {
    **dict.fromkeys(
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        ({"model.language_model.": "language_model.model.", "model.visual.": "visual.", "lm_head.": "language_model.lm_head.", "model.": "language_model.model."}, "language_model."),
    ),
    "Qwen3VLForConditionalGeneration": ({"model.visual.": "visual.", "lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}, "language_model."),
    **dict.fromkeys(
        ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "Gemma3ForConditionalGeneration", "InternVLForConditionalGeneration"),
        (_MODEL_IN_FRONT, "language_model."),
    ),
    "Mistral3ForConditionalGeneration": ({**_MODEL_IN_FRONT, "model.": "language_model.model."}, "language_model."),
    **dict.fromkeys(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), ({}, "model.text_model.")),
    "Blip2ForConditionalGeneration": ({}, "language_model."),
}  # fmt: skip
# Classes that vLLM has, and that load no adapter (they lack SupportsLoRA).
WITHOUT_ADAPTERS = ("LlavaOnevisionForConditionalGeneration",)


def vllm_name(architecture: str, module: str) -> str:
    """The name that vLLM gives a module of the language model. module: as transformers names it. For an architecture of ARCHITECTURES."""
    for prefix, new in ARCHITECTURES[architecture][0].items():
        if module.startswith(prefix):
            module = new + module[len(prefix) :]
    return module


def unplaced(architecture: str, modules: Iterable[str]) -> list[str]:
    """Those modules of the language model that vLLM would look for outside it; [] for an architecture that is not in the table."""
    if architecture not in ARCHITECTURES:
        return []
    home = ARCHITECTURES[architecture][1]
    return sorted(module for module in modules if not vllm_name(architecture, module).startswith(home))
