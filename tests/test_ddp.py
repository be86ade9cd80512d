"""Training on several processes: on two with gloo, on all GPUs with NCCL. As a script, started by torchrun or
accelerate with a device, a folder and names of RUNS, this file is one of them: it learns in these ways and
leaves what it has learnt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_base
from safetensors.torch import load_file, save_file
from test_training_safety import ROWS, learnt, make_model, make_trainer, same_bits
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from slm_fast import SLMModel
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
# With --cpu it starts one process, unless there is MPI; the script says which device it wants.
ACCELERATE = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCHERS = {  # their modules and how they are told the number of processes
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node"],
    "accelerate": ["accelerate.commands.launch", *ACCELERATE, "--num_processes"],
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def prepared(family):
    """Without dropout, whose draws would depend on the number of processes."""
    model = make_model(family, feature_penalty=0.5 if family == "bert" else 0.0)
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
    return [t.detach().to("cpu", copy=True) for t in (*factors, pool.keys, *base)]


def local_size(model):
    """Numbers of the base that this process holds."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.base_model.parameters())
    return sum(p.numel() for p in local)


def learn(name, folder, callbacks=None, resume=None, **options):
    family, of_run = RUNS[name]
    model = prepared(family)
    if name == "sharded" and "RANK" in os.environ:
        if not options.get("use_cpu", True):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            model.cuda()
        held, processes = local_size(model), int(os.environ["WORLD_SIZE"])
        shard_base(model)
        assert processes == 1 or local_size(model) < 1.2 * held / processes
        with pytest.raises(ValueError, match="sharded already"):
            shard_base(model)
    before = others(model)
    parts = [rows_of(family, rows) for rows in (ROWS, EVALUATION)]
    trainer = make_trainer(model, folder, *parts, callbacks, **(COMMON | of_run | options))
    trainer.train(resume_from_checkpoint=resume)
    assert same_bits(others(model), before)
    return trainer


def main(device, folder, names):
    rank, options = int(os.environ["RANK"]), {"use_cpu": device == "cpu"}
    for name in names:
        output = folder / name
        if name == "resumed":
            learn(name, output, [StopAt(5)], **options)  # in the middle of the second epoch
            trainer = learn(name, output, resume=True, **options)
        else:
            trainer = learn(name, output / f"of_rank{rank}", **options)
        assert trainer.args.device.type == device
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        found = {str(n): tensor for n, tensor in enumerate(learnt(trainer.model))}
        found["eval_loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
        save_file({key: t.cpu() for key, t in found.items()}, folder / f"{name}{rank}.safetensors")
    trainer.model.save_pretrained(folder / "saved")  # every process of them
    SLMModel.from_pretrained(tiny_base(RUNS[name][0]), folder / "saved")
    assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
    torch.distributed.barrier()


if __name__ == "__main__":
    signal.alarm(300)  # whatever happens, the process ends
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # destroying the group and leaving Python may hang in gloo's threads


def launch(launcher, processes, device, folder, names):
    """Learn in some ways on several processes; they leave what they have learnt in the folder."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = subprocess.run(
        [*command, __file__, device, folder, *names],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def folder(minilm, tmp_path_factory):
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("torchrun", 2, "cpu", folder, RUNS)
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


def test_accelerate_launches_the_same_training(folder, tmp_path):
    launch("accelerate", 2, "cpu", tmp_path, ["accumulated"])
    ours, theirs = ranks(folder, "accumulated")[0], ranks(tmp_path, "accumulated")
    for of_rank in theirs:
        assert same_bits(ours.values(), [of_rank[key] for key in ours])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["checkpointed", "accumulated", "sharded"])
def test_gpus_learn_what_the_cpu_does(minilm, tmp_path, name):
    processes = torch.cuda.device_count()
    launch("torchrun", processes, "cuda", tmp_path / "gpus", [name])
    trainer = learn(name, tmp_path / "cpu", per_device_train_batch_size=4 * processes)
    got, begin = load_file(tmp_path / "gpus" / f"{name}0.safetensors"), learnt(prepared(RUNS[name][0]))
    for number, ours in enumerate(learnt(trainer.model)):
        torch.testing.assert_close(got[str(number)], ours, rtol=1e-3, atol=1e-4)
    assert not same_bits(begin, learnt(trainer.model))
