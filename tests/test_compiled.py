"""The report of a compiled step: memory, collectives, work; and machines by name."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from configs import mixture
from sam2_jax import compiled, hlo, memory_estimate, recipe, sharding, suggest, topology
from sam2_jax import config as config_lib
from sam2_jax.model.kernels import Kernel
from sam2_jax.types import UserError
from scripts import compile_report
from tests.offline import without_compilation_cache  # noqa: F401
from tests.small_step import DEVICES, small_config


@functools.cache
def small_report(frames):
    return compiled.report(small_config(frames), topology.open_target(f"cpu:{DEVICES}"))


def test_report():
    found = small_report(2)
    assert found["mesh"] == {"data": 2, "fsdp": 2, "model": 1}
    assert (found["devices"], found["frames"], found["objects"]) == (DEVICES, 2, 1)
    state = sum(found["state_bytes"].values())
    # A video of two frames: images, masks, validity; step, counts and key are small
    batch = 2 * 64 * 64 * (3 + 1) + 1
    assert state + batch <= found["argument_bytes"] <= state + batch + 1000
    assert found["alias_bytes"] >= 0.99 * state  # donated
    peak = found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"]
    assert found["peak_bytes"] == peak + found["temp_bytes"] + found["generated_code_bytes"]
    assert found["hbm_bytes"] is None and found["fits"] is None
    assert set(found["flops_by_plan"]) == {"mask1"}
    assert found["loops_counted_once"] == 0
    assert found["topology"] == f"cpu:{DEVICES}" and found["attention"]
    assert (found["variant"], found["resolution"]) == ("nano", 64)
    assert found["bytes_accessed"] > found["argument_bytes"] and found["compile_seconds"] > 0
    assert found["optimal_seconds"] is None  # of CPUs XLA has no estimate
    assert "not known" in suggest.report_table(found)


@pytest.mark.usefixtures("without_compilation_cache")
def test_the_script_prints_one_json_object(monkeypatch, capsys):
    """Or a table; what it is given as flags is in the config that is reported."""
    asked = []

    def report(config, target):
        asked.append((config.data.batch_size, config.model.attention, target.name))
        return small_report(2)

    name = f"cpu:{DEVICES}"
    given = {"topology": name, "videos_per_device": 3, "attention": "blockwise"}
    given |= {"table": False, "suggest": False}
    for flag, value in given.items():
        holder = "_" + flag.split("_")[0].upper()
        monkeypatch.setattr(compile_report, holder, SimpleNamespace(value=value))
    monkeypatch.setattr(compiled, "report", report)
    compile_report.main(small_config())
    assert json.loads(capsys.readouterr().out) == small_report(2)
    monkeypatch.setattr(compile_report, "_TABLE", SimpleNamespace(value=True))
    compile_report.main(small_config())
    table = capsys.readouterr().out
    assert "reduce-scatter" in table and "not known" in table
    assert asked == [(3 * DEVICES, "blockwise", name)] * 2


def test_parameters_are_gathered_once_whatever_the_frames():
    few, many = small_report(2), small_report(4)
    assert few["collectives"] == many["collectives"]


def test_no_more_is_sent_than_must_be():
    """One gather, one reduce-scatter, one sum of the shards; some scalars beside them."""
    found = small_report(2)
    sent = found["sent_bytes"]
    assert sent == hlo.sent(found["collectives"])
    assert found["least_collective_bytes"] * 0.99 <= sent <= 1.2 * found["least_collective_bytes"]


def test_the_least_counts_devices_that_share_a_video():
    def least(fsdp, model, videos):
        config = small_config(fsdp=fsdp, **{"mesh.model": model, "data.batch_size": videos})
        return compiled.least_collective_bytes(config, compiled.make_parts(config, jax.devices()))

    assert least(2, 2, 2) == least(2, 1, 4)
    assert least(1, 4, 1) == least(1, 1, 4) > 0


def test_attention_is_told_by_part_and_real_size():
    def told(kernel, **changes):
        usual: dict[str, Any] = {"model.attention_dropout": 0.0, "model.resolution": 1024}
        usual |= {"train.precision": "bfloat16"} | changes
        config = small_config(**usual)
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        model = recipe.make_config_model(config, mesh).clone(kernel=kernel)
        return recipe.describe_attention(config, model).split("; ")

    h100 = Kernel("auto", "gpu", (9, 0))
    own, earlier = "memory, itself", "memory, earlier frames"
    assert told(h100) == ["trunk: cudnn", f"{own}: cudnn", f"{earlier}: cudnn"]
    # Longer than the bank: with a mask
    assert told(h100, frames=9) == ["trunk: cudnn", f"{own}: cudnn", f"{earlier}: blockwise"]
    dropped = told(h100, **{"model.attention_dropout": 0.1})
    assert dropped == ["trunk: cudnn", f"{own}: blockwise", f"{earlier}: blockwise"]
    small = told(h100, **{"model.resolution": 256})
    assert small == ["trunk: xla", f"{own}: xla", f"{earlier}: blockwise"]
    assert told(h100, frames=1) == ["trunk: cudnn"]


def test_state_bytes_fall_with_fsdp():
    sizes = []
    for fsdp in (1, 2, 4):
        config = small_config(fsdp=fsdp)
        parts = compiled.make_parts(config, jax.devices()[:DEVICES])
        sizes.append(memory_estimate.sharded_bytes(parts.state, parts.mesh))
    for name in ("parameters", "optimizer"):
        whole, half, quarter = (each[name] for each in sizes)
        # What is large enough is shared; nano has more of the rest than any other
        shared = 2 * (whole - half)
        assert shared > 0.7 * whole
        assert quarter == pytest.approx(whole - 0.75 * shared, rel=0.02)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h10:8", "did you mean 'h100'"),
        ("h100:12", "a multiple of 8"),
        ("h100:x", "no machine of 'x' devices"),
        ("h100", "no machine of '' devices"),
        ("h100:８", "no machine of '８' devices"),
        ("cpu:0", "no machine of '0' devices"),
        ("v5e:32x32", "there is no slice '32x32' of v5e"),
        ("v6e:04x4", "there is no slice '04x4' of v6e"),
        ("v5e:4x4x4", "there is no slice '4x4x4' of v5e"),
        ("v5p:banana", "2x2x4"),
    ],
)
def test_machines_that_there_are_not(name, words):
    with pytest.raises(UserError, match="--topology=" + name) as e:
        topology.open_target(name)
    assert words in str(e.value)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("a100:1", "cuda")])
def test_compilers_that_are_not_installed(monkeypatch, name, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"'\.\[{extra}\]'"):
        topology.open_target(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("a100:1", "cuda")])
def test_compilers_of_another_version(monkeypatch, name, extra):
    def broken(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", broken)
    with pytest.raises(UserError, match=rf"not implemented.* '\.\[{extra}\]'"):
        topology.open_target(name)


def test_meshes_and_batches_that_do_not_fit():
    target = topology.open_target(f"cpu:{DEVICES}")
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        compiled.make_parts(small_config(fsdp=3), target.devices)
    with pytest.raises(UserError, match="data.batch_size=2 must be a multiple of"):
        compiled.make_parts(small_config(**{"data.batch_size": 2}), target.devices)


def test_memory_that_the_compiler_misses():
    """Its own words for TPUs."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    assert compiled._needed_bytes(message) == int(20.5 * 2**30)
    assert compiled._needed_bytes("INTERNAL: no such kernel") == 0


