import pickle

import pytest
import torch

from slm_fast import Routing


def example() -> Routing:
    return Routing.make([[1, 2], [3, 0]], [[0.25, 0.75], [1.0, 0.0]], pool_version=5)


def test_make_checks_shapes_and_values():
    with pytest.raises(ValueError, match=r"\[1, 2\] and \[1, 1\]"):
        Routing.make([[1, 2]], [[1.0]])
    with pytest.raises(ValueError, match="finite"):
        Routing.make([[1]], [[float("nan")]])


def test_dtypes_and_rows():
    routing = example()
    assert [t.dtype for t in routing] == [torch.int32, torch.float32, torch.float32, torch.int64]
    assert routing.num_rows == 2
    assert routing.rows([1]).indices.tolist() == [[3, 0]]
    assert routing.repeat_interleave(2).indices[:, 0].tolist() == [1, 1, 3, 3]
    assert Routing.cat([routing.rows([0]), routing.rows([1])]).weights.equal(routing.weights)


def test_routings_of_unlike_widths_come_together():
    routing = Routing.cat([example(), Routing.make([[4]], [[0.5]], torch.tensor([[2.0]]), pool_version=6)])
    assert routing.indices.tolist() == [[1, 2], [3, 0], [4, 0]]
    assert routing.weights.tolist() == [[0.25, 0.75], [1.0, 0.0], [0.5, 0.0]]
    assert routing.scores[2].tolist() == [2.0, -float("inf")] and routing.pool_version.tolist() == [5, 5, 6]
    assert routing.padded(1) is routing and routing.padded(4).indices.shape == (3, 4)


def test_survives_pickling_and_scattering():
    routing = example()
    restored = pickle.loads(pickle.dumps(routing))
    assert isinstance(restored, Routing) and all(map(torch.equal, restored, routing))
    from torch.nn.parallel.scatter_gather import _is_namedtuple

    assert _is_namedtuple(routing)
    mapped = torch.utils._pytree.tree_map(lambda t: t.clone(), routing)
    assert isinstance(mapped, Routing) and torch.equal(mapped.weights, routing.weights)
    assert all(t.device.type == "meta" for t in routing.to("meta"))
