"""Fine-tune a timm model in your own training loop, reversible while it trains, plain before and after.

    python examples/your_own_loop.py

Two lines are revify's: `convert` before the loop, `revert` after it. Takes half a minute on two CPU cores.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

import revify

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
images, targets = interpolate(images, size=32), torch.tensor(digits.target)

plain = timm.create_model("test_vit", img_size=32, num_classes=10)  # pretrained=True where there is a network
model = revify.convert(plain, images[:2])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model.train()
for _ in range(60):
    batch = torch.randint(1500, (64,))
    loss = cross_entropy(model(images[batch]), targets[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

plain = revify.revert(model).eval()
with torch.no_grad():
    right = (plain(images[1500:]).argmax(1) == targets[1500:]).float().mean()
print(f"loss {loss.item():.2f}; the plain {type(plain).__name__} reads {right:.0%} of the digits that it has not seen")
