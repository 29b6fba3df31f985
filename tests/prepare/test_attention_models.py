"""Vision transformers of timm and transformers, as written: in integers from training to ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tritonq
import vision_models
from optimised_graph import optimised_kinds
from tritonq.nn import MatMul


def timm_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    return vision_models.timm_model("vit_tiny_patch16_224", **sizes)


def clip_vision_tower() -> nn.Module:
    vision_models.import_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **sizes))


def pooled(y: object) -> Tensor:
    return y if isinstance(y, Tensor) else y.pooler_output


@pytest.mark.parametrize("make", [timm_vit, clip_vision_tower])
def test_every_product_is_trained_and_runs_in_integers(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    prepared = tritonq.prepare_qat(make(), example_inputs=x).train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        pooled(prepared(x)).square().mean().backward()
        optimizer.step()
    prepared.eval()
    products = [module for module in prepared.modules() if isinstance(module, MatMul)]
    assert len(products) == 2
    assert all(None not in product.input_quantizers for product in products)
    converted = tritonq.convert(prepared)
    with torch.no_grad():
        assert torch.equal(pooled(converted(x)), pooled(prepared(x)))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x)
    compared = tritonq.verify(converted, tmp_path / "model.onnx", [x])
    assert all(layer.largest <= bool(layer.island) for layer in compared.layers)
    found = optimised_kinds(tmp_path / "model.onnx")
    assert found["QLinearMatMul"] == 2
    assert found["QLinearConv"] == 1
    assert not {"MatMul", "Gemm", "Conv", "FusedMatMul", "MatMulIntegerToFloat"} & set(found)
