"""GRAM-R²: generative reward models that reason, trained by self-training (arXiv 2509.02492).

The names below are looked up when they are first used: importing the package does nothing.
"""

_HOMES = {
    "load": "weights",
    "save": "weights",
    "logprobs": "scoring",
    "generate": "sampler",
    "generate_iter": "sampler",
    "Sample": "sampler",
    "Engine": "engine",
    "Limits": "requests",
    "RewardModel": "judge",
    "Pair": "records",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"gramr2.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"gramr2.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"gramr2.{name}":
            raise
        raise AttributeError(f"module 'gramr2' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
