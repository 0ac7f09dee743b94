"""``PreparedFusion``: a layer for serving, whose parameters have been read and checked once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deqfuse import layer
from deqfuse.nn import inputs, solving
from deqfuse.nn.equations import Equations
from deqfuse.torch_private import in_transform_or_forward_mode, traced

__all__ = ["PreparedFusion"]

_VERSION = operator.attrgetter("_version")  # torch counts every write to a tensor there

_REFUSES_ABLATIONS = (
    "prepare: expected cells and injection of the layer's own, combine='purify' with its gate, no "
    "weight_tied_steps and no Unrolled(), got a layer whose equations are not one operator. "
    "Remedy: call the layer itself under torch.no_grad()"
)


def _refuses_dropout(p: float) -> str:
    """What is said of a layer that draws."""
    return (
        f"dropout: expected evaluation mode, got training mode with dropout={p:g}, of which every "
        "call draws anew. Remedy: layer.eval()"
    )


class PreparedFusion:
    """A :class:`deqfuse.DEQFusion` for many calls without gradients, as of one moment.

    Made by :meth:`deqfuse.DEQFusion.prepare`. A call goes straight to the launcher of the layer's
    backend; on the backend "cpu" the weights have also been brought into the form that its kernels
    read. Answers are those of the layer under ``torch.no_grad()``, bit for bit.

    It stands for the parameters and the options (solver, tolerance, backend, ``on_failure``) that
    the layer had when it was prepared. Parameters and buffers that were changed or replaced since
    are refused by name: an optimiser's step, ``load_state_dict``, ``to(dtype)``. What torch does
    not count is not seen: writes through ``.data`` or ``.detach().numpy()``, and a submodule that
    was replaced as a whole. It may be called from several threads. It holds the layer, and on the
    backend "cpu" copies of its matrices, together about 1.6 times as large as they are (more below
    64 features); they go with it.

    Args:
        equations: of the layer, with its parameters.
        how: solver, gradient, ``on_failure`` and backend.
        like: a parameter (...), of the dtype and device of the features; None without parameters.
        widths: of the N features.
        inject: (features, leading dimensions, present) -> N injections (B, d).
        owner: the layer.

    Raises:
        ValueError: training mode with dropout, equations that are not one operator, or a parameter
            without a version.

    Example:
        >>> import torch
        >>> from deqfuse import DEQFusion
        >>> fusion = DEQFusion(64, num_modalities=2).eval()
        >>> serve = fusion.prepare()
        >>> xs = [torch.randn(1, 64) for _ in range(2)]
        >>> torch.equal(serve(xs), fusion(xs))
        True
    """

    def __init__(
        self,
        equations: Equations,
        how: solving.How,
        like: Tensor | None,
        widths: Sequence[int],
        inject: Callable[[Sequence[Tensor], torch.Size, Tensor | None], list[Tensor]],
        owner: nn.Module,
    ) -> None:
        own: Any = owner
        if own.training and own.dropout:
            raise ValueError(_refuses_dropout(own.dropout))
        whole = solving.is_whole(equations, how) and own.weight_tied_steps is None
        if like is None or not whole:
            raise ValueError(_REFUSES_ABLATIONS)
        self._watched = _watched(owner)
        self._how, self._like, self._widths = how, like, list(widths)
        self._inject, self._owner = inject, owner
        held = [t.detach() for t in equations.flat()]
        self._params, self._equations = held, _with_parameters(equations, held)
        dim = equations.fuse[0].shape[-1]
        self._solve, self._backend = layer.prepare_layer(
            like.detach().new_empty(0, dim), held, **solving.settings(equations, how)
        )

    def __call__(
        self,
        features: Sequence[Tensor],  # N tensors (..., d_i)
        *,
        present: Tensor | None = None,  # (..., N)
        return_info: bool = False,
        return_cells: bool = False,
    ) -> Any:
        """Fused features, as :meth:`deqfuse.DEQFusion.forward` has them, without gradients.

        Args:
            features: one tensor (..., d_i) per modality, of the dtype and device of the parameters.
            present: (..., N) bool, which modalities a row has; all when not given.
            return_info: also return a :class:`deqfuse.SolveInfo`.
            return_cells: also return the modality equilibria (N, ..., d).

        Returns:
            z (..., d), or with the flags a tuple, as of the layer.

        Raises:
            TypeError: an argument of a wrong type or dtype; a compiler or a transform of
                ``torch.func`` around the call, which see nothing of it.
            ValueError: a wrong number, shape or device of tensors, or a row with nothing present;
                the layer was put into training mode and has dropout.
            RuntimeError: a parameter was changed after the layer had been prepared.
            ConvergenceError: rows did not converge and ``on_failure="raise"``.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._answer(features, present, return_info, return_cells)
        return self._answer(features, present, return_info, return_cells)

    def _answer(
        self,
        features: Sequence[Tensor],
        present: Tensor | None,
        return_info: bool,
        return_cells: bool,
    ) -> Any:
        _check_fresh(self._watched)
        owner: Any = self._owner
        if owner.training and owner.dropout:
            raise ValueError(_refuses_dropout(owner.dropout))
        lead = inputs.check_features(features, self._widths, self._like)
        if traced(features[0]) or in_transform_or_forward_mode():
            raise TypeError(
                "features: expected plain tensors in eager mode, got a call inside of a compiler "
                "or of torch.func. Remedy: call the layer itself, or leave the prepared one out "
                "of what is compiled"
            )
        if present is not None:
            present = inputs.check_present(present, (*lead, len(self._widths)), features[0])
        xs = self._inject(features, lead, present)
        solved = self._solve(xs, present)
        if not (return_info or return_cells):  # what most calls want
            z = solved.z if solved.z.dtype is xs[0].dtype else solved.z.to(xs[0].dtype)
            return z if len(lead) == 1 else z.reshape(*lead, z.shape[-1])
        rows = solving.Rows(None, present)
        found = solving.of_layer(
            self._equations, self._how, xs, rows, self._params, solved, self._backend
        )
        return found.outputs(lead, xs[0].dtype, return_info, return_cells)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._owner!r})"


