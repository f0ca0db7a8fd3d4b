"""Small random models of every family, each a local folder as `save_pretrained` leaves it: weights, processor, tokenizer, template.

Nothing is downloaded: vocabularies are learned here from a few sentences, templates are ours. `build(kind, folder)`
makes one; the fixtures of conftest.py make each kind once a session.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmft.models.load import load_config, load_model, load_processor, locate_model

SENTENCES = [
    "a red square and a blue circle stand on the grass",
    "What is in the picture? Which colours do you see?",
    "Describe this image in a few words. Two dogs, 3 cats and 12 birds.",
    "user\nassistant\nsystem\nmodel\nYou are a helpful assistant.",
    "USER: ASSISTANT: a photo of Answer: Question: first second third",
] * 4
SIDE = 56  # pixels; the side of the pictures the small towers see

# --- chat templates, written for these tests ----------------------------------------------------------------------

CHATML = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- 'IMAGE_PLACE' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Like Qwen2-VL's: a first turn without a system message gets one.
QWEN = "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}" + CHATML.replace(
    "IMAGE_PLACE", "<|vision_start|><|image_pad|><|vision_end|>"
)
# Like LLaVA-1.5's: roles in capitals, a space behind every text, and no end token anywhere.
VICUNA = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- for p in m.content -%}{{- p.text + ' ' -}}{%- endfor -%}{%- else -%}
{{- m.role.upper() + ': ' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image>\\n' -}}{%- endif -%}{%- endfor -%}
{%- for p in m.content -%}{%- if p.type == 'text' -%}{{- p.text + ' ' -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""
SMOL = """\
{{- '<|im_start|>' -}}
{%- for m in messages -%}
{{- m.role | capitalize -}}{%- if m.content[0].type == 'image' -%}{{- ':' -}}{%- else -%}{{- ': ' -}}{%- endif -%}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""
# Like Gemma's: roles must alternate, the system text joins the first user turn, texts are trimmed.
GEMMA = """\
{{- bos_token -}}
{%- set first = '' -%}{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content[0].text + '\\n\\n' -%}{%- set rest = messages[1:] -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<start_of_image>' -}}{%- else -%}{{- p.text | trim -}}{%- endif -%}{%- endfor -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# --- vocabularies -------------------------------------------------------------------------------------------------


def byte_level_words(splitter: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a byte-level BPE with the splitting rule of a transformers tokenizer."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = splitter
    learned.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_fallback_words(special: list[str], prefix_space: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) as SentencePiece's BPE gives them: special tokens, 256 bytes, pieces with `▁` for a space."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix_space else "never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    learned.train_from_iterator([line for text in SENTENCES for line in text.split("\n")], trainer)
    model = json.loads(learned.to_str())["model"]
    words = [*special, *(f"<0x{n:02X}>" for n in range(256)), *(w for w in model["vocab"] if w not in special)]
    return {word: i for i, word in enumerate(words)}, [tuple(pair) for pair in model["merges"]]


def qwen_tokenizer(extra: list[str] = (), **named: str) -> Any:
    """`extra` are further special tokens; `named` are special tokens that become attributes of the tokenizer."""
    from transformers import Qwen2Tokenizer

    words, merges = byte_level_words(Qwen2Tokenizer()._tokenizer.pre_tokenizer)
    made = Qwen2Tokenizer(
        vocab=words, merges=merges, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named,
        model_max_length=2048,
    )  # fmt: skip
    made.add_tokens(["<|im_start|>", *extra], special_tokens=True)
    return made


def llama_tokenizer() -> Any:
    """Adds BOS and a space before the text, knows bytes, has no padding token: as Llama's own."""
    from transformers import LlamaTokenizer

    words, merges = byte_fallback_words(["<unk>", "<s>", "</s>"], prefix_space=True)
    made = LlamaTokenizer(vocab=words, merges=merges, legacy=False, add_bos_token=True)
    made.add_tokens(["<image>", "<pad>"], special_tokens=True)
    made.pad_token = "<pad>"
    return made


