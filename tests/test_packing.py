import random

import pytest
import torch

from lowmem_grpo.packing import pack


def random_sequences(seed):
    draw = random.Random(seed)
    prompts = [[draw.randrange(2, 99) for _ in range(draw.randint(1, 20))] for _ in range(13)]
    completions = [[draw.randrange(2, 99) for _ in range(draw.randint(0, 30))] for _ in range(13)]
    return prompts, completions


def packed(prompts, completions, token_budget, keep=None):
    return list(
        pack(prompts, completions, token_budget=token_budget, pad_token_id=0, device=torch.device("cpu"), keep=keep)
    )


@pytest.mark.parametrize("token_budget", [1, 64, 200, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_predicted_once_from_the_one_before_it(token_budget, seed):
    prompts, completions = random_sequences(seed)
    flat = torch.tensor([token for completion in completions for token in completion])
    owners = torch.tensor([b for b, completion in enumerate(completions) for _ in completion])
    seen = []
    for batch in packed(prompts, completions, token_budget):
        ids = batch.input_ids.flatten()
        assert torch.equal(ids[batch.predictors + 1], batch.labels)
        assert torch.equal(flat[batch.tokens], batch.labels)
        assert torch.equal(owners[batch.tokens], batch.sequences)
        rows = batch.predictors // batch.input_ids.shape[1]
        for row, b in {(int(r), int(b)) for r, b in zip(rows, batch.sequences, strict=True)}:
            whole = prompts[b] + completions[b]
            assert batch.input_ids[row].tolist() == whole + [0] * (batch.input_ids.shape[1] - len(whole))
        seen += batch.tokens.tolist()
    assert sorted(seen) == list(range(len(flat)))


@pytest.mark.parametrize("token_budget", [1, 64, 200, 10_000])
def test_no_micro_batch_exceeds_the_budget_unless_one_row_does(token_budget):
    for batch in packed(*random_sequences(7), token_budget):
        assert batch.input_ids.numel() <= token_budget or batch.input_ids.shape[0] == 1


def test_rows_that_are_not_kept_are_left_out_and_keep_their_numbers():
    batches = packed([[5], [6], [7]], [[1, 2], [3, 4], [8]], 100, keep=[False, True, True])
    assert sorted(torch.cat([b.tokens for b in batches]).tolist()) == [2, 3, 4]
    assert set(torch.cat([b.sequences for b in batches]).tolist()) == {1, 2}


def test_nothing_to_keep_makes_no_micro_batch():
    assert packed([[5]], [[1]], 100, keep=[False]) == []
    assert packed([[5]], [[]], 100) == []
