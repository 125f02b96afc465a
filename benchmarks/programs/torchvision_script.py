"""torchvision's reference training of classifiers, re-enacted: warm-up, norms without decay, mixing, averages.

python benchmarks/programs/torchvision_script.py
"""

from __future__ import annotations

from functools import partial

import torch
from comparing import Outcome, batches, converted, main, state
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torchvision.models import ConvNeXt, ResNet, VisionTransformer, mobilenet_v3_small
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

NETWORKS = {
    "ResNet": lambda: ResNet(BasicBlock, [3, 3, 2, 1], num_classes=5),
    "MobileNetV3": lambda: mobilenet_v3_small(num_classes=5),
    "ConvNeXt": lambda: ConvNeXt([CNBlockConfig(8, 16, 3), CNBlockConfig(16, None, 3)], 0.2, num_classes=5),
    "ViT": lambda: VisionTransformer(32, 8, 4, 2, 16, 32, dropout=0.1, num_classes=5),
}


def train(
    network: str, *, amp: bool = False, mixing: bool = False, sync_bn: bool = False, clip: float | None = None
) -> Outcome:
    """Two epochs of the script, each with its validation."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    model = converted(model, torch.zeros(2, 3, 32, 32))
    before = state(model, "before ")
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms, others = split_normalization_params(model)
    groups = [{"params": p, "weight_decay": d} for p, d in ((norms, 0.0), (others, 1e-3)) if p]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    schedule = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=1), CosineAnnealingLR(optimizer, 3)], [1])
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)])
    losses, validations = [], []
    for _ in range(2):
        model.train()
        for images, labels in batches(3, 4, 3, 32, 32):
            images, labels = mix(images, labels) if mixing else (images, labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            average.update_parameters(model)
            losses.append(loss.detach())
        schedule.step()
        for evaluated in (model, average):
            evaluated.eval()
            with torch.inference_mode():
                validations.append(evaluated(batches(1, 4, 3, 32, 32)[0][0]).clone())
    outcome = before | state(model) | state(average, "average ")
    return outcome | {"losses": torch.stack(losses), "validations": torch.stack(validations)}


SETTINGS = {
    "ResNet": partial(train, "ResNet"),
    "ResNet, SyncBatchNorm put in after convert": partial(train, "ResNet", sync_bn=True),
    "MobileNetV3, bf16": partial(train, "MobileNetV3", amp=True),
    "ConvNeXt, mixing, stochastic depth, clipping": partial(train, "ConvNeXt", mixing=True, clip=1.0),
    "ViT, dropout, bf16, mixing": partial(train, "ViT", amp=True, mixing=True),
}

if __name__ == "__main__":
    main("torchvision's reference script", SETTINGS)
