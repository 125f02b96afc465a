"""The loop of timm's training script, in eight settings, with timm's own optimizers, schedules, losses, averages and mixing.

python benchmarks/programs/timm_script.py
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from comparing import Outcome, batches, converted, main, state
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad

NETWORKS = {
    "resnet": ("resnet34", 64, {"channels": (16, 16, 32, 32)}),
    "vit": ("test_vit", 160, {"depth": 4, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
}


def train(
    network: str,
    *,
    mixing: bool = False,
    average: bool = False,
    clip: str | None = None,
    amp: bool = False,
    accumulate: int = 1,
    optimizer: str = "sgd",
    channels_last: bool = False,
    split_bn: bool = False,
) -> Outcome:
    """Two epochs of the script."""
    name, size, options = NETWORKS[network]
    made = timm.create_model(name, num_classes=5, **options)
    model = converted(made, torch.zeros(2, 3, size, size))
    before = state(model, "before ")
    if split_bn:
        model = timm.layers.convert_splitbn_model(model, 2)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5) if mixing else None
    criterion = SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(0.1)
    steps = create_optimizer_v2(model, opt=optimizer, lr=0.05, weight_decay=1e-4, layer_decay=0.9)
    schedule, _ = create_scheduler_v2(steps, sched="cosine", num_epochs=2, warmup_epochs=1)
    ema = ModelEmaV3(model, decay=0.9) if average else None
    scaler = NativeScaler("cpu") if clip == "scaled" else None
    losses = []
    model.train()
    for epoch in range(2):
        for number, (images, labels) in enumerate(batches(2 * accumulate, 4, 3, size, size)):
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            images, labels = mixup(images, labels) if mixup else (images, labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = criterion(model(images), labels) / accumulate
            needed = (number + 1) % accumulate == 0
            if scaler is not None:
                scaler(loss, steps, clip_grad=1.0, parameters=model.parameters(), need_update=needed)
            else:
                loss.backward()
                if needed and clip:
                    dispatch_clip_grad(model.parameters(), 0.1, mode=clip)
                if needed:
                    steps.step()
            if needed:
                steps.zero_grad()
                if ema is not None:
                    ema.update(model)
            losses.append(loss.detach())
        schedule.step(epoch + 1)
    averaged = state(ema.module, "average ") if ema is not None else {}
    model.eval()
    with torch.no_grad():
        validation = model(batches(1, 4, 3, size, size)[0][0])
    return before | state(model) | averaged | {"losses": torch.stack(losses), "validation": validation}


SETTINGS = {
    "resnet34": partial(train, "resnet"),
    "resnet34, EMA, channels last": partial(train, "resnet", average=True, channels_last=True),
    "resnet34, split BatchNorm put in after convert": partial(train, "resnet", split_bn=True),
    "resnet34, loss scaling and clipping": partial(train, "resnet", clip="scaled"),
    "ViT, mixup and cutmix, AdamW, drop path": partial(train, "vit", mixing=True, optimizer="adamw"),
    "ViT, bf16, adaptive clipping": partial(train, "vit", amp=True, clip="agc"),
    "ViT, accumulation over 2 batches, norm clipping": partial(train, "vit", accumulate=2, clip="norm"),
    "ViT, LAMB, EMA, bf16": partial(train, "vit", optimizer="lamb", average=True, amp=True),
}

if __name__ == "__main__":
    main("timm's training script", SETTINGS)
