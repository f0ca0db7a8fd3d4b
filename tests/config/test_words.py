"""Values on the command line: any text where text is expected, Hydra's grammar elsewhere, and answers to words that cannot be parsed."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from mmft.cli import parse
from mmft.common.errors import UserError
from mmft.config import compose, sweep_overrides
from mmft.config.groups import CONFIG_DIR
from mmft.config.paths import is_path
from mmft.config.plain import to_plain
from mmft.config.snapshot import snapshot
from mmft.config.words import parse as parse_word
from mmft.config.words import readable

TEXTS = [
    "描述这张图片。", "この画像を説明してください", "Décris l’image ; où ça ?", "a=b", "x (1)", "(((", ")", "#hash", "R&D", "it's", '"yes" or "no"', "100 %",
    "🙂🙃", "What is this, exactly?", "[INST] describe [/INST]", "[a, b]", '{"label": "cat"}', "{a: 1}", "42", "007", "1_000", "1e5", "true", "nan", "-", "~", "~x",
    "a\\,b", "C:\\data\\(x)", "\\", "two  spaces", " edges ", "tab\there", "line\nbreak", "a;b|c>d", "`x`", "!", "*", "?", "$HOME", "${", "${}", "$ {x}", "<image>",
    "choice", "f(x)", "key: value", "a,b", "'", '"', "''", "x'y\"z", "e\u0301", "\u200bzero", "，。：；「」", "＝",
]  # fmt: skip


def config(*words: str):
    command = parse.parse(list(words))
    return compose.compose(command.overrides, command.config_dir, command.config_name)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_arrives_where_text_is_expected(text):
    cfg = config("data=table", "data.path=t.csv", f"data.prompt={text}", f"collator.system={text}")
    expected = "" if text == "''" else text  # a quoted text, here an empty one
    assert to_plain(cfg.data)["prompt"] == expected and to_plain(cfg.collator)["system"] == expected


@pytest.mark.parametrize("word, section, key", [
    ("name={}", None, "name"), ("collator.system={}", "collator", "system"), ("logger.project={}", "logger", "project"), ("model.path={}", "model", "path"),
    ("trainer.run_name={}", None, None), ("data.path={}", "data", "path"), ("output_dir={}", None, "output_dir"), ("data.root={}", "data", "root"),
])  # fmt: skip
@pytest.mark.parametrize("text", ["数据 (1)/标注=新.csv", "été #2 & 'x'", "42", "😀%"])
def test_keys_of_every_section_take_any_text(word, section, key, text):
    words = [w for w in ["data=table", "data.path=t.csv", "logger=swanlab", word.format(text)]]
    if key is None:
        with pytest.raises(UserError, match="mmft sets this itself"):
            config(*words)
        return
    cfg = config(*words)
    assert (cfg[section] if section else cfg)[key] == text


@pytest.mark.parametrize("text", ["描述 (1)", "a=b", "What is this, exactly?", "50 %", "'"])
def test_keys_without_a_declared_type_take_text_that_hydra_cannot_parse(text):
    words = ["data=table", "data.path=t.csv", f"data.columns.text={text}"]
    if "," in text:
        with pytest.raises(UserError, match="holds several values"):
            config(*words)
    else:
        assert config(*words).data.columns.text == text


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\x00"), max_size=25)
       | st.text(st.sampled_from("[]{}()'\"\\$,:=~+- \t#@!%&*a1é图"), max_size=18))  # fmt: skip
@examples(30)
def test_the_text_that_was_typed_is_the_text_of_the_key(text):
    """Except for what Hydra's grammar keeps: null, quoted text, interpolations, its functions."""
    cfg = config("data=table", "data.path=t.csv", f"data.prompt={text}")
    try:
        arrived = to_plain(cfg.data)["prompt"]
    except UserError:
        assert re.search(r"\$\{[A-Za-z_]", text)
        return
    kept = text.strip().lower() == "null" or text[:1] in ("'", '"') or re.search(r"\$\{[A-Za-z_]", text)
    assert kept or arrived == text or text == "" and arrived == "", (text, arrived)


