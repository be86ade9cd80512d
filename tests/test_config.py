import json

import pytest

from slm_fast import SLMConfig
from slm_fast.config import KEY_TRAINING


def test_saves_and_loads(tmp_path):
    config = SLMConfig(r=12, target_modules=["o_proj"], query_layers=[0, 3, -1], min_similarity=0.5)
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path) == config


def test_paper_settings():
    config = SLMConfig.paper(r=12, top_k=4)
    assert (config.metric, config.weighting, config.query_layers) == ("grouped_cosine", "similarity", [-1])
    assert (config.r, config.top_k, config.num_groups, config.entries_per_task) == (12, 4, 6, 4)
    assert (config.key_learning_rate, config.key_epochs, config.key_batch_size) == (1e-3, 2, 32)


def test_the_training_of_keys_is_stored_where_it_is_not_the_default(tmp_path):
    assert not any(name in SLMConfig().to_dict() for name in KEY_TRAINING)
    assert SLMConfig.from_dict(SLMConfig().to_dict()) == SLMConfig()
    config = SLMConfig(key_epochs=3, key_learning_rate=1e-3)
    assert {n: v for n, v in config.to_dict().items() if n in KEY_TRAINING} == {
        "key_epochs": 3,
        "key_learning_rate": 1e-3,
    }
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("top_k", 65),
        ("metric", "euclid"),
        ("weighting", "max"),
        ("temperature", 0.0),
        ("shrinkage", float("nan")),
        ("query_layers", "some"),
        ("query_layers", []),
        ("key_masking", 1.0),
        ("key_learning_rate", 0.0),
        ("key_learning_rate", float("inf")),
        ("key_epochs", 0),
        ("key_batch_size", 1.5),
        ("mixing", "rows"),
    ],
)
def test_rejects_bad_settings(field, value):
    with pytest.raises(ValueError, match=field):
        SLMConfig(**{field: value})


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="lora_rank"):
        SLMConfig.from_dict({"lora_rank": 8})


def test_damaged_file(tmp_path):
    with pytest.raises(OSError, match="slm_config.json"):
        SLMConfig.from_pretrained(tmp_path)
    (tmp_path / "slm_config.json").write_text('{"config": {')
    with pytest.raises(OSError, match="not valid JSON"):
        SLMConfig.from_pretrained(tmp_path)
    (tmp_path / "slm_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(OSError, match="config"):
        SLMConfig.from_pretrained(tmp_path)
