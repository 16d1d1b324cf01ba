"""Shards and batches of an order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptqd_export.farm.order import Order, usual_shard_size


def test_shards_cover_every_sample_once(order: Order) -> None:
    for n in (1, 3, 4, 5, 11, 12):
        shards = order.shards(n)
        assert [i for shard in shards for i in shard.samples] == list(range(n))
        assert {len(shard.samples) for shard in shards[:-1]} <= {4}
        # batches are those of one run over all of them
        batches = [list(batch) for shard in shards for batch in order.batches(shard)]
        assert batches == [list(range(i, min(i + 2, n))) for i in range(0, n, 2)]
    assert [order.file(shard) for shard in order.shards(5)] == ["shard-000000.tar", "shard-000001.tar"]
    assert replace(order, format="parquet").file(order.shards(1)[0]) == "shard-000000.parquet"


@pytest.mark.parametrize(
    ("samples", "batch", "rows"),
    [(1, 16, 16), (10_000, 16, 48), (1_000_000, 16, 1024), (1_000_000, 3, 1026), (100, 1, 1)],
)
def test_usual_shard_size(samples: int, batch: int, rows: int) -> None:
    assert usual_shard_size(samples, batch) == rows and rows % batch == 0
