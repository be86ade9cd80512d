"""Training that is killed, resumed, stopped early, accumulated, checkpointed; what it keeps and encodes.

As a script, `test_training_safety.py FOLDER`, it trains once for every way to die in KILLS and dies of it.
"""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import clustered_embeddings, tiny_model
from transformers import AutoTokenizer, EarlyStoppingCallback, TrainerCallback, TrainerState

from slm_fast.loading import packaged_model
from slm_fast.trainer import SLMTrainer, default_arguments, is_whole, last_checkpoint

STEPS = 10
ROWS = [
    {
        "input_ids": [1 + 48 * (n % 2) + (7 * n + i) % 46 for i in range(4 + n % 5)],
        "labels": n % 2,
        "text": str(n),
    }
    for n in range(24)
]
EMBEDDINGS = clustered_embeddings(5, len(ROWS))
# The name of a way to die: at a step, at the n-th change of a file of checkpoint 6, in the middle of one.
EVENTS = [f"event{n}" for n in (0, 20, 31)]
KILLS = ["step5", "any", "torch.save", "state", "first", *EVENTS]


def embed(texts):
    return torch.stack([EMBEDDINGS[int(text)] for text in texts])


def make_model(family="bert", **options):
    """With one task learnt before, and a second one, "new", that waits for its values."""
    model = tiny_model(family, num_tasks=1, **options)
    model.tokenizer = AutoTokenizer.from_pretrained(packaged_model("minilm"))
    model.encoder.function = embed
    texts = [row["text"] for row in ROWS]
    model.add_task("new", texts, labels=["even", "odd"] if family == "bert" else None, progress=False)
    return model


def make_trainer(model, folder, rows=ROWS, evaluation=None, callbacks=None, **options):
    settings = dict(per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, logging_steps=1)
    settings |= dict(save_steps=2, save_total_limit=1, use_cpu=True, disable_tqdm=True)
    arguments = default_arguments(str(folder), **(settings | options))
    return SLMTrainer(model, arguments, rows, evaluation, task="new", callbacks=callbacks)


def learnt(model):
    """Copies of what the task "new" has learnt."""
    pool = model.pool
    slots = pool.task("new").slots
    rows = pool.rows_of(slots)
    head = [] if pool.head("new") is None else list(pool.head("new").parameters())
    tensors = [t[rows] for f in pool.factors for t in (f.A, f.B)] + head
    return [tensor.detach().clone() for tensor in tensors]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- ways to die


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Events:
    """Counts what happens to the files of checkpoints while number 6 is written, older ones' deletion too."""

    def __init__(self, trainer, last=None):
        self.trainer, self.last, self.count = trainer, last, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        if self.trainer.state.global_step == 6 and "checkpoint-" in str(arguments[0]):
            if event == "open" and arguments[1] in ("r", "rb"):
                return
            if self.count == self.last:
                die()
            self.count += 1


