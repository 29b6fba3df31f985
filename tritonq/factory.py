"""Factories of modules with some arguments fixed: what a QConfig holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tritonq.quantized_type import QuantizedType

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")


class Factory(Generic[T]):
    """Makes a new instance of a class on each call, with arguments fixed beforehand; can be chained and pickled.

    ``Observer.with_args(dtype=torch.qint8).with_args(ch_axis=1)()`` equals ``Observer(dtype=torch.qint8, ch_axis=1)``.

    Args:
        make: the class, or a function that makes an instance.
        arguments: named arguments that are fixed; None: none.

    Source: torch.ao.quantization.observer.
    """

    def __init__(self, make: Callable[..., T], arguments: dict[str, Any] | None = None) -> None:
        self.make = make
        self.arguments = dict(arguments or {})

    def with_args(self, **arguments: Any) -> Factory[T]:
        """Return a new factory with more arguments fixed; those given here replace fixed ones of the same name."""
        return Factory(self.make, {**self.arguments, **arguments})

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Return a new instance; arguments given here win over the fixed ones."""
        return self.make(*args, **{**self.arguments, **kwargs})

    @property
    def __name__(self) -> str:
        """The name of the class, followed by that of the argument ``observer`` in brackets if there is one.

        torchao searches it for "PerChannel".
        """
        observer = self.arguments.get("observer")
        name = getattr(self.make, "__name__", type(self.make).__name__)
        return name if observer is None else f"{name}({getattr(observer, '__name__', observer)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Factory[T]:
        # Nothing changes a factory, and what it holds (a process group, say) need not be copyable.
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factory) and (self.make, self.arguments) == (other.make, other.arguments)

    def __hash__(self) -> int:
        return hash((self.make, tuple(sorted(self.arguments))))

    def __repr__(self) -> str:
        fixed = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{getattr(self.make, '__name__', self.make)}.with_args({fixed})"


class WithArgs:
    """Gives a class torch.ao's ``with_args``, and makes instances known to torch.ao and torchao where these are loaded.

    Both ask whether a module is an instance of their own ``ObserverBase`` or ``FakeQuantizeBase``. When an observer is
    instantiated, its class becomes a virtual subclass of their ``ObserverBase``, and a fake quantizer's class of their
    ``FakeQuantizeBase``, so that ``QConfig`` and ``QuantizationSpec`` take it. A class names these base classes in
    ``library_bases``, as pairs such as ``("torch.ao.quantization.observer", "ObserverBase")``.
    """

    # Modules and names of the libraries' base classes.
    library_bases: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Register ``cls`` with those of torch.ao and torchao that are loaded, and return a new instance."""
        for module, name in cls.library_bases:
            base: Any = getattr(sys.modules.get(module), name, None)
            if base is not None and not issubclass(cls, base):
                base.register(cls)
        return super().__new__(cls)

    @classmethod
    def with_args(cls, **arguments: Any) -> Factory[Any]:
        """Return a factory of this class with ``arguments`` fixed."""
        return Factory(cls, arguments)


def make_observer(observer: Callable[..., T], **arguments: Any) -> T:
    """Return ``observer(**arguments)``, with ``observer`` a class of observers or a factory of one.

    Raises:
        TypeError: the result is no observer of tritonq (it has no ``qtype``), but for example torch.ao's of that name,
            or ``observer`` has no argument of a name in ``arguments``.
        ValueError: the observer refuses an argument, such as an unknown dtype.
    """
    made = observer(**arguments) if callable(observer) else observer
    if not isinstance(getattr(made, "qtype", None), QuantizedType):
        got = f"{type(made).__module__}.{type(made).__qualname__}"
        raise TypeError(
            f"observer must be a class or factory of tritonq's observers (own ones inherit RangeObserver), got {got}"
        )
    return made
