"""Machines and topologies: which links a group uses, what does not divide."""

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import H100, Topology


def test_the_slowest_link_of_a_group_decides():
    assert [H100.bandwidth(ranks) for ranks in (2, 8, 9, 16)] == [129e9, 129e9, 45e9, 45e9]


def test_ranks_of_several_gpus_have_their_speed_and_links_and_a_node_holds_fewer():
    four = H100.of_ranks(4)
    for name in ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth", "memory_bandwidth"):
        assert getattr(four, name) == 4 * getattr(H100, name), name
    assert (four.node_size, four.memory, four.memory_reserve) == (2, H100.memory, H100.memory_reserve)
    assert H100.of_ranks(16).node_size == 1
    assert H100.of_ranks(1) == H100


def test_a_topology_of_ranks_fills_nodes_or_has_smaller_ones():
    four_nodes = Topology.of_ranks(32)
    assert (four_nodes.num_nodes, four_nodes.gpus_per_node) == (4, 8)
    assert (Topology.of_ranks(4).num_nodes, Topology.of_ranks(4).gpus_per_node) == (1, 4)
    assert (Topology.of_ranks(12).num_nodes, Topology.of_ranks(12).gpus_per_node) == (3, 4)
    cut = Topology.of_ranks(8, tp=2, pp=2, ep=4)
    assert (cut.num_gpus, cut.num_ranks, cut.ranks_per_node, cut.ep) == (32, 8, 4, 4)
    assert [cut.crosses_nodes(ranks) for ranks in (4, 8)] == [False, True]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"num_nodes": 0}, "num_nodes must be at least 1"),
        ({"num_nodes": 4, "tp": 3}, "do not divide into tensor-parallel groups of 3"),
        ({"num_nodes": 4, "virtual_stages": 2}, "virtual stages need a pipeline"),
        ({"num_nodes": 1, "pp": 3}, "8 GPUs do not divide by TP 1 x PP 3"),
        ({"num_nodes": 512, "pp": 4096}, "PP 4096 x 1 virtual stages are more than 1024 chunks"),
        ({"num_nodes": 4, "ep": 5}, "32 data-parallel ranks do not divide by EP 5"),
    ],
)
def test_what_does_not_divide_is_refused(topology, message):
    with pytest.raises(ConfigError, match=message):
        Topology(**topology)
