"""The schemas: every shipped yaml fits its own, every config that composes fits, and typos do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from omegaconf import OmegaConf

from mmft.config import schema
from mmft.config.compose import compose
from mmft.config.groups import CONFIG_DIR

FILES = sorted(CONFIG_DIR.rglob("*.yaml"))


def validator(body: dict) -> jsonschema.Draft7Validator:
    jsonschema.Draft7Validator.check_schema(body)
    return jsonschema.Draft7Validator(body)


@pytest.fixture(scope="module")
def whole():
    return validator(schema.schema("config"))


def test_every_shipped_yaml_names_its_schema_and_fits_it():
    schemas = {name: validator(json.loads((CONFIG_DIR / "schema" / f"{name}.json").read_text(encoding="utf-8"))) for name in schema.NAMES}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        line = schema.modeline(file, text, CONFIG_DIR / "schema")
        assert line in text.splitlines(), f"{file}: `mmft schema out=conf/schema headers=conf` adds {line}"
        named = file.parent / re.search(r"\$schema=(\S+)", line)[1]
        assert named.resolve() == CONFIG_DIR / "schema" / named.name
        errors = list(schemas[named.stem].iter_errors(yaml.safe_load(text) or {}))
        assert not errors, f"{file}: {errors[0].message[:200]}; after a new key: mmft schema out=conf/schema"


def test_the_shipped_schemas_have_every_key_of_the_code():
    """Types and descriptions may differ with the versions of the libraries; names may not."""
    def names(node: object) -> set[str]:
        if isinstance(node, dict):
            return {*node.get("properties", {})}.union(*(names(v) for v in node.values())) if isinstance(node.get("properties", {}), dict) else set()
        return set().union(*(names(v) for v in node)) if isinstance(node, list) else set()

    for name in schema.NAMES:
        shipped = json.loads((CONFIG_DIR / "schema" / f"{name}.json").read_text(encoding="utf-8"))
        assert names(shipped) == names(schema.schema(name)), f"conf/schema/{name}.json: mmft schema out=conf/schema writes it again"


@pytest.mark.parametrize("words", [
    [], ["model=qwen3_5", "logger=both", "metrics=[cer,judge]"], ["data=mix", "data.sources.a=coco", "data.sources.a.path=x"], ["lora=none", "evaluation.keep=[scenes]"],
    ["augment.ColorJitter.brightness=0.2", "model.quantization.load_in_4bit=true", "generation.do_sample=true", "generation.temperature=0.5", "trainer.early_stopping_patience=3", "seed=3"],
    ["lora.rank_pattern={q_proj:8}", "lora.target_modules=[q_proj]", "trainer.learning_rate='1e-4'", "name=x"],
    *[[f"experiment={name}"] for name in ("debug", "qwen2vl_coco500", "qwen2vl_coco500_swanlab", "blip2_football", "rank_sweep", "search")],
])  # fmt: skip
def test_what_mmft_accepts_fits(whole, words):
    cfg = compose(words)
    for resolved in (False, True):
        assert not [e.message for e in whole.iter_errors(OmegaConf.to_container(cfg, resolve=resolved))]


@pytest.mark.parametrize("bad", [
    {"lora": {"rr": 4}}, {"sed": 1}, {"seed": "x"}, {"data": {"_target_": "mmft.data.sources.table.Table", "limt": 3}}, {"data": {"_target_": "mmft.data.sources.tabel.Table"}, "x": 1},
    {"trainer": {"max_steps": "many"}}, {"trainer": {"use_liger_kernel": True}}, {"trainer": {"output_dir": "x"}}, {"logger": {"_target_": "mmft.loggers.swanlab.SwanLab", "proj": 1}},
    {"metrics": {"cer": {"x": 1}}}, {"evaluation": {"answr": "choose"}}, {"evaluation": {"answer": "chose"}}, {"model": {"dtpe": "bf16"}}, {"task": {"rn": "x"}},
    {"data": {"sources": {"a": {"pathh": "x"}}}}, {"augment": {"Rotation": {}}}, {"generation": {"max_new_token": 3}}, {"model": {"quantization": {"load_in_4bits": True}}},
])  # fmt: skip
def test_a_typo_does_not_fit(whole, bad):
    assert list(whole.iter_errors(bad))


def test_values_that_mmft_reads_otherwise_fit(whole):
    """1e-4 is text in yaml 1.1; ${...} and ??? stand for values; a user's own class has its own keys."""
    good = yaml.safe_load("trainer: {learning_rate: 1e-4, max_steps: '${seed}'}\ndata: {_target_: mine.Source, own: 3}\nmodel: {path: '???'}\nlora: null")
    assert isinstance(good["trainer"]["learning_rate"], str) and not list(whole.iter_errors(good))


