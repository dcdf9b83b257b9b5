"""Several processes do what one does: their shares, what they put together, and a rank that is gone."""

import torch

from lowmem_grpo import distributed


def test_one_process_puts_together_what_it_was_given():
    values = torch.tensor([1.0, 2.0])
    assert distributed.world_size() == 1 and distributed.rank() == 0 and distributed.is_main()
    assert distributed.share([3, 1, 2]) == range(3)
    assert distributed.gathered("one") == distributed.each(lambda: "one") == ["one"]
    assert distributed.from_main(7) == 7 and distributed.any_of(True) and not distributed.any_of(False)
    assert distributed.summed(values) is values and values.tolist() == [1.0, 2.0]
    with distributed.joined(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
