__version__ = "0.1.0"

from mednext_v2.public import HOME_OF, list_names as __dir__, lookup as __getattr__

__all__ = list(HOME_OF)

del HOME_OF
