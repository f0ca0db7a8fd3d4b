"""Older models without a chat template: Florence-2, Fuyu, Kosmos-2, Kosmos-2.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import ModelType, byte_level_words, save

NONE = "none: completions"


def florence2(folder: Path) -> None:
    """DaViT before BART: image and prompt are the encoder's text; the decoder's first token is always `<s>`."""
    import transformers as t
    from tokenizers.pre_tokenizers import ByteLevel

    learned, merges = byte_level_words(ByteLevel(add_prefix_space=False))
    vocabulary = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *learned, "<mask>"])}
    words = t.BartTokenizer(vocab=vocabulary, merges=merges)
    words.add_tokens([*(f"<loc_{i}>" for i in range(8)), "<image>"], special_tokens=True)
    words._set_model_specific_special_tokens(special_tokens={"image_token": "<image>"})
    image_processor = t.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    image_processor.image_seq_length = 5
    processor = t.Florence2Processor(image_processor=image_processor, tokenizer=words)
    text = {
        "model_type": "bart", "vocab_size": len(words), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256, "dropout": 0.1, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }  # fmt: skip
    vision = {
        "depths": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2], "window_size": 4, "projection_dim": 32,
        "max_position_embeddings": 8, "max_temporal_embeddings": 4,
    }  # fmt: skip
    config = t.Florence2Config(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"))
    save(folder, t.Florence2ForConditionalGeneration, config, processor, words)
    generation_values(folder, decoder_start_token_id=2, forced_bos_token_id=0)


def generation_values(folder: Path, **values: Any) -> None:
    """Write values into a saved generation config."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(folder)
    config.update(**values)
    config.save_pretrained(folder)


def fuyu(folder: Path) -> None:
    """No tower: patches of 8 pixels go through one linear layer; a newline token ends every row of them."""
    import transformers as t

    words = unigram_words(["<unk>", "<s>", "</s>"], ["|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|", "<0x04>"], unk="<unk>")
    words.eos_token = "|ENDOFTEXT|"
    processor = t.FuyuProcessor(
        image_processor=t.FuyuImageProcessor(size={"height": 64, "width": 96}, patch_size={"height": 16, "width": 16}), tokenizer=words
    )
    text = TEXT | {
        "model_type": "persimmon", "vocab_size": len(words), "hidden_act": "relu2", "qk_layernorm": True, "bos_token_id": 1, "eos_token_id": words.eos_token_id,
        "pad_token_id": 0,
    }  # fmt: skip
    config = t.FuyuConfig(text_config=text, image_size=64, patch_size=16, image_token_id=words.convert_tokens_to_ids("|SPEAKER|"))
    save(folder, t.FuyuForCausalLM, config, processor, words)


def unigram_words(special: list[str], pieces: list[str], unk: str) -> Any:
    """A vocabulary of SentencePiece's kind, `▁` for a space. special: special tokens; pieces: further words of the vocabulary; BOS is <s>."""
    import json

    import transformers as t
    from small_models import SENTENCES
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*special, *pieces], unk_token=unk, show_progress=False, initial_alphabet=[chr(i) for i in range(33, 127)]
    )
    learned.train_from_iterator([line for text in SENTENCES for line in text.split("\n")], trainer)
    vocabulary = [tuple(piece) for piece in json.loads(learned.to_str())["model"]["vocab"]]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=special.index(unk)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = t.TokenizersBackend(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token=unk)
    words.add_tokens(special, special_tokens=True)
    return words


def kosmos_words(named: dict[str, str]) -> Any:
    """`<s> <pad> </s> <unk>` first; without `named` tokens, BOS and EOS around every text."""
    from tokenizers import processors

    words = unigram_words(["<s>", "<pad>", "</s>", "<unk>"], [], unk="<unk>")
    words.pad_token = "<pad>"
    if named:
        words.add_tokens(list(named.values()), special_tokens=True)
        words._set_model_specific_special_tokens(special_tokens=named)
    else:
        words._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return words


KOSMOS_TEXT = {
    "max_position_embeddings": 512, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4, "dropout": 0.1, "attention_dropout": 0.0,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def kosmos2(folder: Path) -> None:
    """A resampler gives 64 features for an image; a mask tells where they go, not the ids."""
    import transformers as t

    words = kosmos_words({})
    processor = t.Kosmos2Processor(
        image_processor=t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer=words, num_patch_index_tokens=16
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = t.Kosmos2Config(text_config=KOSMOS_TEXT | {"vocab_size": len(words)}, vision_config=vision, latent_query_num=64)
    save(folder, t.Kosmos2ForConditionalGeneration, config, processor, words)


def kosmos2_5(folder: Path) -> None:
    """Flattened patches of any number, and a resampler like Kosmos-2's."""
    import transformers as t

    words = kosmos_words({"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<s_img>"})
    processor = t.Kosmos2_5Processor(
        image_processor=t.Kosmos2_5ImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=16), tokenizer=words, num_image_tokens=8
    )
    vision = {
        "hidden_size": 16, "patch_embed_hidden_size": 192, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_num_patches": 128,
    }  # fmt: skip
    config = t.Kosmos2_5Config(text_config=KOSMOS_TEXT | {"vocab_size": len(words)}, vision_config=vision, latent_query_num=8)
    save(folder, t.Kosmos2_5ForConditionalGeneration, config, processor, words)


TYPES = {
    "florence2": ModelType(florence2, "encoder-decoder", group="florence2", collator="completion", template=NONE),
    "fuyu": ModelType(fuyu, "no tower", collator="completion", template=NONE),
    "kosmos-2": ModelType(kosmos2, "resampler", group="kosmos2", collator="completion", template=NONE),
    "kosmos-2.5": ModelType(kosmos2_5, "resampler", group="kosmos2", collator="completion", template=NONE),
}
