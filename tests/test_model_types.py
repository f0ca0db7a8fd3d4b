"""Model types: small models of twelve kinds of architecture pass every check; the table of all types is up to date; refusals."""

from __future__ import annotations

import json
import shutil

import conformance_table
import pytest
from model_types import TYPES, load
from PIL import Image
from places import ROOT
from small_models import MORE

from mmft.common.errors import UserError
from mmft.config.build import build
from mmft.config.compose import compose
from mmft.config.guard.targets import resolve
from mmft.conformance.checks import run_checks
from mmft.conformance.subject import Subject
from mmft.models import checkpoint_format
from mmft.models.families.base import Family
from mmft.models.families.llava import Llava
from mmft.models.families.qwen2vl import Qwen2VL
from mmft.models.family_choice import check_family, family_class
from mmft.models.load import load_processor, locate_model
from mmft.models.unsupported import UNSUPPORTED

# One type for each kind of architecture; tests/test_conformance.py has dense, tiled, deepstack, native resolution, pooled projector, Q-Former and
# an encoder-decoder already. `pytest -m long` checks all types.
CHECKED: tuple[str, ...] = (
    "qwen3_vl_moe", "qwen3_5", "glm4v_moe", "lfm2_vl", "pp_chart2table", "mllama", "florence2", "paligemma", "gemma4", "molmo2", "llama4", "fuyu",
)  # fmt: skip


@pytest.mark.parametrize("kind", CHECKED)
def test_these_types_pass_every_check(kind, tmp_path):
    TYPES[kind].build(tmp_path / "model")
    results = run_checks(Subject.create(*load(TYPES[kind], tmp_path / "model"), tmp_path / "images"))
    assert not [(r.name, r.detail) for r in results if r.passed is False]
    assert any(r.passed for r in results)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_page_says_what_the_checks_say():
    made = conformance_table.page(conformance_table.rows(conformance_table.types()))
    # details hold measured differences, which depend on the machine: the marks must be equal
    assert table(made) == table(conformance_table.PAGE.read_text(encoding="utf-8"))


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_readme_and_the_page_give_the_same_count():
    page = conformance_table.PAGE.read_text(encoding="utf-8")
    counted = conformance_table.COUNT.search(page).group()
    assert counted in (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table(page.split("## Results")[1])[2:]}
    assert set(rows) == set(conformance_table.types()), "one row for every type of the installed transformers"
    passing = sum("**no**" not in line and "refused" not in line and "not built" not in line for line in rows.values())
    assert counted.startswith(f"{passing} of {len(rows)} types")


def test_types_are_of_the_installed_transformers():
    known = set(conformance_table.types())
    assert set(TYPES) <= known and set(UNSUPPORTED) <= known and not set(TYPES) & set(UNSUPPORTED)
    assert len(MORE) == 3  # the encoder-decoder variants that test_conformance.py checks


# --- presets ------------------------------------------------------------------------------------------------------------

# Option of the model group -> the model type of its checkpoint.
PRESETS = {
    "aya_vision": "aya_vision", "got_ocr2": "got_ocr2", "granite_docling": "granite_docling", "granite_vision": "granite4_vision", "internvl3_5": "internvl",
    "janus": "janus", "lfm2_vl": "lfm2_vl", "lfm3_vl": "lfm3_vl", "lighton_ocr": "lighton_ocr", "llava_next": "llava_next", "minicpmv": "minicpmv4_7",
    "mistral3": "mistral3", "ovis2": "ovis2", "perception_lm": "perception_lm", "video_llava": "video_llava",
}  # fmt: skip


@pytest.mark.parametrize("option", PRESETS)
def test_a_preset_composes_and_its_family_serves_its_type(option):
    node = compose([f"model={option}"]).model
    check_family(build(node, "model"), PRESETS[option])
    assert node.path.count("/") == 1 and PRESETS[option] in conformance_table.types() and PRESETS[option] not in UNSUPPORTED


def test_a_setting_of_the_image_processor_acts_although_the_processor_has_a_default_of_its_own(tmp_path):
    """Aya Vision's processor asks for tiles at every call: 96 x 64 pixels are two tiles of 56 and the whole."""
    TYPES["aya_vision"].build(tmp_path)
    for tiled, tiles in ((True, 3), (False, 1)):
        family = Family(path=str(tmp_path), processor={"crop_to_patches": tiled})
        processor = load_processor(family, locate_model(family))
        assert len(processor(text=["<image>"], images=[[Image.new("RGB", (96, 64))]])["pixel_values"]) == tiles