def test_hydras_grammar_still_applies():
    cfg = config("data=table", "data.path=t.csv", "data.prompt=null", 'name="42"', "lora.target_modules=[q_proj,v_proj]",
                 "data.splits={validation: 3, test: 0, by: last, seed: 1}", "collator.system=${name}-x", "lora.r=8", "trainer.learning_rate=1e-3")  # fmt: skip
    plain = to_plain(cfg)
    assert plain["data"]["prompt"] is None and plain["name"] == "42" and plain["collator"]["system"] == "42-x"
    assert plain["lora"]["target_modules"] == ["q_proj", "v_proj"] and plain["data"]["splits"]["validation"] == 3
    points, keys = sweep_overrides.expand(["data.prompt=描述", "lora.r=2,4", "name=a,b", "seed=range(1,3)", 'collator.system="a, b",c'])
    assert len(points) == 16 and keys == ["lora.r", "name", "seed", "collator.system"]
    configs = sweep_overrides.compose_each([["data=table", "data.path=t", *p] for p in (points[0], points[-1])])
    assert [c.collator.system for c in configs] == ["a, b", "c"] and [c.data.prompt for c in configs] == ["描述"] * 2


UNREADABLE = [
    "lora.target_modules=[a", "lora.target_modules=[q_proj,(v)]", "lora.target_modules=[q_proj, v=1]", "input=[图1.jpg,图2.jpg]", "data.columns={image: 图, text: 描述}",
    "data.splits={validation: 3", "lora.target_modules=[[a,b]", "input=['a.jpg,b.jpg]", "trainer.lr_scheduler_kwargs={min_lr: 1e-4)", "lora.target_modules=[a#b]",
    "lora.rank_pattern={层: 4}", "model.processor=[é]", "input=[a b, c&d]", "input=[a.png,b/[1].png]", "lora.target_modules=[^q.*$", "input=[]x",
]  # fmt: skip


@pytest.mark.parametrize("word", UNREADABLE)
def test_an_unparsable_word_names_the_character_and_a_form_that_is_parsed(word):
    verb = ["predict"] if word.startswith("input") else []
    with pytest.raises(UserError) as refused:
        config(*verb, *(["model=qwen2vl"] if verb else ["data=table", "data.path=t"]), word)
    message = str(refused.value)
    assert "cannot be read as key=value" in message and "\n" not in message
    place = re.search(r"character (\d+), ['\"](.+?)['\"], has no meaning there|it ends too early", message)
    assert place, message
    if place[1]:
        assert word[int(place[1]) - 1] == place[2], "the word as it was typed"
    forms = shlex.split(message.split("; write ")[1].replace(" or ", " "))
    for form in forms:
        assert form.split("=")[0] == word.split("=")[0]
        assert parse_word(form).value() is not None
    if verb:
        assert config("predict", "model=qwen2vl", forms[0]).task.input is not None


def test_brackets_in_the_name_of_a_file_of_a_list():
    with pytest.raises(UserError, match=r"""write 'input=\[a.png,"b/\[1\].png"\]'"""):
        config("predict", "model=qwen2vl", "input=[a.png,b/[1].png]")


@pytest.mark.parametrize("word", ["data.prompt=描述,(另一个)", "name=a=b,c", "data.columns.text=é,ü"])
def test_an_unparsable_sweep_names_both_readings(word):
    with pytest.raises(UserError) as refused:
        readable(word, several=True)
    several, single = shlex.split(str(refused.value).split("; write ")[1].replace(" or ", " "))
    points, keys = sweep_overrides.expand([several])
    assert len(points) == 2 and keys == [word.split("=")[0]]
    assert parse_word(single).value() == word.split("=", 1)[1]


def test_a_word_without_an_equals_sign_is_named():
    with pytest.raises(UserError, match="it has no '='"):
        config("lora.r=3", "data.path＝x")


# --- a home folder in every key that is a path ---------------------------------------------------------------------

PATHS = {
    "output_dir", "run_dir", "data.path", "data.root", "data.without", "data.images", "data.annotations", "model.path", "task.run", "task.input", "task.out", "task.against",
    "task.llm", "task.vision", "task.folder", "logger.folder",
}  # fmt: skip
NO_PATHS = {"task.image_size", "data.image_position", "data.columns.image", "data.file"}


