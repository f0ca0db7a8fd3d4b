"""What the benchmark runs on: random models with the proportions of the published ones, photos with captions, a tokenizer learned from them.

    python -m benchmarks.fixture OUT [--photos FOLDER] [--rows 32]     build it alone, to look at
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "Describe this picture."  # of the chat models; BLIP-2 is trained on bare captions
SIDE = 280  # pixels: Qwen2-VL's pictures have at most SIDE x SIDE of them
# Renders what Qwen2-VL's own template renders, except that no system turn is added; LLaVA's fixture uses the same turns.
CHAT = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- 'PLACE' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Widths and depths of about 40 M parameters. The ratios are the published models': vision to text width, MLP to width, depth of one
# to the other, and the share of the vocabulary's table (Qwen2-VL-2B: 1280 and 1536, 32 and 28 layers, MLP 5.83, 10 % of all weights).
# The tokenizer learned here has fewer words than the table has rows, so that the head costs what it costs in the large.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "qwen2vl": {
            "text": {"hidden_size": 384, "intermediate_size": 2240, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 11008},
            "vision": {"depth": 9, "embed_dim": 320, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 384},
            "mrope": [8, 12, 12],
        },
        # Qwen1.5-4B and CLIP-L: 2560 and 1024, 40 and 24 layers, MLP 2.7, an untied table of 18 %
        "llava": {
            "text": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 24, "num_attention_heads": 5, "num_key_value_heads": 5, "vocab_size": 11008},
            "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 14, "num_attention_heads": 4, "image_size": 168, "patch_size": 14},
        },
        # OPT-2.7b and ViT-g: 2560 and 1408, 32 and 39 layers, MLP 4 and 4.36; 32 queries of a Q-Former of 3 %
        "blip2": {
            "text": {"hidden_size": 384, "ffn_dim": 1536, "num_hidden_layers": 14, "num_attention_heads": 6, "word_embed_proj_dim": 384, "vocab_size": 4000},
            "vision": {"hidden_size": 224, "intermediate_size": 977, "num_hidden_layers": 17, "num_attention_heads": 4, "image_size": 224, "patch_size": 14},
            "qformer": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        },
    },
    # for --quick: the same code in seconds
    "quick": {
        "qwen2vl": {
            "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 2048},
            "vision": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 64},
            "mrope": [2, 3, 3],
        },
        "llava": {
            "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048},
            "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
        },
        "blip2": {
            "text": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64, "vocab_size": 2048},
            "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
            "qformer": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        },
    },
}

# --- photos and captions ------------------------------------------------------------------------------------------


def photos(folder: Path | None, out: Path, rows: int) -> list[dict[str, str]]:
    """`rows` pictures copied to out/images with one caption each, also written to out/captions.jsonl.

    folder: a COCO folder (captions_*.json and images/), or any folder of .jpg and .png, whose captions are then made up;
    None: pictures are drawn. Errors raised: SystemExit where the folder holds too few.
    """
    (out / "images").mkdir(parents=True)
    draw = random.Random(0)
    words = ["a", "two", "red", "small", "old", "dog", "cat", "boat", "street", "table", "man", "woman", "with", "near", "under", "white", "grass", "train"]
    captions: dict[str, str] = {}
    files: list[Path] = []
    if folder is not None:
        files = sorted(p for p in [*folder.glob("*"), *folder.glob("images/*")] if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(files) < rows:
            raise SystemExit(f"--photos {folder}: {len(files)} pictures, {rows} are needed (or give fewer --rows)")
        for file in sorted(folder.glob("captions_*.json")):
            content = json.loads(file.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for annotation in content["annotations"]:
                captions.setdefault(names[annotation["image_id"]], " ".join(annotation["caption"].split()))
    found = []
    for i in range(rows):
        if folder is None:
            name = f"{i:03d}.jpg"
            _draw(i).save(out / "images" / name, quality=90)
        else:
            name = files[i].name
            shutil.copyfile(files[i], out / "images" / name)
        text = captions.get(name) or " ".join(draw.choices(words, k=draw.randint(7, 16))).capitalize() + "."
        found.append({"image": f"images/{name}", "text": text})
    (out / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return found


def _draw(seed: int) -> Any:
    """A picture of the size and the softness of a photo: noise of a few pixels, blown up."""
    from PIL import Image

    noise = random.Random(seed)
    width, height = [(640, 480), (480, 640), (640, 427), (500, 375)][seed % 4]
    return Image.frombytes("RGB", (16, 12), noise.randbytes(3 * 16 * 12)).resize((width, height), Image.Resampling.BICUBIC)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def _learn(splitter: Any, texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = splitter
    alphabet = sorted(ByteLevel.alphabet())
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1800, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _chat_tokenizer(texts: list[str], extra: list[str]) -> Any:
    from transformers import Qwen2Tokenizer

    words, merges = _learn(Qwen2Tokenizer()._tokenizer.pre_tokenizer, [*texts, *["user\nassistant\n" + PROMPT] * 4])
    made = Qwen2Tokenizer(vocab=words, merges=merges, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096)
    made.add_tokens(["<|im_start|>", *extra], special_tokens=True)
    return made


def _opt_tokenizer(texts: list[str]) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    learned, merges = _learn(ByteLevel(add_prefix_space=False), texts)
    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *learned])}
    return GPT2Tokenizer(vocab=words, merges=merges, unk_token="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True, model_max_length=2048)


# --- models -------------------------------------------------------------------------------------------------------


def _qwen2vl(shape: dict[str, Any], texts: list[str]) -> tuple[Any, Any, Any]:
    import transformers as t

    words = _chat_tokenizer(texts, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}}
    processor = t.Qwen2VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(**sizes), tokenizer=words, video_processor=t.Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = {f"{n}_token_id": words.convert_tokens_to_ids(f"<|{w}|>") for n, w in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    text = shape["text"] | _ends(words) | {
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]},
    }  # fmt: skip
    vision = shape["vision"] | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids), processor


def _llava(shape: dict[str, Any], texts: list[str]) -> tuple[Any, Any, Any]:
    import transformers as t

    words, side = _chat_tokenizer(texts, ["<image>"]), shape["vision"]["image_size"]
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), tokenizer=words, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT.replace("PLACE", "<image>\\n"),
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 64, **shape["vision"]},
        text_config=shape["text"] | _ends(words) | {"model_type": "qwen2", "max_position_embeddings": 4096},
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return t.LlavaForConditionalGeneration, config, processor


def _blip2(shape: dict[str, Any], texts: list[str]) -> tuple[Any, Any, Any]:
    """OPT's dropout is 0: the plain loop would leave it alive in the frozen base, and no two loops would then do the same work."""
    import transformers as t

    words, side = _opt_tokenizer(texts), shape["vision"]["image_size"]
    processor = t.Blip2Processor(image_processor=t.BlipImageProcessor(size={"height": side, "width": side}), tokenizer=words, num_query_tokens=32)
    (newline,) = words.encode("\n", add_special_tokens=False)
    config = t.Blip2Config(
        vision_config=shape["vision"] | {"attention_dropout": 0.0},
        qformer_config=shape["qformer"] | {
            "vocab_size": 8, "max_position_embeddings": 64, "encoder_hidden_size": shape["vision"]["hidden_size"], "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        text_config=shape["text"] | {
            "model_type": "opt", "max_position_embeddings": 512, "dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 2, "pad_token_id": 1,
            "eos_token_id": newline,
        },
        num_query_tokens=32, image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return t.Blip2ForConditionalGeneration, config, processor


def _ends(words: Any) -> dict[str, int]:
    return {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


# A template without roles' names: the last word of the question is the last token before the answer, which the counting model reads.
BARE = (
    "{%- for message in messages -%}{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- if message.role == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
)
FORMS = "abcd"  # each number of the counting model has four tokens


def number(n: int, form: str = "a") -> str:
    """The token of a number."""
    return f"@{n:03d}{form}"


def count_down(folder: Path, most: int) -> None:
    """Change the Qwen2-VL fixture in `folder` so that it answers a question that ends in `number(n)` by n - 1 numbers, n - 1 to 1, and its end token.

    A token of the number n has a large embedding in a direction of this number, and the head's rows of n - 1 point there, so the number of the
    next token is certain. Which of its four tokens is written depends on the rest of the hidden state: on the picture, the question and all
    tokens before, through all layers. So an answer has the length that the row asks for, and it differs if a cache, mask or position is wrong.
    """
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    words = processor.tokenizer
    words.add_tokens([number(n, form) for n in range(1, most + 1) for form in FORMS])
    processor.chat_template = BARE
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    embeddings, width = model.get_input_embeddings(), model.config.text_config.hidden_size
    if len(words) > embeddings.num_embeddings:
        raise SystemExit(f"a table of {embeddings.num_embeddings} rows has no room for {len(words)} words")
    draw = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(most + 1, width, generator=draw), dim=-1)
    head = torch.nn.Linear(width, embeddings.num_embeddings, bias=False)
    with torch.no_grad():
        head.weight.copy_(embeddings.weight)
        for n in range(1, most + 1):
            for form in FORMS:
                token = words.convert_tokens_to_ids(number(n, form))
                embeddings.weight[token] = 100 * directions[n]
                head.weight[token] = 2 * torch.nn.functional.normalize(torch.randn(width, generator=draw), dim=-1)
                if n < most:
                    head.weight[token] += 2 * directions[n + 1]
        head.weight[words.eos_token_id] = 3 * directions[1]
    model.lm_head = head
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


FAMILIES: dict[str, Callable[[dict[str, Any], list[str]], tuple[Any, Any, Any]]] = {"qwen2vl": _qwen2vl, "llava": _llava, "blip2": _blip2}


def build(family: str, folder: Path, texts: list[str], size: str = "small") -> int:
    """A model folder as `save_pretrained` leaves it, fp32, seeded; the number of its parameters."""
    import torch
    from transformers import GenerationConfig

    model_class, config, processor = FAMILIES[family](SHAPES[size][family], texts)
    torch.manual_seed(0)
    model = model_class(config)
    ends = config.text_config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=config.text_config.bos_token_id, eos_token_id=ends, pad_token_id=config.text_config.pad_token_id)
    with torch.no_grad():  # wider than the libraries' 0.02, so that the picture is felt in the loss
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05)
        if family == "blip2":
            quieten(model.language_model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def quieten(language_model: Any) -> None:
    """Make what each OPT layer adds to its input small, as in trained models (GPT-2 begins with 1 / sqrt(2 x layers)).

    With layers that add more than they got, features that differ by 3e-7 give losses that differ by 2e-6 at the first step and 4e-4 at the ninth (learning
    rate 3e-4); with these and 1e-4 the first two steps are equal to 1e-6, and all 16 to 4e-5.
    """
    for name, parameter in language_model.named_parameters():
        if name.endswith(("fc2.weight", "out_proj.weight")):
            parameter.mul_(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--size", choices=SHAPES, default="small")
    args = parser.parse_args()
    rows = photos(args.photos, args.out, args.rows)
    for family in FAMILIES:
        print(f"{family}: {build(family, args.out / family, [row['text'] for row in rows], args.size) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
