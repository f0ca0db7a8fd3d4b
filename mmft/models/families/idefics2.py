"""Idefics2: its processor does not tell what it writes for an image, and neighbouring images share the token between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...collators.types import Replacement
from .base import Family


@dataclass(kw_only=True)
class Idefics2(Family):
    model_types = ("idefics2",)

    def replacements(self, text: str, processor: Any) -> list[Replacement] | None:
        """As Idefics2Processor writes it: image tokens between fake tokens, five times for a split image.

        A fake token beside another is written once, and a space follows one that a word would follow.
        """
        place, fake = processor.image_token, processor.fake_image_token
        parts = 5 if processor.image_processor.do_image_splitting else 1
        written = f"{fake}{place * processor.image_seq_len}" * parts + fake
        found: list[Replacement] = []
        for match in re.finditer(re.escape(place), text):
            start, end = match.span()
            own = written.removeprefix(fake) if found and found[-1]["span"][1] == start else written
            found.append({"span": (start, end), "replacement": own + (" " if re.match(r"[^\s<]", text[end:]) else "")})
        return found
