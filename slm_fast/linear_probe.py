"""Where a task's classification head starts: at the logistic regression on the features that it will read."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEXTS_A_LABEL = 16  # up to these the penalty is that of normalised embeddings


@torch.enable_grad()
def linear_probe(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: the minimum, which is the only one, of

        sum_n -log softmax(W (x[n] - mean) + b)[labels[n]] + p s / 2 |W|^2
        s = mean |x[n] - mean|^2,   p = max(1, N / (16 C)),   C: num_labels

    A penalty in units of the features makes the answers independent of their scale: s = 1 and p = 1 are the
    usual defaults for normalised embeddings. It grows with the texts a label has, as the first term does:
    otherwise a head fits the texts it was made from so well that low-rank weights learn little behind it
    (docs/LOG.md, "Where heads start"). Found by L-BFGS in fp64.

    Args: features: [N, H].  labels: [N] int64 below num_labels; some may be missing.
    Returns W [num_labels, H] and b [num_labels] fp32 for features that are not centred.
    Source: linear probing before fine-tuning, Kumar et al., "Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution" (ICLR 2022).
    """
    features = features.detach().double()
    mean = features.mean(0)
    size = (features - mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
    x = (features - mean) / size  # so that s is 1
    penalty = max(1.0, len(x) / (TEXTS_A_LABEL * num_labels))
    parameters = x.new_zeros(num_labels, x.shape[1] + 1, requires_grad=True)  # W and b
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum")
        loss = (loss + penalty * weight.square().sum() / 2) / len(x)
        loss.backward()
        return loss

    optimizer.step(objective)
    weight, bias = parameters.detach()[:, :-1] / size, parameters.detach()[:, -1]
    return weight.float(), (bias - weight @ mean).float()
