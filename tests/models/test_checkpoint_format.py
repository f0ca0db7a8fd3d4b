"""Checkpoints that cannot be used are refused from their config.json, with a way forward, before weights are read or downloaded."""

from __future__ import annotations

import json
import shutil

import pytest
from hub import Hub

from mmft.common.errors import UserError
from mmft.models.families.base import Family
from mmft.models.families.llava import Llava
from mmft.models.load import load_processor, locate_model


def folder_with(tmp_path, name: str, **config):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


CHAT = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}


@pytest.mark.parametrize("name, told, counterpart", [
    ("InternVL3-1B", None, "OpenGVLab/InternVL3-1B-hf"),
    ("InternVL3-78B", None, "OpenGVLab/InternVL3-78B-hf"),
    ("InternVL3-8B-Instruct", None, "OpenGVLab/InternVL3-8B-hf"),
    ("InternVL3_5-4B", None, "OpenGVLab/InternVL3_5-4B-HF"),
    ("InternVL3_5-30B-A3B", None, "OpenGVLab/InternVL3_5-30B-A3B-HF"),
    ("InternVL3_5-8B-MPO", None, "OpenGVLab/InternVL3_5-8B-HF"),
    ("mine", "OpenGVLab/InternVL3-2B", "OpenGVLab/InternVL3-2B-hf"),
    ("InternVL2_5-4B", None, "such as model.path=OpenGVLab/InternVL3-1B-hf"),
    ("InternVL2-1B", None, "such as model.path=OpenGVLab/InternVL3-1B-hf"),
    ("renamed", None, "such as model.path=OpenGVLab/InternVL3-1B-hf"),
])  # fmt: skip
@pytest.mark.parametrize("trusted", [False, True])
def test_internvls_own_format_names_its_counterpart(tmp_path, monkeypatch, name, told, counterpart, trusted):
    if trusted:
        monkeypatch.setenv("MMFT_TRUST_REMOTE_CODE", "1")
    folder = folder_with(tmp_path, name, **CHAT, **({"_name_or_path": told} if told else {}))
    with pytest.raises(UserError, match="InternVL's own format") as caught:
        locate_model(Family(path=str(folder)))
    assert str(caught.value).endswith(counterpart) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config, expected", [
    ({"model_type": "brand_new_vl"}, "install a newer one: pip install -U transformers"),
    ({"model_type": "own_vl", "auto_map": {"AutoConfig": "configuration_own.Own"}}, "add the flag --trust-remote-code"),
    ({"model_type": "qwen2", "vocab_size": 9}, "mmft assemble llm="),
    ({"model_type": "siglip_vision_model"}, "is not a vision-language model"),
    ({}, "its config.json cannot be used"),
])  # fmt: skip
def test_other_checkpoints_are_refused_with_a_way_forward(tmp_path, config, expected):
    folder = folder_with(tmp_path, "model", **config)
    with pytest.raises(UserError) as caught:
        locate_model(Family(path=str(folder)))
    assert expected in str(caught.value) and str(caught.value).startswith("model.path=") and "\n" not in str(caught.value)


def test_a_folder_without_a_processor(small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small("llava"), folder, ignore=shutil.ignore_patterns("*processor*", "tokenizer*"))
    family = Llava(path=str(folder))
    with pytest.raises(UserError, match="no usable processor") as caught:
        load_processor(family, locate_model(family))
    assert "copy them from the checkpoint" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_a_refused_model_are_not_downloaded(tmp_path):
    """From either hub. In one process, since its imports take seconds."""
    import os
    import subprocess
    import sys

    code = (
        "from mmft.common.errors import UserError\nfrom mmft.models.families.base import Family\nfrom mmft.models.load import locate_model\n"
        "for hub in ('huggingface', 'modelscope'):\n"
        "    try: locate_model(Family(path='OpenGVLab/InternVL3-1B', hub=hub))\n    except UserError as error: print(hub, error)"
    )
    with Hub() as hub:
        hub.add("models", "OpenGVLab/InternVL3-1B", {"config.json": json.dumps(CHAT).encode(), "model.safetensors": b"x" * 1000, "tokenizer.json": b"{}"})
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **hub.environment(tmp_path)})
        said = [line for line in done.stdout.splitlines() if "model.path=OpenGVLab/InternVL3-1B-hf" in line]
        assert [line.split()[0] for line in said] == ["huggingface", "modelscope"], done.stderr[-1500:]
        assert any("/resolve/" in c for c in hub.calls) and any("/api/v1/models/" in c for c in hub.calls), "each hub was asked"
        assert not [c for c in hub.calls if "safetensors" in c]
