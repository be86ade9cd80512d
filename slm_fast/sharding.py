"""A frozen base that is too large for one device, in parts on several: FSDP2 for the base alone."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slm_fast.model import SLMModel


def shard_base(model: SLMModel, mesh: DeviceMesh | None = None, **options) -> SLMModel:
    """Split the frozen base over the processes of `mesh`, in place; by default over all of them.

    Every process keeps its part of each decoder layer's weights and gathers the rest while the layer runs.
    Entries, heads and keys stay whole on every process, and `SLMTrainer` averages their gradients as without
    sharding. Under torchrun or accelerate launch, after the model is on its device:

        trainer = SLMTrainer(shard_base(model), args, rows, task="news")

    options: of `torch.distributed.fsdp.fully_shard`, such as `reshard_after_forward` and `offload_policy`.
    All processes must run the same forward passes, `generate` and a backbone encoder's among them. The
    ordinary layers run, not the fused ones; saved pools hold no weights to recognise the base by. Raises
    ValueError where the base is sharded already, quantised, or names no layers that must not be split.
    """
    base = model.base_model
    if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
        raise ValueError("the base is sharded already")
    if any(not parameter.is_floating_point() for parameter in base.parameters()):
        raise ValueError("a quantised base cannot be sharded")
    layers = _decoder_layers(base)
    if not layers:
        raise ValueError(f"{type(base).__name__} names no layers to shard (_no_split_modules)")
    model.state.sharded = True
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(base, mesh=mesh, **options)
    ignored = [name for name, value in model.named_parameters() if isinstance(value, DTensor)]
    model._ddp_params_and_buffers_to_ignore = ignored  # they are frozen, and not the same everywhere
    return model


def _decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The modules of the classes that transformers places whole on a device."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in base.modules() if names & {cls.__name__ for cls in type(module).__mro__}]
