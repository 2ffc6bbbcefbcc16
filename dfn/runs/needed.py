"""What the commands need beside torch."""

import importlib.util


def check_installed(*modules: str) -> None:
    """Raises RuntimeError, which says what to install, where one of the modules is missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"needs {' and '.join(missing)}: pip install 'dfn-kernels[models]'")
