"""Running an encoder again from a submodule on, without what comes before it.

``ProFusion`` applies the same encoders many times; only what they do from the injection site on
changes. An encoder's Python cannot be entered in the middle, so it runs from its top again, with
the submodules that had finished before the site replaced by what they returned the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deqfuse import checks
from deqfuse.nn.inspection import refuse_scripted, takes_time_first

__all__ = ["EncoderRun", "RandomState", "Site", "find_site", "tensors"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.RNNBase, *CONVOLUTIONS)


class Site(NamedTuple):
    """Where and how something is injected into one encoder."""

    name: str  # of the submodule; "" is the encoder itself
    width: int  # of what is injected
    axis: int  # of the features: -1, or 1 for a convolution
    batch: int  # dimension of the rows: 0, or 1 where time comes first
    how: Literal["add", "pad", "extend"]  # to the input; as columns behind it; to a Linear's output


def find_site(
    index: str,
    encoder: nn.Module,
    name: str,
    width: int | None,
    batch: int | None,
    inject: str,
) -> tuple[Site, nn.Linear | None]:
    """The injection site of one encoder, and the Linear that needs extra columns, if one does."""
    if not isinstance(name, str):
        raise TypeError(f"sites{index}: expected the name of a submodule, got {name!r}")
    refuse_scripted(index, encoder, name)
    try:
        target = encoder.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in encoder.named_modules() if known]
        raise ValueError(
            f"sites{index}: expected the name of a submodule of encoders{index}, one of {known}, "
            f"got {name!r}"
        ) from None
    layer = next(((k, m) for k, m in target.named_modules() if isinstance(m, LAYERS)), None)
    if width is not None:
        checks.positive_int(f"in_dims{index}", width)
    elif layer is None:
        raise ValueError(
            f"in_dims: expected the width of the injection site of encoders{index}, which has no "
            "Linear, convolution or recurrent layer to read it off, got None"
        )
    taken = None if layer is None else _input_width(layer[1])
    axis = 1 if layer is not None and isinstance(layer[1], CONVOLUTIONS) else -1
    if batch not in (None, 0, 1) or (batch == 1 and axis == 1):
        raise ValueError(
            f"batch_dims{index}: expected 0, or 1 for inputs (T, B, d) whose features are last, "
            f"got {batch!r}"
        )
    batch = int(takes_time_first(target)) if batch is None else batch
    if inject == "add":
        return Site(name, width or taken or 0, axis, batch, "add"), None
    if layer is None or not isinstance(layer[1], nn.Linear) or taken is None:
        got = "none" if layer is None else type(layer[1]).__name__
        raise ValueError(
            f"inject: 'concat' expected a Linear at the injection site of encoders{index}, to take "
            f"the extra columns, got {got}. Remedy: inject='add', or another site"
        )
    if width is not None and taken > width:
        return Site(name, taken - width, -1, batch, "pad"), None
    if width not in (None, taken):
        raise ValueError(
            f"in_dims{index}: expected at most {taken}, the columns that the first Linear takes, "
            f"got {width}"
        )
    return Site(f"{name}.{layer[0]}".strip("."), taken, -1, batch, "extend"), layer[1]


def _input_width(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.RNNBase):
        return layer.input_size
    return int(layer.in_channels)  # type: ignore[arg-type]


class RandomState:
    """The generators of the CPU and, where the data are, of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if self.device is not None else None

    def restore(self) -> None:
        """Draw from here on again."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @staticmethod
    @contextlib.contextmanager
    def kept(device: torch.device) -> Iterator[None]:
        """Whatever is drawn inside, draws outside go on as if it had not been."""
        before = RandomState(device)
        try:
            yield
        finally:
            before.restore()


class _Finished(NamedTuple):
    """A submodule's call that ended before the site was reached."""

    module: nn.Module
    output: Any
    versions: tuple[int | None, ...]  # of the tensors in `output`: in-place writes raise them
    drawing: RandomState  # afterwards


