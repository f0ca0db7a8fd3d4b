"""Each refused model type is refused by its reason, from config.json alone."""

from __future__ import annotations

import json

import pytest

from mmft.common.errors import UserError
from mmft.models.families.base import Family
from mmft.models.load import locate_model
from mmft.models.unsupported import UNSUPPORTED


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_refused_type_says_why(kind, tmp_path):
    config: dict[str, object] = {"model_type": kind}
    if kind == "vision-encoder-decoder":
        config |= {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "trocr"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        locate_model(Family(path=str(tmp_path)))
    assert UNSUPPORTED[kind] in str(caught.value) and "\n" not in str(caught.value)
