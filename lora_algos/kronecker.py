"""The kernels of LoKr: a Kronecker product applied to activations, without forming dW."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_algos.kernels import (
    AdditiveKernel,
    Factors,
    Gradients,
    Mode,
    Prepared,
    SavedTensors,
    Term,
    cheapest,
    elementwise_cost,
)
from lora_algos.layer_op import LayerOp, num_positions, scaled, wide_product, wider_dtype


@dataclass(frozen=True)
class Kronecker(AdditiveKernel):
    """Factors (w1, w2)."""

    def whole_factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return w1 (a, c) and w2 (b, d, *kernel)."""
        w1, w2 = factors
        return w1, w2

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update (a b, c d, *kernel)."""
        w1, w2 = self.whole_factors(factors)
        pointwise = [1] * self.op.spatial_dims
        scaled_w1 = scaled(w1, self.scaling).view(*w1.shape, *pointwise)
        # torch.kron fails on a w2 that model.to(memory_format=torch.channels_last) has laid out
        return torch.kron(scaled_w1, w2.contiguous())

    def merged_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return W + dW; for Linear in one pass over the weight."""
        if self.op.spatial_dims:
            return self.delta(weight, factors).add_(weight)
        w1, w2 = self.whole_factors(factors)
        w1 = scaled(w1, self.scaling)
        a, c = w1.shape
        b, d = w2.shape
        w1_blocks = w1.view(a, 1, c, 1)
        w2_blocks = w2.view(1, b, 1, d)
        weight_blocks = weight.reshape(a, b, c, d)
        merged_blocks = torch.addcmul(
            weight_blocks,
            w1_blocks,
            w2_blocks,
        )
        return merged_blocks.view(self.shape)

    def terms(self) -> tuple[Term, ...]:
        """Return the factors, w1 times the scaling."""
        return Term(0, self.scaling), Term(1)

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        prepared: Prepared,
    ) -> tuple[Tensor, ...]:
        w1, w2 = prepared
        inner_output = self.apply_inner(x, self.inner_weight(w2), w1.shape[1])
        add_mixed_parts(y, w1, inner_output)
        return ()

    def inner_weight(self, w2: Tensor) -> Tensor:
        """Return the weight that is applied before w1, as (channels, d, *kernel)."""
        return w2.view(w2.shape[0], -1, *self.shape[2:])

    def apply_inner(
        self,
        x: Tensor,
        inner: Tensor,
        num_parts: int,
    ) -> Tensor:
        """Apply the inner weight to each part of the channels: (n, parts, channels, ...).

        n: tokens or images."""
        x_parts = parts_as_batch(self.op, x, num_parts)
        outputs = self.op.for_one_group()(x_parts, inner)
        return outputs.view(-1, num_parts, *outputs.shape[1:])

    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        # the gradient passes w2 first, so w2's output is not needed again
        w1, w2 = saved.prepared or self.prepare(saved.weight, saved.factors, grad.dtype)
        inner = self.inner_weight(w2)
        a, c = w1.shape
        op = self.op.for_one_group()
        x_parts = parts_as_batch(self.op, saved.activation, c)
        grad_parts = parts_as_batch(self.op, grad, a)
        batch_size = grad_parts.shape[0] // a
        part_shape = x_parts.shape[1:]
        mixed_shape = torch.Size((batch_size * a, *part_shape))
        mixed_grad = op.input_grad(grad_parts, inner, mixed_shape)
        mixed_grad = mixed_grad.view(batch_size, a, *part_shape)
        x_of_images = x_parts.view(
            batch_size,
            c,
            *part_shape,
        )
        w1_grad = self.w1_grad(mixed_grad, x_of_images)
        if input_grad is not None:
            add_mixed_parts(input_grad, w1.T, mixed_grad)
        grad_of_images = grad_parts.view(batch_size, a, *grad_parts.shape[1:])
        inner_output_grad = mix_parts(w1.T, grad_of_images).flatten(0, 1)
        inner_grad = op.weight_grad(inner_output_grad, x_parts, inner.shape)
        return w1_grad, inner_grad.view(w2.shape)

    def w1_grad(self, output_grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of w1, applied to the parts of `x` (n, c, ...).

        `output_grad` (n, a, ...)."""
        x_matrices = x.flatten(2)
        grad_matrices = output_grad.flatten(2)
        products = torch.bmm(grad_matrices, x_matrices.mT)
        dtype = wider_dtype(products.dtype)
        total = products.sum(0, dtype=dtype)
        return scaled(total, self.scaling)

    def merged_or_dense_grads(self, grad: Tensor, saved: SavedTensors) -> Gradients:
        if self.op.groups > 1:
            return super().merged_or_dense_grads(grad, saved)
        return self.output_grads(grad, saved, None)

    def has_factors_mode(self, factors: Factors) -> bool:
        return self.op.groups == 1

    def cheapest_mode(
        self,
        num_positions: int,
        is_wide: bool,
        factors: Factors,
    ) -> Mode:
        """Return the cheapest mode. Costs are operations, in the forward and backward pass."""
        w1, _ = self.whole_factors(factors)
        a, c = w1.shape
        out, fan_in = self.shape[0], self.shape[1:].numel()
        # mode merged saves w2 over the input, and w1 over the output and over the gradient
        saved_operations = fan_in * (out // a) + 2 * out * c
        merge_cost = 2 * elementwise_cost(self.shape, w1.device)
        costs: dict[Mode, float] = {
            "factors": 2.0 * num_positions * saved_operations,
            "merged": merge_cost,
            "dense": merge_cost + 4.0 * num_positions * out * fan_in,
        }
        return cheapest(costs, is_wide)


@dataclass(frozen=True)
class LowRankKronecker(Kronecker):
    """Factors (w1, w2_a, w2_b)."""

    def terms(self) -> tuple[Term, ...]:
        return Term(0, self.scaling), Term(1), Term(2)

    def whole_factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        w1, w2_a, w2_b = factors
        return w1, (w2_a @ w2_b).view(w2_a.shape[0], -1, *self.shape[2:])

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        prepared: Prepared,
    ) -> tuple[Tensor, ...]:
        w1, w2_a, w2_b = prepared
        inner_output = self.apply_inner(x, self.inner_weight(w2_b), w1.shape[1])
        mixed = mix_parts(w1, inner_output)
        add_outer(self.op, y, mixed, w2_a)
        return ()

    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        w1, w2_a, w2_b = saved.prepared or self.prepare(saved.weight, saved.factors, grad.dtype)
        inner = self.inner_weight(w2_b)
        num_parts = w1.shape[1]
        op = self.op.for_one_group()
        x_parts = parts_as_batch(self.op, saved.activation, num_parts)
        inner_output = self.apply_inner(saved.activation, inner, num_parts)
        mixed = mix_parts(w1, inner_output)
        mixed_grad, w2_a_grad = outer_grads(self.op, grad, mixed, w2_a)
        w1_grad = self.w1_grad(mixed_grad, inner_output)
        inner_output_grad = mix_parts(w1.T, mixed_grad).flatten(0, 1)
        if input_grad is not None:
            x_parts_grad = op.input_grad(inner_output_grad, inner, x_parts.shape)
            input_grad.add_(x_parts_grad.reshape(input_grad.shape))
        inner_grad = op.weight_grad(inner_output_grad, x_parts, inner.shape)
        return w1_grad, w2_a_grad, inner_grad.view(w2_b.shape)

    def cheapest_mode(
        self,
        num_positions: int,
        is_wide: bool,
        factors: Factors,
    ) -> Mode:
        return "factors"


def parts_as_batch(op: LayerOp, x: Tensor, num_parts: int) -> Tensor:
    """Return `x` with its channels split into parts that become part of the batch.

    A convolution's x as (n parts, d, *spatial), that of Linear as (n parts, d)."""
    if not op.spatial_dims:
        return x.reshape(-1, x.shape[-1] // num_parts)
    batch_size, channels, *sides = x.shape
    return x.reshape(batch_size * num_parts, channels // num_parts, *sides)


def mix_parts(w1: Tensor, z: Tensor) -> Tensor:
    """Apply w1 (a, c) to the parts of `z` (n, c, ...): (n, a, ...)."""
    mixed = torch.matmul(w1, z.flatten(2))
    return mixed.view(z.shape[0], w1.shape[0], *z.shape[2:])


def add_mixed_parts(y: Tensor, w1: Tensor, z: Tensor) -> None:
    """Apply w1 (a, c) to the parts of `z` (n, c, ...), and add the result to `y` in place."""
    if not y.is_contiguous():
        mixed = mix_parts(w1, z)
        y.add_(mixed.reshape(y.shape))
        return
    z_parts = z.flatten(2)
    num_images, _, part_size = z_parts.shape
    num_parts = w1.shape[0]
    y_parts = y.view(num_images, num_parts, part_size)
    w1_of_images = w1.expand(num_images, *w1.shape)
    y_parts.baddbmm_(w1_of_images, z_parts)


def add_outer(
    op: LayerOp,
    y: Tensor,
    mixed: Tensor,
    outer: Tensor,
) -> None:
    """Add the outer factor's output to `y` in place.

    `mixed` (n, a, channels, ...), `outer` (b, channels)."""
    n, a, channels = mixed.shape[:3]
    num_rows = outer.shape[0]
    if not op.spatial_dims:
        y_matrix = y.view(n * a, num_rows)
        y_matrix.addmm_(mixed.view(n * a, channels), outer.T)
        return
    size = num_positions(y)
    mixed_parts = mixed.view(n * a, channels, size)
    if y.is_contiguous():
        y_parts = y.view(n * a, num_rows, size)
        outer_of_parts = outer.expand(n * a, *outer.shape)
        y_parts.baddbmm_(outer_of_parts, mixed_parts)
    else:
        outputs = torch.matmul(outer, mixed_parts)
        y.add_(outputs.reshape(y.shape))


def outer_grads(
    op: LayerOp,
    grad: Tensor,
    mixed: Tensor,
    outer: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `mixed` and `outer`.

    `mixed` (n, a, channels, ...), `outer` (b, channels)."""
    num_rows = outer.shape[0]
    if not op.spatial_dims:
        grad_matrix = grad.reshape(-1, num_rows)
        mixed_grad = grad_matrix @ outer
        outer_grad = wide_product(grad_matrix.T, mixed.flatten(0, 1))
        return mixed_grad.view(mixed.shape), outer_grad
    n, a, channels = mixed.shape[:3]
    size = num_positions(grad)
    grad_parts = grad.reshape(n * a, num_rows, size)
    mixed_parts = mixed.view(n * a, channels, size)
    outer_grad = torch.bmm(grad_parts, mixed_parts.mT).sum(0)
    mixed_grad = torch.matmul(outer.T, grad_parts)
    return mixed_grad.view(mixed.shape), outer_grad
