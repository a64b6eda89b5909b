"""Every context-parallel group of every tier, made once at start-up inside the data-parallel group.

Megatron-LM keeps its static context_parallel_size of 1; a gang of c ranks is c consecutive ranks of the data-parallel
group, aligned to c, so that a degree up to the node's size never crosses nodes when the data-parallel ranks don't.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_hbp.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class CpGroups:
    """The groups this rank belongs to, by degree."""

    by_degree: dict[int, dist.ProcessGroup]
    num_created: int
    """Communicators newly made on this rank; groups equal to the data-parallel group are shared with it."""

    def group(self, cp_degree: int) -> dist.ProcessGroup | None:
        """The group of this rank's gang at `cp_degree`; None at degree 1, which needs none."""
        return None if cp_degree == 1 else self.by_degree[cp_degree]

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
