"""Training on two processes with gloo. As a script, started by torchrun with a folder, this file is one of
them: it learns in every way of RUNS and leaves what it has learnt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training_safety import ROWS, learnt, make_model, make_trainer, same_bits
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from slm_fast.sharding import shard_base

# name: (family, options of the trainer); SGD, so that rounding is not blown up
COMMON = dict(optim="sgd", learning_rate=0.5, warmup_steps=0, save_total_limit=None)
RUNS = {
    "epochs": ("bert", dict(max_steps=9, save_steps=4)),  # three steps each
    "resumed": ("bert", dict(max_steps=9, save_steps=1)),
    "checkpointed": ("bert", dict(max_steps=3, gradient_checkpointing=True)),
    "accumulated": ("llama", dict(max_steps=2, gradient_accumulation_steps=2)),
    "sharded": ("llama", dict(max_steps=2)),
}
EVALUATION = ROWS[:16]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def prepared(family):
    """Without dropout, whose draws would depend on the number of processes."""
    model = make_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def rows_of(family, rows):
    return [row if family == "bert" else row | {"labels": row["input_ids"]} for row in rows]


def others(model):
    """The factors of the task that was learnt before, and the base."""
    pool = model.pool
    base = [t.full_tensor() if isinstance(t, DTensor) else t for t in model.base_model.state_dict().values()]
    slots = pool.task("task0").slots
    rows = pool.rows_of(slots)
    factors = [t[rows] for f in pool.factors for t in (f.A, f.B)]
    return [t.clone() for t in (*factors, pool.keys, *base)]


def local_size(model):
    """Numbers of the base that this process holds."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.base_model.parameters())
    return sum(p.numel() for p in local)


def learn(name, folder, callbacks=None, resume=None, **options):
    family, of_run = RUNS[name]
    model = prepared(family)
    if name == "sharded" and "RANK" in os.environ:
        held = local_size(model)
        shard_base(model)
        assert local_size(model) < 0.6 * held
        with pytest.raises(ValueError, match="sharded already"):
            shard_base(model)
    before = others(model)
    parts = [rows_of(family, rows) for rows in (ROWS, EVALUATION)]
    trainer = make_trainer(model, folder, *parts, callbacks, **(COMMON | of_run | options))
    trainer.train(resume_from_checkpoint=resume)
    assert same_bits(others(model), before)
    return trainer


def main(folder):
    rank = int(os.environ["RANK"])
    for name in RUNS:
        output = folder / name
        if name == "resumed":
            learn(name, output, [StopAt(5)])  # in the middle of the second epoch
            trainer = learn(name, output, resume=True)
        else:
            trainer = learn(name, output / f"of_rank{rank}")
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        found = {str(n): tensor for n, tensor in enumerate(learnt(trainer.model))}
        found["eval_loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
        save_file(found, folder / f"{name}{rank}.safetensors")
    torch.distributed.barrier()


if __name__ == "__main__":
    signal.alarm(300)  # whatever happens, the process ends
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # destroying the group and leaving Python may hang in gloo's threads


@pytest.fixture(scope="module")
def folder(minilm, tmp_path_factory):
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, __file__, folder],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def ranks(folder, name):
    return [load_file(folder / f"{name}{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_have_learnt_the_same_bits(folder, name):
    first, second = ranks(folder, name)
    assert same_bits(first.values(), [second[key] for key in first])


@pytest.mark.parametrize("name", ["epochs", "checkpointed", "accumulated", "sharded"])
def test_as_one_process_with_the_same_global_batch(folder, tmp_path, name):
    trainer = learn(name, tmp_path, per_device_train_batch_size=8)
    begin, got = learnt(prepared(RUNS[name][0])), ranks(folder, name)[0]
    if name not in (
        "accumulated",
        "sharded",
    ):  # transformers takes the mean of batches, however many tokens they have
        assert float(got["eval_loss"]) == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    for number, ours in enumerate(learnt(trainer.model)):
        torch.testing.assert_close(got[str(number)], ours, rtol=1e-4, atol=1e-5)
    assert not same_bits(begin, learnt(trainer.model))


def test_resumes_in_an_epoch_with_the_same_bits(folder):
    whole, resumed = ranks(folder, "epochs")[0], ranks(folder, "resumed")[0]
    assert same_bits(whole.values(), [resumed[key] for key in whole])


def test_only_the_first_process_writes(folder):
    first, second = (folder / "epochs" / f"of_rank{rank}" for rank in (0, 1))
    written = {path.name for path in second.rglob("*") if path.is_file()}
    assert written == {"rng_state_1.pth"}  # of its own
    assert {"slm_task.safetensors", "optimizer.pt"} <= {
        path.name for path in (first / "checkpoint-8").iterdir()
    }
