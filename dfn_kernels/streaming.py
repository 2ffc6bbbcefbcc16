"""StreamingKNN, from the compiled host module; without it, a class of that name that says how to get it."""

try:
    from ._host import StreamingKNN
except ImportError as error:
    _WHY = str(error)

    class StreamingKNN:  # type: ignore[no-redef]
        def __init__(self, *args, **kwargs):
            raise RuntimeError(
                f"StreamingKNN: the host module is not available ({_WHY}): build it with `make env`, or "
                "`pip install --no-build-isolation .` from the source tree"
            )


__all__ = ["StreamingKNN"]
