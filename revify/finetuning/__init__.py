"""A recipe → a fine-tuned model. The only package that imports accelerate, and not before `finetune` is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revify.finetuning.recipe import Recipe

if TYPE_CHECKING:
    from revify.finetuning.run import finetune

__all__ = ["Recipe", "finetune"]


def __getattr__(name: str) -> object:
    if name == "finetune":
        from revify.finetuning.run import finetune

        return finetune
    raise AttributeError(f"module 'revify.finetuning' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
