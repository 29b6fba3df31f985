"""SyncBatchNorm on a CPU in a process group of one rank, for which torch's own raises."""

import torch
import torch.distributed as dist
from torch import nn

from tolerances import EXACT, assert_close
from tritonq.nn.batch_norm import SyncBatchNorm


def test_one_rank_normalises_as_one_process(tmp_path):
    x, plain, bn = torch.randn(4, 3, 5, 5), nn.BatchNorm2d(3), SyncBatchNorm(3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_close(bn(x), plain(x), EXACT)
    finally:
        dist.destroy_process_group()
    assert torch.equal(bn.running_var, plain.running_var)
