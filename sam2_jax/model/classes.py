"""The class of every module, for rules that select parameters by it."""

import flax.linen as nn
import jax

from sam2_jax.model.sam2 import Sam2


def module_classes(model: Sam2) -> dict[str, str]:
    """Slash path of every module, '' for the whole -> name of its class.

    Traces the initialisation and computes nothing.
    """
    small = model.clone(resolution=64)  # as in init_params
    classes: dict[str, str] = {}

    def note(method, args, kwargs, context):
        classes["/".join(context.module.path)] = type(context.module).__name__
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda key: small.init(key, method="touch_everything"), jax.random.key(0))
    return classes
