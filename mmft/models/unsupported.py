"""Model types of transformers that mmft refuses, each with the reason: they would be trained or used wrongly, or are no chat or caption models."""

from __future__ import annotations

_RENAMED = "when peft loads an adapter for it, transformers renames some of its layers, and those adapters stay random"
# model type -> what is wrong, as the end of "a TYPE is not supported: ..."; a way on follows if there is one
UNSUPPORTED: dict[str, str] = {
    "blip": "its `generate` replaces the first token of a prompt and drops the last, so what is trained is not what is used; model=blip2 writes captions, too",
    "diffusion_gemma": "it is trained to restore masked blocks of text, not to write the next token",
    "emu3": "the tokens of an image depend on the sizes of the images beside it in a batch",
    "evolla": "it reads proteins, not images",
    "git": "it puts image features before the text itself, so its logits do not stand where the labels are; model=blip2 writes captions, too",
    "idefics": "its processor takes lists of texts and images in place of a chat template; model=idefics3 is its successor",
    "instructblipvideo": "it reads frames of videos; model=instructblip reads images",
    "pi0": "it is a robot policy and writes actions, not text",
    "pix2struct": "its question is drawn into the image, with a font that the image processor downloads; model=florence2 reads questions as text",
    "pp_formulanet": "it reads formulas and takes no question",
    "shieldgemma2": "it classifies images by policies and answers with two scores; model=gemma3 writes text",
    "udop": "it reads the words of a page and their boxes beside the image, and rows of images and texts have none",
    "vision-encoder-decoder": "it takes no question beside the image; model=florence2 does",
    "deepseek_ocr2": _RENAMED, "inkling2": _RENAMED, "inkling2_loop": _RENAMED, "mistral_large4": _RENAMED,
    "mistral4": "it is a language model without a vision part; Mistral Small 4 with its vision part is a mistral3",
    "unlimited_ocr": "in generation a token reads the prompt and the last 128 tokens of the answer, in training the whole answer before it",
    "hunyuan_vl": "transformers numbers the images of a whole batch for its rotary positions, so a row's result depends on the rows before it",
}
