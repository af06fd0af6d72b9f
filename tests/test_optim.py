"""Clipping, layer decay, parts of the tree; AdamW against one written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import optim, rules, updates
from sam2_jax.types import PromptPlan, UserError

# float32 against float64 arithmetic over a dozen steps
RELATIVE = 2e-5
PARAMS = {
    "image_encoder": {
        "trunk": {"qkv": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (4,), "bias": (4,)}},
        "neck": {"norm": {"weight": (3,), "bias": (3,)}},
    },
    "memory_attention": {"kernel": (3, 3), "norm": {"scale": (3,)}},
    "memory_encoder": {"kernel": (2, 2)},
    "obj_ptr_proj": {"kernel": (2, 2)},
    "obj_ptr_tpos_proj": {"kernel": (2, 2)},
    "mask_downsample": {"kernel": (2, 2), "bias": (1,)},
    "sam_prompt_encoder": {"gaussian": (2, 4)},
    "maskmem_tpos_enc": (7, 2),
    "no_mem_embed": (2,),
    "no_mem_pos_enc": (2,),
    "no_obj_ptr": (2,),
    "no_obj_embed_spatial": (2,),
}
SETTINGS = optim.OptimSettings(
    learning_rate=(
        (("image_encoder/*",), ("cosine", 3e-2, 3e-3)),
        (("*",), ("cosine", 5e-2, 5e-3)),
    ),
    weight_decay=((("*bias*", "*/scale"), 0.0), (("*",), 0.1)),
    frozen=("*/gaussian",),
    layer_decay=1.0,
    layer_decay_min=0.0,
    layer_decay_overrides=(),
    steps=20,
    warmup_steps=0,
    clip_norm=0.1,
)


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree) -> dict[str, np.ndarray]:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return dict(zip(rules.paths_of(tree), leaves, strict=True))


def plan(is_cond: list[bool], points: bool) -> PromptPlan:
    t = len(is_cond)
    none = jnp.zeros(t, bool)
    return PromptPlan(
        jnp.arange(t, dtype=jnp.int32),
        jnp.asarray(points),
        jnp.asarray(is_cond),
        none,
        none,
        jnp.zeros((t, 7), bool),
    )


SINGLE = plan([True], True)
CLICKS = plan([True, False, False], True)
MASKS = plan([True, True, False], False)
UNTOUCHED = {  # by the reference: gradient None
    "single": ("memory_", "maskmem", "obj_ptr", "no_obj", "mask_down", "no_mem_pos"),
    "clicks": ("mask_down", "no_mem_pos"),
    "masks": ("no_mem_embed", "no_mem_pos"),
}
PLANS = {"single": SINGLE, "clicks": CLICKS, "masks": MASKS}


def adamw(kinds: list[str], start: dict, grads: list[dict]) -> dict[str, np.ndarray]:
    """AdamW as torch does it, in float64: untouched parameters are skipped altogether."""
    s = SETTINGS
    params = flat(start)
    count = dict.fromkeys(params, 0)
    mean = {k: np.zeros_like(v) for k, v in params.items()}
    square = {k: np.zeros_like(v) for k, v in params.items()}
    for step, (kind, grad) in enumerate(zip(kinds, grads, strict=True)):
        touched = {
            k: v
            for k, v in flat(grad).items()
            if not k.startswith(UNTOUCHED[kind]) and not k.endswith("gaussian")
        }
        norm = np.sqrt(sum((v**2).sum() for v in touched.values()))
        clip = min(1.0, s.clip_norm / (norm + 1e-6))
        for k, g in touched.items():
            encoder = k.startswith("image_encoder/")
            lo, hi = (3e-3, 3e-2) if encoder else (5e-3, 5e-2)
            rate = lo + 0.5 * (hi - lo) * (1 + np.cos(np.pi * step / s.steps))
            decay = 0.0 if "bias" in k or k.endswith("/scale") else 0.1
            count[k] += 1
            mean[k] = 0.9 * mean[k] + 0.1 * g * clip
            square[k] = 0.999 * square[k] + 0.001 * (g * clip) ** 2
            params[k] *= 1 - rate * decay
            bias2 = 1 - 0.999 ** count[k]
            params[k] -= (
                rate * mean[k] / (1 - 0.9 ** count[k]) / (np.sqrt(square[k] / bias2) + 1e-8)
            )
    return params


def zero_untouched(kind: str, grads: dict) -> dict:
    """What jax.grad gives where the reference has None."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, g: g * 0 if rules.path_of(keys).startswith(UNTOUCHED[kind]) else g, grads
    )


