"""The GPU and TPU kernels: interpreted against the oracle, and lowered for their platforms without one at hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.deformable_attention import (
    _say,
    deformable_attention,
    pallas_gpu,
    pallas_tpu,
    reference,
    xla,
)
from tests.ops.deformable_attention_cases import (
    arguments,
    assert_equal_to_rounding,
    kernels_in,
    lowered,
    with_gradients,
)

FORMS = {"gpu": pallas_gpu, "tpu": pallas_tpu}
SHAPES = ((5, 7), (1, 2))
oracle = with_gradients(reference.deformable_attention, SHAPES)


def form_with_gradients(form, shapes=SHAPES, **options):
    """As `with_gradients`, of one form's own two functions."""
    forward, backward = (partial(f, level_shapes=shapes, **options) for f in (form.forward, form.backward))
    return jax.jit(lambda *args: (forward(*args[:3]), *backward(*args)))


@pytest.fixture(scope="module", params=FORMS)
def kernel(request):
    return form_with_gradients(FORMS[request.param], interpret=True)


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_oracle_with_gradients(kernel, seed):
    args = arguments(seed, SHAPES)
    assert_equal_to_rounding(kernel(*args), oracle(*args))


@pytest.mark.parametrize("place", [-1e30, -2.0, 3.0, 1e30])
def test_far_points_read_nothing_and_have_no_gradient(kernel, place):
    value, locations, weights, cotangent = arguments(shapes=SHAPES)
    for array in kernel(value, jnp.full_like(locations, place), weights, cotangent):
        assert not np.any(np.asarray(array))


def test_equals_xla_where_points_lie_on_cell_centres(kernel):
    """There reading is continuous but has a corner: every form takes the slope towards the next cell."""
    value, locations, weights, cotangent = arguments(shapes=SHAPES)
    sizes = jnp.asarray([(w, h) for h, w in SHAPES], jnp.float32)[:, None]
    pixels = jnp.round(locations * sizes - 0.5)
    # Centres whose pixel the rounding of (pixel + ½) / size does not move: what is tested is the corner itself.
    centres = (pixels + 0.5) / sizes
    exact = centres * sizes - 0.5 == pixels
    assert exact.mean() > 0.5
    centres = jnp.where(exact, centres, 9.0)
    plain = form_with_gradients(xla)
    args = (value, centres, weights, cotangent)
    assert_equal_to_rounding(kernel(*args), plain(*args))


@pytest.mark.parametrize("name", FORMS)
def test_several_blocks_of_odd_sizes(name, monkeypatch):
    """One level, one point, a width that is no power of two, and more queries and tokens than a block has."""
    monkeypatch.setattr(pallas_gpu, "FORWARD_TILE", 64)
    monkeypatch.setattr(pallas_gpu, "BACKWARD_TILE", 32)
    monkeypatch.setattr(pallas_tpu, "TOKENS", 128)
    monkeypatch.setattr(pallas_tpu, "QUERIES", 128)
    shapes = ((13, 17),)
    args = arguments(3, shapes, batch=1, queries=131, heads=3, width=6, points=1)
    kernel = form_with_gradients(FORMS[name], shapes, interpret=True)
    with jax.enable_x64(True):
        oracle = with_gradients(reference.deformable_attention, shapes)
        exact = [np.asarray(x) for x in oracle(*(jnp.asarray(np.asarray(x), jnp.float64) for x in args))]
    assert {x.dtype for x in exact} == {np.dtype("float64")}
    assert_equal_to_rounding(kernel(*args), exact)


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_rounds_no_more_than_once_a_term(name):
    """Sums are float32: an error is at most a rounding of each term (TPU: of W) and one of the result."""
    shapes = ((5, 7),)
    value, locations, weights, cotangent = arguments(shapes=shapes, batch=1)
    value, cotangent = value.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    got = form_with_gradients(FORMS[name], shapes, interpret=True)(value, locations, weights, cotangent)
    value, cotangent = value.astype(jnp.float32), cotangent.astype(jnp.float32)
    oracle = with_gradients(reference.deformable_attention, shapes)
    want = oracle(value, locations, weights, cotangent)
    sizes = oracle(jnp.abs(value), locations, weights, jnp.abs(cotangent))  # Σ |term|: no share or weight is negative
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for i in (0, 1):
        error = np.abs(got[i].astype(jnp.float32) - want[i])
        assert np.all(error <= 2**-7 * sizes[i] + 1e-6)
    assert_equal_to_rounding(got[2:], want[2:])


@pytest.mark.parametrize(
    ("platform", "kernels"),
    [
        ("cpu", {"triton": 0, "mosaic": 0}),
        ("cuda", {"triton": 2, "mosaic": 0}),
        ("tpu", {"triton": 0, "mosaic": 3}),
    ],
)
@pytest.mark.parametrize(
    ("queries", "width", "points", "dtype"), [(6380, 32, 4, jnp.float32), (901, 24, 16, jnp.bfloat16)]
)
def test_each_platform_gets_its_own_form(platform, kernels, queries, width, points, dtype):
    shapes = ((60, 80), (30, 40), (15, 20), (8, 10))
    weights = jax.ShapeDtypeStruct((2, queries, 8, 4, points), jnp.float32)
    args = (
        jax.ShapeDtypeStruct((2, 6380, 8, width), dtype),
        jax.ShapeDtypeStruct((*weights.shape, 2), jnp.float32),
        weights,
        jax.ShapeDtypeStruct((2, queries, 8 * width), dtype),
    )
    text = lowered(with_gradients(deformable_attention, shapes), args, platform)
    assert kernels_in(text) == kernels
    if platform == "tpu":  # where both are slow
        assert "stablehlo.gather" not in text
        assert "stablehlo.scatter" not in text


@pytest.mark.parametrize(("platform", "kernel", "count"), [("cuda", "triton", 2), ("tpu", "mosaic", 3)])
def test_kernels_lower_under_vmap(platform, kernel, count):
    args = [jnp.stack([x, x]) for x in arguments()]
    assert kernels_in(lowered(jax.vmap(with_gradients(deformable_attention)), args, platform))[kernel] == count


@pytest.mark.parametrize(("platform", "kernel", "count"), [("cuda", "triton", 2), ("tpu", "mosaic", 3)])
def test_kernels_lower_in_a_program_for_several_devices(platform, kernel, count):
    assert kernels_in(lowered(with_gradients(deformable_attention), arguments(), platform, devices=2))[kernel] == count


@pytest.mark.parametrize("changed", ["load", "CompilerParams"])
def test_where_the_back_end_has_changed_xla_does_the_work_and_it_is_said_once(changed, monkeypatch, caplog):
    def refuse(*args, **keywords):
        raise TypeError("other arguments are wanted")

    monkeypatch.setattr(pallas_gpu.plgpu, changed, refuse)
    _say.cache_clear()
    jax.clear_caches()
    texts = [
        lowered(with_gradients(deformable_attention, shapes), arguments(shapes=shapes), "cuda")
        for shapes in [SHAPES, SHAPES[:1]]
    ]
    jax.clear_caches()
    assert [kernels_in(text)["triton"] for text in texts] == [0, 0]
    assert ["stablehlo.gather" in text for text in texts] == [True, True]
    assert caplog.text.count("cannot make the kernels for cuda (TypeError: other arguments are wanted)") == 1


def test_a_program_for_several_platforms_holds_the_form_of_each():
    exported = jax.export.export(jax.jit(with_gradients(deformable_attention)), platforms=("cpu", "tpu"))(*arguments())
    text = exported.mlir_module()
    assert text.count("tpu_custom_call") == 3
    assert "stablehlo.gather" in text