def test_a_report_without_a_program_has_the_same_rows(monkeypatch):
    def refuse(*_):
        message = "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G)"
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message} exceeds available HBM.")

    monkeypatch.setattr(compiled, "compile_step", refuse)
    target = topology.open_target(f"cpu:{DEVICES}")._replace(hbm_bytes=50, usable_bytes=50)
    found = compiled.report(small_config(), target, count_work=False)
    assert found["fits"] is False and found["loops_counted_once"] is None
    assert found.keys() == small_report(2).keys()
    assert "20.50 GiB" in suggest.report_table(found)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, NotImplementedError])
def test_what_cannot_be_compiled_is_said(monkeypatch, error):
    def refuse(*_):
        raise error("heads of 512 channels")

    monkeypatch.setattr(compiled, "compile_step", refuse)
    target = topology.open_target(f"cpu:{DEVICES}")
    with pytest.raises(UserError, match=f"{target.name} cannot compile this step: heads of 512"):
        compiled.report(small_config(), target, count_work=False)


def test_kernels_that_are_not_in_the_estimate_are_told():
    found = small_report(2) | {"estimated_seconds": 0.5, "kernels_without_estimate": 12}
    assert suggest.words(found).endswith("about 0.5 s a step and its kernels")
    assert "12 kernel calls" in suggest.report_table(found)


def test_every_host_is_a_process(monkeypatch):
    """As in training: it loads videos, whole ones."""
    asked, mesh = [], sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: mesh)
    monkeypatch.setattr(sharding, "check_batch_size", lambda *given: asked.append(given) or 1 / 0)
    config = small_config(**{"train.accumulate": 2})
    with pytest.raises(ZeroDivisionError):
        compiled.make_parts(config, [SimpleNamespace(process_index=i // 4) for i in range(16)])
    assert asked == [(DEVICES, mesh, 4, 2, "data.batch_size")]


def test_all_sources_of_a_mixture_are_dealt_out():
    config = mixture.get_config("nano")
    config.data.mixture.sa1b.batch_size = 3
    with pytest.raises(UserError, match="data.mixture.sa1b.batch_size=3 must be a multiple of"):
        compiled.make_parts(config_lib.finish(config), jax.devices()[:DEVICES])


def test_of_a_mixture_the_heaviest_source_is_reported():
    config = mixture.get_config("nano")
    config.model.resolution = 64
    config = config_lib.finish(config)
    name, source = compiled.heaviest_source(config)
    assert name == "sav" and source.num_frames > 1
    shapes = compiled.batch_shapes(config, 2)
    assert shapes.masks.shape == (2, source.num_frames, source.max_objects, 64, 64)
