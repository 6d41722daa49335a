"""The decoder's matrix product; test_golden_logits.py and test_parity.py compare the decoder with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpo_jax.models import products


def operands(length, dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 40, length)).astype(dtype), rng.normal(size=(length, 24)).astype(dtype)


def error(product, x, kernel):
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    return np.sqrt(np.mean((np.asarray(product, np.float64) - exact) ** 2))


@pytest.mark.parametrize("length", [513, 1536, 1541, 8 * products.BLOCK])
def test_a_long_product_is_summed_in_blocks(length):
    x, kernel = operands(length)
    blocked, plain = jax.jit(products.dot_in_blocks)(x, kernel), jax.jit(jnp.matmul)(x, kernel)
    assert error(blocked, x, kernel) < 0.8 * error(plain, x, kernel)
    np.testing.assert_allclose(blocked, plain, atol=1e-3)


def test_short_products_and_other_types_are_left_alone():
    for x, kernel in (operands(4 * products.BLOCK), [jnp.asarray(a, jnp.bfloat16) for a in operands(1536)]):
        assert products.dot_in_blocks(x, kernel).dtype == x.dtype
        assert str(jax.make_jaxpr(products.dot_in_blocks)(x, kernel)).count("dot_general") == 1


def test_gradients_of_a_long_product():
    x, kernel = operands(1100)
    weight = np.random.default_rng(1).normal(size=(3, 40, 24)).astype(np.float32)
    d_x, d_kernel = jax.grad(lambda *args: (products.dot_in_blocks(*args) * weight).sum(), argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(d_x, weight @ kernel.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(d_kernel, np.einsum("btd,btf->df", x, weight), rtol=1e-4, atol=1e-3)


def test_gradients_of_a_product_of_low_rank():
    x, a = operands(96)
    rng = np.random.default_rng(1)
    b, weight = (rng.normal(size=size).astype(np.float32) for size in ((24, 256), (3, 40, 256)))

    def gradients(product):
        def loss(*args):
            return (jax.nn.silu(product(*args)) * weight).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    expected = gradients(lambda x, a, b: x @ a @ b)(x, a, b)
    for ours, automatic in zip(gradients(products.low_rank)(x, a, b), expected, strict=True):
        np.testing.assert_allclose(ours, automatic, rtol=1e-4, atol=1e-4 * np.abs(automatic).max())
    # No transposed copy of the wide gradient, of 120 tokens and 256 features, as automatic differentiation makes it.
    assert "f32[256,120]" not in gradients(products.low_rank).lower(x, a, b).compile().as_text()
