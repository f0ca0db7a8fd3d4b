"""Chat collators with templates written for the tests, over the small Qwen2-VL's processor; and what a batch of theirs teaches."""

from __future__ import annotations

from typing import Any

from small_models import family

from mmft.collators.base import IGNORE
from mmft.collators.chat import ChatCollator
from mmft.models.load import load_config, load_processor, locate_model

CONTENT = (
    "{%- if m.content is string -%}{%- set c = m.content -%}{%- else -%}{%- set c = namespace(t='') -%}{%- for p in m.content -%}"
    "{%- set c.t = c.t + ('<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text) -%}{%- endfor -%}{%- set c = c.t -%}{%- endif -%}"
)
# The index of the last user turn, and an answer split into reasoning `r` and the rest `c`.
LAST = "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
SPLIT = (
    "{%- set r = m.reasoning_content if m.reasoning_content is string else '' -%}"
    "{%- if not r and '</think>' in c -%}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}{%- endif -%}"
    "{%- if '</think>' in c -%}{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
)
ANSWER = "{%- elif m.role == 'assistant' -%}"
HEAD = "{%- for m in messages -%}" + CONTENT + "{%- if m.role in ('user', 'system') -%}{{- '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' -}}"
TOOL = "{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\\n<tool_response>\\n' + c + '\\n</tool_response><|im_end|>\\n' -}}"
TAIL = TOOL + "{%- endif -%}{%- endfor -%}"


def prompt(text: str) -> str:
    return "{%- if add_generation_prompt -%}{{- '" + text + "' -}}{%- endif -%}"


def answers(last: str, earlier: str = "", head: str = LAST + HEAD) -> str:
    """A template that writes the answers behind the last user turn as `last`, those before it as `earlier` (expressions of r and c)."""
    later = "{{- '<|im_start|>assistant\\n' + " + last + " + '<|im_end|>\\n' -}}"
    before = "{{- '<|im_start|>assistant\\n' + " + (earlier or last) + " + '<|im_end|>\\n' -}}"
    return head + ANSWER + SPLIT + "{%- if loop.index0 > ns.last -%}" + later + "{%- else -%}" + before + "{%- endif -%}" + TAIL


BLOCK = "'<think>\\n' + r + '\\n</think>\\n\\n' + c"
OPEN, PLAIN = prompt("<|im_start|>assistant\\n<think>\\n"), prompt("<|im_start|>assistant\\n")
TEMPLATES = {
    # like Qwen3.5's and Qwen3-VL-Thinking's: the prompt opens the block, earlier turns lose it
    "open": answers(BLOCK, "c") + OPEN,
    # like Qwen3's: the model opens the block itself; without reasoning it is empty
    "hybrid": answers(BLOCK, "c") + PLAIN,
    # like DeepSeek-R1's: no answer keeps its block, but the prompt opens one
    "stripped": answers("c") + OPEN,
    # like GLM-4.5V's: an empty block in earlier turns; no line breaks
    "empty": answers("'<think>' + r + '</think>\\n' + c", "'<think></think>\\n' + c") + PLAIN,
    # like Qwen3.5's without thinking: the prompt holds a closed block, earlier turns do not
    "closed": answers("'<think>\\n\\n</think>\\n\\n' + c", "c") + prompt("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"),
    # the prompt holds a closed block that no answer shows
    "hidden": answers("c") + prompt("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"),
    # like Qwen3.8's: reasoning is read from reasoning_content alone
    "apart": answers(BLOCK, "c").replace(SPLIT, "{%- set r = m.reasoning_content or '' -%}") + OPEN,
    # every answer keeps its block
    "kept": answers(BLOCK) + OPEN,
    # like Kimi-VL-Thinking's: other marks, contents written as they are
    "kimi": HEAD + ANSWER + "{{- '<|im_start|>assistant\\n' + c + '<|im_end|>\\n' -}}" + TAIL + prompt("<|im_start|>assistant\\n◁think▷"),
    # knows nothing of reasoning
    "unaware": HEAD + ANSWER + "{{- '<|im_start|>assistant\\n' + c + '<|im_end|>\\n' -}}" + TAIL + PLAIN,
}  # fmt: skip


def collator(small: Any, template: str, tokens: tuple[str, ...] = (), special: tuple[str, ...] = (), kind: str = "qwen2vl", **keys: Any) -> ChatCollator:
    """Over the small model's processor, with another template and further tokens in its vocabulary."""
    own = family(kind, small(kind))
    located = locate_model(own)
    processor = load_processor(own, located)
    processor.chat_template = template
    processor.tokenizer.add_tokens(list(tokens))
    processor.tokenizer.add_tokens(list(special), special_tokens=True)
    ends = [processor.tokenizer.eos_token_id]
    return ChatCollator(processor=processor, family=own, model_config=load_config(own, located), end_token_ids=ends, **keys)


def taught(made: ChatCollator, batch: dict[str, Any]) -> list[tuple[str, str]]:
    """For each run of tokens with loss: (all text before it in its sequence, its own text). Image tokens are written once."""
    image = made.tokenizer.decode([made.image_token_id])
    out = []
    for ids, labels, mask in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist()):
        ids, labels = ids[: sum(mask)], labels[: sum(mask)]
        assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
        start = None
        for i, label in enumerate([*labels, IGNORE]):
            if label != IGNORE and start is None:
                start = i
            elif label == IGNORE and start is not None:
                before, text = (made.tokenizer.decode(part) for part in (ids[:start], ids[start:i]))
                while image * 2 in before:
                    before = before.replace(image * 2, image)
                out.append((before, text))
                start = None
    return out
