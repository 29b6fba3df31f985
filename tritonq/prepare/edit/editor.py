"""The one editor of models: it replaces a child, adds a child, rewrites a forward, and undoes all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from torch import nn

from tritonq.prepare.decide.analysis import EditableForward
from tritonq.prepare.forwards.edited import apply_forward, quantizing_data
from tritonq.prepare.forwards.graph import ForwardData
from tritonq.prepare.forwards.quantized import Read
from tritonq.prepare.record.snapshot import ModelSnapshot


class ModelEditor:
    """Edit a model in place. As a context manager it undoes every edit if its block raises.

    Names of modules are those in the float model, also after a module was replaced. Methods that take a module itself
    take the one that is in the model now. Edits of forwards take effect with :meth:`apply`.

    Args:
        model: the model.
        modules: the modules that may be edited, by qualified name; "" is the model.
        forward: takes the name of a module and returns its forward, to be edited.

    Attributes:
        model: the model.
        modules: the module that is now in the place of each float module, by the float module's name.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], forward: Callable[[str], EditableForward]
    ) -> None:
        self.model, self.modules = model, dict(modules)
        self._forward = forward
        self._snapshot = ModelSnapshot(model)
        self._graphs: dict[str, EditableForward] = {}
        self._added: dict[nn.Module, list[str]] = {}
        self._reads: dict[nn.Module, list[Read]] = {}
        self._returns: dict[nn.Module, str] = {}
        # For each module the places that hold it: parent and attribute.
        self._places: dict[nn.Module, dict[tuple[nn.Module, str], None]] = {}
        self._note_children(model)

    def __enter__(self) -> ModelEditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()

    def undo(self) -> None:
        """Undo all edits of the model since the editor was made, as :meth:`ModelSnapshot.restore` does.

        Classes, modes, attributes, children, hooks and buffers of all modules are put back. Values of parameters stay
        as they are. The editor's :attr:`modules` is not changed.
        """
        self._snapshot.restore()

    def replace(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of the module ``name`` under every parent that holds it.

        ``new`` gets the mode of the old module; children of ``new`` keep theirs. Hooks are not moved. The model itself
        has no parent and stays.
        """
        old = self.modules[name]
        new.training = old.training
        for parent, attribute in self._places.pop(old, {}):
            if parent._modules.get(attribute) is not old:
                continue
            parent._modules[attribute] = new
            self._places.setdefault(new, {})[parent, attribute] = None
        self._note_children(new)
        self.modules[name] = new

    def add_child(self, owner: nn.Module, base: str, child: nn.Module) -> str:
        """Add a child under the first free name among ``base``, ``base_1`` and so on, in its owner's mode.

        A name is free if ``owner`` has no attribute of that name. ``child`` itself is switched to the owner's mode,
        training or eval. It is hidden: after :meth:`apply` it is not among the owner's ``children()``.

        Returns:
            The name of the child.
        """
        name, count = base, 0
        while hasattr(owner, name):
            count += 1
            name = f"{base}_{count}"
        self.set_child(owner, name, child)
        self._added.setdefault(owner, []).append(name)
        return name

    def set_child(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        """Add a child under the name ``name``, in its owner's mode; a child of that name is replaced.

        It is not hidden: the owner's ``children()`` has it.
        """
        owner.add_module(name, child.train(owner.training))
        self._places.setdefault(child, {})[owner, name] = None
        self._note_children(child)

    def quantize_argument(self, module: nn.Module, read: Read) -> None:
        """Let a module quantize one argument before its forward begins; takes effect with :meth:`apply`.

        ``read`` says which argument, by position or name, and which child of the module is its quantizer.
        """
        self._reads.setdefault(module, []).append(read)

    def quantize_result(self, module: nn.Module, child: str) -> None:
        """Let a module quantize what its forward returns, with its child ``child``; takes effect with :meth:`apply`.

        A result that is no floating-point tensor, such as a tuple of tensors, is then returned as it is.
        """
        self._returns[module] = child

    def rewrite(self, owner: str) -> EditableForward:
        """Return the forward of the module named ``owner``, to be edited; the same object in every call.

        It is a ``ForwardGraph``, or an ``AnsweredForward`` for a forward that keeps its branches; both have the same
        methods for edits. The caller must know that this forward can be edited.
        """
        if owner not in self._graphs:
            self._graphs[owner] = self._forward(owner)
        return self._graphs[owner]

    def apply(self) -> None:
        """Put edited forwards on their modules, and hide the children that :meth:`add_child` added.

        It is called once, after all other edits.

        ``children()`` leaves hidden children out, and a container does not run, count or index them; they are still in
        ``named_modules()`` and state dicts. A ``torch.fx.GraphModule`` hides no children.
        """
        graphs = {self.modules[owner]: graph.to_data() for owner, graph in self._graphs.items()}
        for module in dict.fromkeys([*graphs, *self._reads, *self._returns, *self._added]):
            data: ForwardData = quantizing_data(self._reads.get(module, ()), self._returns.get(module))
            apply_forward(module, data | graphs.get(module, {}), self._added.get(module, ()))

    def _note_children(self, module: nn.Module) -> None:
        """Note which parent and attribute hold each child of a module."""
        for parent in module.modules():
            for attribute, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, {})[parent, attribute] = None
