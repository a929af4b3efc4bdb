"""The plain side of every comparison: what a careful user writes without this package.

The network is the public PyTorch port of DDPM (x * sigmoid(x), attention by two batched products), here
on the weights of one of ours; loop, average, sampler and transforms are those of common training scripts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from ebdiff.nets.unet import AttnBlock, ResnetBlock, UNet, timestep_embedding

# --- the network --------------------------------------------------------------------------------------------


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x), written out."""
    return x * torch.sigmoid(x)


class PlainResnetBlock(ResnetBlock):
    """The residual block of the public port."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class PlainAttnBlock(AttnBlock):
    """Attention of the public port: the whole matrix of weights, by two batched products."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        b, _, height, width = h.shape
        q = self.q(h).reshape(b, -1, height * width).permute(0, 2, 1)
        k = self.k(h).reshape(b, -1, height * width)
        v = self.v(h).reshape(b, -1, height * width)
        weights = torch.softmax(torch.bmm(q, k) * q.shape[2] ** -0.5, dim=2)
        h = torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, -1, height, width)
        return x + self.proj_out(h)


class PlainUNet(UNet):
    """The U-Net's forward pass with the blocks above."""

    def forward(self, x: Tensor, t: Tensor, cond: None = None) -> Tensor:
        temb = timestep_embedding(t, self.config.width)
        temb = self.temb.dense[1](swish(self.temb.dense[0](temb)))
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(len(level.block)):
                skips.append(level.step(i, skips[-1], temb))
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = self.mid.block_1(skips[-1], temb)
        if hasattr(self.mid, "attn_1"):
            h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)
        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = level.step(i, torch.cat([h, skips.pop()], dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(swish(self.norm_out(h)))


def network(ours: UNet) -> UNet:
    """A copy of a network, dense or pruned, that computes the same in the plain way."""
    plain = copy.deepcopy(ours)
    classes = {UNet: PlainUNet, ResnetBlock: PlainResnetBlock, AttnBlock: PlainAttnBlock}
    for module in plain.modules():
        module.__class__ = classes.get(type(module), type(module))
    return plain


# --- training -----------------------------------------------------------------------------------------------


def torch_defaults() -> None:
    """torch's own switches, which the other side may have set: fp32 products, TF32 convolutions on a GPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False


class Trainer:
    """The eager fp32 loop: default Adam, the loss read every step, the average parameter by parameter.

    Args:
        model: the network, on its device.
        abar: cumulative alphas, (T,).
        lr, clip, decay: as in the experiment.
    """

    def __init__(self, model: nn.Module, abar: np.ndarray, lr: float, clip: float, decay: float):
        self.model, self.clip, self.decay = model.train(), clip, decay
        self.abar = torch.tensor(abar, dtype=torch.float32, device=next(model.parameters()).device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.shadow = {name: p.data.clone() for name, p in model.named_parameters()}

    def loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Summed squared error of the predicted noise, averaged over the batch."""
        a = self.abar.index_select(0, t).view(-1, 1, 1, 1)
        x = x0 * a.sqrt() + eps * (1 - a).sqrt()
        return (eps - self.model(x, t.float())).square().sum(dim=(1, 2, 3)).mean(dim=0)

    def draw(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Antithetic timesteps and noise for a batch."""
        n, steps = len(x0), len(self.abar)
        half = torch.randint(0, steps, (n // 2 + 1,), device=x0.device)
        return torch.cat([half, steps - half - 1], dim=0)[:n], torch.randn_like(x0)

    def step(self, x0: Tensor) -> float:
        """One step on a batch that lies ready in the host's memory; its loss."""
        torch_defaults()
        x0 = x0.to(self.abar.device)
        t, eps = self.draw(x0)
        loss = self.loss(x0, t, eps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        for name, p in self.model.named_parameters():
            self.shadow[name] = (1 - self.decay) * p.data + self.decay * self.shadow[name]
        return loss.item()


# --- sampling -----------------------------------------------------------------------------------------------


def quad_steps(timesteps: int, steps: int) -> list[int]:
    """The quadratic schedule with the repetitions at its beginning."""
    return [int(s) for s in np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2]


def sample(model: nn.Module, x: Tensor, steps: Sequence[int], abar: np.ndarray) -> Tensor:
    """DDIM with eta = 0 that keeps every x_t and every predicted x_0 on the host; x_0 (B, C, H, W)."""
    device = next(model.parameters()).device
    alphas = torch.tensor([1.0, *abar], dtype=torch.float32, device=device)
    following = [-1, *steps[:-1]]
    xs, x0_predictions = [x], []
    with torch.no_grad():
        for i, j in zip(reversed(steps), reversed(following), strict=True):
            t = (torch.ones(len(x)) * i).to(device)
            at = alphas.index_select(0, t.long() + 1).view(-1, 1, 1, 1)
            at_next = alphas.index_select(0, torch.full_like(t, j).long() + 1).view(-1, 1, 1, 1)
            xt = xs[-1].to(device)
            eps = model(xt, t)
            x0 = (xt - eps * (1 - at).sqrt()) / at.sqrt()
            x0_predictions.append(x0.to("cpu"))
            xs.append((at_next.sqrt() * x0 + (1 - at_next).sqrt() * eps).to("cpu"))
    return xs[-1]


# --- data ---------------------------------------------------------------------------------------------------


class Dataset(torch.utils.data.Dataset):
    """Images one by one, as torchvision's transforms make them: flip, to a tensor in [0, 1], to [-1, 1]."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        image = Image.fromarray(self.pixels[i])
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return 2 * to_tensor(image) - 1


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image -> float32 (C, H, W) in [0, 1]."""
    array = torch.from_numpy(np.array(image, np.uint8, copy=True))
    return array.view(*image.size[::-1], -1).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


# --- distances ----------------------------------------------------------------------------------------------


def hamming_matrix(masks: np.ndarray) -> np.ndarray:
    """Distances of all pairs of masks (n, length) bool, by a double loop."""
    n = len(masks)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            matrix[i, j] = np.mean(masks[i] != masks[j])
    return matrix


def newest_distances(masks: np.ndarray, window: int) -> np.ndarray:
    """Distances of each mask to the `window - 1` before it, oldest first, NaN where there is none."""
    found = np.full((len(masks), window - 1), np.nan)
    for i in range(len(masks)):
        for j in range(max(0, i - window + 1), i):
            found[i, j - i + window - 1] = np.mean(masks[i] != masks[j])
    return found


def frechet_distance(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray) -> float:
    """Fréchet distance of two Gaussians with the general matrix root, as common FID scripts have it."""
    root = sqrtm(c1 @ c2)
    root = root.real if np.iscomplexobj(root) else root
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root))
