"""kanlm: language models with Kolmogorov-Arnold (KAN) feed-forward blocks.

After `import kanlm` the Auto classes of transformers know the models, so that `from_pretrained` asks for no
trust in remote code.
"""

import importlib.abc
import importlib.util
import sys

__version__ = "0.1.0"

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Registration(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports kanlm.model, which registers the classes, right after transformers' Auto classes are imported.

    Importing it at once would cost every `kanlm --help` the seconds that torch and transformers take.
    """

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.__spec__.loader = self.loader
        importlib.import_module("kanlm.model")


if _AUTO_CONFIG in sys.modules:
    importlib.import_module("kanlm.model")
else:
    sys.meta_path.insert(0, _Registration())
