"""Compile the Triton kernels ahead of time, without a GPU, and print what each needs of every card.

    python -m lowmem_grpo.benchmarks.compile_kernels [--targets 80 90] [--json]

registers per thread / bytes of stack per thread (spills) / bytes of shared memory per block / waits for memory, one
after another, by `cuobjdump` and `nvdisasm`, which Triton brings along. The arguments are as the launches in kernels/
would specialize them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from types import FunctionType
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowmem_grpo.benchmarks.machine_code import (
    UNROUNDED,
    WAIT,
    by_kernel,
    code_of,
    early,
    longest_loop,
    narrow_accesses,
    waits_in_turn,
)
from lowmem_grpo.kernels import (
    decode_attention,
    decode_layer,
    delta_step,
    expert_product,
    head_shares,
    int8_product,
    layer_pass,
    linear_logprobs,
    nf4_product,
    overlap,
    policy_loss,
    sample_tokens,
)

# Compute capability -> the most shared memory of a block, in bytes.
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications-technical-specifications-per-compute-capability
SHARED_MEMORY = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# sm_75 has no bf16; every other card is compiled with it.
HALF = {75: "*fp16"}
HALF_DTYPE = {75: tl.float16}


class Kernel(NamedTuple):
    """A kernel to compile: an argument is a Triton type ("*half" is the card's 16-bit one), or a constexpr's value.

    A value may be a function of the compute capability. Pointers and "i32" are taken as divisible by 16, as torch's
    allocations and the strides of a model are, but for arguments that the kernel does not specialize. A pointer that is
    not used is None.
    """

    name: str
    function: Any  # a JITFunction
    arguments: dict
    num_warps: int = 4
    spill_bytes: int = 0  # the most that is accepted
    narrow: int = 0  # accepted instructions that access a tensor by less than 16 bytes a thread
    waits: int | None = None  # accepted, one after another; None: machine code is not read
    loop: int | None = None  # accepted instructions of the longest loop, of a kernel that their number bounds
    read_again: int = 0  # loads that the compiler may do twice
    oldest: int = 75  # the least compute capability that it is launched on
    newest: int = 120  # and the greatest
    fuses: bool = True  # products and sums into one
    num_stages: int = 3
    prefetches: int = 0  # of one that can be in a chain


def _start(name: str, **change) -> Kernel:
    arguments = dict(
        hidden_ptr="*half", label_weight_ptr="*half", index_ptr="*i64", label_ptr="*i64", bias_ptr=None,
        state_ptr="*fp32", hidden_row_stride="i32", hidden_stride=1, weight_row_stride="i32", weight_stride=1,
        state_stride="i32", vocabulary="i32", inner="fp32", outer="fp32", below_every_score="fp32",
        D=1536, BLOCK_D=1024, BIAS=False, SOFTCAP=False, FROM_LABEL=True, TOP=False,
    )  # fmt: skip
    return Kernel(name, linear_logprobs._start_kernel, arguments | change)


def _fold(name: str, num_warps: int = 4, **change) -> Kernel:
    arguments = dict(
        score_ptr="*fp32", share_ptr="*half", drift_ptr=None, pull_ptr="*fp32", spread_ptr=None, bias_ptr=None,
        label_ptr="*i64", state_ptr="*fp32", score_stride="i32", share_stride="i32", drift_stride="i32",
        pull_stride="i32", state_stride="i32", vocabulary_start="i32", width="i32", inner="fp32", outer="fp32",
        above="fp32", below="fp32", D=1536, BLOCK_V=4096, BLOCK_D=1024, WIDE=linear_logprobs.WIDE, WHOLE=True,
        BIAS=False, SOFTCAP=False, ENTROPY=False, GRADIENT=True, ENTROPY_GRADIENT=False, TOP=False,
    )  # fmt: skip
    return Kernel(name, linear_logprobs._fold_kernel, arguments | change, num_warps)


def _finish(name: str, **change) -> Kernel:
    arguments = dict(
        state_ptr="*fp32", label_weight_ptr="*half", index_ptr="*i64", pull_ptr="*fp32", spread_ptr=None,
        logprob_ptr="*fp32", entropy_ptr="*fp32", top_ptr=None, factor_ptr="*fp32", direction_ptr="*half",
        lean_ptr=None,
        state_stride="i32", weight_row_stride="i32", weight_stride=1, pull_stride="i32", direction_stride="i32",
        slope_scale="fp32", D=1536, BLOCK_D=1024, SOFTCAP=False, ENTROPY=False, GRADIENT=True, ENTROPY_GRADIENT=False,
        TOP=False,
    )  # fmt: skip
    return Kernel(name, linear_logprobs._finish_kernel, arguments | change)


def _scale(name: str, **change) -> Kernel:
    arguments = dict(
        direction_ptr="*half", lean_ptr=None, factor_ptr="*fp32", lean_factor_ptr=None, direction_stride="i32",
        D=1536, BLOCK_D=1024, ENTROPY_GRADIENT=False,
    )  # fmt: skip
    return Kernel(name, linear_logprobs._scale_kernel, arguments | change)


def _head_shares(name: str, narrow: int, **change) -> Kernel:
    block_m, block_n, block_k = head_shares.BLOCK_M, head_shares.BLOCK_N, head_shares.BLOCK_K
    arguments = dict(
        hidden=f"tensordesc<bf16[{block_m}, {block_k}]>", weight=f"tensordesc<bf16[{block_n}, {block_k}]>",
        shares=f"tensordesc<bf16[{block_m}, {block_n // 2}]>", label_ptr="*i64", state_ptr="*fp32", parts_ptr="*fp32",
        rows="i32", width="i32", label_start="i32", state_stride="i32", inner="fp32", D=1536,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=head_shares.GROUP, WHOLE=True, SHARES=True,
        ENTROPY=False, TOP=False,
    )  # fmt: skip
    # Narrow: of two rows a thread each label and reference, and of one the sums.
    return Kernel(
        name, head_shares._shares_kernel, arguments | change, head_shares.NUM_WARPS, narrow=narrow, oldest=90,
        newest=90, num_stages=head_shares.NUM_STAGES,
    )  # fmt: skip


def _head_sum(name: str, narrow: int, **change) -> Kernel:
    arguments = dict(
        parts_ptr="*fp32", state_ptr="*fp32", rows="i32", count="i32", state_stride="i32", BLOCK=head_shares.SUMMED,
        PARTS=head_shares.PARTS, ENTROPY=False, TOP=False,
    )  # fmt: skip
    # Narrow: all of them, a row to each of 32 threads; of each sum 16 parts at a time, which are unrolled to 32.
    return Kernel(name, head_shares._sum_kernel, arguments | change, 1, narrow=narrow, oldest=90, newest=90)


def _rescue(name: str, narrow: int, d: int) -> Kernel:
    arguments: dict[str, Any] = dict(
        hidden_ptr="*bf16", weight_ptr="*bf16", label_ptr="*i64", state_ptr="*fp32", pull_ptr="*fp32",
        hidden_stride="i32", weight_stride="i32", pull_stride="i32", rows="i32", vocabulary="i32", state_stride="i32",
        inner="fp32", limit="fp32", PULL=True, **head_shares.rescue_blocks(d),
    )  # fmt: skip
    num_warps = arguments.pop("num_warps")
    # Narrow: the sums of the rows that are looked through; of 2,048 hidden numbers 4 for each of 512 threads.
    return Kernel(name, head_shares._rescue_kernel, arguments, num_warps, narrow=narrow, oldest=90, newest=90)


def _policy_loss(name: str, narrow: int, **change) -> Kernel:
    # A token's inputs are read where its weight is not 0, which may change from one to the next: one number at a time.
    arguments = {argument: 1 for argument in policy_loss._policy_loss_kernel.arg_names if argument.endswith("_stride")}
    arguments |= dict(
        logprobs_ptr="*fp32", old_ptr="*fp32", ref_ptr="*fp32", advantages_ptr="*fp32", weights_ptr="*fp32",
        partials_ptr="*fp32", slope_ptr="*fp32", kl_ptr="*fp32", ratio_ptr="*fp32", clipped_low_ptr="*i1",
        clipped_high_ptr="*i1", low="fp32", high="fp32", delta="fp32", beta="fp32", tokens="i32",
        BIAS_CORRECTION=True, BLOCK=policy_loss.BLOCK,
    )  # fmt: skip
    return Kernel(name, policy_loss._policy_loss_kernel, arguments | change, narrow=narrow)


def _choose(name: str, **change) -> Kernel:
    arguments = dict(
        logits_ptr="*fp32", uniforms_ptr="*fp32", tokens_ptr="*i64", logprobs_ptr="*fp32", row_stride="i32",
        inverse_temperature="fp32", V=151936, BLOCK=sample_tokens.BLOCK,
    )  # fmt: skip
    return Kernel(name, sample_tokens._choose_kernel, arguments | change, num_warps=8)


def _next(name: str, function: Any, narrow: int, **change) -> Kernel:
    arguments = dict(
        logits_ptr="*fp32", state_ptr="*fp32", row_stride="i32", scale=None, softcap=None, inverse_temperature="fp32",
        V=151936, BLOCK=sample_tokens.BLOCK,
    )  # fmt: skip
    return Kernel(name, function, arguments | change, num_warps=8, narrow=narrow)


def _split(name: str, also_narrow: int, waits: int = 4, **change) -> Kernel:
    narrow = 2 + also_narrow  # the peak and the total of each query
    arguments = {argument: "i32" for argument in decode_attention._split_kernel.arg_names}
    arguments |= dict(
        query_ptr="*half", addresses_ptr="*i64", table_ptr="*i64", positions_ptr="*i64", prefilled_ptr="*i64",
        prefix_rows_ptr="*i64", sums_ptr="*fp32", state_ptr="*fp32", window=None, scaling="fp32", softcap=None,
        NUMBERS=tl.bfloat16, LAYERS=28, H=14, GROUP=7, T=64, D=128, HALVES=True, SPLIT=decode_attention.SPLIT, HEADS=8,
        BLOCK_D=128, ROWS=8, STEP=decode_attention.STEP, TOKENS=None, FACTOR=None, OVERLAP=False,
    )  # fmt: skip
    return Kernel(name, decode_attention._split_kernel, arguments | change, narrow=narrow, waits=waits)


def _tiles(name: str, also_narrow: int, waits: int, **change) -> Kernel:
    arguments: dict[str, Any] = dict(HEADS=16, TOKENS=64, FACTOR=tl.bfloat16) | change
    return _split(name, also_narrow, waits, **arguments)._replace(oldest=80, num_stages=decode_attention.STAGES)


def _write(name: str, narrow: int = 0, **change) -> Kernel:
    arguments = {argument: "i32" for argument in decode_attention._write_kernel.arg_names}
    arguments |= dict(
        key_ptr="*half", value_ptr="*half", addresses_ptr="*i64", table_ptr="*i64", positions_ptr="*i64",
        prefilled_ptr="*i64", NUMBERS=tl.bfloat16, LAYERS=28, KV_HEADS=2, T=64, D=128, BLOCK_HEADS=2, BLOCK_D=128,
    )  # fmt: skip
    return Kernel(name, decode_attention._write_kernel, arguments | change, num_warps=1, narrow=narrow)


def _merge(name: str, narrow: int, waits: int, **change) -> Kernel:
    arguments = dict(
        sums_ptr="*fp32", state_ptr="*fp32", sink_ptr=None, out_ptr="*half", splits="i32", H=28, D=128, BLOCK_D=128,
        TILE=decode_attention.TILE, OVERLAP=False,
    )  # fmt: skip
    return Kernel(name, decode_attention._merge_kernel, arguments | change, num_warps=1, narrow=narrow, waits=waits)


def _product(name: str, sizes: list[int], R: int, waits: int, loop: int, **change) -> Kernel:
    arguments: dict[str, Any] = {argument: None for argument in nf4_product._product_kernel.arg_names}
    for index in range(len(sizes)):
        arguments |= {f"w{index}_ptr": "*u8", f"absmax{index}_ptr": "*u8", f"outer{index}_ptr": "*fp32"}
        arguments |= {f"offset{index}_ptr": "*fp32"}
    n0, n1, n2 = sizes + [0] * (3 - len(sizes))
    arguments |= dict(
        x_ptr="*half", code_ptr="*fp32", a_ptr="*half", parts_ptr="*fp32", low_ptr="*fp32", M="i32",
        N0=n0, N1=n1, N2=n2, R=R, NESTED=True, BLOCK_M=16, BLOCK_N=nf4_product.BLOCK_N, RANK=nf4_product.RANK,
        WARPS=nf4_product.NUM_WARPS, STAGES=nf4_product.STAGES, WGMMA=nf4_product.has_wgmma, OVERLAP=False,
    )  # fmt: skip
    # Of each row of a weight 8 bytes a thread, one of absmax and four of its scale, two steps in a loop and two before
    # it; of a 7B's low a pair.
    return Kernel(
        name,
        nf4_product._product_kernel,
        arguments | change,
        nf4_product.NUM_WARPS,
        narrow=34,
        waits=waits,
        loop=loop,
        oldest=nf4_product.OLDEST,
    )


def _group(name: str, **change) -> Kernel:
    arguments = dict(chosen_ptr="*i64", order_ptr="*i32", begins_ptr="*i32", C="i32", E="i32", BLOCK=4096)
    # A number a thread: where each is written depends on the choices.
    return Kernel(name, expert_product._group_kernel, arguments | change, narrow=64, oldest=nf4_product.OLDEST)


def _experts(name: str, loop: int, **change) -> Kernel:
    arguments = dict(
        x_ptr="*half", chosen_ptr="*i64", order_ptr="*i32", begins_ptr="*i32", codes_ptr="*u8", scales_ptr="*u8",
        outer_ptr="*fp32", offsets_ptr="*fp32", table_ptr="*fp32", values_ptr=None, out_ptr="*half", E="i32",
        SHARED=8, BY_PLACE=False, BLOCK=64, BLOCK_M=16, BLOCK_N=expert_product.BLOCK_N,
        WARPS=expert_product.NUM_WARPS, WGMMA=nf4_product.has_wgmma,
    )  # fmt: skip
    # Of each row of a weight 8 bytes a thread, 4 in MXFP4, one of its scale and, in NF4, four of that one's, two steps
    # in a loop and two before it; and the places of choices, which are read in two layouts. Nothing writes over them.
    return Kernel(
        name,
        expert_product._product_kernel,
        arguments | change,
        expert_product.NUM_WARPS,
        spill_bytes=8,  # sm_100 by Triton 3.7, sm_120 by 3.6
        narrow=24,
        waits=8,
        loop=loop,
        read_again=1,
        oldest=nf4_product.OLDEST,
    )


def _head_product(name: str, block_m: int, loop: int, **change) -> Kernel:
    arguments = dict(
        x_ptr="*half", weight_ptr="*i8", scale_ptr="*fp32", out_ptr="*fp32", M="i32",
        PERMUTED=nf4_product.has_wgmma, INTERPRETED=False, BLOCK_M=block_m, BLOCK_N=int8_product.BLOCK_N,
        BLOCK_K=int8_product.block_k(block_m), STAGES=int8_product.STAGES,
    )  # fmt: skip
    # Narrow: a scale for each of 128 threads.
    return Kernel(
        name,
        int8_product._product_kernel,
        arguments | change,
        int8_product.NUM_WARPS,
        narrow=1,
        waits=3,
        loop=loop,
        oldest=nf4_product.OLDEST,
        num_stages=int8_product.STAGES,
    )


def _start_layer(name: str, **change) -> Kernel:
    arguments = dict(
        token_ids_ptr="*i64", embedding_ptr="*half", stream_ptr="*half", gain_ptr="*fp32", out_ptr="*half",
        scale="fp32", eps="fp32", N=3584, EARLY=True, BLOCK=4096,
    )  # fmt: skip
    return Kernel(name, decode_layer._start_kernel, arguments | change, decode_layer.row_warps(3584), waits=3)


def _residual(name: str, waits: int, N: int = 3584, R: int = 16, SPLITS: int = 16, **change) -> Kernel:
    block = triton.next_power_of_2(N)
    num_warps = decode_layer.row_warps(N)
    hand, step = decode_layer.row_hand(SPLITS, R, N, num_warps, 2)
    arguments = dict(
        stream_ptr="*half", parts_ptr="*fp32", low_ptr="*fp32", b_ptr="*half", bias_ptr=None, after_ptr=None,
        before_ptr="*fp32", out_ptr="*half", M="i32", share=None, after_eps="fp32", before_eps="fp32", N=N, R=R,
        SPLITS=SPLITS, HAND=hand, STEP=step, AFTER_EARLY=True, BEFORE_EARLY=True, BLOCK=block,
        OVERLAP=False,
    )  # fmt: skip
    # Narrow: low, fewer numbers than there are threads.
    return Kernel(name, decode_layer._residual_kernel, arguments | change, num_warps, narrow=1, waits=waits)


def _heads(name: str, narrow: int, waits: int, num_warps: int = 1, R: int = 16, SPLITS: int = 8, **change) -> Kernel:
    hand, step = decode_layer.row_hand(SPLITS, R, change.get("HEADS", 1) * 128, num_warps, 2)
    arguments: dict[str, Any] = {argument: "i32" for argument in decode_layer._heads_kernel.arg_names}
    arguments |= dict(
        parts_ptr="*fp32", low_ptr="*fp32", b_ptr="*half", bias_ptr="*half", query_gain_ptr=None, key_gain_ptr=None,
        cos_ptr="*half", sin_ptr="*half", positions_ptr="*i64", prefilled_ptr="*i64", table_ptr="*i64",
        query_ptr="*half", own_ptr="*half", scales_ptr=None, addresses_ptr="*i64", query_eps="fp32", key_eps="fp32",
        D=128, H=28, H_KV=4, ROTARY=128, PAIRED=False, LOW=3 * R, R=R, SPLITS=SPLITS, HAND=hand,
        STEP=step, EARLY=True, WHOLE=False, HEADS=1, BLOCK_D=128, OVERLAP=False,
    )  # fmt: skip
    # A thread of one warp has 4 of 128 columns: 8 bytes of all that has 16 bits but b, 4 of int8 and one scale.
    return Kernel(
        name, decode_layer._heads_kernel, arguments | change, num_warps, narrow=narrow, waits=waits, fuses=False
    )


def _gated(name: str, waits: int, R: int = 16, SPLITS: int = 2, tensor_cores: bool = True, **change) -> Kernel:
    hand, step = decode_layer.tile_hand(SPLITS, R, 2, tensor_cores)
    arguments = dict(
        parts_ptr="*fp32", low_ptr="*fp32", b_ptr="*half", bias_ptr=None, out_ptr="*half", M="i32", WIDTH=18944,
        LOW=2 * R, R=R, SPLITS=SPLITS, HAND=hand, STEP=step, ACTIVATION="silu",
        INTERPRETED=False, BLOCK_M=decode_layer.BLOCK_M, BLOCK_N=decode_layer.BLOCK_N, OVERLAP=False,
    )  # fmt: skip
    narrow = 2 if SPLITS == 1 else 0  # low of gate and of up, a pair of numbers to a thread
    return Kernel(
        name, decode_layer._gated_kernel, arguments | change, decode_layer.NUM_WARPS, narrow=narrow, waits=waits
    )


def _delta(name: str, narrow: int, **change) -> Kernel:
    arguments: dict[str, Any] = {argument: "i32" for argument in delta_step._step_kernel.arg_names}
    arguments |= dict(
        query_ptr="*half", key_ptr="*half", value_ptr="*half", log_decay_ptr="*fp32", strength_ptr="*half",
        state_ptr="*fp32", commit_ptr="*i1", out_ptr="*half", query_stride=1, key_stride=1, value_stride=1,
        log_decay_stride=1, strength_stride=1, scale="fp32", eps="fp32", K=128, V=128, GROUP=2, NORMALIZE=True,
        BLOCK_K=128, BLOCK_V=32,
    )  # fmt: skip
    return Kernel(name, delta_step._step_kernel, arguments | change, narrow=narrow)


def _row_pass(name: str, function: Any, N: int, **change) -> Kernel:
    arguments: dict[str, Any] = {argument: "i32" for argument in function.arg_names}
    arguments |= dict(
        x_ptr="*half", result_ptr="*half", grad_ptr="*half", onto_ptr="*half", gain_ptr="*fp32", after_ptr="*half",
        before_ptr="*fp32", sum_ptr="*half", out_ptr="*half", share="fp32", eps="fp32", after_eps="fp32",
        before_eps="fp32", N=N, EARLY=True, AFTER_EARLY=True, BEFORE_EARLY=True, BLOCK=triton.next_power_of_2(N),
    )  # fmt: skip
    fuses = function is not layer_pass._added_kernel
    return Kernel(name, function, arguments | change, decode_layer.row_warps(N), fuses=fuses)


def _heads_pass(name: str, function: Any, H: int, D: int, narrow: int = 0, **change) -> Kernel:
    whole = change.get("WHOLE", False)
    heads_at_once, num_warps = layer_pass.heads_tile(H, D, whole)
    arguments: dict[str, Any] = {argument: "i32" for argument in function.arg_names}
    arguments |= dict(
        grad_ptr="*half", x_ptr="*half", gain_ptr="*fp32", cos_ptr="*half", sin_ptr="*half", out_ptr="*half",
        eps="fp32", D=D, H=H, ROTARY=D, PAIRED=False, EARLY=True, WHOLE=whole, HEADS=heads_at_once,
    )  # fmt: skip
    fuses = function is not layer_pass._heads_kernel
    return Kernel(name, function, arguments | change, num_warps, narrow=narrow, fuses=fuses)


def _gate_pass(name: str, function: Any, **change) -> Kernel:
    arguments: dict[str, Any] = {argument: "i32" for argument in function.arg_names}
    arguments |= {argument: "*half" for argument in function.arg_names if argument.endswith("_ptr")}
    arguments |= dict(WIDTH=18944, ACTIVATION="silu", BLOCK=layer_pass.BLOCK)
    return Kernel(name, function, arguments | change, layer_pass.NUM_WARPS)


_SPREAD: dict[str, Any] = dict(drift_ptr="*half", spread_ptr="*fp32", ENTROPY=True, ENTROPY_GRADIENT=True)
KERNELS = [
    _head_shares("head_shares", 5),
    _head_shares("head_shares, entropy", 6, ENTROPY=True),
    _head_shares("head_shares, entropy, top", 7, ENTROPY=True, TOP=True),
    _head_shares("head_shares, the last slice, entropy, top", 7, WHOLE=False, ENTROPY=True, TOP=True),
    _head_shares("head_shares, no gradient, entropy", 6, shares=None, SHARES=False, ENTROPY=True, D=3584),
    _head_shares(
        "head_shares, no gradient, the last slice, entropy, top", 7,
        shares=None, SHARES=False, WHOLE=False, ENTROPY=True, TOP=True,
    ),
    _head_shares("head_shares, no gradient, the last slice", 5, shares=None, SHARES=False, WHOLE=False),
    _head_sum("head_shares sum", 50),
    _head_sum("head_shares sum, entropy, top", 150, ENTROPY=True, TOP=True),
    _rescue("head_shares rescue, 1536", 2, 1536),
    _rescue("head_shares rescue, 3584", 1, 3584),
    _rescue("head_shares rescue, 8192", 1, 8192),
    _start("linear_logprobs start"),
    _start("linear_logprobs start, bias, softcap", bias_ptr="*half", BIAS=True, SOFTCAP=True),
    _start("linear_logprobs start, top", FROM_LABEL=False, TOP=True),
    _fold("linear_logprobs fold 4096"),
    _fold("linear_logprobs fold 4096, fp32", share_ptr="*fp32"),
    _fold("linear_logprobs fold 4096, entropy", ENTROPY=True),
    _fold("linear_logprobs fold 4096, no gradient", GRADIENT=False, pull_ptr=None, share_ptr=None),
    _fold(
        "linear_logprobs fold 4096, bias, softcap, gradient of entropy",
        bias_ptr="*half", BIAS=True, SOFTCAP=True, **_SPREAD,
    ),
    _fold("linear_logprobs fold 4096, the last tile", WHOLE=False),
    _fold("linear_logprobs fold 8192, entropy", num_warps=8, BLOCK_V=8192, ENTROPY=True),
    _fold("linear_logprobs fold 8192, entropy, top", num_warps=8, BLOCK_V=8192, ENTROPY=True, TOP=True),
    _finish("linear_logprobs finish, entropy", ENTROPY=True),
    _finish("linear_logprobs finish, entropy, top", top_ptr="*u8", ENTROPY=True, TOP=True),
    _finish(
        "linear_logprobs finish, softcap, gradient of entropy",
        spread_ptr="*fp32", lean_ptr="*half", SOFTCAP=True, ENTROPY=True, ENTROPY_GRADIENT=True,
    ),
    _scale("linear_logprobs scale"),
    _scale(
        "linear_logprobs scale, gradient of entropy", lean_ptr="*half", lean_factor_ptr="*fp32", ENTROPY_GRADIENT=True
    ),
    _policy_loss("policy_loss, everything", 20),
    _policy_loss(
        "policy_loss, no reference, no delta", 16,
        ref_ptr=None, kl_ptr=None, delta=None, BIAS_CORRECTION=False,
    ),
    _choose("sample_tokens"),
    _choose("selective_logprobs", uniforms_ptr=None),
    _next("sample_next sums, scale, softcap", sample_tokens._sums_kernel, 0, scale="fp32", softcap="fp32"),
    _next(
        "sample_next pick", sample_tokens._pick_kernel, 2,  # each chunk's peak, and its sum
        uniforms_ptr="*fp32", completions_ptr="*i64",
        token_ids_ptr="*i64", positions_ptr="*i64", prefilled_ptr="*i64", out_ptr="*fp64", uniforms_stride="i32",
        tokens="i32", CHUNKS=64,
    ),
    # Also narrow: without tiles, the peak and the total of a split of nothing.
    _split("decode_attention, 7 x 128, prefix", 2, H=28),
    _split("decode_attention, 7 x 64, prefix", 3, D=64, BLOCK_D=64, ROWS=16),
    _split(
        "decode_attention, 8 x 256, fp32, short pages, prefix, softcap, window", 10, 5,  # each token's page
        query_ptr="*fp32", NUMBERS=tl.float32, window="i32", softcap="fp32", D=256, BLOCK_D=256, ROWS=4, H=16, GROUP=8,
        T=16, HALVES=False,
    ),
    _split(
        "decode_attention, 1 x 80, short pages", 12, 5,  # and a query and its sums, 80 numbers for 128 threads
        prefilled_ptr=None, prefix_rows_ptr=None, D=80, H=8, GROUP=1, HEADS=1, T=16, HALVES=False,
    ),
    _split(
        "decode_attention, 7 x 128, int8, pages, prefix", 20,  # 16 scales of a token, twice 8 bytes of it
        NUMBERS=tl.int8,
    ),
    _tiles("decode_attention by tiles, 7 x 128, prefix, pages", 0, 3),
    _tiles("decode_attention by tiles, 7 x 128, prefix, short pages", 16, 16, T=16, HALVES=False),  # likewise
    _tiles("decode_attention by tiles, 7 x 128, int8, prefix, pages", 24, 5, NUMBERS=tl.int8),  # a token's scales
    _tiles(
        "decode_attention by tiles, 2 x 256, softcap, window, prefix, pages", 0, 3,
        window="i32", softcap="fp32", H=16, GROUP=2, D=256, BLOCK_D=256, ROWS=4, TOKENS=32,
    ),
    _tiles(  # 512: Gemma 4's full layers
        "decode_attention by tiles, 8 x 512, prefix, pages", 0, 3, H=8, GROUP=8, D=512, BLOCK_D=512, ROWS=2, TOKENS=16,
    ),
    _tiles(
        "decode_attention by tiles, 8 x 512, int8, prefix, pages", 20, 6, NUMBERS=tl.int8, H=8, GROUP=8, D=512,
        BLOCK_D=512, ROWS=2, TOKENS=16,
    ),
    _write("write_token, 2 x 128"),
    _write("write_token, 8 x 256, fp32, without prefixes", key_ptr="*fp32", value_ptr="*fp32", prefilled_ptr=None,
           NUMBERS=tl.float32, KV_HEADS=8, BLOCK_HEADS=8, D=256, BLOCK_D=256),
    _write("write_token, 8 x 128, int8", 1, NUMBERS=tl.int8, KV_HEADS=8, BLOCK_HEADS=8),  # 8 numbers of a byte a thread
    # Narrow: a thread's columns of the result; of 64 columns its two of each split's sums, too.
    _merge("decode_attention merge, 128", 1, 1),
    _merge("decode_attention merge, 64, sinks", 5, 2, sink_ptr="*half", H=64, D=64, BLOCK_D=64),
    _merge("decode_attention merge, 512", 1, 1, D=512),
    _product("nf4_product, q, k, v 1.5B, 16 rows", [1536, 256, 256], 48, 8, 0, K=1536, SPLITS=8),
    _product("nf4_product, gate, up 1.5B, 16 rows", [8960, 8960], 32, 17, 345, K=1536, SPLITS=2),
    _product("nf4_product, down 7B, 32 rows", [3584], 16, 11, 395, K=18944, SPLITS=8, BLOCK_M=32),
    _product("nf4_product, down 7B, 64 rows", [3584], 16, 8, 520, K=18944, SPLITS=8, BLOCK_M=64),
    _product("nf4_product, gate, up 7B, 64 rows", [18944, 18944], 32, 6, 535, K=3584, SPLITS=1, BLOCK_M=64),
    _head_product("int8_product, 152064 x 3584, 16 rows", 16, 660, N=152064, K=3584),
    _head_product("int8_product, 49152 x 576, 32 rows", 32, 790, N=49152, K=576),
    _head_product("int8_product, 128256 x 4096, 64 rows", 64, 710, N=128256, K=4096),
    _group("expert_product group, 4096 choices"),
    _experts("expert_product, gate and up of 30B-A3B, one row", 400, K=2048, N=1536, BY_PLACE=True),
    _experts("expert_product, gate and up of Mixtral, 64 rows", 530, K=4096, N=28672, SHARED=2, BLOCK_M=32),
    _experts(
        "expert_product, MXFP4, down of gpt-oss, 256 rows", 320,
        K=2880, N=2880, SHARED=1, BLOCK=32, BLOCK_M=32, outer_ptr=None, offsets_ptr=None, table_ptr=None,
    ),
    _start_layer("decode_layer start, 3584"),
    _residual("decode_layer residual, 1536, 8 splits", 3, N=1536, SPLITS=8),
    _residual("decode_layer residual, 1536, 16 splits", 3, N=1536),
    _residual("decode_layer residual, 1536, rank 64", 3, N=1536, R=64),
    _residual("decode_layer residual, 3584", 3),
    _residual("decode_layer residual, 3584, rank 64, norm after, share", 3, R=64, after_ptr="*fp32", share="fp32"),
    _residual("decode_layer residual, 8192", 3, N=8192, SPLITS=4),
    _heads("decode_layer heads, 128", 5, 2),
    _heads("decode_layer heads, 128, rank 64, 16 splits", 5, 3, R=64, SPLITS=16),
    _heads(
        "decode_layer heads, 128, norms, int8", 6, 3, query_gain_ptr="*fp32", key_gain_ptr="*fp32", own_ptr="*i8",
        scales_ptr="*fp16",
    ),
    _heads(
        "decode_layer heads, 32 x 128, norms over all", 1, 5, 8, query_gain_ptr="*fp32", key_gain_ptr="*fp32", H=32,
        H_KV=32, WHOLE=True, HEADS=32, cos_ptr="*fp32", sin_ptr="*fp32", bias_ptr=None,
    ),
    _gated("decode_layer gated, 8960", 1, WIDTH=8960),
    _gated("decode_layer gated, 18944", 1, SPLITS=1),
    _gated("decode_layer gated, 18944, rank 64, gelu", 6, R=64, ACTIVATION="gelu")._replace(oldest=80),
    _gated("decode_layer gated, 18944, rank 64, without tensor cores", 5, R=64, SPLITS=1, tensor_cores=False),
    _gated("decode_layer gated, 1536, 3 splits", 2, SPLITS=3, WIDTH=1536),
    # Narrow: query, key, value and out, whose 128 numbers are one for each of 128 threads.
    _delta("delta_step, 2 x 128 x 128", 4),
    _delta(
        "delta_step, 1 x 96 x 192, fp32, every fifth number", 7, query_ptr="*fp32", key_ptr="*fp32", value_ptr="*fp32",
        query_stride=5, key_stride=5, value_stride=5, strength_ptr="*fp32", out_ptr="*fp32", commit_ptr=None, K=96,
        V=192, GROUP=1,
    ),
    _row_pass("layer_pass normed, 8192", layer_pass._normed_kernel, 8192),
    _row_pass("layer_pass added, 576", layer_pass._added_kernel, 576, after_ptr=None, share=None),
    _row_pass("layer_pass added, 8192, norm after, share", layer_pass._added_kernel, 8192),
    _row_pass("layer_pass normed backward, 8192", layer_pass._normed_backward_kernel, 8192),
    _row_pass(
        "layer_pass normed backward, 3584, fp32", layer_pass._normed_backward_kernel, 3584,
        x_ptr="*fp32", grad_ptr="*fp32", onto_ptr=None, out_ptr="*fp32",
    ),
    # Narrow: of 8 heads 32 columns are two for each of 128 threads.
    _heads_pass("layer_pass heads, 9 x 64, norm", layer_pass._heads_kernel, 9, 64),
    _heads_pass("layer_pass heads, 16 x 256, norm, 64 rotated", layer_pass._heads_kernel, 16, 256, 10, ROTARY=64),
    _heads_pass(
        "layer_pass heads, 32 x 128, 64 rotated in pairs", layer_pass._heads_kernel, 32, 128, gain_ptr=None, ROTARY=64,
        PAIRED=True,
    ),
    _heads_pass("layer_pass heads, 64 x 128, norm over all", layer_pass._heads_kernel, 64, 128, WHOLE=True),
    _heads_pass(
        "layer_pass heads backward, 28 x 128", layer_pass._heads_backward_kernel, 28, 128, x_ptr=None, gain_ptr=None
    ),
    _heads_pass(
        "layer_pass heads backward, 16 x 256, norm, 64 rotated", layer_pass._heads_backward_kernel, 16, 256, 12,
        ROTARY=64,
    ),
    _heads_pass(
        "layer_pass heads backward, 64 x 128, norm over all, fp32 angles", layer_pass._heads_backward_kernel, 64, 128,
        WHOLE=True, cos_ptr="*fp32", sin_ptr="*fp32",
    ),
    _gate_pass("layer_pass gated, 18944", layer_pass._gated_kernel),
    _gate_pass("layer_pass gated backward, 8960", layer_pass._gated_backward_kernel, WIDTH=8960),
    _gate_pass("layer_pass gated backward, 18944, gelu", layer_pass._gated_backward_kernel, ACTIVATION="gelu"),
]  # fmt: skip
_OVERLAPPING = {  # as they stand in a chain, and how many tensors they prefetch parts of
    "decode_attention by tiles, 7 x 128, prefix, pages": 0,
    "decode_attention merge, 128": 0,
    "nf4_product, q, k, v 1.5B, 16 rows": 14,
    "nf4_product, gate, up 7B, 64 rows": 10,
    "decode_layer residual, 3584, rank 64, norm after, share": 3,
    "decode_layer heads, 128, norms, int8": 4,
    "decode_layer gated, 18944": 1,
}
KERNELS += [
    kernel._replace(
        name=f"{kernel.name}, overlapping", arguments=kernel.arguments | {"OVERLAP": True}, oldest=overlap.OLDEST,
        prefetches=_OVERLAPPING[kernel.name],
    )
    for kernel in KERNELS
    if kernel.name in _OVERLAPPING
]  # fmt: skip


def compile_all(capability: int) -> list[dict]:
    """The resources of every kernel that is launched on a card, and what its machine code tells."""
    kernels = [kernel for kernel in KERNELS if kernel.oldest <= capability <= kernel.newest]
    results, codes = zip(*(compile_for(kernel, capability) for kernel in kernels), strict=True)
    read = [place for place, kernel in enumerate(kernels) if kernel.waits is not None]
    for place, sass in zip(read, disassembled([codes[place] for place in read], capability), strict=True):
        results[place].update(waits=waits_in_turn(sass), longest_loop=longest_loop(sass))
    return list(results)


def disassembled(codes: list[bytes], capability: int) -> list[str]:
    """Each kernel's SASS. All are one image, since nvdisasm takes 0.2 s to start, and 0.01 s for a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as image:
        image.write(b"".join(codes))
        image.flush()
        card = f"SM{capability}{'a' if capability >= 90 else ''}"
        command = [knobs.nvidia.nvdisasm.path, "-b", card, image.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return by_kernel(dump, [len(code) for code in codes])


def compile_for(kernel: Kernel, capability: int) -> tuple[dict, bytes]:
    """A kernel's resources on a card, and its machine code, which is still to be read.

    Entries with `limit`, and the first of `loads`, are what is accepted.
    """
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.function.params):
        value = kernel.arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            value = HALF_DTYPE.get(capability, value) if value is tl.bfloat16 else value
            value = value(capability) if isinstance(value, FunctionType) else value
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = value.replace("*half", HALF.get(capability, "*bf16"))
        if (value.startswith("*") or value == "i32") and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": kernel.fuses}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", dump)[0]) for what in ("REG", "STACK"))
    resources = dict(
        kernel=kernel.name,
        target=capability,
        registers=registers,
        spill_bytes=stack,
        spill_limit=kernel.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY[capability],
        # At most, as written, and as compiled. One more would be a value read again, perhaps after it was written over.
        loads=[compiled.asm["ttir"].count("tt.load") + kernel.read_again, compiled.asm["ttgir"].count("tt.load")],
        narrow=narrow_accesses(compiled.asm["ttir"], compiled.asm["ptx"]),
        narrow_limit=kernel.narrow,
        waits=None,
        waits_limit=kernel.waits,
        longest_loop=None,
        loop_limit=kernel.loop,
        unrounded=len(UNROUNDED.findall(compiled.asm["ptx"])),
        # Of a chain: waits, prefetches before the first, and how many they are to be; what else is before it.
        chain=[compiled.asm["ptx"].count(WAIT), *early(compiled.asm["ptx"])],
        chain_as_wanted=[1, kernel.prefetches, 0] if kernel.arguments.get("OVERLAP") else [0, 0, 0],
    )
    return resources, code_of(compiled.asm["cubin"])


def table(results: list[dict]) -> str:
    targets = sorted({result["target"] for result in results})
    columns = "registers", "spill_bytes", "shared_bytes", "waits"
    cells = {
        (result["kernel"], result["target"]): " / ".join(
            "-" if result[column] is None else str(result[column]) for column in columns
        )
        for result in results
    }
    lines = ["| registers / spill B / shared B / waits | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
    lines.append("|---" * (len(targets) + 1) + "|")
    for name in dict.fromkeys(result["kernel"] for result in results):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, target), "-") for target in targets) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--json", action="store_true", help="one list of results in place of the table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 makes kernels that cannot be compiled: unset it")
    results = [result for target in arguments.targets for result in compile_all(target)]
    print(json.dumps(results) if arguments.json else table(results))


if __name__ == "__main__":
    main()