def opt_tokenizer() -> Any:
    """GPT-2's splitting with `</s>` (id 2) put before every text, as OPT's; the newline is one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    learned, merges = byte_level_words(ByteLevel(add_prefix_space=False))
    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *learned])}
    return GPT2Tokenizer(
        vocab=words, merges=merges, unk_token="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>",
        add_bos_token=True, model_max_length=2048,
    )  # fmt: skip


def t5_tokenizer() -> Any:
    """Pieces with `▁` for a space; `</s>` (id 1) ends every text, nothing begins it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    learned.train_from_iterator([line for text in SENTENCES for line in text.split("\n")], trainer)
    pieces = [(piece, score) for piece, score in json.loads(learned.to_str())["model"]["vocab"]]
    letters = [(c, -12.0) for c in map(chr, range(33, 127)) if c not in {p for p, _ in pieces}]
    return T5Tokenizer(vocab=[*pieces, *letters], extra_ids=2)


# --- models -------------------------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}


def qwen2vl(folder: Path) -> None:
    _qwen(folder, "Qwen2VL", {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32})


def qwen2_5vl(folder: Path) -> None:
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    _qwen(folder, "Qwen2_5_VL", {**vision, "window_size": 56})


def _qwen(folder: Path, family: str, vision: dict[str, Any]) -> None:
    import transformers as t

    words = qwen_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}}
    processor = getattr(t, "Qwen2VLProcessor" if family == "Qwen2VL" else "Qwen2_5_VLProcessor")(
        image_processor=t.Qwen2VLImageProcessor(**sizes), tokenizer=words, video_processor=t.Qwen2VLVideoProcessor(**sizes), chat_template=QWEN
    )
    ids = {f"{n}_token_id": words.convert_tokens_to_ids(f"<|{w}|>") for n, w in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    text = TEXT | _ends(words) | {
        "vocab_size": len(words), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    config = getattr(t, f"{family}Config")(
        text_config=text, vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}, tie_word_embeddings=True, **ids
    )
    _save(folder, getattr(t, f"{family}ForConditionalGeneration"), config, processor, words)


def qwen3vl(folder: Path) -> None:
    """Patches of 16 pixels, and one layer of the tower handed to the language model by a merger of its own."""
    import transformers as t

    words = qwen_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
    processor = t.Qwen3VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(**sizes), tokenizer=words, video_processor=t.Qwen3VLVideoProcessor(**sizes), chat_template=QWEN
    )
    ids = {f"{n}_token_id": words.convert_tokens_to_ids(f"<|{w}|>") for n, w in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    text = TEXT | _ends(words) | {
        "head_dim": 8, "vocab_size": len(words), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    _save(folder, t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids), processor, words)


def llava(folder: Path) -> None:
    """A CLIP tower before a Qwen2 language model, with a ChatML template that ends every turn."""
    _llava(folder, qwen_tokenizer(["<image>"]), "qwen2", CHATML.replace("IMAGE_PLACE", "<image>\\n"))


def llava_vicuna(folder: Path) -> None:
    """As LLaVA-1.5: Llama, a tokenizer that adds BOS and a space, a template without end tokens."""
    _llava(folder, llama_tokenizer(), "llama", VICUNA)


def _llava(folder: Path, words: Any, kind: str, template: str) -> None:
    import transformers as t

    side = {"height": SIDE, "width": SIDE}
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side), tokenizer=words, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **TOWER},
        text_config=TEXT | _ends(words) | {"model_type": kind, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    _save(folder, t.LlavaForConditionalGeneration, config, processor, words)


def blip2(folder: Path) -> None:
    """OPT with dropout alive, six queries, and the newline as the end of text, as the published checkpoint."""
    words = opt_tokenizer()
    newline = words.encode("\n", add_special_tokens=False)
    assert len(newline) == 1
    text = {
        "model_type": "opt", "vocab_size": len(words), "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32, "dropout": 0.1, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": newline[0],
    }  # fmt: skip
    _blip(folder, "Blip2", words, text, newline[0])


def blip2_t5(folder: Path) -> None:
    """Flan-T5's kind of language model: gated MLPs, a head of its own, texts that end with `</s>` (id 1)."""
    words = t5_tokenizer()
    _blip(folder, "Blip2", words, t5_config(words), 1)


def instructblip(folder: Path) -> None:
    """Vicuna as the language model, and a Q-Former that reads the question."""
    words = llama_tokenizer()
    text = TEXT | {"model_type": "llama", "vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": words.pad_token_id}
    _blip(folder, "InstructBlip", words, text, 2)


def instructblip_t5(folder: Path) -> None:
    words = t5_tokenizer()
    _blip(folder, "InstructBlip", words, t5_config(words), 1)


def t5_config(words: Any) -> dict[str, Any]:
    return {
        "model_type": "t5", "vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.1,
    }  # fmt: skip


def _blip(folder: Path, family: str, words: Any, text: dict[str, Any], eos: int) -> None:
    import transformers as t

    parts: dict[str, Any] = {"image_processor": t.BlipImageProcessor(size={"height": SIDE, "width": SIDE}), "tokenizer": words, "num_query_tokens": 6}
    qformer = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8,
        "max_position_embeddings": 16, "encoder_hidden_size": 24, "cross_attention_frequency": 2,
    }  # fmt: skip
    if family == "InstructBlip":
        letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{mark}{c}" for c in "abcdefghijklmnopqrstuvwxyz?.,0123456789" for mark in ("", "##"))]
        parts["qformer_tokenizer"] = t.BertTokenizer(vocab={w: i for i, w in enumerate(letters)})
        qformer |= {"vocab_size": len(letters), "max_position_embeddings": 64}
    processor = getattr(t, f"{family}Processor")(**parts)
    vocabulary = max(text["vocab_size"], len(words))  # the processor has added <image>
    config = getattr(t, f"{family}Config")(
        vision_config=TOWER | {"attention_dropout": 0.0}, qformer_config=qformer, text_config=text | {"vocab_size": vocabulary}, num_query_tokens=6,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    _save(folder, getattr(t, f"{family}ForConditionalGeneration"), config, processor, words, eos=eos)


def smolvlm(folder: Path) -> None:
    """Four 16-pixel tiles beside the whole picture: 5 x 4 features for each image."""
    import transformers as t

    rows = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    words = qwen_tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>", *rows])
    words.eos_token = "<end_of_utterance>"
    processor = t.SmolVLMProcessor(
        image_processor=t.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer=words, video_processor=t.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=SMOL,
    )  # fmt: skip
    text = TEXT | _ends(words) | {"model_type": "llama", "vocab_size": len(words)}
    config = t.SmolVLMConfig(
        vision_config=TOWER | {"image_size": 16, "patch_size": 4}, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    _save(folder, t.SmolVLMForConditionalGeneration, config, processor, words)


def gemma3(folder: Path) -> None:
    """Sixteen SigLIP patches pooled to four features; token_type_ids open attention between the image's tokens."""
    import transformers as t

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    vocabulary, merges = byte_fallback_words(special, prefix_space=False)
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = t.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens=named)
    words.add_tokens(special[5:7], special_tokens=True)
    processor = t.Gemma3Processor(
        image_processor=t.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer=words, chat_template=GEMMA, image_seq_length=4
    )
    number = words.convert_tokens_to_ids
    text = TEXT | {"vocab_size": len(words), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = t.Gemma3Config(
        text_config=text, vision_config=TOWER | {"vision_use_head": False}, mm_tokens_per_image=4, boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"), image_token_index=number("<image_soft_token>"),
    )  # fmt: skip
    _save(folder, t.Gemma3ForConditionalGeneration, config, processor, words, eos=[words.eos_token_id, number("<end_of_turn>")])


def internvl(folder: Path) -> None:
    import transformers as t

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = qwen_tokenizer(**named)
    processor = t.InternVLProcessor(
        image_processor=t.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=2),
        tokenizer=words, video_processor=t.InternVLVideoProcessor(), image_seq_length=4, chat_template=CHATML.replace("IMAGE_PLACE", "<IMG_CONTEXT>\\n"),
    )  # fmt: skip
    vision = TOWER | {"image_size": [SIDE, SIDE], "patch_size": [14, 14]}
    config = t.InternVLConfig(
        vision_config=vision, text_config=TEXT | _ends(words) | {"model_type": "qwen2", "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    _save(folder, t.InternVLForConditionalGeneration, config, processor, words)


def llava_onevision(folder: Path) -> None:
    """The picture whole and in at most 2 x 2 tiles of 56 pixels, 16 features each; a learned newline ends every row of the tiles."""
    import transformers as t

    words = qwen_tokenizer(["<image>", "<video>"])
    side, tiles = {"height": SIDE, "width": SIDE}, [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = t.LlavaOnevisionProcessor(
        image_processor=t.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=tiles), tokenizer=words,
        video_processor=t.LlavaOnevisionVideoProcessor(size=side), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n"),
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        text_config=TEXT | _ends(words) | {"model_type": "qwen2", "vocab_size": len(words)}, image_grid_pinpoints=tiles,
        image_token_index=words.convert_tokens_to_ids("<image>"), video_token_index=words.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    _save(folder, t.LlavaOnevisionForConditionalGeneration, config, processor, words)


def _ends(words: Any) -> dict[str, int]:
    return {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


def _save(folder: Path, model_class: Any, config: Any, processor: Any, words: Any, eos: Any = None) -> None:
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # weights large enough that every part is felt in the loss
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id if eos is None else eos, pad_token_id=words.pad_token_id
    )
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "qwen2vl": qwen2vl, "qwen2_5vl": qwen2_5vl, "qwen3vl": qwen3vl, "llava": llava, "llava_vicuna": llava_vicuna, "blip2": blip2,
    "smolvlm": smolvlm, "gemma3": gemma3, "internvl": internvl, "llava_onevision": llava_onevision,
}  # fmt: skip
# Further kinds, of which only some tests are asked.
MORE: dict[str, Callable[[Path], None]] = {"blip2_t5": blip2_t5, "instructblip": instructblip, "instructblip_t5": instructblip_t5}
# The model group of each kind.
GROUP = {kind: "llava" if kind == "llava_vicuna" else kind.removesuffix("_t5") for kind in (*KINDS, *MORE)}
CAPTIONS = ("blip2", *MORE)  # kinds with the caption collator


def build(kind: str, folder: Path) -> Path:
    (KINDS | MORE)[kind](folder)
    return folder


# --- what tests do with them --------------------------------------------------------------------------------------


def family(kind: str, folder: Path, **keys: Any) -> Any:
    """The Family object that conf/model/<group>.yaml builds for this kind."""
    return _family_class(GROUP[kind])(path=str(folder), **keys)


@functools.cache
def _family_class(group: str) -> Any:
    from mmft.config.compose import compose
    from mmft.config.guard.targets import resolve

    return resolve(compose([f"model={group}"]).model._target_, "model")


def collator(kind: str, folder: Path, config: Any = None, **keys: Any) -> Any:
    """The kind's own collator over its processor, without its weights."""
    from transformers import GenerationConfig

    from mmft.collators.caption import CaptionCollator
    from mmft.collators.chat import ChatCollator

    own = family(kind, folder)
    located = locate_model(own)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return (CaptionCollator if kind in CAPTIONS else ChatCollator)(
        processor=load_processor(own, located), family=own, model_config=config or load_config(own, located),
        end_token_ids=ends if isinstance(ends, list) else [ends], **keys,
    )  # fmt: skip


SIZES = [(56, 56), (84, 56), (112, 84)]  # width, height of the pictures 0.png, 1.png, 2.png


def pictures(folder: Path) -> Path:
    """Three small pictures of noise, the same on every machine."""
    import random

    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(SIZES):
        Image.frombytes("RGB", (width, height), random.Random(i).randbytes(3 * width * height)).save(folder / f"{i}.png")
    return folder


def sample(root: Path, id: str, images: list[int], *turns: str | dict[str, Any], system: str | None = None) -> Any:
    """user, assistant, user, ... texts as a Sample; all images stand in the first turn unless a turn is a whole message."""
    from mmft.data.sample import Sample, assistant_turn, text_part, user_turn

    messages = [{"role": "system", "content": [text_part(system)]}] if system else []
    for i, turn in enumerate(turns):
        if isinstance(turn, dict):
            messages.append(turn)
        else:
            messages.append(assistant_turn(turn) if i % 2 else user_turn(len(images) if i == 0 else 0, turn))
    answer = messages[-1]["content"][0]["text"]
    return Sample(id, tuple(f"{i}.png" for i in images), messages, (answer,), str(root))


class Small:
    """Every kind's folder, made once; the pictures; and collators, cached where they take no keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = pictures(folder / "pictures")
        self._collators: dict[str, Any] = {}

    def __call__(self, kind: str) -> Path:
        path = self.folder / kind
        return path if path.is_dir() else build(kind, path)

    def family(self, kind: str, **keys: Any) -> Any:
        return family(kind, self(kind), **keys)

    def load(self, kind: str, **keys: Any) -> tuple[Any, Any, Any]:
        """(model, collator, family), the model fresh."""
        own = self.family(kind, **keys)
        loaded = load_model(own)
        return loaded.model, self.collator(kind), own

    def collator(self, kind: str, **keys: Any) -> Any:
        if keys:
            return collator(kind, self(kind), **keys)
        if kind not in self._collators:
            self._collators[kind] = collator(kind, self(kind))
        return self._collators[kind]

    def sample(self, id: str, images: list[int], *turns: Any, **keys: Any) -> Any:
        return sample(self.root, id, images, *turns, **keys)