class _Watched(NamedTuple):
    """Parameters and buffers of a layer, and how they were when it was prepared."""

    names: list[str]
    places: list[tuple[dict[str, Any], str]]  # where nn.Module keeps them
    tensors: list[Tensor]
    versions: list[int]
    addresses: list[int]


def _watched(owner: nn.Module) -> _Watched:
    names, places, tensors = [], [], []
    for prefix, module in owner.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if tensor.is_inference():
                    raise ValueError(
                        f"prepare: expected parameters whose changes torch counts, got {name}, "
                        "made under torch.inference_mode(). Remedy: build or load the layer "
                        "outside of it"
                    )
                names.append(name)
                places.append((held, key))
                tensors.append(tensor)
    return _Watched(
        names, places, tensors, [t._version for t in tensors], [t.data_ptr() for t in tensors]
    )


def _check_fresh(watched: _Watched) -> None:
    """Raises where a parameter is not what it was. Loops in C: 3 us for a layer's dozens."""
    _, places, tensors, versions, addresses = watched
    now = [held.get(key) for held, key in places]
    if (
        all(map(operator.is_, now, tensors))
        and list(map(_VERSION, tensors)) == versions
        and list(map(Tensor.data_ptr, tensors)) == addresses
    ):
        return
    for name, (held, key), t, version, at in zip(*watched, strict=True):
        if held.get(key) is not t or t._version != version or t.data_ptr() != at:
            raise RuntimeError(
                f"{name}: expected the parameter that the layer was prepared with, got one that "
                "was changed or replaced since. Remedy: prepare the layer again, with "
                "layer.prepare()"
            )


def _with_parameters(equations: Equations, held: list[Tensor]) -> Equations:
    """The same equations with these parameters, in the order of ``flat()``."""
    cells, fuse = len(equations.cells), len(equations.fuse)
    weights, *bias = held[cells + fuse :]
    return equations._replace(
        cells=held[:cells],
        fuse=held[cells : cells + fuse],
        weights=weights,
        bias=bias[0] if bias else None,
    )
