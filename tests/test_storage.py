import contextlib
import hashlib
import json
import multiprocessing
import re

import pytest
import torch
from conftest import clustered_embeddings, tiny_base, tiny_model, word_tokenizer
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from slm_fast import SLMConfig, SLMModel, get_slm_model
from slm_fast.storage import load_pool, save_pool


def saved(tmp_path, family="llama", **options):
    model = tiny_model(family, **options)
    model.add_task("topic", embeddings=clustered_embeddings(5), labels=["a", "b"], rank=3, progress=False)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("metric", ["whitened", "grouped_cosine"])
def test_round_trip_is_exact(tmp_path, family, metric):
    model = saved(tmp_path, family, metric=metric, num_groups=4)
    loaded = SLMModel.from_pretrained(tiny_base(family), tmp_path)
    query = torch.cat([clustered_embeddings(t, 3) for t in (0, 1, 5)])
    before, after = model.route(embeddings=query), loaded.route(embeddings=query)
    assert torch.equal(before.indices, after.indices)
    torch.testing.assert_close(before.weights, after.weights)
    ids = torch.randint(1, 96, (9, 5))
    for field in ("logits", "last_hidden_state"):
        ours = getattr(model(input_ids=ids, routing=before), field, None)
        if ours is not None:
            assert torch.equal(ours, getattr(loaded(input_ids=ids, routing=before._replace(
                pool_version=torch.full((9,), loaded.pool.version))), field))  # fmt: skip
    assert torch.equal(model.pool.head("topic").weight, loaded.pool.head("topic").weight)
    assert loaded.pool.task("topic").labels == ["a", "b"]
    # twice saved, twice loaded: nothing is folded in twice
    loaded.save_pretrained(tmp_path / "again")
    for name in ("slm_keys.safetensors", "adapters/task0.0/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("metric", ["whitened", "grouped_cosine"])
def test_some_tasks_are_saved_as_a_pool_of_their_own(tmp_path, metric):
    fitted = dict(weighting="task", temperature="auto") if metric == "whitened" else {}
    model = tiny_model(metric=metric, num_groups=4, **fitted)
    model.add_task("topic", embeddings=clustered_embeddings(5, 40), labels=["a", "b"], progress=False)
    assert not fitted or any(len(task.losses) for task in model.pool.metric.tasks.values())
    model.save_pretrained(tmp_path / "some", tasks=["topic", "task1", "topic"])
    loaded = SLMModel.from_pretrained(tiny_base("llama"), tmp_path / "some").pool
    wanted = model.pool.only(["topic", "task1"])
    assert loaded.task_names() == wanted.task_names() == ["topic", "task1"]
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert set(loaded.state_dict()) == set(wanted.state_dict())
    assert len(list((tmp_path / "some" / "adapters").iterdir())) == loaded.num_entries
    assert len(model.pool.tasks) == 4
    with pytest.raises(ValueError, match="unknown task 'nothing'"):
        model.save_pretrained(tmp_path / "none", tasks=["nothing"])
    assert not (tmp_path / "none").exists()


def test_processes_may_save_to_one_directory(tmp_path):
    model = tiny_model()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_often, args=(model, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool.task_names() == model.pool.task_names()
    assert not list(tmp_path.rglob("*.tmp"))


def save_often(model, folder):
    for _ in range(10):
        model.save_pretrained(folder)
        load_pool(model.base_model, folder)


def test_learning_continues_after_loading(tmp_path):
    saved(tmp_path)
    loaded = SLMModel.from_pretrained(tiny_base("llama"), tmp_path)
    loaded.add_task("later", embeddings=clustered_embeddings(6), progress=False)
    mass, names = loaded.pool.task_mass(loaded.route(embeddings=clustered_embeddings(6, 5)))
    assert names[-1] == "later" and (mass.argmax(-1) == 4).all()


def test_adapters_load_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = saved(tmp_path)
    ids = torch.randint(1, 96, (2, 5))
    adapted = peft.PeftModel.from_pretrained(
        tiny_base("llama"), str(tmp_path / "adapters" / "task1.0")
    ).eval()
    with torch.no_grad():
        ours = model(input_ids=ids, adapter_names=["task1.0"] * 2).logits
        torch.testing.assert_close(adapted(ids).logits, ours, rtol=1e-4, atol=1e-5)


def test_saving_again_removes_forgotten_entries_only(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model.remove_task("task1")
    model.save_pretrained(tmp_path)
    names = {p.name for p in (tmp_path / "adapters").iterdir()}
    assert names == {"task0.0", "task0.1", "task2.0", "task2.1", "topic.0", "topic.1"}
    assert (tmp_path / "notes.txt").exists() and not list(tmp_path.rglob("*.tmp"))
    assert SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool.task_names() == [
        "task0",
        "task2",
        "topic",
    ]


@pytest.mark.parametrize(
    "name", ["slm_keys.safetensors", "slm_heads.safetensors", "adapters/task0.1/adapter_model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_are_named_and_the_model_is_unchanged(tmp_path, name, damage):
    saved(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    base = tiny_base("llama")
    modules = dict(base.named_modules())
    with pytest.raises(OSError, match=path.name):
        SLMModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules


def test_damaged_index(tmp_path):
    saved(tmp_path)
    index = json.loads((tmp_path / "slm_config.json").read_text())
    for content in ("{", "[]", json.dumps({"config": index["config"]}), json.dumps(index | {"format": 99})):
        (tmp_path / "slm_config.json").write_text(content)
        with pytest.raises(OSError, match="slm_config.json"):
            SLMModel.from_pretrained(tiny_base("llama"), tmp_path)
    with pytest.raises(OSError, match="holds no saved pool"):
        SLMModel.from_pretrained(tiny_base("llama"), tmp_path / "nowhere")


def test_a_pool_of_format_3(tmp_path):
    """Directions in fp16 and a diagonal, written by hand: searched as it was, saved as pools are now."""
    model, folder = saved(tmp_path), tmp_path
    stored, metric = load_file(folder / "slm_keys.safetensors"), model.pool.metric
    stored["metric.scatter"] = torch.zeros_like(metric.scatter)
    for key, task in metric.tasks.items():
        V, stem = task.directions().half(), f"metric.tasks.{key}."
        rest = task.rest.flatten()
        stored |= {stem + "V": V, stem + "rest": rest}
        del stored[stem + "scale"]
        stored["metric.scatter"] += V.float().T @ V.float() + torch.diag(rest)
    data = save_tensors(stored)
    (folder / "slm_keys.safetensors").write_bytes(data)
    index = json.loads((folder / "slm_config.json").read_text())
    index["files"]["slm_keys.safetensors"] = hashlib.sha256(data).hexdigest()
    index |= {"format": 3, "config": index["config"] | {"statistics_rank": 512}}
    (folder / "slm_config.json").write_text(json.dumps(index))
    query = torch.cat([clustered_embeddings(t, 3) for t in (0, 1, 5)])
    old = SLMModel.from_pretrained(tiny_base("llama"), folder)
    assert torch.equal(old.pool.metric.scatter, stored["metric.scatter"])
    assert torch.equal(old.route(embeddings=query).indices, model.route(embeddings=query).indices)
    old.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "slm_config.json").read_text())["format"] == 6
    again = SLMModel.from_pretrained(tiny_base("llama"), folder / "again")
    assert torch.equal(again.route(embeddings=query).scores, old.route(embeddings=query).scores)
    again.remove_task("topic")
    want = sum(task.scatter() for key, task in old.pool.metric.tasks.items() if key != "task:topic")
    torch.testing.assert_close(again.pool.metric.scatter, want)


def test_losses_of_format_4_are_dropped(tmp_path):
    """Nobody knows which tasks they were measured against; those of format 5 stay."""
    model = tiny_model("llama", weighting="task", temperature="auto")
    model.save_pretrained(tmp_path)
    pool = SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool
    assert pool.temperature() == model.pool.temperature() != pool.metric.default_temperature
    pool.remove_task("task0")
    assert pool.temperature() == pool.metric.default_temperature
    stored = load_file(tmp_path / "slm_keys.safetensors")
    data = save_tensors({name: t for name, t in stored.items() if not name.endswith(".against")})
    (tmp_path / "slm_keys.safetensors").write_bytes(data)
    index = json.loads((tmp_path / "slm_config.json").read_text()) | {"format": 4}
    index["files"]["slm_keys.safetensors"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "slm_config.json").write_text(json.dumps(index))
    old = SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool
    assert old.temperature() == old.metric.default_temperature
    assert not any(len(task.losses) for task in old.metric.tasks.values())


def test_another_base_model_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="another base model.*no module"):
        SLMModel.from_pretrained(tiny_base("bert"), tmp_path)
    with pytest.raises(ValueError, match="another base model.*mistral"):
        SLMModel.from_pretrained(tiny_base("mistral"), tmp_path)
    other = tiny_base("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(ValueError, match="weights of .* differ"):
        SLMModel.from_pretrained(other, tmp_path)
    SLMModel.from_pretrained(tiny_base("llama", torch.bfloat16), tmp_path)


def test_an_interrupted_save_is_recognised(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model.add_task("more", embeddings=clustered_embeddings(6), progress=False)
    calls = []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError("No space left on device")
        return original(*args)

    import slm_fast.storage as storage

    original = storage._write
    monkeypatch.setattr(storage, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pool(model.pool, model.base_model, tmp_path)
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    assert SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool.task_names()[-1] == "topic"


@pytest.mark.parametrize("stop", [0, 1, 5, -1])
def test_a_save_killed_among_the_renames_is_completed(tmp_path, monkeypatch, stop):
    model = saved(tmp_path)
    model.add_task("more", embeddings=clustered_embeddings(6), progress=False)
    import slm_fast.storage as storage

    original, calls = storage.os.replace, []
    total = 3 + 2 * model.pool.num_entries

    def killed(*args):
        calls.append(args)
        if len(calls) - 1 == stop % total:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pool(model.pool, model.base_model, tmp_path)
    monkeypatch.undo()
    assert SLMModel.from_pretrained(tiny_base("llama"), tmp_path).pool.task_names()[-1] == "more"
    assert not list(tmp_path.rglob("*.tmp"))


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    model = saved(tmp_path)
    model.remove_task("task0")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapters" / "mine").is_dir()
    assert not (tmp_path / "adapters" / "task0.0").exists()


def test_files_hold_no_base_weights(tmp_path):
    saved(tmp_path)
    tensors = [load_file(p) for p in tmp_path.rglob("*.safetensors")]
    names = {name for file in tensors for name in file}
    assert all("lora_" in n or n.startswith(("keys", "metric.", "task:")) for n in names)


def named_encoder(folder, seed=0):
    """A folder with a small BERT and a tokenizer."""
    base = tiny_base("bert")
    if seed:
        torch.manual_seed(seed)
        base.apply(base._init_weights)
    base.save_pretrained(folder)
    words = ["[PAD]", "[EOS]", "[UNK]", *"abcdefgh"]
    word_tokenizer(words, model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    return str(folder)


def model_with(encoder, *tasks, family="bert", **config):
    config = SLMConfig(r=2, entries_per_task=1, target_modules="all-linear", **config)
    words = word_tokenizer(["[PAD]", "[EOS]", "[UNK]", *"abcdefgh"])
    model = get_slm_model(tiny_base(family), config, encoder=encoder, tokenizer=words)
    for name in tasks:
        model.add_task(name, [f"{a} {b}" for a in "abc" for b in "defgh"], progress=False)
    return model


def without_fingerprint(folder):
    index = json.loads((folder / "slm_config.json").read_text())
    assert index.pop("encoder")["model_type"] == "bert"
    (folder / "slm_config.json").write_text(json.dumps(index))


def test_tasks_whose_keys_are_of_another_encoder_are_not_taken(tmp_path):
    here, copy = (named_encoder(tmp_path / name) for name in ("here", "a_copy"))
    other, same_name = (named_encoder(tmp_path / name, 5) for name in ("other", "elsewhere/here"))
    for number, (encoder, layers) in enumerate(((copy, "auto"), (here, [0, 1, 2]), (here, [0, -2, -1]))):
        model_with(encoder, "new", query_layers=layers).save_pretrained(tmp_path / f"same{number}")
        model = model_with(here, "old", query_layers="auto")
        assert [info.name for info in model.take_tasks(tmp_path / f"same{number}")] == ["new"]
    model = model_with(here, "old", query_layers=[0, 1])
    for encoder, layers, message in (
        (other, [0, 1], f"queries of the encoder '{other}', this model has '{here}'"),
        (same_name, [0, 1], f"queries of the encoder '{same_name}', this model has '{here}'"),
        (here, [1, 2], f"'{here}' from its layers [1, 2], this model has '{here}' from its layers [0, 1]"),
        ("backbone", [0, 1], f"queries of the encoder 'backbone', this model has '{here}'"),
    ):
        model_with(encoder, "new", query_layers=layers).save_pretrained(tmp_path / "pool")
        with pytest.raises(ValueError, match=re.escape(message)):
            model.take_tasks(tmp_path / "pool")
    assert model.pool.task_names() == ["old"]
    for encoder, message in ((other, f"the encoder '{other}', this model"), (same_name, None)):
        model_with(encoder, "new", query_layers=[0, 1]).save_pretrained(tmp_path / "pool")
        without_fingerprint(tmp_path / "pool")  # the name is all that there is
        with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
            model.take_tasks(tmp_path / "pool")
    assert model.pool.task_names() == ["old", "new"]


def test_encoders_without_a_name_are_not_compared(tmp_path):
    model = tiny_model("bert", num_tasks=1)
    model.add_task("new", embeddings=clustered_embeddings(3), progress=False)
    model.save_pretrained(tmp_path)
    model.remove_task("new")
    assert [info.name for info in model.take_tasks(tmp_path, ["new"])] == ["new"]


def test_keys_of_prompts_and_of_plain_texts_are_two_kinds(tmp_path):
    settings = dict(family="llama", query_layers=[1], layers_to_transform=[1])
    model_with("backbone", "new", **settings).save_pretrained(tmp_path)
    model = model_with("backbone", **settings, route_in_prefill=True)
    with pytest.raises(ValueError, match="for texts as they are, this model has 'backbone' for prompts"):
        model.take_tasks(tmp_path)
    assert model_with("backbone", **settings).take_tasks(tmp_path)
