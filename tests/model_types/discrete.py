"""Models that read an image as tokens of a codebook: Apertus 1.5, Chameleon."""

from __future__ import annotations

from pathlib import Path

from small_models import TEXT

from .base import ModelType, byte_fallback_words, ends, save
from .llama import words_of_llama

# Apertus's turns, as its documentation describes them.
APERTUS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|' + m.role + '_start|>' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|' + m.role + '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"""


def apertus1p5(folder: Path) -> None:
    """Each image becomes rows of codebook tokens; sounds have a codebook of their own."""
    import transformers as t

    named = {
        "image_token": "<|image|>", "audio_token": "<|audio|>", "boi_token": "<|img_start|>", "eoi_token": "<|img_end|>", "image_wrapper_token": "<|img_token_start|>",
        "eol_token": "<|img_end_of_row|>", "boa_token": "<|audio_start|>", "eoa_token": "<|audio_end|>",
    }  # fmt: skip
    turns = [f"<|{role}_{edge}|>" for role in ("system", "user") for edge in ("start", "end")] + ["<|assistant_start|>"]
    words = words_of_llama("<s>", "<|assistant_end|>", "<pad>", [*turns, *named.values()])
    words._set_model_specific_special_tokens(special_tokens=named)
    processor = t.Apertus1p5Processor(
        image_processor=t.Apertus1p5ImageProcessor(size={"min_pixels": 32 * 32, "max_pixels": 64 * 64}), feature_extractor=t.WavTokenizerFeatureExtractor(),
        tokenizer=words, chat_template=APERTUS,
    )  # fmt: skip
    number, n = words.convert_tokens_to_ids, len(words)
    config = t.Apertus1p5Config(
        text_config=TEXT | ends(words) | {"vocab_size": n + 24, "hidden_act": "silu"},
        vision_config={
            "codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1,
            "attn_resolutions": [], "resolution": 64,
        },
        audio_config={
            "model_type": "wavtokenizer_encoder", "num_filters": 4, "upsampling_ratios": [2, 2], "num_lstm_layers": 1, "hidden_size": 16, "codebook_size": 8, "codebook_dim": 16,
            "decoder_hidden_size": 32, "decoder_intermediate_size": 32, "decoder_num_layers": 1,
        },
        image_token_id=number("<|image|>"), audio_token_id=number("<|audio|>"), image_token_offset=n, audio_token_offset=n + 16,
    )  # fmt: skip
    save(folder, t.Apertus1p5ForConditionalGeneration, config, processor, words)


def chameleon(folder: Path) -> None:
    """Codebook tokens have names in the vocabulary; a separator stands between question and answer."""
    import transformers as t

    codes = [f"IMGIMG{'' if i < 10 else chr(ord('A') + i // 10)}{chr(ord('A') + i % 10)}Z" for i in range(16)]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<racm3:break>", "<eoss>", "<image>", "<reserved08706>", *codes]
    vocabulary, merges = byte_fallback_words(special, prefix_space=False)
    words = t.LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False, add_bos_token=True)
    words.add_tokens([*special[4:8]], special_tokens=True)
    words.pad_token, words.sep_token = "<pad>", "<reserved08706>"
    side = {"height": 64, "width": 64}
    processor = t.ChameleonProcessor(
        image_processor=t.ChameleonImageProcessor(size={"shortest_edge": 64}, crop_size=side), tokenizer=words, image_seq_length=16, image_token="<image>"
    )
    config = t.ChameleonConfig(
        **TEXT | ends(words) | {"vocab_size": len(words)}, vocabulary_map={token: words.convert_tokens_to_ids(token) for token in ["<image>", *codes]},
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 64, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    )  # fmt: skip
    save(folder, t.ChameleonForConditionalGeneration, config, processor, words)


TYPES = {
    "apertus1p5": ModelType(apertus1p5, "codebook tokens"),
    "chameleon": ModelType(chameleon, "codebook tokens", collator="completion", template="none: completions"),
}
