"Backbones of equal arithmetic: the search, what its overrides build, and what a step of them keeps alive"

import pytest
import torch

from mednext_v2.core import lists_to_tuples, read_yaml
from mednext_v2.models.registry import cost, create
from mednext_v2.network.blocks import MedNeXtBlock
from mednext_v2.study.budget import BUDGET, FAMILIES, PATCH, Family, budget_table, profile_backbones, scale_to_budget, step_memory


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "What a profile would hold, read back from its text"
    path = tmp_path_factory.mktemp("budget") / "backbones.yaml"
    path.write_text(profile_backbones())
    return read_yaml(path)["backbones"]


def test_eight_families_stay_within_a_quarter_of_the_budget_as_the_registry_counts():
    assert {"mednext_v2_base", "unet", "resenc_l", "stunet_base", "segresnet", "unetr"} < set(FAMILIES) and len(FAMILIES) >= 8
    assert any(name.startswith("mednext_v1") for name in FAMILIES)
    for name, family in FAMILIES.items():
        found = scale_to_budget(family)
        counted = cost(name, PATCH, 1, 6, **found.overrides)
        assert (found.flops, found.parameters) == (counted.flops, counted.parameters)
        assert 0.1875e9 <= found.flops <= 0.3125e9 and found.overrides == family.overrides(found.width)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_neighbour_of_the_width_is_nearer(name):
    found = scale_to_budget(FAMILIES[name])
    miss = max(found.flops / BUDGET, BUDGET / found.flops)
    for width in (found.width - 1, found.width + 1):
        if width in FAMILIES[name].widths:
            other = cost(name, PATCH, 1, 6, **FAMILIES[name].overrides(width)).flops
            assert max(other / BUDGET, BUDGET / other) >= miss


def test_v1_and_v2_differ_in_grn_alone_with_the_ratios_and_kernel_of_the_paper(written):
    old, new = (create(name, 1, 6, **written[name]) for name in ("mednext_v1_large", "mednext_v2_base"))
    blocks = [[part for part in net.modules() if isinstance(part, MedNeXtBlock)] for net in (old, new)]
    assert old.arch.ratios == new.arch.ratios == (3, 4, 8, 8, 8, 8, 8, 4, 3)
    assert old.arch.kernel == new.arch.kernel == 3 and create("mednext_v1_large_k5", 1, 6, **written["mednext_v1_large_k5"]).arch.kernel == 5
    assert len(blocks[0]) == len(blocks[1]) == 17
    names = [{key for key, _ in net.named_parameters()} for net in (old, new)]
    assert names[0] < names[1] and all("grn" in key for key in names[1] - names[0]) and len(names[1] - names[0]) == 2 * 17


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_profile_holds_builds_a_network_that_learns_from_every_head(name, written):
    torch.manual_seed(0)
    network = create(name, 1, 6, True, **written[name])
    assert all(side % network.stride == 0 for side in PATCH)
    outputs = network.train()(torch.randn(1, 1, *PATCH))
    assert (len(outputs) > 1) == FAMILIES[name].supervised and outputs[0].shape == (1, 6, *PATCH)
    sum(one.square().mean() for one in outputs).backward()
    assert [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None] == []


def test_a_family_that_cannot_meet_the_budget_is_refused_with_what_it_takes():
    steep = Family("unet", lambda width: {"filters": [16 * width] * 5}, range(1, 9))
    with pytest.raises(ValueError, match=r"unet: no width takes 0.25 GFLOP within 25%; the nearest, width 1, takes [\d.]+: change its overrides"):
        scale_to_budget(steep)
    with pytest.raises(ValueError, match="no width is given"):
        scale_to_budget(Family("unet", FAMILIES["unet"].overrides, ()))


def test_another_budget_gives_other_widths_and_the_table_says_so():
    some = {name: FAMILIES[name] for name in ("unet", "stunet_base")}
    small, large = (budget_table(some, budget, memory=False) for budget in (0.25e9, 1e9))
    assert (large.width > small.width).all() and large.GFLOP.between(0.75, 1.25).all()
    assert small["step (MB)"].isna().all() and small["deep supervision"].all()


def test_memory_of_a_step_grows_with_patch_and_batch_and_is_the_same_twice():
    def taken(patch, batch):
        torch.manual_seed(0)
        return step_memory(create("unet", 1, 6, True, **lists_to_tuples(FAMILIES["unet"].overrides(2))), patch, batch)

    once = taken((32, 32, 32), 2)
    assert once == taken((32, 32, 32), 2)
    assert 1.8 < once / taken((32, 32, 32), 1) < 2.1 and 1.8 < taken((64, 32, 32), 2) / once < 2.1
    assert once > 2 * 32**3 * 4 * 6 * 2  # Logits and their gradient at least
