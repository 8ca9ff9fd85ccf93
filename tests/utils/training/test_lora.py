"""LoRA layers: the written-out gradient is autograd's, names and start are peft's, heads stay as they are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

from utils.training.lora import LoraLinear, add_lora
from utils.training.toy import build_toy_pair


def composed(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + layer.scale * ((x @ down.T) @ up.T)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_formula(bias: bool) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(12, 7, bias=bias).double(), rank=3, alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    learns = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    wanted, found = composed(layer, x), layer(x)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, learns, upstream), torch.autograd.grad(wanted, learns, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(64, 32).bfloat16(), rank=4, alpha=8)
    for weights in (layer.lora_A, layer.lora_B):
        weights.float()
        nn.init.normal_(weights["default"].weight, std=0.1)
    x = torch.randn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    layer.base_layer.float()
    wanted = composed(layer, x)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    down = layer.lora_A["default"].weight
    assert down.grad is not None
    (expected,) = torch.autograd.grad(wanted.sum(), [down])
    torch.testing.assert_close(down.grad, expected, rtol=0.05, atol=0.1)


def test_it_is_peft_s_to_the_name_and_the_value() -> None:
    mine, theirs = build_toy_pair()[0].decoder, build_toy_pair()[0].decoder
    assert isinstance(mine, LlamaForCausalLM)
    add_lora(mine, rank=4, alpha=8)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets), theirs)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(mine(ids).logits, build_toy_pair()[0].decoder(ids).logits)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