def yaml_keys() -> set[str]:
    keys = set()
    for file in CONFIG_DIR.rglob("*.yaml"):
        group = file.relative_to(CONFIG_DIR).parts[0] if file.parent != CONFIG_DIR else ""
        if group in ("hydra", "experiment"):
            continue
        for key in yaml.safe_load(file.read_text(encoding="utf-8")) or {}:
            keys.add(f"{group}.{key}" if group else key)
    return keys


def test_every_key_that_holds_a_path_is_known_as_one():
    assert {k for k in yaml_keys() if is_path(k)} - {"data.file"} == PATHS & yaml_keys()
    assert yaml_keys() | {"data.images", "data.annotations"} >= PATHS


@pytest.mark.parametrize("words, key", [
    (["data=table", "data.path=~/d/t.csv"], "data.path"), (["data=table", "data.path=t", "data.root=~/d/t.csv"], "data.root"), (["output_dir=~/d/t.csv"], "output_dir"),
    (["run_dir=~/d/t.csv"], "run_dir"), (["model=llava", "model.path=~/d/t.csv"], "model.path"), (["evaluate", "run=~/d/t.csv"], "task.run"),
    (["predict", "input=~/d/t.csv"], "task.input"), (["predict", "run=x", "out=~/d/t.csv"], "task.out"), (["reproduce", "run=x", "against=~/d/t.csv"], "task.against"),
    (["assemble", "llm=~/d/t.csv", "vision=x", "out=y"], "task.llm"), (["data=coco", "data.path=x", "data.annotations=~/d/t.csv"], "data.annotations"),
])  # fmt: skip
def test_a_tilde_is_the_home_folder(monkeypatch, words, key):
    monkeypatch.setenv("HOME", "/home/me")
    assert OmegaConf.select(config(*words), key) == "/home/me/d/t.csv"


def test_a_tilde_in_a_yaml_file_or_a_list_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [table, _self_]\npath: ~/t.csv\nprompt: ~/x?\n", encoding="utf-8")
    cfg = compose.compose(["data=mine"], str(tmp_path))
    assert cfg.data.path == "/home/me/t.csv" and cfg.data.prompt == "~/x?"  # a question is no path
    (tmp_path / "snapshot.yaml").write_text(snapshot(cfg), encoding="utf-8")
    assert compose.compose([], str(tmp_path), "snapshot").data.path == "/home/me/t.csv"
    assert list(config("predict", 'input=["~/a.jpg","b.jpg"]').task.input) == ["/home/me/a.jpg", "b.jpg"]


def test_the_config_that_is_printed_is_the_one_that_is_used(mmft, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    code, out, err = mmft("--cfg", "job", "data=table", "data.path=~/数据 (1).csv", output_dir=False)
    assert code == 0 and yaml.safe_load(out)["data"]["path"] == "/home/me/数据 (1).csv", err


# --- whole commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["数据/标注.csv", "captions (1).csv", "a=b.csv", "it's #1 & 50%.csv", "été/画像.csv", "[x].csv", "😀.csv", "a, b.csv"])
def test_a_table_of_any_name_is_prepared(mmft, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file.parent / f"{i}.png")
    file.write_text("image,text\n" + "".join(f"{i}.png,text {i}\n" for i in range(20)), encoding="utf-8")
    code, out, err = mmft("prepare", "data=table", f"data.path={name}", "data.prompt=描述这张图片。", "data.name=a=b")
    assert code == 0, err
    manifest = next((tmp_path / "outputs" / "data").glob("a=b*/manifest.json"))
    assert '"rows": 20' in manifest.read_text(encoding="utf-8") or "20" in out + err


def test_the_words_of_a_run_are_recorded_as_typed(mmft, tmp_path):
    code, _, err = mmft("--cfg", "job", "name=实验 (1)", output_dir=False)
    assert code == 0, err
    cfg = compose.compose(parse.parse(["name=实验 (1)"]).overrides)
    assert cfg.name == "实验 (1)"
