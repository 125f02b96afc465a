"""A recipe → a fine-tuned model. The only package that imports accelerate.

Public: `Recipe`, `finetune`.
"""

from __future__ import annotations

from revify.finetuning.recipe import Recipe
from revify.finetuning.run import finetune

__all__ = ["Recipe", "finetune"]
