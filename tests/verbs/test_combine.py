"""mmft combine: every way against its formula written out here, one adapter of weight 1 to the byte, a greedy soup replayed by hand, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from verb_data import draw

SMALL = ["lora.lora_dropout=0", "trainer.logging_steps=1", "trainer.warmup_steps=0", "trainer.learning_rate=0.01", "logger=none", "audit=false",
         "trainer.per_device_train_batch_size=4", "generation.max_new_tokens=3", "evaluation.base=false"]  # fmt: skip


class Home:
    def __init__(self, folder: Path):
        self.outputs = folder / "outputs"
        draw(folder / "pictures", 14)
        self.data = ["data=table", f"data.path={(folder / 'pictures' / 'rows.csv').as_posix()}", "data.columns.prompt=prompt", "data.splits.validation=4"]

    def train(self, name: str, *words: str) -> Path:
        from mmft.cli.main import main

        place = [f"output_dir={self.outputs.as_posix()}", f"run_dir={(self.outputs / name).as_posix()}"]
        assert main([*SMALL, *self.data, *words, *place]) == 0
        return self.outputs / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """a, b: rank 2 of two seeds, scale 2. wide: rank 3 with rank-stabilised scale."""
    made = Home(tmp_path_factory.mktemp("combine"))
    two = ["lora.r=2", "lora.lora_alpha=4"]
    made.train("a", *two, "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2")
    made.train("b", *two, "trainer.max_steps=2", "seed=7")
    made.train("wide", "lora.r=3", "lora.lora_alpha=6", "lora.use_rslora=true", "trainer.max_steps=2", "seed=3")
    return made


@pytest.fixture
def combine(mmft, home, tmp_path):
    """The adapter of `mmft combine` with these words, and its directory."""

    def run(*words: str) -> tuple[dict[str, torch.Tensor], Path]:
        out = tmp_path / "combined"
        code, _, err = mmft("combine", *words, f"out={out.as_posix()}", f"output_dir={home.outputs.as_posix()}", output_dir=False)
        assert code == 0, err
        return load_file(out / "adapter" / "adapter_model.safetensors"), out

    return run


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def config(run: Path) -> dict:
    return json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))


def scale(run: Path) -> float:
    c = config(run)
    return c["lora_alpha"] / (c["r"] ** 0.5 if c.get("use_rslora") else c["r"])


def products(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """name -> factor x B A of every adapted layer."""
    return {n.replace(".lora_A.weight", ""): factor * weights[n.replace("lora_A", "lora_B")].double() @ weights[n].double() for n in weights if ".lora_A." in n}


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys() and len(got) > 4
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance * max(float(value.abs().max()), 1e-3), name


def test_cat_is_the_weighted_sum_of_what_the_adapters_add(combine, home):
    got, out = combine("run=[a,b,wide]", "weights=[0.7,0.3,-0.5]", "how=cat")
    parts = [products(tensors(home.outputs / name), w * scale(home.outputs / name)) for name, w in (("a", 0.7), ("b", 0.3), ("wide", -0.5))]
    close(products(got, scale(out)), {name: sum(part[name] for part in parts) for name in parts[0]})
    assert config(out)["r"] == 7 and not config(out)["use_rslora"]


def test_svd_is_the_best_sum_of_its_rank(combine, home):
    """Against numpy's decomposition of the exact sum, cut to rank 2."""
    import numpy as np

    got, out = combine("run=[a,b]", "weights=[0.5,0.5]", "how=svd")
    a, b = (products(tensors(home.outputs / name), 0.5 * 2) for name in ("a", "b"))
    expected = {}
    for name in a:
        u, s, v = np.linalg.svd((a[name] + b[name]).numpy(), full_matrices=False)
        expected[name] = torch.from_numpy(u[:, :2] * s[:2] @ v[:2])
    close(products(got, scale(out)), expected, 1e-4)
    assert config(out)["r"] == 2


def test_linear_adds_the_matrices_with_the_roots_of_weight_times_scale(combine, home):
    got, out = combine("run=[a,b]", "weights=[0.7,0.3]")
    a, b = tensors(home.outputs / "a"), tensors(home.outputs / "b")
    expected = {name: (0.7 * 2) ** 0.5 * a[name] + (0.3 * 2) ** 0.5 * b[name] for name in a}
    close({name: value.double() for name, value in got.items()}, expected)
    assert scale(out) == 1


