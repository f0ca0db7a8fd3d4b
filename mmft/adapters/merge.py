"""Merge an adapter into the weights of its base, in memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter added to its weights, without peft layers. The base must not be quantised.

    Raises UserError if peft cannot merge this adapter or a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    untie(model.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft warns about tied weights, which are untied here
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"this adapter cannot be merged: {' '.join(str(error).split())[:300]}") from None
    left = [n for n, m in merged.named_modules() if isinstance(m, BaseTunerLayer) or n.endswith("modules_to_save")]
    if left:
        raise UserError(f"this adapter cannot be merged: peft left {left[0]} in the model")
    head, table = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and table is not None and head.weight.data_ptr() != table.weight.data_ptr():
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False  # otherwise loading would overwrite the trained head with the table
    return merged.eval()


def untie(model: PreTrainedModel) -> None:
    """Give the language head its own weights if an adapter sits on it or on the embedding table.

    Both may be one tensor, and then what is added to one would change the other too.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not any(isinstance(m, BaseTunerLayer) for m in (head, table)):
        return
    inner = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in (head, table)]
    if inner[0].weight.data_ptr() == inner[1].weight.data_ptr():
        inner[0].weight = torch.nn.Parameter(inner[0].weight.detach().clone(), requires_grad=False)
