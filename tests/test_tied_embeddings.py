"""A head tied to the token table, with an adapter or a trained copy of either: merged logits are those of base and adapter."""

from __future__ import annotations

import pytest
import torch

COMBINATIONS = {
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "table saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "table adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "both adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "head saved, table adapted": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "head adapted, table saved": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    "table adapted with DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head adapted, scaled by the root": {"target_modules": ["lm_head"], "use_rslora": True},
}


@pytest.mark.parametrize("kind", ["qwen2vl", "smolvlm"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_merged_and_saved_logits_are_the_adapters(small, tmp_path, kind, combination):
    """The adapter is reloaded by plain peft, the merged model by plain transformers; random weights stand for training."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.merge import merge_adapter
    from mmft.adapters.plan import plan_adapter
    from mmft.export.merge import save_merged

    base, collator, _ = small.load(kind)
    table = base.get_input_embeddings().weight.detach().clone()
    assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr() or kind == "smolvlm"
    settings = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, **COMBINATIONS[combination]}
    model = attach_adapter(base, plan_adapter(base, settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    batch = {k: v for k, v in collator([small.sample("a", [0], "What is this?", "a red square")]).items() if k not in ("labels", "row_ids")}

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    stock = AutoModelForImageTextToText.from_pretrained(small(kind))
    untuned = logits(stock)
    wanted = logits(PeftModel.from_pretrained(stock, tmp_path / "adapter"))
    assert (wanted - untuned).abs().max() > 0.1, "an adapter that does nothing would prove nothing"
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    merged = merge_adapter(model)
    assert torch.allclose(logits(merged), wanted, atol=1e-3)
    save_merged(merged, collator.processor, None, tmp_path / "merged", "5GB")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits(again), wanted, atol=1e-3)
    if "table" not in combination and "both" not in combination:
        assert again.get_input_embeddings().weight.equal(table), "what was not trained stays"


def test_a_token_table_is_adapted_only_if_it_is_named(small):
    from mmft.adapters.plan import plan_adapter

    model, _, _ = small.load("qwen2vl")
    for targets in ("all-linear", r".*language_model.*q_proj"):
        assert not any("embed" in n for n in plan_adapter(model, {"r": 2, "target_modules": targets}).adapted)
    plan = plan_adapter(model, {"r": 2, "target_modules": ["embed_tokens"]})
    assert list(plan.adapted.values()) == ["language"]
