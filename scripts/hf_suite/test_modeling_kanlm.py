"""transformers' model tests on kanlm's classes; scripts/test_hf.py copies this into a tree of its test files.

KANLM_SUITE_ARM names the feed-forward block, with `_norm` at its end one with the hidden norm.
"""

import os
import unittest
from unittest import mock

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

# The suite reads these tables of names when it is imported.
modeling_auto.MODEL_MAPPING_NAMES["kanlm"] = "KanLMModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["kanlm"] = "KanLMForCausalLM"

from kanlm.model import KanLMConfig, KanLMForCausalLM, KanLMModel  # noqa: E402
from kanlm.model.modeling_kanlm import KanLMPreTrainedModel  # noqa: E402

from ... import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402
from ...generation.test_utils import GenerationTesterMixin  # noqa: E402
from ...test_configuration_common import ConfigTester  # noqa: E402
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from ...test_training_mixin import TrainingTesterMixin  # noqa: E402

# None: the distributed tests run for every model type, not only for transformers' chosen few.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
# gloo processes may outnumber the cores, so those of four processes run on a machine with two.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 4
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class KanLMModelTester:
    """A tiny model and inputs of the sizes that the suite expects."""

    causal_lm_class = KanLMForCausalLM
    base_model_class = KanLMModel

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length = 13, 7
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 99, 32, 2, 4
        self.is_training = True

    def get_config(self) -> KanLMConfig:
        return KanLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            ffn_type=os.environ["KANLM_SUITE_ARM"].removesuffix("_norm"),
            hidden_norm=os.environ["KANLM_SUITE_ARM"].endswith("_norm"),
            kan_grid_size=5,
            kan_num_groups=4,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class KanLMModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (KanLMModel, KanLMForCausalLM)
    model_tester = None

    def setUp(self):
        self.model_tester = KanLMModelTester(self)
        self.config_tester = ConfigTester(self, config_class=KanLMConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        # The suite seeds torch before each module's draws. Ours come from one number that a model takes from
        # torch's generator when it is built, so that is where two models are given the same.
        build = KanLMPreTrainedModel.__init__

        def seeded(model, *args, **kwargs):
            torch.manual_seed(42)
            build(model, *args, **kwargs)

        with mock.patch.object(KanLMPreTrainedModel, "__init__", seeded):
            super().test_can_init_all_missing_weights()
