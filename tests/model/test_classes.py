"""Classes of modules, and by them the reference's exemption from weight decay."""

import jax

from configs import default
from sam2_jax import optim, recipe, rules
from sam2_jax.model.classes import module_classes
from sam2_jax.model.sam2 import init_params, make_sam2


def test_every_module_that_holds_parameters_has_its_class():
    model = make_sam2("nano", 64, "2.0")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    classes = module_classes(model)
    holders = {path.rpartition("/")[0] for path in rules.paths_of(shapes)}
    assert holders <= set(classes)
    expected = {
        "image_encoder": "ImageEncoder",
        "image_encoder/trunk/blocks_0/norm1": "LayerNorm",
        "image_encoder/trunk/patch_embed": "Conv",
        "sam_mask_decoder/upscale_norm": "LayerNorm2d",
        "memory_attention/layers_0_linear1": "Dense",
        "obj_ptr_proj/layers_0": "Dense",
        "": "Sam2",
    }
    assert {path: classes.get(path) for path in expected} == expected


def test_layer_norms_and_biases_alone_do_not_decay():
    config = default.get_config("nano")
    model = make_sam2("nano", 64)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    optimizer = optim.make_optimizer(recipe.make_optim_settings(config), shapes, "2.1")
    for path, label in optimizer.labels.items():
        if label != optim.FROZEN:
            decays = optim.values_of_path(optimizer, path, 0)["weight_decay"] > 0
            assert decays == (not ("bias" in path or path.endswith("/scale"))), path