@pytest.mark.parametrize("kind", [k for k, made in TYPES.items() if made.group != "auto"])
def test_the_preset_of_a_type_has_its_family(kind):
    target = compose([f"model={TYPES[kind].group}", "model.path=x"]).model._target_
    assert resolve(target, "model") is (family_class(kind) or Family)


# --- refusals, before weights are read ---------------------------------------------------------------------------------


def test_a_refused_type_is_named_with_its_reason(small, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "UNSUPPORTED", {"llava": "it is blind on Mondays"})
    (tmp_path / "config.json").write_bytes((small("llava") / "config.json").read_bytes())
    with pytest.raises(UserError) as caught:
        locate_model(Llava(path=str(tmp_path)))
    assert str(caught.value) == f"model.path={tmp_path}: a llava is not supported: it is blind on Mondays; docs/conformance.md lists the types that are"


@pytest.mark.parametrize("kind, family, wanted", [
    ("llava", Family, "model=llava "), ("qwen2_5vl", Family, "model=qwen2_5vl "), ("qwen3vl", Family, "model=qwen3vl "), ("qwen2vl", Llava, "model=qwen2vl "),
    ("blip2", Family, "model=blip2 "), ("instructblip", Family, "model=instructblip "), ("smolvlm", Qwen2VL, "model=auto "), ("internvl", Llava, "model=auto "),
])  # fmt: skip
def test_a_type_with_quirks_needs_its_family(small, tmp_path, kind, family, wanted):
    (tmp_path / "config.json").write_bytes((small(kind) / "config.json").read_bytes())
    with pytest.raises(UserError) as caught:
        locate_model(family(path=str(tmp_path)))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_the_named_option_works_and_auto_serves_types_without_quirks(small, mmft):
    code, _, err = mmft("--cfg", "job", "model=auto", f"model.path={small('smolvlm').as_posix()}")
    assert code == 0, err
    assert locate_model(Family(path=str(small("smolvlm")))).folder == small("smolvlm").resolve()
    assert family_class(json.loads((small("llava") / "config.json").read_text())["model_type"]) is Llava
    assert family_class("smolvlm") is None


def test_a_class_of_another_package_decides_for_itself(small):
    class Mine(Family):
        pass

    assert locate_model(Mine(path=str(small("llava")))).folder == small("llava").resolve()


def test_a_library_that_a_tower_needs_is_named(mmft, tmp_path, monkeypatch):
    from transformers.utils import import_utils

    TYPES["perception_lm"].build(tmp_path)
    missing = (lambda: False, import_utils.BACKENDS_MAPPING["timm"][1])
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", missing)
    code, _, err = mmft("doctor", "model=perception_lm", f"model.path={tmp_path.as_posix()}")
    assert code == 2 and "pip install timm" in err and err.count("\n") == 1 and "Traceback" not in err


# --- what doctor says about folders that cannot be used -----------------------------------------------------------------


@pytest.mark.parametrize("config, way_on", [
    ({"model_type": "brand_new_vl"}, "pip install -U transformers"),
    ({"model_type": "own_vl", "auto_map": {"AutoConfig": "configuration_own.Own"}}, "--trust-remote-code"),
    ({"model_type": "qwen2", "vocab_size": 9}, "mmft assemble llm="),
])  # fmt: skip
def test_doctor_refuses_a_config_with_a_way_on(mmft, tmp_path, config, way_on):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, _, err = mmft("doctor", "model=auto", f"model.path={folder.as_posix()}")
    assert code == 2 and way_on in err and err.count("\n") == 1 and "Traceback" not in err


def test_doctor_misses_a_processor_before_it_reads_weights(mmft, small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small("smolvlm"), folder, ignore=shutil.ignore_patterns("*processor*", "tokenizer*", "chat_template*"))
    (folder / "model.safetensors").write_bytes(b"not read")
    code, _, err = mmft("doctor", "model=auto", f"model.path={folder.as_posix()}")
    assert code == 2 and "copy them from the checkpoint" in err and err.count("\n") == 1 and "Traceback" not in err