def train_to_death(kill, folder):
    trainer = make_trainer(make_model(), folder)
    if kill.startswith("step"):
        trainer.add_callback(AtStep(int(kill[4:]), die))
    elif kill == "any":
        trainer.add_callback(AtStep(STEPS - 1, signal.pause))  # however late it is killed, it is not done
    elif kill.startswith("event"):
        Events(trainer, int(kill[5:]))
    elif kill in ("torch.save", "first"):  # half of the optimiser's state
        save, dying_step = torch.save, 6 if kill == "torch.save" else 2

        def half_saved(value, path):
            if trainer.state.global_step == dying_step and str(path).endswith("optimizer.pt"):
                save(value, data := io.BytesIO())
                Path(path).write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
                die()
            save(value, path)

        torch.save = half_saved
    elif kill == "state":
        whole = TrainerState.save_to_json

        def half_saved(state, path):
            whole(state, path)
            if state.global_step == 6:
                text = Path(path).read_text()
                Path(path).write_text(text[: len(text) // 2])
                die()

        TrainerState.save_to_json = half_saved
    trainer.train()


def main(folder):
    for kill in KILLS:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                train_to_death(kill, folder / kill)
            os._exit(1)
        if kill == "any":  # from outside, whatever the process is doing then
            while not (folder / kill / "checkpoint-2" / "trainer_state.json").exists():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(kill, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.exit()


# ---- tests


@pytest.fixture(autouse=True)
def one_thread(minilm):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_processes_resume_with_the_same_bits(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    died = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in KILLS)
    assert died == {kill: str(int(signal.SIGKILL)) for kill in KILLS}
    model = make_model()
    begin = learnt(model)
    make_trainer(model, tmp_path / "uninterrupted").train()
    uninterrupted = learnt(model)
    assert not same_bits(begin, uninterrupted)
    for kill in KILLS:
        model = make_model()
        trainer = make_trainer(model, tmp_path / kill)
        if kill == "first":  # no checkpoint is whole
            half = tmp_path / kill / "checkpoint-2"
            assert (half / "slm_task.safetensors").exists() and not is_whole(half)
            with pytest.raises(ValueError, match="no whole checkpoint in"):
                trainer.train(resume_from_checkpoint=True)
            with pytest.raises(OSError, match="checkpoint-2 is not a checkpoint that was written to its end"):
                trainer.train(resume_from_checkpoint=str(half))
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == STEPS
        assert same_bits(learnt(model), uninterrupted), kill
        assert last_checkpoint(tmp_path / kill).endswith(f"checkpoint-{STEPS}")


def stopping_trainer(model, folder, **options):
    """It stops after two steps without a lower loss on other rows."""
    return make_trainer(
        model, folder, ROWS[:12], ROWS[12:], [EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=40, save_steps=1, eval_steps=1, eval_strategy="steps", learning_rate=0.2,
        load_best_model_at_end=True, metric_for_best_model="loss", warmup_steps=0, **options,
    )  # fmt: skip


def test_early_stopping_restores_the_best(tmp_path):
    model = make_model()
    trainer = stopping_trainer(model, tmp_path)
    seen = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen[state.global_step] = metrics["eval_loss"], learnt(model)

    trainer.add_callback(Keep())
    trainer.train()
    best = min(seen, key=lambda step: seen[step][0])
    assert trainer.state.global_step == best + 2 < 40
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert same_bits(learnt(model), seen[best][1])
    assert not same_bits(learnt(model), seen[best + 2][1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[best][0], rel=1e-6)


@pytest.mark.parametrize("waited", [1, 2])
def test_early_stopping_goes_on_where_it_was_killed(waited, tmp_path):
    """After one checkpoint without a lower loss, and after the second, with which training ends."""
    model = make_model()
    whole = stopping_trainer(model, tmp_path / "whole")
    whole.train()
    stopped, kept = whole.state.global_step, learnt(model)

    killed = stopping_trainer(make_model(), tmp_path / "killed")
    if waited == 1:
        killed.add_callback(AtStep(stopped - 1, interrupt))
    else:
        killed._load_best_model = interrupt
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    folder = last_checkpoint(tmp_path / "killed")
    assert folder.endswith(f"checkpoint-{stopped - 2 + waited}")

    model = make_model()
    resumed = stopping_trainer(model, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == stopped and resumed.state.best_metric == whole.state.best_metric
    assert same_bits(learnt(model), kept)


def test_a_finished_training_is_not_trained_on(tmp_path):
    model = make_model()
    make_trainer(model, tmp_path).train()
    kept, model = learnt(model), make_model()
    again = make_trainer(model, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS and same_bits(learnt(model), kept)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_accumulation_and_checkpointing_give_the_same_weights(family, tmp_path):
    found = []
    for options in (
        dict(per_device_train_batch_size=16),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=16, gradient_checkpointing=True),
    ):
        model = make_model(family)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = [row if family == "bert" else row | {"labels": row["input_ids"]} for row in ROWS]
        begin = learnt(model)
        settings = dict(max_steps=3, optim="sgd", learning_rate=0.5, save_strategy="no", warmup_steps=0)
        make_trainer(model, tmp_path, rows, **(settings | options)).train()
        found.append(learnt(model))
        assert not same_bits(begin, found[-1])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_bf16_base_trains_fp32_factors(tmp_path):
    model = make_model("bert", dtype=torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, max_steps=40, save_strategy="no", learning_rate=2e-2)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert {tensor.dtype for tensor in learnt(model)} == {torch.float32}
    assert all(torch.equal(base[name], tensor) for name, tensor in model.base_model.state_dict().items())


def test_nothing_else_has_gradients_or_optimiser_state(tmp_path):
    model, seen = make_model(), []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            with_state = [p for p, state in optimizer.state.items() if state]
            every = [*model.parameters(), *model.buffers()]
            with_grad = [t for t in every if t.grad is not None]
            seen.append([{id(p) for p in of} for of in (held, with_state, with_grad)])
            wanted = {id(p) for f in model.pool.factors for p in (f.A_owned, f.B_owned)}
            wanted |= {id(p) for p in model.pool.head("new").parameters()}
            assert all(of == wanted for of in seen[-1])

    trainer = make_trainer(model, tmp_path, callbacks=[Look()], max_steps=2, save_strategy="no")
    trainer.train()
    assert len(seen) == 2
    pool = model.pool
    size = sum(2 * 4 * (i + o) for i, o in pool.modules_shape.values())  # 2 entries of rank 4
    size += sum(p.numel() for p in pool.head("new").parameters())
    assert sum(t.numel() for t in learnt(model)) == size


def test_every_text_is_encoded_once_ever(tmp_path):
    model, seen = make_model(), []
    model.encoder._cache.clear()
    model.encoder.function = lambda texts: seen.extend(texts) or embed(texts)
    training, evaluation = ROWS[:16], ROWS[12:]
    model.add_task("again", [row["text"] for row in training], labels=["even", "odd"], progress=False)
    options = dict(max_steps=-1, num_train_epochs=2, eval_strategy="epoch", save_strategy="no")
    trainer = make_trainer(model, tmp_path, training, evaluation, **options)
    trainer.train()
    trainer.evaluate()
    trainer.predict(evaluation)
    model.route([row["text"] for row in ROWS])
    assert sorted(seen, key=int) == [row["text"] for row in ROWS]
