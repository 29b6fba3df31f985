"""How the codes and outputs of two forms of a model differ, layer by layer: the report of `verify`.

A *form* is the trained model, a converted one, a file or a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How many codes an operation without a defined order of its sums may be off.
ISLAND_STEP = 1


@dataclass(frozen=True)
class LayerComparison:
    """How the codes of one quantizer differ between two forms of a model.

    Attributes:
        name: of the module whose output it quantizes, else the quantizer's own (``"0.input_fake_quant"``); in a
            fixed-point network of the layer that reads the codes. From the second call on with the call's number:
            ``"conv (call 2)"``.
        codes: how many codes were compared.
        differing: how many of them differ.
        largest: the largest difference, in codes; 2^31 if NaN stands on one side only.
        island: names of operators between the codes that the layer reads and those it makes whose sums have no defined
            order (softmax, LayerNorm, a layer in float), or that round on the way to codes of 16 bits or of floats:
            then any number of codes may differ, by one each. Empty: none may.

    Examples:
        >>> layer = LayerComparison("conv", codes=1000, differing=5, largest=1)
        >>> layer.fraction
        0.005
        >>> layer.is_within(max_fraction=0.0, max_step=0), layer.is_within(max_fraction=0.01, max_step=1)
        (False, True)
    """

    name: str
    codes: int
    differing: int
    largest: int
    island: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """Fraction of the codes that differ, which is ``differing / codes``, or 0 if no code was compared."""
        return self.differing / max(self.codes, 1)

    def is_within(self, max_fraction: float, max_step: int) -> bool:
        """Whether at most ``max_fraction`` of the codes differ, and by ``max_step`` codes at most.

        Behind an island (``island`` is not empty) any number of codes may differ by one, whatever the arguments.
        """
        if self.island and self.largest <= ISLAND_STEP:
            return True
        return self.fraction <= max_fraction and self.largest <= max_step


@dataclass(frozen=True)
class OutputComparison:
    """How the outputs of two forms of a model differ.

    A *prediction* is the index of the largest value along axis 1, for float outputs of shape (batch, classes, ...).

    Attributes:
        elements: how many numbers were compared, floats and whole numbers.
        largest: largest absolute difference of floats, 0.0 without floats; NaN if somewhere one of two compared floats
            is NaN and the other is not.
        predictions: how many predictions were compared.
        differing_predictions: how many of them differ.
        differing_integers: how many whole numbers and bools differ. Indices may, of equal values: ``topk`` and ``sort``
            return any of these first, and quantized tensors have many.

    Examples:
        >>> OutputComparison(20, 0.5, predictions=2, differing_predictions=1, differing_integers=0).agreement
        0.5
    """

    elements: int
    largest: float
    predictions: int
    differing_predictions: int
    differing_integers: int = 0

    @property
    def agreement(self) -> float:
        """Fraction of predictions that are the same; 1.0 if no predictions were compared."""
        return 1.0 - self.differing_predictions / max(self.predictions, 1)


@dataclass(frozen=True)
class VerificationReport:
    """The result of :func:`verify`; ``print`` it for a table.

    Attributes:
        layers: one comparison per quantizer and call, over all batches, in the order in which the trained model first
            runs the quantizers.
        outputs: the comparison of all output tensors, over all batches.
        unread: names of layers, without a call's number, with results that nothing reads: the deployed model does not
            compute these, and they are not compared.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
        >>> images = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
        >>> qat = tritonq.prepare_qat(model, example_inputs=images)
        >>> _ = qat(images)
        >>> report = tritonq.verify(qat.eval(), tritonq.convert(qat), images)
        >>> report.agrees(), report.first_difference, [layer.name for layer in report.layers]
        (True, None, ['0.input_fake_quant', '0'])
    """

    layers: tuple[LayerComparison, ...]
    outputs: OutputComparison
    unread: tuple[str, ...] = ()

    @property
    def first_difference(self) -> LayerComparison | None:
        """The first layer with a code that differs, or None."""
        return next((layer for layer in self.layers if layer.differing), None)

    @property
    def total(self) -> LayerComparison:
        """The sum of all layers, as one comparison named ``"all layers"``, with an empty ``island``.

        Its ``largest`` is the largest of all, 0 without layers.
        """
        return LayerComparison(
            "all layers",
            sum(layer.codes for layer in self.layers),
            sum(layer.differing for layer in self.layers),
            max((layer.largest for layer in self.layers), default=0),
        )

    def agrees(self, max_fraction: float = 0.0, max_step: int = 0) -> bool:
        """Whether in every layer at most ``max_fraction`` of the codes differ, by at most ``max_step`` codes.

        Behind islands any number of codes may differ by one. ``outputs`` do not count: a difference in them, with equal
        codes, comes from what is computed in float behind the last codes, or from indices of equal values, which
        ``topk`` and ``sort`` return in any order.
        """
        return self.first_beyond(max_fraction, max_step) is None

    def first_beyond(self, max_fraction: float = 0.0, max_step: int = 0) -> LayerComparison | None:
        """Return the first layer in which over ``max_fraction`` of the codes differ, or one by over ``max_step`` codes.

        A layer directly behind an island (its ``island`` is not empty) does not count if its codes differ by one at
        most. None: there is no such layer.
        """
        return next((layer for layer in self.layers if not layer.is_within(max_fraction, max_step)), None)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in (*self.layers, self.total))
        lines = [f"{'layer':{width}}  {'codes':>12}  {'differing':>10}  {'fraction':>9}  {'by at most':>10}"]
        lines += [
            f"{layer.name:{width}}  {layer.codes:>12,}  {layer.differing:>10,}  {layer.fraction:>9.4%}  "
            f"{layer.largest:>10}" + (f"  island: {', '.join(layer.island)}" if layer.island else "")
            for layer in (*self.layers, self.total)
        ]
        if any(layer.island for layer in self.layers):
            why = "add floats in no defined order, or round to codes of 16 bits or of floats"
            lines.append(f"island: these operators {why}; codes may differ by one")
        if self.unread:
            lines.append(f"not compared, since nothing reads what they make: {', '.join(self.unread)}")
        first, outputs = self.first_difference, self.outputs
        lines.append("no code differs" if first is None else f"first difference: {first.name}")
        lines.append(
            f"outputs: {outputs.elements:,} numbers, largest difference {outputs.largest:.3g}; "
            f"{outputs.differing_predictions:,} of {outputs.predictions:,} predictions differ"
        )
        if outputs.differing_integers:
            why = "allowed where they are indices of equal values, which topk and sort return in any order"
            lines.append(f"outputs: {outputs.differing_integers:,} whole numbers differ: {why}")
        return "\n".join(lines)


def compare_codes(name: str, one: Tensor, other: Tensor, island: tuple[str, ...] = ()) -> LayerComparison:
    """Return how many codes of one layer differ, and the largest difference in codes.

    NaN in both is equal; NaN in one of them is a difference of 2^31.

    Args:
        name: of the layer.
        one: codes of the trained model, whole numbers as floats.
        other: codes of the deployed model, on the same device. Axes of size 1 may be missing or added, and all
            axes but the last may be merged into one.
        island: names of operators (softmax, say) before the codes for which these may differ by one; empty: none may.
            It changes no count: the result keeps it for :meth:`LayerComparison.is_within`.

    Raises:
        ValueError: the shapes differ in another way.
    """
    if [size for size in one.shape if size != 1] == [size for size in other.shape if size != 1]:
        other = other.reshape(one.shape)  # a file may hold the codes of a mean before its axes are dropped
    if other.dim() == 2 < one.dim() and one.flatten(0, -2).shape == other.shape:
        other = other.reshape(one.shape)  # and those of a linear layer as a matrix
    if one.shape != other.shape:
        raise ValueError(f"the codes of {name!r} have shape {tuple(one.shape)} and {tuple(other.shape)}")
    # NaN has no code; one on one side alone is the largest difference there is.
    steps = torch.where(one.isnan() & other.isnan(), 0.0, (one - other).abs()).nan_to_num(nan=2.0**31)
    largest = int(steps.max()) if steps.numel() else 0
    return LayerComparison(name, one.numel(), int(torch.count_nonzero(steps)), largest, island)


def add_layers(one: LayerComparison | None, other: LayerComparison) -> LayerComparison:
    """Return one comparison of a layer from those of two batches; ``other`` itself if ``one`` is None.

    ``codes`` and ``differing`` are added, ``largest`` is the larger of the two, and ``name`` and ``island`` are those
    of ``other``.
    """
    if one is None:
        return other
    return LayerComparison(
        other.name,
        one.codes + other.codes,
        one.differing + other.differing,
        max(one.largest, other.largest),
        other.island,
    )


def add_outputs(sum_: OutputComparison | None, expected: list[Tensor], found: list[Tensor]) -> OutputComparison:
    """Return the comparison of outputs so far with that of another batch added.

    Args:
        sum_: the comparison so far, which is not changed; None before the first batch.
        expected: the trained model's output tensors for this batch.
        found: the deployed model's, on the same device; they may have other dtypes.

    Raises:
        ValueError: the lists differ in length, or two tensors in shape.
    """
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
        raise ValueError(f"the outputs have the shapes {shapes[0]} and {shapes[1]}")
    result = sum_ or OutputComparison(0, 0.0, 0, 0)
    for one, other in zip(expected, found, strict=True):
        distance = torch.where(one == other, 0.0, (one.double() - other.double()).abs())
        distance = distance.masked_fill(one.isnan() & other.isnan(), 0.0)
        is_whole = not one.is_floating_point()
        largest = float(distance.max()) if distance.numel() and not is_whole else 0.0
        predictions = differing = 0
        if one.dim() >= 2 and one.numel() and one.is_floating_point():
            classes = one.argmax(1), other.argmax(1)
            predictions, differing = classes[0].numel(), int((classes[0] != classes[1]).sum())
        result = OutputComparison(
            result.elements + one.numel(),
            max(result.largest, largest) if largest == largest else largest,
            result.predictions + predictions,
            result.differing_predictions + differing,
            result.differing_integers + (int(torch.count_nonzero(distance)) if is_whole else 0),
        )
    return result
