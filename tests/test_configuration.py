"""RSMarianConfig: the layer maps, the errors, and what survives saving and loading."""

import pytest
from huggingface_hub import HfApi, RepoUrl
from oracle import rs_config, rs_model

from rs_transformer import RSMarianConfig, RSMarianForConditionalGeneration
from rs_transformer.configuration_rs_marian import LAYER_SHARINGS, REMOTE_CODE_FILES, layer_map


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ("cycle", [0, 1, 2, 0, 1, 2]),
        ("sequence", [0, 0, 1, 1, 2, 2]),
        ("cycle_rev", [0, 1, 2, 2, 1, 0]),
        ("sandwich", [0, 1, 1, 1, 1, 2]),
    ],
)
def test_layer_map_of_depth_6_and_3_unique_layers_is_as_documented(sharing, expected):
    config = rs_config(encoder_unique_layers=3, decoder_unique_layers=3, layer_sharing=sharing)
    assert config.encoder_layer_map == config.decoder_layer_map == expected


@pytest.mark.parametrize("sharing", LAYER_SHARINGS)
def test_every_layer_map_uses_every_unique_layer_once_it_is_stored(sharing):
    for depth in range(1, 25):
        for unique in range(1, depth + 1):
            steps = layer_map(depth, unique, sharing)
            assert len(steps) == depth
            assert set(steps) == set(range(unique)), (depth, unique)
        assert layer_map(depth, depth, sharing) == list(range(depth))
        assert layer_map(depth, 1, sharing) == [0] * depth


def test_defaults_are_the_papers_model_at_opus_mt_size():
    config = RSMarianConfig()
    assert config.decoder_layer_map == [0, 0, 0, 0, 0, 0]
    assert (config.d_model, config.encoder_ffn_dim, config.encoder_attention_heads) == (512, 2048, 8)
    assert (config.activation_function, config.scale_embedding) == ("swish", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_unique_layers": 8}, r"decoder_unique_layers must lie in 1\.\.decoder_layers \(6\), got 8"),
        ({"encoder_unique_layers": 0}, r"encoder_unique_layers must lie in 1\.\.encoder_layers \(6\), got 0"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"decoder_layers": -1}, "decoder_layers must be at least 1, got -1"),
        ({"layer_sharing": "random"}, "layer_sharing must be one of cycle, sequence, cycle_rev, sandwich"),
        ({"encoder_layer_sharing": "random"}, "encoder_layer_sharing must be one of cycle, sequence"),
        ({"step_embeddings": True, "decoder_layerdrop": 0.1}, "step_embeddings need every step"),
        ({"step_adapter_rank": -1}, r"step_adapter_rank must lie in 0\.\.32, got -1"),
        ({"step_adapter_rank": 33, "d_model": 32}, r"step_adapter_rank must lie in 0\.\.32, got 33"),
        (
            {"tie_encoder_decoder_layers": True, "decoder_unique_layers": 2},
            "needs encoder_unique_layers and decoder_unique_layers to be equal, got 1 and 2",
        ),
        ({"marian_positions": True, "d_model": 33}, "marian_positions need an even d_model, got 33"),
        ({"decoder_attention_heads": 5}, r"decoder_attention_heads must .* divide d_model \(32\), got 5"),
    ],
)
def test_impossible_configurations_are_refused_with_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        rs_config(**fields)


def test_depth_can_be_changed_when_loading(tmp_path):
    rs_model().save_pretrained(tmp_path)
    model = RSMarianForConditionalGeneration.from_pretrained(tmp_path, decoder_layers=3, encoder_layers=8)
    assert (len(model.config.encoder_layer_map), len(model.config.decoder_layer_map)) == (8, 3)


def test_depth_below_the_unique_layers_is_refused_when_loading(tmp_path):
    rs_model(decoder_unique_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder_unique_layers must lie in 1\.\.decoder_layers \(2\), got 3"):
        RSMarianForConditionalGeneration.from_pretrained(tmp_path, decoder_layers=2)


def test_configuration_survives_saving(tmp_path):
    config = rs_config(encoder_unique_layers=2, layer_sharing="cycle_rev", deepnorm=True, decoder_layers=4)
    config.save_pretrained(tmp_path)
    assert RSMarianConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_configuration_that_is_pushed_has_the_source_with_it(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"me/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, operations, **_: pushed.extend(operations))
    rs_config().save_pretrained(tmp_path / "model", push_to_hub=True)
    assert {operation.path_in_repo for operation in pushed} == {"config.json", *REMOTE_CODE_FILES}


def test_deepnorm_scales_are_deepnets_and_keep_to_the_depth_the_model_was_built_with(tmp_path):
    config = rs_config(encoder_layers=12, decoder_layers=6, deepnorm=True)
    # DeepNet, table 2: alpha and beta of an encoder of N = 12 and a decoder of M = 6 layers.
    assert config.encoder_residual_scale == pytest.approx(0.81 * (12**4 * 6) ** (1 / 16))
    assert config.encoder_init_gain == pytest.approx(0.87 * (12**4 * 6) ** (-1 / 16))
    assert config.decoder_residual_scale == pytest.approx((3 * 6) ** (1 / 4))
    assert config.decoder_init_gain == pytest.approx((12 * 6) ** (-1 / 4))
    config.save_pretrained(tmp_path)
    shallower = RSMarianConfig.from_pretrained(tmp_path, encoder_layers=3, decoder_layers=2)
    assert shallower.encoder_residual_scale == config.encoder_residual_scale
    assert shallower.decoder_residual_scale == config.decoder_residual_scale
