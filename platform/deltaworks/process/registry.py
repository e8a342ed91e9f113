"""From the name in `deltaworks.yaml` to the app: `apps.NAME.module` is `package.module:name_of_the_app`."""

import importlib

from deltaworks.config import Config
from deltaworks.process.app import App
from deltaworks.process.check import AppError


def load_app(config: Config, name: str) -> App:
    """Import the app of that name.

    Raises:
        ConfigError: no such app in the configuration.
        AppError: its module does not import, or there is no app in it under that name.
    """
    target = config.app(name).module
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise AppError(
            f"cannot import app {name!r} from {target!r}: {error}; run where {module_name!r} can be imported, "
            f"or mend apps.{name}.module"
        ) from error
    found = getattr(module, attribute, None)
    if not isinstance(found, App):
        known = ", ".join(key for key, value in vars(module).items() if isinstance(value, App)) or "none"
        raise AppError(f"no app {attribute!r} in {module_name!r}; it has {known}; mend apps.{name}.module")
    return found
