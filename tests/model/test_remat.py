"""What the backward pass is given: less where layers are computed again."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from opendet_jax.batch import Images
from opendet_jax.model.opendet import OpenDet

WAYS = {"kept": {}, "products": {"remat": True, "remat_keeps": "products"}, "nothing": {"remat": True}}


def residuals(function, params) -> int:
    """Bytes that the backward pass of `function` reads, parameters included; nothing is computed."""
    pull = jax.eval_shape(lambda params: jax.vjp(function, params)[1], params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def backbone(model, params, images):
    return model.apply({"params": params}, images.pixels / 255, method=lambda model, x: model.backbone(x, True))


def encoder(model, params, images):
    def encode(model, images):
        stop = jax.lax.stop_gradient  # of the backbone nothing is kept
        return model.encoder(jax.tree.map(stop, model.neck(model.backbone(images.pixels / 255, True), images.mask)))

    return model.apply({"params": params}, images, method=encode).tokens


def decoder(model, params, images):
    def decode(model, images):
        _, memory, queries = jax.tree.map(jax.lax.stop_gradient, model.look(images, True))
        sees = jnp.ones((*queries.valid.shape, queries.valid.shape[1]), bool)
        return model.decoder(queries.content, queries.boxes, memory, sees).hidden

    return model.apply({"params": params}, images, method=decode)


@pytest.mark.parametrize("part", [backbone, encoder, decoder])
def test_less_is_kept(tiny, tiny_params, tiny_images: Images, part):
    images = jax.tree.map(jnp.asarray, tiny_images)
    sizes = {
        way: residuals(lambda params: part(OpenDet(replace(tiny, **fields)), params, images), tiny_params)  # noqa: B023
        for way, fields in WAYS.items()
    }
    assert sizes["nothing"] < sizes["products"] < sizes["kept"]
