"""What the references share: float64 arrays, image by image, written from the definitions."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Said:
    """What a model said of a batch: logits (batch, classes), embedding (batch, features), maps [(batch, channels, height, width), ...]."""

    logits: Array
    embedding: Array
    maps: list[Array]
    preactivations: list[Array]


@dataclass(frozen=True)
class Given:
    """The rest of a batch, and the labels of all training images of the run: ``index`` points into them."""

    labels: Array
    index: Array
    mixed: Array
    all_labels: Array


def log_softmax(z: Array) -> Array:
    """Of one image: log p_i = z_i - log sum_j exp(z_j)."""
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(logp: Array, logq: Array) -> float:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), in nats."""
    return float(sum(np.exp(a) * (a - b) for a, b in zip(logp, logq, strict=True)))


def correlation(a: Array, b: Array) -> float:
    """Pearson's: covariance over the product of the standard deviations; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def pooled(maps: Array, height: int, width: int) -> Array:
    """Adaptive average pooling of (batch, channels, H, W): cell i of n averages rows floor(i H / n) to ceil((i + 1) H / n)."""
    rows, columns = (
        [slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for n, side in ((height, maps.shape[2]), (width, maps.shape[3]))
    )
    return np.stack([np.stack([maps[:, :, row, column].mean((2, 3)) for column in columns], axis=2) for row in rows], axis=2)


def ce(logits: Array, targets: Array) -> float:
    """Soft cross-entropy: sum over classes, mean over images."""
    return float(np.mean([-(target * log_softmax(z)).sum() for z, target in zip(logits, targets, strict=True)]))


def bce(logits: Array, targets: Array) -> float:
    """-(t log sigmoid(z) + (1 - t) log(1 - sigmoid(z))): mean over images and classes."""
    return float(np.mean(targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)))


def calibration_error(confidence: Array, correct: Array) -> float:
    """arXiv 1706.04599, equation 3, bin by bin; bin m is ((m - 1) / 15, m / 15]."""
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, value in enumerate(confidence) if (m - 1) / 15 < value <= m / 15]
        if inside:
            total += len(inside) / len(confidence) * abs(np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
    return total


def convolution(maps: Array, weight: Array, bias: Array | None = None, stride: int = 1) -> Array:
    """Of (batch, channels, H, W), padded by zeros on each side by half the kernel; groups follow from the weight's shape."""
    out, per_group, side, _ = weight.shape
    padded = np.pad(maps, ((0, 0), (0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    height, width = ((padded.shape[axis] - side) // stride + 1 for axis in (2, 3))
    result = np.zeros((len(maps), out, height, width))
    for o in range(out):
        first = o * maps.shape[1] // per_group // out * per_group
        for i in range(height):
            for j in range(width):
                window = padded[:, first : first + per_group, i * stride : i * stride + side, j * stride : j * stride + side]
                result[:, o, i, j] = (window * weight[o]).sum((1, 2, 3)) + (0 if bias is None else bias[o])
    return result


def batch_norm(maps: Array, weight: Array, bias: Array) -> Array:
    """Each channel with the mean and the (biased) variance of its values in this batch; 1e-5 is added to the variance."""
    channels = []
    for c in range(maps.shape[1]):
        values = maps[:, c]
        channels.append((values - values.mean()) / np.sqrt(values.var() + 1e-5) * weight[c] + bias[c])
    return np.stack(channels, axis=1)