def run(kinds: list[str], settings=SETTINGS):
    start = draw(0)
    grads = [draw(1 + i) for i in range(len(kinds))]
    optimizer = optim.make_optimizer(settings, start, "2.1")

    @jax.jit
    def update(params, state, grad, the_plan):
        active = optim.active_groups(the_plan)
        updates, state = optimizer.tx.update(grad, state, params, active=active)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = start, optimizer.tx.init(start)
    for kind, grad in zip(kinds, grads, strict=True):
        params, state = update(params, state, zero_untouched(kind, grad), PLANS[kind])
    return start, grads, params, state


def test_adamw_over_mixed_plans_equals_a_plain_implementation():
    kinds = ["single", "clicks", "masks", "single", "single", "masks", "clicks", "single"]
    start, grads, params, _ = run(kinds)
    want = adamw(kinds, start, grads)
    for path, value in flat(params).items():
        np.testing.assert_allclose(value, want[path], rtol=RELATIVE, atol=RELATIVE, err_msg=path)


def test_untouched_parameters_keep_value_moments_and_count():
    start, _, params, state = run(["single"] * 3)
    begun, ended = flat(start), flat(params)
    for path in begun:
        moved = not np.array_equal(begun[path], ended[path])
        expected = not path.startswith(UNTOUCHED["single"]) and not path.endswith("gaussian")
        assert moved == expected, path
    leaves = own(state)
    assert set(leaves) == {path for path in begun if not path.endswith("gaussian")}
    for path, leaf in leaves.items():
        untouched = path.startswith(UNTOUCHED["single"])
        assert leaf.count == (0 if untouched else 3), path
        assert leaf.nu.any() != untouched, path


def is_group(x) -> bool:
    return isinstance(x, updates.UpdateState)


def groups_of(state) -> list[updates.UpdateState]:
    return [x for x in jax.tree.leaves(state, is_leaf=is_group) if is_group(x)]


def own(state) -> dict:
    """Moments and count of each parameter, by its path, from the groups of the whole optimizer."""
    found = {}
    for kind in (kind for group in groups_of(state) for kind in group.kinds.values()):
        adam = jax.tree.leaves(kind, is_leaf=lambda x: hasattr(x, "nu"))[0]
        moments = flat(adam.mu), flat(adam.nu)
        found |= {
            path: adam._replace(mu=moments[0][path], nu=moments[1][path]) for path in moments[0]
        }
    return found


def test_frozen_parameters_have_no_moments_and_do_not_count_in_the_clip():
    _, _, params, state = run(["clicks"])
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    trained = sum(x.size for x in jax.tree.leaves(params)) - 2 * 4
    # Steps of every group, and updates of each of its kinds
    counts = sum(1 + len(group.kinds) for group in groups_of(state))
    assert sum(sizes) == 2 * trained + counts


