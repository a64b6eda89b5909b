"""Every context-parallel group of every tier, made once at start-up inside the data-parallel group.

Megatron-LM keeps its static context_parallel_size of 1; a gang of c ranks is c consecutive ranks of the data-parallel
group, aligned to c, so that a degree up to the node's size never crosses nodes when the data-parallel ranks don't.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_hbp.errors import ConfigError

NCCL_GIB = 0.6
"""Device memory of one NCCL communicator: 0.5 to 0.7 GB have been seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CpGroups:
    """The groups this rank belongs to, by degree."""

    by_degree: dict[int, dist.ProcessGroup]
    num_created: int
    """Communicators newly made on this rank; groups equal to the data-parallel group are shared with it."""

    device_gib: float | None = None
    """Device memory that the warm-up took on this rank, in GiB; None without CUDA."""

    def group(self, cp_degree: int) -> dist.ProcessGroup | None:
        """The group of this rank's gang at `cp_degree`; None at degree 1, which needs none."""
        return None if cp_degree == 1 else self.by_degree[cp_degree]

    def warm_up(self, device: torch.device) -> "CpGroups":
        """Use every group once, so that connections and their memory come now and not in the first step.

        Collective over the groups, degree by degree: all ranks meet in the same order.
        """
        before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        for degree in sorted(self.by_degree):
            group = self.by_degree[degree]
            sent = torch.zeros(degree, device=device)
            dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
        if device.type != "cuda":
            return self
        torch.cuda.synchronize(device)
        return replace(self, device_gib=(before - torch.cuda.mem_get_info(device)[0]) / 2**30)

    def describe(self, node_size: int) -> str:
        """One line for the log: groups, what they cost, and which of them reach over nodes of `node_size` ranks."""
        if not self.by_degree:
            return "no CP groups: every tier has CP degree 1"
        nodes = {
            degree: len({rank // node_size for rank in dist.get_process_group_ranks(group)})
            for degree, group in self.by_degree.items()
        }
        places = ", ".join(f"{c} in {n} node{'s' * (n > 1)}" for c, n in sorted(nodes.items()))
        if self.device_gib is not None:
            memory = f"{self.device_gib:.2f} GiB of device memory"
        else:
            memory = f"about {self.num_created * NCCL_GIB:.1f} GiB of device memory under NCCL"
        split = [c for c, n in nodes.items() if n > 1 and c <= node_size]
        warning = (
            f"; WARNING: degree {', '.join(map(str, split))} would fit into a node but does not lie in one: "
            f"choose tensor parallelism and node size so that the degree divides the data-parallel ranks of a node"
            if split
            else ""
        )
        return (
            f"CP groups on rank 0: degree {places}; {self.num_created} new communicators, "
            f"{len(self.by_degree) - self.num_created} shared, {memory}{warning}"
        )

    @staticmethod
    def create(cp_degrees: Iterable[int], dp_group: dist.ProcessGroup, timeout: timedelta) -> "CpGroups":
        """Make the groups of `cp_degrees` inside every data-parallel group of the world. Collective over the world.

        `new_group` must be called by all ranks for every group, also for those they are not in, and it doesn't inherit
        the world's timeout, hence the explicit one.

        Raises:
            ConfigError: a degree does not divide the data-parallel size.
        """
        mine = dist.get_process_group_ranks(dp_group)
        all_dp_ranks: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(all_dp_ranks, mine)
        dp_groups = sorted({tuple(ranks) for ranks in all_dp_ranks})

        by_degree: dict[int, dist.ProcessGroup] = {}
        num_created = 0
        for degree in sorted(set(cp_degrees) - {1}):
            if len(mine) % degree:
                raise ConfigError(
                    f"a tier has CP degree {degree}, but there are {len(mine)} data-parallel ranks (world "
                    f"{dist.get_world_size()}); the degree must divide them: change --tiers or the number of ranks"
                )
            if degree == len(mine):
                by_degree[degree] = dp_group
                continue
            for ranks in dp_groups:
                for start in range(0, len(ranks), degree):
                    gang = list(ranks[start : start + degree])
                    group = dist.new_group(gang, timeout=timeout, group_desc=f"HBP_CP{degree}")
                    if dist.get_rank() in gang:
                        by_degree[degree] = group
                        num_created += 1
        return CpGroups(by_degree=by_degree, num_created=num_created)
