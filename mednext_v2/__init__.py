__version__ = "0.1.0"

from mednext_v2.public import HOME_OF, lookup as __getattr__

__all__ = list(HOME_OF)
