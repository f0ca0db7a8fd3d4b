"""Every conf/data yaml composes and builds, and building imports no heavy library."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmft.common.errors import UserError
from mmft.config.build import build
from mmft.config.compose import compose
from mmft.data.mix import Mix
from mmft.data.sources.base import BaseSource

FILES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "data").glob("[!_]*.yaml"))
GIVEN = {"hub": ["data.dataset=a/b"], "llamafactory": ["data.path=x", "data.dataset=y"]}
NEED_PATH = ("classfolder", "coco", "coco_boxes", "conversations", "imagefolder", "messages", "saved", "table", "webdataset")


@pytest.mark.parametrize("name", FILES)
def test_builds(name):
    source = build(compose([f"data={name}", *GIVEN.get(name, ["data.path=x"] if name in NEED_PATH else [])]).data)
    assert isinstance(source, Mix if name == "mix" else BaseSource) and source.name == name


@pytest.mark.parametrize("name", [*NEED_PATH, "hub", "llamafactory"])
def test_what_must_be_given_is_asked_for(name):
    with pytest.raises(UserError, match="data.(path|dataset) must be given"):
        build(compose([f"data={name}"]).data)


def test_the_recipes_figures():
    coco, football = (build(compose([f"data={n}"]).data) for n in ("coco500", "football"))
    assert (coco.limit, coco.splits.validation, coco.splits.by, coco.prompt, coco.captions) == (500, 4, "last", "COCO Yes:", "first")
    assert football.dataset == "ybelkada/football-dataset" and (football.columns.image, football.columns.text) == ("image", "text")
    llava = build(compose(["data=llava_cc3m"]).data)
    assert (llava.file, llava.images) == ("chat.json", "images_dl")


def test_building_is_light():
    code = ("import sys; from mmft.config.build import build; from mmft.config.compose import compose; [build(compose([f'data={n}']).data) for n in ('coco500', 'football', 'qwen_json')];"
            "print([m for m in ('torch', 'datasets', 'modelscope', 'transformers', 'pandas', 'pyarrow') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True).stdout.strip() == "[]"
