"""The configuration: round trips, strict types, and errors that name the field."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from kanlm.model import KanLMConfig
from kanlm.model.basis import BASES


def test_json_round_trip_keeps_every_field_and_unknown_ones(tmp_path):
    config = KanLMConfig(
        ffn_type="kan", kan_basis="rbf", kan_grid_min=-2, eos_token_id=[1, 2], note={"a": [1]}
    )
    config.save_pretrained(tmp_path)
    loaded = KanLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.note == {"a": [1]} and loaded.ffn_type == "kan" and loaded.kan_grid_min == -2
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("kan_gridsize", "kan_grid_size"),
        ("hidden_sizes", "hidden_size"),
        ("num_hidden_layer", "num_hidden_layers"),
    ],
)
def test_a_slip_in_a_name_is_refused(key, meant, tmp_path):
    with pytest.raises(ValueError, match=f"{key}: unknown field; did you mean '{meant}'?"):
        KanLMConfig(**{key: 4})
    KanLMConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {key: 4}))
    with pytest.raises(ValueError, match=meant):
        KanLMConfig.from_pretrained(tmp_path)


def test_keys_of_transformers_and_of_others_are_kept():
    theirs = {
        "sep_token_id": 3,
        "id2label": {0: "no", 1: "yes"},
        "output_attentions": True,
        "attn_implementation": "eager",
        "transformers_version": "5.0.0",
        "_name_or_path": "x",
        "hidden_act": "silu",
        "rope_theta": 5000.0,
        "quantization_config": {"bits": 8},
    }
    config = KanLMConfig(**theirs)
    assert (
        config.hidden_act == "silu" and config.num_labels == 2 and config.quantization_config == {"bits": 8}
    )


def test_derived_sizes_and_rope_parameters():
    config = KanLMConfig(hidden_size=96, num_attention_heads=6, rope_theta=5000.0)
    assert (config.head_dim, config.num_key_value_heads) == (16, 6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}


def test_auto_map_has_all_classes():
    heads = {"AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert set(KanLMConfig().auto_map) == {"AutoConfig", "AutoModel"} | heads


def test_registered_with_auto_config():
    assert isinstance(AutoConfig.for_model("kanlm", num_hidden_layers=3), KanLMConfig)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "256"),
        ("num_hidden_layers", 2.5),
        ("ffn_type", 3),
        ("use_cache", "yes"),
        ("rope_parameters", 4),
    ],
)
def test_a_wrong_type_is_refused_at_construction_and_on_assignment(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        KanLMConfig(**{field: value})
    config = KanLMConfig()
    with pytest.raises(StrictDataclassError, match=field):
        setattr(config, field, value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({size: value}, f"{size}: must be at least 1, got {value}")
            for size in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "kan_grid_size",
                "kan_num_groups",
            )
            for value in (0, -3)
        ),
        ({"hidden_size": 100, "num_attention_heads": 8}, "hidden_size: 100 is not a multiple.*write 96"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide.*4"),
        ({"head_dim": 15}, "head_dim: .*even, got 15"),
        ({"attention_dropout": 1.0}, r"attention_dropout: must lie in \[0, 1\), got 1.0"),
        ({"initializer_range": float("nan")}, "initializer_range: .*nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: .*0.0"),
        ({"ffn_type": "moe"}, "ffn_type: unknown value 'moe'; choose one of gelu, .*kan_glu"),
        (
            {"ffn_type": "kan", "kan_basis": "hermite"},
            "kan_basis: unknown value 'hermite'; .*" + ", ".join(BASES),
        ),
        ({"ffn_type": "kan", "kan_basis": "rational"}, "kan_basis: 'rational' .*kan_glu"),
        ({"ffn_type": "kan", "kan_base": "gelu"}, "kan_base: unknown value 'gelu'; choose one of silu, none"),
        ({"ffn_type": "kan", "kan_conditioning": "pca"}, "kan_conditioning: unknown value 'pca'; .*whitened"),
        ({"kan_order": 9}, r"kan_order: must be an int in 0\.\.5, got 9"),
        ({"kan_order": -1}, "kan_order: .*-1"),
        (
            {"kan_grid_min": 2.0, "kan_grid_max": 2.0},
            "kan_grid_min, grid_max: must be finite and ascending, got 2.0 and 2.0",
        ),
        ({"kan_initial": "sine"}, "kan_initial: unknown value 'sine'; .*gelu_wave"),
        ({"kan_initial": "gelu_wave", "kan_basis": "rational"}, "kan_initial: a rational function cannot"),
        (
            {"kan_glu_form": "zero"},
            "kan_glu_form: unknown value 'zero'; choose one of interpolated, residual",
        ),
        (
            {"intermediate_size": 100, "kan_num_groups": 8},
            "kan_num_groups: 8 does not divide intermediate_size 100",
        ),
        (
            {"ffn_type": "kan_grouped", "intermediate_size": 96, "hidden_size": 36, "num_attention_heads": 2},
            "kan_num_groups: 8 does not divide hidden_size 36",
        ),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters: .*'spiral'"),
        (
            {"format_version": 99, "kanlm_version": "7.0"},
            "format_version: the checkpoint, by kanlm 7.0, has 99, this code reads 1; load it with the kanlm",
        ),
        ({"format_version": 0}, "format_version: .* by kanlm of unknown version, has 0"),
    ],
)
def test_impossible_values_are_one_line_that_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        KanLMConfig(**fields)
    assert "\n" not in str(error.value)


def test_the_rules_hold_again_when_a_changed_config_is_saved(tmp_path):
    config = KanLMConfig()
    config.num_key_value_heads = 3
    with pytest.raises(Exception, match="num_key_value_heads: 3 does not divide"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_config_of_another_format_does_not_load(tmp_path):
    KanLMConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version"):
        AutoConfig.from_pretrained(tmp_path)