class EncoderRun:
    """One encoder on one input: run it as it is, then again with something injected at its site.

    Args:
        encoder: any module with one positional argument.
        name: of the encoder, for messages.
        site: the injection site.
        value: the encoder's input.
        device: where the data are, for the random generators.
    """

    def __init__(
        self, encoder: nn.Module, name: str, site: Site, value: Any, device: torch.device
    ) -> None:
        self.encoder, self.name, self.site, self.value = encoder, name, site, value
        self.target = encoder.get_submodule(site.name)
        self.device = device
        self.drawing = RandomState(device)  # when the site is reached
        self.shape: torch.Size | None = None  # of the features at the site
        self.finished: list[_Finished] = []
        self.stand_ins: list[tuple[nn.Module, str, nn.Module, _Remembered]] | None = None

    def first(self, again: bool) -> Any:
        """The encoder's output without injection.

        Args:
            again: remember what had been computed when the site was reached.
        """
        if not again and self.site.how != "pad":
            return self.encoder(self.value)
        reached: list[bool] = []

        def at_site(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not reached:
                reached.append(True)
                self.drawing = RandomState(self.device)
            return self._with_features(args, self._nothing_injected)

        handles = [self.target.register_forward_pre_hook(at_site)]
        if again and self.target is not self.encoder:
            handles += self._remember(reached)
        try:
            output = self.encoder(self.value)
        finally:
            for handle in handles:
                handle.remove()
        if not reached:
            raise ValueError(
                f"{self.name}: its forward never called the submodule {self.site.name!r}. Remedy: "
                "a site that it calls"
            )
        return output

    def _nothing_injected(self, x: Tensor) -> Tensor:
        """A copy, since what follows may work in place; with zeros behind it for "concat"."""
        self.shape = x.shape
        if self.site.how == "extend" and x.shape[-1] != self.site.width:
            raise ValueError(
                f"{self.name}: expected {self.site.width} columns at its first Linear, got "
                f"{x.shape[-1]}. Remedy: in_dims, if the Linear was built with extra columns for "
                "the context"
            )
        if self.site.how != "pad":
            return x.clone()
        return torch.cat([x, x.new_zeros(*x.shape[:-1], self.site.width)], dim=-1)

    def _remember(self, reached: list[bool]) -> list[RemovableHandle]:
        """Hooks that fill ``finished`` until the site is reached."""
        begun: list[int] = []

        def enter(module: nn.Module, args: Any) -> None:
            begun.append(len(self.finished))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            first = begun.pop()
            if not reached:
                del self.finished[first:]  # its own parts: the whole is remembered instead
                versions = tuple(map(version, tensors(output)))
                self.finished.append(_Finished(module, output, versions, RandomState(self.device)))

        handles = []
        for module in self.encoder.modules():
            if module is not self.target:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
        return handles

    def skipped(self) -> Iterator[nn.Module]:
        """Modules that ``again`` does not call."""
        for call in self.finished:
            yield from call.module.modules()

    def again(self, injected: Tensor) -> Any:
        """The encoder's output with ``injected`` (B, width) at its site.

        Only for "extend" it is (B, out_features). Random draws behind the site are repeated.
        """
        reached: list[bool] = []

        def at_site(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not reached:
                reached.append(True)
                self.drawing.restore()
            if self.site.how == "extend":
                return None
            return self._with_features(args, lambda x: self._inject(x, injected))

        handles = [self.target.register_forward_pre_hook(at_site)]
        if self.site.how == "extend":
            handles.append(
                self.target.register_forward_hook(
                    lambda module, args, out: out + self._align(injected, out, -1)
                )
            )
        if self.stand_ins is None:
            self.stand_ins = self._prepare()
        try:
            for parent, key, _, stand_in in self.stand_ins:
                parent._modules[key] = stand_in
                stand_in.begin()
            return self.encoder(self.value)
        finally:
            for parent, key, original, _ in self.stand_ins:
                parent._modules[key] = original
            for handle in handles:
                handle.remove()

    def _prepare(self) -> list[tuple[nn.Module, str, nn.Module, _Remembered]]:
        """Every place in the encoder that holds a remembered module, and what to put there."""
        calls: dict[nn.Module, list[_Finished]] = {}
        for call in self.finished:
            calls.setdefault(call.module, []).append(call)
        stand_ins = {module: _Remembered(module, own, self.name) for module, own in calls.items()}
        return [
            (parent, key, child, stand_ins[child])
            for parent in (self.encoder.modules() if calls else ())
            for key, child in parent._modules.items()
            if child is not None and child in stand_ins
        ]

    def _inject(self, x: Tensor, injected: Tensor) -> Tensor:
        aligned = self._align(injected, x, self.site.axis)
        if self.site.how == "pad":
            return torch.cat([x, aligned.expand(*x.shape[:-1], -1).to(x.dtype)], dim=-1)
        if x.shape[self.site.axis] != self.site.width or not x.is_floating_point():
            where = f"site {self.site.name!r}" if self.site.name else "input"
            raise ValueError(
                f"{self.name}: expected floating-point features of width {self.site.width} on axis "
                f"{self.site.axis} at its {where}, got shape {tuple(x.shape)}, {x.dtype}. Remedy: "
                "in_dims, or another site"
            )
        return x + aligned

    def _align(self, injected: Tensor, like: Tensor, axis: int) -> Tensor:
        """(B, width) with singleton dimensions: along ``like``'s rows and its features."""
        batch = self.site.batch
        if like.dim() > 2 and like.shape[batch] != len(injected):
            raise ValueError(
                f"{self.name}: expected {len(injected)} rows, those of the context, on dimension "
                f"{batch} at its site, got shape {tuple(like.shape)}. Remedy: batch_dims, 1 for "
                "(T, B, d); or batch_first=True in its layers, with inputs (B, T, d)"
            )
        return _aligned(injected[None] if batch else injected, like, axis)

    def may_be_mistaken(self, rows: int) -> bool:
        """Whether another dimension at the site is as long as that of the rows, by chance."""
        if self.shape is None or len(self.shape) < 3 or rows < 2:
            return False
        features = self.site.axis % len(self.shape)
        others = (n for i, n in enumerate(self.shape) if i not in (self.site.batch, features))
        return rows in others

    def _with_features(self, args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
        """Positional arguments with the features changed: a tensor, or the first of a sequence."""
        value: Any = args[0] if args else None
        packed = _is_packed(value)  # [values, lengths]
        x = value[0] if packed else value
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self.name}: expected its site to be called with a tensor, or with a sequence "
                f"that begins with one, as first positional argument, got {type(x).__name__}. "
                "Remedy: another site"
            )
        changed = change(x)
        if packed:
            changed = getattr(type(value), "_make", type(value))((changed, *value[1:]))
        return (changed, *args[1:])


def _is_packed(value: Any) -> bool:
    """A list or tuple, named ones too; torch's PackedSequence has rows of several lengths."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and not isinstance(value, nn.utils.rnn.PackedSequence)
    )


def _aligned(injected: Tensor, like: Tensor, axis: int) -> Tensor:
    """(B, width) with singleton dimensions, so that its last one meets ``axis`` of ``like``."""
    missing = like.dim() - injected.dim()
    if missing <= 0:
        return injected
    position = injected.dim() - 1 if axis == -1 else injected.dim()
    shape = (*injected.shape[:position], *[1] * missing, *injected.shape[position:])
    return injected.reshape(shape)


class _Remembered(nn.Module):
    """Stands in for a submodule: its earlier outputs first, then the submodule itself."""

    def __init__(self, original: nn.Module, calls: list[_Finished], name: str) -> None:
        super().__init__()
        # Not registered: it belongs to the encoder.
        self.__dict__.update(original=original, calls=calls, name=name, used=0)

    def begin(self) -> None:
        """Start with the first output again."""
        self.__dict__["used"] = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.used == len(self.calls):
            return self.original(*args, **kwargs)
        call = self.calls[self.used]
        self.__dict__["used"] += 1
        if tuple(map(version, tensors(call.output))) != call.versions:
            raise RuntimeError(
                f"{self.name}: what {type(self.original).__name__} computed before the injection "
                "site was written to in place after it, so that it cannot be used again. Remedy: "
                "inplace=False, or the encoder's input as the site"
            )
        call.drawing.restore()
        return call.output

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["original"], key)


def version(tensor: Tensor) -> int | None:
    """Rises with every write in place; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested sequences and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
