import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from hf_compressm.models import LRUConfig, LRUForCausalLM, S5Config, S5ForCausalLM
from tests.models.cases import FAMILIES


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

MISTAKES = [
    (S5Config, {"state_size": 0}, "`state_size` is 0"),
    (S5Config, {"state_size": -4}, "`state_size` is -4"),
    (S5Config, {"state_size": 7}, "`state_size` is 7.*use 8 or 6, or set `conj_sym=False`"),
    (S5Config, {"per_layer_config": {"1": {"state_size": 3}}}, "`state_size` is 3"),
    (S5Config, {"per_layer_config": {"0": {"hidden_size": 3}}}, "all layers must share"),
    (S5Config, {"per_layer_config": {"9": {"state_size": 4}}}, "got \\[9\\]"),
    (S5Config, {"num_blocks": 0}, "`num_blocks` is 0"),
    (S5Config, {"dt_min": 0.2, "dt_max": 0.1}, "`dt_min` is 0.2 and `dt_max` 0.1"),
    (S5Config, {"discretization": "euler"}, "`discretization` is 'euler'; choose one of 'zoh', 'bilinear'"),
    (LRUConfig, {"hidden_size": 0}, "`hidden_size` is 0"),
    (LRUConfig, {"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
    (LRUConfig, {"vocab_size": 0}, "`vocab_size` is 0"),
    (LRUConfig, {"vocab_size": 5, "input_size": 2}, "leave one of them None"),
    (LRUConfig, {"norm": "rms"}, "`norm` is 'rms'"),
    (LRUConfig, {"norm_epsilon": 0.0}, "`norm_epsilon` is 0.0"),
    (LRUConfig, {"activation": "relu"}, "`activation` is 'relu'"),
    (LRUConfig, {"pooling": "max"}, "`pooling` is 'max'"),
    (LRUConfig, {"dropout": 1.0}, "`dropout` is 1.0"),
    (LRUConfig, {"r_min": 0.9, "r_max": 0.9}, "0 <= r_min < r_max <= 1"),
    (LRUConfig, {"r_max": 1.1}, "`r_max` 1.1"),
    (LRUConfig, {"max_phase": -1.0}, "`max_phase` is -1.0"),
]


@pytest.mark.parametrize(("config_class", "fields", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_named_with_its_value(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_types_are_checked():
    with pytest.raises(StrictDataclassFieldValidationError, match="expected int, got float"):
        S5Config(state_size=8.0)


def test_a_config_that_was_made_invalid_is_not_saved(tmp_path):
    config = S5Config()
    config.state_size = 5
    with pytest.raises(StrictDataclassClassValidationError, match="`state_size` is 5"):
        config.save_pretrained(tmp_path)


@families
def test_defaults_and_aliases(family):
    config = family.config_class()
    assert config.vocab_size is None
    assert family.config_class(d_state=6).state_size == 6
    assert config.layer_types == ["linear_attention"] * config.num_hidden_layers
    assert "cache" in config.keys_to_ignore_at_inference


@families
def test_sizes_per_layer_survive_a_round_trip(family, tmp_path):
    config = family.config(num_hidden_layers=3, per_layer_config={"1": {"state_size": 4}})
    config.save_pretrained(tmp_path)
    loaded = family.config_class.from_pretrained(tmp_path)
    sizes = [layer.state_size for layer in loaded.per_layer_config]
    assert sizes == [config.per_layer_config[0].state_size, 4, config.per_layer_config[2].state_size]
    assert loaded.to_dict() == config.to_dict() | {"auto_map": loaded.auto_map}


def test_causal_models_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="sees the future"):
        S5ForCausalLM(S5Config(vocab_size=5, bidirectional=True))
    with pytest.raises(ValueError, match=r"`config\.vocab_size` is None; LRUForCausalLM"):
        LRUForCausalLM(LRUConfig(input_size=3))
