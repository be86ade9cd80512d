import gc
import html
import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_base
from tiny_runner import Killed, dying, kept, make_tasks, make_tokenizer, new_runner
from torch.utils.data import SequentialSampler
from transformers.quantizers import HfQuantizer

from slm_fast.backbone_encoder import BackboneEncoder
from slm_fast.config import CONFIG_NAME
from slm_fast.continual.baselines import TaskBatchSampler, entry_parameters, full_precision
from slm_fast.continual.method import Method
from slm_fast.continual.methods import METHODS, batch_routing
from slm_fast.continual.runner import ContinualRunner, write_reports
from slm_fast.layers import layer_index
from slm_fast.storage import read_index
from slm_fast.trainer import SLMTrainer

OWN_STAGES = [name for name, method in METHODS.items() if method.own_stages]


@pytest.fixture
def make_runner(tmp_path):
    return lambda folder="run", *args, **options: new_runner(tmp_path / folder, *args, **options)


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
    """Trainings end with a garbage collection, which now skips everything that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> ContinualRunner:
    """A run of all methods."""
    return new_runner(tmp_path_factory.mktemp("all") / "run", tuple(METHODS)).fit()


def entry(pool, name: str) -> list[torch.Tensor]:
    """Copies of the factors of a task's entries, A and B by turns."""
    rows = pool.rows_of(pool.task(name).slots)
    return [t[rows].clone() for f in pool.factors for t in (f.A, f.B)]


class Stage(NamedTuple):
    """What a pool holds after a stage, by task."""

    entries: dict[str, list[torch.Tensor]]
    heads: dict[str, list[torch.Tensor]]


def learnt(runner: ContinualRunner, name: str) -> list[Stage]:
    """A method's stages 0 and 1, learnt without a runner's measuring and saving."""
    method, stages = runner.methods[name], []
    with method.open():
        for stage in (0, 1):
            method.learn(stage)
            pool = method.model.pool
            heads = {task: [p.clone() for p in pool.head(task).parameters()] for task in pool.tasks}
            stages.append(Stage({task: entry(pool, task) for task in pool.tasks}, heads))
    return stages


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5


# ---- all methods


