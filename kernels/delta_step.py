"""One token of the gated delta rule for each row: its state is read once and written once, in place.

    S = exp(log_decay) S        S = S + k (strength (v - S^T k))^T        out = S^T q / sqrt(K)

    query, key (S, H_k, K), value (S, H_v, V), log_decay, strength (S, H_v), state (S, H_v, K, V) fp32
    ->  out (S, H_v, V), and the state after the token in the place of the one before

Value heads h H_v / H_k to (h + 1) H_v / H_k - 1 share head h's query and key. All is computed in fp32. Sums of
elementwise products, as transformers has them, pass about 12 times over the state, which is 128 MiB a layer at 64 rows
of 32 heads of 128 x 128. The rule: Gated Delta Networks (https://arxiv.org/abs/2412.06464).
"""

from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

TILE = 4096  # numbers of a state that one program has: 32 to each thread of 4 warps
EPS = 1e-6  # under the root of a norm, as fla and transformers have it

if triton is not None:

    @triton.jit
    def _step_kernel(
        query_ptr,  # (S, H_k, K)
        key_ptr,  # (S, H_k, K)
        value_ptr,  # (S, H_v, V)
        log_decay_ptr,  # (S, H_v)
        strength_ptr,  # (S, H_v)
        state_ptr,  # (S, H_v, K, V) fp32, overwritten
        commit_ptr,  # () bool, or None
        out_ptr,  # (S, H_v, V), written
        query_row_stride,
        query_head_stride,
        query_stride,
        key_row_stride,
        key_head_stride,
        key_stride,
        value_row_stride,
        value_head_stride,
        value_stride,
        log_decay_row_stride,
        log_decay_stride,
        strength_row_stride,
        strength_stride,
        state_row_stride,
        scale,
        eps,
        K: tl.constexpr,
        V: tl.constexpr,
        GROUP: tl.constexpr,  # H_v / H_k
        NORMALIZE: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        """One program per row, value head and BLOCK_V columns of its state, of which it has all K rows."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        heads = tl.num_programs(1)
        k = tl.arange(0, BLOCK_K)
        v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        state_ptr += row * state_row_stride + head * (K * V) + k[:, None] * V + v[None, :]
        there = (k < K)[:, None] & (v < V)[None, :]
        state = tl.load(state_ptr, mask=there, other=0.0)  # first: nothing that is needed for it takes time
        query_ptr += row * query_row_stride + head // GROUP * query_head_stride
        key_ptr += row * key_row_stride + head // GROUP * key_head_stride
        value_ptr += row * value_row_stride + head * value_head_stride
        query = tl.load(query_ptr + k * query_stride, mask=k < K, other=0.0).to(tl.float32)
        key = tl.load(key_ptr + k * key_stride, mask=k < K, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + v * value_stride, mask=v < V, other=0.0).to(tl.float32)
        log_decay = tl.load(log_decay_ptr + row * log_decay_row_stride + head * log_decay_stride).to(tl.float32)
        strength = tl.load(strength_ptr + row * strength_row_stride + head * strength_stride).to(tl.float32)
        if NORMALIZE:
            query *= tl.rsqrt(tl.sum(query * query, 0) + eps)
            key *= tl.rsqrt(tl.sum(key * key, 0) + eps)
        query *= scale
        state *= tl.exp(log_decay)
        change = strength * (value - tl.sum(state * key[:, None], 0))
        state += key[:, None] * change[None, :]
        if commit_ptr is not None:
            there &= True & (tl.load(commit_ptr) != 0)  # True &: as in nf4_product
        tl.store(state_ptr, state, mask=there)
        out = tl.sum(state * query[:, None], 0)
        out_ptr += (row * heads + head) * V + v
        tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=v < V)


@torch.no_grad()
def delta_step(
    query: Tensor,  # (S, H_k, K), of any strides, as key, value, log_decay and strength
    key: Tensor,  # (S, H_k, K)
    value: Tensor,  # (S, H_v, V), H_v a multiple of H_k
    log_decay: Tensor,  # (S, H_v), 0 or less
    strength: Tensor,  # (S, H_v), "beta" in the paper
    state: Tensor,  # (S, H_v, K, V) fp32, overwritten; each row is contiguous
    *,
    normalize: bool,
    commit: Tensor | None,
    backend: Backend = "auto",
) -> Tensor:
    """Move each row's state on by one token, and return what its query reads there: (S, H_v, V), query's dtype.

    normalize divides query and key by their length first. commit () bool is read on the device: False leaves every
    state as it is, and the result is as with True. None is True. No gradient.

    Raises:
        ValueError: shapes, dtypes or strides that do not belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(query, key, value, log_decay, strength, state, commit)
    if not runs_by_triton(backend, query.device.type):
        with torch.autocast(query.device.type, enabled=False):  # which would have its products in 16 bits
            return _by_products(query, key, value, log_decay, strength, state, normalize, commit)
    S, H_v, K, V = state.shape
    out = torch.empty(S, H_v, V, dtype=query.dtype, device=query.device)
    block_k = triton.next_power_of_2(K)
    block_v = min(max(TILE // block_k, 4), triton.next_power_of_2(V))  # 4 numbers are the 128 bits of one access
    if out.numel():
        with torch.cuda.device_of(state):
            _step_kernel[(S, H_v, triton.cdiv(V, block_v))](
                query, key, value, log_decay, strength, state, commit, out,
                *query.stride(), *key.stride(), *value.stride(), *log_decay.stride(), *strength.stride(),
                state.stride(0), K**-0.5, EPS, K=K, V=V, GROUP=H_v // query.shape[1], NORMALIZE=normalize,
                BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4,
            )  # fmt: skip
    return out


def _by_products(query, key, value, log_decay, strength, state, normalize: bool, commit: Tensor | None) -> Tensor:
    """out, by a product of the state with key and query; then one pass over the state, in place."""
    H_k, K = query.shape[1:]
    pair = torch.stack([key, query], 2).float()  # (S, H_k, 2, K)
    if normalize:
        pair = pair * torch.rsqrt(pair.square().sum(-1, keepdim=True) + EPS)
    key, read = pair[:, :, None, :1], pair[:, :, None, 1:] * K**-0.5  # (S, H_k, 1, 1, K)
    G = value.shape[1] // H_k
    values, grouped = value.float().unflatten(1, (H_k, G))[..., None, :], state.unflatten(1, (H_k, G))
    decay, strength = (x.float().unflatten(1, (H_k, G))[..., None, None] for x in (log_decay.float().exp(), strength))
    by_key, by_query = (torch.cat([key, read], 3) @ grouped * decay).split(1, 3)  # (S, H_k, G, 1, V)
    change = strength * (values - by_key)
    out = by_query + (read @ key.mT) * change
    if commit is not None:  # without it, state * 1 + 0 * 0 is the state
        decay = torch.where(commit, decay, 1.0)
        key, change = (torch.where(commit, x, 0.0) for x in (key, change))
    grouped.mul_(decay).addcmul_(key.mT, change)
    return out.view(value.shape).to(query.dtype)


def _check(query, key, value, log_decay, strength, state, commit) -> None:
    if query.dim() != 3 or key.shape != query.shape or value.dim() != 3 or len(value) != len(query):
        raise ValueError(
            "query and key must be (S, H_k, K) and value (S, H_v, V), not "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    (S, H_k, K), (_, H_v, V) = query.shape, value.shape
    if not H_k or H_v % H_k or not K:
        raise ValueError(f"{H_v} value heads are no multiple of {H_k} key heads of {K} numbers")
    if not log_decay.shape == strength.shape == (S, H_v):
        raise ValueError(
            f"log_decay and strength must be {(S, H_v)}, not {tuple(log_decay.shape)} and {tuple(strength.shape)}"
        )
    if state.shape != (S, H_v, K, V) or state.dtype != torch.float32 or not state[:1].is_contiguous():
        raise ValueError(
            f"state must be {(S, H_v, K, V)} fp32 with contiguous rows, not {tuple(state.shape)} {state.dtype} with "
            f"strides {state.stride()}"
        )
    if commit is not None and (commit.shape != () or commit.dtype != torch.bool):
        raise ValueError(f"commit must be () torch.bool, not {tuple(commit.shape)} {commit.dtype}")
