"""reproduce through the command line: to the bit on one machine, and the right verdict for each thing that was changed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

SMALL = ["data.pictures=40", "data.splits.validation=8", "trainer.max_steps=3", "trainer.logging_steps=1", "evaluation.samples=2",
         "evaluation.max_samples=4", "generation.max_new_tokens=6", "logger=none", "lora.r=2"]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """One small run, and the outputs directory that it and its repetitions share."""
    from mmft.cli.main import main

    outputs = tmp_path_factory.mktemp("reproduce")
    assert main([*SMALL, f"output_dir={outputs.as_posix()}", f"run_dir={(outputs / 'first').as_posix()}"]) == 0
    return outputs / "first"


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def again(mmft, original):
    """Run the command with the shared outputs directory, so that the data is prepared once."""

    def command(*words):
        return mmft(*words, f"output_dir={original.parent.as_posix()}", output_dir=False)

    return command


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def verdict(run: Path) -> dict:
    return json.loads((run / "reproduce.json").read_text(encoding="utf-8"))


def test_the_default_reproduces_to_the_bit(again, original, tmp_path):
    second = tmp_path / "second"
    code, out, err = again("reproduce", f"run={original.as_posix()}", f"run_dir={second.as_posix()}")
    assert code == 0, err
    result = verdict(second)
    assert result["verdict"] == "identical to the bit" and "identical to the bit" in out
    assert result["losses"]["steps"] == 3 and result["losses"]["first"] is None and len(result["weights"]["hashes"][0]) == 64
    assert (original / "adapter/adapter_model.safetensors").read_bytes() == (second / "adapter/adapter_model.safetensors").read_bytes()
    assert not result["settings"] and not result["inputs"]
    assert [e for e in result["environment"] if not e[0].startswith("code.")] == []  # somebody may commit between the two runs
    parent = json.loads((second / "parent.json").read_text(encoding="utf-8"))
    assert parent == {"run": "first", "path": original.as_posix(), "changes": []}
    words = (second / "overrides.txt").read_text(encoding="utf-8").splitlines()
    assert words[:2] == ["reproduce", f"run={original.as_posix()}"]
    assert json.loads((second / "verbs.jsonl").read_text(encoding="utf-8"))["verb"] == "reproduce"


def test_a_change_on_purpose_is_recorded_and_named(again, original, tmp_path):
    second = tmp_path / "second"
    code, out, err = again("reproduce", f"run={original.as_posix()}", f"run_dir={second.as_posix()}", "lora.r=4", "trainer.adam_beta2=0.9")
    assert code == 0, err
    result = verdict(second)
    assert result["verdict"] == "different" and result["changes"] == ["lora.r=4", "trainer.adam_beta2=0.9"]
    assert ["lora.r", "2", "4"] in result["settings"] and "changed on purpose" in out
    assert yaml.safe_load((second / "snapshot.yaml").read_text(encoding="utf-8"))["lora"]["r"] == 4
    assert json.loads((second / "adapter/adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    assert {"lora.r=4", "trainer.adam_beta2=0.9"} <= set((second / "overrides.txt").read_text(encoding="utf-8").splitlines())


def test_another_seed_in_the_snapshot_is_found(again, copy, tmp_path):
    text = (copy / "snapshot.yaml").read_text(encoding="utf-8")
    assert text.count("\nseed: 42") == 1
    (copy / "snapshot.yaml").write_text(text.replace("\nseed: 42", "\nseed: 43"), encoding="utf-8")
    second = tmp_path / "second"
    code, out, err = again("reproduce", f"run={copy.as_posix()}", f"run_dir={second.as_posix()}")
    result = verdict(second)
    assert code == 1 and "is not copy again: seed: 42 -> 43" in err and "Traceback" not in err
    assert result["verdict"] == "different" and result["inputs"] == [["seed", "42", "43"]]
    assert result["losses"]["first"]["step"] == 1


def test_another_data_row_is_found(mmft, tmp_path):
    from PIL import Image

    rows = tmp_path / "rows.csv"
    for i in range(12):
        Image.new("RGB", (56, 56), (20 * i, 0, 90)).save(tmp_path / f"{i}.png")
    lines = ["image,text", *(f"{i}.png,a picture of shade {i}" for i in range(12))]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [w for w in SMALL if not w.startswith("data.")]
    words += ["data=table", f"data.path={rows.as_posix()}", "data.columns.image=image", "data.columns.text=text", "data.splits.validation=4"]
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, err = mmft(*words, f"run_dir={first.as_posix()}")
    assert code == 0, err
    changed = 1 + next(i for i in range(12) if lines[1 + i].split(",")[0] not in held_out(first))
    lines[changed] = lines[changed].replace("a picture", "a drawing")
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, err = mmft("reproduce", f"run={first.as_posix()}", f"run_dir={second.as_posix()}")
    result = verdict(second)
    assert code == 1 and "data fingerprint" in err
    assert result["verdict"] == "different" and result["inputs"][0][0] == "data fingerprint" and result["losses"]["first"]
    # one word of one training row: the base's answers to the held-out rows are the same as before
    base = [r for r in result["metrics"]["rows"] if r[0].startswith("base ")]
    assert base and all(r[3] == 0 for r in base)


def held_out(run: Path) -> set[str]:
    rows = [json.loads(line) for line in (run / "eval/tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    return {Path(image).name for row in rows for image in row["images"]}


# --- two finished runs: against=DIR -------------------------------------------------------------------------------


def test_a_changed_version_is_named_and_results_decide(again, original, copy):
    edit(copy / "env.json", lambda env: env["packages"].update(torch="1.0"))
    code, out, err = again("reproduce", f"run={copy.as_posix()}", f"against={original.as_posix()}")
    result = verdict(original)
    assert code == 0 and result["verdict"] == "identical to the bit"
    assert [row[:2] for row in result["environment"] if not row[0].startswith("code.")] == [["packages.torch", "1.0"]]
    assert any("packages.torch: 1.0 ->" in line for line in result["why"]) and "packages.torch" in out


def changed_weight(run: Path, size: float) -> str:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    key = sorted(weights)[0]
    weights[key].view(-1)[3] += size
    save_file(weights, file)
    return key


@pytest.mark.parametrize("size, expected", [(1.0, "different"), (1e-5, "equal within tolerance")])
def test_a_changed_weight_is_found_and_its_size_decides(again, original, copy, size, expected):
    key = changed_weight(copy, size)
    code, out, err = again("reproduce", f"run={original.as_posix()}", f"against={copy.as_posix()}")
    result = verdict(copy)
    assert result["verdict"] == expected and code == (1 if expected == "different" else 0)
    assert result["weights"]["where"] == key and result["weights"]["entry"] == pytest.approx(size, rel=1e-2)
    assert result["losses"]["first"] is None
    assert any("changed after its training" in line for line in result["why"])


@pytest.mark.parametrize("factor, expected", [(1 + 1e-6, "equal within tolerance"), (1.01, "different")])
def test_the_first_step_that_differs_is_named(again, original, copy, factor, expected):
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["step"] >= 2 and "loss" in row:
            row["loss"] *= factor
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    again("reproduce", f"run={original.as_posix()}", f"against={copy.as_posix()}")
    result = verdict(copy)
    assert result["verdict"] == expected
    assert result["losses"]["first"]["step"] == 2 and result["losses"]["first"]["key"] == "loss" and result["losses"]["different"] == 2


def test_a_file_written_in_another_order_has_the_same_hash(original, copy):
    from safetensors.torch import load_file, save_file

    from mmft.runs.weights import weights_hash

    file = copy / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(reversed(weights.items())), file, metadata={"note": "other"})
    assert weights_hash(copy) == weights_hash(original)
    key = next(iter(weights))
    weights[key] = weights[key].double()  # equal numbers of another type are not the same bits
    save_file(weights, file)
    assert weights_hash(copy) != weights_hash(original)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_strangers_snapshot_runs_no_code(again, copy, tmp_path):
    snapshot = yaml.safe_load((copy / "snapshot.yaml").read_text(encoding="utf-8"))
    mark = tmp_path / "pwned"
    cases = {
        "hydra section": {"hydra": {"callbacks": {"x": {"_target_": "os.system", "command": f"touch {mark}"}}}},
        "defaults section": {"defaults": [{"override hydra/launcher": "joblib"}]},
        "is refused": {"data": {"_target_": "os.system", "command": f"touch {mark}"}},
        "is refused: only objects": {"logger": {"_target_": "mmft.runs.directory.os.system", "command": "touch x"}},
        "not a training": {"task": {"_target_": "mmft.verbs.merge.Merge", "run": "."}},
        "interpolation": {"name": "${oc.env:HOME}"},
        "push_to_hub": {"trainer": {**snapshot["trainer"], "push_to_hub": True}},
        "no such key": {"launcher": {"a": 1}},
    }
    before = sorted(p.name for p in copy.parent.iterdir())
    for expected, change in cases.items():
        (copy / "snapshot.yaml").write_text(yaml.safe_dump({**snapshot, **change}), encoding="utf-8")
        code, _, err = again("reproduce", f"run={copy.as_posix()}", f"run_dir={(tmp_path / 'second').as_posix()}")
        assert code == 2 and expected in err and err.count("\n") == 1, (expected, err)
    assert not mark.exists() and sorted(p.name for p in copy.parent.iterdir()) == before


@pytest.mark.parametrize("words", [[], ["-m"], ["--cfg", "job"]])
@pytest.mark.parametrize("key", ["callbacks", "launcher", "job_logging"])
def test_a_strangers_snapshot_given_as_a_config_starts_nothing_either(mmft, copy, key, words):
    with (copy / "snapshot.yaml").open("a", encoding="utf-8") as file:
        file.write(f"hydra: {{{key}: {{x: {{_target_: os.mkdir, path: pwned}}}}}}\n")
    code, _, err = mmft(*words, "--config-dir", copy.as_posix(), "--config-name", "snapshot")
    assert code == 2 and f"hydra section sets {key}" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, expected", [
    (["run=nowhere"], "run=nowhere: no such directory"),
    ([], "run must be given"),
    (["run=RUN", "against=nowhere"], "no such directory"),
    (["run=RUN", "against=RUN", "lora.r=8"], "nothing to change"),
    (["run=RUN", "experiment=debug"], "cannot be laid over a snapshot"),
    (["run=RUN", "data.picures=3"], "data.picures"),
    (["run=RUN", "lora.rr=3"], "lora.rr"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(again, original, tmp_path, words, expected):
    words = [w.replace("RUN", original.as_posix()) for w in words]
    code, _, err = again("reproduce", *words, f"run_dir={(tmp_path / 'second').as_posix()}")
    assert code == 2 and expected in err and err.count("\n") == 1 and not (tmp_path / "second").exists()


def test_a_run_that_never_finished_or_lost_its_base_is_one_line(again, copy, tmp_path):
    words = ["reproduce", f"run={copy.as_posix()}", f"run_dir={(tmp_path / 'second').as_posix()}"]
    text = (copy / "snapshot.yaml").read_text(encoding="utf-8")
    (copy / "snapshot.yaml").write_text(text.replace("path: mmft:tiny", "path: ./gone"), encoding="utf-8")
    code, _, err = again(*words)
    assert code == 2 and "model.path=./gone: no such folder" in err and not (tmp_path / "second").exists()
    (copy / "DONE").unlink()
    code, _, err = again(*words)
    assert code == 2 and "never finished" in err and err.count("\n") == 1


def test_changes_reach_keys_of_the_runs_own_data_and_not_of_the_default(mmft, tmp_path):
    """data.limit of a run on a table: the words are laid over the run's data, not over the default's."""
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (56, 56), (30 * i, 9, 9)).save(tmp_path / f"{i}.png")
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text("image,text\n" + "".join(f"{i}.png,{name} {i}\n" for i in range(8)), encoding="utf-8")
    words = [w for w in SMALL if not w.startswith("data.")] + ["evaluation.split=null", "trainer.max_steps=1"]
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, err = mmft(*words, "data=table", f"data.path={tmp_path.as_posix()}/one.csv", "data.columns.image=image", "data.columns.text=text",
                        f"run_dir={first.as_posix()}")  # fmt: skip
    assert code == 0, err
    code, _, err = mmft("reproduce", f"run={first.as_posix()}", f"run_dir={second.as_posix()}", f"data.path={tmp_path.as_posix()}/two.csv")
    assert code == 0, err
    data = yaml.safe_load((second / "snapshot.yaml").read_text(encoding="utf-8"))["data"]
    assert data["path"].endswith("two.csv") and data["_target_"].endswith("Table") and data["columns"]["text"] == "text"
    assert verdict(second)["inputs"][0][0] == "data fingerprint"