def test_all_methods_in_one_run(finished, tmp_path):
    report = finished.report("all")
    methods = report["methods"]
    assert list(methods) == list(METHODS) and methods["olora"]["label"] == METHODS["olora"].label
    for name, method in methods.items():
        measured = [[value is not None for value in row] for row in method["matrix"]]
        assert measured == [[name != "joint", False], [True, True]]
    assert methods["joint"]["forgetting"] is None and methods["seq"]["forgetting"] is not None
    total = sum(2 * -(-len(task.train) // 4) for task in finished.tasks)
    steps = dict.fromkeys(methods, total) | {"oracle": None, "batch": 0}
    steps["replay"] += 2  # a batch of one replayed row in each epoch of the second task
    assert {name: method["steps"] for name, method in methods.items()} == steps
    assert methods["oracle"]["seconds_train"] is None and methods["batch"]["seconds_train"] > 0
    assert methods["ewc"]["options"] == METHODS["ewc"].defaults
    assert report["settings"]["seeds"] == {"run": 0, "training": 42}
    assert report["settings"]["budget"]["rank of one LoRA"] == 4
    assert any("learning rate of its own" in note for note in report["notes"])
    _, page = write_reports([report], tmp_path / "out", "test", 1.0)
    assert html.escape(METHODS["joint"].label) in page.read_text()


def test_only_slm_changes_the_model(finished, make_runner):
    alone = make_runner().fit()
    assert kept(alone, "slm") == kept(finished, "slm")
    assert alone.state["rows"]["slm"] == finished.state["rows"]["slm"]
    with finished.base_model() as base:
        assert equal(list(base.parameters()), list(tiny_base("bert").parameters()))


@pytest.mark.parametrize("name", OWN_STAGES)
def test_a_killed_run_is_continued_with_the_same_bits(finished, make_runner, monkeypatch, name):
    methods = ("slm", "batch") if name == "batch" else (name,)
    cut = make_runner("cut", methods)
    if name == "batch":
        monkeypatch.setattr(METHODS["batch"], "save", dying(METHODS["batch"].save, 2))
    else:  # in the second task's second epoch; joint: in the first epoch
        step = dying(SLMTrainer.training_step, 7 if name == "joint" else 13)
        monkeypatch.setattr(SLMTrainer, "training_step", step)
    with pytest.raises(Killed):
        cut.fit()
    monkeypatch.undo()
    assert len(cut.state["rows"][name]) == 1
    if checkpoints := list(cut.output_dir.glob("*/checkpoint-*")):
        assert len(checkpoints) == 1
        checkpoints[0].with_name("checkpoint-900").mkdir()  # as a process leaves it that is killed in saving
    resumed = make_runner("cut", methods).fit()
    assert resumed.state["rows"][name] == finished.state["rows"][name]
    assert kept(resumed, name) == kept(finished, name) and kept(finished, name)


@pytest.mark.parametrize("name", ["ewc", "finetune"])
def test_killed_between_two_files_of_a_stage(finished, make_runner, monkeypatch, name):
    cut = make_runner("cut", (name,))
    monkeypatch.setattr(
        Method, "save", dying(Method.save, 2)
    )  # what comes before the pool is written by then
    with pytest.raises(Killed):
        cut.fit()
    monkeypatch.undo()
    resumed = make_runner("cut", (name,)).fit()
    assert resumed.state["rows"][name] == finished.state["rows"][name]
    assert kept(resumed, name) == kept(finished, name)


def test_fit_goes_on_in_the_same_process(finished, make_runner, monkeypatch):
    cut = make_runner("cut", ("slm", "finetune"))
    for at in (5, 9, 12):
        monkeypatch.setattr(SLMTrainer, "training_step", dying(SLMTrainer.training_step, at))
        with pytest.raises(Killed):
            cut.fit()
        monkeypatch.undo()
    cut.fit()
    for name in cut.methods:
        assert cut.state["rows"][name] == finished.state["rows"][name]
        assert kept(cut, name) == kept(finished, name)


@pytest.mark.parametrize("generation", [("colour", "mood"), ("colour",)], ids="+".join)
def test_generation_tasks(make_runner, generation):
    tasks = make_tasks("colour", "mood", generation=generation)
    methods = tuple(METHODS) if len(generation) == 2 else ("joint", "replay")
    runner = make_runner("run", methods, tasks, family="llama", epochs=1).fit()
    for rows in runner.state["rows"].values():
        assert all(0 <= value <= 1 for value in rows[-1])
    if "finetune" in methods:  # generation reads the tuned weights, not what was packed before
        with runner.methods["finetune"].open():
            model, ids = runner.methods["finetune"].model, torch.tensor([[5, 6, 7, 8]])
            got = model.generate(ids, adapter_names=["__base__"], max_new_tokens=1, do_sample=False)
            want = model.unload()(ids).logits[0, -1].argmax()
            assert int(got[0, -1]) == int(want)


# ---- what makes each of them what it is


def test_sequential_trains_one_lora(make_runner):
    first, second = learnt(make_runner("seq", ("sequential",)), "seq")
    _, fresh = learnt(make_runner("fresh", ("per_task",)), "per_task")
    assert equal(first.entries["colour"], second.entries["colour"])  # as it was after the task
    assert 0 < distance(first.entries["colour"], second.entries["size"])
    assert distance(first.entries["colour"], second.entries["size"]) < distance(
        first.entries["colour"], fresh.entries["size"]
    )
    assert equal(first.heads["colour"], second.heads["colour"])  # it sees no row any more


def test_ewc_with_lambda_0_is_sequential_and_a_large_one_holds_the_lora(finished, make_runner):
    none = make_runner("none", ("ewc",), options={"ewc": {"lambda": 0.0}}).fit()
    assert none.state["rows"]["ewc"] == finished.state["rows"]["seq"]
    there = kept(none, "ewc")
    assert len(there.pop("fisher-2.safetensors")) > 0
    assert there == kept(finished, "seq") != kept(finished, "ewc")

    # From a probe the first task's gradients are small, and so is what holds the LoRA.
    settings = dict(config={"head_init": "zero"})
    first, second = learnt(make_runner("free", ("sequential",), **settings), "seq")
    free = distance(first.entries["colour"], second.entries["size"])
    options = {"ewc": {"lambda": 1e9}}
    first, second = learnt(make_runner("held", ("ewc",), options=options, **settings), "ewc")
    assert 0 < distance(first.entries["colour"], second.entries["size"]) < 0.3 * free


def test_fisher_information_and_penalty_by_hand(make_runner):
    tasks = make_tasks("colour", "size", "mood")
    options = {"ewc": {"lambda": 3.0, "rows": 1000}}
    runner, tokenizer, fisher, theta = (
        make_runner("run", ("ewc",), tasks, options=options),
        make_tokenizer(),
        [],
        [],
    )
    method = runner.methods["ewc"]
    with method.open():
        model = method.model
        for stage, task in enumerate(tasks[:2]):
            method.learn(stage)
            with model.training_task(task.name):
                parameters = entry_parameters(model.pool)
                squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
                for row in task.train:
                    model.zero_grad()
                    inputs = tokenizer([row.text], return_tensors="pt")
                    label = torch.tensor([task.labels.index(row.target)])
                    model(**inputs, labels=label, adapter_names=[task.name], task=task.name).loss.backward()
                    for name, p in parameters.items():
                        squares[name] += p.grad**2 / len(task.train)
            fisher.append(squares)
            theta.append({name: p.detach().clone() for name, p in parameters.items()})
        for name, total in method.fisher.items():
            torch.testing.assert_close(total, fisher[0][name] + fisher[1][name], rtol=1e-3, atol=1e-9)
        method.add(method.tasks[2])
        with model.training_task(tasks[2].name):
            parameters = entry_parameters(model.pool)
            method.penalty().backward()
        for name, p in parameters.items():
            want = sum(3 * f[name] * (p.detach() - t[name]) for f, t in zip(fisher, theta, strict=True))
            torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-8)


def test_replay_of_nothing_is_sequential(finished, make_runner):
    none = make_runner("none", ("replay",), options={"replay": {"share": 0.0}}).fit()
    assert none.state["rows"]["replay"] == finished.state["rows"]["seq"]
    assert kept(none, "replay") == kept(finished, "seq") != kept(finished, "replay")


def test_replay_trains_earlier_heads_on_a_share_of_their_rows(make_runner):
    tasks = make_tasks("colour", "size", "mood")
    runner = make_runner("run", ("replay",), tasks, options={"replay": {"share": 0.25}})
    rows = runner.methods["replay"].rows(2)
    assert {name: len(part) for name, part in rows.items()} == {"mood": 12, "colour": 3, "size": 4}
    assert all(row in task.train for task in tasks for row in rows[task.name])
    first, second = learnt(runner, "replay")
    assert distance(first.heads["colour"], second.heads["colour"]) > 0
    assert not any(p.requires_grad for p in runner.methods["replay"].model.parameters())


def test_olora_freezes_earlier_loras_and_learns_beside_them(make_runner):
    def overlap(strength):
        options = {"olora": {"lambda1": strength}}
        first, second = learnt(make_runner(str(strength), ("olora",), options=options), "olora")
        assert equal(first.entries["colour"], second.entries["colour"])
        pairs = list(zip(second.entries["colour"][::2], second.entries["size"][::2], strict=True))
        return sum(float((a @ b.T).norm() / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)

    assert overlap(1000.0) < 0.1 < 0.15 < overlap(0.0)


@torch.no_grad()
def test_olora_adds_up_all_loras(finished):
    method = finished.methods["olora"]
    with method.open():
        model, merged = method.model.eval(), tiny_base("bert")
        pool = model.pool
        for factors, name in zip(pool.factors, pool.modules_shape, strict=True):
            rows = slice(pool.num_rows)
            merged.get_submodule(name).weight += 0.5 * factors.B[rows].T @ factors.A[rows]
        inputs = make_tokenizer()([finished.tasks[0].test[0].text], return_tensors="pt")
        with model.state.use(method.routing(finished.tasks[0])):
            got = model.features(**inputs)
        torch.testing.assert_close(got, merged(**inputs).last_hidden_state.mean(1), rtol=1e-4, atol=1e-5)


def test_per_task_answers_do_not_know_the_other_tasks(finished):
    method, task = finished.methods["per_task"], finished.tasks[1]
    with method.open():
        before = method.answers(task)
        method.model.remove_task("colour")
        after = method.answers(task)
    assert [p.answer for p in after] == [p.answer for p in before]
    assert all([e["entry"] for e in p.entries] == ["size.0"] for p in before)


def test_joint_learns_all_heads_at_once(finished):
    assert finished.state["rows"]["joint"][0] == [None, None]
    with finished.methods["joint"].open():
        pool = finished.methods["joint"].model.pool
        assert all(bool((pool.head(task.name).bias != 0).all()) for task in finished.tasks)
        assert not any(bool(B.any()) for B in entry(pool, "colour")[1::2])  # one LoRA: the last task's entry
        assert all(bool(B.any()) for B in entry(pool, "size")[1::2])


def test_finetune_trains_a_copy_of_the_base(finished):
    method, before = finished.methods["finetune"], tiny_base("bert")
    assert [p.name for p in method.folder.glob("base-*")] == ["base-2"]
    with method.open():
        tuned = dict(method.model.unload().named_parameters())
    moved = {name for name, p in tuned.items() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {name for name in tuned if "pooler" not in name}


class Unpacked(HfQuantizer):
    """As GGUF's: its weights are plain numbers, but it refuses to save them."""

    is_trainable = False

    def is_serializable(self, *_):
        return False


def test_finetune_of_a_base_that_was_unpacked(finished, make_runner, monkeypatch):
    """In two processes: what the first one saved is loaded by the second."""

    def unpacked(*args):
        runner = make_runner(*args)
        base = runner.model.base_model
        base.hf_quantizer = Unpacked(SimpleNamespace(quant_method="gguf", pre_quantized=True))
        base.config.quantization_config, base.is_quantized = {"quant_method": "gguf"}, True
        return runner

    monkeypatch.setattr(METHODS["finetune"], "save", dying(METHODS["finetune"].save, 2))
    with pytest.raises(Killed):
        unpacked("run", ("finetune",)).fit()
    monkeypatch.undo()
    runner = unpacked("run", ("finetune",)).fit()
    assert kept(runner, "finetune") == kept(finished, "finetune")
    assert runner.model.base_model.hf_quantizer is not None and runner.model.config.quantization_config
    packed = runner.model.base_model.embeddings.word_embeddings.weight
    packed.requires_grad_(False).data = packed.data.to(torch.int8)
    with pytest.raises(ValueError, match="embeddings.word_embeddings.weight of the base is quantised"):
        full_precision(runner.model.base_model)


def test_batch_shares_a_mixture_and_reads_the_entries_of_slm(finished):
    method, pool, task = finished.methods["batch"], finished.model.pool, finished.tasks[1]
    with method.open():
        answers = method.answers(task)  # 6 rows in batches of 4
        mixtures = [[(e["entry"], e["weight"]) for e in p.entries] for p in answers]
        assert mixtures == [mixtures[0]] * 4 + [mixtures[4]] * 2 and mixtures[0] != mixtures[4]
        assert {p.task for p in answers} == {"size"} and {p.answer for p in answers} <= set(task.labels)
        query = method.encoder([row.text for row in task.test[:4]])
        routing = batch_routing(finished.model, method.config, method.keys, query, 4)
        groups = [part.unflatten(-1, (4, 6)) for part in (query[:, None], method.keys["size"][None])]
        cosines = torch.nn.functional.cosine_similarity(*groups, dim=-1).mean((0, 2))
    order = cosines.argsort(descending=True)
    assert routing.indices.tolist() == 4 * [[pool.task("size").slots[i] for i in order]]
    torch.testing.assert_close(routing.scores[0], cosines[order])
    torch.testing.assert_close(routing.weights[0], cosines[order] / cosines.sum())


def test_paper_trains_its_own_entries_with_its_own_keys(finished):
    method = finished.methods["paper"]
    with method.open():
        config = method.model.slm_config
        answers = method.answers(finished.tasks[0])  # 4 rows, one batch
    assert (config.metric, config.key_method, config.weighting) == ("grouped_cosine", "paper", "similarity")
    assert (config.r, config.entries_per_task, config.mixing) == (2, 2, "instance")
    assert len({tuple(e["weight"] for e in p.entries) for p in answers}) == 1


def test_the_papers_retrieval_reads_the_last_layer_of_the_engines_encoder(make_runner):
    methods = ("slm", "batch", "paper", "finetune")
    runner = make_runner("run", methods, make_tasks("colour"), encoder="backbone", epochs=1).fit()
    for name in ("batch", "paper"):
        method = runner.methods[name]
        with method.open():
            encoder = method.encoder if name == "batch" else method.model.encoder
            assert encoder.layers == [2] and runner.model.encoder.layers != [2]


def test_the_papers_queries_are_made_by_the_engines_passes(make_runner, monkeypatch):
    passes, tokenized = [], BackboneEncoder._tokenized

    def counting(self, texts):
        passes.extend(texts)
        return tokenized(self, texts)

    monkeypatch.setattr(BackboneEncoder, "_tokenized", counting)
    tasks = make_tasks("colour")
    runner = make_runner("run", ("slm", "batch", "paper"), tasks, encoder="backbone", epochs=1)
    monkeypatch.setattr(runner, "cost", dict)  # which measures passes
    runner.fit()
    assert sorted(passes) == sorted({row.text for task in tasks for row in task.train + task.test})


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_all_methods_adapt_the_linears_behind_the_query(make_runner, family):
    config = dict(query_layers=[1], route_in_prefill=True)
    names, tasks = tuple(name for name in METHODS if name not in ("batch", "replay")), make_tasks("colour")
    options = dict(family=family, encoder="backbone", epochs=1, config=config)
    runner = make_runner("run", names, tasks, **options).fit()
    linears = list(runner.model.pool.modules_shape)
    assert {layer_index(name) for name in linears if not name.startswith("decoder")} == {1}
    methods = runner.report()["methods"]
    for name in names:
        if name != "oracle":
            saved = read_index(runner.output_dir / name)
            assert ("route_in_prefill" in saved["config"]) == (name != "paper")  # what heads read
        if name not in ("oracle", "finetune"):
            assert list(saved["modules"]) == linears, name
            assert methods[name]["trained_parameters"] == runner.trainable


def test_trained_parameters_are_the_methods_own(make_runner):
    runner = make_runner("run", ("slm", "seq"), make_tasks("colour"), epochs=1).fit()
    path = runner.output_dir / "seq" / CONFIG_NAME
    index = json.loads(path.read_text())
    (name, shape), *_ = index["modules"].items()
    path.write_text(json.dumps(index | {"modules": {name: shape}}))
    methods = runner.report()["methods"]
    assert methods["seq"]["trained_parameters"] == 2 * 2 * sum(shape) < runner.trainable
    assert methods["slm"]["trained_parameters"] == runner.trainable


# ---- arguments and the state on disk


def test_names_and_options_are_checked(make_runner):
    assert list(make_runner(methods=("sequential", "seq", "joint")).methods) == ["seq", "joint"]
    for methods, options, message in [
        (("slm", "magic"), {}, "unknown methods magic; there are slm, oracle"),
        ((), {}, "methods is empty"),
        (("seq", "oracle"), {}, "oracle needs slm among the methods, got seq, oracle"),
        (("batch",), {}, "batch needs slm"),
        (("seq",), {"ewc": {}}, "options for ewc, but the methods are seq"),
        (("ewc",), {"ewc": {"lambda1": 1.0}}, "ewc has no option 'lambda1'; its options: lambda, rows"),
        (("ewc",), {"ewc": {"rows": 0}}, "rows of ewc must be a number from 1, got 0"),
        (("ewc",), {"ewc": {"lambda": -1.0}}, "lambda of ewc must be a number from 0, got -1.0"),
        (("olora",), {"olora": {"lambda1": "big"}}, "lambda1 of olora must be a number from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_runner(methods=methods, options=options)


def test_options_belong_to_a_run(make_runner):
    tasks = make_tasks("colour")
    runner = make_runner("run", ("replay",), tasks, options={"replay": {"share": 0.5}}).fit()
    assert json.loads((runner.output_dir / "state.json").read_text())["options"] == {"replay": {"share": 0.5}}
    assert "routing" not in runner.report()
    with pytest.raises(ValueError, match=r"holds a run of replay with the options \{'share': 0.5\}"):
        make_runner("run", ("replay",), tasks)
    more = make_runner("run", ("slm", "batch"), tasks).fit()  # other methods join a run
    assert set(more.state["rows"]) == {"replay", "slm", "batch"}


def test_batches_of_one_task():
    tasks = list("aabbabcaaba")
    batches = list(TaskBatchSampler(SequentialSampler(tasks), tasks, 3))
    assert batches == [[0, 1, 4], [2, 3, 5], [7, 8, 10], [6], [9]]
    assert len(TaskBatchSampler(SequentialSampler(tasks), tasks, 3)) == 5
