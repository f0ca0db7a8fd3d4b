"""Model types of transformers that mmft refuses, each with the reason: they would be trained or used wrongly, or are no chat or caption models."""

from __future__ import annotations

# model type -> what is wrong, as the end of "a TYPE is not supported: ..."; a way on follows if there is one
UNSUPPORTED: dict[str, str] = {}
