"""transformers' Auto classes learn of kanlm's models by `import kanlm`, which itself waits for neither.

Registering needs the classes, and with them seconds of torch. So it happens when transformers' own Auto
classes are imported, and not in the middle of it: the models need modules that import the Auto classes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
WATCHED = ("transformers.", "kanlm.model")


def register_when_imported() -> None:
    """Let `kanlm.model` register its classes now if the Auto classes are there, else once they are."""
    if AUTO_CLASSES in sys.modules:
        importlib.import_module("kanlm.model")
    else:
        sys.meta_path.insert(0, AfterAutoClasses())


class AfterAutoClasses(importlib.abc.MetaPathFinder, threading.local):
    """Finds modules as the other finders do; after the outermost of the watched ones that brought the Auto
    classes it imports `kanlm.model` and is gone.
    """

    unfinished = 0
    """Watched modules that this thread is in the middle of importing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(WATCHED):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            self.follow(spec.loader)
        return spec

    def follow(self, loader: importlib.abc.Loader) -> None:
        """Count the run of the loader's module, and act after the outermost."""
        run = loader.exec_module

        def counted(module: ModuleType) -> None:
            self.unfinished += 1
            try:
                run(module)
            finally:
                self.unfinished -= 1
            if self.unfinished == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module("kanlm.model")

        loader.exec_module = counted  # type: ignore[method-assign]