def test_the_comment_is_for_editors_alone(mmft):
    code, out, _ = mmft("predict", "--help")
    assert code == 0 and "together: false" in out and "yaml-language-server" not in out


def test_the_verb_writes_schemas_and_headers(mmft, tmp_path):
    own = tmp_path / "conf" / "model" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# My model.\ndefaults: [tiny, _self_]\n", encoding="utf-8")
    code, out, err = mmft("schema", f"out={tmp_path / 'conf' / 'schema'}", f"headers={tmp_path / 'conf'}")
    assert code == 0, err
    assert own.read_text(encoding="utf-8") == "# My model.\n# yaml-language-server: $schema=../schema/model.json\ndefaults: [tiny, _self_]\n"
    assert {p.stem for p in (tmp_path / "conf" / "schema").iterdir()} == {*schema.NAMES}
    before = own.stat().st_mtime_ns
    assert mmft("schema", f"out={tmp_path / 'conf' / 'schema'}", f"headers={tmp_path / 'conf'}")[0] == 0 and own.stat().st_mtime_ns == before
    code, out, _ = mmft("schema")
    assert code == 0 and json.loads(out)["properties"]["seed"]["description"] == "of data splits, initialisation, batch order and dropout"
    for words, message in ((["headers=x"], "add out=FOLDER"), ([f"out={tmp_path}/s", f"headers={tmp_path}/s"], "holds no yaml files")):
        code, _, err = mmft("schema", *words)
        assert code == 2 and message in err and err.count("\n") == 1


# --- results as JSON ----------------------------------------------------------------------------------------------


def test_a_result_is_one_document(mmft, tmp_path):
    home = tmp_path / "runs"
    for name, loss in (("a", 0.5), ("b", float("nan"))):
        (home / name).mkdir(parents=True)
        (home / name / "snapshot.yaml").write_text("seed: 1\nlora:\n  r: 4\n", encoding="utf-8")
        (home / name / "summary.json").write_text(json.dumps({"status": "finished", "eval_loss": loss}), encoding="utf-8")
    code, out, err = mmft("runs", "--json", f"folder={home}", "show=[lora.r]")
    rows = {row["run"]: row for row in json.loads(out)}
    assert code == 0 and rows["a"]["eval_loss"] == 0.5 and rows["b"]["eval_loss"] is None and rows["a"]["lora.r"] == 4 and "NaN" not in out
    code, out, err = mmft("runs", "--json", f"diff=[{home / 'a'},{home / 'b'}]")
    assert code == 0 and json.loads(out)["runs"] == ["a", "b"]
    code, out, err = mmft("runs", "--json", "folder=no/such")
    assert code == 2 and out == "" and "no such directory" in err
    for words in (["--json"], ["predict", "--json"], ["runs", "--json", "-m"]):
        code, out, err = mmft(*words)
        assert code == 2 and out == "" and "--json: goes with" in err


@pytest.mark.long
def test_doctor_audit_and_evaluate_as_json(mmft, tmp_path):
    code, out, err = mmft("doctor", "--json", "timeout=0.1")
    assert code in (0, 1) and {f["state"] for f in json.loads(out)} <= {"ok", "less", "broken"} and "torch" in err
    small = ["data.pictures=40", "data.splits.validation=8", "generation.max_new_tokens=4", "evaluation.max_samples=2"]
    code, out, err = mmft("audit", "--json", *small, "rows=1", "count=8", "generate=1", "estimate=false", f"out={tmp_path / 'page.html'}")
    audit = json.loads(out)
    assert code == 0 and {c["name"] for c in audit["checks"]} >= {"rows"} and all(c["passed"] is not False for c in audit["checks"]) and "rows" not in audit
    code, out, err = mmft("evaluate", "--json", *small)
    summary = json.loads(out)
    written = json.loads(next(Path(tmp_path / "outputs").glob("*evaluate*/eval/*.json")).read_text(encoding="utf-8"))
    assert code == 0 and summary["metrics"] == written["metrics"] and summary["eval_loss"] == written["eval_loss"] and "page" in err
