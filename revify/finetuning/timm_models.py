"""A timm name and keyword arguments → a model with its weights, or a clear reason why not."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn

from revify.errors import RevifyError

_NETWORK_PACKAGES = frozenset({"huggingface_hub", "httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3"})


@dataclass(frozen=True, slots=True)
class Architecture:
    """A timm model to be made, and where its weights come from.

    Args:
        name: in timm, a tag included if wanted (`vit_tiny_patch16_224.augreg_in21k`).
        kwargs: further arguments of `timm.create_model`.
        img_size: side of the square input in pixels; None is the model's own.
        num_classes: None is the checkpoint's number, else the model's own.
        pretrained: fetch timm's weights from the Hugging Face hub.
        checkpoint: a file of weights that timm can read (safetensors or torch), instead.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    num_classes: int | None = None
    pretrained: bool = False
    checkpoint: Path | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A model, and what is known about it.

    Args:
        model: plain, in training mode, on the CPU.
        record: `{"name": ..., "kwargs": ...}`, from which timm makes the same model without weights.
        input_size: channels, height and width.
        remark: something that the user should know about the weights.
    """

    model: nn.Module
    record: dict[str, Any]
    input_size: tuple[int, int, int]
    remark: str | None


def create(wanted: Architecture) -> Created:
    """Make a timm model.

    A classifier with another number of classes than the weights' is new, with random values, and `remark`
    says so; everything else must fit exactly.

    Example:
        >>> created = create(Architecture("test_vit", img_size=32, num_classes=10))
        >>> created.input_size
        (3, 32, 32)

    Args:
        wanted: which model.

    Returns:
        The model and its record.

    Raises:
        RevifyError: no such model, arguments that it does not take, weights that cannot be had or do not fit.
    """
    _check_name(wanted.name)
    if wanted.pretrained and wanted.checkpoint:
        raise RevifyError(f"{wanted.name}: pretrained weights and a checkpoint are both asked for; give one of them.")
    state = _read_weights(wanted.checkpoint) if wanted.checkpoint else None
    if wanted.pretrained:
        _check_network(wanted.name)
    kwargs = dict(wanted.kwargs)
    if wanted.num_classes is not None:
        kwargs["num_classes"] = wanted.num_classes
    if wanted.img_size is not None:
        kwargs["img_size"] = wanted.img_size
    try:
        model, remark = _make(wanted, kwargs, state)
    except TypeError as error:
        if "img_size" not in str(error) or wanted.img_size is None:
            raise _failure(wanted, kwargs, error) from error
        del kwargs["img_size"]  # a convolutional network, which takes any size
        model, remark = _make(wanted, kwargs, state)
    return Created(model, {"name": wanted.name, "kwargs": _settled(model, kwargs)}, _input_size(model, wanted), remark)


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    known = timm.list_models()
    if not timm.is_model(base):
        what, near = f"timm knows no model {name!r}", difflib.get_close_matches(base.lower(), known, 4, 0.5)
    elif tag and name not in (tagged := timm.list_models(f"{base}.*", pretrained=True)):
        what, near = f"timm has no weights {tag!r} for {base}", tagged
    else:
        return
    hint = f"nearest: {', '.join(near)}" if near else f"timm {timm.__version__} has {len(known)} models"
    raise RevifyError(f"{what}; {hint}.")


def _make(
    wanted: Architecture, kwargs: dict[str, Any], state: dict[str, Tensor] | None
) -> tuple[nn.Module, str | None]:
    """The model with its weights; a TypeError of its constructor passes, for the caller to judge."""
    try:
        if state is not None:
            return _from_state(wanted, kwargs, state)
        with _quiet_hub():
            return timm.create_model(wanted.name, pretrained=wanted.pretrained, **kwargs), None
    except (RevifyError, TypeError):
        raise
    except Exception as error:  # whatever a timm constructor or a download ends in
        raise _failure(wanted, kwargs, error) from error


def _from_state(wanted: Architecture, kwargs: dict[str, Any], state: dict[str, Tensor]) -> tuple[nn.Module, str | None]:
    """The model with the weights' own classifier, loaded strictly; then the classifier that is wanted."""
    config = get_pretrained_cfg(wanted.name)
    heads = (config.classifier if config else None) or ()
    head = heads if isinstance(heads, str) else next(iter(heads), "")
    weight = state.get(f"{head}.weight")
    stored = 0 if weight is None else weight.shape[0]
    overlay = {"state_dict": state, "num_classes": stored, "label_offset": 0}
    model = timm.create_model(
        wanted.name, pretrained=True, pretrained_cfg_overlay=overlay, **{**kwargs, "num_classes": stored}
    )
    del model.pretrained_cfg["state_dict"]  # it would be kept, and copied with the model
    asked = kwargs.get("num_classes")
    if asked is None or asked == stored:
        return model, None
    model.reset_classifier(asked)
    return model, f"{wanted.checkpoint} has {stored} classes, the model {asked}: its classifier is new."


def _failure(wanted: Architecture, kwargs: dict[str, Any], error: Exception) -> RevifyError:
    """Why the model could not be made, in one paragraph."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    if wanted.checkpoint is not None and "state_dict" in str(error):
        return RevifyError(
            f"the weights in {wanted.checkpoint} do not fit {wanted.name}: {text}. Give the arguments with "
            "which the weights were trained (--img-size, --model-kwargs), or another file."
        )
    if wanted.pretrained and str(error).startswith("No pretrained weights"):
        return RevifyError(
            f"timm has no pretrained weights for {wanted.name}: give a file of weights or train from scratch."
        )
    package = type(error).__module__.partition(".")[0]
    if wanted.pretrained and (isinstance(error, OSError) or package in _NETWORK_PACKAGES):
        return _no_weights(wanted.name, text)
    return RevifyError(f"timm cannot create {wanted.name} with {kwargs}: {text}")


def _no_weights(name: str, reason: str) -> RevifyError:
    return RevifyError(
        f"the pretrained weights of {name} could not be fetched from the Hugging Face hub ({reason}). "
        "Connect to the network (or set HF_ENDPOINT to a mirror), give weights that you have with "
        "--checkpoint FILE, or drop --pretrained to start from random weights."
    )


def _check_network(name: str) -> None:
    """Fail at once where the hub client would try for a minute: nothing cached, no proxy, no such host."""
    config = get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or urllib.request.getproxies():
        return
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file), str) for file in files):
        return
    host = huggingface_hub.constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise _no_weights(name, f"{host}: {error.strerror or error}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's retries out of the terminal; what they end in is reported once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(path))
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
        reason = "it holds no tensors by name"
    except FileNotFoundError:
        reason = "there is no such file"
    except Exception as error:  # whatever a foreign file makes a reader raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise RevifyError(
        f"the checkpoint {path} cannot be read: {reason}. Give a .safetensors file, or a torch file of weights only."
    )


def _settled(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make the same model again, with the classes that it has got."""
    classes = getattr(model, "num_classes", None)
    return kwargs if classes is None else {**kwargs, "num_classes": classes}


def _input_size(model: nn.Module, wanted: Architecture) -> tuple[int, int, int]:
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]  # timm: a dict
    channels = wanted.kwargs.get("in_chans", channels)
    side = wanted.img_size or wanted.kwargs.get("img_size")
    if side is None:
        return channels, height, width
    height, width = (side, side) if isinstance(side, int) else side
    return channels, height, width
