"""transformers' own common model tests for RSMarian, and for stock Marian beside it.

Not collected with the project's tests: it needs the `tests` folder of transformers' source distribution, which
`run.sh` fetches and copies this file into.
"""

import unittest

import pytest
import torch
from transformers import MarianConfig, MarianModel, MarianMTModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from rs_transformer import RSMarianConfig, RSMarianForConditionalGeneration, RSMarianModel

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_training_mixin import TrainingTesterMixin

# By these names the common tests know which models have a loss.
MODEL_MAPPING_NAMES["rs_marian"] = "RSMarianModel"
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["rs_marian"] = "RSMarianForConditionalGeneration"


class MarianTester:
    """Tiny models of two steps; the attributes are those that the mixins read."""

    batch_size, seq_length, hidden_size, vocab_size = 13, 7, 64, 99
    num_hidden_layers = decoder_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent, config_class=RSMarianConfig, base=RSMarianModel, head=RSMarianForConditionalGeneration):
        self.parent, self.config_class, self.base_model_class, self.head = parent, config_class, base, head
        self.causal_lm_class = head

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            dropout=0.0,
            attention_dropout=0.0,
            max_position_embeddings=128,
            eos_token_id=2,
            forced_eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=0,
            scale_embedding=False,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(3)
        input_ids[:, -1] = 2
        decoder_input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(3)
        return config, {
            "input_ids": input_ids,
            "decoder_input_ids": decoder_input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "decoder_attention_mask": torch.ones_like(decoder_input_ids),
        }


class _CommonTests(ModelTesterMixin, TrainingTesterMixin):
    is_encoder_decoder = True
    test_missing_keys = False

    def setUp(self):
        self.model_tester = MarianTester(self, *self.classes)
        self.config_tester = ConfigTester(self, config_class=self.classes[0])

    # Abstract in the mixin.
    model_tester = None

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_overfit(self):
        # Its last check prompts a decoder-only model, which neither Marian is; loss and gradient norm come before it.
        with pytest.raises(AssertionError, match="to generate the training sequence"):
            super().test_training_overfit()


class RSMarianModelTest(_CommonTests, unittest.TestCase):
    classes = (RSMarianConfig, RSMarianModel, RSMarianForConditionalGeneration)
    all_model_classes = (RSMarianModel, RSMarianForConditionalGeneration)


class StockMarianModelTest(_CommonTests, unittest.TestCase):
    classes = (MarianConfig, MarianModel, MarianMTModel)
    all_model_classes = (MarianModel, MarianMTModel)
