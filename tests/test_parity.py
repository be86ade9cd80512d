"""Parity with the authors' release, on vectors that their retriever returned."""

import pytest
import torch
from safetensors.torch import load_file

from slm_fast import KnowledgePool, SLMConfig, ops

CASES = [("bert_b1", 4), ("bert_b1_masked", 4), ("llama_like_b1", 2), ("batch_shared_b7", 2)]


def authors_pool(data: dict, top_k: int, mixing: str) -> KnowledgePool:
    """Their keys [1, G, P, D/G] and pool [P, 2, layers * rank * hidden] as a pool of ours."""
    layers, _, hidden = data["delta_y"].shape
    num_entries = data["pool"].shape[0]
    rank = data["pool"].shape[2] // layers // hidden
    config = SLMConfig.paper(top_k=top_k, r=rank, mixing=mixing)
    pool = KnowledgePool(config, {f"layer.{layer}": (hidden, hidden) for layer in range(layers)})
    keys = data["keys"][0].transpose(0, 1).reshape(num_entries, -1)
    allowed = data["pool_mask"].bool()
    for name, members in (("allowed", allowed), ("masked", ~allowed)):
        if members.any():
            pool.add_task(name, keys[members])
    out_side, in_side = data["pool"].view(num_entries, 2, layers, rank, hidden).unbind(1)
    order = torch.cat([allowed.nonzero(), (~allowed).nonzero()]).flatten()
    for layer, factors in enumerate(pool.factors):
        factors.A[: num_entries * rank] = in_side[order, layer].flatten(0, 1)
        factors.B[: num_entries * rank] = out_side[order, layer].flatten(0, 1)
    pool.original = order
    return pool


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("name", "top_k"), CASES)
def test_reproduces_the_authors_retriever(benchmark_data, name, top_k, backend):
    data = load_file(benchmark_data / "slm_official" / f"{name}.safetensors")
    pool = authors_pool(data, top_k, "batch" if "batch" in name else "instance")
    pool.config.backend = backend
    routing = pool.search(data["query"], "allowed")
    keys = torch.nn.functional.normalize(data["keys"][0], dim=-1)
    query = torch.nn.functional.normalize(data["query"].unflatten(1, (6, -1)), dim=-1)
    cosine = torch.einsum("bgd,gpd->bp", query, keys) / 6
    if "batch" in name:
        cosine = cosine.mean(0, keepdim=True).expand_as(cosine)
    expected = cosine.masked_fill(~data["pool_mask"].bool(), -1).topk(top_k)
    assert torch.equal(pool.original[routing.indices.long()], expected.indices)
    torch.testing.assert_close(
        routing.weights, expected.values / expected.values.sum(-1, keepdim=True), rtol=0, atol=1e-5
    )
    for layer, factors in enumerate(pool.factors):
        for row in range(routing.num_rows):
            y = torch.zeros_like(data["x"])
            one = routing.rows(slice(row, row + 1))
            y = ops.mixture(
                y,
                data["x"],
                factors.A,
                factors.B,
                pool.start,
                pool.rank,
                pool.scaling,
                one.indices,
                one.weights,
                backend=pool.backend,
            )
            torch.testing.assert_close(y, data["delta_y"][layer], rtol=0, atol=1e-5)


def test_reads_the_authors_keys(benchmark_data):
    folder = benchmark_data / "slm_official"
    for file in sorted(folder.glob("*.pth")):
        keys = torch.load(file, weights_only=True)["keys"]
        _, groups, count, width = keys.shape
        pool = KnowledgePool(SLMConfig.paper(num_groups=groups), {"layer": (8, 8)})
        flat = keys[0].transpose(0, 1).reshape(count, groups * width)
        pool.add_task(file.stem, flat)
        routing = pool.search(flat)
        assert routing.indices[:, 0].tolist() == list(range(count))
        torch.testing.assert_close(routing.scores[:, 0], torch.ones(count), rtol=0, atol=1e-5)