def ties(values: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """Trim, elect the sign of the sum, merge (Yadav et al. 2023, arXiv 2306.01708): the weighted values of that sign over their number."""
    kept = []
    for value in values:
        flat = value.flatten().abs()
        threshold = flat.sort(descending=True).values[int(density * flat.numel()) - 1]
        kept.append(torch.where(value.abs() >= threshold, value, 0.0))
    stacked = torch.stack(kept)
    agree = torch.sign(stacked) == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    return (stacked * agree * torch.tensor(weights)[:, None, None]).sum(0) / agree.sum(0).clamp(min=1)


def test_ties_trims_elects_and_merges(combine, home):
    got, _ = combine("run=[a,b]", "weights=[0.6,0.4]", "how=ties", "density=0.5")
    a, b = tensors(home.outputs / "a"), tensors(home.outputs / "b")
    expected = {name: ties([a[name], b[name]], [(0.6 * 2) ** 0.5, (0.4 * 2) ** 0.5], 0.5) for name in a}
    close({name: value.double() for name, value in got.items()}, expected)


def test_dare_keeps_a_share_of_the_weights_enlarged(combine, home):
    """Every entry is 0 or root(w s) / density times that of an adapter, or a sum of both; about half of them each; the same again with the same seed."""
    got, out = combine("run=[a,b]", "weights=[0.6,0.4]", "how=dare", "density=0.5")
    a, b = tensors(home.outputs / "a"), tensors(home.outputs / "b")
    kept = total = 0
    for name, value in got.items():
        x, y = (0.6 * 2) ** 0.5 / 0.5 * a[name], (0.4 * 2) ** 0.5 / 0.5 * b[name]
        options = torch.stack([0 * x, x, y, x + y])
        gaps = (options - value.double()).abs()
        assert float(gaps.min(0).values.max()) < 1e-5, name
        if ".lora_A." in name:
            kept += int((gaps[1] < 1e-6).sum() + (gaps[3] < 1e-6).sum())
            total += value.numel()
    assert 0.45 < kept / total < 0.55


@pytest.mark.parametrize("how", ["linear", "svd", "cat"])
def test_a_weight_of_one_and_a_weight_of_nothing_are_the_first_run_to_the_byte(combine, home, how):
    _, out = combine("run=[a,b]", "weights=[1,0]", f"how={how}")
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (home.outputs / "a" / "adapter" / "adapter_model.safetensors").read_bytes()
    one, other = ({r["id"]: (r["prediction"], r["loss"]) for r in map(json.loads, (run / "eval" / "tuned.jsonl").read_text().splitlines())} for run in (out, home.outputs / "a"))
    assert one == other


def test_the_result_is_a_run_with_its_lineage(combine, home, mmft, tmp_path):
    _, out = combine("run=[a,b]", "weights=[0.7,0.3]", "how=cat")
    parents = json.loads((out / "env.json").read_text())["parents"]
    assert [(p["role"], p["run"], p["weight"]) for p in parents] == [("combined", "a", 0.7), ("combined", "b", 0.3)]
    place = [f"run={out.as_posix()}", f"output_dir={home.outputs.as_posix()}"]
    code, _, err = mmft("evaluate", *place, output_dir=False)
    assert code == 0, err
    [measured] = (out / "eval").glob("table_validation_*[0-9a-f].json")
    assert json.loads(measured.read_text())["eval_loss"] == pytest.approx(json.loads((out / "summary.json").read_text())["eval_loss"], rel=1e-5)
    code, _, err = mmft("merge", *place, "samples=2", output_dir=False)
    assert code == 0, err
    for name in ("report.md", "adapter/README.md"):
        assert "its adapter is combined with the weight 0.7" in (out / name).read_text(encoding="utf-8")
    plan = json.loads((out / "lora_plan.json").read_text())
    assert {row["r"] for row in plan["rows"] if row["modules"]} == {"4"} and json.loads((out / "summary.json").read_text())["status"] == "finished"
    for command, expected in (("reproduce", "was combined from other runs"), ("resume", "was combined from other runs")):
        code, _, err = mmft(command, *place, *(["trainer.max_steps=9"] if command == "resume" else []), f"run_dir={(tmp_path / 'x').as_posix()}", output_dir=False)
        assert code == 2 and expected in err and err.count("\n") == 1
    code, _, err = mmft(*SMALL, *home.data, "trainer.max_steps=1", f"lora.start={out.as_posix()}", "lora.r=4", "lora.lora_alpha=4", f"output_dir={home.outputs.as_posix()}", output_dir=False)
    assert code == 0, err


def test_a_soup_takes_in_what_does_not_make_it_worse(combine, home, mmft, tmp_path):
    """The greedy rule replayed: each step's average combined by how=cat, its held-out loss read from its own run."""
    _, out = combine(f"run={(home.outputs / 'a').as_posix()}", "how=soup")
    record = json.loads((out / "combine.json").read_text())
    names = [f"{home.outputs.as_posix()}/a/checkpoints/checkpoint-2", f"{home.outputs.as_posix()}/a/checkpoints/checkpoint-4", f"{home.outputs.as_posix()}/a"]

    def loss(*parts: str) -> float:
        folder = tmp_path / f"cat{len(list(tmp_path.glob('cat*')))}"
        weights = f"weights=[{','.join(str(1 / len(parts)) for _ in parts)}]" if len(parts) > 1 else "weights=[1,0]"
        listed = parts if len(parts) > 1 else (*parts, next(n for n in names if n not in parts))
        code, _, err = mmft("combine", f"run=[{','.join(listed)}]", weights, "how=cat", f"out={folder.as_posix()}", f"output_dir={home.outputs.as_posix()}", output_dir=False)
        assert code == 0, err
        return json.loads((folder / "summary.json").read_text())["eval_loss"]

    alone = {name: loss(name) for name in names}
    ordered = sorted(names, key=lambda name: alone[name])
    taken, best = [ordered[0]], alone[ordered[0]]
    for step, name in zip(record["soup"], ordered[1:], strict=True):
        score = loss(*taken, name)
        assert step["path"] == name and step["alone"] == pytest.approx(alone[name], rel=1e-5) and step["with_it"] == pytest.approx(score, rel=1e-5)
        assert step["taken"] == (step["with_it"] <= step["before"])
        if step["taken"]:
            taken, best = [*taken, name], score
    assert [p["path"] for p in record["parts"]] == taken
    assert json.loads((out / "summary.json").read_text())["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.fixture
def refused(mmft, home):
    def message(*words: str) -> str:
        code, out, err = mmft("combine", *words, f"output_dir={home.outputs.as_posix()}", output_dir=False)
        assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (out, err)
        return err

    return message


REFUSED = [
    (["run=[a]"], "is one adapter"), (["run=[a,a]"], "names a run twice"), (["run=[a,b]", "weights=[1]"], "a list of 2 numbers"),
    (["run=[a,b]", "weights=[0,0]"], "all are 0"), (["run=[a,b]", "weights=[1,x]"], "x is no number"), (["run=[a,b]", "how=lineal"], "Did you mean linear?"),
    (["run=[a,b]", "density=0.5"], "acts with how=ties"), (["run=[a,b]", "how=ties", "density=2"], "at most 1"), (["run=[a,b]", "rank=4"], "acts with how=svd"),
    (["run=[a,wide]"], "how=svd and how=cat take any ranks"), (["run=[a,b]", "how=soup", "weights=[1,2]"], "equal weights"), (["run=[a,nothing]"], "no such directory"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_combined_is_refused(refused, words, expected):
    assert expected in refused(*words)


def test_adapters_of_another_kind_or_base_are_refused(refused, home, tmp_path):
    import shutil

    home.train("whole", "lora.r=2", "lora.lora_alpha=4", "lora.whole=[connector]", "trainer.max_steps=1", "evaluation.split=null")
    assert "was trained with lora.modules_to_save" in refused("run=[a,whole]", "how=cat")
    copy = Path(shutil.copytree(home.outputs / "b", tmp_path / "other_base"))
    env = json.loads((copy / "env.json").read_text())
    env["model"]["revision"] = "sha256:" + "0" * 64
    (copy / "env.json").write_text(json.dumps(env))
    assert "was trained on mmft:tiny" in refused(f"run=[a,{copy.as_posix()}]")
