"""Balance losses under dynamic CP: mixed degrees and other padding leave them as they are at CP 1 on the same packs."""

from typing import Any

from megatron_hbp.planning.core.tiers import Recompute, Tier
from tests.equivalence.support.factors import Case
from tests.equivalence.support.models import VOCABULARY, build
from tests.equivalence.support.packs_of_case import LENGTHS, degrees_of, packs_of
from tests.equivalence.support.plans import MemoryStore
from tests.equivalence.support.stepping import Stepper, laid_out, worst

LOSSES: dict[str, dict[str, Any]] = {
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "z_loss": {"moe_z_loss_coeff": 0.1},
}
CASES = (
    Case(model="moe", cp="mixed", ep="2", ranks=4),
    Case(model="moe", cp="mixed", tp="2", ranks=4),
    Case(model="moe", cp="mixed", pp="2", ranks=4),
)


def errors() -> dict[str, float]:
    """{case and loss: error of a gradient}; "matters" is what leaving the loss out changes."""
    found: dict[str, float] = {}
    for case in CASES:
        packs = [pack for pack in packs_of(case) if pack[0] == 0]
        at_cp1 = [(0, slot, rank0, tier, samples) for slot, (_, _, rank0, tier, samples) in enumerate(packs)]
        degrees = degrees_of(case)
        tiers = [Tier(packing_length=64 * c, cp_degree=c) for c in degrees]
        recomputed = [
            Tier(packing_length=64 * c, cp_degree=c, recompute=Recompute(granularity="full", num_layers=1))
            for c in degrees
        ]
        with laid_out(tp=int(case.tp), pp=case.stages, ep=int(case.ep)):
            without = stepper_of(case).gradients(packs, tiers)
            for loss, changes in LOSSES.items():
                stepper = stepper_of(case, **changes)
                yard = stepper.gradients(at_cp1, [Tier(packing_length=64 * c) for c in degrees])
                name = f"{' '.join(case.cells()[:5])}: {loss}"
                found[name] = worst(stepper.gradients(packs, tiers), yard)
                found[f"{name}, padded"] = worst(stepper.gradients(packs, tiers, extra_unit=8), yard)
                found[f"{name}, recomputed"] = worst(stepper.gradients(packs, recomputed), yard)
                found[f"{name} matters"] = worst(without, yard)
    return found


def stepper_of(case: Case, **changes: Any) -> Stepper:
    """A model of one dense and one MoE layer; the log of the losses is as long as the first model that it sees."""
    chunks = build("moe", num_layers=2, **changes)
    return Stepper(chunks, MemoryStore.random(LENGTHS, vocabulary=VOCABULARY), degrees_of(case))