def test_a_part_of_the_tree_is_updated_as_in_the_whole():
    settings = SETTINGS._replace(frozen=("image_encoder/neck/*",))
    optimizer = optim.make_optimizer(settings, draw(0), "2.1")
    active = optim.active_groups(CLICKS)

    def update(grads, params):
        state = optimizer.tx.init(params)
        changes, _ = jax.jit(optimizer.tx.update)(grads, state, params, active=active)
        return flat(changes), len(jax.tree.leaves(state))

    def trained(tree):
        parts = {k: v for k, v in tree.items() if k != "sam_prompt_encoder"}
        return parts | {"image_encoder": {"trunk": tree["image_encoder"]["trunk"]}}

    whole, count = update(zero_untouched("clicks", draw(1)), draw(0))
    part, same_count = update(zero_untouched("clicks", trained(draw(1))), trained(draw(0)))
    assert count == same_count
    assert len(part) == len(whole) - 3
    for path, value in part.items():
        np.testing.assert_array_equal(value, whole[path], err_msg=path)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    kinds = ["single", "clicks", "masks", "masks", "single", "clicks"]
    start, grads, params, _ = run(kinds)
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in flat(start).items()}
    del tensors["sam_prompt_encoder/gaussian"]
    groups = []
    for k, tensor in tensors.items():
        decay = 0.0 if "bias" in k or k.endswith("/scale") else 0.1
        groups.append({"params": [tensor], "weight_decay": decay, "name": k})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for step, (kind, grad) in enumerate(zip(kinds, grads, strict=True)):
        for k, g in flat(grad).items():
            if k in tensors:
                touched = not k.startswith(UNTOUCHED[kind])
                tensors[k].grad = torch.tensor(g) if touched else None
        for group in optimizer.param_groups:
            lo, hi = (3e-3, 3e-2) if group["name"].startswith("image_encoder") else (5e-3, 5e-2)
            group["lr"] = lo + 0.5 * (hi - lo) * (1 + np.cos(np.pi * step / SETTINGS.steps))
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), SETTINGS.clip_norm)
        optimizer.step()
    got = flat(params)
    for k, tensor in tensors.items():
        np.testing.assert_allclose(
            got[k], tensor.detach().numpy(), rtol=RELATIVE, atol=RELATIVE, err_msg=k
        )


def test_clip_uses_the_reference_coefficient():
    # Gradients so small that the 1e-6 beside the norm shows.
    tx = updates.clip_by_global_norm(2e-6)
    big, _ = tx.update(jnp.array([3e-6, 4e-6]), tx.init({}))
    np.testing.assert_allclose(np.asarray(big), [3e-6 * 2 / 6, 4e-6 * 2 / 6], rtol=1e-5)
    small, _ = tx.update(jnp.array([3e-7, 4e-7]), tx.init({}))
    np.testing.assert_array_equal(np.asarray(small), np.array([3e-7, 4e-7], np.float32))


def test_layer_decay_follows_the_blocks():
    trunk = "image_encoder/trunk"
    paths = [
        f"{trunk}/patch_embed/kernel",
        f"{trunk}/pos_embed",
        *(f"{trunk}/blocks_{i}/attn/qkv/kernel" for i in range(12)),
        "no_mem_embed",
    ]
    scales = optim.layer_scales(paths, 0.9, 0.3, ((("*pos_embed*",), 1.0),))
    assert scales[f"{trunk}/pos_embed"] == scales["no_mem_embed"] == 1.0
    assert scales[f"{trunk}/patch_embed/kernel"] == 0.3  # 0.9 ** 13 = 0.254
    assert scales[f"{trunk}/blocks_11/attn/qkv/kernel"] == 0.9
    assert scales[f"{trunk}/blocks_2/attn/qkv/kernel"] == 0.9**10
    with pytest.raises(UserError, match="layer_decay_overrides.*rel_pos"):
        optim.layer_scales(paths, 0.9, 0.0, ((("*rel_pos*",), 1.0),))
    with pytest.raises(UserError, match="'no_mem_embed'.*for the trunk only.*image_encoder/trunk/"):
        optim.layer_scales(paths, 0.9, 0.0, ((("no_mem_embed",), 1.0),))
    whole = optim.layer_scales(paths, 0.9, 0.0, ((("*",), 0.5),))
    assert set(whole[path] for path in paths[:-1]) == {0.5}


def test_layer_decay_scales_the_whole_update():
    params = draw(0)  # a trunk without blocks: all of it comes before the first

    def update(decay):
        tx = optim.make_optimizer(SETTINGS._replace(layer_decay=decay), params, "2.1").tx
        active = optim.active_groups(CLICKS)
        return flat(jax.jit(tx.update)(params, tx.init(params), params, active=active)[0])

    plain, decayed = update(1.0), update(0.5)
    for path, value in plain.items():
        share = 0.5 if path.startswith("image_encoder/trunk") else 1.0
        np.testing.assert_allclose(decayed[path], share * value, rtol=1e-6)
