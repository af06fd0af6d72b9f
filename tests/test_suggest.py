"""The search for the fastest setting that fits; reports are made up."""

import pytest

from sam2_jax import compiled, sharding, suggest, topology
from sam2_jax.types import UserError
from tests.small_step import DEVICES, small_config


def made_up(need, **more):
    """A report of memory alone, by a function of the config; others give more rows."""

    def report(config, target, count_work):
        peak = need(config)
        base = {"hbm_bytes": 50, "estimated_seconds": None, "sent_bytes": 0}
        base["kernels_without_estimate"] = 0
        base |= {name: tell(config) for name, tell in more.items()}
        return base | {"peak_bytes": peak, "fits": peak <= target.usable_bytes}

    return report


def test_the_last_resort_is_to_share_among_more_than_eight(monkeypatch):
    target = topology.open_target(f"cpu:{DEVICES}")._replace(
        hbm_bytes=50, usable_bytes=50, devices=[None] * 64
    )
    config, said = small_config(fsdp=1, **{"data.batch_size": 64}), []
    monkeypatch.setattr(compiled, "report", made_up(lambda c: 1600 // c.mesh.fsdp))
    found = suggest.search(config, target, said.append)
    assert "fsdp=32" in found["flags"] and "remat=full" in found["flags"]
    assert len(found["settings"]) == 3 + 3 + 2 and said[0] == "at most 9 compilations"
    monkeypatch.setattr(compiled, "report", made_up(lambda c: 80 // c.mesh.fsdp))
    assert len(suggest.search(config, target, said.append)["settings"]) == 3 + 1


@pytest.mark.parametrize("size", [0, -1, 3])
def test_suggest_says_what_is_wrong_with_the_mesh(size):
    config = small_config(fsdp=1)
    config.mesh.model = size
    with pytest.raises(UserError, match=f"mesh.model={size}"):
        list(suggest.settings(config, DEVICES))


def test_search_ranks_what_fits(monkeypatch):
    """Memory of every setting is made up: `none` fits nowhere, `frame` with parameters split."""

    def need(config):
        whole = {"none": 100, "frame": 60, "full": 30}[config.train.remat]
        return whole - 20 * (config.mesh.fsdp > 1)

    monkeypatch.setattr(compiled, "report", made_up(need))
    target = topology.open_target(f"cpu:{DEVICES}")._replace(hbm_bytes=50, usable_bytes=50)
    said = []
    found = suggest.search(small_config(fsdp=1), target, said.append)
    assert said[0] == "at most 6 compilations"
    assert "fsdp=4" in found["flags"] and "remat=frame" in found["flags"]
    # Per mesh: up to the first that fits
    assert len(found["settings"]) == 3 + 2
    assert [row["fits"] for row in found["settings"]] == [True, True, False, False, False]
    with pytest.raises(UserError, match="nothing fits.*train.segment"):
        suggest.search(small_config(fsdp=1), target._replace(usable_bytes=5), said.append)


@pytest.mark.parametrize("kernels", [0, 12])
def test_an_estimate_without_its_kernels_ranks_nothing(monkeypatch, kernels):
    """Whole, parameters leave room for `full` alone; split, for `frame`, which is said to be slow.

    It runs the kernels once less than `full`; their time is in neither estimate.
    """
    need = {(1, "full"): 30, (4, "frame"): 40}
    report = made_up(
        lambda c: need.get((c.mesh.fsdp, c.train.remat), 100),
        estimated_seconds=lambda c: {"none": 3.0, "frame": 2.0, "full": 1.0}[c.train.remat],
        kernels_without_estimate=lambda c: kernels * (1 + (c.train.remat == "full")),
    )
    monkeypatch.setattr(compiled, "report", report)
    target = topology.open_target(f"cpu:{DEVICES}")._replace(hbm_bytes=50, usable_bytes=50)
    found = suggest.search(small_config(fsdp=1), target, lambda text: None)
    assert f"remat={'frame' if kernels else 'full'}" in found["flags"]


@pytest.mark.parametrize(
    ("videos", "given", "model"), [(4, 1, 1), (8, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 2), (3, 1, 4)]
)
def test_devices_share_videos_where_these_are_fewer(monkeypatch, videos, given, model):
    config = small_config(fsdp=1, **{"data.batch_size": videos, "mesh.model": given})
    ladders = [*suggest.settings(config, DEVICES), suggest.last_resort(config, DEVICES)]
    found = [setting for ladder in ladders for setting in ladder]
    assert {setting.model for setting in found} == {model}
    assert all(videos // (DEVICES // model) % setting.accumulate == 0 for setting in found)
    asked = []
    monkeypatch.setattr(compiled, "report", made_up(lambda c: asked.append(c.mesh) or 1))
    target = topology.open_target(f"cpu:{DEVICES}")._replace(hbm_bytes=50, usable_bytes=50)
    flags = suggest.search(config, target, lambda text: None)["flags"]
    assert (f"--config.mesh.model={model}" in flags) == (model > 1)
    for mesh in asked:
        mesh = sharding.make_mesh(mesh.data, mesh.fsdp, mesh.model, target.devices)
        sharding.check_batch_size(videos, mesh)


def test_what_cannot_be_compiled_is_passed_over(monkeypatch):
    target = topology.open_target(f"cpu:{DEVICES}")._replace(hbm_bytes=50, usable_bytes=50)
    usual, said = made_up(lambda c: 40), []

    def report(config, target, count_work):
        if config.mesh.fsdp == 1 or config.train.remat == "none":
            raise UserError("no such kernel")
        return usual(config, target, count_work)

    monkeypatch.setattr(compiled, "report", report)
    found = suggest.search(small_config(), target, said.append)
    assert "mesh.fsdp=4" in found["flags"] and "remat=frame" in found["flags"]
    assert f"--config.data.batch_size={DEVICES}" in found["flags"]
    assert "--config.model.attention=auto" in found["flags"]
    assert sum("cannot be: no such kernel" in line for line in said) == 1
    assert any("mesh.fsdp are searched for" in line for line in said)
    assert sum("cannot be: the same" in line for line in said) == 3
    monkeypatch.setattr(compiled, "report", lambda *_, **__: report(small_config(fsdp=1), 0, 0))
    with pytest.raises(UserError, match="no setting .*: no such kernel; or take more videos"):
        suggest.search(small_config(), target, said.append)


def test_the_memory_of_a_cpu_is_not_known():
    with pytest.raises(UserError, match="--suggest"):
        suggest.search(small_config(), topology.open_target("cpu:2"), print)
