from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from lowmem_grpo.model.product_4bit import dequantized, product_4bit

IN, OUT = 192, 80  # 3 blocks of 64 a row
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(dtype, device="cpu", *, bias=True, double=True, kind="nf4") -> Any:
    draw = torch.Generator().manual_seed(0)
    layer: Any = Linear4bit(IN, OUT, bias, compute_dtype=dtype, quant_type=kind)
    make: Any = Params4bit  # its __new__ has the arguments, which a type checker does not see
    weight = torch.randn(OUT, IN, generator=draw).to(dtype)
    layer.weight = make(weight, requires_grad=False, quant_type=kind, compress_statistics=double)
    if bias:
        layer.bias.data = torch.randn(OUT, generator=draw).to(dtype)
    layer.support_avx512bf16_for_cpu = False  # as load_policy has it
    return layer.to(device)


def given(shape, dtype, device="cpu"):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [{}, {"bias": False}, {"double": False}, {"kind": "fp4"}], ids=str)
def test_the_product_is_linear4bits_to_the_last_bit(how, dtype):
    layer = make_layer(dtype, **how)
    product = product_4bit(layer)
    for shape in ((1,), (7,), (2, 33)):
        x = given(shape, dtype)
        with torch.no_grad():
            found, expected = product(x), layer(x)
        assert found.dtype == dtype and torch.equal(found, expected)


def test_a_bias_of_another_dtype_is_cast_and_left_as_it_is():
    layer = make_layer(torch.float32)
    x = given((5,), torch.bfloat16)
    with torch.no_grad():
        found = product_4bit(layer)(x)
        assert layer.bias.dtype == torch.float32
        layer.compute_dtype = torch.bfloat16
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [{}, {"double": False}, {"kind": "fp4"}], ids=str)
def test_the_weight_is_the_one_that_bitsandbytes_dequantizes(how, dtype):
    layer = make_layer(dtype, **how)
    assert torch.equal(dequantized(layer, dtype), dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_a_weight_quantized_from_another_dtype_is_rounded_once():
    layer = make_layer(torch.bfloat16)
    exact = dequantized(layer, torch.float32)
    assert not torch.equal(exact, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    assert torch.equal(dequantized(layer, torch.bfloat16), exact.bfloat16())


def test_double_quantization_in_other_blocks_is_refused():
    layer = make_layer(torch.float32)
    layer.weight.quant_state.state2.blocksize = 128
    with pytest.raises(NotImplementedError, match="blocks of 128"):
        product_4bit(layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64, 2000])
def test_the_product_is_linear4bits_on_a_gpu(rows, dtype):
    layer = make_layer(dtype, "cuda")
    x = given((rows,), dtype, "cuda")
    with torch.no_grad():
        assert torch.equal(product_4bit(layer)(x), layer(x))
